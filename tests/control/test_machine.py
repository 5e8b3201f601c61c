"""The policy machine, one event at a time, and replayed from its plain form."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from policy_world import PARTY, PLAN, Policy, solved

from crowdmesh_jax import control
from crowdmesh_jax.core import PipelinePlan
from crowdmesh_jax.errors import FormatError, InvalidValueError
from crowdmesh_jax.protocol.owners import CopyRoom


def test_idle_devices_compile_what_they_hold_first_and_nothing_twice():
    policy = Policy()
    wanted = policy.running()
    assert all(isinstance(action, control.Compile) for action in wanted)
    assert len(wanted) == 6, "three stages on two spares"
    held = [(a.device, a.stage) for a in wanted[:3]]
    assert sorted(held) == [("s0", 0), ("s0", 2), ("s1", 1)], "copies first"
    assert policy.running(epoch=2) == [], "said once"
    assert policy.tell(control.Joined(device="s0")) == []
    assert {a.device for a in policy.running(epoch=3)} == {"s0"}, "a new process has nothing"


def test_who_could_not_compile_is_asked_again_in_the_next_epoch():
    policy = Policy()
    asked = policy.running()
    failed = control.CompileFailed(device="s1", key="k1", reason="disk full")
    assert policy.tell(failed) == [], "not at once"
    again = policy.running(epoch=2)
    assert again == [a for a in asked if (a.device, a.stage) == ("s1", 1)]
    policy.tell(control.CompileFailed(device="s1", key="of no plan"))
    assert policy.running(epoch=3) == []


def test_of_a_plan_made_ahead_too():
    policy = Policy(party=("d0", "d1", "d2"))
    policy.running()
    policy.tell(control.Tick(), 0.5)
    policy.tell(control.Tick(), 1.5)
    made = solved(("d1", "d2"), PipelinePlan.even(6, ["d1", "d2"], microbatches=4))
    wanted = policy.tell(made)
    assert len(wanted) == 2
    policy.tell(control.CompileFailed(device="d1", key=made.keys[0]))
    assert policy.tell(made) == wanted[:1]


def test_a_lost_stage_goes_to_the_spare_that_has_copy_and_programs():
    policy = Policy()
    policy.running()
    policy.tell(control.ProgramCompiled(device="s1", key="k1"))
    (answer,) = policy.need((1,), ("d1",), copies_of={"s0": (1,), "s1": (1,)})
    assert answer.choice.plan.devices == ("d0", "s1", "d2")
    assert answer.epoch == 2


def test_who_takes_over_has_its_copies_away_from_its_own_hazards():
    policy = Policy(hazards={"s0": ("van",), "s1": ("van",)})
    policy.running()
    (answer,) = policy.need((1,), ("d1",), copies_of={"s0": (1,)})
    assert answer.choice.plan.devices == ("d0", "s0", "d2")
    assert [entry.devices for entry in answer.choice.holders] == [("s1",), ("d2",), ("s1",)]
    van = Policy(hazards={"d0": ("van",), "s0": ("van",)})
    van.running()
    van.tell(control.ProgramCompiled(device="s1", key="k1"))
    van.tell(control.Departing(device="d1", leaves_in_s=1.0))
    (answer,) = van.need(is_still=True)
    assert answer.choice.plan.devices == ("d0", "s1", "d2")
    assert [entry.devices for entry in answer.choice.holders] == [("s1",), ("s0",), ("s0",)]


def test_without_spares_plans_for_each_loss_are_made_one_by_one_and_used():
    policy = Policy(party=("d0", "d1", "d2"))
    assert policy.running() == []
    assert policy.tell(control.Tick(), 0.5) == [], "a run may be short"
    (first,) = policy.tell(control.Tick(), 0.5)
    assert first == control.Solve(devices=("d1", "d2"))
    assert policy.tell(control.Tick(), 1.0) == [], "one at a time"
    plan = PipelinePlan.even(6, ["d1", "d2"], microbatches=4)
    compiled = policy.tell(solved(("d1", "d2"), plan))
    assert [(a.device, a.stage) for a in compiled] == [("d1", 0), ("d2", 1)], "compiled ahead"
    (second,) = policy.tell(control.Tick(), 1.0)
    assert second == control.Solve(devices=("d0", "d2"))
    (answer,) = policy.need((0,), ("d0",))
    assert answer.choice.plan == plan, "no solving while everyone waits"


def test_an_unforeseen_loss_is_solved_while_everyone_waits():
    policy = Policy(party=("d0", "d1", "d2"), standby=False)
    policy.running()
    assert policy.tell(control.Tick(), 5.0) == []
    (solve,) = policy.need((0, 1), ("d0", "d1"))
    assert solve == control.Solve(devices=("d2",), urgent=True)
    plan = PipelinePlan.even(6, ["d2"], microbatches=4)
    (answer,) = policy.tell(solved(("d2",), plan))
    assert answer.choice.plan == plan


def test_where_no_plan_fits_the_run_is_told_why():
    policy = Policy(party=("d0", "d1", "d2"))
    policy.running()
    policy.need((0, 1), ("d0", "d1"))
    (answer,) = policy.tell(solved(("d2",), None, reason="layer 3 needs 9 GB"))
    assert answer.choice.plan is None
    assert "layer 3 needs 9 GB" in answer.choice.reason


def test_newcomers_become_members_after_a_while():
    policy = Policy(party=("d0", "d1", "d2"))
    policy.running()
    assert policy.tell(control.Joined(device="n0")) == []
    asks = [a for a in policy.tell(control.Tick(), 0.5) if isinstance(a, control.AskChange)]
    assert asks == [], "others may follow"
    wanted = policy.tell(control.Tick(), 0.6)
    assert [a.reason for a in wanted if isinstance(a, control.AskChange)] == ["n0 joined"]


def test_a_better_plan_is_taken_once_compiled_and_only_if_it_pays():
    policy = Policy(party=PARTY[:4], replan=True)
    policy.running(steps=100)
    policy.tell(control.Lost(device="d1"))
    owners = ("d0", "s0", "d2")
    stages = tuple(replace(s, device=d) for s, d in zip(PLAN.stages, owners, strict=True))
    policy.party, policy.plan = ("d0", "d2", "s0"), replace(PLAN, stages=stages)
    policy.running(epoch=2, steps=100)
    (solve,) = [a for a in policy.tell(control.Tick(), 1.5) if isinstance(a, control.Solve)]
    assert sorted(solve.devices) == ["d0", "d2", "s0"]
    better = PipelinePlan.even(6, ["d2", "s0", "d0"], microbatches=4)
    small = solved(solve.devices, better, step_s=0.099, standing_step_s=0.1, move_s=1.0)
    policy.tell(small)
    for device in better.devices:
        assert policy.tell(control.ProgramCompiled(device=device, key=f"{device}-new")) == []
    assert policy.state.wish is None, "0.1 s saved, 1.5 s spent"
    large = replace(small, step_s=0.05)
    (ask,) = policy.tell(large)
    assert isinstance(ask, control.AskChange)
    (answer,) = policy.need(is_still=True)
    assert answer.choice.plan == better


def test_the_users_plan_stands_while_nobody_came_or_went():
    policy = Policy(speeds={"s0": 9.0, "s1": 9.0})
    policy.running()
    assert policy.tell(control.Tick(), 10.0) == []


def test_a_stage_is_handed_over_shortly_before_its_device_leaves():
    policy = Policy()
    policy.running()
    policy.tell(control.ProgramCompiled(device="s1", key="k1"))
    policy.tell(control.CopyStored(device="s1", first_layer=2, last_layer=3, version=0))
    assert policy.tell(control.Departing(device="d1", leaves_in_s=10.0)) == []
    assert policy.tell(control.Tick(), 7.5) == []
    (ask,) = policy.tell(control.Tick(), 1.0)
    assert isinstance(ask, control.AskChange)
    assert "d1 hands stage 1 over to s1 (it holds a copy of version 0)" in ask.reason
    (answer,) = policy.need(is_still=True)
    assert answer.choice.plan.devices == ("d0", "s1", "d2")


ROOM = CopyRoom(layer_bytes=(10,) * 6, device_bytes={})
"""A stage of two layers has 20 bytes of state."""


def departing(leaves_in_s: float, *events: Any, rate: float = 4.0) -> Policy:
    """d1 is to leave. By the crowd its link to s0 carries `rate`; that to s1 is not known."""
    policy = Policy(room=ROOM)
    policy.running(link_bytes_per_s={"d1": {"s0": rate}})
    ready(policy, ("s0", "k1"))
    for event in events:
        policy.tell(event)
    policy.tell(control.Departing(device="d1", leaves_in_s=leaves_in_s))
    return policy


def test_a_hand_over_begins_early_enough_for_the_state_to_move():
    policy = departing(10.0)
    assert policy.tell(control.Tick(), 2.9) == [], "5 s to move, and the lead of 2 s"
    (ask,) = policy.tell(control.Tick(), 0.2)
    assert "d1 hands stage 1 over to s0" in ask.reason


def test_what_a_link_carried_counts_more_than_what_the_crowd_says():
    slow = control.LinkMeasured(sender="d1", receiver="s0", bytes_per_s=2.0)
    policy = departing(20.0, slow)
    assert policy.tell(control.Tick(), 7.9) == []
    assert policy.tell(control.Tick(), 0.2), "10 s to move"
    fast = control.LinkMeasured(sender="d1", receiver="s0", bytes_per_s=1e12)
    policy = departing(20.0, slow, fast)
    assert policy.tell(control.Tick(), 12.9) == [], "5 s: nobody's link is that fast"
    assert policy.tell(control.Tick(), 0.2)
    again = departing(20.0, slow, control.Joined(device="s0"))
    ready(again, ("s0", "k1"))
    early = again.tell(control.Tick(), 9.0)
    assert not any(isinstance(ask, control.AskChange) for ask in early), "it may be elsewhere now"
    due = again.tell(control.Tick(), 4.1)
    assert any(isinstance(ask, control.AskChange) for ask in due)
    owner = departing(20.0, slow, control.Joined(device="d1"))
    early = owner.tell(control.Tick(), 9.0)
    assert not any(isinstance(ask, control.AskChange) for ask in early), "so may the other end"
    other = control.LinkMeasured(sender="d1", receiver="s1", bytes_per_s=1e6)
    assert departing(20.0, slow, other).tell(control.Tick(), 8.1), "s0's figure stands"


def test_who_cannot_have_it_in_time_is_asked_last():
    policy = departing(4.0)
    (ask,) = policy.tell(control.Tick(), 3.5)
    assert "to s1" in ask.reason, "it has to compile, but s0 takes 5 s"


def test_a_device_that_leaves_before_a_stage_has_moved_is_given_none():
    policy = Policy(room=ROOM)
    fast, slow = {"s0": 4e6, "s1": 4e6}, {"s0": 4.0, "s1": 4.0}
    policy.running(link_bytes_per_s={"d0": fast, "d1": slow, "d2": fast})
    policy.tell(control.Departing(device="s1", leaves_in_s=6.0))
    (answer,) = policy.need((1,), ("d1",), copies_of={"s1": (1,)})
    assert answer.choice.plan.devices == ("d0", "s0", "d2")


def test_a_wanted_move_waits_for_the_compiler_no_longer_than_moving_allows():
    policy = Policy(room=ROOM)
    policy.running(link_bytes_per_s={"d1": {"s0": 4.0}})
    assert policy.tell(moves(("d1", "s0"), leaves_in_s=8.0)) == []
    assert policy.tell(control.Tick(), 1.9) == []
    (ask,) = policy.tell(control.Tick(), 0.2)
    assert "d1 hands stage 1 over to s0" in ask.reason


def test_who_stays_after_all_keeps_its_stage():
    policy = Policy()
    policy.running()
    ready(policy, ("s0", "k1"))
    policy.tell(control.Departing(device="d1", leaves_in_s=10.0))
    policy.tell(control.Departing(device="d1", leaves_in_s=math.inf))
    assert policy.tell(control.Tick(), 9.0) == []
    assert "d1" in policy.state.candidates()


def moves(*wanted: tuple[str, str], leaves_in_s: float = 100.0) -> control.MovesWanted:
    return control.MovesWanted(
        moves=tuple(control.Move(device=d, to=to, leaves_in_s=leaves_in_s) for d, to in wanted)
    )


def ready(policy: Policy, *pairs: tuple[str, str]) -> None:
    for device, key in pairs:
        policy.tell(control.ProgramCompiled(device=device, key=key))


def test_a_replication_policy_says_who_hands_over_to_whom_and_when_is_now():
    policy = Policy()
    policy.running()
    ready(policy, ("s0", "k1"), ("s1", "k1"))
    (ask,) = policy.tell(moves(("d1", "s0")))
    assert "d1 hands stage 1 over to s0 (it is idle)" in ask.reason, "though s1 holds the copy"


def test_stages_that_a_replication_policy_moves_together_move_at_one_stop():
    policy = Policy()
    policy.running()
    ready(policy, ("s1", "k1"), ("s0", "k1"))
    assert policy.tell(moves(("d1", "s1"), ("d2", "s0"))) == [], "s0 lacks stage 2"
    assert policy.tell(moves(("d1", "s1"), ("d2", "s0")), 30.0) == [], "nobody is in a hurry"
    ready(policy, ("s0", "k2"))
    (ask,) = policy.tell(control.Tick())
    assert "d1 hands stage 1 over to s1" in ask.reason
    assert "d2 hands stage 2 over to s0" in ask.reason
    (answer,) = policy.need(is_still=True)
    assert answer.choice.plan.devices == ("d0", "s1", "s0")


def test_owners_may_change_places_once_each_has_the_others_programs():
    policy = Policy()
    policy.running()
    swap = moves(("d0", "d2"), ("d2", "d0"))
    asked = policy.tell(swap)
    assert [(a.device, a.stage) for a in asked] == [("d2", 0), ("d0", 2)], "they are idle in no run"
    ready(policy, ("d2", "k0"), ("d0", "k2"))
    (ask,) = policy.tell(control.Tick())
    assert "d0 hands stage 0 over to d2" in ask.reason
    (answer,) = policy.need(is_still=True)
    assert answer.choice.plan.devices == ("d2", "d1", "d0")
    assert "d1" in policy.state.candidates()


def test_a_move_that_cannot_be_takes_those_that_need_it_with_it():
    policy = Policy()
    policy.running()
    ready(policy, ("s0", "k2"), ("d2", "k1"), ("s1", "k0"))
    chain = moves(("d1", "d2"), ("d2", "nobody"), ("d0", "s1"))
    (ask,) = policy.tell(chain)
    assert ask.reason.startswith("d0 hands stage 0 over to s1")
    assert "d2" not in ask.reason
    row = Policy()
    row.running()
    ready(row, ("d1", "k0"), ("d2", "k1"))
    assert row.tell(moves(("d0", "d1"), ("d1", "d2"), ("d2", "nobody"))) == [], (
        "nor the next but one"
    )


def test_nobody_waits_for_a_compiler_longer_than_the_device_is_there():
    policy = Policy()
    policy.running()
    assert policy.tell(moves(("d1", "s0"), leaves_in_s=5.0)) == []
    assert policy.tell(control.Tick(), 3.0) == []
    (ask,) = policy.tell(control.Tick(), 1.5)
    assert "d1 hands stage 1 over to s0" in ask.reason


def test_what_a_replication_policy_does_not_want_any_more_is_not_done():
    policy = Policy()
    policy.running()
    ready(policy, ("s1", "k2"))
    assert policy.tell(moves(("d1", "s0"), ("d2", "s1"))) == []
    (ask,) = policy.tell(moves(("d2", "s1")))
    assert ask.reason.startswith("d2 hands stage 2 over to s1")
    assert policy.tell(moves()) == []
    (answer,) = policy.need(is_still=True)
    assert answer.choice.plan.devices == ("d0", "d1", "d2"), "though it had been asked for"
    told = Policy()
    told.running()
    told.tell(control.Departing(device="d1", leaves_in_s=3.0))
    told.tell(moves(("d1", "s0")))
    told.tell(moves())
    (ask,) = told.tell(control.Tick(), 2.5)
    assert "d1 hands stage 1 over" in ask.reason, "what it announced itself stands"


def test_a_taker_that_announces_to_leave_takes_nothing():
    policy = Policy()
    policy.running()
    ready(policy, ("s0", "k1"))
    assert policy.tell(moves(("d1", "s0")))
    policy.tell(control.Departing(device="s0", leaves_in_s=1.0))
    (answer,) = policy.need(is_still=True)
    assert answer.choice.plan.devices == ("d0", "d1", "d2")
    known = Policy()
    known.running()
    ready(known, ("s0", "k1"))
    known.tell(control.Departing(device="s0", leaves_in_s=1.0))
    assert known.tell(moves(("d1", "s0"))) == []


@pytest.mark.parametrize(("leaves_in_s", "is_gone"), [(20.0, True), (900.0, False)])
def test_who_had_to_leave_is_held_to_leave_for_a_while(leaves_in_s, is_gone):
    """Not who had to make room for someone who is better placed."""
    policy = Policy(party=("d0", "d1", "d2", "s0"))
    policy.running()
    ready(policy, ("s0", "k1"))
    policy.tell(moves(("d1", "s0"), leaves_in_s=leaves_in_s))
    (answer,) = policy.need(is_still=True)
    policy.running(plan=answer.choice.plan, epoch=2)
    policy.tell(moves())
    assert ("d1" in policy.state.candidates()) != is_gone
    policy.tell(control.Tick(), 59.0)
    assert ("d1" in policy.state.candidates()) != is_gone, "what was foreseen may still come"
    policy.tell(control.Tick(), 2.0)
    assert "d1" in policy.state.candidates()


def test_a_device_that_got_its_stage_back_is_not_held_to_leave():
    policy = Policy(party=("d0", "d1", "d2", "s0"))
    policy.running()
    ready(policy, ("s0", "k1"))
    policy.tell(moves(("d1", "s0"), leaves_in_s=20.0))
    (answer,) = policy.need(is_still=True)
    policy.running(plan=answer.choice.plan, epoch=2)
    policy.running(epoch=3)
    assert "d1" in policy.state.candidates()
    assert policy.tell(control.Tick(), 9.0) == []


def test_a_hand_over_waits_for_the_compiler_while_there_is_time():
    policy = Policy()
    policy.running()
    policy.tell(control.Departing(device="d1", leaves_in_s=3.0))
    assert policy.tell(control.Tick(), 1.5) == [], "1.5 s are left, and nobody has its programs"
    (ask,) = policy.tell(control.Tick(), 0.6)
    assert isinstance(ask, control.AskChange), "better compiled there than lost"


def test_waves_come_as_often_as_their_cost_and_the_hazard_make_best():
    policy = Policy(loss_per_s=1e-3, most_steps=200)
    policy.running()
    for step in range(16):
        policy.tell(control.StepCommitted(step=step, step_s=0.1))
    for step in range(16, 18):
        policy.tell(control.StepCommitted(step=step, step_s=0.2, in_wave=True))
    (ask,) = policy.tell(control.WaveKept(version=17))
    # 0.2 s a wave: sqrt(2 x 0.2 / 0.001) = 20 s are 200 steps; 3 % of the time are at least 67.
    assert ask.steps == 200
    assert "200 ms" in ask.why
    often = Policy(loss_per_s=1.0, most_steps=200)
    often.running()
    for entry in policy.entries[1:-1]:
        often.tell(entry[1])
    (ask,) = often.tell(control.WaveKept(version=17))
    assert ask.steps == 67, "never more than 3 % of the time"
    silent = Policy(learn_interval=False)
    silent.running()
    for entry in policy.entries[1:-1]:
        silent.tell(entry[1])
    assert silent.tell(control.WaveKept(version=17)) == []


def test_who_is_leaving_takes_nothing_over():
    policy = Policy()
    policy.running()
    policy.tell(control.Departing(device="s1", leaves_in_s=1.0))
    (answer,) = policy.need((1,), ("d1",), copies_of={"s1": (1,)})
    assert answer.choice.plan.devices == ("d0", "s0", "d2")
    (answer,) = policy.need((1,), ("d1", "s0"), copies_of={"s1": (1,)})
    assert answer.choice.plan.devices == ("d0", "s1", "d2"), "better than to stand still"


def test_who_has_handed_over_and_leaves_is_given_no_copies():
    """It is idle until it goes, and idle devices come first; its copies would go with it."""
    policy = Policy(party=("d0", "d1", "d2", "s0"))
    policy.running()
    policy.tell(control.ProgramCompiled(device="s0", key="k1"))
    policy.tell(control.Departing(device="d1", leaves_in_s=1.0))
    (answer,) = policy.need(is_still=True)
    assert answer.choice.plan.devices == ("d0", "s0", "d2")
    holders = {device for entry in answer.choice.holders for device in entry.devices}
    assert holders == {"d0", "s0", "d2"}


def test_what_was_told_can_be_told_again_from_its_plain_form():
    policy = Policy()
    policy.running()
    policy.tell(control.Departing(device="d1", leaves_in_s=1.0))
    policy.need(is_still=True)
    policy.tell(control.Joined(device="n0"))
    policy.tell(control.CopyStored(device="s1", first_layer=2, last_layer=3, version=0))
    policy.tell(control.CopyGone(device="s1", first_layer=2))
    policy.tell(control.TransferFailed(device="s1", reason="late"))
    policy.tell(control.LinkMeasured(sender="d0", receiver="s1", bytes_per_s=1e6))
    policy.tell(control.CompileFailed(device="s1", key="k1"))
    policy.running(link_bytes_per_s={"d0": {"s1": 2e6}})
    policy.tell(control.Tick(), 3.0)
    again = control.ControlState()
    for now_s, event, actions in policy.entries:
        wire = json.loads(json.dumps(control.entry_to_plain(event)))
        again, repeated = control.handle(again, control.entry_from_plain(wire), now_s)
        assert repeated == actions
        assert [control.entry_from_plain(control.entry_to_plain(a)) for a in actions] == [*actions]
    assert again == policy.state


def test_bad_terms_and_unknown_entries_are_refused():
    with pytest.raises(InvalidValueError, match="copies and worth"):
        control.ControlTerms(copies=0)
    with pytest.raises(InvalidValueError, match="doubles must be >= 0, got -1"):
        control.ControlTerms(doubles=-1)
    with pytest.raises(FormatError, match="unknown kind"):
        control.entry_from_plain({"kind": "Nothing"})
