"""Laws of the game by plans: it descends, it ends stable, it re-forms stable, it ignores order."""

from __future__ import annotations

import dataclasses
import math
import random
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_coalition_game import PROFILE, best_gain, crowd_of

import crowdmesh_jax as cm
from crowdmesh_jax.core import CoalitionStructure, Device, DeviceId, Link
from crowdmesh_jax.errors import InfeasibleError, InvalidCoalitionError, InvalidValueError
from crowdmesh_jax.solvers import HedonicSolver, form_coalitions, rate_structure, stability_prices
from crowdmesh_jax.solvers.coalition import CoalitionProblem
from crowdmesh_jax.solvers.coalition.baselines import RIVALS
from crowdmesh_jax.solvers.coalition.certificate import certify
from crowdmesh_jax.solvers.coalition.game import Game, raised
from crowdmesh_jax.solvers.coalition.hedonic import best_by_rounds
from crowdmesh_jax.solvers.coalition.preferences import PREFERENCES, Switch, marginal
from crowdmesh_jax.solvers.coalition.problem import Cost
from crowdmesh_jax.solvers.coalition.quick import QuickTables
from crowdmesh_jax.solvers.coalition.search import Search
from crowdmesh_jax.solvers.coalition.value import PartitionValue

FEW = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(
    count=st.integers(2, 11),
    seed=st.integers(0, 40),
    size=st.sampled_from([None, 2, 4]),
    power=st.sampled_from([1.0, 4.0, 16.0]),
    kappa=st.sampled_from([0.0, 0.5, 4.0]),
)
@example(count=8, seed=8, size=2, power=16.0, kappa=0.0)
@FEW
def test_the_potential_falls_at_every_move_and_the_end_is_stable(count, seed, size, power, kappa):
    problem = CoalitionProblem(
        profile=PROFILE, crowd=crowd_of(count, seed), max_size=size, power=power, kappa=kappa
    )
    game = Game(problem)
    random_one = random.Random(seed)
    groups = [1 << device for device in range(count)]
    random_one.shuffle(groups)
    now = set(groups)

    def potential():
        """Exact: the gain of a move may be less than a float of the whole resolves."""
        costs = [game.cost(mask) for mask in now]
        return sum(Fraction(c.lack) for c in costs), sum(Fraction(c.phi) for c in costs)

    falls = [potential()]

    def observe(kind, before, after, gain):
        assert now.issuperset(before)
        assert gain.is_gain(1e-9)
        assert sum(before) == sum(after), "the same devices"
        now.difference_update(before)
        now.update(after)
        falls.append(potential())
        assert falls[-1] < falls[-2], kind
        lack, phi = (float(was - new) for was, new in zip(falls[-2], falls[-1], strict=True))
        assert lack == pytest.approx(gain.lack, rel=1e-12, abs=1e-12)
        assert phi == pytest.approx(gain.phi, rel=1e-6, abs=1e-9 * float(falls[-2][1]))

    search = Search(game, groups, epsilon=1e-9, rng=random.Random(seed), observer=observe)
    search.descend()
    assert set(search.masks) == now
    assert search.moves == len(falls) - 1
    ordered = game.masks(game.structure(search.masks))
    told = certify(game, ordered, name="marginal", preference=marginal, epsilon=1e-9)
    assert told.is_nash_stable
    assert told.is_individually_stable
    assert len(told.deviations) == count
    # By hand: every switch there is, none of them through the search.
    for device in range(count):
        home = next(mask for mask in now if mask >> device & 1)
        for target in [*now, 0]:
            if target == home or target.bit_count() >= problem.size_limit:
                continue
            before = game.cost(home).plus(game.cost(target))
            after = game.cost(home ^ 1 << device).plus(game.cost(target | 1 << device))
            assert not (before - after).is_gain(1e-9)


