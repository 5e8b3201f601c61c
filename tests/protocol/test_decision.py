"""The decision: each row of the table of who remembers a commit, each item of section 7, and laws.

A starred item's test patches the item out and sees the decision go wrong.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdmesh_jax.core import values
from crowdmesh_jax.core.crowd import DeviceId
from crowdmesh_jax.core.plan import PipelinePlan
from crowdmesh_jax.errors import ProtocolError
from crowdmesh_jax.protocol import Tie, Verdict, decision, evidence, judgement
from crowdmesh_jax.protocol.common import StepVerdict
from crowdmesh_jax.protocol.decision import Decision, Halt, decide
from crowdmesh_jax.protocol.evidence import (
    Base,
    Copy,
    Evidence,
    LogSpan,
    Past,
    StageReport,
    is_valid,
)
from crowdmesh_jax.protocol.owners import (
    DeviceFacts,
    OwnersChoice,
    OwnersNeed,
    choose_owners,
)

MB = 2


def make_plan(stages: int, layers: int | None = None) -> PipelinePlan:
    devices = [f"d{i}" for i in range(stages)]
    return PipelinePlan.even(layers or 2 * stages, devices, microbatches=MB)


class Scene:
    """Devices d0.. with a stage each and spares s0..; copies of version `wave` at the owner and at
    the next device; logs and verdicts from there on."""

    def __init__(
        self,
        states: list[tuple[int, bool]],
        *,
        wave: int = 3,
        spares: int = 1,
        logs_from: int | None = None,
        tag: int = 1,
        bases: tuple[Base, ...] = (Base(epoch=1, base=0),),
    ) -> None:
        self.plan = make_plan(len(states))
        self.past = Past(
            epoch=bases[-1].epoch + 1,
            plan=self.plan,
            bases=bases,
            durable=wave,
            coordinator=DeviceId("coordinator"),
        )
        count = len(states)
        names = [*self.plan.devices, *(f"s{i}" for i in range(spares))]
        copies: dict[str, list[Copy]] = {name: [] for name in names}
        for index, stage in enumerate(self.plan.stages):
            copy = Copy(
                first_layer=stage.first_layer,
                last_layer=stage.last_layer,
                tag=tag,
                version=wave,
                verdict=Verdict() if wave else None,
            )
            for holder in (stage.device, names[(index + 1) % len(names)]):
                copies[holder].append(copy)
        start = wave if logs_from is None else logs_from
        self.reports: dict[str, Evidence] = {}
        for index, (version, is_full) in enumerate(states):
            stage = self.plan.stages[index]
            stop = version + is_full
            logs = []
            if index + 1 < count and stop > start:
                logs.append(span("forward", stage.last_layer + 1, start, stop))
            if index > 0 and stop > start:
                logs.append(span("backward", stage.first_layer, start, stop))
            self.reports[stage.device] = Evidence(
                stage=StageReport(
                    first_layer=stage.first_layer,
                    last_layer=stage.last_layer,
                    version=version,
                    tag=tag,
                    is_full=is_full,
                ),
                copies=tuple(copies[stage.device]),
                logs=tuple(logs),
                verdicts=tuple(
                    StepVerdict(step=step, verdict=Verdict())
                    for step in range(max(start - 1, 0), version)
                ),
            )
        for name in names[count:]:
            self.reports[name] = Evidence(copies=tuple(copies[name]))

    def lose(self, *devices: str) -> Scene:
        for device in devices:
            del self.reports[device]
        return self

    def change(self, device: str, **changes: Any) -> Scene:
        self.reports[device] = replace(self.reports[device], **changes)
        return self

    def change_stage(self, device: str, **changes: Any) -> Scene:
        stage = self.reports[device].stage
        assert stage is not None
        return self.change(device, stage=replace(stage, **changes))

    def checkpoint(self, version: int) -> Scene:
        tag = 1 if version else 0
        copy = Copy(first_layer=0, last_layer=self.plan.num_layers - 1, tag=tag, version=version)
        self.reports["coordinator"] = Evidence(copies=(copy,))
        self.past = replace(self.past, checkpoint=version)
        return self

    def decide(self, owners: Any = choose_owners) -> Decision | Halt:
        return decide(self.past, self.reports, owners)

    def decided(self, owners: Any = choose_owners) -> Decision:
        result = self.decide(owners)
        assert isinstance(result, Decision), result
        assert values.from_plain(Decision, values.to_plain(result)) == result
        return result

    def halted(self) -> Halt:
        result = self.decide()
        assert isinstance(result, Halt), result
        return result


def span(direction: Any, cut: int, first: int, stop: int) -> LogSpan:
    return LogSpan(direction=direction, cut=cut, first_step=first, stop_step=stop)


def acts(result: Decision) -> list[str]:
    return [action.act for action in result.actions]


def runs(result: Decision) -> list[tuple[int, int, int]]:
    return [(run.first_stage, run.last_stage, run.version) for run in result.runs]


# Section 3: stage 0 dies ------------------------------------------------------------------------


def test_row_1_before_its_last_backward_and_stage_1_not_full_the_step_is_dropped():
    result = Scene([(5, False), (5, False), (5, True)]).lose("d0").decided()
    assert (result.base, acts(result)) == (5, ["restore", "keep", "keep"])
    assert runs(result) == [(0, 0, 3)]
    assert not result.verdict_pending
    assert [entry.step for entry in result.verdicts] == [3, 4]


def test_row_2_before_its_last_backward_and_all_others_full_the_step_is_committed():
    result = Scene([(5, False), (5, True), (5, True)]).lose("d0").decided()
    assert (result.base, acts(result)) == (6, ["restore", "apply", "apply"])
    assert runs(result) == [(0, 0, 3)]
    assert result.verdict_pending, "it died with stage 0, or was never made"
    assert [entry.step for entry in result.verdicts] == [3, 4]


def test_row_3_after_it_and_before_commit_left_the_reports_are_the_same():
    before = Scene([(5, False), (5, True), (5, True)]).lose("d0").decided()
    after = Scene([(6, False), (5, True), (5, True)]).lose("d0").decided()
    assert before == after


def test_row_4_commit_reached_stage_1_and_not_2():
    result = Scene([(6, False), (6, False), (5, True)]).lose("d0").decided()
    assert (result.base, acts(result)) == (6, ["restore", "keep", "apply"])
    assert not result.verdict_pending
    assert [entry.step for entry in result.verdicts] == [3, 4, 5]


def test_row_5_commit_reached_all_and_the_next_steps_partial_work_is_dropped():
    result = Scene([(6, False), (6, False), (6, False)]).lose("d0").decided()
    assert (result.base, acts(result)) == (6, ["restore", "keep", "keep"])


def test_starred_committing_whenever_all_are_full_keeps_what_was_shown(monkeypatch):
    """Stage 0 committed step 5, said Done, and died before Commit left."""
    scene = Scene([(6, False), (5, True), (5, True)]).lose("d0")
    shown = 6  # I8
    assert scene.decided().base >= shown
    monkeypatch.setattr(judgement, "choose_base", lambda live, head: head or 0)
    assert scene.decided().base < shown


# Section 7, item 1 ------------------------------------------------------------------------------


def test_item_1_validity_is_one_test_for_all():
    bases = (Base(epoch=2, base=7), Base(epoch=5, base=3), Base(epoch=9, base=8))
    assert is_valid(4, 3, bases)
    assert not is_valid(4, 4, bases), "beyond the rollback that epoch 5 was"
    assert is_valid(5, 8, bases)
    assert not is_valid(5, 9, bases)
    assert is_valid(9, 99, bases)
    assert is_valid(1, 3, ())


def test_item_1_a_state_from_before_a_rollback_is_a_lost_stage(monkeypatch):
    """d0 went through the rollback of epoch 2 to version 3; d1 still stands at 5, of epoch 1."""
    scene = Scene([(3, False), (5, False)], bases=(Base(epoch=1, base=0), Base(epoch=2, base=3)))
    scene.change_stage("d0", tag=2)
    result = scene.decided()
    assert (result.base, acts(result)) == (3, ["keep", "restore"])
    assert runs(result) == [(1, 1, 3)]
    monkeypatch.setattr(evidence, "is_valid", lambda tag, version, bases: True)
    assert scene.decided().base == 5, "history that a rollback took back would come again"


def test_item_1_a_copy_from_beyond_a_rollback_is_no_source(monkeypatch):
    bases = (Base(epoch=1, base=0), Base(epoch=2, base=3))
    scene = Scene([(4, False), (4, False), (4, False)], bases=bases, tag=2).lose("d1")
    zombie = Copy(first_layer=2, last_layer=3, tag=1, version=4)
    scene.change("s0", copies=(*scene.reports["s0"].copies, zombie))
    assert runs(scene.decided()) == [(1, 1, 3)]
    monkeypatch.setattr(evidence, "is_valid", lambda tag, version, bases: True)
    assert runs(scene.decided()) == [(1, 1, 4)]


def test_item_1_a_gradient_that_leads_beyond_a_rollback_does_not_count():
    bases = (Base(epoch=1, base=0), Base(epoch=2, base=3))
    scene = Scene([(3, True), (3, True)], bases=bases, tag=1)
    assert scene.decided().base == 3


def test_starred_a_stage_whose_restore_had_not_ended_is_a_lost_stage(monkeypatch):
    scene = Scene([(5, False), (4, True), (5, False)], logs_from=3)
    scene.change_stage("d1", is_restoring=True)
    result = scene.decided()
    assert acts(result) == ["keep", "restore", "keep"]
    assert runs(result) == [(1, 1, 3)]
    real = judgement.find_live
    whole = replace(scene.reports["d1"].stage, is_restoring=False)

    def believing(past: Past, trusted: Any) -> Any:
        trusted.evidence["d1"] = replace(trusted.evidence["d1"], stage=whole)
        return real(past, trusted)

    monkeypatch.setattr(judgement, "find_live", believing)
    assert acts(scene.decided()) == ["keep", "apply", "keep"], "an update applied to half a state"


def test_item_1_a_device_that_reports_other_layers_than_the_plan_gives_it_is_not_live():
    scene = Scene([(5, False), (5, False), (5, False)])
    scene.change_stage("d1", last_layer=2)
    assert acts(scene.decided()) == ["keep", "restore", "keep"]


# Items 2 and 3 ----------------------------------------------------------------------------------


def test_starred_the_head_is_that_of_live_stages_not_of_copies_or_the_lost(monkeypatch):
    """A stage that is being restored may stand beyond every live one's reach, or before it."""
    scene = Scene([(5, False), (5, False), (5, False)])
    scene.change_stage("d2", version=6, is_restoring=True)
    assert scene.decided().base == 5
    real = judgement.find_live

    def with_the_lost(past: Past, trusted: Any) -> Any:
        lost = judgement.Live(stage=2, device="d2", version=6, is_full=False)
        return (*real(past, trusted), lost)

    monkeypatch.setattr(judgement, "find_live", with_the_lost)
    result = scene.decide()
    assert not isinstance(result, Decision) or result.base != 5


