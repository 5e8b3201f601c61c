"""Runs in virtual time: they repeat, seconds add up, degenerate cases are as computed by hand."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from simulated_worlds import Parting, run, short, still_world

from crowdmesh_jax.errors import InvalidValueError
from crowdmesh_jax.mobility import RandomWaypoint
from crowdmesh_jax.simulation import (
    ABLATIONS,
    CAUSES,
    POLICIES,
    Body,
    Mean,
    World,
    compare_policies,
    make_setup,
    simulate,
)

ALL = (*POLICIES, *ABLATIONS)


@pytest.mark.parametrize("name", ALL)
def test_the_same_seed_gives_the_same_run_bit_for_bit(name):
    made = short("gauss_markov", work_s=200.0)
    shared = World(made, 5)
    first = run(shared, name)[1]
    assert run(shared, name)[1] == first  # a world is not used up by a run
    assert run(World(made, 5), name)[1] == first
    assert run(World(made, 6), name)[1] != first


@pytest.mark.parametrize("name", ALL)
def test_causes_add_up_and_work_is_done_once(name):
    world = World(short("gauss_markov", crash_per_s=1e-3), 3)
    body = Body(world, make_setup(name))
    seen = [(0, 0.0, 0.0)]
    commit = body._commit

    def watched():
        before = body.head
        commit()
        assert body.head == before + 1  # one version after the other
        seen.append((body.head, body.spent["useful"], body.now_s))

    body._commit = watched
    outcome = body.run()
    assert sum(outcome.split.values()) == pytest.approx(outcome.elapsed_s, abs=1e-6)
    assert min(outcome.split.values()) >= 0
    assert set(outcome.split) == set(CAUSES)
    assert outcome.commits == len(seen) - 1
    highest = 0
    for (_, useful, now_s), (head, after, then_s) in itertools.pairwise(seen):
        assert after <= then_s + 1e-9  # useful work never exceeds the time on the clock
        assert then_s >= now_s
        assert (after > useful) == (head > highest)  # nothing counts twice
        highest = max(highest, head)
    if outcome.finished:
        assert highest == outcome.steps == 300


def test_without_losses_a_run_takes_its_work_and_its_waves():
    world = still_world(crash_per_s=0.0)
    bare = run(world, "none", checkpoint_steps=10**6)[1]
    assert bare.elapsed_s == pytest.approx(300.0)
    assert bare.split["useful"] == bare.elapsed_s
    setup = make_setup("next_stage")
    setup = replace(setup, policy=replace(setup.policy, interval_steps=50))
    outcome = run(world, setup, checkpoint_steps=10**6)[1]
    assert outcome.waves == 6  # after steps 1, 51, 101, ..., 251
    # The first one sends all, 10 s at 6 MB/s; the others what has changed, 3 s. The last stage's
    # copy is at the first, in range: all at once.
    slowed_s = 0.1 * (10 + 5 * 3 - 6 * 0.05)  # while all stand for a snapshot nothing slows down
    assert outcome.split["overhead"] == pytest.approx(6 * 0.05 + slowed_s)
    assert outcome.elapsed_s == pytest.approx(300 + outcome.split["overhead"])
    assert outcome.sent_bytes == 4 * (60_000_000 + 5 * 18_000_000)


def test_no_copies_and_no_checkpoints_take_what_renewal_theory_says():
    """One stage, crashes only: each loss begins anew. With steps of s seconds and downtime R,
    E[time] = (exp(h s n) - 1) (1 / h + R'), where R' is what a loss costs beside its work."""
    hazard, work_s = 1 / 300, 200.0
    made = short(devices=3, stages=1, crash_per_s=hazard, work_s=work_s, speed_spread=0.0)
    times_s = []
    for seed in range(120):
        world = World(made, seed, away_s=1.0, longest=30.0)
        times_s.append(run(world, "none", checkpoint_steps=10**6)[1].elapsed_s)
    down_s = made.detect_s + made.restart_s + 40.0  # and 60 MB over the uplink
    # A crash of the one who takes over, meanwhile, is a loss too.
    down_s = math.expm1(hazard * down_s) / hazard
    expected = math.expm1(hazard * work_s) * (1 / hazard + down_s)
    error = np.std(times_s) / math.sqrt(len(times_s))
    assert abs(np.mean(times_s) - expected) < 3 * error + 0.03 * expected
    assert error < 0.1 * expected


def test_replay_redoes_the_lost_stage_only_and_rollback_all():
    """A crash of one owner, once, 60 steps after the only wave."""
    made = still_world(crash_per_s=0.0)
    made._crashes[100] = [(100.5, 0)]
    setup = make_setup("next_stage")
    setup = replace(setup, policy=replace(setup.policy, interval_steps=40))
    base = run(still_world(crash_per_s=0.0), setup, checkpoint_steps=10**6)[1]
    outcomes = {
        replay: run(made, replace(setup, replay=replay), checkpoint_steps=10**6)[1]
        for replay in (True, False)
    }
    assert base.losses == 0
    for replay, outcome in outcomes.items():
        assert (outcome.losses, outcome.replays, outcome.rollbacks) == (1, replay, not replay)
        assert outcome.split["detection"] == 3.0
        assert outcome.split["restart"] == 2.0
        assert outcome.split["transfer"] == pytest.approx(10.0)  # it had nothing of the stage
    partly, wholly = (outcomes[replay].split["redone"] for replay in (True, False))
    # Both lose what was done of the step that ran; then steps of 1 s, all of them or one stage's
    # 8 microbatches of the 8 + 3 slots of a step.
    steps = (wholly - partly) / (1 - 8 / 11)
    assert steps == pytest.approx(round(steps), abs=1e-6)
    assert 1 <= round(steps) <= 40
    assert 0 <= wholly - round(steps) < 1


@pytest.mark.parametrize("name", ["mobility", "neighbour", "next_stage"])
def test_decisions_are_the_same_whatever_the_future(name):
    made = short("waypoint", work_s=250.0)
    model = made.model()
    assert isinstance(model, RandomWaypoint)
    part = 120
    logs, worlds = {}, []
    for other in (None, 7, 8):
        world = World(made, 4, model=Parting(model, part, other=other))
        worlds.append(world)
        body = Body(world, make_setup(name))
        log = logs[other] = []
        policy = body._setup.policy

        class Spy:
            name = policy.name

            def decide(self, view, policy=policy, log=log, body=body):
                decision = policy.decide(view)
                log.append((body.now_s, decision))
                return decision

            def moves(self, view, policy=policy, log=log, body=body):
                log.append((body.now_s, policy.moves(view)))
                return log[-1][1]

            def take_over(self, view, lost, policy=policy, log=log, body=body):
                log.append((body.now_s, policy.take_over(view, lost)))
                return log[-1][1]

        body._setup = replace(body._setup, policy=Spy())
        body.run()
    past = {key: [item for item in log if item[0] <= part] for key, log in logs.items()}
    assert len(past[None]) >= 3
    assert past[None] == past[7] == past[8]
    futures = [[world.moment(t).linked for t in range(part + 1, 240)] for world in worlds]
    assert not np.array_equal(futures[1], futures[2])  # the worlds do part


def test_all_policies_meet_the_same_movement_and_crashes():
    made = short("gauss_markov", crash_per_s=1e-3)
    world, again = World(made, 2), World(made, 2)
    run(world, "neighbour")
    run(again, "mobility")
    for second in range(250):
        assert np.array_equal(world.moment(second).linked, again.moment(second).linked)
        assert world.departures(second) == again.departures(second)
        seen, other = world.seen(second).sightings, again.seen(second).sightings
        assert np.array_equal(seen.velocities_m_per_s, other.velocities_m_per_s)


def test_where_no_chain_is_in_range_a_run_waits():
    world = still_world(near_m=200.0, crash_per_s=0.0)
    world.limit_s = 50
    outcome = run(world, "mobility")[1]
    assert not outcome.finished
    assert outcome.split["waiting"] == outcome.elapsed_s == 50


def test_a_planned_move_loses_no_step_and_costs_its_stop():
    """Our policy on a scenario without crashes: links end, and nearly nothing is redone."""
    world = World(short("waypoint", crash_per_s=0.0, work_s=600.0), 8)
    ours = run(world, "mobility")[1]
    assert ours.switches >= 2
    assert ours.handovers >= ours.switches
    reactive = run(world, "mobility - hand-over")[1]
    assert reactive.handovers == 0
    assert ours.losses < reactive.losses
    # At most the changed share, 3 s, and the restart, 2 s, for each stop.
    assert 2 * ours.switches <= ours.split["switching"] <= 5.01 * ours.switches + 20


def test_unknown_names_are_told_with_what_is_known():
    with pytest.raises(InvalidValueError, match="did you mean 'neighbour'"):
        make_setup("neighbor")
    with pytest.raises(InvalidValueError, match="policies that differ"):
        compare_policies("calm", ["none", "none"], [1])
    with pytest.raises(InvalidValueError, match="no scenario"):
        simulate("windy", "none", 1)


def test_a_mean_has_students_interval():
    values = [1.0, 2.0, 3.0, 4.0, 6.0]
    mean = Mean.of(values)
    assert mean.value == 3.2
    # t(0.975, 4) = 2.7764
    assert mean.half_width == pytest.approx(
        2.7764 * np.std(values, ddof=1) / math.sqrt(5), rel=2e-3
    )
    twenty = Mean.of(list(np.arange(20.0)))
    assert twenty.half_width == pytest.approx(2.0930 * math.sqrt(35 / 20), rel=1e-4)
    assert Mean.of([1.0]).half_width is None
