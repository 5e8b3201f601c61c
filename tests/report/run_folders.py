"""Run folders in the real formats, in milliseconds: what a run of two devices would have left."""

from __future__ import annotations

import dataclasses
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
from crowdmesh_jax.record import (
    RECOVERY_ROW,
    RecoveryEvent,
    RunFolder,
    RunPrediction,
    TakeOver,
    TraceEvent,
    chrome_trace,
)
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


def recovery(base: int, **fields: object) -> RecoveryEvent:
    """ "slow" was lost in step `base`; "spare" took its layers and replayed two steps."""
    over = TakeOver(
        stage=1, layers=(2, 3), device="spare", before="slow", was_spare=True,
        from_version=base - 2, source="spare", compiled_s=0.25, loaded_s=0.3, moved_bytes=4000,
    )  # fmt: skip
    usual = {
        "epoch": 2, "at_s": BEGIN_S + 1.0, "opened_s": 50.0, "lost": ("slow",),
        "reason": "slow was lost: killed by signal 9", "choice": "spare takes stage 1",
        "how": "replay", "base": base, "silent_s": 0.06, "fenced_s": 0.01, "planned_s": 0.02,
        "installed_s": 0.4, "first_step_s": 0.11, "replayed_steps": 2, "redone_steps": 0,
        "take_overs": (over,),
        "plan": PipelinePlan.even(4, ("fast", "spare"), microbatches=3),
    }  # fmt: skip
    return RecoveryEvent(**{**usual, **fields})


def disturbed_events(steps: int, event: RecoveryEvent) -> list[TraceEvent]:
    """`measured_events` with a recovery in them, and what was void and replayed."""
    calm = measured_events(steps)
    lost_s = max(e.end_s for e in calm if e.step < event.base) + 0.001
    shift_s = lost_s - event.spans[0][1]
    gap_s = event.total_s - event.first_step_s
    found = [e for e in calm if e.step < event.base]
    for e in calm:
        if e.step >= event.base:
            names = {"slow": "spare"}
            found.append(
                dataclasses.replace(
                    e, device=names.get(e.device, e.device), peer=names.get(e.peer, e.peer),
                    start_s=e.start_s + gap_s + 0.2, end_s=e.end_s + gap_s + 0.2,
                )
            )  # fmt: skip
    found.append(
        TraceEvent(
            device="fast", kind="dropped_forward", step=event.base, microbatch=0,
            start_s=lost_s, end_s=lost_s + 0.01,
        )
    )  # fmt: skip
    replayed_s = lost_s + gap_s - 0.2
    common = {"device": "spare", "step": event.base - 1, "microbatch": 0}
    found.append(
        TraceEvent(kind="replayed_forward", start_s=replayed_s, end_s=replayed_s + 0.05, **common)
    )
    for kind, start_s, end_s in event.spans:
        found.append(
            TraceEvent(
                device=RECOVERY_ROW, kind=kind, step=event.base, label=f"epoch {event.epoch}",
                start_s=start_s + shift_s, end_s=end_s + shift_s,
            )
        )  # fmt: skip
    return found


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
    lost_at: int | None = None,
) -> RunFolder:
    """A run's folder.

    Args:
        end: "finish", "halt" or None: the journal just stops.
        lost_at: In this step "slow" was lost, and "spare" took over.
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
            if step == lost_at:
                event = recovery(step)
                folder.add_recovery(event)
                record("Epoch", epoch=2, lost=["slow"], reason=event.reason)
                record("Decision", epoch=2, base=step, plan=event.plan, steps=steps, reason="why")
                record("Resumed", epoch=2)
                at_s += event.total_s
            at_s += 1.25 * TIMELINE.step_s
            loss = 2.0 / (1 + step)
            verdict = {"is_finite": True, "skip": False}
            record("StepCommitted", step=step, verdict=verdict, values={"loss": loss})
            row = {"step": step, "loss": loss, "step_s": 1.25 * TIMELINE.step_s if step else None}
            if step == lost_at:
                row["step_s"] = 1.25 * TIMELINE.step_s + event.total_s
            elif lost_at is not None and step > lost_at:
                row["step_s"] = 2 * 1.25 * TIMELINE.step_s
            if lost_at is not None and (step + 1) % 4 == 0:
                holders = [{"first_layer": 0, "last_layer": 1, "devices": ["fast", "spare"]}]
                record("Wave", epoch=1, version=step + 1, ledger=holders)
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
        events = (
            measured_events(steps)
            if lost_at is None
            else disturbed_events(steps, recovery(lost_at))
        )
        folder.write_trace(chrome_trace(events, devices=DEVICES))
    return folder
