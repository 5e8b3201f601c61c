"""What a stage needs in its device's memory while training, in bytes, term by term.

The terms are those of the protocol's memory formula, and what programs need while they run.
Snapshots, boundary logs and copies held for
others are parameters that default to nothing: no room of this release keeps any. It knows nothing
of device limits; solvers compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from ..errors import InvalidValueError
from .plan import Stage
from .profile import LayerProfile, ModelProfile

COMPILE_PEAK_BYTES = 400_000_000
"""Measured: compiling a stage's programs peaks at 0.3-0.7 GB, nearly whatever the stage."""

RUNTIME_BYTES = 65_000_000
"""What an agent holds above an idle one as soon as it runs anything: the compiler's pages and
tables, threads' buffers. Measured (`benchmarks/memory.py`); a device's `memory_bytes` is what is
left after it."""

PROGRAM_OP_BYTES = 85_000
"""What a compiled program holds per instruction that it calls (kernels, buffer tables, names).
Measured by `benchmarks/memory.py`, whose six models are within their bounds with it."""

CREDITS = 2
"""Frames per cut and direction that may wait in a buffer: one used, one on its way."""


def program_ops(text: str) -> int:
    """Instructions that a compiled program calls one after another: kernels, calls, copies.

    Args:
        text: The optimised program as XLA prints it.
    """
    return text.count(" = ", text.rfind("\nENTRY ") + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBreakdown:
    """Bytes of one stage on one device.

    Programs are compiled before the training buffers exist, so the two do not add up: the device
    must hold the larger one.
    """

    parameter_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    """Optimizer state of the stage's layers, and the values that every stage keeps."""
    state_bytes: int = 0
    """Layer statistics, twice: those of the committed version and those of the step under way."""
    stash_bytes: int = 0
    """Kept from forward to backward for the microbatches in flight."""
    credit_bytes: int = 0
    """Frames received but not yet used, or not yet sent."""
    snapshot_bytes: int = 0
    log_bytes: int = 0
    hosted_bytes: int = 0
    working_bytes: int = 0
    """What programs need while they run, beyond their inputs and results. An update runs when no
    microbatch is in flight, so its need counts only as far as it exceeds the stash."""
    program_bytes: int = 0
    """What the compiled programs themselves hold."""
    compile_peak_bytes: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value >= 0:
                raise InvalidValueError(f"memory: {field.name} must be >= 0, got {value}")

    @property
    def training_bytes(self) -> int:
        """All terms but the compile peak, added up."""
        return (
            self.parameter_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.state_bytes
            + self.stash_bytes
            + self.credit_bytes
            + self.snapshot_bytes
            + self.log_bytes
            + self.hosted_bytes
            + self.working_bytes
            + self.program_bytes
        )

    @property
    def total_bytes(self) -> int:
        """What the device must hold: the larger of training and compiling."""
        return max(self.training_bytes, self.compile_peak_bytes)


def stage_memory(
    profile: ModelProfile,
    stage: Stage,
    *,
    stage_index: int,
    num_stages: int,
    in_flight: int,
    awaiting_weight: int = 0,
    credits: int = CREDITS,
    snapshots: int = 0,
    log_steps: int = 0,
    hosted_bytes: int = 0,
    compile_peak_bytes: int = COMPILE_PEAK_BYTES,
    rows_share: float = 1.0,
) -> MemoryBreakdown:
    """Memory of one stage of a plan.

    The stash is, per microbatch in flight, the stage input and the residuals. With recomputation
    it is the stage input alone, plus the residuals of the one microbatch in backward. The last
    stage's forward, loss and backward are one program, so it too holds residuals of one microbatch
    only, and the targets of those that wait. A parameter that another stage lends is here too, with
    a gradient of its own; it and its gradient travel once a step.

    Args:
        in_flight: Microbatches between forward and backward, `Schedule.max_in_flight`.
        credits: Frames per cut and direction that may wait in buffers.
        snapshots: Own copies of parameters, optimizer state and statistics (1 to 2 where kept).
        log_steps: Steps of sent boundary frames kept for replay.
        hosted_bytes: Copies held for other stages.
        compile_peak_bytes: Counted instead of the training terms where it is larger.
        rows_share: Of each microbatch's rows, the part that a device of a shared stage has.

    Raises:
        InvalidValueError: The stage's layers are not in the profile, or a count is negative.
    """
    if not 0 <= stage.first_layer <= stage.last_layer < len(profile.layers):
        raise InvalidValueError(
            f"stage {stage_index} ({stage.device}): layers {stage.first_layer}-{stage.last_layer}"
            f" are not in a profile of {len(profile.layers)} layers"
        )
    if not 0 <= stage_index < num_stages:
        raise InvalidValueError(f"stage_index must lie in 0..{num_stages - 1}, got {stage_index}")
    counts = {
        "in_flight": in_flight,
        "awaiting_weight": awaiting_weight,
        "credits": credits,
        "snapshots": snapshots,
        "log_steps": log_steps,
    }
    for name, count in counts.items():
        if count < 0:
            raise InvalidValueError(f"{name} must be >= 0, got {count}")
    layers = profile.layers[stage.first_layer : stage.last_layer + 1]
    is_first, is_last = stage_index == 0, stage_index == num_stages - 1
    before: LayerProfile | None = None if is_first else profile.layers[stage.first_layer - 1]
    after: LayerProfile | None = None if is_last else layers[-1]

    def total(figure: str) -> int:
        return profile.total(figure, stage.first_layer, stage.last_layer)

    parameter_bytes, statistics_bytes = total("parameter_bytes"), total("state_bytes")
    optimizer_bytes = total("optimizer_bytes") + profile.globals_bytes
    residual_bytes = total("residual_bytes")
    input_bytes = before.output_bytes if before is not None else profile.input_bytes
    waiting_bytes = input_bytes + (profile.target_bytes if is_last else 0)
    keeping = max(1, awaiting_weight) if stage.recompute or is_last else in_flight
    halfway_bytes = awaiting_weight * total("gradient_bytes")
    borrowed_bytes, lent_bytes = _lending(profile, layers) if profile.lends else (0, 0)
    stash_bytes = math.ceil(
        rows_share * (in_flight * waiting_bytes + keeping * residual_bytes + halfway_bytes)
    )
    temp_bytes = max(layer.temp_bytes for layer in layers)
    update_temp_bytes = total("update_temp_bytes")
    sent_bytes = (before.gradient_bytes if before else 0) + (after.output_bytes if after else 0)
    received_bytes = (before.output_bytes if before else 0) + (after.gradient_bytes if after else 0)
    sent_bytes, received_bytes = (
        math.ceil(rows_share * size) for size in (sent_bytes, received_bytes)
    )
    return MemoryBreakdown(
        parameter_bytes=parameter_bytes + borrowed_bytes,
        gradient_bytes=parameter_bytes + borrowed_bytes,
        optimizer_bytes=optimizer_bytes,
        state_bytes=2 * statistics_bytes,
        stash_bytes=stash_bytes,
        credit_bytes=credits * (sent_bytes + received_bytes) + borrowed_bytes + lent_bytes,
        snapshot_bytes=snapshots * (parameter_bytes + optimizer_bytes + statistics_bytes),
        log_bytes=log_steps * profile.microbatches * sent_bytes,
        hosted_bytes=hosted_bytes,
        working_bytes=max(temp_bytes, update_temp_bytes - stash_bytes),
        program_bytes=PROGRAM_OP_BYTES * total("program_ops"),
        compile_peak_bytes=compile_peak_bytes,
    )


def _lending(profile: ModelProfile, layers: Sequence[LayerProfile]) -> tuple[int, int]:
    """Bytes that a stage borrows of others, and that it lends to others."""
    names = {layer.name for layer in layers}
    borrowed_bytes = sum(
        size for layer in layers for owner, size in layer.borrows if owner not in names
    )
    lent_bytes = sum(
        size
        for layer in profile.layers
        for owner, size in layer.borrows
        if owner in names and layer.name not in names
    )
    return borrowed_bytes, lent_bytes
