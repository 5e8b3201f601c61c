"""Runs training over real agents: launcher, coordinator's body, `train`."""

from .crew import Crew, launch
from .emulation import Emulation, emulate
from .result import (
    CheckpointEvent,
    DeviceEvent,
    MeasuredEvent,
    PhaseEvent,
    RunEvent,
    StepEvent,
    TrainResult,
)
from .train import train

__all__ = [
    "CheckpointEvent",
    "Crew",
    "DeviceEvent",
    "Emulation",
    "MeasuredEvent",
    "PhaseEvent",
    "RunEvent",
    "StepEvent",
    "TrainResult",
    "emulate",
    "launch",
    "train",
]
