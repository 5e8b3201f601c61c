"""Devices leave, training goes on: whole recoveries in virtual time, under any order of events.

The crowd checks the invariants after each event; here are the stories, and runs by chance.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest

from crowdmesh_jax.core import DeviceId, values
from crowdmesh_jax.errors import InvalidValueError
from crowdmesh_jax.protocol import CoordinatorState, MemberState, Tie, messages, records
from crowdmesh_jax.protocol import coordinator_events as ce
from crowdmesh_jax.protocol import member_events as me
from crowdmesh_jax.protocol.coordinator_state import Ack
from crowdmesh_jax.protocol.coordinator_waves import who_did_not_store

from .chaos import CHANGES, FAULTS, Chaos
from .crowd import Crowd


def completes(crowd: Crowd) -> Crowd:
    crowd.run()
    assert crowd.hub.fault is None, crowd.hub.fault
    assert crowd.hub.completed == crowd.begin.steps
    assert sorted(crowd.hub.shown) == list(range(crowd.begin.steps))
    return crowd


def running(crowd: Crowd, committed: int, more: int = 0) -> Crowd:
    """Runs to `committed` steps, and some events beyond."""
    crowd.run(until=lambda: crowd.hub.state.committed >= committed and crowd.hub.state.was_resumed)
    for _ in range(more):
        crowd.step()
    return crowd


def decisions(crowd: Crowd) -> list[records.Decision]:
    return crowd.hub.decisions[1:]


def test_an_undisturbed_run_keeps_waves_and_discards():
    crowd = completes(Crowd(seed=1))
    kinds = [plain["kind"] for plain in crowd.hub.journal]
    assert kinds.count("Epoch") == 1
    assert crowd.hub.durable == 8
    assert kinds.count("Wave") > 2


@pytest.mark.parametrize("victim", ["d0", "d1", "d2"])
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_stage_is_replayed_and_nothing_is_lost(victim, seed):
    crowd = running(Crowd(seed=seed, steps=7), seed + 2, random.Random(seed).randint(0, 30))
    crowd.kill(victim)
    completes(crowd)
    (decision,) = decisions(crowd)
    assert not decision.is_rollback
    assert decision.plan.devices.count(victim) == 0
    waves = [r for r in crowd.hub.records if isinstance(r, records.Wave) and r.ledger]
    later = [wave.version for wave in waves if wave.epoch == decision.epoch]
    assert later[0] >= decision.base, "R16: a wave starts at once at the new base"


@pytest.mark.parametrize("victims", [["d0"], ["d1"], ["d2"], ["d3"], ["d0", "d1"], ["d2", "d3"]])
@pytest.mark.parametrize("seed", range(3))
def test_stages_that_lend_borrow_or_pass_on_are_replayed(victims, seed):
    """Layer 1 lends to 4 and 6, across all cuts; a second loss is replayed from the replayer's
    own logs."""
    tie = Tie(owner_layer=1, borrower_layers=(4, 6))
    crowd = Crowd(
        stages=4, layers=7, spares=4, copies=2, steps=16, seed=seed, ties=(tie,),
        terms={"wave_every": 5, "log_steps": 12},
    )  # fmt: skip
    crowd.run(until=lambda: crowd.hub.state.durable > 0)
    running(crowd, crowd.hub.state.durable + 2, 5 * seed)
    for victim in victims:
        crowd.kill(victim)
    crowd.run(until=lambda: len(decisions(crowd)) == 1 and crowd.hub.state.was_resumed)
    again = decisions(crowd)[0].plan.devices[len(victims) + seed % 2]
    crowd.kill(str(again))
    completes(crowd)
    assert len(decisions(crowd)) >= 2
    assert not any(decision.is_rollback for decision in decisions(crowd))
    assert any(
        run.version < decision.base for decision in decisions(crowd) for run in decision.runs
    )


def test_two_neighbours_lost_at_once_are_replayed_as_one_run():
    crowd = running(Crowd(seed=5, stages=4, spares=3, copies=2, steps=8), 5)
    crowd.kill("d1")
    crowd.kill("d2")
    completes(crowd)
    assert sorted(set(crowd.names) - {"d1", "d2"}) >= sorted(decisions(crowd)[-1].plan.devices)


def test_a_second_loss_in_the_middle_of_a_replay_is_decided_afresh():
    crowd = running(Crowd(seed=3, spares=3, copies=2, steps=8), 4)
    crowd.kill("d1")
    crowd.run(until=lambda: any(m.state.phase.value == "catching up" for m in living(crowd)))
    (replayer,) = [m for m in living(crowd) if m.state.phase.value == "catching up"]
    crowd.kill(replayer.name)
    completes(crowd)
    assert [d.epoch for d in decisions(crowd)] == sorted({d.epoch for d in decisions(crowd)})


def living(crowd: Crowd) -> list[Any]:
    return [body for body in crowd.members.values() if not body.is_dead]


def test_a_zombie_is_told_comes_back_as_a_newcomer_and_may_serve_again():
    crowd = running(Crowd(seed=4, steps=9), 3)
    crowd.suspect("d1")
    zombie = crowd.members["d1"]
    crowd.run(until=lambda: zombie.state.phase.value == "idle")
    assert zombie.state.install is None
    assert zombie.copies, "its stage was freed into a copy"
    assert zombie.state.logs == ()
    crowd.run(until=lambda: "d1" in crowd.hub.state.members)
    crowd.kill("d2")
    completes(crowd)


def test_a_coordinator_that_comes_back_finds_everyone_training():
    crowd = running(Crowd(seed=6, steps=9), 3)
    before = crowd.hub.state.epoch
    crowd.crash_hub(down_s=3.0)
    completes(crowd)
    assert crowd.hub.state.epoch == before
    kinds = [plain["kind"] for plain in crowd.hub.journal]
    assert kinds.count("Term") == 2
    assert kinds.count("Epoch") == 1
    shown = [loss for loss in crowd.hub.shown.values() if loss == loss]
    assert len(shown) == 9, "members kept the losses that nobody was there to hear"


@pytest.mark.parametrize("after_actions", range(1, 8))
def test_a_coordinator_that_dies_within_a_recovery_opens_the_next_epoch(after_actions):
    crowd = running(Crowd(seed=7, steps=7), 3)
    crowd.kill("d1")
    crowd.run(until=lambda: crowd.hub.state.phase.value == "deciding")
    crowd.crash_hub(after_actions=after_actions, down_s=1.0)
    completes(crowd)
    epochs = [r.epoch for r in crowd.hub.records if isinstance(r, records.Epoch)]
    assert epochs == sorted(set(epochs))


@pytest.mark.parametrize("after_actions", range(1, 12))
def test_a_coordinator_that_dies_while_a_run_ends_lets_its_members_go_when_it_is_back(
    after_actions,
):
    """Before the last checkpoint, behind it, behind the record of the end, between two Releases."""
    crowd = running(Crowd(seed=9, steps=5), 4)
    crowd.run(until=lambda: crowd.hub.state.phase.value == "finishing")
    crowd.crash_hub(after_actions=after_actions, down_s=1.0)
    completes(crowd)
    for _ in range(60):
        crowd.step()
    phases = {name: body.state.phase.value for name, body in crowd.members.items()}
    assert set(phases.values()) == {"idle"}, phases
    assert [type(r) for r in crowd.hub.records].count(records.Finish) == 1


def test_a_run_without_enough_copies_waits_and_then_halts_naming_the_layers():
    crowd = running(Crowd(seed=8, spares=2, steps=30), 6)
    crowd.kill("d1")
    crowd.kill("s1")
    crowd.kill("s0")
    crowd.run(until=lambda: crowd.hub.state.phase.value == "waiting")
    assert any(isinstance(news, ce.Waiting) for news in crowd.hub.news)
    crowd.run(events=200_000)
    assert crowd.hub.fault is not None
    assert "the run cannot go on" in crowd.hub.fault.text


def test_a_device_that_returns_ends_the_wait():
    crowd = running(Crowd(seed=8, spares=0, steps=6, snapshot_every=1), 3)
    crowd.kill("d1")
    crowd.run(until=lambda: crowd.hub.state.phase.value == "waiting")
    crowd.restart("d1")
    completes(crowd)


def test_states_survive_json_in_the_middle_of_a_recovery():
    crowd = running(Crowd(seed=9, steps=6), 2)
    crowd.kill("d1")
    for _ in range(12):
        for _ in range(12):
            crowd.step()
        hub = crowd.hub.state
        assert values.from_plain(CoordinatorState, values.to_plain(hub)) == hub
        for body in crowd.members.values():
            assert values.from_plain(MemberState, values.to_plain(body.state)) == body.state


def test_a_fenced_member_says_nothing_but_its_report():
    crowd = running(Crowd(seed=10, steps=9), 3)
    said: list[Any] = []
    send = crowd.send

    def watch(sender: str, to: str, message: Any, *rest: Any) -> None:
        body = crowd.members.get(sender)
        if body is not None and body.state.phase.value == "fenced":
            said.append(type(message))
        send(sender, to, message, *rest)

    crowd.send = watch  # type: ignore[method-assign]
    crowd.kill("d2")
    completes(crowd)
    assert set(said) <= {messages.Report, messages.Chunk, messages.Seal}
    assert messages.Report in said


def test_an_install_without_its_fence_is_refused():
    crowd = running(Crowd(seed=11), 2)
    body = crowd.members["d1"]
    install = body.state.granted
    before = body.state
    later = values.from_plain(
        messages.Install, {**values.to_plain(install), "epoch": install.epoch + 1}
    )
    from crowdmesh_jax.protocol import member

    state, (action,) = member.handle(
        before, me.MessageReceived(sender="hub", message=later), crowd.now_s
    )
    assert isinstance(action.message, messages.StaleEpoch)
    assert state.active == before.active


@pytest.mark.parametrize("kind", FAULTS)
def test_runs_by_chance_end_with_every_invariant_whole(kind):
    ends = {Chaos(seed, kinds=(kind,)).run() for seed in range(4)}
    assert "done" in ends


@pytest.mark.parametrize("seed", range(100, 112))
def test_all_kinds_of_faults_mixed(seed):
    assert Chaos(seed, faults=4).run() in ("done", "halted")


@pytest.mark.long
def test_a_million_events():
    events, seed = 0, 10_000
    while events < 1_000_000:
        chaos = Chaos(seed, faults=random.Random(seed).randint(1, 6))
        chaos.run()
        events += chaos.crowd.events
        seed += 1


def test_the_terms_of_recovery_are_checked():
    with pytest.raises(InvalidValueError, match="wave_every"):
        ce.RecoveryTerms(wave_every=0)


@pytest.mark.parametrize("seed", range(30))
def test_damaged_copies_are_passed_over_or_asked_for_again(seed):
    """Every tenth copy is damaged on its way or on its disk; the run ends well with another, or
    says that it has none. (Run by run the states are checked against the undisturbed history.)"""
    chaos = Chaos(seed, faults=2, kinds=("kill", "restart"), copies=2, spares=3)
    chaos.crowd.damage = 0.1
    chaos.run(events=80_000)


def test_a_restore_whose_copy_is_damaged_goes_on_from_the_next_holder():
    crowd = running(Crowd(seed=8, spares=3, copies=2, steps=8), 4)
    crowd.run(until=lambda: crowd.hub.durable >= 2)
    crowd.kill("d1")
    crowd.run(until=lambda: crowd.hub.state.phase.value == "installing")
    (taken,) = [s for a in decisions(crowd)[-1].actions for s in a.sources]
    crowd.damage = 1.0
    crowd.run(until=lambda: crowd.hub.state.damaged != ())
    crowd.damage = 0.0
    completes(crowd)
    last = decisions(crowd)[-1]
    used = [(s.device, s.copy.name) for a in last.actions for s in a.sources]
    assert (taken.device, taken.copy.name) not in used


@pytest.mark.parametrize("seed", range(20))
def test_a_change_of_plan_loses_no_work(seed):
    crowd = running(Crowd(seed=seed, steps=9, stages=3, spares=2), 3, seed)
    committed = crowd.hub.state.committed
    crowd.ask_change()
    crowd.run(until=lambda: len(decisions(crowd)) == 1)
    (decision,) = decisions(crowd)
    assert not decision.is_rollback
    assert committed <= decision.base <= committed + 2, "the very version of the stop mark"
    assert all(action.version == decision.base for action in decision.actions)
    completes(crowd)


def test_a_newcomer_becomes_a_member_with_a_change():
    crowd = running(Crowd(seed=2, steps=9, spares=1), 2)
    crowd.kill("s0")
    crowd.run(until=lambda: len(decisions(crowd)) == 1 and crowd.hub.state.phase.value == "running")
    crowd.restart("s0")
    crowd.run(until=lambda: "s0" in crowd.hub.state.members)
    assert "s0" not in crowd.hub.state.party
    crowd.hub.on(ce.ChangeAsked(reason="s0 came"))
    crowd.run(until=lambda: "s0" in crowd.hub.state.party)
    completes(crowd)


def test_other_holders_are_told_between_two_waves_and_outlive_the_coordinator():
    crowd = running(Crowd(seed=3, steps=12, spares=2), 3)
    before = crowd.hub.state.holders
    crowd.ask_holders()
    crowd.run(until=lambda: any(isinstance(r, records.Assigned) for r in crowd.hub.records))
    (assigned,) = [r for r in crowd.hub.records if isinstance(r, records.Assigned)]
    assert assigned.holders != before
    crowd.crash_hub(down_s=0.5)
    crowd.run(until=lambda: crowd.hub.state.was_resumed and not crowd.hub.is_down)
    assert crowd.hub.state.holders == assigned.holders
    later = crowd.hub.durable
    crowd.run(until=lambda: crowd.hub.durable > later or crowd.hub.is_over)
    completes(crowd)


@pytest.mark.parametrize("seed", range(40))
def test_changes_among_faults(seed):
    Chaos(seed, faults=4, kinds=(*FAULTS, *CHANGES, *CHANGES), spares=3).run(events=80_000)


def test_a_last_stage_that_dies_with_its_last_loss_does_not_hold_up_the_end(monkeypatch):
    """Its part of the result is here; what it said of its last step died with it."""
    crowd = Crowd(seed=1, stages=2, steps=4)
    hub, send = crowd.hub, crowd.send

    def losing(sender: str, to: str, message: Any, lane: str, arrays: Any = ()) -> None:
        if not (isinstance(message, messages.Loss) and message.step == 3):
            send(sender, to, message, lane, arrays)

    monkeypatch.setattr(crowd, "send", losing)
    crowd.run(until=lambda: hub.state.phase.value == "finishing" and hub.state.checkpoint == 4)
    killed_s = crowd.now_s
    crowd.kill("d1")
    crowd.run()
    assert hub.completed == 4
    assert hub.shown[3] != hub.shown[3], "shown, as not a number"
    assert crowd.now_s - killed_s < 60, "no deadline was waited out"


def test_a_copy_that_was_discarded_before_it_was_fetched_again_ends_no_run():
    kinds = (*FAULTS, *CHANGES, *CHANGES)
    chaos = Chaos(4592, faults=4, kinds=kinds, spares=2, copies=1)
    chaos.crowd.damage = 0.05
    chaos.run(events=150_000)


@pytest.mark.parametrize("seed", range(4))
def test_the_wave_after_a_recovery_counts_where_it_is_at_the_durable_version(seed):
    """R16: the holder that is new since the loss has a copy at once, and the next wave is asked."""
    crowd = Crowd(seed=seed, spares=2, copies=2, steps=12)
    crowd.run(until=lambda: crowd.hub.durable >= 2)
    crowd.kill("d1")
    completes(crowd)
    (decision,) = decisions(crowd)
    assert decision.base == 2, "nothing was committed since: else this shows nothing"
    waves = [r for r in crowd.hub.records if isinstance(r, records.Wave) and r.ledger]
    later = [wave for wave in waves if wave.epoch == decision.epoch]
    assert later[0].version == decision.base
    assert all("d1" not in entry.devices for entry in later[0].ledger)


def test_the_interval_of_waves_can_be_set_but_never_beyond_what_logs_reach():
    crowd = running(Crowd(seed=1, steps=40, terms={"wave_every": 2, "log_steps": 8}), 3)
    crowd.hub.on(ce.IntervalAsked(steps=100))
    crowd.run(until=lambda: crowd.hub.state.committed >= 30)
    waves = [r.version for r in crowd.hub.records if isinstance(r, records.Wave) and r.ledger]
    later = [b - a for a, b in itertools.pairwise(waves) if a > 6]
    assert later
    assert all(4 <= gap <= 6 for gap in later), "half of the logs, and what asking takes"


def test_a_checkpoint_that_cannot_be_written_is_said_and_the_next_is_asked_for():
    crowd = Crowd(seed=4, steps=30, snapshot_every=3)
    crowd.damage = 1e-9  # no copy is damaged; three checkpoints in ten are not written
    completes(crowd)
    missed = [n.version for n in crowd.hub.news if isinstance(n, ce.CheckpointMissed)]
    kept = [n.version for n in crowd.hub.news if isinstance(n, ce.CheckpointKept)]
    assert missed
    assert len(kept) > 2
    assert kept == sorted(kept)


def test_a_coordinator_that_forgot_why_a_stop_was_asked_goes_on():
    """Found by the stateful test: the stop mark of a change reached the coordinator's next life."""
    terms = {"wave_every": 1, "log_steps": 2}
    crowd = Crowd(seed=0, steps=6, spares=1, schedule="gpipe", snapshot_every=3, terms=terms)
    for _ in range(117):
        crowd.step()
    crowd.crash_hub(after_actions=2, down_s=0.1)
    crowd.ask_change()
    crowd.ask_holders()
    completes(crowd)


