"""A tiny job on real agents, for tests of what surrounds training."""

from __future__ import annotations

import functools
import time
from typing import Any

import optax

import crowdmesh_jax as cm

from .families import family

LAYERS = 4
"""Of the family "mlp"."""


@functools.cache
def small_job(
    optimizer: Any = None, *, name: str = "mlp", rows: int = 64, **fields: Any
) -> tuple[cm.TrainingJob, cm.ArraySource]:
    """A tiny net, and random rows that ship with the install; the same objects each time."""
    made = family(name)
    inputs, targets = made.batch(rows)
    job = made.job(optimizer or optax.adam(1e-2), batch_size=8, **fields)
    return job, cm.ArraySource(inputs, targets, 8)


class Slow:
    """Rows that take a moment, so that what happens beside a run has its time in few steps."""

    def __init__(self, source: cm.ArraySource, pause_s: float = 0.05) -> None:
        self._source, self._pause_s = source, pause_s

    def batch(self, step: int) -> Any:
        time.sleep(self._pause_s)
        return self._source.batch(step)


def even_plan(job: cm.TrainingJob, stages: int = 2) -> cm.PipelinePlan:
    """The job's layers over device-0, device-1, ..."""
    devices = [f"device-{index}" for index in range(stages)]
    return cm.PipelinePlan.even(len(job.model.layers), devices, microbatches=job.microbatches)


def identical(ours: Any, theirs: Any) -> bool:
    """Whether two trees have the same leaves, bit for bit."""
    import jax
    import numpy as np

    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
