"""Solvers without a backend, the checker, and why nothing fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from partition_problems import chain_profile, problems

from crowdmesh_jax.core import Crowd, Device, DeviceId, Link, PipelinePlan
from crowdmesh_jax.errors import InfeasibleError, InvalidPlanError, InvalidValueError
from crowdmesh_jax.solvers import (
    EvenSolver,
    ExhaustiveSolver,
    PartitionProblem,
    SingleBestSolver,
    check_plan,
    plan_faults,
    solve,
    solve_exhaustive,
)

MB = 1_000_000


def crowd_of(*memory_mb: int, links: bool = True) -> Crowd:
    crowd = Crowd.local([1.0] * len(memory_mb))
    devices = tuple(
        replace(device, memory_bytes=size * MB)
        for device, size in zip(crowd.devices, memory_mb, strict=True)
    )
    return Crowd(devices=devices, default_link=crowd.default_link if links else None)


def problem_of(crowd: Crowd, num_layers: int = 6, **options) -> PartitionProblem:
    """Layers of 10 MB of parameters: 40 MB each while training with adam, and little else."""
    profile = chain_profile(num_layers, parameter_bytes=10 * MB)
    return PartitionProblem(profile=profile, crowd=crowd, compile_peak_bytes=0, **options)


def test_even_gives_each_device_its_share_in_the_order_given():
    result = EvenSolver().solve(
        problem_of(crowd_of(900, 900, 900), devices=["device-2", "device-0"])
    )
    assert result.plan.devices == ("device-2", "device-0")
    assert [len(stage.layers) for stage in result.plan.stages] == [3, 3]
    assert result.gap is None
    assert not result.optimal


def test_even_uses_no_more_devices_than_layers_or_than_asked():
    crowd = crowd_of(900, 900, 900)
    assert len(EvenSolver().solve(problem_of(crowd, 2)).plan.stages) == 2
    assert len(EvenSolver().solve(problem_of(crowd, max_stages=2)).plan.stages) == 2


def test_even_says_which_stage_does_not_fit():
    with pytest.raises(InfeasibleError, match=r"CM-203.*even split(.|\n)*stage 1.*device-1.*needs"):
        EvenSolver().solve(problem_of(crowd_of(900, 50)))


def test_single_best_takes_the_fastest_that_can_hold_the_model():
    crowd = Crowd.local((1.0, 0.5, 0.25))
    small = replace(crowd.devices[0], memory_bytes=100 * MB)
    crowd = replace(crowd, devices=(small, *crowd.devices[1:]))
    result = SingleBestSolver().solve(problem_of(crowd))
    assert result.plan.devices == ("device-1",)


def test_single_best_says_so_when_no_device_can_hold_the_model():
    with pytest.raises(InfeasibleError, match=r"CM-203.*memory"):
        SingleBestSolver().solve(problem_of(crowd_of(100, 200)))


def test_exhaustive_refuses_what_it_could_not_finish():
    with pytest.raises(InvalidValueError, match=r"CM-101.*chains.*'ilp'"):
        ExhaustiveSolver(max_chains=10).solve(problem_of(crowd_of(900, 900, 900)))


@given(problems(max_layers=5))
@settings(max_examples=60)
def test_no_simple_solver_beats_the_exhaustive_one(problem):
    problem = replace(problem, objective="evaluate")
    for solver in (EvenSolver(), SingleBestSolver()):
        try:
            found = solver.solve(problem)
        except InfeasibleError:
            continue
        best = solve_exhaustive(problem)
        assert best.predicted.step_s <= found.predicted.step_s * (1 + 1e-9)


def test_the_checker_tells_all_that_is_wrong():
    crowd = Crowd(
        devices=crowd_of(900, 50).devices,
        links=(
            Link(
                source=DeviceId("device-0"),
                target=DeviceId("device-1"),
                bandwidth_bytes_per_s=1e6,
            ),
        ),
    )
    problem = problem_of(crowd, pins={5: "device-0"}, max_stages=1, requires=["device-0"])
    plan = PipelinePlan.even(6, ["device-0", "device-1"], microbatches=8, recompute=True)
    faults = "\n".join(plan_faults(problem, plan))
    for words in ("at most 1", "layer 5", "needs", "no link 'device-1'", "recomputes"):
        assert words in faults
    with pytest.raises(InvalidPlanError, match="CM-201"):
        check_plan(problem, plan)
    foreign = PipelinePlan.even(6, ["elsewhere"], microbatches=4, schedule="gpipe")
    faults = "\n".join(plan_faults(problem, foreign))
    for words in ("4 microbatches", "'gpipe'", "not in the crowd"):
        assert words in faults
    assert "7 layers" in plan_faults(problem, PipelinePlan.even(7, ["device-0"], microbatches=8))[0]


INFEASIBLE = [
    (
        "a layer",
        lambda: problem_of(crowd_of(30, 35)),
        (
            "no device can hold layer 0 'block0' while training",
            "params 10.0 MB + grads 10.0 MB + optimizer 20.0 MB",
            "device 'device-1'",
            "optax.sgd",
            "memory_bytes",
        ),
    ),
    (
        "a compile peak",
        lambda: replace(problem_of(crowd_of(300, 350)), compile_peak_bytes=400 * MB),
        ("to compile a stage's programs", "400 MB", "device 'device-1'"),
    ),
    (
        "all layers together",
        lambda: problem_of(crowd_of(90, 90)),
        ("6 layers to 2 devices", "in all", "try"),
    ),
    (
        "layers that only fit apart",
        lambda: problem_of(crowd_of(70, 70, 70, 70)),
        ("6 layers to 4 devices", "largest layer", "recompute"),
    ),
    (
        "more stages than layers",
        lambda: problem_of(crowd_of(900, 900, 900), 2, min_stages=3),
        ("3 stages for 2 layers", "finer layers"),
    ),
    (
        "more stages than devices",
        lambda: problem_of(crowd_of(900, 900), min_stages=3),
        ("3 stages on 2 devices",),
    ),
    (
        "no links",
        lambda: problem_of(crowd_of(150, 150, links=False)),
        ("no chain of linked devices", "device-0 | device-1"),
    ),
    (
        "pins that cross",
        lambda: problem_of(crowd_of(900, 900), pins={0: "device-0", 2: "device-1", 4: "device-0"}),
        ("pinned to 'device-0'", "between them"),
    ),
    (
        "a pin to a banned device",
        lambda: problem_of(crowd_of(900, 900), pins={0: "device-0"}, bans=["device-0"]),
        ("layer 0 'block0' is pinned to 'device-0'",),
    ),
    (
        "nobody left",
        lambda: problem_of(crowd_of(900), bans=["device-0"]),
        ("no device may be used",),
    ),
    (
        "a layer that all are banned from",
        lambda: problem_of(crowd_of(900), bans=[(3, "device-0")]),
        ("no device may run layer 3",),
    ),
    (
        "bans and memory together",
        lambda: problem_of(
            crowd_of(900, 100),
            bans=[(5, "device-0"), (0, "device-1")],
            pins={4: "device-1", 3: "device-1", 2: "device-1"},
        ),
        ("memory", "try"),
    ),
    (
        "a required device that is not allowed",
        lambda: problem_of(crowd_of(900, 900), requires=["device-1"], devices=["device-0"]),
        ("'device-1' must have a stage",),
    ),
]


@pytest.mark.parametrize("solver", ["ilp", "exhaustive"])
@pytest.mark.parametrize(
    ("make", "words"), [row[1:] for row in INFEASIBLE], ids=[row[0] for row in INFEASIBLE]
)
def test_why_nothing_fits(solver, make, words):
    with pytest.raises(InfeasibleError) as caught:
        solve(make(), solver=solver)
    text = str(caught.value)
    assert text.startswith("[CM-203] ")
    for word in words:
        assert word in text


def test_a_crowd_of_one_device_runs_everything():
    device = Device(id=DeviceId("only"), memory_bytes=900 * MB)
    result = solve(problem_of(Crowd(devices=(device,))))
    assert result.plan.devices == ("only",)
    assert result.optimal