def test_item_2_a_live_stage_that_cannot_follow_is_restored(monkeypatch):
    """Two versions behind, or one and not full: it is a lost stage, and its state a copy."""
    for behind in ((4, False), (3, True)):
        scene = Scene([(5, False), behind, (5, False)], logs_from=3)
        result = scene.decided()
        assert (result.base, acts(result)) == (5, ["keep", "restore", "keep"])
        assert runs(result) == [(1, 1, behind[0])], "its own state is the newest copy"
        (source,) = result.actions[1].sources
        assert source.copy.version == behind[0]
        assert source.device == "d1" or behind[0] == 3


def test_item_3_one_stage_that_is_not_full_means_that_nobody_committed():
    assert Scene([(5, True), (5, False)]).decided().base == 5
    assert Scene([(5, True), (5, True)]).decided().base == 6
    assert acts(Scene([(5, True), (5, True)]).decided()) == ["apply", "apply"]


# Item 4 -----------------------------------------------------------------------------------------


def test_item_4_adjacent_lost_stages_are_one_run_and_others_their_own():
    assert judgement.group((1, 2, 4)) == [(1, 2), (4, 4)]
    assert judgement.group(()) == []
    assert runs(joint().decided()) == [(1, 2, 3)]


def test_item_4_two_runs_are_replayed_each_between_its_own_neighbours():
    result = Scene([(5, False)] * 5, spares=2).lose("d1", "d3").decided()
    assert runs(result) == [(1, 1, 3), (3, 3, 3)]
    assert acts(result) == ["keep", "restore", "keep", "restore", "keep"]


