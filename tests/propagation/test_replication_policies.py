"""Policies: only the past counts, the order of devices does not, limits hold, rules are kept."""

import dataclasses
import importlib.metadata as metadata
from dataclasses import replace

import numpy as np
import pytest
from replica_worlds import crowd, plan, profile, sightings, view

from crowdmesh_jax.core import Crowd
from crowdmesh_jax.errors import InvalidValueError
from crowdmesh_jax.mobility import (
    Area,
    HeartbeatLog,
    Movement,
    Observer,
    RandomWaypoint,
    Sessions,
    Sightings,
    Snapshot,
)
from crowdmesh_jax.propagation import (
    Budget,
    Costs,
    Departure,
    HazardGroups,
    Heard,
    MobilityPolicy,
    ReplicationPolicy,
    check_decision,
    make_replication_policy,
    replication_policies,
)

NAMES = ("mobility", "neighbour", "next_stage", "central", "none")
DEVICES = tuple("abcdefgh")
RANGE_M = 60.0
NOW = 12


def the_world(seed=3, looks=24) -> list[Snapshot]:
    model = RandomWaypoint(
        area=Area.square(90.0), speed_min_m_per_s=1.0, speed_max_m_per_s=4.0, pause_max_s=1.0
    )
    movement = Movement(model, len(DEVICES), seed=seed, dt_s=1.0)
    shots = []
    for _ in range(looks):
        movement.advance(5)
        shots.append(movement.snapshot())
    return shots


def decisions(policy, shots):
    """What a policy decides at each look, told only through an observer and heartbeats."""
    observer = Observer(
        len(DEVICES), np.random.default_rng(5), position_noise_m=1.0, velocity_noise_m_per_s=0.2
    )
    log = HeartbeatLog(len(DEVICES), period_s=5.0, timeout_s=15.0)
    there, made = crowd(" ".join(DEVICES)), []
    standing, handovers = None, ()
    for index, shot in enumerate(shots):
        seen = observer.observe(shot)
        # Who is far out is not heard: heartbeats depend on places, as they do.
        log.hear(shot.time_s, np.hypot(*(shot.positions_m - 45.0).T) < 55.0)
        decided = policy.decide(
            view(
                crowd=there, sightings=seen, range_m=RANGE_M, standing=standing,
                heard=Heard(present=log.present, sessions=log.sessions()), handovers=handovers,
                costs=Costs(step_s=0.5, crash_per_s=1e-4),
            )
        )  # fmt: skip
        standing, handovers = decided.replicas, decided.handovers
        made.append((index, decided))
    return made


def with_another_future(shots, seed=9):
    """The same until now; places after it belong to other devices at other times."""
    rng = np.random.default_rng(seed)
    after = rng.permutation(np.arange(NOW, len(shots)))
    changed = list(shots[:NOW])
    for place, source in zip(range(NOW, len(shots)), after, strict=True):
        who = rng.permutation(len(DEVICES))
        changed.append(
            replace(
                shots[place],
                positions_m=shots[source].positions_m[who],
                velocities_m_per_s=shots[source].velocities_m_per_s[who],
            )
        )
    return changed


@pytest.mark.parametrize("name", NAMES)
def test_a_permuted_future_changes_no_decision(name):
    shots = the_world()
    one = decisions(make_replication_policy(name), shots)
    other = decisions(make_replication_policy(name), with_another_future(shots))
    assert one[:NOW] == other[:NOW]
    # The future did change: from there on, who follows positions decides otherwise.
    if name == "mobility":
        assert one[NOW:] != other[NOW:]
        assert len({d.replicas.ranges for _, d in one}) > 3
        assert any(d.handovers for _, d in one)


def test_a_view_has_no_place_for_a_future():
    """No field can carry a movement, a trace, or a generator; sightings end at their now."""
    told = {f.name: str(f.type) for f in dataclasses.fields(view())}
    for kind in ("Movement", "Trace", "Recorded", "Snapshot", "Generator", "Scenario"):
        assert not [name for name, text in told.items() if kind in text]
    shots = the_world(looks=6)
    observer = Observer(len(DEVICES), np.random.default_rng(5), delay_s=8.0)
    for shot in shots:
        seen = observer.observe(shot)
        assert (seen.seen_s[seen.known] <= seen.now_s - 8.0).all()


