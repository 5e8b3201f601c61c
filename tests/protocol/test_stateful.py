"""Hypothesis drives a crowd: what befalls it when is its choice, and it shrinks what breaks.

The invariants (I1-I13) are checked by the crowd after each event; here only the moves are chosen.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from .crowd import Crowd

MOST_FAULTS = 8


class CrowdMachine(RuleBasedStateMachine):
    """A run of a crowd; each rule is something that happens, `go_on` lets events happen."""

    @initialize(
        seed=st.integers(0, 2**20),
        stages=st.integers(1, 3),
        spares=st.integers(1, 3),
        copies=st.integers(1, 2),
        schedule=st.sampled_from(("1f1b", "gpipe", "eager")),
        wave_every=st.integers(1, 3),
        log_steps=st.sampled_from((2, 4, 8)),
        snapshot_every=st.sampled_from((None, 2, 3)),
        damage=st.sampled_from((0.0, 0.05)),
    )
    def begin(self, wave_every: int, log_steps: int, damage: float, **fields: Any) -> None:
        terms = {"wave_every": wave_every, "log_steps": log_steps}
        self.crowd = Crowd(steps=6, terms=terms, **fields)
        self.crowd.damage = damage
        self.faults = 0

    def _befalls(self) -> bool:
        self.faults += 1
        return not self.crowd.hub.is_over and self.faults <= MOST_FAULTS

    @rule(events=st.integers(1, 400))
    def go_on(self, events: int) -> None:
        for _ in range(events):
            if self.crowd.hub.is_over:
                return
            self.crowd.step()
            self.crowd.check()

    @rule(index=st.integers(0, 5))
    def kill(self, index: int) -> None:
        name = self.crowd.names[index % len(self.crowd.names)]
        if self._befalls() and not self.crowd.members[name].is_dead:
            self.crowd.kill(name)

    @rule(index=st.integers(0, 5))
    def start_anew(self, index: int) -> None:
        if self._befalls():
            self.crowd.restart(self.crowd.names[index % len(self.crowd.names)])

    @rule(index=st.integers(0, 5))
    def suspect(self, index: int) -> None:
        name = self.crowd.names[index % len(self.crowd.names)]
        hub = self.crowd.hub
        if self._befalls() and not hub.is_down and name in hub.state.members:
            self.crowd.suspect(name)

    @rule(index=st.integers(0, 5), seconds=st.sampled_from((1.0, 15.0, 60.0)))
    def stop_for_a_while(self, index: int, seconds: float) -> None:
        if self._befalls():
            self.crowd.freeze(self.crowd.names[index % len(self.crowd.names)], seconds)

    @precondition(lambda self: self.crowd.hub.journal)
    @rule(after=st.integers(0, 6), down_s=st.sampled_from((0.1, 1.0, 8.0)))
    def crash_the_coordinator(self, after: int, down_s: float) -> None:
        if self._befalls() and not self.crowd.hub.is_down:
            self.crowd.crash_hub(after_actions=after, down_s=down_s)

    @precondition(lambda self: self.crowd.hub.state.start is not None)
    @rule(what=st.sampled_from(("plan", "holders")))
    def change(self, what: str) -> None:
        if not self.crowd.hub.is_over and not self.crowd.hub.is_down:
            self.crowd.ask_change() if what == "plan" else self.crowd.ask_holders()

    def teardown(self) -> None:
        """It comes to an end (I13), and to one of two: all steps made, or nothing left."""
        crowd = self.crowd
        for name in crowd.names:
            crowd.after(5.0, lambda name=name: crowd.members[name].wake())
        crowd.run(events=crowd.events + 80_000)
        fault = crowd.hub.fault
        if fault is None:
            assert crowd.hub.completed == crowd.begin.steps
            assert sorted(crowd.hub.shown) == list(range(crowd.begin.steps))
        elif fault.kind != "LaunchError":
            assert fault.kind == "AgentLostError", fault
            assert "the run cannot go on" in fault.text


CrowdMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestCrowd = CrowdMachine.TestCase


@pytest.mark.long
def test_a_thousand_crowds():
    from hypothesis.stateful import run_state_machine_as_test

    more = settings(max_examples=1000, stateful_step_count=40, deadline=None)
    run_state_machine_as_test(CrowdMachine, settings=more)