def joint(**changes: Any) -> Scene:
    """d1 and d2 are lost; s0 holds a copy of stage 1, s1 one of stage 2."""
    scene = Scene([(5, False)] * 4, spares=2)
    own = {i: scene.reports[f"d{i}"].copies[1] for i in (1, 2)}
    assert [copy.first_layer for copy in own.values()] == [2, 4]
    scene.lose("d1", "d2")
    scene.change("s0", copies=(replace(own[1], **changes),))
    scene.change("s1", copies=(own[2],))
    scene.change("d3", copies=scene.reports["d3"].copies[1:])
    return scene


def test_item_4_a_run_needs_all_its_layers_at_one_version(monkeypatch):
    assert runs(joint().decided()) == [(1, 2, 3)]
    scene = joint(version=4)
    scene.past = replace(scene.past, durable=3)
    assert isinstance(scene.decide(), Halt), "stage 1 at 4, stage 2 at 3: no common version"

    def each_for_itself(sources: Any, layers: range, version: int) -> bool:
        newer = {layer for s in sources if s.copy.version >= version for layer in s.copy.layers}
        return set(layers) <= newer

    monkeypatch.setattr(judgement, "is_covered", each_for_itself)
    with pytest.raises(ProtocolError, match="no copy of layer"):
        scene.decide()


