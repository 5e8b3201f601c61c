"""The coordinator is killed, again and again, and takes its run up; the result does not tell.

Each run follows from its seed (`support.coordinators`): in mid-step, during a wave, a checkpoint, a
recovery, the finish, and while it starts again. `coordinator_deaths.py` runs many more of them.
"""

from __future__ import annotations

import pytest
from support import coordinators

from . import coordinator_deaths

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.xdist_group("coordinators")]

SEEDS = (4, 11, 12, 27)


@pytest.fixture(scope="module")
def agents(tmp_path_factory):
    """They outlive every coordinator here, and serve one run after another."""
    with coordinators.Agents(tmp_path_factory.mktemp("coordinators")) as agents:
        yield agents


def test_the_seeds_here_cover_what_they_are_to():
    trials = [coordinators.draw(seed) for seed in SEEDS]
    deaths = [death for trial in trials for death in trial.deaths]
    assert {death.moment for death in deaths} == set(coordinators.MOMENTS)
    assert {trial.ships for trial in trials} == {True, False}
    assert any(death.when == "torn" for death in deaths)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_whose_coordinator_dies_ends_as_if_it_had_not(seed, agents):
    trial = coordinators.draw(seed)
    print(trial)  # for whoever must repeat it
    story = coordinators.run_trial(trial, agents)
    print(story.fired, *story.recoveries, sep="\n  ")
    coordinators.judge(story, agents.folder)


@pytest.mark.long
def test_thirty_runs_whose_coordinator_dies(tmp_path):
    log = tmp_path / "log"
    coordinator_deaths.run(list(range(30)), log, tmp_path)
    rows = coordinator_deaths.read(log)
    print(coordinator_deaths.summary(rows))
    assert [row["trial"] for row in rows if not row["ok"]] == []
