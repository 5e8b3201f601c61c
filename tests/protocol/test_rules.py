"""Each starred rule of the protocol is patched out, and a check of the crowd goes red.

The product has no switches for rules: the patches are here. A patch that stays green for all these
seeds would mean that either the rule or the check is idle.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from crowdmesh_jax.protocol import (
    coordinator,
    coordinator_recovery,
    coordinator_turn,
    coordinator_waves,
    member,
    member_copies,
    member_fence,
    member_install,
    member_step,
    records,
)
from crowdmesh_jax.protocol import member_events as me
from crowdmesh_jax.protocol.member_state import Phase

from .chaos import Chaos
from .crowd import Crowd
from .crowd_member import CrowdMember

Patch = Callable[[pytest.MonkeyPatch], None]
BROKEN = (AssertionError, KeyError)
"""An invariant, or an array that is not there any more."""


def goes_red(runs: Iterator[Callable[[], Any]]) -> bool:
    for run in runs:
        try:
            run()
        except BROKEN:
            return True
    return False


def chaos(count: int = 40, first: int = 0, **how: Any) -> Iterator[Callable[[], Any]]:
    for seed in range(first, first + count):
        yield lambda seed=seed: Chaos(seed, **how).run(events=5000)


def done_said_and_commit_not_heard(count: int = 20) -> Iterator[Callable[[], Any]]:
    """Stage 0 dies when its Done was shown and its Commit is still on the way: the third and fourth
    rows of the table of who remembers a commit."""

    def run(seed: int) -> None:
        crowd = Crowd(seed=seed, steps=7)
        below = crowd.members["d1"]
        crowd.run(until=lambda: crowd.hub.state.committed > max(1, below.state.step), events=5000)
        if crowd.hub.completed is None:
            crowd.kill("d0")
            crowd.run(events=8000)
            assert crowd.hub.completed == 7

    for seed in range(count):
        yield lambda seed=seed: run(seed)


SHORT_LOGS = {"wave_every": 3, "log_steps": 1}
"""So that losses mean rollback: what copies alone must bear."""


def lost_while(
    holds: Callable[[Crowd], bool], *victims: str, count: int = 12
) -> Iterator[Callable[[], Any]]:
    """Devices that are lost at a certain moment of a run whose logs do not reach far."""

    def run(seed: int) -> None:
        crowd = Crowd(seed=seed, steps=12, spares=2, terms=SHORT_LOGS)
        crowd.run(until=lambda: crowd.hub.durable > 0 and holds(crowd), events=5000)
        for victim in victims:
            crowd.kill(victim)
        crowd.run(events=8000)
        assert crowd.hub.completed == 12, crowd.hub.fault

    for seed in range(count):
        yield lambda seed=seed: run(seed)


def a_wave_is_half_done(crowd: Crowd) -> bool:
    return len(crowd.hub.state.acks) >= 3


def the_head_is_ahead(crowd: Crowd) -> bool:
    return crowd.hub.state.committed >= crowd.hub.durable + 2 and not crowd.hub.state.acks


# The patches ------------------------------------------------------------------------------------


def r1_a_stage_applies_on_its_own_last_backward(patch: pytest.MonkeyPatch) -> None:
    real = member_step._on_step_finished

    def early(turn: Any, event: Any) -> None:
        real(turn, event)
        state = turn.state
        if state.phase is Phase.RUN and state.is_last and state.stage > 0:
            verdict = me.Slot(kind="verdict", step=state.step)
            turn.do(me.Keep(slots=()))
            turn.do(me.Apply(step=state.step, verdict=member_step.Verdict()))
            assert verdict

    patch.setitem(member_step.STEP_HANDLERS, me.StepFinished, early)
    patch.setitem(member._HANDLERS, me.StepFinished, early)


def r5_statistics_change_in_place(patch: pytest.MonkeyPatch) -> None:
    real = CrowdMember.forward

    def in_place(self: CrowdMember, step: int, microbatch: int) -> None:
        real(self, step, microbatch)
        self.layers = {k: (v[0], self.work[k]) for k, v in self.layers.items()}
        self.work = {}

    patch.setattr(CrowdMember, "forward", in_place)


def r6_a_fenced_member_goes_on(patch: pytest.MonkeyPatch) -> None:
    def report_only(turn: Any, message: Any) -> None:
        state = turn.state
        if state.phase is not Phase.RUN:
            real(turn, message)
            return
        turn.set(term=message.term, fence=message.epoch)
        member_fence.report(turn)
        turn.set(fence=state.active)

    real = member_fence.on_fence
    patch.setitem(member._GRANTS, member.msg.Fence, report_only)
    always = member_install.is_grantable

    def grant(turn: Any, message: Any) -> bool:
        if turn.state.phase is Phase.RUN and message.run == turn.state.run:
            turn.set(phase=Phase.FENCED, is_frozen=True, fence=message.epoch)
        return always(turn, message)

    patch.setattr(member_install, "is_grantable", grant)


def r6_full_gradients_are_dropped_at_the_fence(patch: pytest.MonkeyPatch) -> None:
    real = member_fence.make_evidence

    def without(state: Any) -> Any:
        said = real(state)
        return replace(said, stage=said.stage and replace(said.stage, is_full=False))

    patch.setattr(member_fence, "make_evidence", without)


def r7_epochs_are_not_checked(patch: pytest.MonkeyPatch) -> None:
    def any_epoch(turn: Any, sender: str, message: Any) -> bool:
        return turn.state.phase not in (Phase.IDLE, Phase.FAILED)

    patch.setattr(member, "_is_current", any_epoch)


def r11_a_snapshot_is_the_live_state(patch: pytest.MonkeyPatch) -> None:
    real = CrowdMember.send_copy

    def live(self: CrowdMember, to: str, copy: Any, epoch: int) -> None:
        states, verdict = self.copies.get(copy.name, (None, None))
        if states is not None and set(states) == set(self.layers):
            self.copies[copy.name] = self.layers, verdict

            def late() -> None:
                self.copies[copy.name] = self.layers, verdict
                real(self, to, copy, epoch)

            self.crowd.after(2.0, late)
            return
        real(self, to, copy, epoch)

    patch.setattr(CrowdMember, "send_copy", live)


def r12_a_copy_counts_with_its_first_chunk(patch: pytest.MonkeyPatch) -> None:
    def eager(turn: Any, sender: str, message: Any) -> None:
        real(turn, sender, message)
        if all(s.copy.name != message.copy.name for s in turn.state.fetching):
            turn.set(copies=(*turn.state.copies, message.copy))
            turn.tell(member.msg.Stored(**turn.of_epoch, copy=message.copy))

    real = member_copies.on_chunk
    patch.setitem(member._FROM_PEER, member.msg.Chunk, eager)


def r13_a_wave_is_complete_with_its_owners(patch: pytest.MonkeyPatch) -> None:
    def owners_only(state: Any, version: int) -> Any:
        return {ack for ack in real(state, version) if ack.device in state.devices[:1]}

    real = coordinator_waves.awaited_acks

    def missing(state: Any, version: int) -> Any:
        return owners_only(state, version) - set(state.acks)

    patch.setattr(coordinator_waves, "missing_acks", missing)


def r14_one_version_is_enough(patch: pytest.MonkeyPatch) -> None:
    real = member_copies._with

    def only_this(state: Any, copy: Any) -> Any:
        kept = real(state, copy)
        return tuple(
            have for have in kept if have.layers != copy.layers or have.version == copy.version
        )

    patch.setattr(member_copies, "_with", only_this)


def r15_the_owner_keeps_no_snapshot(patch: pytest.MonkeyPatch) -> None:
    real = member_copies._keep_own

    def sent_only(turn: Any, version: int) -> None:
        before = turn.state.copies
        real(turn, version)
        turn.set(copies=before)

    patch.setattr(member_copies, "_keep_own", sent_only)


def s7_the_copy_that_a_replay_started_from_is_thrown_away(patch: pytest.MonkeyPatch) -> None:
    real = member_install._get_ready

    def forgetful(turn: Any) -> None:
        if turn.state.is_restoring:
            mine = turn.state.layers
            kept = tuple(copy for copy in turn.state.copies if copy.layers != mine)
            turn.set(copies=kept)
        real(turn)

    patch.setattr(member_install, "_get_ready", forgetful)


def i11_is_broken_for(cls: type) -> Patch:
    def break_it(patch: pytest.MonkeyPatch) -> None:
        real = coordinator_turn.RunTurn.journal

        def forgetful(self: Any, record: Any, *, sync: bool = True) -> None:
            if not isinstance(record, cls):
                real(self, record, sync=sync)

        patch.setattr(coordinator_turn.RunTurn, "journal", forgetful)

    break_it.__name__ = f"i11_{cls.__name__}_is_not_journalled"
    return break_it


RULES: list[tuple[Patch, dict[str, Any]]] = [
    (r1_a_stage_applies_on_its_own_last_backward, {"kinds": ("kill",)}),
    (r5_statistics_change_in_place, {"kinds": ("kill",)}),
    (r6_a_fenced_member_goes_on, {"kinds": ("kill",)}),
    (r7_epochs_are_not_checked, {"kinds": ("suspect", "freeze")}),
    (r11_a_snapshot_is_the_live_state, {"kinds": ("kill",)}),
    (r12_a_copy_counts_with_its_first_chunk, {"kinds": ("kill",)}),
    (r13_a_wave_is_complete_with_its_owners, {"kinds": ("kill",)}),
    *((i11_is_broken_for(cls), {"kinds": ("kill",)}) for cls in (
        records.Epoch, records.Decision, records.Resumed, records.Wave,
    )),
]  # fmt: skip


@pytest.mark.parametrize(("patch", "how"), RULES, ids=lambda item: getattr(item, "__name__", ""))
def test_a_rule_that_is_left_out_is_noticed(monkeypatch, patch, how):
    patch(monkeypatch)
    assert goes_red(chaos(**how)), patch.__name__


def test_keeping_one_version_is_noticed(monkeypatch):
    """R14: two holders are one wave apart when a device is lost."""
    assert not goes_red(lost_while(a_wave_is_half_done, "d1", count=4))
    r14_one_version_is_enough(monkeypatch)
    assert goes_red(lost_while(a_wave_is_half_done, "d1"))


def test_an_owner_without_its_own_snapshot_is_noticed(monkeypatch):
    """R15: the device lost was the holder of others' copies."""
    assert not goes_red(lost_while(the_head_is_ahead, "d1", "s0", count=4))
    r15_the_owner_keeps_no_snapshot(monkeypatch)
    assert goes_red(lost_while(the_head_is_ahead, "d1", "s0"))