def test_item_4_logs_must_be_whole_at_both_edges_and_at_these_very_cuts():
    for device, direction, cut in (("d0", "forward", 2), ("d2", "backward", 4)):
        good = span(direction, cut, 3, 5)
        for logs in (
            (span(direction, cut, 4, 5),),
            (span(direction, cut, 3, 4),),
            (span(direction, cut + 1, 3, 5),),
            (span("backward" if direction == "forward" else "forward", cut, 3, 5),),
            (),
        ):
            scene = Scene([(5, False)] * 3).lose("d1").change(device, logs=logs)
            assert scene.decided().is_rollback, logs
        split = (span(direction, cut, 3, 4), span(direction, cut, 4, 9))
        for logs in ((good,), split):
            scene = Scene([(5, False)] * 3).lose("d1").change(device, logs=logs)
            assert runs(scene.decided()) == [(1, 1, 3)]


def test_item_4_a_copy_of_the_base_itself_needs_no_logs():
    scene = Scene([(5, False)] * 3).lose("d1")
    fresh = Copy(first_layer=2, last_layer=3, tag=1, version=5, verdict=Verdict())
    scene.change("s0", copies=(fresh,)).change("d0", logs=()).change("d2", logs=())
    assert runs(scene.decided()) == [(1, 1, 5)]


def test_item_4_the_newest_copy_is_taken():
    scene = Scene([(5, False)] * 3).lose("d1")
    fresh = Copy(first_layer=2, last_layer=3, tag=1, version=4, verdict=Verdict())
    scene.change("s0", copies=(fresh,))
    assert runs(scene.decided()) == [(1, 1, 4)]


