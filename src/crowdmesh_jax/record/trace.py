"""Measured and predicted times as a Chrome trace, which Perfetto opens.

A group per device; in it a row for what it computed, one for what was predicted, one each for
sending and receiving, with arrows from a send to its receive. Knows nothing of where events come
from. Format: "Trace Event Format" (Google), JSON object form, times in microseconds.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core import OpKind, PipelinePlan, Timeline
from ..errors import InvalidValueError, RecordError

COMPUTE = ("forward", "backward", "update")
TRANSFER = ("send", "receive")
ACTIVATIONS, GRADIENTS = "activations", "gradients"
"""Labels of transfers between stages."""
RECOVERY_ROW = "recovery"
"""Stands for a device in the trace: the parts of each recovery, see `RecoveryEvent.spans`."""
SHORTEST_NS = 1
"""Slices without length are not drawn and no arrow can start at them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceEvent:
    """Something that a device did, or was predicted to do, from `start_s` to `end_s`.

    Measured times share one clock, predicted ones another that starts where the caller says.
    """

    device: str
    kind: str
    """"forward", "backward", "update", "send", "receive", or another word for a row's slice."""
    step: int
    microbatch: int | None = None
    start_s: float
    end_s: float
    predicted: bool = False
    peer: str | None = None
    """The other end of a send or receive."""
    label: str = ""
    """What was sent, "activations" say: sends and receives with equal labels are joined."""
    size_bytes: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start_s) and math.isfinite(self.end_s)):
            raise InvalidValueError(
                f"trace event {self.kind!r} of {self.device!r}: times must be finite,"
                f" got {self.start_s} .. {self.end_s}"
            )
        if self.end_s < self.start_s:
            raise InvalidValueError(
                f"trace event {self.kind!r} of {self.device!r}: ends at {self.end_s} s,"
                f" before it starts at {self.start_s} s"
            )


def timeline_events(
    plan: PipelinePlan, timeline: Timeline, *, step: int, start_s: float
) -> tuple[TraceEvent, ...]:
    """A predicted step as trace events, to be drawn beside the measured ones.

    Args:
        step: The measured step that it stands beside.
        start_s: Where that step starts, on the measured events' clock.
    """
    devices = plan.devices
    events = [
        TraceEvent(
            device=devices[op.stage],
            kind="forward" if op.kind is OpKind.FORWARD else "backward",
            step=step,
            microbatch=op.microbatch,
            start_s=start_s + op.start_s,
            end_s=start_s + op.end_s,
            predicted=True,
        )
        for op in timeline.ops
    ]
    for transfer in timeline.transfers:
        down = transfer.direction == "forward"
        upper, lower = devices[transfer.cut], devices[transfer.cut + 1]
        source, target = (upper, lower) if down else (lower, upper)
        for device, kind, peer in ((source, "send", target), (target, "receive", source)):
            events.append(
                TraceEvent(
                    device=device,
                    kind=kind,
                    step=step,
                    microbatch=transfer.microbatch,
                    start_s=start_s + transfer.start_s,
                    end_s=start_s + transfer.end_s,
                    predicted=True,
                    peer=peer,
                    label=ACTIVATIONS if down else GRADIENTS,
                )
            )
    return tuple(events)


def _row(event: TraceEvent) -> str:
    row = f"{event.device} {event.kind}" if event.kind in TRANSFER else event.device
    return f"{row} predicted" if event.predicted else row


def _row_order(event: TraceEvent) -> tuple[int, bool]:
    place = 1 + TRANSFER.index(event.kind) if event.kind in TRANSFER else 0
    return place, event.predicted


def _nanoseconds(event: TraceEvent, origin_s: float) -> tuple[int, int]:
    """Start and end. Both are rounded, not start and length: else a slice's end may lie a
    nanosecond behind the start of the next one, and Perfetto drops slices that overlap so."""
    return round((event.start_s - origin_s) * 1e9), round((event.end_s - origin_s) * 1e9)


def _lanes(
    events: Sequence[TraceEvent], origin_s: float
) -> Iterable[tuple[int, TraceEvent, tuple[int, int]]]:
    """Spreads events that overlap over several lanes: slices of one row may not cross."""
    free: list[tuple[int, int]] = []
    timed = [(_nanoseconds(event, origin_s), event) for event in events]
    for (start_ns, end_ns), event in sorted(timed, key=lambda item: item[0]):
        if free and free[0][0] <= start_ns:
            _, lane = heapq.heappop(free)
        else:
            lane = len(free)
        heapq.heappush(free, (end_ns, lane))
        yield lane, event, (start_ns, end_ns)


def _slice(event: TraceEvent, pid: int, tid: int, span_ns: tuple[int, int]) -> dict[str, Any]:
    args: dict[str, Any] = {"step": event.step}
    for name in ("microbatch", "peer", "size_bytes"):
        if getattr(event, name) is not None:
            args[name] = getattr(event, name)
    if event.label:
        args["label"] = event.label
    name = event.kind if event.microbatch is None else f"{event.kind} {event.microbatch}"
    start_ns, end_ns = span_ns
    return {
        "ph": "X",
        "name": name,
        "cat": "predicted" if event.predicted else event.kind,
        "pid": pid,
        "tid": tid,
        "ts": start_ns / 1e3,
        "dur": max(end_ns - start_ns, SHORTEST_NS) / 1e3,
        "args": args,
    }


