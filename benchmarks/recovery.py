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

    python benchmarks/recovery.py [--repeats 7] [--keep FILE] [--quick]

`--keep` appends each measurement to a file and takes what is there from it.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["NPROC"] = "1"  # XLA's threads, as in agents

from _measure import arguments, figure, ratio, report
from _perceptron import make_job

import crowdmesh_jax as cm
from crowdmesh_jax.runtime import Crew

WIDTH, STAGES, BATCH, MICROBATCHES = 920, 4, 256, 8
STATE_BYTES = 3 * 4 * WIDTH * (WIDTH + 1)
EVERY = 8
KILL_AT, STEPS = 21, 30


@dataclass
class Killed:
    """What became of a run in which a device was killed."""

    killed_s: float = 0.0
    shown_s: dict[int, float] = field(default_factory=dict)
    """Step -> when it was told that it is committed."""
    told: Any = None
    error: Exception | None = None

    def until_next_s(self) -> float:
        """From the kill to the first step that had not been committed before it."""
        return self.shown_s[self.told.base + self.told.redone_steps] - self.killed_s


@dataclass
class Bench:
    """The crew, and runs in which someone dies."""

    crew: Crew
    job: cm.TrainingJob
    data: cm.ArraySource
    folder: str
    turns: int = 0

    def plan(self, *devices: str) -> cm.PipelinePlan:
        names = devices or tuple(f"device-{i}" for i in range(STAGES))
        return cm.PipelinePlan.even(STAGES, list(names), microbatches=MICROBATCHES)

    def killed(
        self, recovery: Any, *, kill_at: int = KILL_AT, steps: int = STEPS, **more: Any
    ) -> Killed:
        """Kills device-1 in the middle of the step after `kill_at`."""
        found = Killed()

        def on_event(event: object) -> None:
            if isinstance(event, cm.RecoveryEvent):
                found.told = event
            if not isinstance(event, cm.StepEvent):
                return
            found.shown_s[event.step] = time.monotonic()
            if event.step == kill_at and not found.killed_s:
                time.sleep(0.3 * (event.step_s or 0.0))
                found.killed_s = time.monotonic()
                os.kill(self.crew.pids["device-1"], signal.SIGKILL)

        try:
            cm.train(
                self.job, self.crew, self.data, steps=steps, plan=self.plan(), measure=False,
                runs_dir=self.folder, recovery=recovery, on_event=on_event, **more,
            )  # fmt: skip
        except cm.CrowdMeshError as exc:
            found.error = exc
        return found

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
        found = self.killed(recovery, kill_at=kill_at)
        assert found.error is None, found.error
        self.again()
        return found.until_next_s(), found.told

    def restart(self) -> float:
        """Until a step is committed that the run before had not shown."""
        name = f"restart-{time.monotonic_ns()}"
        found = self.killed(False, name=name, checkpoint_every=EVERY)
        assert isinstance(found.error, cm.errors.AgentLostError), found.error
        back: list[float] = []

        def on_event(event: object) -> None:
            if isinstance(event, cm.StepEvent) and event.step > max(found.shown_s) and not back:
                back.append(time.monotonic())

        cm.train(
            self.job, self.crew, self.data, steps=STEPS, measure=False,
            plan=self.plan("device-0", "device-4", "device-2", "device-3"),
            resume=f"{self.folder}/{name}", on_event=on_event,
        )  # fmt: skip
        self.again()
        return back[0] - found.killed_s

    def redone(self, k: int, *, rollback: bool) -> tuple[float, Any]:
        """A kill k steps after the only wave."""
        every = 25
        recovery = cm.Recovery(
            wave_every=every, replan=False, log_steps=1 if rollback else 2 * every
        )
        found = self.killed(recovery, kill_at=every + k, steps=every + k + 6)
        assert found.error is None, found.error
        self.again()
        return found.until_next_s(), found.told

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


class Rows:
    """What was measured, a line each; a file that is kept is gone on with."""

    def __init__(self, keep: str) -> None:
        self._path = Path(keep) if keep else None
        known = self._path.read_text().splitlines() if self._path and self._path.exists() else []
        self._rows = [json.loads(line) for line in known]

    def take(self, what: str, count: int, measure: Callable[[], dict[str, Any]]) -> list[Any]:
        """`count` rows of that name, measured where they are missing."""
        rows = [row for row in self._rows if row["what"] == what][:count]
        while len(rows) < count:
            rows.append({"what": what, **measure()})
            print(json.dumps(rows[-1]), flush=True)
            self._rows.append(rows[-1])
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
        return rows