def test_no_pair_of_coalitions_is_better_merged_and_no_two_devices_better_swapped():
    """The moves beyond switches were looked for, too."""
    result = form_coalitions(PROFILE, crowd_of(12, 6), max_size=5, starts=1)
    game = Game(result.problem)
    masks = game.masks(result.structure)
    for place, left in enumerate(masks):
        for right in masks[place + 1 :]:
            before = game.cost(left).plus(game.cost(right))
            if (left | right).bit_count() <= 5:
                assert not (before - game.cost(left | right)).is_gain(1e-9)
            for a in range(12):
                for b in range(12):
                    if left >> a & 1 and right >> b & 1:
                        both = 1 << a | 1 << b
                        after = game.cost(left ^ both).plus(game.cost(right ^ both))
                        assert not (before - after).is_gain(1e-9)
    for mask in masks:
        parts = [part for part in range(1, mask) if part & mask == part]
        for part in parts:
            after = game.cost(part).plus(game.cost(mask ^ part))
            assert not (game.cost(mask) - after).is_gain(1e-9)


def test_every_kind_of_move_is_tried_and_switches_again_after_each_that_gains():
    said, gains = [], {"merge": 1, "swap": 1, "split": 1}

    def tell(kind):
        said.append(kind)
        moved, gains[kind] = gains.get(kind, 0), 0
        return moved

    class Told(Search):
        def switch_pass(self, devices):
            return tell("switch")

        def merge_pass(self):
            return tell("merge")

        def swap_pass(self, most=None):
            return tell("swap")

        def split_pass(self):
            return tell("split")

    game = Game(CoalitionProblem(profile=PROFILE, crowd=crowd_of(4, 0)))
    Told(game, [0b1111], epsilon=1e-9, rng=random.Random(0)).descend()
    assert said == [
        "switch", "merge",
        "switch", "merge", "swap",
        "switch", "merge", "swap", "split",
        "switch", "merge", "swap", "split",
    ]  # fmt: skip
    said.clear()
    alone = Told(game, [0b1111], epsilon=1e-9, rng=random.Random(0))
    alone.descend(swaps=False, merges=False, splits=False)
    assert said == ["switch"]


def test_without_repair_there_are_switches_alone_and_the_end_is_stable():
    kinds = set()
    solver = HedonicSolver(
        repair=False, observer=lambda kind, before, after, gain: kinds.add(kind), starts=3
    )
    result = solver.form(CoalitionProblem(profile=PROFILE, crowd=crowd_of(12, 6)))
    assert kinds == {"switch"}
    assert result.certificate.is_nash_stable


@pytest.mark.parametrize("count", [10, pytest.param(40, marks=pytest.mark.long)])
@pytest.mark.parametrize("change", ["joined", "left", "link", "all"])
def test_re_formed_structures_are_stable_by_trying_every_switch(count, change):
    crowd = crowd_of(count, 4)
    solver = HedonicSolver(seed=1, starts=1)
    before = solver.form(CoalitionProblem(profile=PROFILE, crowd=crowd, max_size=5))
    devices, links = list(crowd.devices), list(crowd.links)
    if change in ("link", "all"):
        ends = before.structure.coalitions[0][:2]
        ends = ends if len(ends) == 2 else (devices[0].id, devices[1].id)
        for source, target in (ends, ends[::-1]):
            links.append(
                Link(source=source, target=target, bandwidth_bytes_per_s=2e4, latency_s=0.5)
            )
    if change in ("left", "all"):
        gone = devices.pop(6).id
        links = [link for link in links if gone not in (link.source, link.target)]
    if change in ("joined", "all"):
        for name in ("newcomer-1", "newcomer-2"):
            devices.append(dataclasses.replace(devices[1], id=DeviceId(name)))
    changed = dataclasses.replace(crowd, devices=tuple(devices), links=tuple(links))
    after = solver.reform(before, changed, hysteresis=0.0)
    after.structure.check(changed)
    assert after.certificate.is_nash_stable
    assert not after.certificate.is_sampled
    assert best_gain(after) <= after.certificate.epsilon
    assert max(map(len, after.structure.coalitions)) <= 5


