"""Placement against brute force, its limits, its bound, and what it says when nothing fits."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdmesh_jax.core import Access, Crowd, Device, DeviceId
from crowdmesh_jax.errors import InvalidCrowdError, InvalidValueError
from crowdmesh_jax.propagation import (
    HazardGroups,
    PlacementProblem,
    PlacementRange,
    Prospect,
    Room,
    feasible,
    place,
)
from crowdmesh_jax.propagation.seats import set_value


def wanting(owner, size, prospects, *, first=0, weight=1.0, wave=None):
    return PlacementRange(
        owner=DeviceId(owner),
        first_layer=first,
        last_layer=first,
        held_bytes=size,
        wave_bytes=size if wave is None else wave,
        weight=weight,
        prospects=tuple(
            Prospect(device=DeviceId(d), presence=p, speed=s) for d, (p, s) in prospects.items()
        ),
    )


def random_problem(rng, *, ranges=3, devices=4):
    names = [f"d{i}" for i in range(devices)]
    owners = [f"o{i}" for i in range(ranges)]
    everyone = names + owners
    groups = {
        f"g{i}": tuple(rng.sample(everyone, rng.randint(1, 3))) for i in range(rng.randint(0, 3))
    }
    items = []
    for i, owner in enumerate(owners):
        items.append(
            wanting(
                owner,
                rng.randint(1, 6),
                {
                    d: (rng.choice([0, 0.1, 0.5, 0.9, 1.0]), rng.choice([0.25, 0.5, 1.0]))
                    for d in names + owners
                    if d != owner
                },
                first=i,
                weight=rng.choice([0.1, 1.0, 1.0]),
                wave=rng.randint(1, 3),
            )
        )
    return PlacementProblem(
        ranges=tuple(items),
        rooms={d: Room(memory_bytes=rng.randint(0, 9), disk_bytes=rng.choice([0, 0, 8]))
               for d in names},
        groups=HazardGroups(members=groups),
        copies=rng.choice([1, 1, 2]),
        wave_bytes=rng.choice([None, 3, 6]),
    )  # fmt: skip


def brute_force(problem):
    seats = [(d, keep) for d in problem.rooms for keep in ("memory", "disk")]
    sets = [c for n in range(problem.copies + 1) for c in itertools.combinations(seats, n)]
    best = (0, 0.0)
    for chosen in itertools.product(sets, repeat=len(problem.ranges)):
        value = (0, 0.0)
        fine = True
        for item, some in zip(problem.ranges, chosen, strict=True):
            by = {p.device: p for p in item.prospects}
            fine = fine and all(
                d in by and by[d].presence >= problem.least_presence for d, _ in some
            )
            if not fine:
                break
            gain = set_value(item, [d for d, _ in some])
            value = (value[0] + gain[0], value[1] + gain[1])
        if fine and value > best and feasible(problem, chosen):
            best = value
    return best


@pytest.mark.parametrize("seed", range(25))
def test_the_exact_search_is_brute_force(seed):
    rng = random.Random(seed)
    problem = random_problem(rng, ranges=rng.choice([2, 3]), devices=3)
    if problem.copies == 2 and len(problem.ranges) == 3:
        problem = random_problem(random.Random(seed + 1000), ranges=2, devices=3)
    found = place(problem)
    assert found.optimal
    assert feasible(problem, found.seats)
    assert found.value == pytest.approx(brute_force(problem))
    assert found.bound == found.value


@settings(max_examples=60)
@given(st.integers(0, 10**9))
def test_the_greedy_keeps_limits_its_guarantee_and_its_certificate(seed):
    problem = random_problem(random.Random(seed))
    exact, greedy = place(problem), place(problem, exact_nodes=0)
    assert feasible(problem, greedy.seats)
    assert not greedy.optimal or greedy.value == exact.value
    assert greedy.value <= exact.value
    assert (greedy.bound[0], greedy.bound[1] + 1e-12) >= exact.value
    assert greedy.value[0] >= greedy.guarantee * exact.value[0] - 1e-12
    assert 0 < greedy.guarantee <= 1


@settings(max_examples=60)
@given(st.integers(0, 10**9), st.randoms())
def test_the_order_of_devices_does_not_matter(seed, shuffler):
    problem = random_problem(random.Random(seed))

    def shuffled(items):
        made = list(items)
        shuffler.shuffle(made)
        return made

    other = PlacementProblem(
        ranges=tuple(
            PlacementRange(
                owner=r.owner, first_layer=r.first_layer, last_layer=r.last_layer,
                held_bytes=r.held_bytes, wave_bytes=r.wave_bytes, weight=r.weight,
                prospects=tuple(shuffled(r.prospects)),
            )
            for r in problem.ranges
        ),
        rooms=dict(shuffled(problem.rooms.items())),
        groups=HazardGroups(members=dict(shuffled(problem.groups.members.items()))),
        copies=problem.copies,
        wave_bytes=problem.wave_bytes,
    )  # fmt: skip
    assert place(other) == place(problem)
    assert place(other, exact_nodes=0) == place(problem, exact_nodes=0)


def test_it_is_presence_times_speed():
    item = wanting("o", 1, {"near": (0.9, 0.5), "fast": (0.5, 1.0), "here": (1.0, 0.4)})
    rooms = {d: Room(memory_bytes=1) for d in ("near", "fast", "here")}
    assert place(PlacementProblem(ranges=(item,), rooms=rooms)).seats == ((("fast", "memory"),),)


def test_the_value_of_two_holders():
    item = wanting("o", 1, {"fast": (0.5, 1.0), "slow": (0.9, 0.4)}, weight=2.0)
    # The fast one with 0.5, else the slow one if it is there: 0.5 + 0.5 * 0.9 * 0.4, twice.
    assert set_value(item, ["slow", "fast"]) == pytest.approx((2_000_000_000, 2 * 0.68))


def test_a_copy_of_everything_comes_before_good_copies():
    good = {"x": (1.0, 1.0), "y": (0.1, 0.1)}
    problem = PlacementProblem(
        ranges=(wanting("o", 2, good), wanting("p", 2, {"x": (0.5, 0.5)}, first=1)),
        rooms={"x": Room(memory_bytes=2), "y": Room(memory_bytes=2)},
    )
    assert place(problem).seats == ((("y", "memory"),), (("x", "memory"),))


def test_memory_first_then_disk():
    problem = PlacementProblem(
        ranges=(wanting("o", 2, {"x": (1, 1)}), wanting("p", 2, {"x": (1, 1)}, first=1)),
        rooms={"x": Room(memory_bytes=3, disk_bytes=2)},
    )
    found = place(problem)
    assert sorted(keep for s in found.seats for _, keep in s) == ["disk", "memory"]
    assert found.protection == "full"
    assert found.tell() == ""


def test_never_two_copies_behind_one_hazard():
    groups = HazardGroups(members={"van": ("o", "x"), "power": ("y", "z")})
    everyone = {"x": (1.0, 1.0), "y": (0.9, 1.0), "z": (0.8, 1.0), "w": (0.1, 0.1)}
    rooms = {d: Room(memory_bytes=9) for d in everyone}
    problem = PlacementProblem(
        ranges=(wanting("o", 1, everyone),), rooms=rooms, groups=groups, copies=2
    )
    for nodes in (0, 20_000):
        (seats,) = place(problem, exact_nodes=nodes).seats
        assert [d for d, _ in seats] == ["y", "w"]


@pytest.mark.parametrize(
    ("change", "lack", "said"),
    [
        ({"prospects": {"x": (0.001, 1.0)}}, "nobody", "no other device is expected"),
        ({"groups": {"cell A": ("o", "x")}}, "hazard", "share a hazard with it: cell A"),
        ({"room": 1_999_999}, "memory", "needs room for 2.0 MB, the most is 2.0 MB at x"),
        ({"wave": 10}, "bytes", "a copy sends 2.0 MB, a wave may send 10 B"),
    ],
)
def test_what_fits_nowhere_is_told_before_training(change, lack, said):
    item = wanting("o", 2_000_000, change.get("prospects", {"x": (1.0, 1.0)}))
    problem = PlacementProblem(
        ranges=(item,),
        rooms={"x": Room(memory_bytes=change.get("room", 9_000_000))},
        groups=HazardGroups(members=change.get("groups", {})),
        wave_bytes=change.get("wave"),
    )
    found = place(problem)
    assert found.protection == "none"
    (bare,) = found.unprotected
    assert (bare.lack, bare.owner) == (lack, "o")
    assert said in bare.detail
    assert "any loss rolls all stages back to version 0" in found.tell()
    assert "the checkpoint of step 40" in found.tell(checkpoint_step=40)


def test_partial_protection_names_whose_loss_hurts():
    problem = PlacementProblem(
        ranges=(wanting("o", 2, {"x": (1, 1)}), wanting("p", 2, {"x": (1, 1)}, first=1)),
        rooms={"x": Room(memory_bytes=2)},
    )
    found = place(problem)
    assert found.protection == "partial"
    (bare,) = found.unprotected
    assert bare.lack == "competition"
    assert f"if {bare.owner} is lost" in found.tell()


def test_no_copies_wanted_is_no_lack():
    item = wanting("o", 2, {"x": (1, 1)})
    found = place(PlacementProblem(ranges=(item,), rooms={"x": Room(memory_bytes=9)}, copies=0))
    assert (found.seats, found.unprotected, found.protection) == (((),), (), "full")


def test_groups_of_a_crowd():
    def device(name, cell):
        access = Access(uplink_bytes_per_s=1, downlink_bytes_per_s=1, cell=cell)
        return Device(id=DeviceId(name), access=access)

    crowd = Crowd(devices=(device("a", "A"), device("b", "A"), device("c", "B")))
    groups = HazardGroups.of(crowd, {"bus": ["b", "c"], "city": ["a", "b", "c"]})
    assert groups.together("a", "b") == {"cell A"}
    assert groups.together("b", "c") == {"bus"}
    assert groups.apart(["a", "c"])
    assert not groups.apart(["a", "b"])
    assert not groups.apart(["a", "a"])
    # What takes everyone excludes nobody, and is named.
    assert groups.common == ("city",)
    assert HazardGroups.of(crowd, cells=False).apart(["a", "b"])
    with pytest.raises(InvalidCrowdError, match="no device 'x'"):
        HazardGroups.of(crowd, {"bus": ["x"]})
    with pytest.raises(InvalidValueError, match="names a device twice"):
        HazardGroups(members={"g": ("a", "a")})
    with pytest.raises(InvalidValueError, match="not 'device"):
        HazardGroups(members={"device a": ("a", "b")})


def test_a_large_case_is_quick_and_bounded():
    rng = random.Random(5)
    names = [f"d{i:03}" for i in range(200)]
    problem = PlacementProblem(
        ranges=tuple(
            wanting(f"o{i}", 5, {d: (rng.random(), rng.random()) for d in names}, first=i)
            for i in range(12)
        ),
        rooms={d: Room(memory_bytes=rng.randint(0, 10)) for d in names},
        copies=1,
    )
    found = place(problem)
    assert feasible(problem, found.seats)
    assert found.protection == "full"
    assert found.value[1] >= 0.9 * found.bound[1]


def test_bad_figures_are_refused():
    with pytest.raises(InvalidValueError, match="presence"):
        Prospect(device=DeviceId("x"), presence=1.5)
    with pytest.raises(InvalidValueError, match="bytes and weight"):
        PlacementProblem(ranges=(wanting("o", -1, {}),), rooms={})
    with pytest.raises(InvalidValueError, match="copies"):
        PlacementProblem(ranges=(), rooms={}, copies=-1)
