"""Train one neural network across a crowd of unequal devices that come and go.

    import crowdmesh_jax as cm

Names load when they are first used: a bare import loads neither JAX nor Flax, optax, gRPC or a
solver, so that tools and agents start fast and need only what they use.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import crowds as crowds
    from . import data as data
    from . import errors as errors
    from . import mobility as mobility
    from . import propagation as propagation
    from . import simulation as simulation
    from .core import Access as Access
    from .core import Backhaul as Backhaul
    from .core import CoalitionStructure as CoalitionStructure
    from .core import Crowd as Crowd
    from .core import DefaultLink as DefaultLink
    from .core import Device as Device
    from .core import LayerProfile as LayerProfile
    from .core import LayerSeconds as LayerSeconds
    from .core import Link as Link
    from .core import ModelProfile as ModelProfile
    from .core import PipelinePlan as PipelinePlan
    from .core import Prediction as Prediction
    from .core import Share as Share
    from .core import Stage as Stage
    from .core import schedules as schedules
    from .data import ArraySource as ArraySource
    from .data import Clips as Clips
    from .data import DataSource as DataSource
    from .data import TextSource as TextSource
    from .data import Vocabulary as Vocabulary
    from .data import check_labels as check_labels
    from .data import cut_windows as cut_windows
    from .data import digits as digits
    from .data import fashion_mnist as fashion_mnist
    from .data import log_mel as log_mel
    from .data import mfcc as mfcc
    from .data import read_clips as read_clips
    from .data import read_idx as read_idx
    from .data import read_npz as read_npz
    from .data import read_text as read_text
    from .data import read_wav as read_wav
    from .errors import CrowdMeshError as CrowdMeshError
    from .export import TrainState as TrainState
    from .model import Layer as Layer
    from .model import StagedModel as StagedModel
    from .model import TrainingJob as TrainingJob
    from .model import layer_key as layer_key
    from .model import losses as losses
    from .model import zoo as zoo
    from .profiling import profile as profile
    from .record import RunFolder as RunFolder
    from .record import load_checkpoint as load_checkpoint
    from .reference import reference as reference
    from .report import Report as Report
    from .report import report as report
    from .runtime import BestEvent as BestEvent
    from .runtime import CheckpointEvent as CheckpointEvent
    from .runtime import Crew as Crew
    from .runtime import DeviceEvent as DeviceEvent
    from .runtime import Evaluation as Evaluation
    from .runtime import EvaluationEvent as EvaluationEvent
    from .runtime import MeasuredEvent as MeasuredEvent
    from .runtime import PhaseEvent as PhaseEvent
    from .runtime import Recovery as Recovery
    from .runtime import RecoveryEvent as RecoveryEvent
    from .runtime import StepEvent as StepEvent
    from .runtime import TakeOver as TakeOver
    from .runtime import TrainResult as TrainResult
    from .runtime import callbacks as callbacks
    from .runtime import connect as connect
    from .runtime import launch as launch
    from .runtime import read_replicas as read_replicas
    from .runtime import restore as restore
    from .runtime import train as train
    from .solvers import CoalitionProblem as CoalitionProblem
    from .solvers import CoalitionResult as CoalitionResult
    from .solvers import PartitionProblem as PartitionProblem
    from .solvers import PartitionResult as PartitionResult
    from .solvers import PlanChoice as PlanChoice
    from .solvers import StabilityPrices as StabilityPrices
    from .solvers import compare_solvers as compare_solvers
    from .solvers import form_coalitions as form_coalitions
    from .solvers import partition as partition
    from .solvers import plan as plan
    from .solvers import rate_structure as rate_structure
    from .solvers import solve as solve
    from .solvers import stability_prices as stability_prices

_ROOM_NAMES = {
    "core": (
        "Access Backhaul CoalitionStructure Crowd DefaultLink Device LayerProfile LayerSeconds"
        " Link ModelProfile PipelinePlan Prediction Share Stage schedules"
    ),
    "data": (
        "ArraySource Clips DataSource TextSource Vocabulary check_labels cut_windows digits"
        " fashion_mnist log_mel mfcc read_clips read_idx read_npz read_text read_wav"
    ),
    "errors": "CrowdMeshError",
    "export": "TrainState",
    "model": "Layer StagedModel TrainingJob layer_key",
    "profiling": "profile",
    "record": "RunFolder load_checkpoint",
    "reference": "reference",
    "report": "Report report",
    "runtime": (
        "BestEvent CheckpointEvent Crew DeviceEvent Evaluation EvaluationEvent MeasuredEvent"
        " PhaseEvent Recovery RecoveryEvent StepEvent TakeOver TrainResult connect"
        " launch read_replicas restore train"
    ),
    "solvers": (
        "CoalitionProblem CoalitionResult PartitionProblem PartitionResult PlanChoice"
        " StabilityPrices compare_solvers form_coalitions partition plan rate_structure solve"
        " stability_prices"
    ),
}
_HOMES = {name: room for room, names in _ROOM_NAMES.items() for name in names.split()}
_MODULES = {
    "callbacks": "runtime.callbacks",
    "crowds": "crowds",
    "data": "data",
    "errors": "errors",
    "losses": "model.losses",
    "mobility": "mobility",
    "propagation": "propagation",
    "simulation": "simulation",
    "zoo": "model.zoo",
}
_OPTIONAL = ("jax", "flax", "optax", "pulp", "highspy", "rich", "grpc", "safetensors")
"""Packages that a device installed with `--no-deps` may lack."""

__all__ = sorted([*_HOMES, *_MODULES, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    try:
        if name in _HOMES:
            value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        elif name in _MODULES:
            value = importlib.import_module(f"{__name__}.{_MODULES[name]}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    except ModuleNotFoundError as exc:
        missing = (exc.name or "").partition(".")[0]
        if missing not in _OPTIONAL:
            raise
        from .errors import MissingExtraError

        raise MissingExtraError(
            f"cm.{name} needs {missing}, which is not installed here; install all that the package"
            " needs: pip install crowdmesh-jax"
        ) from exc
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Importing `crowdmesh_jax.reference` must not put the module where the function belongs."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