@pytest.mark.parametrize("seed", range(3))
def test_questions_answered_together_change_no_answer(seed, monkeypatch):
    problem = CoalitionProblem(profile=PROFILE, crowd=crowd_of(16, seed), max_size=6)
    together = HedonicSolver(seed=seed, starts=1).form(problem)
    monkeypatch.setattr(Search, "_foresee", lambda self, searches: None)
    alone = HedonicSolver(seed=seed, starts=1).form(problem)
    assert together.structure == alone.structure
    assert together.certificate == alone.certificate
    assert together.switches == alone.switches


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_rates_as_one_by_one(seed):
    """Width and company of a set change nothing of its plan."""
    crowd = crowd_of(9, seed)
    problem = CoalitionProblem(profile=PROFILE, crowd=crowd)
    masks = [mask for mask in range(1, 1 << 9) if mask % 7 == seed]
    together = Game(problem)
    together.rate(masks)
    for mask in masks[:: len(masks) // 12]:
        assert Game(problem).entry(mask) == together.entry(mask)


@given(count=st.integers(2, 8), seed=st.integers(0, 30))
@FEW
def test_bounds_lie_below_costs(count, seed):
    game = Game(CoalitionProblem(profile=PROFILE, crowd=crowd_of(count, seed)))
    masks = list(range(1, 1 << count))
    bounds = game.bounds(masks)
    assert isinstance(game.value, PartitionValue)
    for mask, bound in zip(masks, bounds, strict=True):
        assert bound <= game.cost(mask)
        assert game.bounds([mask]) == [game.cost(mask)], "known ones are exact"
    assert game.bounds([0]) == [Cost(0.0, 0.0)]


def test_baselines_as_starts_leave_none_of_them_with_a_lower_potential():
    crowd = crowd_of(14, 3)
    solver = HedonicSolver(starts=1, rivals=tuple(RIVALS))
    ours = solver.form(CoalitionProblem(profile=PROFILE, crowd=crowd, max_size=6))
    for name in RIVALS:
        theirs = form_coalitions(PROFILE, crowd, solver=name, max_size=6)
        assert ours.potential <= theirs.potential, name


class Rounds:
    """As much of a game as the choice by rounds needs; a structure is its name."""

    def __init__(self, **known):
        self.known = known  # (slowest, mean, lack)

    def measures(self, name):
        return self.known[name][:2]

    def potential(self, name):
        return Cost(self.known[name][2], 0.0)


def test_the_choice_by_rounds_takes_what_beats_others_on_both():
    game = Rounds(
        quick=(5.0, 9.0, 0.0), fair=(6.0, 4.0, 0.0), slow=(7.0, 3.0, 0.0), same=(6.0, 5.0, 0.0),
        short=(1.0, 1.0, 2.5), other=(6.5, 4.5, 0.0), lean=(9.0, 3.5, 0.0),
    )  # fmt: skip

    def chosen(found, others):
        return found[best_by_rounds(game, found, others)]

    assert chosen(["fair", "quick", "slow"], []) == "quick", "all wait for the slowest"
    assert chosen(["same", "fair"], []) == "fair", "then the mean decides"
    assert chosen(["short", "slow"], []) == "slow", "a model comes before everything"
    assert chosen(["quick", "fair"], ["other"]) == "fair", "quick is above other's mean"
    assert chosen(["quick", "fair"], ["other", "short"]) == "fair", "short holds no model"
    assert chosen(["quick", "fair", "slow"], ["other", "lean"]) == "slow", "the least above either"


def test_two_hundred_by_plans_look_from_one_start(monkeypatch):
    sets = []
    real = QuickTables.solve

    def solve(self, many):
        sets.append(len(many))
        return real(self, many)

    monkeypatch.setattr(QuickTables, "solve", solve)
    solver = HedonicSolver(starts=4, repair=False)
    result = solver.form(CoalitionProblem(profile=PROFILE, crowd=crowd_of(70, 2), max_size=4))
    assert result.certificate.is_nash_stable
    assert max(sets) > 60, "devices ask together"


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0, 4.0, 7.0, 16.0, 2.5, 100.0])
def test_powers_by_products_are_powers(power):
    assert raised(1.7, power) == pytest.approx(1.7**power, rel=1e-13)