PARTS = {
    "noticed": "silent_s", "fenced": "fenced_s", "planned": "planned_s",
    "installed": "installed_s", "first step": "first_step_s",
}  # fmt: skip


def of_standby(bench: Bench) -> dict[str, Any]:
    """A take-over and its parts, and a restart right after it."""
    seconds, told = bench.standby()
    parts = {name: getattr(told, field) for name, field in PARTS.items()}
    compiled_s = sum(t.compiled_s for t in told.take_overs)
    row = {"seconds": seconds, "compiled_s": compiled_s, "line": told.line(), **parts}
    return {**row, "restart": bench.restart()}


def of_redone(bench: Bench, k: int) -> dict[str, Any]:
    """A replay and a rollback of k steps, in turns."""
    replay, told = bench.redone(k, rollback=False)
    rollback, other = bench.redone(k, rollback=True)
    assert (told.how, other.how) == ("replay", "rollback"), (told.how, other.how)
    return {"replay": replay, "rollback": rollback}


def of_steps(bench: Bench, steps: int) -> dict[str, Any]:
    """A step with recovery at its default and one without; who comes first changes."""
    bench.turns += 1
    terms = [("ours", cm.Recovery(replan=False)), ("theirs", False)]
    return {name: bench.step_s(term, steps) for name, term in terms[:: (-1) ** bench.turns]}


def main() -> None:
    options = arguments(__doc__, repeats=7, keep="")
    job, data = make_job(width=WIDTH, stages=STAGES, batch=BATCH, microbatches=MICROBATCHES)
    crowd = cm.Crowd.local((1.0,) * (STAGES + 1))
    rows, count = Rows(options.keep), options.repeats
    steps = 40 if options.quick else 100
    with tempfile.TemporaryDirectory() as folder, cm.launch(crowd) as crew:
        bench = Bench(crew, job, data, folder)
        if not options.quick:
            bench.step_s(cm.Recovery(replan=False), 20)  # caches fill
        standby = rows.take("standby", count, lambda: of_standby(bench))
        redone = {
            k: rows.take(f"redone {k}", count, lambda k=k: of_redone(bench, k))
            for k in ((1, 5) if options.quick else (1, 5, 20))
        }
        pairs = rows.take("steps", count, lambda: of_steps(bench, steps))
    restart = [row["restart"] for row in standby]
    figures = [
        figure(
            "SIGKILL to the next step, standby", [r["seconds"] for r in standby], unit="s",
            at_most=2.0,
        ),
        figure("the same, restart from a checkpoint", restart, unit="s"),
        ratio("restart / standby", restart, [r["seconds"] for r in standby], at_least=5.0),
        *(figure(f"of it {name}", [r[name] for r in standby], unit="s") for name in PARTS),
        figure(
            "compiled on the hot path", [r["compiled_s"] for r in standby], unit="s", at_most=0.05
        ),
    ]  # fmt: skip
    for k, found in redone.items():
        replay, rollback = ([r[name] for r in found] for name in ("replay", "rollback"))
        figures += [
            ratio(f"rollback / replay of {k} steps", rollback, replay),
            figure(f"replay of {k} steps", replay, unit="s"),
        ]
    ours, theirs = ([r[name] for r in pairs] for name in ("ours", "theirs"))
    figures += [
        ratio("step with copies / without", ours, theirs, at_most=1.03),
        figure("step", [1e3 * seconds for seconds in theirs], unit="ms"),
    ]
    report(
        "recovery",
        f"{STAGES} agents, {STATE_BYTES / 1e6:.0f} MB of state a stage, a kill in mid-step",
        figures,
        quick=options.quick,
        settings={
            "width": WIDTH, "stages": STAGES, "batch": BATCH, "microbatches": MICROBATCHES,
            "wave_every": EVERY, "steps": steps,
        },
        details={"standby": [row["line"] for row in standby]},
    )  # fmt: skip


if __name__ == "__main__":
    main()
