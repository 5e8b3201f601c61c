"""Policies as they are compared: the rule, what it allows in a recovery, and its tuning.

What a rival's published rule says, and what is given to it beside, stands in
docs/policies_compared.md. One number is tuned for each policy and scenario: `interval_scale`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

from ..core import ReplicaPlan
from ..errors import InvalidValueError
from ..propagation import (
    Handover,
    NextStagePolicy,
    PolicyDecision,
    PolicyView,
    ReplicationPolicy,
    make_replication_policy,
)
from .tuned import INTERVAL_SCALES
from .world import SERVER


@runtime_checkable
class Foresighted(Protocol):
    """What a policy may offer beside `decide`: moves between decisions, and who takes over."""

    def moves(self, view: PolicyView) -> tuple[Handover, ...]:
        """Planned moves."""
        ...

    def take_over(self, view: PolicyView, lost: Sequence[int]) -> tuple[str, ...] | None:
        """Devices of all stages after a loss."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One policy, ready to be run."""

    name: str
    policy: ReplicationPolicy
    replay: bool
    """Whether its rule lets a lost stage be replayed from boundary logs; else all roll back."""
    own_takers: bool = False
    """Whether the policy chooses who takes over; else the fastest chain with the fewest changes."""
    decide_every_s: int = 30
    moves_every_s: int = 0
    """0: moves are decided together with copies only."""
    server: bool = False
    """Whether the server is among the devices that the rule may name as holders."""
    leavers_serve: bool = False
    """Whether a device that left the range of its pipeline neighbour still hands over its state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patched:
    """A policy with a part of its decision taken from elsewhere: what that part brings."""

    policy: Any
    name: str
    next_stage: bool = False
    """Copies at the next stage, the last one's at the first, instead of where it would put them."""
    interval_steps: int | None = None
    """This interval instead of its own."""

    def decide(self, view: PolicyView) -> PolicyDecision:
        """Its decision with that part exchanged."""
        decision = self.policy.decide(view)
        replicas: ReplicaPlan = decision.replicas
        if self.next_stage:
            steps = replicas.interval_steps or 1
            replicas = NextStagePolicy(interval_steps=steps).decide(view).replicas
        if self.interval_steps is not None:
            replicas = replace(
                replicas,
                ranges=tuple(
                    replace(
                        item,
                        replicas=tuple(
                            replace(r, interval_steps=self.interval_steps) for r in item.replicas
                        ),
                    )
                    for item in replicas.ranges
                ),
            )
        return replace(decision, replicas=replicas)

    def moves(self, view: PolicyView) -> tuple[Handover, ...]:
        """As the policy."""
        return self.policy.moves(view)

    def take_over(self, view: PolicyView, lost: Sequence[int]) -> tuple[str, ...] | None:
        """As the policy."""
        return self.policy.take_over(view, lost)


EXACT_NODES = 200
"""Partial placements that are looked at: hundreds of decisions a run; the greedy is near."""
FIXED_STEPS = 100
"""Interval of the ablation without an interval rule: that of FTPipeHD's code."""
_REPLAYS = ("mobility", "next_stage")
POLICIES = ("mobility", "neighbour", "neighbour_server", "next_stage", "central", "none")
"""`neighbour_server` is `neighbour` with the server as its central node."""
ABLATIONS: Mapping[str, str] = {
    "mobility - hand-over": "no planned moves: every departure is a loss",
    "mobility - placement": "copies at the next stage",
    "mobility - newcomers": "second copies stay with the best holders",
    "mobility - interval": f"a copy every {FIXED_STEPS} steps",
    "mobility - replay": "all roll back after a loss",
    "mobility - takers": "the fastest takes over, as for the rivals",
    "neighbour + replay": "the rival with our replay",
}


def make_setup(
    name: str, scenario: str | None = None, *, interval_scale: float | None = None, **more: Any
) -> Setup:
    """The setup of a policy or of an ablation.

    Args:
        scenario: Of the frozen ones, whose tuned `interval_scale` is taken; None: 1.
        interval_scale: This instead.
        more: Fields of `Setup` to change.

    Raises:
        InvalidValueError: No such policy; names those there are.
    """
    if name not in POLICIES and name not in ABLATIONS:
        known = (*POLICIES, *ABLATIONS)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InvalidValueError(f"no policy {name!r} to compare; {hint}known: {', '.join(known)}")
    base = name.partition(" ")[0]
    scale = interval_scale
    if scale is None:
        scale = INTERVAL_SCALES.get(scenario or "", {}).get(base, 1.0)
    options: dict[str, Any] = {} if base == "none" else {"interval_scale": scale}
    if base == "neighbour_server":
        options["central"] = SERVER
    if base == "central":
        options["device"] = SERVER
    if name == "mobility - hand-over":
        options["handover"] = None
    if name == "mobility - newcomers":
        options["spread"] = False
    if base == "mobility":
        options["exact_nodes"] = EXACT_NODES
    policy: Any = make_replication_policy(base.removesuffix("_server"), **options)
    if name == "mobility - placement":
        policy = Patched(policy=policy, name=name, next_stage=True)
    if name == "mobility - interval":
        policy = Patched(policy=policy, name=name, interval_steps=FIXED_STEPS)
    ours = base == "mobility"
    made = Setup(
        name=name,
        policy=cast(ReplicationPolicy, policy),
        replay=(base in _REPLAYS or name == "neighbour + replay") and name != "mobility - replay",
        own_takers=ours and name != "mobility - takers",
        moves_every_s=2 if ours else 0,
        server=base in ("central", "neighbour_server"),
    )
    return replace(made, **more)
