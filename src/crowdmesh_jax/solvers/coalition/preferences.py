"""When does a device want to go? Preferences over single switches, pluggable.

- `marginal` (default): the fall of the potential, what the device's leaving and joining bring to
  all rows together. The only one with a potential: better response ends at a Nash-stable structure.
  Known in the literature as the utilitarian or coalition order of switch rules.
- `equal_share`: a coalition's cost is split evenly; a device wants the smaller share.
- `selfish`: a device wants the shorter wait, its coalition's time with the penalty for imbalance.
- `pareto`: as `selfish`, but only where nobody in the coalition it joins would wait longer.
- Your own: any callable from a `Switch` to a float, in whatever unit; above epsilon means "go".

Those without a potential may run in circles; there a history rule ends the game: no device goes
back to a member set that it has been in. The result then says so, and its certificate says which
devices would still go. Source of the orders and of the history rule: Saad et al. (IEEE TMC 2011)
and the switch rules copied from it, as we know them generally; not re-checked against the text.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import InvalidValueError
from .problem import Cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """One device leaves one coalition for another. Costs are the coalitions' parts of Phi; waits
    what a member of them lives with (see `game.Entry`)."""

    device: str
    source: tuple[str, ...]
    """With the device."""
    target: tuple[str, ...]
    """Without the device; () to be alone."""
    source_cost: Cost
    source_cost_after: Cost
    target_cost: Cost
    target_cost_after: Cost
    source_wait: Cost
    target_wait: Cost
    target_wait_after: Cost


Preference = Callable[[Switch], Cost]


def marginal(switch: Switch) -> Cost:
    """By how much the potential falls."""
    before = switch.source_cost.plus(switch.target_cost)
    return before - switch.source_cost_after.plus(switch.target_cost_after)


def equal_share(switch: Switch) -> Cost:
    """By how much the device's even share of its coalition's cost falls."""
    now, then = len(switch.source), len(switch.target) + 1
    before, after = switch.source_cost, switch.target_cost_after
    return Cost(before.lack / now, before.phi / now) - Cost(after.lack / then, after.phi / then)


def selfish(switch: Switch) -> Cost:
    """By how much the device's wait falls."""
    return switch.source_wait - switch.target_wait_after


def pareto(switch: Switch) -> Cost:
    """As `selfish`; where the hosts would wait longer, their loss."""
    if switch.target:
        hosts = switch.target_wait - switch.target_wait_after
        if hosts < Cost(0.0, 0.0):
            return hosts
    return selfish(switch)


PREFERENCES: dict[str, Preference] = {
    "marginal": marginal, "equal_share": equal_share, "selfish": selfish, "pareto": pareto,
}  # fmt: skip


def make_preference(preference: str | Callable[[Switch], object]) -> tuple[str, Preference]:
    """(name, function) of a preference by name or of a user's own.

    Raises:
        InvalidValueError: An unknown name, or something that cannot be called.
    """
    if isinstance(preference, str):
        if preference not in PREFERENCES:
            close = difflib.get_close_matches(preference, PREFERENCES, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InvalidValueError(
                f"no preference {preference!r}{hint}; known: {', '.join(PREFERENCES)}, or a"
                " callable"
            )
        return preference, PREFERENCES[preference]
    if not callable(preference):
        raise InvalidValueError(f"a preference is a name or a callable, got {preference!r}")
    name = getattr(preference, "__name__", type(preference).__name__)
    own = preference

    def checked(switch: Switch) -> Cost:
        gain = own(switch)
        if isinstance(gain, Cost):
            return gain
        if not isinstance(gain, (int, float)) or math.isnan(gain):
            raise InvalidValueError(
                f"preference {name!r} must return a number, got {gain!r} for {switch.device!r}"
            )
        return Cost(0.0, float(gain))

    return name, checked
