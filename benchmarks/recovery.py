"""From SIGKILL to the next committed step: take-over by a standby, against a restart.

Four agents train a perceptron whose stages hold 10 MB of state each (parameters and Adam's
moments); a fifth is idle. One agent is killed in the middle of a step. Every recovery is on real
processes, with everything compiled before, as it is in a run that has been going for a while.

- standby: `cm.Recovery`, a copy every 8 steps at the idle device, replay of the lost stage.
- restart: no recovery, a checkpoint every 8 steps. The loss ends the run; the script starts it
  again at once from the newest checkpoint, with the idle device in place of the lost one. The same
  agents (their programs stay compiled), the same detector.
- replay, rollback of k steps: the kill comes k steps after the wave; for the rollback, boundary
  logs are kept for one step only.
- overhead: steps of a run with recovery at its default, against the same without, in turns.

    python benchmarks/recovery.py [--repeats 7] [--quick]
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

os.environ["NPROC"] = "1"  # XLA's threads, as in agents

import jax
import numpy as np
import optax
from _measure import arguments, figure, ratio, report
from flax import linen as nn

import crowdmesh_jax as cm
from crowdmesh_jax.runtime import Crew

WIDTH, STAGES, BATCH, MICROBATCHES = 920, 4, 256, 8
STATE_BYTES = 3 * 4 * WIDTH * (WIDTH + 1)
EVERY = 8
KILL_AT, STEPS = 21, 30


class Layer(nn.Module):
    """Dense and ReLU."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.relu(nn.Dense(WIDTH)(x))


def make_job() -> tuple[cm.TrainingJob, cm.ArraySource]:
    """A layer a stage."""
    model = cm.StagedModel.from_linen([Layer() for _ in range(STAGES)], name="perceptron")
    job = cm.TrainingJob(
        model, loss=cm.losses.mean_squared_error, optimizer=optax.adam(1e-4),
        batch_size=BATCH, microbatches=MICROBATCHES,
    )  # fmt: skip
    random = np.random.default_rng(0)
    inputs = random.standard_normal((4 * BATCH, WIDTH), np.float32)
    return job, cm.ArraySource(inputs, np.abs(inputs), BATCH)


@dataclass
class Bench:
    """The crew, and runs in which someone dies."""

    crew: Crew
    job: cm.TrainingJob
    data: cm.ArraySource
    folder: str

    def plan(self, *devices: str) -> cm.PipelinePlan:
        names = devices or tuple(f"device-{i}" for i in range(STAGES))
        return cm.PipelinePlan.even(STAGES, list(names), microbatches=MICROBATCHES)

    def killed(
        self, recovery: Any, *, kill_at: int = KILL_AT, steps: int = STEPS, **more: Any
    ) -> tuple[float, Any, Any]:
        """Kills device-1 after step `kill_at`; (seconds until a step beyond is committed, the
        recovery's event, what ended the run)."""
        killed_s, back_s, error, told = 0.0, 0.0, None, None

        def on_event(event: object) -> None:
            nonlocal killed_s, back_s, told
            if isinstance(event, cm.RecoveryEvent):
                told = event
            if not isinstance(event, cm.StepEvent):
                return
            if killed_s and not back_s and told is not None and event.step > kill_at + 1:
                back_s = time.monotonic()
            if event.step == kill_at and not killed_s:
                time.sleep(0.3 * (event.step_s or 0.0))  # in the middle of the next one
                killed_s = time.monotonic()
                os.kill(self.crew.pids["device-1"], signal.SIGKILL)

        try:
            cm.train(
                self.job, self.crew, self.data, steps=steps, plan=self.plan(), measure=False,
                runs_dir=self.folder, recovery=recovery, on_event=on_event, **more,
            )  # fmt: skip
        except cm.CrowdMeshError as exc:
            error = exc
        return (back_s or killed_s) - (killed_s if back_s else 0.0), told, error

    def again(self) -> None:
        """The killed one comes back, for the next run."""
        self.crew.relaunch("device-1")
        until_s = time.monotonic() + 60
        while "device-1" not in self.crew.transport.peers and time.monotonic() < until_s:
            time.sleep(0.05)
        time.sleep(0.5)

    def standby(self, **terms: Any) -> tuple[float, Any]:
        recovery = cm.Recovery(**{"wave_every": EVERY, "replan": False, **terms})
        kill_at = KILL_AT + terms.get("kill_after", 0)
        seconds, told, error = self.killed(recovery, kill_at=kill_at)
        assert error is None, error
        assert told is not None
        self.again()
        return seconds, told

    def restart(self) -> float:
        """Until a step is committed that the run before had not shown."""
        name = f"restart-{time.monotonic_ns()}"
        killed_s, _, error = self.killed(False, name=name, checkpoint_every=EVERY)
        assert isinstance(error, cm.errors.AgentLostError), error
        back: list[float] = []

        def on_event(event: object) -> None:
            if isinstance(event, cm.StepEvent) and event.step > KILL_AT + 1 and not back:
                back.append(time.monotonic())

        cm.train(
            self.job, self.crew, self.data, steps=STEPS, measure=False,
            plan=self.plan("device-0", "device-4", "device-2", "device-3"),
            resume=f"{self.folder}/{name}", on_event=on_event,
        )  # fmt: skip
        self.again()
        return back[0] - killed_s

    def redone(self, k: int, *, rollback: bool) -> tuple[float, Any]:
        """A kill k steps after the only wave."""
        every = 25
        recovery = cm.Recovery(
            wave_every=every, replan=False, log_steps=1 if rollback else 2 * every
        )
        wave: list[int] = []
        seconds, told, error = self.killed(recovery, kill_at=every + k, steps=every + k + 6)
        assert error is None, error
        self.again()
        del wave
        return seconds, told

    def step_s(self, recovery: Any, steps: int) -> float:
        """Seconds of a step, waves included, after the first ones."""
        marks: list[float] = []

        def on_event(event: object) -> None:
            if isinstance(event, cm.StepEvent):
                marks.append(time.monotonic())

        cm.train(
            self.job, self.crew, self.data, steps=steps, plan=self.plan(), measure=False,
            runs_dir=self.folder, recovery=recovery, on_event=on_event,
        )  # fmt: skip
        half = len(marks) // 3
        return (marks[-1] - marks[half]) / (len(marks) - 1 - half)


