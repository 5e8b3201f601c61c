"""Who really holds copies decides who takes a stage; who does not store holds none any more."""

from __future__ import annotations

from typing import Any

import pytest
from policy_world import Policy

from crowdmesh_jax import control
from crowdmesh_jax.protocol.owners import CopyRoom


def stored(device: str, version: int, first_layer: int = 2, last_layer: int = 3) -> Any:
    return control.CopyStored(
        device=device, first_layer=first_layer, last_layer=last_layer, version=version
    )


def heir(*events: Any, **running: Any) -> str:
    """Who takes d1's stage before d1 leaves; s1 is assigned its copies, and all are ready."""
    policy = Policy()
    policy.running(**running)
    for spare in ("s0", "s1"):
        policy.tell(control.ProgramCompiled(device=spare, key="k1"))
    for event in events:
        policy.tell(event)
    asks = policy.tell(control.Departing(device="d1", leaves_in_s=1.0))
    return next(a.reason for a in asks if isinstance(a, control.AskChange))


def test_a_stage_goes_to_who_has_its_newest_copy_rather_than_to_who_should():
    assert "to s1 (it is to hold its copies)" in heir()
    assert "to s0 (it holds a copy of version 8)" in heir(stored("s0", 8))
    assert "to s1 (it holds a copy of version 9)" in heir(stored("s0", 8), stored("s1", 9))
    assert "to s1" in heir(stored("s0", 8, 2, 5)), "a copy under other cuts"
    assert "to s1" in heir(stored("s0", 8), control.CopyGone(device="s0", first_layer=2))
    assert "to s1" in heir(stored("s0", 8), control.Joined(device="s0")), "a new process"
    assert "to s1" in heir(stored("s0", 8), control.Lost(device="s0"))


def test_copies_of_what_was_taken_back_count_no_more():
    policy = Policy()
    policy.running()
    policy.tell(stored("s0", 8))
    policy.running(epoch=2, step=7)
    assert policy.state.stored["s0"] == ()
    policy.tell(stored("s0", 7))
    policy.running(epoch=3, step=7)
    assert policy.state.stored["s0"] == ((2, (3, 7)),)


def holders(action: Any) -> list[tuple[str, ...]]:
    found = action.choice.holders if isinstance(action, control.Answer) else action.holders
    return [entry.devices for entry in found]


@pytest.mark.parametrize("room", [None, CopyRoom(layer_bytes=(5,) * 6, device_bytes={"d0": 40})])
def test_who_does_not_store_is_passed_over_until_it_stores_again(room):
    policy = Policy(room=room)
    policy.running()
    assert holders(policy.entries[0][1]) == [("s0",), ("s1",), ("s0",)]
    (ask,) = policy.tell(control.TransferFailed(device="s0"))
    assert isinstance(ask, control.AskHolders)
    assert holders(ask) == [("s1",), ("s1",), ("s1",)]
    assert policy.tell(control.TransferFailed(device="s0")) == [], "said once"
    (answer,) = policy.need((1,), ("d1",))
    assert answer.choice.plan.devices == ("d0", "s0", "d2"), "it may still run a stage"
    assert holders(answer) == [("s1",), ("s1",), ("s1",)]
    (answer,) = policy.need((1,), ("d1", "s1"))
    assert holders(answer) == [("d2",), ("d2",), ("d0",)]
    policy.tell(stored("s0", 3, 0, 1))
    (answer,) = policy.need((1,), ("d1", "s1"))
    assert holders(answer) == [("s0",), ("d2",), ("d0",)]


def test_an_own_snapshot_does_not_make_a_good_holder():
    policy = Policy(party=("d0", "d1", "d2"))
    policy.running()
    (ask,) = policy.tell(control.TransferFailed(device="d1"))
    assert holders(ask) == [("d2",), ("d2",), ("d0",)]
    policy.tell(stored("d1", 3))
    assert policy.state.failed == ("d1",)
    policy.tell(control.Joined(device="d1"))
    assert policy.state.failed == (), "a new process"


def test_where_nobody_else_is_who_failed_stays_holder():
    policy = Policy(party=("d0", "d1", "d2"))
    policy.running()
    for device in ("d0", "d1"):
        policy.tell(control.TransferFailed(device=device))
    assert [e.devices for e in policy.state.holders] == [("d2",), ("d2",), ("d0",)]
    policy.tell(control.TransferFailed(device="d2"))
    assert [e.devices for e in policy.state.holders] == [("d1",), ("d2",), ("d0",)], "or none"
    assert policy.tell(control.TransferFailed(device="d2")) == [], "it does not go round and round"


def test_a_policy_that_places_copies_is_not_overruled():
    policy = Policy(is_ring=False)
    policy.running()
    assert policy.tell(control.TransferFailed(device="s0")) == []
