"""From a training job and a plan to stage programs. All jaxpr surgery is in this room."""

from .bundle import TrainState, assemble, build_bundles, initial_arrays
from .flat import FlatProgram
from .optimizer import SlicedOptimizer, slice_optimizer

__all__ = [
    "FlatProgram",
    "SlicedOptimizer",
    "TrainState",
    "assemble",
    "build_bundles",
    "initial_arrays",
    "slice_optimizer",
]