def a_full_view(seed=4):
    rng = np.random.default_rng(seed)
    places = {d: tuple(rng.uniform(0, 60, 2)) for d in DEVICES}
    speeds = {d: tuple(rng.uniform(-2, 2, 2)) for d in DEVICES}
    device = rng.integers(0, len(DEVICES), 30)
    sessions = Sessions.of(
        device, rng.uniform(5, 300, 30), rng.random(30) < 0.7, devices=len(DEVICES)
    )
    return view(
        crowd=crowd(
            " ".join(DEVICES),
            flops={d: float(rng.choice([1e6, 2e6])) for d in DEVICES},
            hazard={d: float(rng.uniform(0, 1e-3)) for d in DEVICES},
        ),
        sightings=sightings(places, speeds, sd=0.2),
        range_m=RANGE_M,
        heard=Heard(present=np.ones(len(DEVICES), bool), sessions=sessions),
        budget=Budget(copies=2, disk_bytes=dict.fromkeys(DEVICES, 50_000)),
        groups=HazardGroups(members={"van": ("c", "d"), "power": ("e", "f", "a")}),
        departures=(Departure(device="b", leaves_s=4.0, sd_s=1.0),),  # pyright: ignore
    )


def reordered(old, order):
    ids = tuple(old.ids[i] for i in order)
    seen, heard = old.sightings, old.heard
    to_new = np.argsort(order)
    turn = np.arange(len(heard.sessions.device))[::-1]
    return replace(
        old,
        ids=ids,
        crowd=replace(old.crowd, devices=tuple(old.crowd.devices[i] for i in order)),
        sightings=Sightings(
            now_s=seen.now_s,
            **{
                n: getattr(seen, n)[order]
                for n in ("seen_s", "positions_m", "velocities_m_per_s", "velocity_sd_m_per_s",
                          "occupants")
            },
        ),
        heard=Heard(
            present=heard.present[order],
            sessions=Sessions.of(
                to_new[heard.sessions.device][turn],
                heard.sessions.duration_s[turn],
                heard.sessions.ended[turn],
                devices=len(ids),
            ),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_equal_views_equal_decisions_in_any_order_of_devices(name):
    policy, first = make_replication_policy(name), a_full_view()
    decided = policy.decide(first)
    assert policy.decide(first) == decided == make_replication_policy(name).decide(a_full_view())
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(DEVICES))
        assert policy.decide(reordered(first, order)) == decided


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "budget",
    [
        Budget(),
        Budget(copies=2),
        Budget(wave_bytes=9_000),
        Budget(wave_bytes=0),
        Budget(memory_bytes=dict.fromkeys(DEVICES, 12_000)),
        Budget(memory_bytes=dict.fromkeys(DEVICES, 0), disk_bytes={"b": 20_000, "h": 12_000}),
    ],
)
def test_every_policy_keeps_every_limit(name, budget):
    here = replace(a_full_view(), budget=budget)
    decided = make_replication_policy(name).decide(here)
    assert check_decision(here, decided) == []
    assert decided.replicas.policy == name
    if name != "none":
        bare = {r.owner for r in decided.replicas.unprotected}
        assert {u.owner for u in decided.unprotected} == bare
    if budget.wave_bytes == 0:
        assert not any(r.replicas for r in decided.replicas.ranges)


def test_mobility_never_puts_two_copies_behind_one_hazard():
    here = a_full_view()
    decided = MobilityPolicy().decide(here)
    assert any(len(r.holders) == 2 for r in decided.replicas.ranges)
    for item in decided.replicas.ranges:
        assert here.groups.apart([item.owner, *item.holders])


def holders(decided):
    return {r.owner: r.holders for r in decided.replicas.ranges}


def test_next_stage_is_asteroids_rule():
    decided = make_replication_policy("next_stage").decide(view())
    assert holders(decided) == {"a": ("b",), "b": ("c",), "c": ("a",)}


