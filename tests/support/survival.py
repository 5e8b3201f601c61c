"""Seeded runs on real processes in which devices are killed at exact ops, and what must hold after.

A trial follows from its seed: job, plan, crowd, terms, and the blows. A blow falls at the first
occasion at or after its step; it is armed only once what the run promises stands again after the
blow before (a wave of copies is complete; who was launched again is there), and rows of its step
are held back until then. So the promise covers every blow, and a run that does not go on is a bug.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import crowdmesh_jax as cm
from crowdmesh_jax.model.zoo import gpt2

from . import families
from .equality import assert_bit_equal
from .families import Family, family
from .mortal import Mortals, Order

ROWS = 8
STEPS = 36
WAVE_EVERY = 4
ARM_S = 8.0
"""Rows of a step are held back so long at most: a step that lasts 10 s is taken for a loss."""

OWNER_KINDS = (
    ("forward", "before"), ("forward", "after"), ("backward", "before"), ("backward", "after"),
    ("full", "before"), ("full", "after"), ("update", "before"), ("update", "after"),
    ("send-Forward", "before"), ("send-Forward", "after"), ("send-Backward", "before"),
    ("send-Backward", "after"), ("send-Commit", "before"), ("send-Commit", "after"),
    ("take-Commit", "before"), ("send-Done", "before"), ("send-Done", "after"),
    ("send-Loss", "before"), ("send-Chunk", "before"), ("send-Chunk", "after"),
    ("send-Seal", "before"), ("outside", "before"),
)  # fmt: skip
HOLDER_KINDS = (("take-Chunk", "before"), ("take-Seal", "before"), ("send-Stored", "before"))
RECOVERY_KINDS = (
    ("load", "before"), ("load", "after"), ("replay-forward", "after"),
    ("replay-backward", "before"), ("replay-update", "before"), ("replay-update", "after"),
    ("send-Report", "before"), ("send-Report", "after"), ("take-Install", "before"),
    ("send-Ready", "before"), ("take-Resume", "before"), ("send-FetchLog", "after"),
)  # fmt: skip
REPLAYING = ("replay", "send-FetchLog")
"""Kinds that there are only where a step is replayed."""


@dataclass(frozen=True, kw_only=True)
class Blow:
    """One or two devices die."""

    order: Order
    then: Order | None = None
    """Falls in the recovery from the first."""

    @property
    def kills(self) -> int:
        return 1 + len(self.order.beside) + (self.then is not None)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a seed comes to."""

    seed: int
    family: str
    stages: int
    spares: int
    copies: int
    ships: bool
    """Rows are with the devices; else each step's are asked for."""
    relaunches: bool
    """Processes that died are started again at once."""
    blows: tuple[Blow, ...]
    steps: int = STEPS

    @property
    def kills(self) -> int:
        return sum(blow.kills for blow in self.blows)

    def __str__(self) -> str:
        falls = [f"{b.order.kind}@{b.order.step}" + ("+beside" if b.order.beside else "")
                 + (f"+{b.then.kind}" if b.then else "") for b in self.blows]  # fmt: skip
        return (
            f"seed {self.seed}: {self.family}, {self.stages} stages, {self.spares} spares,"
            f" {self.copies} copies, {'shipped' if self.ships else 'asked'} rows,"
            f" {'relaunched' if self.relaunches else 'gone'}; {', '.join(falls)}"
        )


def draw(seed: int, *, spares: int = 3, kills: int = 2) -> Trial:
    """The trial of a seed, with at least so many kills."""
    rng = random.Random(seed)
    stages = 3
    copies = rng.choice((1, 2))
    relaunches = rng.random() < 0.5
    blows: list[Blow] = []
    step = rng.randint(WAVE_EVERY + 2, WAVE_EVERY + 5)
    while sum(blow.kills for blow in blows) < kills:
        left = spares if relaunches else spares - sum(blow.kills for blow in blows)
        blows.append(_blow(rng, len(blows), step, stages, copies, left))
        step += rng.randint(6, 9)
    return Trial(
        seed=seed,
        family=rng.choice(("cnn", "transformer")),
        stages=stages,
        spares=spares,
        copies=copies,
        ships=rng.random() < 0.5 and not relaunches,
        relaunches=relaunches,
        blows=tuple(blows),
    )


