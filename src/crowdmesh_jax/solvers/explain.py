"""A plan in words and numbers: what bounds it, who does what, who is left out, what leaves whom.

Knows the values of `core` and of this room; decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..core import (
    Crowd,
    ModelProfile,
    PipelinePlan,
    Prediction,
    cut_times,
    occupied_s,
    predict,
    search_schedule,
)
from .problem import PartitionResult
from .units import format_bytes, format_bytes_of, format_seconds

_SAME = 0.005
"""Windows whose time per stage is this near the period bind it, too."""

_NAMED = 4
"""Devices that a line names of those that are left out for one reason."""


def explain(
    plan: PipelinePlan,
    profile: ModelProfile,
    crowd: Crowd,
    *,
    predicted: Prediction | None = None,
    result: PartitionResult | None = None,
    note: str | None = None,
) -> str:
    """Explains a plan.

    Args:
        predicted: What `predict` says; made anew where it is not given.
        result: A solver's answer: adds how far it is proven and who is left out.
        note: A last line, for what only the caller knows ("the optimizer needs one global value
            per step", say).

    Returns:
        Lines of text; the step time first, then a table of stages.

    Raises:
        InvalidPlanError: The plan does not fit the profile or the crowd.
    """
    if predicted is None:
        predicted = result.predicted if result is not None else predict(profile, crowd, plan)
    busy_s = occupied_s(cut_times(profile, crowd, plan))
    lines = [_headline(plan, predicted, busy_s), *_table(plan, profile, crowd, predicted)]
    lines += _memory_note(plan, crowd, predicted)
    lines += _medium(plan, crowd, predicted, busy_s)
    lines += _alone(plan, profile, crowd, predicted)
    lines += _left_out(plan, crowd, result)
    lines += _leaves(plan, profile)
    if result is not None:
        lines.append(_proof(result))
        lines += result.notes
    if note:
        lines.append(note)
    return "\n".join(lines)


def _headline(plan: PipelinePlan, predicted: Prediction, busy_s: Mapping[str, float]) -> str:
    first_s, period_s = predicted.first_microbatch_s, predicted.period_s
    step = (
        f"step {format_seconds(predicted.step_s)}, about first microbatch {format_seconds(first_s)}"
        f" + {plan.microbatches - 1} x {format_seconds(period_s)}"
    )
    return f"{step}     bound by {_bound_by(plan, predicted, busy_s)}"


def _bound_by(plan: PipelinePlan, predicted: Prediction, busy_s: Mapping[str, float]) -> str:
    """The stages of the worst window, or the link or air, that sets the period."""
    stages = predicted.stages
    if plan.microbatches == 1:
        return "one microbatch per step: stages take turns"
    if search_schedule(plan.schedule) != plan.schedule and plan.schedule != "zb-h1":
        return f"schedule {plan.schedule!r}, of which no closed form is known"
    channel = max(busy_s, key=lambda name: busy_s[name], default="")
    if channel and busy_s[channel] >= predicted.period_s * (1 - _SAME):
        return f"the air of {channel}" if "cell" in channel else f"the link {channel}, both ways"
    if plan.schedule == "gpipe":
        slowest = max(range(len(stages)), key=lambda s: stages[s].compute_s)
        return f"stage {slowest} ({stages[slowest].device})"
    step = 2 if plan.schedule == "eager" else 1
    best: tuple[float, int, int, float] | None = None
    for first in range(len(stages)):
        compute_s = link_s = 0.0
        for last in range(first, len(stages)):
            compute_s += stages[last].compute_s
            if last > first:
                before = stages[last - 1]
                link_s += (before.cut_forward_s or 0.0) + (before.cut_backward_s or 0.0)
            value = (compute_s + link_s) / (step * (last - first) + 1)
            if best is None or value > best[0] * (1 + 1e-9):
                best = (value, first, last, link_s / (compute_s + link_s or 1.0))
    assert best is not None
    value, first, last, share = best
    if value < predicted.period_s * (1 - _SAME):
        times = [max(s.cut_forward_s or 0.0, s.cut_backward_s or 0.0) for s in stages[:-1]]
        cut = max(range(len(times)), key=lambda index: times[index], default=0)
        if times:
            return f"the link {stages[cut].device} - {stages[cut + 1].device}"
    if first == last:
        return f"stage {first} ({stages[first].device})"
    return f"stages {first}-{last}, links {100 * share:.0f} %"


def _table(
    plan: PipelinePlan, profile: ModelProfile, crowd: Crowd, predicted: Prediction
) -> list[str]:
    rows: list[Sequence[str]] = [
        ("stage", "device", "layers", "compute", "link", "idle", "memory", "")
    ]
    for index, (stage, seen) in enumerate(zip(plan.stages, predicted.stages, strict=True)):
        link = "-"
        if seen.cut_forward_s is not None and seen.cut_backward_s is not None:
            link = format_seconds(seen.cut_forward_s + seen.cut_backward_s)
        first, last = stage.first_layer, stage.last_layer
        rows.append(
            (
                str(index),
                stage.device,
                str(first) if first == last else f"{first}-{last}",
                format_seconds(seen.compute_s),
                link,
                f"{100 * seen.idle_share:.0f} %",
                format_bytes_of(
                    seen.memory.training_bytes, crowd.device(stage.device).memory_bytes
                ),
                _names([profile.layers[layer].name for layer in stage.layers])
                + (" (recomputed)" if stage.recompute else "")
                + (f" (sends {stage.wire_dtype})" if stage.wire_dtype else "")
                + (f" ({seen.in_flight} in flight)" if plan.schedule in ("eager", "zb-h1") else ""),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _names(names: Sequence[str]) -> str:
    if len(names) <= 4:
        return ", ".join(names)
    return f"{names[0]}, {names[1]}, ..., {names[-1]}"


def _memory_note(plan: PipelinePlan, crowd: Crowd, predicted: Prediction) -> list[str]:
    peak = max(stage.memory.compile_peak_bytes for stage in predicted.stages)
    tight = [
        stage.device
        for stage, seen in zip(plan.stages, predicted.stages, strict=True)
        if seen.memory.total_bytes > crowd.device(stage.device).memory_bytes
    ]
    lines = []
    if peak:
        lines.append(
            f"memory is for training; compiling takes up to {format_bytes(peak)} before it"
        )
    if tight:
        lines.append(f"does not fit: {', '.join(tight)}")
    return lines


def _medium(
    plan: PipelinePlan, crowd: Crowd, predicted: Prediction, busy_s: Mapping[str, float]
) -> list[str]:
    """What the medium makes transfers share, and how full it is."""
    if not busy_s or not predicted.step_s:
        return []
    shares = ", ".join(
        f"{name} {100 * plan.microbatches * seconds / predicted.step_s:.0f} %"
        for name, seconds in sorted(busy_s.items(), key=lambda item: (-item[1], item[0]))
    )
    return [f"medium: {crowd.medium.replace('_', ' ')}, of the step busy: {shares}"]


def _alone(
    plan: PipelinePlan, profile: ModelProfile, crowd: Crowd, predicted: Prediction
) -> list[str]:
    """What the split is worth: the step of the best device that can hold the whole model."""
    if len(plan.stages) == 1:
        return []
    steps = []
    for device in crowd.devices:
        whole = PipelinePlan.even(
            plan.num_layers, [device.id], microbatches=plan.microbatches, schedule="1f1b"
        )
        seen = predict(profile, crowd, whole)
        if seen.stages[0].memory.total_bytes <= device.memory_bytes:
            steps.append((seen.step_s, device.id))
    if not steps:
        return ["alone: no device can hold the whole model"]
    step_s, device = min(steps)
    ratio = step_s / predicted.step_s
    return [
        f"alone: {device} would take {format_seconds(step_s)} a step, {ratio:.2f} times this plan"
    ]


def _left_out(plan: PipelinePlan, crowd: Crowd, result: PartitionResult | None) -> list[str]:
    idle = [device.id for device in crowd.devices if device.id not in plan.all_devices]
    if not idle:
        return []
    if result is None:
        return [f"left out: {', '.join(sorted(idle))}"]
    alike: dict[str, list[str]] = {}
    for device in sorted(idle):
        alike.setdefault(result.left_out.get(device, ""), []).append(device)
    words = []
    for reason, devices in alike.items():
        named = ", ".join(devices[:_NAMED])
        if len(devices) > _NAMED:
            named += f" and {len(devices) - _NAMED} more"
        words.append(f"{named} ({reason})" if reason else named)
    return [f"left out: {'; '.join(words)}"]


def _leaves(plan: PipelinePlan, profile: ModelProfile) -> list[str]:
    first, last = plan.stages[0].device, plan.stages[-1].device
    if len(plan.stages) == 1:
        return [f"data: {first} sees inputs and targets; nothing leaves it"]
    hops = []
    for left, right in zip(plan.stages, plan.stages[1:], strict=False):
        down, back = profile.cut_bytes(right.first_layer, left.wire_dtype)
        hops.append(
            f"{left.device} -> {right.device} {format_bytes(down)} of activations,"
            f" {format_bytes(back)} of gradients back"
        )
    return [f"data: {first} sees the inputs, {last} the targets; per microbatch " + "; ".join(hops)]


def _proof(result: PartitionResult) -> str:
    took = f"{result.solver}, {format_seconds(result.solve_s)}"
    if result.gap is None:
        return f"solver: {took}; nothing proven"
    if result.optimal:
        return f"solver: {took}; optimum proven"
    return f"solver: {took}; stopped early, at most {100 * result.gap:.1f} % from the optimum"