def test_item_4_a_run_at_either_end_needs_its_rows_again():
    for lost in ("d0", "d2"):
        scene = Scene([(5, False)] * 3).lose(lost)
        assert not scene.decided().is_rollback
        scene.past = replace(scene.past, data_from=4)
        assert scene.decided().is_rollback
    scene = Scene([(5, False)] * 3).lose("d1")
    scene.past = replace(scene.past, data_from=4)
    assert not scene.decided().is_rollback, "an inner stage reads no rows"


def test_item_4_every_replayed_step_but_the_last_needs_its_verdict():
    scene = Scene([(6, False)] * 3).lose("d1")
    some = tuple(StepVerdict(step=step, verdict=Verdict()) for step in (4, 5))
    for device in ("d0", "d2"):
        scene.change(device, verdicts=some)
    assert scene.decided().is_rollback, "step 3 is to be replayed, and its verdict is gone"


def test_item_4_what_is_lent_to_a_run_must_be_logged_above_it():
    """Steps 3 and 4 are replayed: they need what steps 2 and 3 lent."""
    scene = Scene([(5, False)] * 3).lose("d1")
    logs = scene.reports["d0"].logs
    layers = scene.plan.stages[1].layers
    assert (layers.start, layers.stop, scene.past.durable) == (2, 4, 3), "the scene has changed"
    for tie, needed in (
        (Tie(owner_layer=0, borrower_layers=(3,)), True),  # borrowed in the run
        (Tie(owner_layer=0, borrower_layers=(5,)), True),  # goes through it
        (Tie(owner_layer=2, borrower_layers=(5,)), False),  # the run itself lends
        (Tie(owner_layer=2, borrower_layers=(3,)), False),  # and borrows
        (Tie(owner_layer=0, borrower_layers=(1,)), False),
        (Tie(owner_layer=4, borrower_layers=(5,)), False),
    ):
        scene.past = replace(scene.past, ties=(tie,))
        scene.change("d0", logs=logs)
        assert scene.decided().is_rollback is needed, tie
        for first, stop, enough in ((2, 4, True), (2, 3, False), (3, 4, False)):
            scene.change("d0", logs=(*logs, span("tied", 2, first, stop)))
            assert scene.decided().is_rollback is (needed and not enough), (tie, first, stop)


# Items 5 and 6 ----------------------------------------------------------------------------------


def test_item_5_rollback_takes_all_to_the_newest_common_version():
    scene = Scene([(5, False)] * 3).lose("d1").change("d0", logs=())
    result = scene.decided()
    assert (result.base, result.is_rollback) == (3, True)
    assert acts(result) == ["restore"] * 3
    assert all(action.version == 3 for action in result.actions)
    assert result.runs == ()
    assert "rollback to 3" in result.reason


def test_item_5_below_the_durable_version_it_halts_and_says_what_is_missing():
    scene = Scene([(5, False)] * 3)
    scene.past = replace(scene.past, layer_names=("a", "b", "c", "d", "e", "f"), checkpoint=0)
    scene.checkpoint(0)
    halt = scene.lose("d1", "d2").halted()  # d1's copy lay on d2
    assert halt.missing_layers == (2, 3)
    assert "2 (c), 3 (d)" in halt.reason
    assert "Newest checkpoint: version 0" in halt.reason
    assert halt.checkpoint == 0


def test_item_5_a_device_that_returns_with_the_missing_copy_ends_the_wait():
    scene = Scene([(5, False)] * 3, spares=2)
    copies = scene.reports["d2"].copies
    scene.lose("d1", "d2")
    scene.halted()
    scene.reports["d2"] = Evidence(copies=copies)  # a newcomer with what it had
    assert scene.decided().base == 3 or runs(scene.decided())


