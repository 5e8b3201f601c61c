"""Bytes and seconds as people read them, for this room's messages. Knows nothing else."""

from __future__ import annotations


def format_bytes(size: float) -> str:
    """`412 MB`; decimal, as device memories are sold."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            value = size / unit
            return f"{value:.0f} {name}" if value >= 100 or name == "kB" else f"{value:.1f} {name}"
    return f"{size:.0f} B"


def format_bytes_of(used: float, limit: float) -> str:
    """`212 / 900 MB`, in the unit of the limit unless that is too coarse."""
    unit, name = next(
        ((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if limit >= u), (1.0, "B")
    )
    if 0 < used < unit:
        return f"{format_bytes(used)} / {format_bytes(limit)}"
    digits = 0 if limit / unit >= 100 else 1
    return f"{used / unit:.{digits}f} / {limit / unit:.{digits}f} {name}"


def format_seconds(seconds: float) -> str:
    """`1.24 s`, `88 ms`, `3.1 ms`, `45 us`."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        milliseconds = seconds * 1e3
        return f"{milliseconds:.0f} ms" if milliseconds >= 10 else f"{milliseconds:.1f} ms"
    return f"{seconds * 1e6:.0f} us"