def main() -> None:
    options = arguments(__doc__, repeats=7)
    job, data = make_job()
    crowd = cm.Crowd.local((1.0,) * (STAGES + 1))
    standby: list[tuple[float, Any]] = []
    restart: list[float] = []
    redone: dict[tuple[int, bool], list[tuple[float, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder, cm.launch(crowd) as crew:
        bench = Bench(crew, job, data, folder)
        warm = 0 if options.quick else 1
        for repeat in range(options.repeats + warm):
            first, second = bench.standby(), bench.restart()
            print(
                f"standby {first[0]:.2f} s: {first[1].line()}\nrestart {second:.2f} s", flush=True
            )
            if repeat >= warm:
                standby.append(first)
                restart.append(second)
        for k in (1, 5) if options.quick else (1, 5, 20):
            for _ in range(options.repeats):
                for rollback in (False, True):
                    found = bench.redone(k, rollback=rollback)
                    redone.setdefault((k, rollback), []).append(found)
                    print(f"k {k} {found[1].how}: {found[0]:.2f} s", flush=True)
        steps = 40 if options.quick else 240
        pairs = [
            (bench.step_s(cm.Recovery(replan=False), steps), bench.step_s(False, steps))
            for _ in range(options.repeats)
        ]
    parts = {
        "noticed": "silent_s", "fenced": "fenced_s", "planned": "planned_s",
        "installed": "installed_s", "first step": "first_step_s",
    }  # fmt: skip
    figures = [
        figure("SIGKILL to the next step, standby", [s for s, _ in standby], unit="s", at_most=2.0),
        figure("the same, restart from a checkpoint", restart, unit="s"),
        ratio("restart / standby", restart, [s for s, _ in standby], at_least=5.0),
        *(
            figure(f"of it {name}", [getattr(e, field) for _, e in standby], unit="s")
            for name, field in parts.items()
        ),
        figure(
            "compiled on the hot path",
            [sum(t.compiled_s for t in e.take_overs) for _, e in standby],
            unit="s",
            at_most=0.05,
        ),
    ]
    for k in sorted({k for k, _ in redone}):
        figures.append(
            ratio(
                f"rollback / replay of {k} steps",
                [s for s, _ in redone[k, True]],
                [s for s, _ in redone[k, False]],
            )
        )
        figures.append(figure(f"replay of {k} steps", [s for s, _ in redone[k, False]], unit="s"))
    figures += [
        figure(
            "step with copies / without",
            [ours / theirs for ours, theirs in pairs],
            at_most=1.03,
        ),
        figure("step", [1e3 * theirs for _, theirs in pairs], unit="ms"),
    ]
    report(
        "recovery",
        f"{STAGES} agents, {STATE_BYTES / 1e6:.0f} MB of state a stage, a kill in mid-step",
        figures,
        quick=options.quick,
        settings={
            "width": WIDTH, "stages": STAGES, "batch": BATCH, "microbatches": MICROBATCHES,
            "wave_every": EVERY,
        },
        details={
            "standby": [e.line() for _, e in standby],
            "how": {f"{k} {'rollback' if r else 'replay'}": [e.how for _, e in found]
                    for (k, r), found in redone.items()},
            "median_step_s": statistics.median(theirs for _, theirs in pairs),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
