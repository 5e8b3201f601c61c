"""Devices are killed at exact ops, again and again; the result is that of a run nobody disturbed.

Each run follows from its seed (`support.survival`). `make survival` runs many more of them.
"""

from __future__ import annotations

import pytest
from support import survival, trials
from support.mortal import Mortals

import crowdmesh_jax as cm

from . import exactly_once

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("survival")]

SPARES = 3
SEEDS = (1, 7, 12, 22, 34, 53)
"""Two jobs, pairs, second blows in a recovery, launched again or not; 16 kills in all."""


@pytest.fixture(scope="module")
def crew_and_orders(tmp_path_factory):
    """One crew for all runs: who died is launched again after each."""
    folder = tmp_path_factory.mktemp("survival")
    cache_dir = survival.share_compiled(folder / "compiled", 3 + SPARES)
    mortals = Mortals(folder / "orders", ("--chunk-bytes", "512"))
    crowd = cm.Crowd.local((1.0,) * (3 + SPARES))
    for family in ("cnn", "transformer"):
        survival.undisturbed(family, 3, survival.STEPS)  # it fills the cache
    with cm.launch(
        crowd, agent_command=mortals.command, cache_dir=cache_dir, log_dir=folder / "logs"
    ) as crew:
        yield crew, mortals
    survival.stop_sharing()


def test_the_seeds_here_cover_what_they_are_to():
    trials = [survival.draw(seed, spares=SPARES) for seed in SEEDS]
    assert sum(trial.kills for trial in trials) >= 12
    assert all(trial.kills >= 2 for trial in trials)
    assert {trial.family for trial in trials} == {"cnn", "transformer"}
    blows = [blow for trial in trials for blow in trial.blows]
    assert any(blow.order.beside for blow in blows)
    assert any(blow.then for blow in blows)
    assert {trial.relaunches for trial in trials} == {True, False}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_in_which_devices_die_ends_as_if_none_had(seed, crew_and_orders, tmp_path):
    crew, mortals = crew_and_orders
    trial = survival.draw(seed, spares=SPARES)
    try:
        story = survival.run_trial(trial, crew, mortals, tmp_path)
        print("\n".join(story.lines()))  # for whoever must repeat it
        survival.judge(story)
    finally:
        survival.relaunch_dead(crew)


@pytest.mark.long
def test_a_hundred_runs_with_two_hundred_deaths(tmp_path):
    log = tmp_path / "log"
    exactly_once.run(list(range(100)), log, tmp_path)
    rows = trials.read(log)
    print(exactly_once.summary(rows))
    assert [row["trial"] for row in rows if not row["ok"]] == []
    assert sum(1 + len(e.get("beside", ())) for row in rows for e in row["fired"]) >= 200
