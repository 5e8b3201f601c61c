"""What the planner knows of a model: per layer flops, bytes and, per device, seconds.

All sizes and seconds are for one microbatch. Knows nothing of JAX or of how figures are obtained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

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
    output_float32_bytes: int | None = None
    """The part of `output_bytes` that a cut may cast to a smaller type; None: all of it."""
    gradient_float32_bytes: int | None = None
    """The same of `gradient_bytes`."""
    parameter_count: int = 0
    temp_bytes: int = 0
    """What a stage needs while it runs this layer, beyond what it keeps: one layer at a time."""
    update_temp_bytes: int = 0
    """The layer's part of what the update needs while it runs."""
    program_ops: int = 0
    """Instructions that its compiled programs call one after another: forward, backward, update."""
    borrows: tuple[tuple[str, int], ...] = ()
    """(owner layer, bytes) of each parameter that another layer lends."""

    def __post_init__(self) -> None:
        for name in (
            "forward_flops", "backward_flops", "parameter_bytes", "optimizer_bytes",
            "state_bytes", "output_bytes", "gradient_bytes", "residual_bytes", "parameter_count",
            "temp_bytes", "update_temp_bytes", "program_ops", "output_float32_bytes",
            "gradient_float32_bytes",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InvalidValueError(
                    f"layer {self.name!r}: {name} must be finite and >= 0, got {value}"
                )
        for part, whole in (("output_float32_bytes", "output_bytes"),
                            ("gradient_float32_bytes", "gradient_bytes")):  # fmt: skip
            value = getattr(self, part)
            if value is not None and value > getattr(self, whole):
                raise InvalidValueError(
                    f"layer {self.name!r}: {part} {value} is a part of {whole},"
                    f" {getattr(self, whole)}"
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


_SUMMED = (
    "parameter_bytes", "optimizer_bytes", "state_bytes", "residual_bytes", "gradient_bytes",
    "update_temp_bytes", "program_ops",
)  # fmt: skip


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
    _before: Mapping[str, tuple[int, ...]] = field(init=False, repr=False, compare=False)
    """Figure -> its sum over the layers before each layer."""
    lends: bool = field(init=False, repr=False, compare=False)
    """Whether any layer borrows parameters of another."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise InvalidValueError("a model profile needs at least one layer")
        before = {
            name: tuple(accumulate((getattr(la, name) for la in self.layers), initial=0))
            for name in _SUMMED
        }
        object.__setattr__(self, "_before", before)
        object.__setattr__(self, "lends", any(layer.borrows for layer in self.layers))
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

    def total(self, figure: str, first: int, last: int) -> int:
        """Sum of a figure in bytes or instructions over layers `first .. last`."""
        before = self._before[figure]
        return before[last + 1] - before[first]

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

    def cut_bytes(self, cut: int, wire_dtype: str | None = None) -> tuple[int, int]:
        """Bytes per microbatch that cross the cut before layer `cut`: (downstream, back).

        Args:
            wire_dtype: What float32 values travel as; "bfloat16" halves them.
        """
        if not 0 < cut < len(self.layers):
            raise InvalidValueError(f"cut must lie in 1..{len(self.layers) - 1}, got {cut}")
        before = self.layers[cut - 1]
        if wire_dtype is None:
            return before.output_bytes, before.gradient_bytes
        return (
            _cast_bytes(before.output_bytes, before.output_float32_bytes),
            _cast_bytes(before.gradient_bytes, before.gradient_float32_bytes),
        )

    def with_microbatches(self, count: int) -> ModelProfile:
        """The same job with `count` microbatches a step, as it can be told from this profile.

        The rows of a step stay, so each microbatch has more or fewer of them; what the profile says
        of a microbatch is scaled with its rows: seconds, flops, activations, residuals. Working
        memory grows with rows, and is not taken to shrink with them, since a part of it belongs to
        parameters. Updates stay as they are. That seconds go with rows is an assumption: devices
        are slower per row with few rows, which only a profile of that count shows, so counts far
        above the profiled one are flattered.

        Raises:
            InvalidValueError: The rows of a step cannot be divided so.
        """
        rows = self.microbatches * self.microbatch_size
        if count < 1 or rows % count:
            fitting = [n for n in range(1, rows + 1) if rows % n == 0]
            raise InvalidValueError(
                f"{rows} rows a step cannot be cut into {count} equal microbatches;"
                f" possible are {', '.join(map(str, fitting[:12]))}"
                + (", ..." if len(fitting) > 12 else "")
            )
        if count == self.microbatches:
            return self
        scale = self.microbatches / count

        def size(value: int) -> int:
            # Exact where rows divide the bytes, as they do in whole arrays.
            return -(-value * self.microbatches // count)

        layers = tuple(
            replace(
                layer,
                forward_flops=layer.forward_flops * scale,
                backward_flops=layer.backward_flops * scale,
                output_bytes=size(layer.output_bytes),
                gradient_bytes=size(layer.gradient_bytes),
                residual_bytes=size(layer.residual_bytes),
                temp_bytes=max(layer.temp_bytes, size(layer.temp_bytes)),
                **{
                    name: None if getattr(layer, name) is None else size(getattr(layer, name))
                    for name in ("output_float32_bytes", "gradient_float32_bytes")
                },
            )
            for layer in self.layers
        )
        seconds = {
            device: tuple(
                replace(
                    row,
                    forward_s=row.forward_s * scale,
                    backward_s=row.backward_s * scale,
                    weight_s=None if row.weight_s is None else row.weight_s * scale,
                )
                for row in rows_of
            )
            for device, rows_of in self.seconds.items()
        }
        return replace(
            self,
            layers=layers,
            microbatches=count,
            microbatch_size=rows // count,
            input_bytes=size(self.input_bytes),
            target_bytes=size(self.target_bytes),
            seconds=seconds,
        )


def _cast_bytes(size_bytes: int, float32_bytes: int | None) -> int:
    """Bytes with all float32 values as half as many."""
    part = size_bytes if float32_bytes is None else float32_bytes
    return size_bytes - part // 2