@pytest.mark.parametrize("seed", range(2))
def test_prices_of_stability_are_those_of_all_structures(seed):
    problem = CoalitionProblem(profile=PROFILE, crowd=crowd_of(5, seed))
    prices = stability_prices(problem)
    assert prices.structures == 52  # Bell(5)
    assert 1 <= prices.stable < 52
    best = form_coalitions(PROFILE, problem.crowd, solver="exhaustive")
    assert prices.potential.optimum == pytest.approx(best.potential.phi)
    found = [HedonicSolver(seed=seed, starts=1, repair=False).form(problem) for seed in range(4)]
    for result in found:
        ours = result.potential.phi
        assert ours >= prices.potential.best_stable * (1 - 1e-9)
        assert ours <= prices.potential.worst_stable * (1 + 1e-9)
        assert result.slowest_round_s <= prices.slowest_round.worst_stable * (1 + 1e-9)
        assert result.mean_round_s >= prices.mean_round.optimum * (1 - 1e-9)
    # The least potential is itself stable, so stability costs nothing there.
    assert prices.potential.of_stability == pytest.approx(1.0)
    for price in (prices.potential, prices.mean_round, prices.slowest_round):
        assert 1 - 1e-9 <= price.of_stability <= price.of_anarchy
    assert "of 52 structures are Nash-stable" in str(prices)


def test_prices_under_a_preference_that_nothing_satisfies_are_infinite():
    problem = CoalitionProblem(profile=PROFILE, crowd=crowd_of(4, 0))
    prices = stability_prices(problem, preference=lambda switch: 1.0)
    assert prices.stable == 0
    assert prices.potential.of_stability == math.inf
    content = stability_prices(problem, preference=lambda switch: 0.0)
    assert content.stable == content.structures == 15
    assert content.slowest_round.worst_stable > content.slowest_round.optimum
    with pytest.raises(InvalidValueError, match="too many structures"):
        stability_prices(CoalitionProblem(profile=PROFILE, crowd=crowd_of(9, 0)))


def test_a_structure_made_by_hand_is_rated_as_all_others_are():
    crowd = crowd_of(6, 0)
    problem = CoalitionProblem(profile=PROFILE, crowd=crowd)
    theirs = form_coalitions(PROFILE, crowd, solver="grand")
    rated = rate_structure(problem, [[device.id for device in crowd.devices]], solver="mine")
    assert rated.solver == "mine"
    assert rated.values == theirs.values
    assert rated.certificate == theirs.certificate
    again = rate_structure(problem, theirs.structure)
    assert again.structure == theirs.structure
    with pytest.raises(InvalidCoalitionError, match="is in no coalition"):
        rate_structure(problem, CoalitionStructure.of([[crowd.devices[0].id]]))


@pytest.mark.parametrize("value", ["partition", "closed_form"])
def test_welcome_deviations_are_the_best_that_hosts_do_not_wait_longer_for(value):
    problem = CoalitionProblem(profile=PROFILE, crowd=crowd_of(8, 4), value=value)
    game = Game(problem)
    masks = [1 << device for device in range(6)] + [0b11000000]
    search = Search(game, masks, epsilon=1e-9, rng=random.Random(0))
    assert all(0 not in search.targets(device) for device in range(6)), "they are alone"
    assert 0 in search.targets(6)
    told = certify(game, masks, name="marginal", preference=marginal, epsilon=1e-9)
    choices = []
    for deviation in told.deviations:
        device = game.facts.index[deviation.device]
        gains = {target: search.gain(device, target) for target in search.targets(device)}
        assert deviation.gain == max(gains.values())
        welcome = [
            gain
            for target, gain in gains.items()
            if gain.is_gain(1e-9)
            and (not target or game.entry(target | 1 << device).wait <= game.entry(target).wait)
        ]
        assert deviation.welcome_gain == max(welcome, default=None)
        choices.append(len(welcome))
    assert max(choices) > 1, "somebody is welcome in several places"
    assert told.is_nash_stable == (max(d.gain for d in told.deviations) <= Cost(0.0, 1e-9))
    sampled = certify(
        game, masks, name="marginal", preference=marginal, epsilon=1e-9, sample=3, seed=1
    )
    assert sampled.is_sampled
    assert set(sampled.deviations) < set(told.deviations)