def test_a_holder_without_room_does_not_keep_the_wave_open():
    crowd = running(Crowd(seed=2, steps=12), 2)
    crowd.damage = 1.0  # whatever comes cannot be kept
    began_s = crowd.now_s
    crowd.run(until=lambda: any(isinstance(n, ce.WaveGivenUp) for n in crowd.hub.news))
    assert crowd.now_s - began_s < 60, "not the two minutes of a wave that is merely late"
    crowd.damage = 0.0
    completes(crowd)
    assert crowd.hub.durable == 12


def test_who_lacks_a_copy_that_its_owner_has_did_not_store_it():
    crowd = running(Crowd(seed=2, steps=12), 2)
    state = crowd.hub.state
    version, stages = state.wave_from, state.plan.stages
    holders = {entry.first_layer: entry.devices for entry in state.holders}

    def blamed(*acked: tuple[int, str], missing: Any = None) -> tuple[str, ...]:
        acks = tuple(
            Ack(version=version, first_layer=first, device=DeviceId(device))
            for first, device in acked
        )
        everyone = [DeviceId(d) for d in state.party]
        return who_did_not_store(replace(state, acks=acks), missing or everyone)

    first, second = stages[0], stages[1]
    assert blamed() == (), "no owner had a snapshot: nothing was sent"
    assert blamed((first.first_layer, first.device)) == holders[first.first_layer]
    both = ((first.first_layer, first.device), (second.first_layer, second.device))
    lacking = {*holders[first.first_layer], *holders[second.first_layer]}
    assert set(blamed(*both)) == lacking
    assert blamed(*both, missing=holders[second.first_layer]) == holders[second.first_layer]
    done = (first.first_layer, holders[first.first_layer][0])
    assert set(blamed(*both, done)) <= lacking


