"""Training over a pipeline is training in one process: bit for bit by the plan's own programs, to
float32 rounding by one program. Real agents, both transports; the matrix is in `cases`."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from support.equality import assert_bit_equal
from support.families import family

import crowdmesh_jax as cm

from .cases import full_matrix, pairs_of, pairwise

pytestmark = pytest.mark.system
STEPS = 3


@functools.cache
def job_of(name: str) -> tuple[cm.TrainingJob, object]:
    """Clipping mixes all layers; eps keeps Adam from turning rounding noise into steps."""
    made = family(name)
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2, eps=1e-4))
    if name in ("lenet", "unet_skip"):
        optimizer = optax.sgd(0.05, momentum=0.9)
    return made.job(optimizer, seed=7), made.source(seed=3)


def plan_of(case) -> cm.PipelinePlan:
    job, _ = job_of(case.family)
    return cm.PipelinePlan.even(
        len(job.model.layers),
        [f"device-{index}" for index in range(case.stages)],
        microbatches=job.microbatches,
        schedule=case.schedule,
        recompute=case.recompute,
    )


@functools.lru_cache(maxsize=4)
def by_programs(name: str, stages: int, recompute: bool):
    """The plan's programs in one process; the schedule does not enter."""
    job, data = job_of(name)
    plan = cm.PipelinePlan.even(
        len(job.model.layers),
        [f"device-{index}" for index in range(stages)],
        microbatches=job.microbatches,
        recompute=recompute,
    )
    return cm.reference(job, data, STEPS, plan=plan)


@functools.cache
def by_one_program(name: str):
    job, data = job_of(name)
    return cm.reference(job, data, STEPS)


def test_a_pipeline_trains_bit_for_bit_like_its_programs_in_one_process(case, crews, tmp_path):
    job, data = job_of(case.family)
    oracle = by_programs(case.family, case.stages, case.recompute)  # first: it fills the cache
    result = cm.train(
        job, crews[case.transport], data, steps=STEPS, plan=plan_of(case), measure=False,
        runs_dir=tmp_path,
    )  # fmt: skip
    assert_bit_equal(result, oracle)

    whole = by_one_program(case.family)
    np.testing.assert_allclose(result.losses, whole.losses, rtol=1e-5)
    assert distance(result.params, whole.params) <= 1e-5


def distance(ours, theirs) -> float:
    """Norm of the difference of two trees over the norm of the second."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    wide = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    apart = np.sqrt(sum(((a - b) ** 2).sum() for a, b in wide))
    return float(apart / np.sqrt(sum((b**2).sum() for _, b in wide)))


def test_the_pairwise_subset_covers_every_pair_of_values():
    everything = set().union(*map(pairs_of, full_matrix()))
    assert set().union(*map(pairs_of, pairwise())) == everything


def test_another_seed_would_be_noticed():
    """The comparison can fail: one bit of the seed changes parameters."""
    job, data = job_of("mlp")
    other = cm.reference(dataclasses.replace(job, seed=8), data, 1)
    assert distance(other.params, by_one_program("mlp").params) > 1e-3
