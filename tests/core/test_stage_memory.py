"""The memory of a stage, term by term, against the protocol's formula written out."""

from __future__ import annotations

import dataclasses

import pytest
from core_strategies import profiles
from hypothesis import given
from hypothesis import strategies as st

from crowdmesh_jax.core import (
    COMPILE_PEAK_BYTES,
    DeviceId,
    LayerProfile,
    MemoryBreakdown,
    ModelProfile,
    Stage,
    stage_memory,
)
from crowdmesh_jax.errors import InvalidValueError


def three_layers() -> ModelProfile:
    """Each kind of byte has its own decimal place per layer, so that sums can be read."""
    layers = tuple(
        LayerProfile(
            name=f"l{i}",
            forward_flops=1.0,
            backward_flops=2.0,
            parameter_bytes=10**i,
            optimizer_bytes=2 * 10**i,
            state_bytes=3 * 10**i,
            output_bytes=1000 * 10**i,
            gradient_bytes=500 * 10**i,
            residual_bytes=7 * 10**i,
        )
        for i in range(3)
    )
    return ModelProfile(
        layers=layers,
        microbatches=4,
        microbatch_size=2,
        input_bytes=8,
        target_bytes=2,
        globals_bytes=5,
    )


def memory(first: int, last: int, *, recompute: bool = False, **options) -> MemoryBreakdown:
    stage = Stage(device=DeviceId("d"), first_layer=first, last_layer=last, recompute=recompute)
    return stage_memory(three_layers(), stage, **options)


def test_a_middle_stage_pays_every_term_of_the_formula():
    found = memory(
        1,
        1,
        stage_index=1,
        num_stages=3,
        in_flight=2,
        credits=3,
        snapshots=2,
        log_steps=6,
        hosted_bytes=9,
    )
    assert found == MemoryBreakdown(
        parameter_bytes=10,
        gradient_bytes=10,
        optimizer_bytes=20 + 5,
        state_bytes=2 * 30,
        stash_bytes=2 * (1000 + 70),
        credit_bytes=3 * (1000 + 500 + 10_000 + 5_000),
        snapshot_bytes=2 * (10 + 25 + 30),
        log_bytes=6 * 4 * (500 + 10_000),  # what it sends: the gradient back, the output down
        hosted_bytes=9,
        compile_peak_bytes=COMPILE_PEAK_BYTES,
    )


def test_the_first_stage_stashes_the_inputs_and_the_last_the_targets():
    first = memory(0, 1, stage_index=0, num_stages=2, in_flight=2, credits=1)
    assert first.stash_bytes == 2 * (8 + 77)
    assert first.credit_bytes == 10_000 + 5_000
    last = memory(2, 2, stage_index=1, num_stages=2, in_flight=3, credits=1)
    assert last.stash_bytes == 3 * (10_000 + 2) + 700  # one program: residuals of one microbatch
    assert last.credit_bytes == 10_000 + 5_000
    alone = memory(0, 2, stage_index=0, num_stages=1, in_flight=1)
    assert alone.stash_bytes == 8 + 2 + 777
    assert alone.credit_bytes == 0


def test_recomputation_keeps_inputs_and_the_residuals_of_one_microbatch():
    kept = memory(1, 1, stage_index=1, num_stages=3, in_flight=5)
    again = memory(1, 1, stage_index=1, num_stages=3, in_flight=5, recompute=True)
    assert kept.stash_bytes - again.stash_bytes == 4 * 70
    assert again.stash_bytes == 5 * 1000 + 70


def test_compiling_and_training_do_not_add_up():
    small = memory(1, 1, stage_index=1, num_stages=3, in_flight=1)
    assert small.total_bytes == COMPILE_PEAK_BYTES > small.training_bytes
    none = memory(1, 1, stage_index=1, num_stages=3, in_flight=1, compile_peak_bytes=0)
    assert none.total_bytes == none.training_bytes == small.training_bytes


@given(profiles(), st.data())
def test_the_total_is_the_sum_of_all_terms_or_the_compile_peak_and_grows_with_each(profile, data):
    count = len(profile.layers)
    first = data.draw(st.integers(0, count - 1))
    last = data.draw(st.integers(first, count - 1))
    index = data.draw(st.integers(1 if first else 0, 3 if first else 0))
    num_stages = index + 1 + (last < count - 1)
    stage = Stage(device=DeviceId("d"), first_layer=first, last_layer=last)
    options = {
        name: data.draw(st.integers(0, 4))
        for name in ("in_flight", "credits", "snapshots", "log_steps", "hosted_bytes")
    }
    found = stage_memory(profile, stage, stage_index=index, num_stages=num_stages, **options)
    terms = dataclasses.asdict(found)
    peak = terms.pop("compile_peak_bytes")
    assert found.training_bytes == sum(terms.values())
    assert found.total_bytes == max(found.training_bytes, peak)
    more = data.draw(st.sampled_from(sorted(options)))
    options[more] += 1
    larger = stage_memory(profile, stage, stage_index=index, num_stages=num_stages, **options)
    assert larger.training_bytes >= found.training_bytes


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"in_flight": -1}, "in_flight must be >= 0, got -1"),
        ({"credits": -2}, "credits must be >= 0, got -2"),
        ({"hosted_bytes": -3}, "hosted_bytes must be >= 0, got -3"),
        ({"log_steps": -1}, "log_steps must be >= 0, got -1"),
        ({"stage_index": 3}, r"stage_index must lie in 0..2, got 3"),
    ],
)
def test_counts_out_of_range_are_named(options, complaint):
    with pytest.raises(InvalidValueError, match=complaint):
        memory(1, 1, **{"stage_index": 1, "num_stages": 3, "in_flight": 1, **options})


def test_layers_outside_the_profile_are_named():
    with pytest.raises(InvalidValueError, match=r"layers 2-3 are not in a profile of 3 layers"):
        memory(2, 3, stage_index=1, num_stages=2, in_flight=1)
