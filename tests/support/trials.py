"""Many seeded trials with a log that is gone on with: what the long tests' scripts share."""

from __future__ import annotations

import argparse
import json
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(log: Path) -> list[Row]:
    """What was run before; a line that broke off does not count."""
    rows = []
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def attempt(row: Row, trial: Callable[[], Row]) -> Row:
    """The row of a trial with what it came to, or what was wrong."""
    try:
        return {**row, **trial(), "ok": True}
    except Exception as exc:
        told = {"error": f"{type(exc).__name__}: {exc}", "trace": traceback.format_exc()}
        return {**row, **told, "ok": False}


def write(log: Path, row: Row) -> None:
    """Adds a row, and says how it went."""
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(row["trial"], "ok" if row["ok"] else f"FAILED: {row['error']}", flush=True)


def failures(rows: list[Row]) -> list[str]:
    """Lines of a summary."""
    wrong = [row for row in rows if not row["ok"]]
    head = f"{len(wrong)} runs failed" + (":" if wrong else ".")
    return [head, *(f"  {row['trial']}: {row['error'][:300]}" for row in wrong)]


def main(
    doc: str | None,
    *,
    runs: int,
    run: Callable[[list[int], Path, Path], None],
    summary: Callable[[list[Row]], str],
) -> None:
    """The command line: goes on where the log ends, then shows its summary.

    Args:
        runs: As many as are made without --runs.
        run: (seeds, log, folder for what is left behind).
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=runs)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--summary", action="store_true", help="only show the log's summary")
    arguments = parser.parse_args()
    before = {row["seed"] for row in read(arguments.log)}
    seeds = range(arguments.first, arguments.first + arguments.runs)
    left = [seed for seed in seeds if seed not in before]
    if left and not arguments.summary:
        run(left, arguments.log, Path(tempfile.mkdtemp(prefix="trials-")))
    print(summary(read(arguments.log)))
