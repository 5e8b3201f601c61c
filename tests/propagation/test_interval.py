"""Young's and Daly's rule against brute force, and its limits."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdmesh_jax.errors import InvalidValueError
from crowdmesh_jax.propagation import (
    exact_overhead,
    interval_s,
    interval_steps,
    loss_rate_per_s,
    overhead,
)


def test_a_worked_case():
    # sqrt(2 * 2 s / 0.01) = 20 s.
    assert interval_s(2.0, 0.01) == pytest.approx(20.0)
    found = interval_steps(2.0, 0.01, 0.5)
    assert (found.steps, found.seconds, found.bound_by) == (40, 20.0, "optimum")
    # 2/20 for the waves and 0.01 * 20/2 for the redone work.
    assert found.overhead == pytest.approx(0.2)


@settings(max_examples=50)
@given(
    st.floats(1e-3, 30), st.floats(1e-6, 0.05), st.floats(0.01, 5), st.sampled_from([0.2, 0.5, 1])
)
def test_no_whole_number_of_steps_is_cheaper(cost_s, loss, step_s, replay):
    found = interval_steps(cost_s, loss, step_s, replay_share=replay, most=800)

    def told(n):
        return overhead(n * step_s, cost_s, loss, replay_share=replay)

    best = min(range(1, 801), key=told)
    assert told(found.steps) == pytest.approx(told(best), rel=1e-12)


@given(st.floats(0.05, 5), st.floats(1e-6, 2e-3), st.floats(0, 20))
def test_it_is_near_the_minimum_of_the_exact_expectation(cost_s, loss, recovery_s):
    """Losses at any moment, segments begun again: where losses are rare beside the interval."""
    found = interval_steps(cost_s, loss, 0.5, most=100_000)
    grid = [found.seconds * f for f in (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.3, 2, 4)]
    best = min(exact_overhead(s, cost_s, loss, recovery_s=recovery_s) for s in grid)
    ours = exact_overhead(found.seconds, cost_s, loss, recovery_s=recovery_s)
    assert 1 + ours <= (1 + best) * 1.002


def test_the_exact_expectation_is_that_of_a_simulation():
    import random

    rng, cost_s, loss, segment_s, recovery_s = random.Random(1), 2.0, 0.02, 20.0, 3.0
    total = 0.0
    for _ in range(40_000):
        while (fails := rng.expovariate(loss)) < segment_s + cost_s:
            total += fails + recovery_s
        total += segment_s + cost_s
    told = exact_overhead(segment_s, cost_s, loss, recovery_s=recovery_s)
    # The closed form lets recoveries fail too, never sooner than work: first order in h R.
    assert total / 40_000 / segment_s - 1 == pytest.approx(told, rel=0.03)


def test_limits_and_what_binds():
    assert interval_steps(1.0, 0.0, 1.0, most=500).bound_by == "most"
    assert interval_steps(1.0, 0.0, 1.0, most=500).steps == 500
    assert interval_steps(1e-6, 0.5, 1.0, least=5).steps == 5
    assert interval_steps(1e-6, 0.5, 1.0, least=5).bound_by == "least"
    waves = interval_steps(2.0, 0.01, 0.5, wave_s=60.0, most=50)
    assert (waves.steps, waves.bound_by) == (120, "bytes")
    # Less than a step between waves: every step.
    assert interval_steps(1e-9, 0.1, 1.0).steps == 1
    assert math.isinf(interval_s(1.0, 0.0))


def test_only_missed_departures_count():
    assert loss_rate_per_s([0.001, 0.002], [0.01, 0.03], missed_share=0.25) == pytest.approx(0.013)
    handed = interval_steps(2.0, loss_rate_per_s([1e-4], [1e-2], missed_share=0.1), 1.0)
    all_lost = interval_steps(2.0, loss_rate_per_s([1e-4], [1e-2]), 1.0)
    assert handed.steps > 2 * all_lost.steps


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_bad_figures_are_told_by_name(bad):
    with pytest.raises(InvalidValueError, match="cost_s"):
        interval_steps(bad, 0.1, 1.0)
    with pytest.raises(InvalidValueError, match="loss_per_s"):
        interval_steps(1.0, bad, 1.0)
    with pytest.raises(InvalidValueError, match="step_s"):
        interval_steps(1.0, 0.1, bad)
    with pytest.raises(InvalidValueError, match="crash_per_s"):
        loss_rate_per_s([bad])


def test_limits_that_cross_are_refused():
    with pytest.raises(InvalidValueError, match="least and most"):
        interval_steps(1.0, 0.1, 1.0, least=5, most=4)
    with pytest.raises(InvalidValueError, match="missed_share"):
        loss_rate_per_s([], missed_share=1.5)
