"""The closed-form game as arrays: the same costs, the same answers, only more of them a second."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from by_hand import ByHand
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coalition_game import PROFILE, crowd_of

from crowdmesh_jax.core import Crowd, DefaultLink, Device, DeviceId, Link
from crowdmesh_jax.solvers import HedonicSolver, form_coalitions
from crowdmesh_jax.solvers.coalition import CoalitionProblem
from crowdmesh_jax.solvers.coalition.arrays import ArrayGame
from crowdmesh_jax.solvers.coalition.game import Game
from crowdmesh_jax.solvers.coalition.problem import Cost
from crowdmesh_jax.solvers.coalition.search import Search
from crowdmesh_jax.solvers.coalition.tangents import Tangents
from crowdmesh_jax.solvers.coalition.value import members_of

BIG = dataclasses.replace(
    PROFILE,
    layers=tuple(
        dataclasses.replace(layer, parameter_bytes=400_000_000, optimizer_bytes=800_000_000)
        for layer in PROFILE.layers
    ),
)
"""Needs 13 GB: few devices can hold it alone."""


@st.composite
def problems(draw, most=24):
    count = draw(st.integers(2, most))
    profile = draw(st.sampled_from([PROFILE, PROFILE, BIG]))
    return CoalitionProblem(
        profile=profile,
        crowd=crowd_of(count, draw(st.integers(0, 50))),
        value="closed_form",
        kappa=draw(st.sampled_from([0.0, 0.5, 3.0])),
        power=draw(st.sampled_from([1.0, 2.5, 4.0, 12.0])),
        imbalance=draw(st.sampled_from(["js", "emd"])),
        amounts=draw(st.sampled_from(["rows", "equal"])),
        sync_s=draw(st.sampled_from([0.0, 2.0])),
        max_size=draw(st.sampled_from([None, 1, 3, 5])),
    )


def random_groups(count: int, limit: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    groups: list[list[int]] = []
    for device in range(count):
        room = [group for group in groups if len(group) < limit]
        if room and rng.random() < 0.7:
            rng.choice(room).append(device)
        else:
            groups.append([device])
    return groups


def masks_of(groups):
    return [sum(1 << device for device in group) for group in groups]


def close(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], abs=1e-12)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-9, abs=1e-12)


@given(problems(), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_costs_are_those_of_the_game_and_of_the_formulas_by_hand(problem, seed):
    game = Game(problem)
    groups = random_groups(game.count, problem.size_limit, seed)
    arrays = ArrayGame(game, groups, epsilon=1e-9)
    by_hand = ByHand(problem)
    named = [[game.facts.ids[device] for device in group] for group in groups]
    close(arrays.potential(), game.potential(masks_of(groups)))
    close(arrays.potential(), by_hand.potential(named))


@given(problems(), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_best_deviation_is_what_trying_every_switch_finds(problem, seed):
    game = Game(problem)
    groups = random_groups(game.count, problem.size_limit, seed)
    arrays = ArrayGame(game, groups, epsilon=1e-9)
    named = [[game.facts.ids[device] for device in group] for group in groups]
    best = ByHand(problem).best_gains(named)
    scale = arrays.potential().phi
    search = Search(game, masks_of(groups), epsilon=1e-9, rng=random.Random(0))
    for deviation in arrays.certificate("marginal").deviations:
        expected = best[deviation.device]
        if expected is None:
            assert (deviation.target, deviation.gain) == ((), Cost(0.0, 0.0))
            continue
        assert deviation.gain.lack == pytest.approx(expected[0], abs=1e-12)
        assert deviation.gain.phi == pytest.approx(expected[1], rel=1e-7, abs=1e-10 * scale)
        device = game.facts.index[deviation.device]
        target = sum(1 << game.facts.index[other] for other in deviation.target)
        told = search.gain(device, target)
        assert told.phi == pytest.approx(deviation.gain.phi, rel=1e-7, abs=1e-10 * scale)


@given(problems(), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_every_move_lowers_the_potential_by_exactly_its_gain_and_the_end_is_stable(problem, seed):
    game, by_hand = Game(problem), ByHand(problem)
    groups = random_groups(game.count, problem.size_limit, seed)
    ids = game.facts.ids
    now = {frozenset(ids[d] for d in group) for group in groups}
    floor = 1e-9

    def check(kind, before, after, gain):
        named = [frozenset(ids[d] for d in members_of(mask)) for mask in before]
        new = [frozenset(ids[d] for d in members_of(mask)) for mask in after]
        assert now.issuperset(named), "moves only what stands"
        old_cost, new_cost = by_hand.potential(named), by_hand.potential(new)
        assert old_cost[0] - new_cost[0] == pytest.approx(gain.lack, abs=1e-12)
        scale = max(old_cost[1], new_cost[1])
        assert old_cost[1] - new_cost[1] == pytest.approx(gain.phi, rel=1e-6, abs=1e-9 * scale)
        assert gain.is_gain(floor)
        now.difference_update(named)
        now.update(new)
        assert max(map(len, now)) <= problem.size_limit
        assert kind in ("switch", "merge")

    arrays = ArrayGame(game, groups, epsilon=floor, observer=check)
    arrays.descend(random.Random(seed))
    assert not arrays.is_cut_short
    assert {frozenset(ids[d] for d in group) for group in arrays.groups()} == now
    scale = by_hand.potential(now)[1]
    for name, gain in by_hand.best_gains(now).items():
        if gain is not None:
            assert gain[0] < 1e-9, name
            assert gain[0] < -1e-9 or gain[1] <= floor + 1e-9 * scale, name


@given(problems(), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_tangents_lie_below_the_distance(problem, seed):
    facts = Game(problem).facts
    rng = np.random.default_rng(seed)
    one, other = (facts.labels[rng.integers(0, len(facts.ids), size=(5, 3))].sum(axis=1)
                  for _ in range(2))  # fmt: skip
    tangents = Tangents(facts, 6)
    tangents.set(np.arange(5), one)
    low = tangents.below(other, np.arange(6))
    both = np.concatenate([one, np.zeros((1, one.shape[1]))])[None] + other[:, None]
    true = facts.imbalance(both)
    assert (low <= true + 1e-12).all()
    # At the point of the tangent itself it is nearly the distance: a bound worth its price.
    own = tangents.below(np.zeros_like(one), np.arange(5)).diagonal()
    assert (own >= facts.imbalance(one) - 0.35).all()


@pytest.mark.parametrize(
    "fields", [{"max_size": 12}, {"imbalance": "emd"}, {"kappa": 0.0}, {"power": 40.0}]
)
def test_a_large_crowd_is_stable_by_the_games_own_costs(fields):
    result = form_coalitions(PROFILE, crowd_of(160, 3), value="closed_form", **fields)
    assert result.certificate.is_nash_stable
    assert not result.certificate.is_sampled
    game = Game(result.problem)
    search = Search(game, game.masks(result.structure), epsilon=1e-9, rng=random.Random(0))
    looked = {deviation.device: deviation for deviation in result.certificate.deviations}
    for device in random.Random(1).sample(range(160), 12):
        best = search.best_switch(device, search.targets(device))
        told = looked[game.facts.ids[device]].gain
        assert best is not None
        assert best[0].lack == told.lack
        scale = result.potential.phi
        assert best[0].phi == pytest.approx(told.phi, rel=1e-6, abs=1e-13 * scale)


def test_looks_again_only_at_what_is_new_and_misses_nothing():
    """Passes that look at everything find nothing more."""
    game = Game(CoalitionProblem(profile=PROFILE, crowd=crowd_of(300, 1), value="closed_form"))
    arrays = ArrayGame(game, [[device] for device in range(300)], epsilon=1e-9)
    arrays.descend(random.Random(0))
    everyone = np.arange(300)
    choice = arrays.deviations(everyone, arrays.columns(), floor=1e-9)
    assert not choice.gainers(1e-9)
    assert sorted(d for group in arrays.groups() for d in group) == list(range(300))


def test_placing_takes_every_device_once_and_is_no_worse_than_all_alone():
    game = Game(CoalitionProblem(profile=PROFILE, crowd=crowd_of(200, 2), value="closed_form"))
    arrays = ArrayGame(game, [], epsilon=1e-9)
    arrays.place(list(range(200)))
    assert sorted(d for group in arrays.groups() for d in group) == list(range(200))
    alone = ArrayGame(game, [[device] for device in range(200)], epsilon=1e-9)
    assert arrays.potential() < alone.potential()
    close(arrays.potential(), game.potential(masks_of(arrays.groups())))


def test_welcome_deviations_are_those_that_hosts_do_not_wait_longer_for():
    problem = CoalitionProblem(profile=PROFILE, crowd=crowd_of(9, 4), value="closed_form")
    game = Game(problem)
    groups = random_groups(9, 9, 7)
    arrays = ArrayGame(game, groups, epsilon=1e-9)
    search = Search(game, masks_of(groups), epsilon=1e-9, rng=random.Random(0))
    seen = 0
    for deviation in arrays.certificate("marginal").deviations:
        device = game.facts.index[deviation.device]
        welcome = [
            search.gain(device, target)
            for target in search.targets(device)
            if search.gain(device, target).is_gain(1e-9)
            and (not target or game.entry(target | 1 << device).wait <= game.entry(target).wait)
        ]
        if not deviation.gain.is_gain(1e-9) or not welcome:
            assert deviation.welcome_gain is None
        else:
            seen += 1
            assert deviation.welcome_gain is not None
            assert deviation.welcome_gain.phi == pytest.approx(max(welcome).phi)
    assert seen


def test_order_and_a_second_run_change_nothing():
    crowd = crowd_of(120, 5)
    turned = dataclasses.replace(crowd, devices=crowd.devices[::-1])
    one = form_coalitions(PROFILE, crowd, value="closed_form", max_size=6, seed=2)
    two = form_coalitions(PROFILE, turned, value="closed_form", max_size=6, seed=2)
    assert one.structure == two.structure
    assert one.potential == two.potential


@pytest.mark.parametrize("change", ["joined", "left", "link"])
def test_a_large_structure_re_formed_is_stable_and_mostly_as_it_was(change):
    crowd = crowd_of(100, 3)
    solver = HedonicSolver(seed=3)
    before = solver.form(CoalitionProblem(profile=PROFILE, crowd=crowd, value="closed_form"))
    devices = list(crowd.devices)
    if change == "joined":
        devices.append(dataclasses.replace(devices[0], id=DeviceId("newcomer")))
    elif change == "left":
        del devices[4]
    else:
        way = devices[2].access
        assert way is not None
        slow = dataclasses.replace(way, uplink_bytes_per_s=way.uplink_bytes_per_s / 50)
        devices[2] = dataclasses.replace(devices[2], access=slow)
    changed = dataclasses.replace(crowd, devices=tuple(devices))
    after = solver.reform(before, changed, hysteresis=0.0)
    after.structure.check(changed)
    gains = ByHand(after.problem).best_gains(after.structure.coalitions)
    assert all(gain is None or gain <= (0.0, 1e-9) for gain in gains.values())
    same = set(before.structure.coalitions) & set(after.structure.coalitions)
    assert len(same) > len(before.structure) / 3
    kept = solver.reform(before, crowd, hysteresis=0.05)
    assert kept.structure == before.structure
    assert kept.switches == 0


def test_devices_that_can_do_nothing_join_others():
    devices = [
        Device(
            id=DeviceId(f"d{i:02d}"), label_counts=(32, i % 5),
            memory_bytes=2**20 if i % 4 == 0 else 2**33,
        )
        for i in range(70)
    ]  # fmt: skip
    crowd = Crowd(devices=tuple(devices), default_link=DefaultLink())
    result = form_coalitions(PROFILE, crowd, value="closed_form")
    assert not result.unheld
    assert result.certificate.is_nash_stable


def test_typical_cuts_over_links_of_their_own_take_the_best_one():
    ids = ("a", "b", "c")
    devices = tuple(Device(id=DeviceId(name), label_counts=(8,)) for name in ids)
    links = [
        Link(source=DeviceId(s), target=DeviceId(t), bandwidth_bytes_per_s=rate, latency_s=0.0)
        for s, t, rate in (("a", "b", 1e6), ("a", "c", 2e6), ("b", "a", 4e6))
    ]
    crowd = Crowd(devices=devices, links=tuple(links))
    value = Game(CoalitionProblem(profile=PROFILE, crowd=crowd, value="closed_form")).value
    size = 200_000  # down and back of any cut
    assert value.trip.tolist() == pytest.approx([2 * size / 2e6, 2 * size / 4e6, 0.0])


@pytest.mark.long
def test_ten_thousand_are_formed_and_certified_by_a_sample():
    result = form_coalitions(PROFILE, crowd_of(10_000, 0), value="closed_form", max_size=12)
    assert result.certificate.is_sampled
    assert result.certificate.is_nash_stable
    assert "512 of 10000 devices, sampled" in result.certificate.line()
    assert len(result.explain().splitlines()) < 60
    assert result.solve_s < 60
    gains = result.certificate.deviations
    game = Game(result.problem)
    search = Search(game, game.masks(result.structure), epsilon=1e-9, rng=random.Random(0))
    for deviation in gains[:3]:
        device = game.facts.index[deviation.device]
        target = sum(1 << game.facts.index[other] for other in deviation.target)
        exact = search.gain(device, target)
        assert exact.phi == pytest.approx(deviation.gain.phi, rel=1e-5, abs=1e-14)
