"""Devices leave, training goes on: whole recoveries, in virtual time, under any order of events."""

from __future__ import annotations

import random

import pytest

from .crowd import Crowd


def completes(crowd: Crowd) -> Crowd:
    crowd.run()
    assert crowd.hub.fault is None, crowd.hub.fault
    assert crowd.hub.completed == crowd.begin.steps
    assert sorted(crowd.hub.shown) == list(range(crowd.begin.steps))
    return crowd


def test_an_undisturbed_run_keeps_waves_and_discards():
    crowd = completes(Crowd(seed=1))
    kinds = [plain["kind"] for plain in crowd.hub.journal]
    assert kinds.count("Epoch") == 1
    assert crowd.hub.durable == 8
    assert kinds.count("Wave") > 2


@pytest.mark.parametrize("victim", ["d0", "d1", "d2"])
@pytest.mark.parametrize("seed", range(6))
def test_a_killed_stage_is_replayed_and_nothing_is_lost(victim, seed):
    crowd = Crowd(seed=seed, steps=7)
    moment = random.Random(seed).randint(0, 5)
    crowd.run(until=lambda: crowd.hub.state.committed >= moment and crowd.hub.state.was_resumed)
    for _ in range(random.Random(seed).randint(0, 30)):
        crowd.step()
    crowd.kill(victim)
    completes(crowd)
