"""A run's `policy.jsonl` and the machine: what it was told, told again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..core import values
from ..errors import FormatError
from .events import ControlAction, ControlEvent, entry_from_plain, entry_to_plain
from .machine import handle
from .state import ControlState, ControlTerms


def terms_to_plain(terms: ControlTerms) -> dict[str, Any]:
    """The line with which a machine begins; each start of a coordinator is one."""
    return {"terms": values.to_plain(terms)}


def told_to_plain(
    now_s: float, event: ControlEvent, actions: Iterable[ControlAction]
) -> dict[str, Any]:
    """The line of an event that changed something, and of what the machine then wanted."""
    return {
        "now_s": now_s,
        "event": entry_to_plain(event),
        "actions": [entry_to_plain(action) for action in actions],
    }


def replay(
    lines: Iterable[Mapping[str, Any]],
) -> Iterator[tuple[ControlEvent, tuple[ControlAction, ...], tuple[ControlAction, ...]]]:
    """Each event of `policy.jsonl`, what was wanted then, and what the machine wants now; equal,
    unless the machine has changed since.

    Args:
        lines: As `record.read_journal` gives them.

    Raises:
        FormatError: A line is none of these, or the first does not have the terms.
    """
    state: ControlState | None = None
    for line in lines:
        if "terms" in line:
            terms = values.from_plain(ControlTerms, line["terms"], "policy terms")
            state = ControlState(terms=terms)
            continue
        if state is None or not {"now_s", "event", "actions"} <= line.keys():
            raise FormatError(f"policy: a line without terms before it, or no event: {line!r:.80}")
        event = entry_from_plain(line["event"])
        then = tuple(entry_from_plain(entry) for entry in line["actions"])
        state, now = handle(state, event, line["now_s"])
        yield event, then, now