def test_item_5_version_0_is_always_there():
    scene = Scene([(1, False)] * 3, wave=0, spares=3)
    for device in scene.reports:
        scene.change(device, copies=())
    result = scene.checkpoint(0).lose("d0", "d1", "d2").decided()
    assert (result.base, acts(result)) == (0, ["restore"] * 3)
    assert {s.device for action in result.actions for s in action.sources} == {"coordinator"}


def test_item_6_without_a_live_stage_the_copies_decide():
    scene = Scene([(5, False)] * 2, spares=2)
    held = [*scene.reports["d0"].copies, *scene.reports["d1"].copies]
    scene.lose("d0", "d1").change("s1", copies=tuple(held))
    result = scene.decided()
    assert (result.base, result.is_rollback) == (3, True)
    assert "no stage is live" in result.reason


def test_a_rollback_that_was_interrupted_goes_on_where_the_journal_says():
    """Epoch 2 rolled back to 3. d0 is restored there, d1 still has version 5, d2's is half done."""
    bases = (Base(epoch=1, base=0), Base(epoch=2, base=3))
    scene = Scene([(3, False), (5, False), (3, False)], bases=bases)
    scene.change_stage("d0", tag=2).change_stage("d2", tag=2, is_restoring=True)
    result = scene.decided()
    assert (result.base, acts(result)) == (3, ["keep", "restore", "restore"])
    assert runs(result) == [(1, 2, 3)]


# Item 7 -----------------------------------------------------------------------------------------


def need(**changes: Any) -> OwnersNeed:
    base = OwnersNeed(
        epoch=2,
        plan=make_plan(3),
        lost_stages=(1,),
        devices=("d0", "d2", "s0", "s1", "s2"),
        copies_of={"s2": (1,)},
    )
    return replace(base, **changes)


def taken_by(choice: OwnersChoice) -> list[str]:
    assert choice.plan is not None, choice.reason
    return list(choice.plan.devices)


def test_item_7_who_holds_the_copy_and_has_the_program_comes_first():
    ready = DeviceFacts(compiled=((2, 3),))
    assert taken_by(choose_owners(need())) == ["d0", "s2", "d2"]
    assert taken_by(choose_owners(need(), facts={"s1": ready})) == ["d0", "s2", "d2"]
    assert taken_by(choose_owners(need(copies_of={}), facts={"s1": ready})) == ["d0", "s1", "d2"]
    both = need(copies_of={"s1": (1,), "s2": (1,)})
    assert taken_by(choose_owners(both, facts={"s2": ready})) == ["d0", "s2", "d2"]
    assert taken_by(choose_owners(both)) == ["d0", "s1", "d2"]


def test_item_7_memory_is_looked_at_and_a_cut_link_is_left_out():
    small = {"s2": DeviceFacts(memory_bytes=10)}
    sizes = (0, 20, 0)
    assert taken_by(choose_owners(need(), facts=small, stage_bytes=sizes)) == ["d0", "s0", "d2"]
    assert taken_by(choose_owners(need(cannot_hear=(("d2", "s2"),)))) == ["d0", "s0", "d2"]


def test_item_7_nobody_idle_is_said_and_halts():
    alone = need(devices=("d0", "d2"))
    assert choose_owners(alone).plan is None
    halt = Scene([(5, False)] * 3, spares=0).lose("d1").halted()
    assert "no idle device can take stage 1 (layers 2-3)" in halt.reason


def test_item_7_holders_are_named_anew_and_never_the_owner_itself():
    choice = choose_owners(need(), copies=2)
    assert choice.plan is not None
    for stage, entry in zip(choice.plan.stages, choice.holders, strict=True):
        assert stage.first_layer == entry.first_layer
        assert stage.device not in entry.devices
        assert len(entry.devices) == len(set(entry.devices)) == 2


