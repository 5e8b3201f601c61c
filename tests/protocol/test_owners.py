"""Who keeps copies: the ring, its room, and no two copies behind one hazard."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from crowdmesh_jax.core import PipelinePlan
from crowdmesh_jax.protocol import OwnersNeed, choose_owners
from crowdmesh_jax.protocol.owners import CopyRoom, ring_holders

PLAN = PipelinePlan.even(6, ["d0", "d1", "d2"], microbatches=4)
PARTY = ("d0", "d1", "d2", "s0", "s1")
NAMES = ("cell", "power", "van")


def held(hazards: Any = None, copies: int = 1, party: Any = PARTY, **more: Any) -> list[Any]:
    found = ring_holders(PLAN, party, copies=copies, hazards=hazards, **more)
    return [entry.devices for entry in found]


def test_without_hazards_spares_come_first_then_the_ring():
    assert held() == [("s0",), ("s1",), ("s0",)]
    assert held(copies=3) == [("s0", "s1", "d1"), ("s1", "s0", "d2"), ("s0", "s1", "d0")]
    assert held({}) == held({"x": ("van",)}) == held(), "nobody here is in it"


def test_an_owner_who_is_not_among_the_devices_is_given_no_copies():
    """It leaves, or does not store what it should."""
    assert held(copies=2, party=("d0", "d2", "s0")) == [("s0", "d2"), ("s0", "d2"), ("s0", "d0")]


def test_a_copy_is_not_behind_its_owners_hazard():
    van = {"d0": ("van",), "s0": ("van",), "d2": ("power",), "s1": ("power",)}
    assert held(van) == [("s1",), ("s1",), ("s0",)]


def test_two_copies_of_a_stage_are_not_behind_one_hazard():
    van = dict.fromkeys(("s0", "s1"), ("van",))
    assert held(van, copies=2) == [("s0", "d1"), ("s1", "d2"), ("s0", "d0")]
    by_two = {"s0": ("van", "cell"), "s1": ("power",), "d1": ("cell",)}
    assert held(by_two, copies=2)[0] == ("s0", "s1"), "of several hazards one is enough"
    assert held({**by_two, "s1": ("cell",)}, copies=2)[0] == ("s0", "d2")


def test_what_is_missing_is_filled_and_behind_the_owners_hazard_at_the_very_last():
    near = {"d0": ("van",), "s0": ("van",), "d1": ("power",), "d2": ("power",)}
    few = ("d0", "d1", "d2", "s0")
    # d1 and d2 share a hazard with each other, s0 with the owner.
    assert held(near, copies=2, party=few)[0] == ("d1", "d2")
    assert held(near, copies=3, party=few)[0] == ("d1", "d2", "s0")
    everyone = dict.fromkeys(few, ("city",))
    assert held(everyone, copies=2, party=few) == held(copies=2, party=few)


def test_a_poor_copy_takes_no_room_from_a_good_one():
    room = CopyRoom(layer_bytes=(10,) * 6, device_bytes={"s0": 40, "d0": 0, "d1": 0, "d2": 0})
    van = {"d0": ("van",), "s0": ("van",)}
    assert held(van, party=PARTY[:4], room=room) == [(), ("s0",), ()], "one copy fits there"
    assert held(None, party=PARTY[:4], room=room) == [("s0",), (), ()]
    alone = CopyRoom(layer_bytes=(10,) * 6, device_bytes={**room.device_bytes, "s0": 80})
    assert held(van, party=PARTY[:4], room=alone) == [(), ("s0",), ("s0",)]
    enough = CopyRoom(layer_bytes=(10,) * 6, device_bytes={**room.device_bytes, "s0": 120})
    assert held(van, party=PARTY[:4], room=enough) == [("s0",), ("s0",), ("s0",)], (
        "better than none"
    )


def test_who_takes_over_gets_holders_apart_from_its_own_hazards():
    need = OwnersNeed(epoch=2, plan=PLAN, lost_stages=(1,), devices=("d0", "d2", "s0", "s1"))
    van = {"s0": ("van",), "s1": ("van",)}
    choice = choose_owners(need, hazards=van)
    assert choice.plan is not None
    assert choice.plan.devices == ("d0", "s0", "d2")
    assert choice.holders[1].devices == ("d2",)
    assert choose_owners(need).holders[1].devices == ("s1",)


@given(
    hazards=st.dictionaries(st.sampled_from(PARTY), st.sets(st.sampled_from(NAMES))),
    copies=st.integers(1, 4),
    rooms=st.dictionaries(st.sampled_from(PARTY), st.integers(0, 150)),
)
def test_hazards_cost_no_copy_and_the_first_is_apart_if_any_can_be(hazards, copies, rooms):
    room = CopyRoom(layer_bytes=(10,) * 6, device_bytes=rooms)
    for stage, devices in zip(PLAN.stages, held(hazards, copies), strict=True):
        others = [device for device in PARTY if device != stage.device]
        assert stage.device not in devices
        assert len(set(devices)) == len(devices) == min(copies, len(others))
        mine = set(hazards.get(stage.device, ()))
        if any(mine.isdisjoint(hazards.get(device, ())) for device in others):
            assert mine.isdisjoint(hazards.get(devices[0], ()))
    bounded = held(hazards, copies, room=room)
    for device, size in rooms.items():
        assert sum(device in devices for devices in bounded) * 2 * 20 <= size
    for stage, devices in zip(PLAN.stages, bounded, strict=True):
        assert len(devices) <= copies
        if not devices:
            used = {d: sum(d in other for other in bounded) * 40 for d in PARTY}
            assert all(rooms.get(d, 1e9) - used[d] < 40 for d in PARTY if d != stage.device), (
                "none while there is room"
            )