def switch(**costs):
    """Two devices leave one for another of one member; costs are phi, or (lack, phi)."""
    named = {
        "source_cost": 8.0, "source_cost_after": 5.0, "target_cost": 2.0, "target_cost_after": 6.0,
        "source_wait": 4.0, "target_wait": 3.0, "target_wait_after": 3.5,
    } | costs  # fmt: skip
    return Switch(
        device="a",
        source=("a", "b"),
        target=("c",),
        **{
            name: Cost(*value) if isinstance(value, tuple) else Cost(0.0, value)
            for name, value in named.items()
        },
    )


def test_preferences_say_what_their_lines_say():
    assert PREFERENCES["marginal"](switch()) == Cost(0.0, 8.0 + 2.0 - 5.0 - 6.0)
    assert PREFERENCES["equal_share"](switch()) == Cost(0.0, 8.0 / 2 - 6.0 / 2)
    assert PREFERENCES["selfish"](switch()) == Cost(0.0, 0.5)
    # Hosts would wait half a second longer, so that their loss decides; else the device's gain.
    assert PREFERENCES["pareto"](switch()) == Cost(0.0, -0.5)
    assert PREFERENCES["pareto"](switch(target_wait_after=2.5)) == Cost(0.0, 1.5)
    # Lack goes before everything else.
    held = switch(source_wait=(1.5, 1.0), target_wait_after=(0.0, 9.0))
    assert PREFERENCES["selfish"](held) > Cost(1.0, 0.0)
    assert held.target_cost.is_gain(1e-9)
    assert not (Cost(-1.0, 9.0)).is_gain(1e-9)


def test_who_holds_no_model_waits_longer_than_anybody_who_does():
    small = tuple(
        Device(id=DeviceId(f"d{i}"), label_counts=(32,), memory_bytes=30_000_000) for i in range(4)
    )
    crowd = cm.Crowd(devices=small, default_link=cm.DefaultLink())
    game = Game(CoalitionProblem(profile=PROFILE, crowd=crowd, compile_peak_bytes=0))
    alone, together = game.entry(0b1), game.entry(0b1111)
    assert alone.rated.missing > 0
    assert alone.cost.lack == 1 + alone.rated.missing
    assert alone.wait.lack == 1 + alone.rated.missing
    assert together.rated.missing == 0 == together.cost.lack == together.wait.lack
    assert together.wait < alone.wait
    assert game.potential([0b1, 0b1110]).lack >= alone.cost.lack


def test_what_cannot_hold_the_model_is_mended_or_refused():
    small = tuple(
        Device(id=DeviceId(f"d{i}"), label_counts=(32,), memory_bytes=30_000_000) for i in range(6)
    )
    crowd = cm.Crowd(devices=small, default_link=cm.DefaultLink())
    for name in RIVALS:
        found = form_coalitions(PROFILE, crowd, solver=name, compile_peak_bytes=0)
        assert not found.unheld, name
    for solver in ("hedonic", "singletons"):
        with pytest.raises(InfeasibleError, match="no coalition of at most 1 devices"):
            form_coalitions(PROFILE, crowd, solver=solver, compile_peak_bytes=0, max_size=1)


def test_measures_weigh_coalitions_by_their_rows():
    result = form_coalitions(PROFILE, crowd_of(7, 2), max_size=3, sync_s=1.5)
    game = Game(result.problem)
    slowest, mean = game.measures(game.masks(result.structure))
    assert slowest == pytest.approx(result.slowest_round_s)
    assert mean == pytest.approx(result.mean_round_s)
    assert slowest == max(value.round_s for value in result.values)
    by_rows = sum(value.share * value.round_s for value in result.values)
    assert mean == pytest.approx(by_rows)
    assert sum(value.share for value in result.values) == pytest.approx(1.0)
    for value in result.values:
        hazard = sum(
            result.problem.crowd.device(device).leave_hazard_per_s for device, _, _ in value.stages
        )
        work_s = value.steps * value.step_s
        assert value.round_s == pytest.approx(work_s * (1 + 10.0 * hazard) + 1.5)