def test_other_cuts_mean_a_rollback_from_which_every_layer_can_be_had():
    plan = PipelinePlan.even(6, ["d0", "d2"], microbatches=MB)
    scene = Scene([(5, False)] * 3, spares=0).lose("d1")
    result = scene.decided(lambda need: OwnersChoice(plan=plan))
    assert (result.base, result.is_rollback, acts(result)) == (3, True, ["restore"] * 2)
    for stage, action in zip(plan.stages, result.actions, strict=True):
        held = {layer for source in action.sources for layer in source.copy.layers}
        assert set(stage.layers) <= held
        assert {source.copy.version for source in action.sources} == {3}


def test_a_policy_that_moves_a_live_stage_is_refused():
    plan = PipelinePlan.even(6, ["d2", "s0", "d0"], microbatches=MB)
    with pytest.raises(ProtocolError, match="holds it, live"):
        Scene([(5, False)] * 3).lose("d1").decide(lambda need: OwnersChoice(plan=plan))


def test_a_verdict_that_only_a_manifest_knows_comes_with_the_copy_that_is_restored():
    scene = Scene([(5, True), (5, True), (5, True)]).lose("d0")
    skipped = Verdict(is_finite=False, skip=True)
    copy = Copy(first_layer=0, last_layer=1, tag=1, version=6, verdict=skipped)
    scene.change("s0", copies=(copy,))
    result = scene.decided()
    assert result.verdict_pending
    assert runs(result) == [(0, 0, 6)]
    assert result.actions[0].sources[0].copy.verdict == skipped


def test_a_verdict_that_anyone_knows_is_used():
    skipped = Verdict(is_finite=False, skip=True)
    scene = Scene([(6, False), (5, True), (5, True)])
    scene.change("d0", verdicts=(StepVerdict(step=5, verdict=skipped),))
    result = scene.decided()
    assert not result.verdict_pending
    assert decision.known_verdict(result, 5) == skipped


def test_reasons_say_what_is_dropped_applied_and_replayed():
    result = Scene([(6, False), (6, False), (5, True)]).lose("d0").decided()
    assert "head 6; stages 2 apply step 5" in result.reason
    assert "stage 0: replay of steps 3-5 from a copy of version 3" in result.reason
    assert "takes stage 0" in result.reason


# Laws -------------------------------------------------------------------------------------------


@st.composite
def pipelines(draw: Any) -> tuple[Scene, int, int]:
    """A run at any moment (T1, T2 hold by construction), what was shown, and any losses."""
    count = draw(st.integers(1, 5))
    wave = draw(st.integers(0, 3))
    step = wave + draw(st.integers(0, 3))
    if draw(st.booleans()):  # step committed by the first `applied` stages
        applied = draw(st.integers(1, count))
        states = [(step + 1, False)] * applied + [(step, True)] * (count - applied)
        shown = step + 1
    else:
        full_from = draw(st.integers(0, count))
        states = [(step, index >= full_from) for index in range(count)]
        shown = step
    spares = draw(st.integers(0, 3))
    logs_from = draw(st.sampled_from([wave, wave + 1, None]))
    scene = Scene(states, wave=wave, spares=spares, logs_from=logs_from)
    if draw(st.booleans()):
        scene.checkpoint(draw(st.sampled_from([0, wave])))
    lost = draw(st.sets(st.sampled_from(sorted(scene.reports))))
    scene.lose(*(lost - {"coordinator"}))
    return scene, step, shown


