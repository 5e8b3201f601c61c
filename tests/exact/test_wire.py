"""Casts on the wire: bit-equal to the same plan in one process, near to the plan without."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from support.training import even_plan, identical, small_job

import crowdmesh_jax as cm
from crowdmesh_jax.export import build_bundles


def cast(plan: cm.PipelinePlan, *cuts: int, recompute: bool = False) -> cm.PipelinePlan:
    stages = tuple(
        dataclasses.replace(
            stage, recompute=recompute, wire_dtype="bfloat16" if index in cuts else None
        )
        for index, stage in enumerate(plan.stages)
    )
    return dataclasses.replace(plan, stages=stages)


@pytest.mark.parametrize("recompute", [False, True])
def test_boundaries_are_halved_and_nothing_else_changes_its_type(recompute):
    job, data = small_job(microbatches=4)
    specs = job.microbatch_specs(data.batch(0))
    plan = even_plan(job, 3)
    plain = build_bundles(job, plan, *specs)
    lossy = build_bundles(job, cast(plan, 0, recompute=recompute), *specs)
    for before, after in zip(plain, lossy, strict=True):
        assert before.manifest.resident == after.manifest.resident
        assert before.manifest.accumulators == after.manifest.accumulators
    first, second, third = (bundle.manifest for bundle in lossy)
    assert {leaf.dtype for leaf in first.boundary_out} == {"bfloat16"}
    assert {leaf.dtype for leaf in (*first.gradient_in, *second.gradient_out)} == {"bfloat16"}
    assert [leaf.shape for leaf in first.boundary_out] == [
        leaf.shape for leaf in plain[0].manifest.boundary_out
    ]
    assert second.boundary_in[0].dtype == "bfloat16"
    assert second.boundary_out == plain[1].manifest.boundary_out  # the cut after it is as it was
    assert third.boundary_in == plain[2].manifest.boundary_in
    if not recompute:
        # What came is kept as it came, and cast again in backward: no float32 copy beside it.
        for before, after in zip(plain, lossy, strict=True):
            assert residual_bytes(after) == residual_bytes(before)


def residual_bytes(bundle) -> int:
    forward = bundle.manifest.program("forward")
    kept = forward.outputs if forward is not None else ()
    return sum(leaf.size_bytes for leaf in kept if leaf.role == "residual")


@pytest.mark.parametrize(
    "name",
    ["moe", "unet_skip", *(pytest.param(n, marks=pytest.mark.exact) for n in ("gpt2", "bf16"))],
)
def test_carries_with_auxiliary_losses_tokens_and_skips_lose_bits_and_nothing_else(name):
    """What is no float32 travels as it is, and the loss that rides along is not cast."""
    job, data = small_job(name=name, microbatches=2)
    specs = job.microbatch_specs(data.batch(0))
    plan = cast(even_plan(job, 3), 0, 1)
    for plain, lossy in zip(
        build_bundles(job, even_plan(job, 3), *specs), build_bundles(job, plan, *specs), strict=True
    ):
        pairs = zip(plain.manifest.boundary_out, lossy.manifest.boundary_out, strict=True)
        for before, after in pairs:
            is_cast = before.dtype == "float32" and before.path != "aux"
            assert after.dtype == ("bfloat16" if is_cast else before.dtype)
    lossy, plain = (cm.reference(job, data, 2, plan=p) for p in (plan, even_plan(job, 3)))
    for ours, theirs in zip(lossy.losses, plain.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_run_is_bit_equal_to_the_reference_of_its_plan(recompute, tmp_path):
    job, data = small_job(microbatches=4)
    plan = cast(even_plan(job, 3), 0, 1, recompute=recompute)
    with cm.launch(cm.Crowd.local((1.0, 1.0, 1.0)), transport="memory") as crew:
        run = cm.train(job, crew, data, steps=3, plan=plan, runs_dir=tmp_path, measure=False)
    expected = cm.reference(job, data, 3, plan=plan)
    assert identical(run.params, expected.params)
    assert identical(run.opt_state, expected.opt_state)
    assert run.losses.tolist() == list(expected.losses)
    whole = cm.reference(job, data, 3)
    assert not identical(run.params, whole.params)  # bits were lost
    for ours, theirs in zip(
        jax.tree.leaves(run.params), jax.tree.leaves(whole.params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=0.05)


def test_the_profile_knows_what_a_cast_makes_of_a_cut():
    job, data = small_job(microbatches=4)
    crowd = cm.Crowd.local((1.0, 1.0, 1.0))
    profile = cm.profile(job, crowd, data.batch(0), memory=False)
    specs = job.microbatch_specs(data.batch(0))
    plan = cast(even_plan(job, 3), 0, 1)
    for stage, bundle in zip(plan.stages[:-1], build_bundles(job, plan, *specs), strict=False):
        down, back = profile.cut_bytes(stage.last_layer + 1, stage.wire_dtype)
        manifest = bundle.manifest
        assert down == sum(leaf.size_bytes for leaf in manifest.boundary_out)
        assert back == sum(leaf.size_bytes for leaf in manifest.gradient_in)
