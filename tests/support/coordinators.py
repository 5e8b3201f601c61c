"""Seeded runs whose coordinator is killed again and again, and what must hold at their end.

A trial follows from its seed: how often, and where, the coordinator dies; whether a device dies
just before it, and is there again when it returns. Each life of the coordinator is a process
(`mortal_coordinator`) that takes the run up with `resume=`; the agents live on.
"""

from __future__ import annotations

import functools
import json
import math
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

import crowdmesh_jax as cm

from .survival import is_safe, journal
from .training import even_plan, identical, small_job

SCRIPT = Path(__file__).with_name("mortal_coordinator.py")
STAGES, DEVICES = 2, 4
WAVE_EVERY, CHECKPOINT_EVERY = 4, 10
LATENCY_S = 0.015
"""Of links where rows are with the devices, which train on while nobody coordinates."""
LIFE_S = 90.0
"""A life of the coordinator lasts no longer."""

Point = tuple[str, str, str]
STEPPING: tuple[Point, ...] = (("time", "", ""),)
WAVES: tuple[Point, ...] = (
    ("send", "AskMarks", "after"), ("take", "Stored", "before"), ("record", "Wave", "before"),
    ("record", "Wave", "torn"), ("record", "Wave", "after"), ("send", "Discard", "before"),
    ("send", "Discard", "after"),
)  # fmt: skip
RECOVERIES: tuple[Point, ...] = (
    ("record", "Epoch", "before"), ("record", "Epoch", "torn"), ("record", "Epoch", "after"),
    ("send", "Fence", "after"), ("take", "Report", "before"), ("record", "Decision", "before"),
    ("record", "Decision", "torn"), ("record", "Decision", "after"), ("send", "Install", "after"),
    ("take", "Ready", "before"), ("record", "Resumed", "before"), ("record", "Resumed", "after"),
    ("send", "Resume", "before"), ("send", "Resume", "after"), ("time", "", ""),
)  # fmt: skip
CHECKPOINTS: tuple[Point, ...] = (
    ("take", "StageState", "before"), ("file", "shard", "before"), ("file", "shard", "after"),
    ("file", "manifest", "before"), ("file", "manifest", "after"),
    ("record", "Checkpoint", "torn"), ("record", "Checkpoint", "after"),
)  # fmt: skip
FINISHES: tuple[Point, ...] = (
    ("take", "StageState", "before"), ("file", "shard", "before"), ("file", "manifest", "before"),
    ("file", "manifest", "after"), ("record", "Checkpoint", "after"),
    ("record", "Finish", "before"), ("record", "Finish", "torn"), ("record", "Finish", "after"),
    ("send", "Release", "before"), ("send", "Release", "after"),
)  # fmt: skip
RESTARTS: tuple[Point, ...] = (
    ("record", "Term", "before"), ("record", "Term", "torn"), ("record", "Term", "after"),
    ("send", "Attach", "before"), ("send", "Attach", "after"), ("take", "Attached", "before"),
)  # fmt: skip
MOMENTS = {
    "step": STEPPING, "wave": WAVES, "recovery": RECOVERIES, "checkpoint": CHECKPOINTS,
    "finish": FINISHES, "restart": RESTARTS,
}  # fmt: skip
TO_ALL = ("Fence", "Install", "Resume", "Discard", "Release", "Attach", "Report", "Ready", "Stored")