def lost_again_before_a_wave(count: int = 12) -> Iterator[Callable[[], Any]]:
    """d1 is replayed from its durable copy, no wave completes, then d2 is lost: its logs do not
    reach, and all must go back to the durable version once more."""

    def run(seed: int) -> None:
        terms = {"wave_every": 3, "log_steps": 3}
        crowd = Crowd(seed=seed, steps=14, spares=3, terms=terms)
        hub = crowd.hub
        crowd.run(until=lambda: hub.durable > 0 and hub.state.committed >= hub.durable + 2)
        crowd.kill("d1")
        crowd.run(
            until=lambda: (
                hub.state.epoch == 2
                and hub.state.was_resumed
                and hub.state.committed >= hub.durable + 5
            ),
            events=8000,
        )
        crowd.kill("d2")
        crowd.run(events=20000)
        assert hub.completed == 14, hub.fault

    for seed in range(count):
        yield lambda seed=seed: run(seed)


def test_a_replay_that_throws_its_copy_away_is_noticed(monkeypatch):
    real = coordinator.ask_wave_when_due
    monkeypatch.setattr(coordinator_recovery, "resume_marks", lambda state: ())
    monkeypatch.setattr(
        coordinator, "ask_wave_when_due", lambda turn: turn.state.epoch > 1 or real(turn)
    )
    assert not goes_red(lost_again_before_a_wave(3))
    s7_the_copy_that_a_replay_started_from_is_thrown_away(monkeypatch)
    assert goes_red(lost_again_before_a_wave())


def test_full_gradients_dropped_at_the_fence_are_noticed(monkeypatch):
    assert not goes_red(done_said_and_commit_not_heard(6))
    r6_full_gradients_are_dropped_at_the_fence(monkeypatch)
    assert goes_red(done_said_and_commit_not_heard())


def test_the_runs_that_show_it_are_green_with_all_rules():
    kinds = {tuple(how["kinds"]) for _, how in RULES}
    for kind in kinds:
        assert not goes_red(itertools.islice(chaos(kinds=kind), 6))
