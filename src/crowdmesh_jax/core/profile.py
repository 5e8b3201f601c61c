"""What the planner knows of a model: per layer flops, bytes and, per device, seconds.

All sizes and seconds are for one microbatch. Knows nothing of JAX or of how figures are obtained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import InvalidValueError
from .crowd import Crowd


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """One layer's costs for one microbatch. Cut `i` lies before layer `i`."""

    name: str
    forward_flops: float
    backward_flops: float
    parameter_bytes: int = 0
    optimizer_bytes: int = 0
    """Optimizer state that belongs to this layer."""
    state_bytes: int = 0
    """BatchNorm statistics and the like."""
    output_bytes: int = 0
    """Activation that leaves the layer downstream (the whole carry)."""
    gradient_bytes: int = 0
    """Cotangent of that activation, which comes back; 0 where nothing does."""
    residual_bytes: int = 0
    """Kept from forward to backward per microbatch, without the stage input."""
    parameter_count: int = 0
    temp_bytes: int = 0
    """What a stage needs while it runs this layer, beyond what it keeps: one layer at a time."""
    update_temp_bytes: int = 0
    """The layer's part of what the update needs while it runs."""
    borrows: tuple[tuple[str, int], ...] = ()
    """(owner layer, bytes) of each parameter that another layer lends."""

    def __post_init__(self) -> None:
        for name in (
            "forward_flops", "backward_flops", "parameter_bytes", "optimizer_bytes",
            "state_bytes", "output_bytes", "gradient_bytes", "residual_bytes", "parameter_count",
            "temp_bytes", "update_temp_bytes",
        ):  # fmt: skip
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InvalidValueError(
                    f"layer {self.name!r}: {name} must be finite and >= 0, got {value}"
                )
        for owner, value in self.borrows:
            if not (math.isfinite(value) and value >= 0):
                raise InvalidValueError(
                    f"layer {self.name!r}: bytes borrowed of {owner!r} must be finite and >= 0,"
                    f" got {value}"
                )


WEIGHT_SHARE = 0.5
"""Of a layer's backward, the part that computes gradients of its weights, where nobody measured it.
For matrix products and convolutions both halves take as many multiplications."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSeconds:
    """Seconds that one device takes for one layer: per microbatch, and per step for the update."""

    forward_s: float
    backward_s: float
    update_s: float = 0.0
    weight_s: float | None = None
    """The part of `backward_s` that computes gradients of the layer's weights; None: not measured,
    see `ModelProfile.weight_seconds`."""

    def __post_init__(self) -> None:
        for name in ("forward_s", "backward_s", "update_s", "weight_s"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InvalidValueError(f"{name} must be finite and >= 0, got {value}")
        if self.weight_s is not None and self.weight_s > self.backward_s:
            raise InvalidValueError(
                f"weight_s {self.weight_s} is a part of backward_s {self.backward_s}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """A chain of `L` layers, profiled for one job on the devices of one crowd."""

    layers: tuple[LayerProfile, ...]
    microbatches: int
    """M: microbatches per step."""
    microbatch_size: int
    """Rows of one microbatch."""
    input_bytes: int
    """Inputs of one microbatch, as layer 0 receives them."""
    target_bytes: int = 0
    globals_bytes: int = 0
    """Optimizer values that every stage keeps (counts, schedules)."""
    seconds: Mapping[str, tuple[LayerSeconds, ...]] = field(default_factory=dict)
    """Per device id, one entry per layer; devices not named are predicted from flops."""
    model_name: str = ""
    source: str = "analytic"
    """How `seconds` were obtained: "analytic" or "measured"."""
    memory_source: str = "analytic"
    """Where `temp_bytes` come from: "analytic", or "compiled", XLA's own analysis."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise InvalidValueError("a model profile needs at least one layer")
        if self.microbatches < 1:
            raise InvalidValueError(f"microbatches must be >= 1, got {self.microbatches}")
        if self.microbatch_size < 1:
            raise InvalidValueError(f"microbatch_size must be >= 1, got {self.microbatch_size}")
        for device, rows in self.seconds.items():
            if len(rows) != len(self.layers):
                raise InvalidValueError(
                    f"seconds of device {device!r}: {len(rows)} entries"
                    f" for {len(self.layers)} layers"
                )

    def layer_seconds(self, crowd: Crowd, device_id: str) -> tuple[LayerSeconds, ...]:
        """Seconds per layer on a device: the given ones, else flops / flops_per_s."""
        if device_id in self.seconds:
            return self.seconds[device_id]
        rate = crowd.device(device_id).flops_per_s
        return tuple(
            LayerSeconds(
                forward_s=layer.forward_flops / rate,
                backward_s=layer.backward_flops / rate,
                update_s=4.0 * layer.parameter_count / rate,
            )
            for layer in self.layers
        )

    def weight_seconds(self, seconds: Sequence[LayerSeconds]) -> tuple[float, ...]:
        """Per layer, the part of its backward that a split backward may do later.

        As measured, if it was. Else: of layer 0 all, since nobody needs the gradient of its input;
        of a layer without parameters nothing; of the others `WEIGHT_SHARE`.
        """
        found = []
        for index, (layer, row) in enumerate(zip(self.layers, seconds, strict=True)):
            if row.weight_s is not None:
                found.append(row.weight_s)
            elif not (layer.parameter_bytes or layer.parameter_count or layer.borrows):
                found.append(0.0)
            else:
                found.append(row.backward_s * (1.0 if index == 0 else WEIGHT_SHARE))
        return tuple(found)

    def cut_bytes(self, cut: int) -> tuple[int, int]:
        """Bytes per microbatch that cross the cut before layer `cut`: (downstream, back)."""
        if not 0 < cut < len(self.layers):
            raise InvalidValueError(f"cut must lie in 1..{len(self.layers) - 1}, got {cut}")
        before = self.layers[cut - 1]
        return before.output_bytes, before.gradient_bytes