def chrome_trace(
    events: Iterable[TraceEvent],
    *,
    devices: Sequence[str] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The trace as a JSON-able dict.

    Args:
        events: In any order. The earliest one, measured or predicted, is at time 0.
        devices: Their order from top to bottom; others follow as they appear.
        meta: JSON-able; shown by viewers as the trace's description.

    Returns:
        `{"traceEvents": [...], "displayTimeUnit": "ms", "otherData": {...}}`.
    """
    events = list(events)
    order = list(dict.fromkeys([*(devices or ()), *(event.device for event in events)]))
    origin_s = min((event.start_s for event in events), default=0.0)
    rows: dict[tuple[int, tuple[int, bool], str], list[TraceEvent]] = defaultdict(list)
    for event in events:
        rows[order.index(event.device), _row_order(event), _row(event)].append(event)

    out: list[dict[str, Any]] = []
    for pid, device in enumerate(order, start=1):
        out.append(_named("process", pid, 0, device))
        out.append(_sorted("process", pid, 0, pid))
    ends: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = defaultdict(dict)
    next_tid = 1
    for (index, _, row), members in sorted(rows.items(), key=lambda item: item[0]):
        tids: dict[int, int] = {}
        for lane, event, span_ns in _lanes(members, origin_s):
            if lane not in tids:
                tids[lane] = next_tid
                name = row if lane == 0 else f"{row} ({lane + 1})"
                out.append(_named("thread", index + 1, next_tid, name))
                out.append(_sorted("thread", index + 1, next_tid, next_tid))
                next_tid += 1
            shown = _slice(event, index + 1, tids[lane], span_ns)
            out.append(shown)
            if event.kind in TRANSFER and event.peer is not None:
                pair = (event.device, event.peer)
                source, target = pair if event.kind == "send" else pair[::-1]
                key = (
                    event.predicted, source, target, event.step, event.microbatch, event.label,
                )  # fmt: skip
                ends[key][event.kind] = shown
    out.extend(_arrows(ends))
    return {
        "traceEvents": out,
        "displayTimeUnit": "ms",
        "otherData": dict(meta or {}),
    }


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": f"{what}_name", "pid": pid, "tid": tid, "args": {"name": name}}


def _sorted(what: str, pid: int, tid: int, index: int) -> dict[str, Any]:
    args = {"sort_index": index}
    return {"ph": "M", "name": f"{what}_sort_index", "pid": pid, "tid": tid, "args": args}


def _arrows(ends: Mapping[Any, Mapping[str, dict[str, Any]]]) -> Iterable[dict[str, Any]]:
    """Flow events: from the start of a send to the end of its receive.

    An arrow belongs to the slice around its time, so the end lies a little inside. A receive that
    ends before its send starts (clocks that disagree) gets none.
    """
    number = 0
    for pair in ends.values():
        if len(pair) != 2:
            continue
        send, receive = pair["send"], pair["receive"]
        start = send["ts"]
        end = round(receive["ts"] + receive["dur"] - SHORTEST_NS / 1e3, 3)
        if end < start:
            continue
        number += 1
        common = {"name": "transfer", "cat": "transfer", "id": number}
        yield {"ph": "s", "pid": send["pid"], "tid": send["tid"], "ts": start, **common}
        yield {
            "ph": "f", "bp": "e", "pid": receive["pid"], "tid": receive["tid"], "ts": end, **common,
        }  # fmt: skip


def trace_events(trace: object, where: str = "trace") -> tuple[TraceEvent, ...]:
    """The events that `chrome_trace` drew, in no particular order; times from its time 0.

    Slices that no `TraceEvent` could have made (of another program, say) are left out.

    Args:
        where: How the source is called in errors, a file name say.

    Raises:
        RecordError: It is no trace, or a slice has no place or time.
    """
    try:
        listed = trace["traceEvents"]  # pyright: ignore[reportIndexIssue]
        devices: dict[int, str] = {
            e["pid"]: e["args"]["name"]
            for e in listed
            if e["ph"] == "M" and e["name"] == "process_name"
        }
        return tuple(
            _event(slice_, devices[slice_["pid"]])
            for slice_ in listed
            if slice_["ph"] == "X" and "step" in slice_.get("args", {})
        )
    except (TypeError, KeyError, ValueError, AttributeError, IndexError) as exc:
        raise RecordError(f"{where}: damaged: {type(exc).__name__}: {exc}") from exc


def _event(slice_: Mapping[str, Any], device: str) -> TraceEvent:
    args = slice_["args"]
    start_s = slice_["ts"] / 1e6
    return TraceEvent(
        device=device,
        kind=slice_["name"].split()[0],
        step=args["step"],
        microbatch=args.get("microbatch"),
        start_s=start_s,
        end_s=start_s + slice_["dur"] / 1e6,
        predicted=slice_["cat"] == "predicted",
        peer=args.get("peer"),
        label=args.get("label", ""),
        size_bytes=args.get("size_bytes"),
    )
