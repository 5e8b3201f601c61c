"""Runs of a crowd to which random things happen, from one seed."""

from __future__ import annotations

import random
from typing import Any

from crowdmesh_jax.protocol import Tie

from .crowd import Crowd

FAULTS = ("kill", "suspect", "freeze", "restart", "crash_hub")
CHANGES = ("change", "holders")


def some_ties(seed: int, layers: int) -> tuple[Tie, ...]:
    """In every other run a layer lends to one or more later ones."""
    chance = random.Random(f"ties {seed}")
    if chance.random() < 0.5:
        return ()
    owner = chance.randrange(layers - 1)
    later = range(owner + 1, layers)
    borrowers = chance.sample(later, chance.randint(1, min(2, len(later))))
    return (Tie(owner_layer=owner, borrower_layers=tuple(sorted(borrowers))),)


class Chaos:
    """`faults` random faults at random moments; then quiet, so that the run can end."""

    def __init__(self, seed: int, *, faults: int = 3, kinds: Any = FAULTS, **crowd: Any) -> None:
        self.random = random.Random(seed)
        pick = self.random.choice
        sizes: dict[str, Any] = {
            "stages": pick((1, 2, 3, 3, 4)),
            "spares": pick((1, 2, 3)),
            "microbatches": pick((1, 2, 3)),
            "steps": pick((4, 6, 8)),
            "schedule": pick(("1f1b", "gpipe", "eager")),
            "copies": pick((1, 1, 2)),
            "snapshot_every": pick((None, None, 2, 3)),
            "terms": {"wave_every": pick((1, 2, 3)), "log_steps": pick((2, 4, 8))},
        }
        sizes["ties"] = some_ties(seed, sizes["stages"] + 1)
        self.crowd = Crowd(seed=seed, **{**sizes, **crowd})
        self.kinds = kinds
        # A step takes some 3 virtual seconds.
        length_s = 3.0 * sizes["steps"]
        for _ in range(faults):
            moment = self.random.uniform(0.5, length_s)
            self.crowd.after(moment, self.strike)
            if self.random.random() < 0.4:  # another, in the middle of the recovery
                self.crowd.after(moment + self.random.uniform(0.0, 3.0), self.strike)

    def strike(self) -> None:
        crowd = self.crowd
        if crowd.hub.is_over:
            return
        kind = self.random.choice(self.kinds)
        name = self.random.choice(crowd.names)
        body = crowd.members[name]
        if kind == "crash_hub":
            if not crowd.hub.is_down and crowd.hub.journal:
                down_s = self.random.choice((0.1, 1.0, 8.0))
                crowd.crash_hub(after_actions=self.random.randint(0, 6), down_s=down_s)
        elif kind in CHANGES:
            if not crowd.hub.is_down and crowd.hub.state.start is not None:
                crowd.ask_change() if kind == "change" else crowd.ask_holders()
        elif kind == "restart" or body.is_dead:
            crowd.restart(name)
        elif kind == "kill":
            crowd.kill(name)
            if self.random.random() < 0.7:
                crowd.after(self.random.uniform(1.0, 20.0), lambda: self.revive(name))
        elif kind == "suspect":
            if name in crowd.hub.state.members and not crowd.hub.is_down:
                crowd.suspect(name)
        elif kind == "freeze":
            crowd.freeze(name, self.random.choice((1.0, 15.0, 60.0)))

    def revive(self, name: str) -> None:
        if self.crowd.members[name].is_dead and not self.crowd.hub.is_over:
            self.crowd.restart(name)

    def run(self, *, events: int = 60_000) -> str:
        """How it ended: "done", or "halted" with nothing left to go on from.

        Raises:
            AssertionError: A broken invariant, or any other end.
        """
        crowd = self.crowd.run(events=events)
        if crowd.hub.fault is not None:
            fault = crowd.hub.fault
            if fault.kind == "LaunchError":
                return "halted"  # gone before it began, for longer than the deadline
            assert fault.kind == "AgentLostError", fault
            assert "the run cannot go on" in fault.text, fault
            return "halted"
        assert crowd.hub.completed == crowd.begin.steps
        assert sorted(crowd.hub.shown) == list(range(crowd.begin.steps))
        return "done"