@settings(max_examples=400, deadline=None)
@given(pipelines(), st.randoms())
def test_laws_of_every_decision(made, random):
    scene, step, shown = made
    result = scene.decide()
    shuffled = list(scene.reports.items())
    random.shuffle(shuffled)
    scene.reports = dict(shuffled)
    assert scene.decide() == result, "a function of what was reported, not of its order"
    layers = range(scene.plan.num_layers)
    copied = {
        layer
        for report in scene.reports.values()
        for copy in report.copies
        if copy.version == scene.past.durable
        for layer in copy.layers
    }
    alive = [d for d in scene.reports if d != "coordinator"]
    if isinstance(result, Halt):  # I9: only for want of a copy or a device
        assert set(layers) - copied or len(alive) < len(scene.plan.stages)
        return
    assert scene.past.durable <= result.base  # I7
    assert result.base >= shown or result.is_rollback  # I8
    live = [
        report.stage
        for device, report in scene.reports.items()
        if report.stage is not None and scene.plan.stage_of(device) is not None
    ]
    if not result.is_rollback:
        assert result.base <= step + 1
        assert result.base >= max(stage.version for stage in live)
    bases = (*scene.past.bases, Base(epoch=result.epoch, base=result.base))
    for report in scene.reports.values():  # I6
        for copy in report.copies:
            assert copy.version <= result.base or not is_valid(copy.tag, copy.version, bases)
    devices = [action.device for action in result.actions]
    assert len(set(devices)) == len(devices)  # I1
    assert set(devices) <= set(alive)  # I12
    for action, stage in zip(result.actions, result.plan.stages, strict=True):
        report = scene.reports[action.device].stage
        if action.act == "keep":
            assert report is not None
            assert report.version == result.base
        elif action.act == "apply":  # I3, I4: a whole gradient, on the version it was made for
            assert report is not None
            assert (report.version, report.is_full) == (result.base - 1, True)
        else:
            held = {layer for s in action.sources for layer in s.copy.layers}
            assert set(stage.layers) <= held
            for source in action.sources:  # I5, I12
                assert source.copy.version == action.version
                assert source.device in scene.reports
    for run in result.runs:
        edge_copies = {result.actions[index].version for index in run.stages}
        assert edge_copies == {run.version}
        if run.version == result.base:
            continue
        known = {entry.step for entry in result.verdicts}
        assert set(range(run.version, result.base - 1)) <= known
    if result.verdict_pending:  # someone can make it: stage 0, live and full, or replayed
        first = result.actions[0]
        manifest = first.sources and first.sources[0].copy.verdict
        assert first.act == "apply" or first.version < result.base or manifest


@settings(max_examples=200, deadline=None)
@given(pipelines(), st.data())
def test_a_decision_that_is_interrupted_is_decided_again_without_going_back(made, data):
    """Some devices installed it, some not, some were in the middle; then more are lost."""
    scene, _, _ = made
    first = scene.decide()
    if isinstance(first, Halt):
        return
    bases = (*scene.past.bases, Base(epoch=first.epoch, base=first.base))
    again = Scene([(0, False)] * len(scene.plan.stages))
    again.past = replace(scene.past, epoch=first.epoch + 1, bases=bases, plan=first.plan)
    again.reports = dict(scene.reports)
    for action in first.actions:
        stage = first.plan.stages[action.stage]
        how = data.draw(st.sampled_from(["done", "half", "not yet"]))
        if how == "not yet":
            continue
        before = again.reports[action.device]
        restoring = how == "half" and action.act == "restore"
        is_half_applied = how == "half" and action.act == "apply"
        verdicts = before.verdicts
        if not restoring and not is_half_applied:
            verdicts = (*verdicts, StepVerdict(step=first.base - 1, verdict=Verdict()))
        report = StageReport(
            first_layer=stage.first_layer,
            last_layer=stage.last_layer,
            version=first.base - is_half_applied,
            tag=first.epoch,
            is_full=is_half_applied,
            is_restoring=restoring,
        )
        kept = tuple(copy for copy in before.copies if copy.version <= first.base)
        logs = tuple(replace(x, stop_step=min(x.stop_step, first.base)) for x in before.logs)
        again.change(action.device, stage=report, copies=kept, logs=logs, verdicts=verdicts)
    lost = data.draw(st.sets(st.sampled_from(sorted(again.reports))))
    again.lose(*(lost - {"coordinator"}))
    second = again.decide()
    if isinstance(second, Halt):
        return
    assert second.base <= first.base
    assert second.base == first.base or second.is_rollback
    assert second.base >= scene.past.durable
