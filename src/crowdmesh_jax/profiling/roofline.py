"""How long a layer should take: arithmetic or memory traffic, whichever is longer, plus the call.

Roofline: Williams, Waterman and Patterson (CACM 52(4), 2009). The bytes are those that cannot be
avoided: what a program reads and returns. Knows figures only; it runs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.profile import LayerSeconds, ModelProfile
from ..errors import InvalidValueError

WORST = 3
"""Layers that a comparison names."""
FAR_OFF = 1.5
"""A layer whose prediction is off by more, either way, is worth a reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a machine can do, as measured there."""

    flops_per_s: float
    """Float32 operations, in programs that are bound by arithmetic."""
    bytes_per_s: float
    """Read and written, in arrays that no cache holds."""
    call_s: float
    """Of a program that does next to nothing."""

    def __post_init__(self) -> None:
        for name in ("flops_per_s", "bytes_per_s", "call_s"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise InvalidValueError(f"calibration: {name} must be finite and > 0, got {value}")

    def seconds(self, flops: float, moved_bytes: float) -> float:
        """Predicted seconds of one program."""
        return self.call_s + max(flops / self.flops_per_s, moved_bytes / self.bytes_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerComparison:
    """One layer, forward and backward of one microbatch: predicted against measured."""

    name: str
    predicted_s: float
    measured_s: float
    bound: str
    """What the prediction goes by: "arithmetic", "memory" or "call"."""

    @property
    def ratio(self) -> float:
        """Measured over predicted; 1 is perfect."""
        return self.measured_s / self.predicted_s

    @property
    def lost_s(self) -> float:
        """Seconds by which the prediction is off: what makes a layer worth naming."""
        return abs(self.measured_s - self.predicted_s)


def moved_bytes(profile: ModelProfile, index: int) -> tuple[float, float]:
    """Bytes that a layer's (forward, backward) cannot but move, one microbatch.

    Forward reads parameters and input, writes output and residuals; backward reads parameters,
    residuals, input and cotangent, writes the gradients of parameters and input.
    """
    layer = profile.layers[index]
    input_bytes = profile.input_bytes if index == 0 else profile.layers[index - 1].output_bytes
    back_bytes = 0 if index == 0 else profile.layers[index - 1].gradient_bytes
    parameters = layer.parameter_bytes + sum(size for _, size in layer.borrows)
    forward = parameters + input_bytes + layer.output_bytes + layer.residual_bytes
    backward = 2 * parameters + layer.residual_bytes + input_bytes
    return float(forward), float(backward + layer.gradient_bytes + back_bytes)


def predict_layers(profile: ModelProfile, machine: Calibration) -> tuple[LayerSeconds, ...]:
    """Seconds of each layer on a machine of this calibration.

    An update reads parameters, gradients and optimizer state, and writes all but the gradients.
    """
    rows = []
    for index, layer in enumerate(profile.layers):
        forward_bytes, backward_bytes = moved_bytes(profile, index)
        update_bytes = 3 * layer.parameter_bytes + 2 * layer.optimizer_bytes
        rows.append(
            LayerSeconds(
                forward_s=machine.seconds(layer.forward_flops, forward_bytes),
                backward_s=machine.seconds(layer.backward_flops, backward_bytes)
                if layer.backward_flops
                else 0.0,
                update_s=update_bytes / machine.bytes_per_s,
            )
        )
    return tuple(rows)


def compare_layers(
    profile: ModelProfile, measured: Sequence[LayerSeconds], machine: Calibration
) -> tuple[LayerComparison, ...]:
    """Each layer's prediction against what was measured on the same machine."""
    rows = []
    predicted = predict_layers(profile, machine)
    for index, (layer, ours, theirs) in enumerate(
        zip(profile.layers, predicted, measured, strict=True)
    ):
        arithmetic_s = (layer.forward_flops + layer.backward_flops) / machine.flops_per_s
        memory_s = sum(moved_bytes(profile, index)) / machine.bytes_per_s
        calls_s = machine.call_s * (2 if layer.backward_flops else 1)
        bounds = {"arithmetic": arithmetic_s, "memory": memory_s, "call": calls_s}
        rows.append(
            LayerComparison(
                name=layer.name,
                predicted_s=ours.forward_s + ours.backward_s,
                measured_s=theirs.forward_s + theirs.backward_s,
                bound=max(bounds, key=lambda name: bounds[name]),
            )
        )
    return tuple(rows)


def worst_layers(rows: Sequence[LayerComparison]) -> tuple[LayerComparison, ...]:
    """Those whose prediction is far off, the most seconds first; at most `WORST`."""
    far = [row for row in rows if not 1 / FAR_OFF <= row.ratio <= FAR_OFF]
    return tuple(sorted(far, key=lambda row: -row.lost_s)[:WORST])


def why(row: LayerComparison) -> str:
    """What the likely cause is, in words."""
    slower = row.ratio > 1
    match row.bound:
        case "call":
            return "little work a call: what is counted is the call, and small arrays stay in cache"
        case "memory" if slower:
            return "bound by memory: it moves more than its inputs and outputs, intermediates say"
        case "memory":
            return "bound by memory, and its arrays fit a cache: faster than the stream"
        case _ if slower:
            return (
                "bound by arithmetic that runs below the calibrated rate: shapes that XLA's kernels"
                " do not fill (depthwise, narrow, recurrent), or functions that count as no flops"
            )
        case _:
            return "bound by arithmetic that runs above the calibrated rate: large regular products"
