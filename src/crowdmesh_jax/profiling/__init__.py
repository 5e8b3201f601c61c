"""What a model costs per layer, and how fast this machine is."""

from .analytic import optimizer_sizes, profile
from .cache import ProfileCache, default_cache_dir, machine_identity
from .measure import MeasuredLayers, calibrate, crowd_with_calibration, measure_layers

__all__ = [
    "MeasuredLayers",
    "ProfileCache",
    "calibrate",
    "crowd_with_calibration",
    "default_cache_dir",
    "machine_identity",
    "measure_layers",
    "optimizer_sizes",
    "profile",
]
