"""The journal as people would tell it: phases, steps, checkpoints, the end. Draws nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from . import units

Tone = Literal["plain", "good", "bad"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the story."""

    at_s: float | None
    """Since the journal's first record; None where records carry no time."""
    title: str
    text: str = ""
    tone: Tone = "plain"


def tell(records: Sequence[Mapping[str, Any]]) -> tuple[Entry, ...]:
    """The journal's entries; commits that follow each other are one, with the copies taken on the
    way.

    Fields that are missing or odd leave words out and stop nothing; kinds that this release does
    not know are shown as they are.
    """
    origin_s = next((_time(r) for r in records if _time(r) is not None), None)
    entries: list[Entry] = []
    commits: list[Mapping[str, Any]] = []
    waves: list[Mapping[str, Any]] = []
    has_begun = False
    for record in records:
        if record.get("kind") == "StepCommitted":
            commits.append(record)
            continue
        if record.get("kind") == "Wave" and record.get("ledger"):
            waves.append(record)
            continue
        entries += _commits(commits, waves, origin_s)
        commits, waves = [], []
        entries.append(_entry(record, origin_s, has_begun))
        has_begun = has_begun or record.get("kind") == "Resumed"
    return (*entries, *_commits(commits, waves, origin_s))


def _time(record: Mapping[str, Any]) -> float | None:
    value = record.get("at_s")
    return float(value) if isinstance(value, (int, float)) else None


def _since(record: Mapping[str, Any], origin_s: float | None) -> float | None:
    at_s = _time(record)
    return None if at_s is None or origin_s is None else at_s - origin_s


def _commits(
    commits: Sequence[Mapping[str, Any]],
    waves: Sequence[Mapping[str, Any]],
    origin_s: float | None,
) -> Iterable[Entry]:
    copies = _copies(waves)
    if not commits:
        if waves:
            at_s = _since(waves[-1], origin_s)
            yield Entry(at_s=at_s, title=copies[:1].upper() + copies[1:], tone="good")
        return
    first, last = commits[0], commits[-1]
    one = first.get("step") == last.get("step")
    title = (
        f"Step {first.get('step')}" if one else f"Steps {first.get('step')} to {last.get('step')}"
    )
    losses = [_loss(record) for record in ([first] if one else [first, last])]
    text = " to ".join(loss for loss in losses if loss)
    skipped = sum(bool(_part(record, "verdict").get("skip")) for record in commits)
    parts = [f"loss {text}" if text else "", f"{skipped} skipped" if skipped else ""]
    parts.append(copies)
    yield Entry(
        at_s=_since(last, origin_s),
        title=f"{title} committed",
        text=", ".join(part for part in parts if part),
    )


def _copies(waves: Sequence[Mapping[str, Any]]) -> str:
    """What waves of copies have come to: which versions are safe, and with how many devices."""
    if not waves:
        return ""
    versions = [wave.get("version") for wave in waves]
    holders = {
        str(device)
        for part in waves[-1]["ledger"]
        if isinstance(part, Mapping)
        for device in part.get("devices") or ()
    }
    which = (
        f"version {versions[0]}" if len(waves) == 1 else f"versions {versions[0]} to {versions[-1]}"
    )
    times = "" if len(waves) == 1 else f" ({len(waves)} times)"
    return f"copies of {which} complete{times} with {len(holders)} devices"


def _part(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = record.get(name)
    return part if isinstance(part, Mapping) else {}


def _loss(record: Mapping[str, Any]) -> str:
    loss = _part(record, "values").get("loss")
    return units.plain(loss) if isinstance(loss, (int, float)) else str(loss or "")


def _entry(record: Mapping[str, Any], origin_s: float | None, has_begun: bool) -> Entry:
    title, text, tone = _words(record, has_begun)
    return Entry(at_s=_since(record, origin_s), title=title, text=text, tone=tone)


def _words(record: Mapping[str, Any], has_begun: bool) -> tuple[str, str, Tone]:
    kind = record.get("kind")
    match kind:
        case "Term":
            return "Coordinator started", f"run {record.get('run', '?')}", "plain"
        case "Epoch":
            lost = record.get("lost") or ()
            reason = str(record.get("reason") or "")
            text = reason or (f"without {', '.join(map(str, lost))}" if lost else "")
            text = text or "devices are gathered"
            return f"Epoch {record.get('epoch')} opened", text, "bad" if lost else "plain"
        case "Decision":
            stages = _part(record, "plan").get("stages") or ()
            devices = [str(s.get("device")) for s in stages if isinstance(s, Mapping)]
            chain = " \N{RIGHTWARDS ARROW} ".join(devices)
            text = f"{chain}, up to step {record.get('steps')}"
            base, reason = record.get("base"), record.get("reason")
            text += f"; {reason}" if reason else ""
            return "Plan decided" + (f", from version {base}" if base else ""), text, "plain"
        case "MembersMeasured":
            return "Programs installed, each stage timed alone", "", "plain"
        case "Resumed":
            return "Training went on" if has_begun else "Training began", "", "plain"
        case "Evaluation":
            values = _part(record, "values").items()
            shown = (f"{k} {units.plain(v)}" for k, v in values if isinstance(v, (int, float)))
            return f"Evaluated version {record.get('version')}", ", ".join(shown), "plain"
        case "Best":
            value, metric = record.get("value"), record.get("metric")
            shown = units.plain(value) if isinstance(value, (int, float)) else value
            return f"Best version so far: {record.get('version')}", f"{metric} {shown}", "good"
        case "Assigned":
            return "Other devices hold the copies", "", "plain"
        case "VerdictDecided":
            return f"Verdict of step {record.get('step')} made anew", "no survivor knew it", "plain"
        case "Wave":
            return f"Checkpoint of version {record.get('version')}", "complete on disk", "good"
        case "Finish":
            reason = str(record.get("reason") or "")
            return f"Finished at version {record.get('version')}", reason, "good"
        case "Halted":
            fault = _part(record, "fault")
            title = f"Stopped after {record.get('committed')} steps: {fault.get('kind', '?')}"
            return title, str(fault.get("text", "")), "bad"
    known = {k: v for k, v in record.items() if k not in ("kind", "seq", "at_s")}
    return str(kind or "Record of unknown kind"), json.dumps(known)[:200], "plain"
