"""The tables that solvers search in against `core` and against the checker."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from partition_problems import problems

from crowdmesh_jax.core import PipelinePlan, Stage, predict
from crowdmesh_jax.solvers import plan_faults
from crowdmesh_jax.solvers.partition.simple import all_chains
from crowdmesh_jax.solvers.partition.tables import Tables


def all_plans(problem):
    """Every plan over any of the crowd's devices, with or without recomputation everywhere."""
    devices = [device.id for device in problem.crowd.devices]
    layers = problem.num_layers
    for count in range(1, min(len(devices), layers) + 1):
        for cuts in combinations(range(1, layers), count - 1):
            edges = [0, *cuts, layers]
            for order in permutations(devices, count):
                yield PipelinePlan(
                    stages=tuple(
                        Stage(
                            device=device,
                            first_layer=edges[index],
                            last_layer=edges[index + 1] - 1,
                            recompute=problem.recompute == "always",
                        )
                        for index, device in enumerate(order)
                    ),
                    num_layers=layers,
                    microbatches=problem.microbatches,
                    schedule=problem.schedule,
                )


@given(problems(max_layers=5, updates=True, rules=False))
@settings(max_examples=60)
def test_costs_are_those_of_core(problem):
    tables = Tables(problem)
    for chain in all_chains(tables):
        predicted = predict(problem.profile, problem.crowd, tables.plan(chain))
        assert tables.evaluate_s(chain) == pytest.approx(predicted.step_s, rel=1e-12)
        assert tables.first_microbatch_s(chain) == pytest.approx(
            predicted.first_microbatch_s, rel=1e-12
        )
        assert tables.period_s(chain) == pytest.approx(predicted.period_s, rel=1e-12)
        steady_s = (problem.microbatches - 1) * predicted.period_s
        assert tables.cost_s(chain) == pytest.approx(
            predicted.first_microbatch_s + steady_s, rel=1e-12
        )


@given(problems(max_layers=5))
@settings(max_examples=100)
def test_chains_are_exactly_the_plans_that_the_checker_passes(problem):
    assume(problem.recompute != "auto")
    passed = {plan.digest() for plan in all_plans(problem) if not plan_faults(problem, plan)}
    made = {Tables(problem).plan(chain).digest() for chain in all_chains(Tables(problem))}
    assert made == passed


@given(problems(max_layers=5))
@settings(max_examples=60)
def test_recompute_auto_fits_wherever_either_fits(problem):
    from dataclasses import replace

    def cuts(mode):
        tables = Tables(replace(problem, recompute=mode))
        return {tables.rank(chain) for chain in all_chains(tables)}

    auto = cuts("auto")
    assert cuts("never") <= auto
    assert cuts("always") <= auto


@given(problems(max_layers=5), st.sampled_from(["ignore_memory", "ignore_links", "ignore_rules"]))
@settings(max_examples=60)
def test_a_relaxation_never_loses_a_chain(problem, relaxed):
    def ranks(tables):
        return {tables.rank(chain) for chain in all_chains(tables)}

    assert ranks(Tables(problem)) <= ranks(Tables(problem, **{relaxed: True}))
