"""`crowdmesh demo`: real digits over four unequal processes, one of which is killed on the way."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import Crowd
from ..data import ArraySource, digits
from ..errors import JobError
from .console import format_seconds, print_json
from .inputs import example_batch, find_model, make_job
from .train import (
    add_recovery_arguments,
    add_run_arguments,
    make_view,
    plan_for,
    read_recovery,
    result_summary,
    tell_result,
)

if TYPE_CHECKING:
    from ..core import PipelinePlan
    from ..model import TrainingJob
    from ..runtime import Crew, TrainResult

HELP = "train a small CNN on real digits over four unequal processes, kill one, and go on"
EXAMPLES = """\
examples:
  crowdmesh demo                    a process is killed on the way; the end is the same, bit by bit
  crowdmesh demo --seed 3           another device at another moment
  crowdmesh demo --no-kill          nobody is killed, nothing is compared
  crowdmesh demo --transport memory all devices in this process, where none can be killed
"""
SPEEDS = (1.0, 0.5, 0.5, 0.25)
SPARES = (0.5,)
"""Speeds of devices that get no stage and wait for one."""
WIDTH = 32
"""Channels, twice the zoo's: a microbatch is worth milliseconds, far more than sending it."""
LEAST_STEPS = 10
"""For a run in which somebody dies: before and after it something should be seen."""
EXIT_UNEQUAL = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Few: it is to run as it is."""
    parser.add_argument("--steps", type=int, default=120, metavar="N", help="default 120")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N",
        help="of the training, and of who is killed when; default 0",
    )  # fmt: skip
    parser.add_argument("--no-kill", dest="kill", action="store_false", help="let all live")
    add_run_arguments(parser)
    add_recovery_arguments(parser)
    parser.set_defaults(
        batch_size=128,
        microbatches=4,
        learning_rate=2e-3,
        solver="ilp",
        schedule="1f1b",
        crowd=None,
        use_all=True,
        measure=True,
        wave_every=8,
        replan=False,  # other cuts would round differently, and the end is compared bit by bit
    )


@dataclass
class Killer:
    """A callback of `train` that ends a process from outside, as a crash would."""

    crew: Crew
    device: str
    step: int
    """It happens once this step is committed."""
    tell: Callable[[Any], None]
    is_done: bool = field(default=False, init=False)

    def __call__(self, event: Any, control: Any) -> None:
        from ..runtime import StepEvent
        from .live import KillEvent

        if self.is_done or not isinstance(event, StepEvent) or event.step < self.step:
            return
        self.is_done = True
        pid = self.crew.pids[self.device]
        os.kill(pid, signal.SIGKILL)
        self.tell(KillEvent(device=self.device, pid=pid, step=event.step + 1))


def victim(seed: int, steps: int, plan: PipelinePlan) -> tuple[str, int]:
    """Who dies and after which step: in the middle third, any stage, by the seed alone."""
    draw = random.Random(f"kill {seed}")
    return plan.devices[draw.randrange(len(plan.devices))], draw.randrange(
        steps // 3, 2 * steps // 3
    )


def run(arguments: argparse.Namespace) -> None:
    """Plans, trains, kills, compares, tests; the last line is the accuracy on unseen images.

    Raises:
        SystemExit: With status 1 if the run that lost a device ended elsewhere than one that lost
            none.
    """
    from ..runtime import launch, train

    begin_s = time.monotonic()
    kills = arguments.kill and arguments.transport != "memory"
    if kills and arguments.steps < LEAST_STEPS:
        raise JobError(
            f"--steps must be >= {LEAST_STEPS} where a device is killed on the way, got"
            f" {arguments.steps}; or give --no-kill"
        )
    entry = find_model("lenet")
    job = make_job(entry, arguments, width=WIDTH)
    images, labels = digits("train")
    data = ArraySource(images, labels, arguments.batch_size, arguments.seed)
    if not arguments.json:
        print(
            f"lenet ({len(job.model.layers)} layers) on {len(labels)} images of handwritten digits,"
            f" {arguments.steps} steps of {job.batch_size},\nover {len(SPEEDS)} devices at speeds"
            f" {', '.join(f'{speed:g}' for speed in SPEEDS)} and a spare one: separate processes on"
            " this machine",
            flush=True,
        )
    crowd = Crowd.local((*SPEEDS, *SPARES))
    with contextlib.closing(launch(crowd, transport=arguments.transport)) as crew:
        workers = crew.crowd.only([device.id for device in crew.crowd.devices[: len(SPEEDS)]])
        solved = plan_for(arguments, job, workers, example_batch(entry, job.batch_size))
        recovery = read_recovery(arguments, solved.plan, crew.crowd)
        with make_view(arguments, solved.plan, crew.crowd, recovery) as view:
            device, step = victim(arguments.seed, arguments.steps, solved.plan)
            killer = Killer(crew=crew, device=device, step=step, tell=view)
            result = train(
                job,
                crew,  # not started yet: `train` starts its processes while it exports
                data,
                plan=solved,
                steps=arguments.steps,
                runs_dir=arguments.runs_dir,
                name=arguments.name,
                checkpoint_every=arguments.checkpoint_every,
                recovery=recovery or False,
                on_event=view,
                callbacks=[killer] if kills else [],
            )
    tell_result(arguments, result)
    compared = compare(job, data, result) if kills else None
    accuracy = test_accuracy(job, result)
    took_s = time.monotonic() - begin_s
    if arguments.json:
        told = {**result_summary(result), "test_accuracy": accuracy, "took_s": took_s}
        print_json({**told, "compared": compared})
    else:
        if compared is not None:
            print(compared.text())
        print(f"took {took_s:.0f} s in all")
        print(f"test accuracy {100 * accuracy:.1f} %", flush=True)
    if compared is not None:
        compared.conclude()


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A run that lost a device beside one that lost none."""

    loss: float
    """The last one, of the run that lost a device."""
    undisturbed_loss: float
    losses: int
    """How many were compared; as the arrays below, bit by bit."""
    arrays: int
    """Of parameters, layer statistics and optimizer state."""
    numbers: int
    """In those arrays."""
    unequal: tuple[str, ...]
    """What differs; empty: nothing."""
    took_s: float
    """To train undisturbed."""

    def conclude(self) -> None:
        """Ends the command with status 1 where something differs."""
        if self.unequal:
            raise SystemExit(EXIT_UNEQUAL)

    def text(self) -> str:
        """For people."""
        what = (
            f"{self.losses} losses and {self.numbers:,} numbers of parameters and optimizer state"
        )
        head = (
            "undisturbed  the same programs again, in one process, with nobody killed:"
            f" {format_seconds(self.took_s)}\n"
        )
        last = f"\nlast loss    {self.loss:.8g} here, {self.undisturbed_loss:.8g} undisturbed"
        if not self.unequal:
            return f"{head}bit-equal    {what}{last}"
        return f"{head}NOT EQUAL    of {what} these differ: {', '.join(self.unequal)}{last}"


