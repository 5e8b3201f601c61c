"""Interleaved timing, ratios of medians with their spread, and the machine they hold for."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def interleave(
    works: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each work, run in turns, so that a slow moment of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(warmup + repeats):
        for name, work in works.items():
            start_s = time.perf_counter()
            work()
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - start_s)
    return seconds


def ratio(ours_s: list[float], theirs_s: list[float]) -> dict[str, float | list[float]]:
    """Median of the pairs' ratios, and the quartiles."""
    ratios = [a / b for a, b in zip(ours_s, theirs_s, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "ours_us": round(1e6 * statistics.median(ours_s), 1),
        "theirs_us": round(1e6 * statistics.median(theirs_s), 1),
        "pairs": len(ratios),
    }


def ratio_line(name: str, row: Mapping[str, object]) -> str:
    """For the terminal."""
    low, high = row["quartiles"]  # type: ignore[misc]
    return (
        f"{name:44s} {row['ratio']:7.3f}x [{low:.3f}, {high:.3f}]"
        f"  {row['ours_us']:10.1f} us / {row['theirs_us']:10.1f} us, {row['pairs']} pairs"
    )


def write(name: str, command: str, what: str, rows: Mapping[str, object]) -> None:
    """Puts the result beside the scripts, with the machine and how busy it was."""
    report = {
        "command": command,
        "what": what,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