def _blow(rng: random.Random, index: int, step: int, stages: int, copies: int, left: int) -> Blow:
    kind, when = rng.choice((*OWNER_KINDS, *HOLDER_KINDS))
    stage: int | None = rng.randrange(stages)
    if kind in ("send-Forward",):
        stage = rng.randrange(stages - 1)
    elif kind in ("send-Backward", "take-Commit"):
        stage = rng.randrange(1, stages)
    elif kind in ("send-Commit", "send-Done"):
        stage = 0 if kind == "send-Done" else rng.randrange(stages - 1)
    elif kind == "send-Loss":
        stage = stages - 1
    if (kind, when) in HOLDER_KINDS:
        stage = None
    nth = rng.randrange(4) if kind in ("forward", "backward") else rng.randrange(2)
    order = Order(name=f"{index}a", kind=kind, when=when, step=step, stage=stage, nth=nth)
    more = rng.random()
    if left >= 2 and stage is not None and kind != "outside" and more < 0.25:
        beside = 1 if stage == 0 else -1 if stage == stages - 1 else rng.choice((-1, 1))
        return Blow(order=replace(order, beside=(beside,)))
    if left >= 2 and stage is not None and copies >= 2 and more < 0.6:
        kind, when = rng.choice(RECOVERY_KINDS)
        on = stage if kind.startswith(("load", "replay", "send-Fetch")) else None
        then = Order(name=f"{index}b", kind=kind, when=when, step=1, stage=on)
        return Blow(order=order, then=then)
    return Blow(order=order)


# Jobs -------------------------------------------------------------------------------------------


def _with_dropout() -> Family:
    """GPT-2: the first stage lends its embedding to the last."""
    model = gpt2(vocab=families.VOCAB, context=8, width=8, heads=2, depth=2, dropout=0.2)
    tokens = families.tokens
    return Family("transformer", model, families.CROSS_ENTROPY, tokens, tokens, families.ACCURACY)


@functools.cache
def job_of(name: str) -> tuple[cm.TrainingJob, cm.ArraySource]:
    """A CNN with batch statistics and dropout, or a transformer with dropout and tied weights.
    Clipping mixes all layers, so that each commit carries a value; eps keeps Adam from turning
    rounding into steps."""
    made = _with_dropout() if name == "transformer" else family({"cnn": "lenet"}.get(name, name))
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2, eps=1e-4))
    inputs, targets = made.batch(64)
    return made.job(optimizer, batch_size=ROWS, seed=7), cm.ArraySource(inputs, targets, ROWS)


def plan_of(name: str, stages: int) -> cm.PipelinePlan:
    job, _ = job_of(name)
    devices = [f"device-{index}" for index in range(stages)]
    return cm.PipelinePlan.even(len(job.model.layers), devices, microbatches=job.microbatches)


@functools.cache
def undisturbed(name: str, stages: int, steps: int) -> Any:
    """The plan's programs in one process."""
    job, data = job_of(name)
    return cm.reference(job, data, steps, plan=plan_of(name, stages))


def share_compiled(folder: Path, devices: int) -> Path:
    """A cache folder for `launch` in which this process and all agents share compiled programs."""
    shared = folder / "shared"
    shared.mkdir(parents=True, exist_ok=True)
    for index in range(devices):
        if not (folder / f"device-{index}").exists():
            (folder / f"device-{index}").symlink_to(shared)
    jax.config.update("jax_compilation_cache_dir", str(shared))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def stop_sharing() -> None:
    jax.config.update("jax_compilation_cache_dir", None)


# Running ----------------------------------------------------------------------------------------


class Gate:
    """Rows by step. From some steps on they are held back until something is so."""

    def __init__(self, source: cm.ArraySource, until: dict[int, Callable[[], bool]]) -> None:
        self._source, self._until = source, until
        self._lock = threading.Lock()

    def batch(self, step: int) -> Any:
        limit_s = time.monotonic() + ARM_S
        with self._lock:
            due = [until for at, until in self._until.items() if at <= step]
            while not all(until() for until in due) and time.monotonic() < limit_s:
                time.sleep(0.01)
        return self._source.batch(step)