def test_a_wave_that_only_owners_keep_does_not_count():
    """Nobody has room for copies: a loss goes back to the checkpoint instead of waiting for a state
    that died with its owner."""
    crowd = Crowd(seed=3, steps=12, snapshot_every=3, terms={"holders": (), "log_steps": 2})
    crowd.copies = 0
    running(crowd, 8)
    assert crowd.hub.state.checkpoint >= 3
    crowd.kill("d1")
    completes(crowd)
    (decision,) = decisions(crowd)
    assert decision.is_rollback
    assert decision.base >= 3
    assert not [r for r in crowd.hub.records if isinstance(r, records.Wave) and r.ledger]


def test_other_holders_wait_for_the_open_wave():
    """Who must acknowledge it was settled when it was asked for."""
    crowd = running(Crowd(seed=3, steps=12, spares=2), 3)
    crowd.run(until=lambda: crowd.hub.state.wave_asked_s is not None)
    crowd.ask_holders()
    assert crowd.hub.state.holders_asked is not None
    assert not [r for r in crowd.hub.records if isinstance(r, records.Assigned)]
    crowd.run(until=lambda: crowd.hub.state.holders_asked is None)
    waves = [r for r in crowd.hub.records if isinstance(r, records.Wave | records.Assigned)]
    assert isinstance(waves[-1], records.Assigned)
    assert isinstance(waves[-2], records.Wave)
    completes(crowd)


