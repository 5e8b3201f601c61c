"""Runs training over real agents: launcher, coordinator's body, `train`."""

from .callbacks import Control, EarlyStopping
from .crew import Crew, connect, launch
from .emulation import Emulation, emulate
from .evaluation import Evaluation
from .recovery import Recovery, RecoveryEvent, TakeOver
from .replicas import read_replicas
from .result import (
    BestEvent,
    CheckpointEvent,
    DeviceEvent,
    EvaluationEvent,
    MeasuredEvent,
    PhaseEvent,
    RunEvent,
    StepEvent,
    TrainResult,
)
from .resume import restore
from .train import train

__all__ = [
    "BestEvent",
    "CheckpointEvent",
    "Control",
    "Crew",
    "DeviceEvent",
    "EarlyStopping",
    "Emulation",
    "Evaluation",
    "EvaluationEvent",
    "MeasuredEvent",
    "PhaseEvent",
    "Recovery",
    "RecoveryEvent",
    "RunEvent",
    "StepEvent",
    "TakeOver",
    "TrainResult",
    "connect",
    "emulate",
    "launch",
    "read_replicas",
    "restore",
    "train",
]
