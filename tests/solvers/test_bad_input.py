"""What cannot be solved is told by a typed error, whichever solver is asked; nothing hangs."""

from __future__ import annotations

import dataclasses

import pytest

from crowdmesh_jax.core import Crowd, LayerProfile, ModelProfile
from crowdmesh_jax.errors import InfeasibleError, InvalidValueError, SolverError
from crowdmesh_jax.solvers import PartitionProblem, plan_faults, solve, solvers

CROWD = Crowd.local((1.0, 0.5, 0.25))


def layers(count: int) -> ModelProfile:
    layer = LayerProfile(
        name="",
        forward_flops=1e9,
        backward_flops=2e9,
        parameter_bytes=10**6,
        output_bytes=10**5,
        gradient_bytes=10**5,
        residual_bytes=10**5,
    )
    return ModelProfile(
        layers=tuple(dataclasses.replace(layer, name=f"l{index}") for index in range(count)),
        microbatches=4,
        microbatch_size=4,
        input_bytes=100,
    )


def problem(solver: str, crowd: Crowd = CROWD, count: int = 6, **more) -> PartitionProblem:
    schedule = "eager" if solver == "eager" else "1f1b"
    return PartitionProblem(
        profile=layers(count), crowd=crowd, schedule=schedule, share=solver == "hybrid", **more
    )


@pytest.mark.parametrize("solver", solvers())
def test_devices_that_nothing_links_get_no_pipeline(solver):
    alone = Crowd(devices=CROWD.devices)
    with pytest.raises(InfeasibleError):
        solve(problem(solver, alone, min_stages=2), solver=solver)
    if solver != "even":  # which is over all devices or nothing
        found = solve(problem(solver, alone), solver=solver)
        assert found.plan.devices == ("device-0",)


@pytest.mark.parametrize("solver", solvers())
def test_a_device_without_room_gets_nothing(solver):
    first, *others = CROWD.devices
    tight = dataclasses.replace(
        CROWD, devices=(dataclasses.replace(first, memory_bytes=1), *others)
    )
    asked = problem(solver, tight)
    if solver == "even":
        with pytest.raises(InfeasibleError, match="device-0"):
            solve(asked, solver=solver)
        return
    found = solve(asked, solver=solver)
    assert "device-0" not in found.plan.all_devices
    assert plan_faults(asked, found.plan) == ()


@pytest.mark.parametrize("solver", solvers())
def test_a_pin_to_a_banned_device_is_infeasible(solver):
    with pytest.raises(InfeasibleError):
        solve(problem(solver, pins={0: "device-0"}, bans=["device-0"]), solver=solver)


@pytest.mark.parametrize("solver", ["dp", "exhaustive"])
def test_more_devices_than_a_solver_supports_are_refused_with_another_to_use(solver):
    with pytest.raises(InvalidValueError, match="use solver 'ilp'"):
        solve(problem(solver, Crowd.local((1.0,) * 40)), solver=solver)


class Crashing:
    """A PuLP solver object whose program falls over."""

    name = "crashing"

    def available(self):
        return True

    def actualSolve(self, *_, **__):
        raise RuntimeError("boom")

    solve = actualSolve  # what PuLP 4 calls


def test_a_backend_that_is_not_there_or_crashes_is_named():
    with pytest.raises(SolverError, match=r"unknown backend 'gurobi'; known: 'highs'"):
        solve(problem("ilp"), solver="ilp", backend="gurobi")
    with pytest.raises(SolverError, match=r"'crashing' failed .*boom"):
        solve(problem("ilp"), solver="ilp", backend=Crashing(), presolve=False)


def test_too_little_time_gives_a_plan_that_claims_nothing_or_says_so():
    crowd = Crowd.local((1.0, 0.9, 0.8, 0.7, 0.6))
    for solver in ("ilp", "dp"):
        asked = problem(solver, crowd, 40)
        found = solve(asked, solver=solver, time_limit_s=1e-6)
        assert plan_faults(asked, found.plan) == ()
        assert not found.optimal
    with pytest.raises(SolverError, match="found no plan within 1e-06 s"):
        solve(problem("ilp", crowd, 40), solver="ilp", time_limit_s=1e-6, presolve=False)
