"""What a model costs per layer, and how fast this machine is."""

from .analytic import optimizer_sizes, profile
from .measure import calibrate, crowd_with_calibration, measure_layers

__all__ = [
    "calibrate",
    "crowd_with_calibration",
    "measure_layers",
    "optimizer_sizes",
    "profile",
]
