"""This process's memory: how much it holds, the most it held, and how to hold less.

Linux tells both figures exactly (`/proc/self/status`) and lets the peak be reset. Elsewhere only
the largest figure since the start is known. It knows nothing of stages.
"""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
"""glibc's numbers, `malloc.h`."""
MAPPED_BYTES = 2**20
"""Arrays from this size are mapped apart and returned to the system when freed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Resident bytes of a process: now, and the most since the start or the last reset."""

    now_bytes: int
    peak_bytes: int


def memory_use() -> MemoryUse:
    """Reads this process's figures; some 30 microseconds."""
    try:
        lines = STATUS.read_text().splitlines()
        found = dict(line.split(":", 1) for line in lines if line.startswith(("VmRSS", "VmHWM")))
        now, peak = (int(found[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return MemoryUse(now_bytes=now, peak_bytes=max(now, peak))
    except (OSError, KeyError, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return MemoryUse(now_bytes=peak, peak_bytes=peak)


def reset_peak() -> None:
    """Lets the peak start from what is held now, where the system can."""
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text("5")


def return_freed_memory() -> None:
    """Makes the C library give freed arrays back to the system, now and from now on.

    glibc raises its threshold for mappings to 32 MB by itself once arrays of that size were freed.
    Smaller ones then come from heaps, one per thread, that hardly ever shrink: an agent kept 1.4
    times what it needed.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, MAPPED_BYTES)
        libc.malloc_trim(0)


def trim() -> None:
    """Gives back what is free in the heaps; some milliseconds."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        _ = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return libc
