"""What devices tell beside the protocol, checked when it is read: op times, memory, links."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from ..control import LinkMeasured
from .memory import MemoryReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Span:
    """What a device did, on the clock that all processes of this machine share."""

    device: str
    kind: str
    step: int
    microbatch: int | None
    start_s: float
    end_s: float


def read_spans(device: str, spans: Any) -> list[Span]:
    """Op times; what cannot be read is logged and dropped."""
    try:
        return [
            Span(device, str(kind), int(step), None if mb is None else int(mb), *map(float, se))
            for kind, step, mb, *se in spans
        ]
    except (TypeError, ValueError) as exc:
        logger.error("op times of %s were refused: %s", device, exc)
        return []


def read_carried(device: str, figures: Any) -> LinkMeasured | None:
    """What a link to it carried of a copy; None, and a line in the log, where it cannot be read."""
    try:
        rate = float(figures["bytes"]) / float(figures["seconds"])
        sender = figures["sender"]
        if not (isinstance(sender, str) and 0 < rate < math.inf):
            raise ValueError(f"{rate} bytes a second from {str(sender)[:40]!r}")
    except (KeyError, TypeError, ValueError, ArithmeticError) as exc:
        logger.error("what a link carried to %s was refused: %s", device, exc)
        return None
    return LinkMeasured(sender=sender, receiver=device, bytes_per_s=rate)


def read_memory(device: str, figures: Any) -> MemoryReport | None:
    """What its process holds; None, and a line in the log, where it cannot be read."""
    try:
        return MemoryReport(device=device, **{k: int(v) for k, v in figures.items()})
    except (AttributeError, TypeError, ValueError) as exc:
        logger.error("memory figures of %s were refused: %s", device, exc)
        return None
