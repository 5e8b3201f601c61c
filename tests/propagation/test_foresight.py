"""The chain rule: links that last, one stop for several stages, who takes over."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replica_worlds import crowd, plan, profile, sightings, view

from crowdmesh_jax.core import DefaultLink, Link
from crowdmesh_jax.errors import InvalidValueError
from crowdmesh_jax.propagation import (
    Ahead,
    Budget,
    ChainRule,
    Costs,
    Departure,
    HazardGroups,
    Holding,
    MobilityPolicy,
    best_chain,
)
from crowdmesh_jax.propagation.foresight import step_share
from crowdmesh_jax.propagation.policies.planning import whole_copy_s

RULE = ChainRule()
NAMES = tuple("abcdefg")


def a_view(places, velocities=None, *, owners="a b", sd=0.0, speeds=None, held=(), range_m=50.0):
    return view(
        crowd=crowd(" ".join(places), flops=speeds),
        plan=plan(owners, layers=len(owners.split()), microbatches=8),
        profile=profile(len(owners.split()), microbatches=8),
        sightings=sightings(places, velocities, sd=sd),
        range_m=range_m,
        costs=Costs(step_s=1.0, changed_share=0.3),
        holdings=tuple(
            Holding(device=d, first_layer=s, last_layer=s, version=v, age_s=0.0, size_bytes=3000)
            for d, s, v in held
        ),
    )


def test_a_link_lasts_as_long_as_straight_motion_says():
    seen = a_view({"a": (0.0, 0.0), "b": (10.0, 0.0)}, {"b": (1.0, 0.0)})
    ahead = Ahead.of(seen, replace(RULE, persistence_s=1e6))
    assert ahead is not None
    # It ends after 40 s, between the grid's 32 and 64.
    assert ahead.chance_at(32.0)[0, 1] > 0.99
    assert ahead.chance_at(64.0)[0, 1] < 0.01
    assert 32 <= 1 / ahead.rate_per_s[0, 1] <= 64
    assert 32 < ahead.breaks_s((0, 1)) < 64
    assert ahead.breaks_s((0,)) == 1024, "as far as is looked"
    assert np.array_equal(ahead.rate_per_s, ahead.rate_per_s.T)
    assert not ahead.near[0, 0]


def test_chances_never_rise_and_noise_blurs_them():
    places = {name: (12.0 * i, 3.0 * (i % 2)) for i, name in enumerate(NAMES)}
    velocities = {name: (0.3 * (i - 3), 0.2) for i, name in enumerate(NAMES)}
    for sd in (0.0, 0.2):
        ahead = Ahead.of(a_view(places, velocities, sd=sd), RULE)
        assert ahead is not None
        assert (np.diff(ahead.chance, axis=0) <= 1e-12).all()
        assert ((ahead.chance >= 0) & (ahead.chance <= 1)).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), stages=st.integers(1, 3))
def test_the_best_chain_is_the_one_that_trying_all_finds(seed, stages):
    rng = np.random.default_rng(seed)
    count = 6
    near = np.triu(rng.random((count, count)) < 0.6, 1)
    near = near | near.T
    falls = np.triu(rng.uniform(0.3, 1.0, (11, count, count)), 1)
    chance = np.cumprod(falls + falls.transpose(0, 2, 1), axis=0)
    chance[0] = 1.0
    ahead = Ahead(
        ids=NAMES[:count],
        near=near,
        chance=chance,
        rate_per_s=np.full((count, count), 0.01),
        stage_s=rng.uniform(0.5, 1.5, (stages, count)),
    )
    needs_s = rng.choice([0.0, 3.0, math.inf], (stages, count))
    ahead_s = rng.choice([0.0, 10.0], (stages, count))
    owners = tuple(int(v) for v in rng.permutation(count)[:stages])
    times_s = [0.0, *(2.0**power for power in range(1, 11))]

    def stays(chain, second):
        one = [math.prod(chance[i, a, b] for a, b in itertools.pairwise(chain)) for i in range(11)]
        return float(np.interp(second, times_s, one))

    def g(chain):
        moved = [s for s in range(stages) if chain[s] != owners[s]]
        times = [ahead.stage_s[s, d] for s, d in enumerate(chain)]
        fastest = ahead.stage_s.min(axis=1)
        t = (sum(times) + 7 * max(times)) / (fastest.sum() + 7 * fastest.max())
        early_s = max(ahead_s[s, chain[s]] for s in moved)
        waits_s = max(needs_s[s, chain[s]] for s in moved)
        cost = RULE.stop_s + waits_s + 0.1 * early_s + RULE.stage_s * len(moved)
        if not math.isfinite(cost):
            return math.inf
        cost += 15 * (stays(owners, RULE.look_s) - stays(owners, RULE.look_s + early_s))
        lead_s = RULE.look_s + early_s + RULE.stop_s + waits_s
        rates, kept_s, led = [], 0.0, stays(chain, lead_s)
        for before, after in itertools.pairwise(times_s):
            kept_s += (stays(chain, before) + stays(chain, after)) / 2 * (after - before)
            lost = 1 - led + RULE.missed * max(0.0, led - stays(chain, after))
            if after >= lead_s:
                rates.append((cost + 15 * lost) / kept_s)
        return t * (1 + min(rates))

    chains = [
        chain
        for chain in itertools.permutations(range(count), stages)
        if chain != owners and all(near[a, b] for a, b in itertools.pairwise(chain))
        and all(near[d].any() for d in chain if d not in owners)
    ]  # fmt: skip
    values = [g(chain) for chain in chains]
    found = best_chain(
        ahead, RULE, microbatches=8, owners=owners, needs_s=needs_s, ahead_s=ahead_s, slowdown=0.1,
        loss_s=15.0,
    )  # fmt: skip
    if not values or not math.isfinite(min(values)):
        assert found is None
    else:
        assert found is not None
        assert found.g == pytest.approx(min(values))
        assert g(found.chain) == pytest.approx(found.g)


def test_a_stage_moves_before_its_link_ends_and_not_long_before():
    def moves(distance_m):
        places = {"a": (0.0, 0.0), "b": (distance_m, 0.0), "c": (10.0, 5.0)}
        seen = a_view(places, {"b": (1.0, 0.0)}, held=[("c", 1, 5)])
        return MobilityPolicy().moves(seen)

    assert moves(5.0) == ()
    (move,) = moves(48.5)
    assert (move.owner, move.target, move.first_layer) == ("b", "c", 1)


def test_several_stages_move_together_where_one_alone_would_not_last():
    """b and c go away together; d could replace b for a while, d and e both for good."""
    places = {"a": (0.0, 0.0), "b": (48.0, 0.0), "c": (49.0, 0.0), "d": (10.0, 10.0),
              "e": (12.0, 14.0)}  # fmt: skip
    seen = a_view(
        places, {"b": (1.0, 0.0), "c": (1.0, 0.0)}, owners="a b c",
        held=[(d, s, 5) for d in "de" for s in (0, 1, 2)],
    )  # fmt: skip
    moved = MobilityPolicy().moves(seen)
    assert {m.owner for m in moved} == {"b", "c"}
    assert {m.target for m in moved} == {"d", "e"}


def test_who_holds_a_copy_takes_over_and_those_that_live_stay():
    places = {"a": (0.0, 0.0), "b": (10.0, 0.0), "c": (5.0, 5.0), "d": (6.0, 5.0)}
    seen = a_view(places, owners="a b", held=[("d", 1, 9)])
    silent = np.array([True, False, True, True])
    heard = replace_heard(seen, silent)
    assert MobilityPolicy().take_over(heard, [1]) == ("a", "d")
    far = {**places, "c": (500.0, 0.0), "d": (500.0, 300.0)}
    nobody = replace_heard(a_view(far, owners="a b"), silent)
    assert MobilityPolicy().take_over(nobody, [1]) is None


def replace_heard(seen, present):
    from crowdmesh_jax.mobility import Sessions
    from crowdmesh_jax.propagation import Heard

    sessions = Sessions.of([], [], [], devices=len(present))
    return replace(seen, heard=Heard(present=present, sessions=sessions))


def test_the_order_of_devices_does_not_matter():
    rng = np.random.default_rng(3)
    places = {name: tuple(rng.uniform(0, 60, 2)) for name in NAMES}
    velocities = {name: tuple(rng.uniform(-1, 1, 2)) for name in NAMES}
    speeds = {name: float(v) for name, v in zip(NAMES, rng.uniform(5e5, 1e6, 7), strict=True)}
    held = [(name, stage, 3) for name in NAMES for stage in (0, 1)]
    answers = set()
    for order in (NAMES, NAMES[::-1]):
        seen = a_view(
            {n: places[n] for n in order}, {n: velocities[n] for n in order}, speeds=speeds,
            held=held,
        )  # fmt: skip
        answers.add((MobilityPolicy().moves(seen), MobilityPolicy().take_over(seen, [0])))
    assert len(answers) == 1


@pytest.mark.parametrize(
    "field", ["persistence_s", "turn_s", "look_s", "gain", "candidates", "missed", "far_share"]
)
def test_a_rule_that_cannot_be_is_refused(field):
    with pytest.raises(InvalidValueError, match=field):
        replace(RULE, **{field: -1})


def test_who_turned_lately_is_not_expected_to_go_on_straight():
    places = {"a": (0.0, 0.0), "b": (10.0, 0.0), "c": (0.0, 9.0)}
    seen = a_view(places, {"b": (1.0, 0.0), "c": (0.0, -1.0)})
    assert seen.sightings is not None
    chances = []
    for straight_s in (1.0, 300.0):
        lately = replace(seen.sightings, straight_s=np.full(3, straight_s))
        ahead = Ahead.of(replace(seen, sightings=lately), RULE)
        assert ahead is not None
        chances.append(float(ahead.chance_at(64.0)[0, 1]))
    # Straight on, b is gone after 40 s.
    assert chances[0] > 0.3 > 0.15 > chances[1]


def test_what_links_of_a_chain_promise_together_is_the_product():
    places = {"a": (0.0, 0.0), "b": (40.0, 0.0), "c": (80.0, 0.0)}
    ahead = Ahead.of(a_view(places, {"b": (0.0, 0.3)}, owners="a b c"), RULE)
    assert ahead is not None
    both = ahead.lasts_until((0, 1, 2), 32.0)
    assert both == pytest.approx(float(ahead.chance_at(32.0)[0, 1] * ahead.chance_at(32.0)[1, 2]))


def test_the_nearer_of_two_that_lack_a_lost_stage_takes_it():
    """d and e are as fast; only e is in range of the one copy, at f."""
    places = {"a": (0.0, 0.0), "b": (10.0, 0.0), "c": (-49.0, 0.0), "d": (-46.0, 5.0),
              "e": (5.0, 5.0), "f": (20.0, 0.0)}  # fmt: skip
    speeds = dict.fromkeys("abcde", 1000000.0) | {"f": 1e5}
    seen = a_view(places, owners="a b", held=[("f", 1, 9)], speeds=speeds)
    heard = replace_heard(seen, np.array([True, False, True, True, True, True]))
    assert MobilityPolicy().take_over(heard, [1]) == ("a", "e")


def test_second_copies_go_to_those_that_never_had_the_stage_until_all_had_it():
    places = {name: (3.0 * i, 2.0 * (i % 2)) for i, name in enumerate("abcde")}
    speeds = {"a": 9e5, "b": 9e5, "c": 1e6, "d": 1e6, "e": 9e5}
    for who, last in (("abcd", "e"), ("abcde", "d")):
        held = [(device, stage, 1) for device in who for stage in (0, 1)]
        seen = a_view(places, owners="a b", held=held, speeds=speeds)
        plan = MobilityPolicy().decide(replace(seen, budget=Budget(copies=2))).replicas
        for item in plan.ranges:
            assert list(item.holders) == ["c", last]


def test_no_newcomer_is_asked_who_goes_is_full_or_shares_a_hazard():
    """e would be the one for both stages; else the last holders stay."""
    places = {name: (3.0 * i, 2.0 * (i % 2)) for i, name in enumerate("abcde")}
    speeds = {"a": 9e5, "b": 9e5, "c": 1e6, "d": 1e6, "e": 9e5}
    held = [(device, stage, 1) for device in "abcd" for stage in (0, 1)]

    def last(velocities=None, link=1e6, **fields):
        seen = a_view(places, velocities, owners="a b", held=held, speeds=speeds)
        slow = DefaultLink(bandwidth_bytes_per_s=link, latency_s=0.0)
        fields = {"budget": Budget(copies=2), **fields}
        made = MobilityPolicy().decide(
            replace(seen, crowd=replace(seen.crowd, default_link=slow), **fields)
        )
        return [item.holders[-1] for item in made.replicas.ranges]

    assert last() == ["e", "e"]
    walks = {"e": (2.0, 0.0)}
    assert last(walks) == ["e", "e"], "a copy is there at once"
    assert last(walks, link=100.0) == ["d", "d"], "a copy takes 30 s"
    assert last(budget=Budget(copies=2, memory_bytes={"e": 0})) == ["d", "d"]
    one = Budget(copies=2, memory_bytes={"e": 3000 * 2})
    assert last(budget=one) == ["e", "d"], "room for both versions of one stage"
    assert last(groups=HazardGroups(members={"van": ("a", "e")})) == ["d", "e"]


def test_stages_of_unequal_weight_are_measured_by_the_fastest_devices():
    """b is 10 % slower than c; a stage that weighs next to nothing does not hide that."""
    places = {"a": (0.0, 0.0), "b": (1.0, 0.0), "c": (0.0, 1.0)}
    ahead = Ahead.of(a_view(places, owners="a b"), RULE)
    assert ahead is not None
    times = np.array([[1e-9, 1e-9, 1e-9], [1.0, 1.1, 1.0]])
    assert step_share(replace(ahead, stage_s=times), (0, 1), 8) == pytest.approx(1.1)
    nothing = replace(ahead, stage_s=np.array([[0.0, 0.0, 0.0], [1.0, 1.1, 1.0]]))
    choice = best_chain(
        nothing, RULE, microbatches=8, owners=(0, 1), needs_s=np.zeros((2, 3)),
        ahead_s=np.zeros((2, 3)), slowdown=0.1,
    )  # fmt: skip
    assert choice is not None
    assert math.isfinite(choice.g)
    assert choice.chain[1] == 2


@pytest.mark.parametrize("stages", [6, 12])
def test_long_chains_move_one_or_two_stages_at_a_stop(stages):
    """The best of all such moves, though not all orders of candidates can be tried."""
    rng = np.random.default_rng(stages)
    count = stages + 5
    chance = np.ones((11, count, count)) * np.linspace(1.0, 0.5, 11)[:, None, None]
    stage_s = np.tile(rng.uniform(0.8, 1.2, count), (stages, 1))
    ahead = Ahead(
        ids=tuple(f"d{i:02}" for i in range(count)),
        near=~np.eye(count, dtype=bool),
        chance=chance,
        rate_per_s=np.full((count, count), 0.01),
        stage_s=stage_s,
    )
    slow = np.argsort(-stage_s[0])[:stages]
    owners = tuple(int(row) for row in slow)
    found = best_chain(
        ahead, RULE, microbatches=8, owners=owners, needs_s=np.zeros((stages, count)),
        ahead_s=np.zeros((stages, count)), slowdown=0.1,
    )  # fmt: skip
    assert found is not None
    moved = [s for s in range(stages) if found.chain[s] != owners[s]]
    assert sorted(moved) == sorted(np.argsort(-stage_s[0][list(owners)])[:2]), "the two slowest"
    idle = sorted(set(range(count)) - set(owners), key=lambda row: stage_s[0][row])
    assert {found.chain[s] for s in moved} == set(idle[:2]), "the two fastest"


def test_who_never_turned_may_be_told_as_such():
    seen = a_view({"a": (0.0, 0.0), "b": (10.0, 0.0), "c": (0.0, 9.0)}, {"b": (1.0, 0.0)})
    assert seen.sightings is not None
    for straight_s in ([math.inf, 5.0, math.nan], [math.nan] * 3):
        told = replace(seen, sightings=replace(seen.sightings, straight_s=np.array(straight_s)))
        ahead = Ahead.of(told, RULE)
        assert ahead is not None
        assert np.isfinite(ahead.chance).all()
        MobilityPolicy().decide(told)


def test_nothing_moves_to_who_has_no_link_or_has_announced_to_leave():
    """b walks away; c and d stand beside a."""
    places = {"a": (0.0, 0.0), "b": (46.0, 0.0), "c": (5.0, 0.0), "d": (0.0, 5.0)}
    seen = a_view(places, {"b": (1.0, 0.0)}, speeds={"c": 2e6})
    assert [str(m.target) for m in MobilityPolicy().decide(seen).handovers] == ["c"]
    gone = replace(seen, departures=(Departure(device="c", leaves_s=30.0),))  # pyright: ignore
    assert [str(m.target) for m in MobilityPolicy().decide(gone).handovers] == ["d"]
    later = replace(seen, departures=(Departure(device="c", leaves_s=3600.0),))  # pyright: ignore
    assert [str(m.target) for m in MobilityPolicy().decide(later).handovers] == ["c"]
    for apart, targets in (({"a", "b", "c", "d"}, ["d"]), ({"a", "c"}, ["d", "c"])):
        links = tuple(
            Link(source=x, target=y, bandwidth_bytes_per_s=1e6, latency_s=0.001)
            for x, y in itertools.permutations("abcd", 2)
            if "c" not in (x, y) or not {x, y} <= apart
        )  # fmt: skip
        some = replace(seen, crowd=replace(seen.crowd, default_link=None, links=links))
        found = [str(m.target) for m in MobilityPolicy().decide(some).handovers]
        assert found == targets, "c has no link to those"
    # Nor does it matter whose link comes first.
    backwards = replace(some, crowd=replace(some.crowd, devices=some.crowd.devices[::-1]))
    assert MobilityPolicy().decide(backwards).handovers == MobilityPolicy().decide(some).handovers


def test_how_long_a_copy_takes_follows_from_its_size_and_the_fastest_link():
    """Of two stages of 3000 bytes each; d's link to a is twice as fast."""
    seen = a_view({name: (float(i), 0.0) for i, name in enumerate("abcd")}, owners="a b")
    assert whole_copy_s(seen) == pytest.approx(3000 / 1e6)
    links = tuple(
        Link(source=x, target=y, bandwidth_bytes_per_s=rate, latency_s=0.001)
        for x, y, rate in (("a", "d", 2e6), ("a", "b", 1e6), ("b", "a", 5e5), ("b", "c", 1e5))
    )
    slow = replace(seen, crowd=replace(seen.crowd, default_link=None, links=links))
    assert whole_copy_s(slow) == pytest.approx(3000 / 5e5)
    turned = a_view(dict.fromkeys("abcd", (0.0, 0.0)), owners="b a")
    assert whole_copy_s(replace(turned, crowd=slow.crowd)) == pytest.approx(3000 / 5e5)
    nobody = replace(seen, crowd=replace(seen.crowd, default_link=None))
    assert whole_copy_s(nobody) == 0.0
