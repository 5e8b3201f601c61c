"""`crowdmesh demo`: real digits over four separate, unequal processes on this machine."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

import numpy as np

from ..core import Crowd
from ..data import ArraySource, digits
from .console import print_json
from .inputs import example_batch, find_model, make_job
from .train import add_run_arguments, result_summary, run_training

if TYPE_CHECKING:
    from ..model import TrainingJob
    from ..runtime import TrainResult

HELP = "train a small CNN on real digits over four unequal processes, and test it"
EXAMPLES = """\
examples:
  crowdmesh demo                    four processes, one of them four times slower than the first
  crowdmesh demo --steps 300        longer
  crowdmesh demo --transport memory all devices in this process
"""
SPEEDS = (1.0, 0.5, 0.5, 0.25)
WIDTH = 32
"""Channels, twice the zoo's: a microbatch is worth milliseconds, far more than sending it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Few: it is to run as it is."""
    parser.add_argument("--steps", type=int, default=120, metavar="N", help="default 120")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    add_run_arguments(parser)
    parser.set_defaults(
        batch_size=128,
        microbatches=4,
        learning_rate=2e-3,
        solver="ilp",
        schedule="1f1b",
        crowd=None,
        use_all=True,
        measure=True,
    )


def run(arguments: argparse.Namespace) -> None:
    """Plans, trains, tests; the last line is the accuracy on images not trained on."""
    begin_s = time.monotonic()
    entry = find_model("lenet")
    job = make_job(entry, arguments, width=WIDTH)
    images, labels = digits("train")
    data = ArraySource(images, labels, arguments.batch_size, arguments.seed)
    if not arguments.json:
        print(
            f"lenet ({len(job.model.layers)} layers) on {len(labels)} images of handwritten digits,"
            f" {arguments.steps} steps of {job.batch_size},\nover {len(SPEEDS)} devices at speeds"
            f" {', '.join(f'{speed:g}' for speed in SPEEDS)}: separate processes on this machine\n",
            flush=True,
        )
    example = example_batch(entry, job.batch_size)
    result = run_training(arguments, job, Crowd.local(SPEEDS), data, None, example)
    accuracy = test_accuracy(job, result)
    took_s = time.monotonic() - begin_s
    if arguments.json:
        print_json({**result_summary(result), "test_accuracy": accuracy, "took_s": took_s})
        return
    print(f"took {took_s:.0f} s in all")
    print(f"test accuracy {100 * accuracy:.1f} %")


def test_accuracy(job: TrainingJob, result: TrainResult) -> float:
    """Share of the 360 test images that the trained model gets right."""
    import jax

    images, labels = digits("test")

    outputs = jax.jit(job.model.predict)(result.params, result.state, images)
    return float(np.mean(np.asarray(outputs).argmax(-1) == labels))