def test_a_copy_that_cannot_be_used_is_counted_out_whatever_its_holder_reports():
    crowd = running(Crowd(seed=8, spares=3, copies=2, steps=8), 4)
    crowd.run(until=lambda: crowd.hub.durable >= 2)
    crowd.kill("d1")
    crowd.run(until=lambda: crowd.hub.state.phase.value == "installing")
    (taken,) = [s for a in decisions(crowd)[-1].actions for s in a.sources]
    lost = messages.CopyLost(
        run="r1", epoch=crowd.hub.state.epoch, device=taken.device, copy=taken.copy,
        reason="it came damaged twice",
    )  # fmt: skip
    crowd.hub.on(me.MessageReceived(sender="d0", message=lost))
    assert taken.copy.name in crowd.members[taken.device].copies, "its holder knows nothing of it"
    completes(crowd)
    used = [(s.device, s.copy.name) for a in decisions(crowd)[-1].actions for s in a.sources]
    assert (taken.device, taken.copy.name) not in used


def test_a_verdict_made_anew_does_not_overtake_the_install_it_belongs_to():
    lanes = []
    for seed in range(40):
        crowd = running(Crowd(seed=seed, steps=7), 3, seed)
        send = crowd.send

        def watch(sender, to, message, lane, arrays=(), send=send):
            if isinstance(message, messages.VerdictKnown):
                lanes.append(lane)
            send(sender, to, message, lane, arrays)

        crowd.send = watch
        crowd.kill("d0")
        completes(crowd)
    assert set(lanes) == {"bulk"}, "the lane of Install"
