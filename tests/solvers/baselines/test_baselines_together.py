"""What holds for every baseline: plans fit, repairs are told, plans do not change."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hand_problems import BASELINES, any_problem, by_hand, lengths

from crowdmesh_jax.core import Link
from crowdmesh_jax.errors import InfeasibleError
from crowdmesh_jax.solvers import PartitionProblem, make_solver, plan_faults, solvers

SEEDS = 100


@pytest.mark.parametrize("name", BASELINES)
def test_every_plan_of_a_baseline_fits_or_it_says_that_none_does(name):
    found = shared = 0
    for seed in range(SEEDS):
        problem = any_problem(seed)
        try:
            result = make_solver(name).solve(problem)
        except InfeasibleError:
            continue
        assert plan_faults(problem, result.plan) == (), seed
        assert result.solver == name
        assert not result.optimal
        assert result.gap is None
        idle = {device.id for device in problem.crowd.devices} - set(result.plan.all_devices)
        assert set(result.left_out) == idle
        found += 1
        for stage in result.plan.stages:
            shared += bool(stage.shares)
            if stage.shares:
                assert not any(problem.profile.layers[i].state_bytes for i in stage.layers)
    assert found > SEEDS / 2
    if name in ("pipedream", "dapple", "asteroid"):
        assert shared >= 5  # so that the loop above has judged shared stages too


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_listed_with_a_line(name):
    assert solvers()[name].startswith("baseline: ")
    assert "\n" not in solvers()[name]


@pytest.mark.parametrize("name", ["pipedream", "dapple", "asteroid"])
def test_layers_with_state_over_rows_are_not_shared(name):
    # Two alike devices and one layer: sharing halves the time, were it not for the state.
    problem = by_hand(
        {"a": [(2, 2)], "b": [(2, 2)]}, rows=4, params=[1], share=True, schedule="eager"
    )
    shared = make_solver(name).solve(problem).plan.stages
    assert [share.rows for share in shared[0].shares] == [2, 2]
    layers = tuple(replace(layer, state_bytes=8) for layer in problem.profile.layers)
    mixing = replace(problem, profile=replace(problem.profile, layers=layers))
    result = make_solver(name).solve(mixing)
    assert result.plan.stages[0].shares == ()
    assert not any("repaired" in note for note in result.notes)  # the rule itself knows
    alone = replace(problem, share=False)
    assert make_solver(name).solve(alone).plan.stages[0].shares == ()


@pytest.mark.parametrize("name", ["by_params", "pipedream", "ftpipehd", "dapple"])
def test_cuts_move_towards_the_device_with_room_and_the_result_says_so(name):
    # Alike devices: every rule cuts 4 layers in the middle. A layer takes 2 x 100 bytes
    # (parameters, gradients), so `b` with 250 bytes holds one: the end of `a` moves by one.
    layers = [(1, 1)] * 4
    problem = by_hand({"a": layers, "b": layers}, params=[100] * 4, memory={"a": 10_000, "b": 250})
    roomy = make_solver(name).solve(
        replace(problem, crowd=by_hand({"a": layers, "b": layers}).crowd)
    )
    assert lengths(roomy.plan) == [2, 2]
    assert not any("repaired" in note for note in roomy.notes)
    result = make_solver(name).solve(problem)
    assert lengths(result.plan) == [3, 1]
    assert any("repaired" in note and "by 1 layers" in note for note in result.notes)
    assert "repaired" in result.explain()


@pytest.mark.parametrize("name", ["by_params", "pipedream", "ftpipehd", "dapple", "asteroid"])
def test_a_pin_is_kept_by_changing_the_order_and_the_result_says_so(name):
    layers = [(1, 1)] * 4
    problem = by_hand({"a": layers, "b": layers}, pins={0: "b", 3: "a"})
    result = make_solver(name).solve(problem)
    assert result.plan.devices == ("b", "a")
    assert any("reordered" in note for note in result.notes)


@pytest.mark.parametrize("name", ["by_params", "pipedream", "ftpipehd", "dapple", "asteroid"])
def test_pins_of_middle_layers_are_kept_too(name):
    layers = [(1, 1)] * 4
    problem = by_hand({"a": layers, "b": layers}, pins={1: "b", 2: "a"})
    assert make_solver(name).solve(problem).plan.devices == ("b", "a")


@pytest.mark.parametrize("name", BASELINES)
def test_a_device_that_cannot_compile_gets_nothing(name):
    layers = [(1, 1)] * 4
    problem = by_hand({"a": layers, "b": layers}, memory={"a": 500, "b": 2000})
    result = make_solver(name).solve(replace(problem, compile_peak_bytes=1000))
    assert result.plan.all_devices == ("b",)


@pytest.mark.parametrize("name", ["pipedream", "dapple", "asteroid"])
def test_devices_without_a_link_of_their_own_do_not_share_a_stage(name):
    # a - b - c: the three alike would share the one layer, but a and c cannot talk.
    pairs = [("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")]
    wires = [Link(source=a, target=b, bandwidth_bytes_per_s=1e6) for a, b in pairs]
    layer = [(3, 3)]
    crowd = {"a": layer, "b": layer, "c": layer}
    chain = by_hand(crowd, rows=6, params=[1], share=True, rate=0.0, links=wires)
    assert len(make_solver(name).solve(chain).plan.all_devices) < 3
    whole = by_hand(crowd, rows=6, params=[1], share=True, rate=1e6)
    assert len(make_solver(name).solve(whole).plan.all_devices) == 3


@pytest.mark.parametrize("name", ["by_params", "pipedream", "ftpipehd", "dapple", "asteroid"])
def test_a_device_without_links_is_left_out(name):
    layers = [(1, 1)] * 4
    wires = [
        Link(source=a, target=b, bandwidth_bytes_per_s=10.0) for a, b in (("a", "c"), ("c", "a"))
    ]
    problem = by_hand({"a": layers, "b": layers, "c": layers}, rate=0.0, links=wires)
    result = make_solver(name).solve(problem)
    assert result.plan.devices == ("a", "c")
    assert "b" in result.left_out
    assert name == "asteroid" or any("2 parts" in note for note in result.notes)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_says_when_no_repair_fits(name):
    layers = [(1, 1)] * 4
    problem = by_hand({"a": layers, "b": layers}, params=[100] * 4, memory=150)
    with pytest.raises(InfeasibleError, match=rf"CM-203.*{name}(.|\n)*tried(.|\n)*ilp"):
        make_solver(name).solve(problem)
    with pytest.raises(InfeasibleError, match="CM-203"):
        make_solver(name).solve(by_hand({"a": layers}, bans=["a"]))


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_gives_the_same_plan_every_time(name):
    for seed in range(20):
        problem = any_problem(seed)
        try:
            first = make_solver(name).solve(problem).plan
        except InfeasibleError:
            continue
        assert make_solver(name).solve(problem).plan == first


def shuffled(problem: PartitionProblem, seed: int) -> PartitionProblem:
    crowd = problem.crowd
    rng = random.Random(seed)
    devices, links = list(crowd.devices), list(crowd.links)
    rng.shuffle(devices)
    rng.shuffle(links)
    return replace(problem, crowd=replace(crowd, devices=tuple(devices), links=tuple(links)))


@pytest.mark.parametrize(
    ("name", "options"), [("asteroid", {}), ("cloud_device", {"device": "d0"})]
)
def test_rules_without_an_order_do_not_see_the_order_of_the_crowd(name, options):
    compared = 0
    for seed in range(60):
        problem = any_problem(seed)
        try:
            first = make_solver(name, **options).solve(problem).plan
        except InfeasibleError:
            with pytest.raises(InfeasibleError):
                make_solver(name, **options).solve(shuffled(problem, seed))
            continue
        assert make_solver(name, **options).solve(shuffled(problem, seed)).plan == first, seed
        compared += 1
    assert compared > 20
