"""The member machine's part in a recovery, one event at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from crowdmesh_jax.protocol import (
    Mark,
    MemberState,
    Slot,
    Tie,
    member,
    member_copies,
    member_install,
    messages,
)
from crowdmesh_jax.protocol import member_events as me
from crowdmesh_jax.protocol.evidence import Copy, Evidence, LogSpan
from crowdmesh_jax.protocol.member_fence import make_evidence
from crowdmesh_jax.protocol.recovery_messages import Manifest

from .crowd import Crowd
from .crowd_member import HUB


def at_work(name: str = "d1", committed: int = 4, **crowd: Any) -> tuple[Crowd, MemberState]:
    """A member in the middle of a run of three stages."""
    made = Crowd(seed=21, steps=9, **crowd)
    made.run(until=lambda: made.hub.state.committed >= committed)
    return made, made.members[name].state


def tell(state: MemberState, message: Any, sender: str = HUB) -> tuple[MemberState, list[Any]]:
    event = me.MessageReceived(sender=sender, message=message)
    state, actions = member.handle(state, event, 0.0)
    return state, list(actions)


def fenced(state: MemberState, epoch: int = 2) -> tuple[MemberState, Evidence]:
    state, actions = tell(state, messages.Fence(run="r1", epoch=epoch, term=1))
    assert [type(action) for action in actions] == [me.Freeze]
    state, actions = member.handle(state, me.Frozen(), 0.0)
    (action,) = actions
    assert isinstance(action, me.SendMessage)
    assert isinstance(action.message, messages.Report)
    assert [slot.step for slot in action.attach] == [
        entry.step for entry in action.message.evidence.verdicts
    ]
    return state, action.message.evidence


def install(state: MemberState, act: Any, base: int, **changes: Any) -> messages.Install:
    return replace(
        state.granted, epoch=state.fence, base=base, action=act, **{"sources": (), **changes}
    )


def test_a_fence_stops_everything_and_drops_nothing():
    _, before = at_work()
    state, evidence = fenced(before)
    assert state.phase.value == "fenced"
    assert (state.copies, state.logs, state.version) == (
        before.copies,
        before.logs,
        before.version,
    )
    assert evidence.stage is not None
    assert evidence.stage.version == before.version
    assert evidence.stage.tag == 1
    assert {entry.step for entry in evidence.verdicts} >= {before.version - 1}


def test_lower_terms_and_epochs_are_not_promised_to_and_a_higher_one_is():
    _, before = at_work()
    for message in (
        messages.Fence(run="r1", epoch=2, term=0),
        messages.Fence(run="r1", epoch=1, term=1),
        messages.Fence(run="r9", epoch=7, term=7),
    ):
        state, actions = tell(before, message)
        assert actions == []
        assert (state.phase, state.fence) == (before.phase, before.fence)
    state, _ = fenced(before)
    state, (again,) = tell(state, messages.Fence(run="r1", epoch=3, term=1))
    assert isinstance(again.message, messages.Report)
    assert again.message.epoch == 3


def test_a_frame_of_the_epoch_before_does_nothing_to_a_fenced_member():
    _, before = at_work()
    state, evidence = fenced(before)
    frame = messages.Forward(run="r1", epoch=1, step=state.step, microbatch=0, cut=2)
    after, actions = tell(state, frame, "d0")
    assert actions == []
    assert make_evidence(after) == evidence


def test_an_apply_that_had_not_begun_leaves_a_full_gradient_and_its_verdict():
    crowd, _ = at_work()
    body = crowd.members["d1"]
    crowd.run(until=lambda: body.state.step == body.state.version + 1)
    before = body.state
    _, evidence = fenced(before)
    assert evidence.stage is not None
    assert (evidence.stage.version, evidence.stage.is_full) == (before.version, True)
    assert before.version in {entry.step for entry in evidence.verdicts}


def test_answers_of_what_was_at_work_count_until_the_body_stands_still():
    crowd, _ = at_work()
    body = crowd.members["d1"]
    crowd.run(until=lambda: body.state.step == body.state.version + 1)
    version = body.state.version
    state, _ = tell(body.state, messages.Fence(run="r1", epoch=2, term=1))
    state, actions = member.handle(state, me.Applied(step=version), 0.0)
    assert actions == ()
    state, (action,) = member.handle(state, me.Frozen(), 0.0)
    assert action.message.evidence.stage.version == version + 1


def test_install_must_be_of_the_epoch_that_was_promised():
    _, before = at_work()
    state, _ = fenced(before, 3)
    for epoch in (1, 2, 4):
        message = replace(install(state, "keep", state.version), epoch=epoch)
        after, (reply,) = tell(state, message)
        assert isinstance(reply.message, messages.StaleEpoch)
        assert after.phase.value == "fenced"


@pytest.mark.parametrize(("act", "off"), [("keep", 1), ("keep", -1), ("apply", 3)])
def test_keep_and_apply_of_what_is_not_there_are_refused(act, off):
    state, _ = fenced(at_work()[1])
    after, (reply,) = tell(state, install(state, act, state.version + off))
    assert isinstance(reply.message, messages.Error)
    assert "is not what it holds" in reply.message.fault.text
    assert after == state


def test_keep_purges_everything_of_the_base_and_beyond():
    crowd, _ = at_work()
    body = crowd.members["d1"]
    crowd.run(until=lambda: any(entry.step == body.state.version for entry in body.state.logs))
    state, _ = fenced(body.state)
    base = state.version
    beyond = Copy(first_layer=1, last_layer=1, tag=1, version=base + 1)
    state = replace(state, copies=(*state.copies, beyond))
    after, actions = tell(state, install(state, "keep", base))
    assert me.Rewind(step=base, gradient=True) in actions
    assert me.DropCopies(copies=(beyond,)) in actions
    assert all(entry.step < base for entry in after.logs)
    assert beyond not in after.copies
    assert (after.tag, after.active) == (2, 2)


def test_state_that_is_replaced_becomes_a_copy_first(monkeypatch):
    state, _ = fenced(at_work()[1])
    copy = Copy(first_layer=2, last_layer=2, tag=1, version=2)
    source = member_install.Source(device=state.device, copy=copy)
    state = replace(state, copies=(copy,))
    message = install(state, "restore", state.version, state_version=2, sources=(source,))
    after, actions = tell(state, message)
    kept = [action.copy.version for action in actions if isinstance(action, me.KeepState)]
    assert kept == [state.version]
    kinds = [type(action) for action in actions]
    assert kinds.index(me.KeepState) < kinds.index(me.Rewind) < kinds.index(me.LoadStage)
    assert after.is_restoring
    assert copy in after.copies, "what a replay starts from stays until Discard"
    monkeypatch.setattr(member_install, "_give_up_state", lambda *_: None)
    _, actions = tell(state, message)
    assert not any(isinstance(action, me.KeepState) for action in actions)


def test_a_rolled_back_state_is_of_no_history_and_becomes_no_copy():
    state, _ = fenced(at_work()[1])
    _, actions = tell(state, install(state, "restore", state.version - 1))
    assert not any(isinstance(action, me.KeepState) for action in actions)


def test_a_copy_is_invisible_and_unsaid_until_its_seal_matched():
    crowd, _ = at_work()
    owner = crowd.members["d1"].state
    holder = next(e.devices[0] for e in owner.holders if e.first_layer == owner.layers.start)
    state = crowd.members[holder].state
    stop = owner.layers.stop
    copy = Copy(first_layer=owner.layers.start, last_layer=stop - 1, tag=1, version=77)
    of = {"run": "r1", "epoch": 1, "copy": copy}
    state, actions = tell(state, messages.Chunk(**of, offset_bytes=0), "d1")
    assert [type(action) for action in actions] == [me.StoreChunk]
    assert copy not in make_evidence(state).copies
    manifest = Manifest(leaves=1, size_bytes=1, checksum="x")
    state, actions = tell(state, messages.Seal(**of, manifest=manifest), "d1")
    assert [type(action) for action in actions] == [me.SealCopy]
    damaged, actions = member.handle(state, me.CopySealed(copy=copy, epoch=1, is_whole=False), 0.0)
    assert [type(action) for action in actions] == [me.DropCopies, me.SendMessage]
    assert copy not in damaged.copies
    again = actions[1]
    assert isinstance(again, me.SendMessage)
    assert (again.to, again.message) == ("d1", messages.Fetch(**of)), "once more from the owner"
    sealed = me.CopySealed(copy=copy, epoch=1, is_whole=False)
    _, actions = member.handle(damaged, sealed, 0.0)
    assert [type(action) for action in actions] == [me.DropCopies, me.SendMessage]
    told = actions[1]
    assert isinstance(told, me.SendMessage)
    assert isinstance(told.message, messages.CopyLost), "once; then nobody need wait for it"
    assert (told.to, told.message.device) == (HUB, state.device)
    whole, (stored,) = member.handle(
        state, me.CopySealed(copy=copy, epoch=1, is_whole=True, checksum="x"), 0.0
    )
    assert isinstance(stored.message, messages.Stored)
    assert copy in whole.copies
    late, _ = tell(state, messages.Fence(run="r1", epoch=2, term=1))
    late, actions = member.handle(
        late, me.CopySealed(copy=copy, epoch=1, is_whole=True, checksum="x"), 0.0
    )
    assert copy not in late.copies, "R6: nothing new counts after the fence"


def test_a_zombies_upload_ends_nowhere():
    crowd, _ = at_work()
    owner = crowd.members["d1"].state
    holder = next(e.devices[0] for e in owner.holders if e.first_layer == owner.layers.start)
    state = crowd.members[holder].state
    first, last = owner.layers.start, owner.layers.stop - 1
    good = Copy(first_layer=first, last_layer=last, tag=1, version=77)
    old, _ = fenced(state)
    _, actions = tell(old, messages.Chunk(run="r1", epoch=1, copy=good, offset_bytes=0), "d1")
    assert actions == []
    for sender, copy in (("d0", good), ("d1", replace(good, tag=0))):
        chunk = messages.Chunk(run="r1", epoch=1, copy=copy, offset_bytes=0)
        _, (reject,) = tell(state, chunk, sender)
        assert isinstance(reject, me.Reject)


def test_discard_frees_what_is_older_and_is_idempotent():
    _, state = at_work()
    old = [Copy(first_layer=2, last_layer=2, tag=1, version=version) for version in (1, 2, 3, 4)]
    state = replace(state, copies=tuple(old), floor=0)
    after, actions = tell(state, messages.Discard(run="r1", epoch=1, version=3))
    assert after.copies == tuple(old[2:]), "R14: the durable one and the newer one stay"
    assert me.DropCopies(copies=tuple(old[:2])) in actions
    assert all(entry.step >= 3 for entry in after.logs)
    again, actions = tell(after, messages.Discard(run="r1", epoch=1, version=3))
    assert actions == []
    assert again == after


def test_logs_over_budget_lose_their_oldest_steps():
    crowd = Crowd(seed=22, steps=9, terms={"log_steps": 2, "wave_every": 9})
    crowd.run(until=lambda: crowd.hub.state.committed >= 7)
    spans = make_evidence(crowd.members["d1"].state).logs
    assert spans
    assert all(isinstance(span, LogSpan) for span in spans)
    assert {span.stop_step - span.first_step for span in spans} <= {1, 2}
    slots = [slot for slot in crowd.members["d1"].logged if slot.kind in ("y", "dx")]
    assert len({slot.step for slot in slots}) <= 3


def test_a_member_whose_epoch_went_on_without_it_comes_back_as_a_newcomer():
    _, state = at_work()
    state, actions = tell(state, messages.StaleEpoch(run="r1", epoch=1, active=2), "d0")
    assert [type(action) for action in actions] == [me.Freeze]
    state, actions = member.handle(state, me.Frozen(), 0.0)
    kinds = [type(action) for action in actions]
    assert kinds[-2:] == [me.Rewind, me.Rejoin]
    assert state.phase.value == "idle"
    assert state.logs == state.verdicts == ()
    assert state.copies
    assert state.install is None


def test_who_reported_too_late_is_told_and_leaves():
    state, _ = fenced(at_work()[1])
    same, actions = tell(state, messages.StaleEpoch(run="r1", epoch=1, active=2), "d0")
    assert actions == [], "a peer that was installed already says nothing new"
    state, actions = tell(same, messages.StaleEpoch(run="r1", epoch=2, active=2))
    assert isinstance(actions[-1], me.Rejoin)
    assert state.phase.value == "idle"


def test_a_fenced_member_says_its_report_again():
    state, evidence = fenced(at_work()[1])
    state, (action,) = member.handle(state, me.Tick(), 100.0)
    assert action.message.evidence == evidence
    _, actions = member.handle(state, me.Tick(), 100.5)
    assert actions == ()


def test_own_snapshots_become_copies_and_are_said_and_sent():
    crowd, _ = at_work(committed=2)
    seen: list[Any] = []
    body = crowd.members["d1"]
    do = body.do

    def watch(action: Any, arrays: Any) -> None:
        seen.append(action)
        do(action, arrays)

    body.do = watch  # type: ignore[method-assign]
    crowd.run(until=lambda: any(isinstance(action, me.SendCopy) for action in seen))
    kinds = [type(getattr(action, "message", action)) for action in seen]
    at = kinds.index(me.KeepCopy)
    assert kinds[at : at + 3] == [me.KeepCopy, messages.Stored, me.SendCopy]
    assert member_copies.holders_of(body.state, seen[at].copy) == (seen[at + 2].to,)


@pytest.mark.parametrize("name", ["d0", "d1", "d2"])
@pytest.mark.parametrize("early", [False, True])
def test_tied_leaves_are_lent_anew_when_an_epoch_starts(name, early):
    """A borrower may have been fenced between its Apply and the new value. An owner may hear Resume
    before the borrower does."""
    state, _ = fenced(at_work(name)[1])
    tie = Tie(owner_layer=0, borrower_layers=(3,))
    message = install(state, "keep", state.version, ties=(tie,), resend_ties=True)
    state, _ = tell(state, message)
    state, _ = member.handle(state, me.Installed(), 0.0)
    actions: Any = ()
    if not early or name == "d0":
        state, actions = tell(state, messages.Resume(run="r1", epoch=2, steps=9))
    lends = [action for action in actions if isinstance(action, me.LendTied)]
    assert bool(lends) == (name == "d0")
    assert state.tied_due == (() if name == "d0" else (0,))
    if name == "d0":
        state, actions = member.handle(state, me.TiedLent(step=lends[0].step), 0.0)
        logged, sent = actions
        slot = Slot(kind="tied", step=state.version - 1, layer=0)
        assert (logged, sent.attach) == (me.LogFrame(slots=(slot,)), (slot,))
        assert sent.message == messages.Tied(run="r1", epoch=2, step=state.version - 1, layer=0)
    else:
        before = state.version
        tied = messages.Tied(run="r1", epoch=2, step=before - 1, layer=0)
        state, actions = tell(state, tied, state.upstream or "")
        kinds = [type(action) for action in actions]
        assert (me.Adopt in kinds) == (name == "d2")
        assert state.tied_due == ()


def test_marks_of_the_base_are_carried_out_before_any_step():
    state, _ = fenced(at_work()[1])
    state, _ = tell(state, install(state, "keep", state.version))
    state, _ = member.handle(state, me.Installed(), 0.0)
    resume = messages.Resume(run="r1", epoch=2, steps=state.version, marks=(Mark.FINISH, Mark.WAVE))
    after, actions = tell(state, resume)
    assert [type(action) for action in actions] == [me.Snapshot]
    assert after.ending is Mark.FINISH
    assert (after.waves_due, after.shards_due) == ((state.version,), (state.version,))
    stop = messages.Resume(run="r1", epoch=2, steps=99, marks=(Mark.STOP,))
    stopped, actions = tell(state, stop)
    assert stopped.phase.value == "stopped"
    assert actions == []
    none = messages.Resume(run="r1", epoch=2, steps=state.version)
    failed, _ = tell(state, none)
    assert failed.phase.value == "failed"