@dataclass
class Story:
    """What happened in a trial."""

    trial: Trial
    result: Any = None
    shown: list[int] = field(default_factory=list)
    fired: dict[str, dict[str, Any]] = field(default_factory=dict)
    dead: list[str] = field(default_factory=list)
    """Devices, as they died."""
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """For a log."""
        rows = [str(self.trial)]
        for name, entry in self.fired.items():
            rows.append(f"  {name} " + json.dumps({k: v for k, v in entry.items() if k != "name"}))
        for event in self.result.recoveries if self.result is not None else ():
            rows.append(f"  {event.line()}")
        return rows


def journal(folder: Path) -> list[dict[str, Any]]:
    """Records of the run, so far."""
    path = folder / "events.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # the line that is being written
    return rows


def is_safe(records: list[dict[str, Any]], epochs: int) -> bool:
    """Whether a wave is complete in the epoch that is on, and so many were resumed."""
    resumed = [r["epoch"] for r in records if r["kind"] == "Resumed"]
    opened = [r["epoch"] for r in records if r["kind"] == "Epoch"]
    waves = [r["epoch"] for r in records if r["kind"] == "Wave"]
    return (
        len(resumed) >= epochs
        and resumed[-1] == opened[-1]
        and bool(waves)
        and waves[-1] == resumed[-1]
    )


class Stage:
    """Arms the blows of a trial, sees who dies, and starts again whom it may."""

    def __init__(self, trial: Trial, crew: cm.Crew, mortals: Mortals, folder: Path) -> None:
        self.story = Story(trial)
        self._crew, self._mortals, self._folder = crew, mortals, folder
        self._armed = 0
        self._outside: list[Order] = []

    def gates(self) -> dict[int, Callable[[], bool]]:
        blows = self.story.trial.blows
        return {blow.order.step: functools.partial(self._arm, i) for i, blow in enumerate(blows)}

    def _arm(self, index: int) -> bool:
        if self._armed > index:
            return True
        if self._armed < index or not self._is_whole(index):
            return False
        self._put(index)
        return True

    def _is_whole(self, index: int) -> bool:
        return is_safe(journal(self._folder), 1 + index) and not (
            self.story.trial.relaunches and self._crew.missing
        )

    def _put(self, index: int) -> None:
        self._armed = index + 1
        blow = self.story.trial.blows[index]
        if blow.then is not None and blow.then.kind.startswith(REPLAYING):
            # Between two waves, so that there is something to replay.
            wave = [r["version"] for r in journal(self._folder) if r["kind"] == "Wave"][-1]
            step = blow.order.step
            while (step - wave) % WAVE_EVERY not in (2, 3):
                step += 1
            blow = replace(blow, order=replace(blow.order, step=step))
        if blow.order.kind == "outside":
            self._outside.append(blow.order)
        else:
            self._mortals.order(blow.order)

    def see(self, event: Any) -> None:
        """An event of the run."""
        if isinstance(event, cm.StepEvent):
            self.story.shown.append(event.step)
            blows = self.story.trial.blows
            is_due = self._armed < len(blows) and event.step + 1 >= blows[self._armed].order.step
            if is_due and self.story.trial.ships:
                self._arm(self._armed)
            if self._outside and event.step + 1 >= self._outside[0].step:
                self._kill(self._outside.pop(0))

    def _kill(self, order: Order) -> None:
        decided = [r for r in journal(self._folder) if r["kind"] == "Decision"][-1]
        device = decided["plan"]["stages"][order.stage or 0]["device"]
        entry = {"name": order.name, "kind": "outside", "device": device, "stage": order.stage}
        (self._mortals.folder / "fired" / order.name).write_text(json.dumps(entry))
        os.kill(self._crew.pids[device], signal.SIGKILL)

    def watch(self, stop: threading.Event) -> None:
        """Follows first blows with second ones, and deaths with launches; a thread's."""
        fired: set[str] = set()
        seen: dict[str, int] = dict(self._crew.pids)
        while not stop.wait(0.01):
            now = set(self._mortals.fired())
            for blow in self.story.trial.blows:
                new = blow.order.name in now - fired
                if new and blow.then is not None:
                    self._mortals.order(blow.then)
            fired = now
            for device, pid in seen.items():
                if has_ended(pid):
                    self.story.dead.append(device)
                    if self.story.trial.relaunches:
                        self._crew.relaunch(device)
                        seen[device] = self._crew.pids[device]
                    else:
                        seen = {d: p for d, p in seen.items() if d != device}
                    break


