"""Memory of a run's devices: what their programs should need, and what their processes held.

The expected figures come from the programs' own leaves and from the compiler's analysis on each
device; the measured ones from the operating system there. Knows nothing of plans' costs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core import MemoryBreakdown, PipelinePlan, schedule_for
from ..core.memory import CREDITS, PROGRAM_OP_BYTES, RUNTIME_BYTES
from ..programs.manifest import LeafSpec, StageManifest


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """What a device's process holds, and what the compiler says its programs need."""

    device: str
    idle_bytes: int
    """Resident before anything was installed."""
    now_bytes: int
    loading_peak_bytes: int
    """The most that was resident until the stage was in place; it contains compiling."""
    peak_bytes: int
    """The most that was resident since then."""
    step_temp_bytes: int
    """Largest need of a forward or backward beyond its inputs and results."""
    update_temp_bytes: int
    program_ops: int
    """Instructions of its compiled programs."""


def memory_table(
    plan: PipelinePlan, manifests: Sequence[StageManifest], reports: Mapping[str, MemoryReport]
) -> dict[str, dict[str, int]]:
    """What `memory.json` holds, per device that reported, in plan order; all in bytes.

    `predicted_bytes` is above an idle agent, as `peak_bytes` minus `idle_bytes` is: what training
    needs, not loading.
    """
    schedule = schedule_for(plan)
    table = {}
    for index, (stage, manifest) in enumerate(zip(plan.stages, manifests, strict=True)):
        report = reports.get(stage.device)
        if report is None:
            continue
        expected = stage_memory(
            manifest,
            in_flight=schedule.max_in_flight(index),
            step_temp_bytes=report.step_temp_bytes,
            update_temp_bytes=report.update_temp_bytes,
            program_ops=report.program_ops,
        )
        table[str(stage.device)] = {
            "predicted_bytes": RUNTIME_BYTES + expected.training_bytes,
            "idle_bytes": report.idle_bytes,
            "loading_peak_bytes": report.loading_peak_bytes,
            "peak_bytes": report.peak_bytes,
            "now_bytes": report.now_bytes,
        }
    return table


def stage_memory(
    manifest: StageManifest,
    *,
    in_flight: int,
    step_temp_bytes: int,
    update_temp_bytes: int,
    program_ops: int = 0,
) -> MemoryBreakdown:
    """A stage's memory from its programs' own leaves and the compiler's figures.

    Args:
        in_flight: Microbatches between forward and backward, `Schedule.max_in_flight`.
        step_temp_bytes: Largest need of a forward or backward beyond inputs and results. On the
            last stage it holds the residuals, which never leave its one program.
        program_ops: Instructions of all compiled programs.
    """
    forward = manifest.program("forward")
    kept = forward.outputs if forward is not None else ()
    residual_bytes = sum(leaf.size_bytes for leaf in kept if leaf.role == "residual")
    input_bytes = _size(manifest.boundary_in) + _size(manifest.targets)
    sizes: Counter[str] = Counter()
    for leaf in manifest.resident:
        sizes[leaf.role] += leaf.size_bytes
    boundary_bytes = sum(
        _size(leaves)
        for leaves in (manifest.boundary_out, manifest.gradient_in, manifest.gradient_out)
    ) + (0 if manifest.stage == 0 else _size(manifest.boundary_in))
    stash_bytes = in_flight * (input_bytes + residual_bytes)
    return MemoryBreakdown(
        parameter_bytes=sizes["param"] + sizes["borrowed"],
        gradient_bytes=_size(manifest.accumulators),
        optimizer_bytes=sizes["opt"] + sizes["global"],
        state_bytes=2 * sizes["state"],
        stash_bytes=stash_bytes,
        credit_bytes=CREDITS * boundary_bytes,
        working_bytes=max(step_temp_bytes, update_temp_bytes - stash_bytes),
        program_bytes=PROGRAM_OP_BYTES * program_ops,
    )


def _size(leaves: Sequence[LeafSpec]) -> int:
    return sum(leaf.size_bytes for leaf in leaves)