@dataclass(frozen=True, kw_only=True)
class Death:
    """Where a life of the coordinator ends."""

    moment: str
    what: str
    name: str
    when: str
    nth: int = 0
    """So many occasions are let pass."""
    after: int = 0
    """Steps that this life shows first; -1: it may end before it shows any."""
    from_step: int = 0
    delay: float = 0.0
    """Of a "time": so many steps' durations later."""
    victim: int | None = None
    """The device of this stage is killed first."""
    returns: bool = True
    """The victim is started again before the coordinator is; else after it."""

    @property
    def point(self) -> Point:
        return self.what, self.name, self.when

    def __str__(self) -> str:
        where = f"{self.what} {self.name} {self.when}".strip()
        late = f" +{self.delay:.1f} steps" if self.what == "time" else f" #{self.nth}"
        lost = "" if self.victim is None else f", stage {self.victim} killed"
        return f"{self.moment}: {where}{late}{lost}"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a seed comes to."""

    seed: int
    ships: bool
    """Rows are with the devices, which train on meanwhile; else they wait for them."""
    steps: int
    deaths: tuple[Death, ...]

    def __str__(self) -> str:
        rows = "shipped" if self.ships else "asked"
        return f"seed {self.seed}: {rows} rows; " + "; ".join(map(str, self.deaths))


def draw(seed: int) -> Trial:
    """The trial of a seed: two or three deaths. The finish can only come last."""
    rng = random.Random(seed)
    ships, deaths = rng.random() < 0.25, rng.choice((2, 2, 3))
    steps = 110 * deaths if ships else 30 * deaths
    earlier = [name for name in MOMENTS if name != "finish"]
    moments = [rng.choice(earlier[:-1])]  # nobody has started again before the first has died
    moments += rng.choices(earlier, k=deaths - 2)
    moments.append("finish" if rng.random() < 0.4 else rng.choice(earlier))
    return Trial(
        seed=seed, ships=ships, steps=steps,
        deaths=tuple(_death(rng, moment, steps) for moment in moments),
    )  # fmt: skip


def _death(rng: random.Random, moment: str, steps: int) -> Death:
    what, name, when = rng.choice(MOMENTS[moment])
    fields: dict[str, Any] = {
        "nth": rng.randrange(2) if name in TO_ALL else 0,
        "after": -1 if moment == "restart" else rng.randint(1, 12),
        "delay": rng.uniform(0.0, 2.0),
    }
    if moment == "recovery":
        fields |= {"victim": rng.randrange(STAGES), "returns": rng.random() < 0.7}
        if what == "time":  # somewhere in the recovery
            fields["delay"] = rng.uniform(1.0, 60.0)
    if moment == "finish":
        fields |= {"after": 0, "from_step": steps - 3}
    return Death(moment=moment, what=what, name=name, when=when, **fields)


# Jobs, in both processes ------------------------------------------------------------------------


def job_of() -> tuple[cm.TrainingJob, cm.ArraySource]:
    return small_job()


def plan_of() -> cm.PipelinePlan:
    return even_plan(job_of()[0], STAGES)


def crowd_of(latency_s: float) -> cm.Crowd:
    """The devices; links as slow as that, if it is more than nothing."""
    crowd = cm.Crowd.local((1.0,) * DEVICES)
    if not latency_s:
        return crowd
    from dataclasses import replace

    slow = [replace(link, latency_s=latency_s) for link in all_links(crowd)]
    return replace(crowd, links=tuple(slow))


def all_links(crowd: cm.Crowd) -> list[cm.Link]:
    """Of each ordered pair."""
    ids = [device.id for device in crowd.devices]
    found = [crowd.link(a, b) for a in ids for b in ids if a != b]
    return [link for link in found if link is not None]


class AtHome:
    """Rows that do not ship: each step's are asked for from the coordinator."""

    def __init__(self, source: cm.ArraySource) -> None:
        self._source = source

    def batch(self, step: int) -> Any:
        time.sleep(0.004)
        return self._source.batch(step)


@functools.cache
def undisturbed(steps: int) -> Any:
    """The plan's programs in one process."""
    job, data = job_of()
    return cm.reference(job, data, steps, plan=plan_of())


def is_whole(run_dir: Path) -> bool:
    """A wave is complete in the epoch that is on: a loss can be made good."""
    return is_safe(journal(run_dir), 1)


def kill_owner(folder: Path, name: str, stage: int) -> None:
    """SIGKILL to the device that has this stage now."""
    decided = [r for r in journal(folder / name) if r["kind"] == "Decision"][-1]
    device = decided["plan"]["stages"][stage]["device"]
    os.kill(int((folder / "pids" / device).read_text()), signal.SIGKILL)


# Running ----------------------------------------------------------------------------------------