def test_neighbour_is_ftpipehds_rule():
    decided = make_replication_policy("neighbour", chain_steps=50, global_steps=100).decide(view())
    assert holders(decided) == {"a": ("b",), "b": ("c", "a"), "c": ("a",)}
    every = [[r.interval_steps for r in i.replicas] for i in decided.replicas.ranges]
    assert every == [[50], [50, 100], [50]]
    tuned = make_replication_policy("neighbour").decide(view())
    chain, everything = (r.interval_steps for r in tuned.replicas.ranges[1].replicas)
    assert everything == 2 * chain


def test_central_goes_to_the_device_that_stays():
    there = crowd(hazard={"a": 0.1, "b": 0.1, "c": 0.1, "d": 0.1, "e": 0.01})
    decided = make_replication_policy("central").decide(view(crowd=there))
    assert holders(decided) == dict.fromkeys("abc", ("e",))
    own = make_replication_policy("central", device="b").decide(view())
    assert holders(own) == {"a": ("b",), "b": (), "c": ("b",)}
    assert [u.owner for u in own.unprotected] == ["b"]


def test_none_wants_nothing():
    decided = make_replication_policy("none").decide(view())
    assert holders(decided) == dict.fromkeys("abc", ())
    assert decided.handovers == ()


STILL = {"a": (0, 0), "b": (10, 0), "c": (20, 0), "d": (10, 10), "e": (12, 10)}


def test_mobility_follows_who_will_be_there():
    going = view(sightings=sightings(STILL, {"d": (5.0, 0.0)}, sd=0.1), range_m=50.0)
    assert set(holders(MobilityPolicy().decide(going))["b"]) == {"e"}
    other = view(sightings=sightings(STILL, {"e": (5.0, 0.0)}, sd=0.1), range_m=50.0)
    assert set(holders(MobilityPolicy().decide(other))["b"]) == {"d"}


def test_mobility_weighs_presence_with_speed():
    fast = view(crowd=crowd(flops={"d": 4e6}, hazard={"d": 1e-4}))
    assert holders(MobilityPolicy().decide(fast))["a"] == ("d",)
    leaving = view(crowd=crowd(flops={"d": 4e6}, hazard={"d": 1.0}))
    assert holders(MobilityPolicy().decide(leaving))["a"] != ("d",)


def test_mobility_asks_nobody_who_is_out_of_range_or_absent():
    far = view(sightings=sightings(STILL | {"d": (500, 0)}, sd=0.1), range_m=50.0)
    decided = MobilityPolicy().decide(far)
    assert all("d" not in h for h in holders(decided).values())
    sessions = Sessions.of([], [], [], devices=5)
    heard = Heard(present=np.array([1, 1, 1, 0, 1], bool), sessions=sessions)
    for name in ("mobility", "central"):
        absent = make_replication_policy(name).decide(view(heard=heard))
        assert all("d" not in h for h in holders(absent).values())


def test_a_trifle_moves_no_copy():
    even = view(crowd=crowd("a b c d e", flops={"d": 2.0e6, "e": 2.1e6}))
    first = MobilityPolicy().decide(even)
    assert holders(first)["a"] == ("e",)
    # Now e is a little less likely to stay.
    later = view(crowd=crowd("a b c d e", flops={"d": 2.1e6, "e": 2.0e6}), standing=first.replicas)
    assert holders(MobilityPolicy().decide(later))["a"] == ("e",)
    assert holders(MobilityPolicy(stick=1.0).decide(later))["a"] == ("d",)


def test_a_departure_that_is_told_is_handed_over():
    soon = view(departures=(Departure(device="b", leaves_s=4.0, sd_s=1.0),))  # pyright: ignore
    (move,) = MobilityPolicy().decide(soon).handovers
    assert (move.owner, move.first_layer, move.last_layer) == ("b", 2, 3)
    assert move.target in "de"
    assert MobilityPolicy(handover=None).decide(soon).handovers == ()
    assert make_replication_policy("neighbour").decide(soon).handovers == ()
    later = view(departures=(Departure(device="b", leaves_s=900.0, sd_s=1.0),))  # pyright: ignore
    assert MobilityPolicy().decide(later).handovers == ()


def test_of_two_that_drift_apart_the_one_that_leaves_the_others_hands_over():
    away = view(sightings=sightings(STILL, {"c": (10.0, 0.0)}, sd=0.1), range_m=50.0)
    assert [h.owner for h in MobilityPolicy().decide(away).handovers] == ["c"]


