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
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""glibc's numbers, `malloc.h`."""
MAPPED_BYTES = 2**20 - 2**12
"""Blocks of a megabyte or more are mapped apart and returned to the system when freed. A heap keeps
them between others: with 32 MB, agents held up to twice what their arrays took, and with 2 MB one
of GPT-2 a third more. It costs CPU time: pages are faulted in anew at each call."""
KEPT_BYTES = 64 * 2**20
"""Free memory on top of the heap that stays for the next step."""
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""For a process to be started: memory comes in pages of 2 MB where the system allows it. A
program's temporaries are one block that is mapped and faulted in at each call, which then takes a
quarter of the time. glibc from 2.35; others ignore it."""


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


class MemoryWatch:
    """What a process holds by phases: idle, while a stage is loaded, since then."""

    def __init__(self) -> None:
        """Nothing was installed yet."""
        self._idle_bytes = memory_use().now_bytes
        self._loading_peak_bytes = 0

    def loaded(self) -> None:
        """A stage was received, compiled and put in place."""
        self._loading_peak_bytes = memory_use().peak_bytes
        self.unloaded()

    def unloaded(self) -> None:
        """Gives back what is free; the peak starts from there."""
        trim()
        reset_peak()

    def report(self, step_temp_bytes: int, update_temp_bytes: int, ops: int) -> dict[str, int]:
        """At most, by phase, and what the programs at work need, as the coordinator reads it."""
        use = memory_use()
        return {
            "idle_bytes": self._idle_bytes,
            "now_bytes": use.now_bytes,
            "loading_peak_bytes": self._loading_peak_bytes,
            "peak_bytes": use.peak_bytes,
            "step_temp_bytes": step_temp_bytes,
            "update_temp_bytes": update_temp_bytes,
            "program_ops": ops,
        }


def reset_peak() -> None:
    """Lets the peak start from what is held now, where the system can."""
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text("5")


def return_freed_memory() -> None:
    """Sets the C library up for steps that ask for the same arrays again and again.

    One heap for all threads: by default each thread has its own that hardly ever shrinks, and an
    agent kept 1.4 times what it needed. Small and middling arrays come from that heap, since a
    mapping is given back at once and all its pages are faulted in anew the next time: receiving
    4 MB took 6.5 ms of CPU instead of 1. Those above `MAPPED_BYTES` are mappings, in large pages.
    `trim` gives back what loading a stage has left.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
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
