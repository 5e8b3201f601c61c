"""What devices tell beside the protocol, checked when it is read: op times, memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

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


def read_memory(device: str, figures: Any) -> MemoryReport | None:
    """What its process holds; None, and a line in the log, where it cannot be read."""
    try:
        return MemoryReport(device=device, **{k: int(v) for k, v in figures.items()})
    except (AttributeError, TypeError, ValueError) as exc:
        logger.error("memory figures of %s were refused: %s", device, exc)
        return None
