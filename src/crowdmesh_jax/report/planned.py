"""The picture of a plan that nobody has run: its predicted step, stage by stage.

Takes a prediction of `core`; knows no run.
"""

from __future__ import annotations

from ..core import OpKind, PipelinePlan, Prediction
from . import units
from .charts import Arrow, Bar, BarChart, Row
from .svg import draw_file

_KINDS = {OpKind.FORWARD: "forward", OpKind.BACKWARD: "backward", OpKind.WEIGHT: "weight"}
_TIPS = {**_KINDS, OpKind.WEIGHT: "weight gradients"}


def plan_chart(plan: PipelinePlan, predicted: Prediction) -> BarChart:
    """A row per stage with its forwards, backwards and weight parts, and an arrow per transfer."""
    timeline = predicted.timeline
    unit, scale = ("s", 1.0) if timeline.step_s >= 2 else ("ms", 1e3)
    bars = []
    for op in timeline.ops:
        if op.end_s <= op.start_s:
            continue  # the last stage's forward is a part of its backward
        kind = _KINDS[op.kind]
        bars.append(
            Bar(
                row=op.stage,
                start=op.start_s * scale,
                end=op.end_s * scale,
                role=kind,
                text=str(op.microbatch),
                tip=f"{_TIPS[op.kind]} of {op.microbatch}, {units.seconds(op.end_s - op.start_s)}",
                is_predicted=True,
            )
        )
    arrows = []
    for transfer in timeline.transfers:
        upper, lower = transfer.cut, transfer.cut + 1
        ends = (upper, lower) if transfer.direction == "forward" else (lower, upper)
        arrows.append(
            Arrow(
                start_row=ends[0],
                start=transfer.start_s * scale,
                end_row=ends[1],
                end=transfer.end_s * scale,
                tip=f"{transfer.direction} of {transfer.microbatch},"
                f" {units.seconds(transfer.end_s - transfer.start_s)}",
            )
        )
    idle = [f"{100 * stage.idle_share:.0f} % idle" for stage in predicted.stages]
    return BarChart(
        name="plan",
        title=f"One step of {units.seconds(predicted.step_s)}, predicted ({plan.schedule})",
        x_label=f"{unit} since the step began",
        rows=tuple(
            Row(label=" + ".join(stage.devices), note=note)
            for stage, note in zip(plan.stages, idle, strict=True)
        ),
        bars=tuple(bars),
        legend=tuple(
            (_KINDS[kind], "weight gradients" if kind is OpKind.WEIGHT else _KINDS[kind])
            for kind in OpKind
            if kind is not OpKind.WEIGHT or any(op.kind is kind for op in timeline.ops)
        ),
        arrows=tuple(arrows),
        x_max=timeline.commit_s * scale * 1.005,
    )


def draw_plan(plan: PipelinePlan, predicted: Prediction) -> str:
    """The picture as an SVG file."""
    return draw_file(plan_chart(plan, predicted))