def test_hand_overs_lengthen_the_interval():
    hazards = dict.fromkeys("abc", 0.01)
    with_them = MobilityPolicy().decide(view(crowd=crowd(hazard=hazards)))
    without = MobilityPolicy(handover=None).decide(view(crowd=crowd(hazard=hazards)))
    assert with_them.replicas.interval_steps > without.replicas.interval_steps
    # The byte budget stretches it for everyone.
    slow = Budget(bulk_bytes_per_s=100.0)
    for name in NAMES[:-1]:
        here = view(crowd=crowd(hazard=hazards), budget=slow)
        decided = make_replication_policy(name).decide(here)
        sent = sum(6000 * len(r.replicas) for r in decided.replicas.ranges)
        assert decided.replicas.interval_steps >= sent / 100


def test_without_room_it_says_so_and_what_remains():
    decided = MobilityPolicy().decide(view(budget=Budget(memory_bytes=dict.fromkeys("abcde", 0))))
    assert {u.lack for u in decided.unprotected} == {"memory"}
    assert "any loss rolls all stages back" in decided.notes[0]


class Fixed:
    name = "fixed"

    def __init__(self, steps=3):
        self.steps = steps

    def decide(self, view):
        return make_replication_policy("next_stage", interval_steps=self.steps).decide(view)


def test_policies_by_name_and_from_other_packages(monkeypatch):
    assert tuple(replication_policies()) == NAMES
    for name in NAMES:
        assert isinstance(make_replication_policy(name), ReplicationPolicy)
        assert make_replication_policy(name).name == name
    point = metadata.EntryPoint("fixed", f"{__name__}:Fixed", "crowdmesh_jax.replication_policies")
    monkeypatch.setattr(metadata.EntryPoint, "load", lambda self: Fixed)
    monkeypatch.setattr(
        metadata, "entry_points", lambda *, group: [point] if group == point.group else []
    )
    assert list(replication_policies())[-1] == "fixed"
    decided = make_replication_policy("fixed", steps=7).decide(view())
    assert decided.replicas.interval_steps == 7
    own = Fixed()
    assert make_replication_policy(own) is own
    with pytest.raises(InvalidValueError, match="did you mean 'mobility'"):
        make_replication_policy("mobilty")
    with pytest.raises(InvalidValueError, match="does not take these options"):
        make_replication_policy("none", speed=1)
    with pytest.raises(InvalidValueError, match="it has no decide"):
        make_replication_policy(object())  # pyright: ignore
    with pytest.raises(InvalidValueError, match="come with a replication policy's name"):
        make_replication_policy(own, steps=1)


def test_bad_options_and_views_are_refused():
    for options in ({"horizon_s": 0}, {"missed_share": 2}, {"stick": 0.5}):
        with pytest.raises(InvalidValueError, match=next(iter(options))):
            MobilityPolicy(**options)
    with pytest.raises(InvalidValueError, match="chain_steps"):
        make_replication_policy("neighbour", chain_steps=0)
    with pytest.raises(InvalidValueError, match="interval_steps"):
        make_replication_policy("next_stage", interval_steps=0)
    with pytest.raises(InvalidValueError, match="5 rows, ids names 1"):
        view(ids=("a",), sightings=sightings(STILL))
    with pytest.raises(InvalidValueError, match="ids must differ"):
        view(ids=("a", "a"))
    with pytest.raises(InvalidValueError, match="step_s"):
        Costs(step_s=0.0)
    with pytest.raises(InvalidValueError, match="changed_share"):
        Costs(step_s=1.0, changed_share=1.5)
    with pytest.raises(InvalidValueError, match="bulk_bytes_per_s"):
        Budget(bulk_bytes_per_s=0.0)


def test_a_single_stage_and_a_lone_device():
    alone = view(crowd=crowd("a"), plan=plan("a"), profile=profile())
    for name in NAMES:
        decided = make_replication_policy(name).decide(alone)
        assert holders(decided) == {"a": ()}
    pair = view(crowd=crowd("a b"), plan=plan("a"))
    assert holders(MobilityPolicy().decide(pair)) == {"a": ("b",)}
    assert isinstance(pair.crowd, Crowd)