def has_ended(pid: int) -> bool:
    """Whether a child has died, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def run_trial(trial: Trial, crew: cm.Crew, mortals: Mortals, runs_dir: Path) -> Story:
    """Runs it; the crew keeps who is left.

    Raises:
        CrowdMeshError: The run did not come to its end.
    """
    began_s = time.monotonic()
    mortals.clear()
    job, data = job_of(trial.family)
    name = f"seed-{trial.seed}"
    stage = Stage(trial, crew, mortals, runs_dir / name)
    source: Any = data if trial.ships else Gate(data, stage.gates())
    stop = threading.Event()
    watcher = threading.Thread(target=stage.watch, args=(stop,), daemon=True)
    watcher.start()
    try:
        stage.story.result = cm.train(
            job,
            crew,
            source,
            steps=trial.steps,
            plan=plan_of(trial.family, trial.stages),
            runs_dir=runs_dir,
            name=name,
            measure=False,
            recovery=cm.Recovery(
                copies=trial.copies,
                wave_every=WAVE_EVERY,
                log_steps=4 * WAVE_EVERY,
                replan=False,  # other cuts would round otherwise
                return_s=60.0,
            ),
            on_event=stage.see,
        )
    finally:
        stop.set()
        watcher.join()
        stage.story.fired = mortals.fired()
        stage.story.seconds = time.monotonic() - began_s
    return stage.story


def relaunch_dead(crew: cm.Crew) -> None:
    """Starts again whoever died, and waits until all are there."""
    for device, pid in crew.pids.items():
        if has_ended(pid):
            crew.relaunch(device)
    crew.await_hellos()


# Judging ----------------------------------------------------------------------------------------


def judge(story: Story) -> None:
    """Asserts what the promise says; AssertionError names what is broken."""
    trial, result = story.trial, story.result
    asked = {o.name for b in trial.blows for o in (b.order, b.then) if o is not None}
    assert set(story.fired) == asked, f"blows that did not fall: {asked - set(story.fired)}"
    assert len(story.dead) >= trial.kills, f"{story.dead} died, {trial.kills} were to"
    assert story.shown == list(range(trial.steps)), "each step is shown once, in order"
    ideal = undisturbed(trial.family, trial.stages, trial.steps)
    told = np.isfinite(result.losses)
    kept = [_cuts(event.plan) == _cuts(result.plan) for event in result.recoveries if event.plan]
    assert result.recoveries, "somebody died"
    assert all(kept), "with spares enough no cut changes"
    for event in result.recoveries:
        assert event.how in ("replay", "keep"), f"{event.line()}"
        for over in event.take_overs:
            assert over.source != "coordinator", f"{over} is from the coordinator's disk"
    assert (~told).sum() <= 2 * len(result.recoveries), "losses that died with their messenger"
    expected = np.asarray(ideal.losses, np.float32)
    told_all = replace(result, losses=np.where(told, result.losses, expected))
    assert_bit_equal(told_all, ideal)


def _cuts(plan: cm.PipelinePlan) -> list[tuple[int, int]]:
    return [(stage.first_layer, stage.last_layer) for stage in plan.stages]


def distance(ours: Any, theirs: Any) -> float:
    """Norm of the difference of two trees over the norm of the second."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    wide = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    apart = np.sqrt(sum(((a - b) ** 2).sum() for a, b in wide))
    return float(apart / np.sqrt(sum((b**2).sum() for _, b in wide)))
