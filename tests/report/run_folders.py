"""Run folders in the real formats, in milliseconds: what a run of two devices would have left."""

from __future__ import annotations

from pathlib import Path

from crowdmesh_jax.core import (
    Crowd,
    CutTimes,
    DefaultLink,
    Device,
    DeviceId,
    MemoryBreakdown,
    PipelinePlan,
    StageTimes,
    evaluate,
    schedule_for,
)
from crowdmesh_jax.record import RunFolder, RunPrediction, TraceEvent, chrome_trace
from crowdmesh_jax.report.steps import predicted_step

BEGIN_S = 1.7e9
DEVICES = ("fast", "slow")
PLAN = PipelinePlan.even(4, DEVICES, microbatches=3)
STAGES = (
    StageTimes(forward_s=0.010, backward_s=0.020, update_s=0.004),
    StageTimes(forward_s=0.0, backward_s=0.030, update_s=0.002),
)
CUTS = (
    CutTimes(
        forward_latency_s=0.001, forward_transfer_s=0.004, backward_latency_s=0.001,
        backward_transfer_s=0.004,
    ),
)  # fmt: skip
TIMELINE = evaluate(schedule_for(PLAN), STAGES, CUTS)
PREDICTION = RunPrediction(
    stages=STAGES,
    cuts=CUTS,
    step_s=TIMELINE.step_s,
    memory={d: MemoryBreakdown(parameter_bytes=4000, gradient_bytes=4000) for d in DEVICES},
    planned_step_s=0.1,
)
CROWD = Crowd(
    devices=tuple(Device(id=DeviceId(name), speed=v) for name, v in (("fast", 1.0), ("slow", 0.5))),
    default_link=DefaultLink(),
)


def measured_events(steps: int, *, slower: float = 1.25) -> list[TraceEvent]:
    """Steps as predicted, each `slower` times as long."""
    events = []
    for step in range(steps):
        drawn = predicted_step(PLAN, PREDICTION, TIMELINE, step=step, start_s=0.0)
        for event in drawn:
            offset_s = step * TIMELINE.step_s
            events.append(
                TraceEvent(
                    device=event.device, kind=event.kind, step=step, microbatch=event.microbatch,
                    start_s=(event.start_s + offset_s) * slower,
                    end_s=(event.end_s + offset_s) * slower,
                    peer=event.peer, label=event.label,
                )
            )  # fmt: skip
    return events


def make_run(
    root: Path,
    name: str = "mine",
    *,
    steps: int = 12,
    end: str | None = "finish",
    has_trace: bool = True,
    evaluate_every: int = 0,
    has_memory: bool = False,
    learning_rate: float = 0.1,
) -> RunFolder:
    """A run's folder.

    Args:
        end: "finish", "halt" or None: the journal just stops.
    """
    folder = RunFolder.create(root, name)
    folder.write_config(
        {
            "job": {
                "model": "tiny", "layers": ["a", "b", "c", "d"], "batch_size": 6,
                "microbatches": 3, "learning_rate": learning_rate,
            },
            "run": {"steps": steps, "transport": "memory"},
            "crowd": CROWD,
        }
    )  # fmt: skip
    folder.write_plan(PLAN)
    folder.write_prediction(PREDICTION)
    with folder.events() as events, folder.metrics() as metrics:
        at_s = BEGIN_S

        def record(kind: str, **fields: object) -> None:
            events.append({"at_s": at_s, "kind": kind, **fields})

        record("Term", run=name, term=1)
        record("Epoch", epoch=1, lost=[])
        record("Decision", epoch=1, base=0, plan=PLAN, steps=steps)
        record("MembersMeasured", seconds={"fast": {"forward": 0.010, "update": 0.004}})
        record("Resumed", epoch=1)
        for step in range(steps):
            at_s += 1.25 * TIMELINE.step_s
            loss = 2.0 / (1 + step)
            verdict = {"is_finite": True, "skip": False}
            record("StepCommitted", step=step, verdict=verdict, values={"loss": loss})
            row = {"step": step, "loss": loss, "step_s": 1.25 * TIMELINE.step_s if step else None}
            metrics.append({**row, "accuracy": 0.5 + step / 100})
            if evaluate_every and (step + 1) % evaluate_every == 0:
                found = {"loss": loss * 1.1, "accuracy": 0.9}
                metrics.append({"version": step + 1, "eval": found})
                record("Evaluation", version=step + 1, values=found)
        if end == "finish":
            record("Wave", epoch=1, version=steps)
            record("Finish", version=steps)
        elif end == "halt":
            fault = {"kind": "AgentLostError", "text": "slow died\n  state    kept"}
            record("Halted", committed=steps, fault=fault)
    if has_memory:
        figures = {"predicted_bytes": 9_000_000, "idle_bytes": 70_000_000, "peak_bytes": 80_000_000}
        folder.write_memory(dict.fromkeys(DEVICES, figures))
    if has_trace:
        folder.write_trace(chrome_trace(measured_events(steps), devices=DEVICES))
    return folder