class Agents:
    """Agent processes that outlive every coordinator; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "pids").mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.listen = f"127.0.0.1:{free.getsockname()[1]}"
        self.environment = {
            **os.environ, "CROWDMESH_TOKEN": "secret", "JAX_PLATFORMS": "cpu", "NPROC": "1"
        }  # fmt: skip
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._coordinators: subprocess.Popen[bytes] | None = None
        self._pid = 0
        """Of the coordinator at work."""

    def __enter__(self) -> Agents:
        self.relaunch()
        self._coordinators = subprocess.Popen(
            [sys.executable, str(SCRIPT)], env=self.environment, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._coordinators is not None
        for process in (self._coordinators, *self._processes.values()):
            process.kill()
            process.wait(timeout=10)
        for pipe in (self._coordinators.stdin, self._coordinators.stdout):
            if pipe is not None:
                pipe.close()

    def restart(self) -> None:
        """New processes for all devices: what the old ones held is gone."""
        for process in self._processes.values():
            process.kill()
            process.wait(timeout=10)
        self.relaunch()

    def coordinate(self, says: dict[str, Any]) -> None:
        """Starts a coordinator."""
        assert self._coordinators is not None
        assert self._coordinators.stdin is not None
        self._coordinators.stdin.write(json.dumps(says).encode() + b"\n")
        self._pid = self._answer(30.0) or 0

    def ended(self, limit_s: float) -> int | None:
        """How it ended; None: it did not, and is killed."""
        code = self._answer(limit_s)
        if code is None:
            os.kill(self._pid, signal.SIGKILL)
            self._answer(10.0)
        return code

    def _answer(self, limit_s: float) -> int | None:
        assert self._coordinators is not None
        answers = self._coordinators.stdout
        assert answers is not None
        ready, _, _ = select.select([answers], [], [], limit_s)
        return int(answers.readline()) if ready else None

    def relaunch(self) -> list[str]:
        """Starts whoever is not there; returns their names."""
        gone = [
            f"device-{index}"
            for index in range(DEVICES)
            if (p := self._processes.get(f"device-{index}")) is None or p.poll() is not None
        ]
        for device in gone:
            command = [sys.executable, "-m", "crowdmesh_jax.agent", "--device", device]
            command += ["--coordinator", self.listen]
            cache = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled" / device)}
            with (self.folder / f"{device}.log").open("ab") as log:
                self._processes[device] = subprocess.Popen(
                    command, env={**self.environment, **cache}, stdout=log, stderr=log
                )
            (self.folder / "pids" / device).write_text(str(self._processes[device].pid))
        return gone


@dataclass
class Story:
    """What happened in a trial."""

    trial: Trial
    lives: list[list[str]] = field(default_factory=list)
    """What each life said."""
    fired: list[str] = field(default_factory=list)
    """Where each of the deaths fell; "": it did not."""
    seconds: float = 0.0

    @property
    def shown(self) -> list[list[int]]:
        return [[int(line.split()[1]) for line in life if line.startswith("step ")]
                for life in self.lives]  # fmt: skip

    @property
    def recoveries(self) -> list[str]:
        return [line for life in self.lives for line in life if line.startswith("recovery ")]


def run_trial(trial: Trial, agents: Agents) -> Story:
    """Lets the coordinator die as drawn, and once live to the end.

    Raises:
        AssertionError: A life ended in another way.
    """
    began_s = time.monotonic()
    story = Story(trial)
    name = f"seed-{trial.seed}"
    for life, death in enumerate((*trial.deaths, None)):
        returns = life == 0 or trial.deaths[life - 1].returns
        if returns:
            agents.relaunch()
        said = _live(trial, agents, name, life, death, relaunch=not returns)
        story.lives.append(said)
        fired = agents.folder / f"fired-{name}-{life}"
        if death is not None:
            story.fired.append(fired.read_text() if fired.exists() else "")
            if not story.fired[-1]:
                break  # the run came to its end before
    story.seconds = time.monotonic() - began_s
    return story


def _live(
    trial: Trial, agents: Agents, name: str, life: int, death: Death | None, *, relaunch: bool
) -> list[str]:
    out, errors = (agents.folder / f"{name}-{life}.{kind}" for kind in ("out", "err"))
    says = {
        "folder": str(agents.folder), "name": name, "listen": agents.listen, "life": life,
        "steps": trial.steps, "ships": trial.ships, "death": death and asdict(death),
        "out": str(out), "err": str(errors),
    }  # fmt: skip
    agents.coordinate(says)
    if relaunch:
        time.sleep(2.0)
        agents.relaunch()
    code = agents.ended(LIFE_S)
    told = f"{out.read_text()[-300:]}\n{errors.read_text()[-3000:]}"
    assert code is not None, f"life {life} does not end; {told}"
    was_killed = code == -signal.SIGKILL and death is not None
    assert was_killed or code == 0, f"life {life} ended with {code}; {told}"
    return out.read_text().splitlines()


# Judging ----------------------------------------------------------------------------------------


def judge(story: Story, folder: Path) -> None:
    """Asserts what the promise says; AssertionError names what is broken."""
    trial = story.trial
    name, steps = f"seed-{trial.seed}", trial.steps
    # Who has all rows may have come to the end while nobody coordinated.
    fell = [bool(where) for where in story.fired]
    assert all(fell) or (trial.ships and fell[0]), f"a death that did not fall: {story.fired}"
    ideal = undisturbed(steps)
    wanted = jax.tree.leaves((ideal.params, ideal.state, ideal.opt_state))
    with np.load(folder / f"{name}.npz") as kept:
        ours = [kept[part] for part in kept.files]
    assert identical(ours, wanted), "the final state is another"

    # The record has each step once; so has the callback, but for one that was recorded, and not
    # told yet, when the process died.
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(steps)), "each step has one row"
    told = [step for life in story.shown for step in life]
    assert told == sorted(set(told)), "each step is shown once, in order"
    missing = set(range(steps)) - set(told)
    borders = {life[-1] + 1 if life else 0 for life in story.shown}
    assert len(missing) <= len(trial.deaths), f"{missing} were shown to nobody"
    assert missing <= borders | {b + 1 for b in missing & borders}, f"{missing}, not at a death"

    losses = [row["loss"] if isinstance(row["loss"], float) else math.nan for row in rows]
    same = [np.float32(a) == np.float32(b) for a, b in zip(losses, ideal.losses, strict=True)]
    lost = [step for step, loss in enumerate(losses) if math.isnan(loss)]
    assert all(s or step in lost for step, s in enumerate(same)), "losses are those of that run"
    assert len(lost) <= 2 * sum(death.victim is not None for death in trial.deaths), lost

    records = journal(folder / name)
    terms = [record["term"] for record in records if record["kind"] == "Term"]
    epochs = [record["epoch"] for record in records if record["kind"] == "Epoch"]
    assert terms == sorted(set(terms)), "no term twice"
    assert epochs == sorted(set(epochs)), "no epoch twice"
    # A checkpoint's file may be whole later than a newer wave, which then stays what is durable.
    waves = [record for record in records if record["kind"] == "Wave"]
    for of_copies in (True, False):
        versions = [r["version"] for r in waves if bool(r["ledger"]) == of_copies]
        assert versions == sorted(versions), "what is durable never goes back"
