"""Runs of `cm.train` as benchmarks need them: agents' CPU seconds, and step times by plan."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _workloads import MICROBATCHES, Workload

import crowdmesh_jax as cm
from crowdmesh_jax.core import evaluate, schedule_for
from crowdmesh_jax.record import RunFolder
from crowdmesh_jax.runtime.crew import Crew
from crowdmesh_jax.runtime.result import DeviceEvent, StepEvent
from crowdmesh_jax.runtime.showing import WARMUP_STEPS

TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What one run of a few steps showed."""

    step_s: float
    """Median of the steps after the warm-up."""
    predicted_s: float
    losses: tuple[float, ...]
    cpu_s: float
    """Of all agents, from the first step's begin to the end of the last."""
    wall_s: float


def train(
    crew: Crew, work: Workload, plan: cm.PipelinePlan, *, steps: int, runs_dir: str,
    measure: bool = True,
) -> Trained:  # fmt: skip
    """Trains a few steps on a crew that stays."""
    marks: list[tuple[float, float]] = []

    def on_event(event: object) -> None:
        if isinstance(event, StepEvent):
            marks.append((time.perf_counter(), agents_cpu_s(crew)))

    result = cm.train(
        work.job, crew, work.data, steps=steps, plan=plan, runs_dir=runs_dir, measure=measure,
        on_event=on_event,
    )  # fmt: skip
    (start_s, start_cpu_s), (end_s, end_cpu_s) = marks[0], marks[-1]
    return Trained(
        step_s=result.measured_step_s,
        predicted_s=result.predicted_step_s,
        losses=tuple(np.asarray(result.losses, float).tolist()),
        cpu_s=end_cpu_s - start_cpu_s,
        wall_s=end_s - start_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Steps after the warm-up beside what was predicted of them."""

    seconds: tuple[float, ...]
    predicted_s: float
    """From stage times that each device measured alone, before the run."""
    explained_s: float
    """The same timeline from the seconds that the ops took in the run. How far it is from the
    measured step is what schedule, hops and everything between ops leave unexplained."""


def step_times(
    crew: Crew, work: Workload, plan: cm.PipelinePlan, *, repeats: int, runs_dir: str
) -> Steps:
    """Trains `repeats` steps after the warm-up."""
    seconds: list[float] = []
    ops: dict[int, list[DeviceEvent]] = {}

    def on_event(event: object) -> None:
        if isinstance(event, StepEvent) and event.step_s is not None:
            seconds.append(event.step_s)
        if isinstance(event, DeviceEvent) and event.step >= WARMUP_STEPS:
            ops.setdefault(event.stage, []).append(event)

    result = cm.train(
        work.job, crew, work.data, steps=repeats + WARMUP_STEPS + 1, plan=plan,
        runs_dir=runs_dir, on_event=on_event,
    )  # fmt: skip
    folder = RunFolder.open(result.run_dir).read_prediction()
    stages = [
        dataclasses.replace(
            alone,
            forward_s=statistics.median(event.forward_s for event in ops[index]) / MICROBATCHES,
            backward_s=statistics.median(event.backward_s for event in ops[index]) / MICROBATCHES,
            update_s=statistics.median(event.update_s for event in ops[index]),
        )
        for index, alone in enumerate(folder.stages)
    ]
    return Steps(
        seconds=tuple(seconds[-repeats:]),
        predicted_s=result.predicted_step_s,
        explained_s=evaluate(schedule_for(plan), stages, folder.cuts).step_s,
    )


def agents_cpu_s(crew: Crew) -> float:
    """CPU seconds of all agent processes so far; 0 where the system has no /proc."""
    total = 0
    for agent in crew.pids.values():
        try:
            stat = Path(f"/proc/{agent}/stat").read_text()
        except OSError:
            continue
        fields = stat.rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS_PER_S


def one_stage(work: Workload, device: str) -> cm.PipelinePlan:
    """The whole net on one device."""
    return cm.PipelinePlan.even(
        len(work.job.model.layers), [device], microbatches=work.job.microbatches
    )


def best_plan(
    work: Workload, crowd: cm.Crowd, *, schedule: str = "1f1b", min_stages: int = 1
) -> cm.PipelinePlan:
    """What the ILP makes of the net's layers, timed here one by one."""
    profile = cm.profile(work.job, crowd, work.data.batch(0), measure=True)
    return cm.partition(profile, crowd, schedule=schedule, min_stages=min_stages)