def compare(job: TrainingJob, data: ArraySource, result: TrainResult) -> Compared:
    """Trains again undisturbed, and looks for a bit that differs."""
    import jax

    from ..reference import reference

    begin_s = time.monotonic()
    undisturbed = reference(job, data, len(result.losses), plan=result.plan)
    took_s = time.monotonic() - begin_s
    theirs_losses = np.asarray(undisturbed.losses, np.float32)
    unequal = [] if theirs_losses.tobytes() == result.losses.tobytes() else ["losses"]
    arrays = numbers = 0
    for part in ("params", "state", "opt_state"):
        ours = jax.tree_util.tree_leaves_with_path(getattr(result, part))
        theirs = jax.tree.leaves(getattr(undisturbed, part))
        for (path, mine), other in zip(ours, theirs, strict=True):
            mine, other = np.asarray(mine), np.asarray(other)
            arrays, numbers = arrays + 1, numbers + mine.size
            if mine.dtype != other.dtype or mine.tobytes() != other.tobytes():
                unequal.append(part + jax.tree_util.keystr(path))
    return Compared(
        loss=float(result.losses[-1]),
        undisturbed_loss=float(theirs_losses[-1]),
        losses=len(result.losses),
        arrays=arrays,
        numbers=numbers,
        unequal=tuple(unequal),
        took_s=took_s,
    )


def test_accuracy(job: TrainingJob, result: TrainResult) -> float:
    """Share of the 360 test images that the trained model gets right."""
    import jax

    images, labels = digits("test")

    outputs = jax.jit(job.model.predict)(result.params, result.state, images)
    return float(np.mean(np.asarray(outputs).argmax(-1) == labels))
