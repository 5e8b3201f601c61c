"""What a model costs per layer, and how fast this machine is."""

from .analytic import optimizer_sizes, profile
from .cache import ProfileCache, machine_identity
from .measure import (
    MeasuredLayers,
    calibrate,
    calibrate_machine,
    crowd_with_calibration,
    measure_layers,
)
from .roofline import (
    Calibration,
    LayerComparison,
    compare_layers,
    predict_layers,
    why,
    worst_layers,
)

__all__ = [
    "Calibration",
    "LayerComparison",
    "MeasuredLayers",
    "ProfileCache",
    "calibrate",
    "calibrate_machine",
    "compare_layers",
    "crowd_with_calibration",
    "machine_identity",
    "measure_layers",
    "optimizer_sizes",
    "predict_layers",
    "profile",
    "why",
    "worst_layers",
]
