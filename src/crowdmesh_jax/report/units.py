"""Numbers as people read them: three figures and a unit. Knows no report."""

from __future__ import annotations

import math
import time

MISSING = "\N{EN DASH}"


def seconds(value_s: float | None) -> str:
    """`1.24 s`, `88.1 ms`, `45.0 µs`; beyond two minutes `3 min 20 s`, `2 h 05 min`."""
    if value_s is None or math.isnan(value_s):
        return MISSING
    if not math.isfinite(value_s):
        return str(value_s)
    size = abs(value_s)
    if size >= 7200:
        return f"{int(value_s // 3600)} h {int(value_s % 3600 // 60):02d} min"
    if size >= 120:
        return f"{int(value_s // 60)} min {int(value_s % 60):02d} s"
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "\N{MICRO SIGN}s")):
        if round(size / unit, 3) >= 1:
            return f"{figures(value_s / unit)} {name}"
    return "0 s" if size == 0 else f"{value_s / 1e-6:.2g} \N{MICRO SIGN}s"


def clock(value_s: float) -> str:
    """`3.4 s`, `12:05`, `2:05:09`: a time since something began."""
    if value_s < 60:
        return f"{max(0.0, value_s):.1f} s"
    minutes, second = divmod(int(value_s), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def size(value_bytes: float | None) -> str:
    """`4.50 MB`, `262 kB`, `12 B`: decimal."""
    if value_bytes is None:
        return MISSING
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value_bytes) >= unit:
            return f"{figures(value_bytes / unit)} {name}"
    return f"{value_bytes:.0f} B"


def share(value: float | None) -> str:
    """`7.3 %`, `51 %`."""
    if value is None or not math.isfinite(value):
        return MISSING
    percent = 100 * value
    return f"{percent:.1f} %" if 0.05 <= abs(percent) < 9.95 else f"{percent:.0f} %"


def change(value: float | None, base: float | None) -> str:
    """`+57 %` of a value against a base; from ten times on, `×23`."""
    if value is None or base is None or not base:
        return MISSING
    if value / base >= 10:
        return f"\N{MULTIPLICATION SIGN}{value / base:.3g}"
    percent = 100 * (value / base - 1)
    shown = f"{percent:+.1f}" if abs(percent) < 9.95 else f"{percent:+.0f}"
    return f"{shown.replace('-', chr(0x2212))} %"


def figures(value: float) -> str:
    """Three significant figures, without an exponent where people would write none."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    value = float(f"{value:.2e}")  # first, so that 9.999 has the digits of 10
    digits = 2 - math.floor(math.log10(abs(value)))
    if -3 <= digits <= 6:
        return f"{value:.{max(0, digits)}f}"
    return f"{value:.3g}"


def plain(value: float) -> str:
    """A loss or metric: four figures."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4g}" if 1e-4 <= abs(value) < 1e6 or value == 0 else f"{value:.3e}"


def moment(at_s: float | None) -> str:
    """`2026-11-25 02:21:44 UTC` of a Unix time."""
    if at_s is None:
        return "an unknown time"
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at_s))
