"""Many seeded runs in which devices are killed at exact ops: the long part of `test_exactly_once`.

    python tests/system/exactly_once.py --log exactly_once.log [--runs 100] [--first 0]

Goes on where the log ends. A seed that fails is run no second time: it is a bug, to be repeated
with `--first SEED --runs 1`. At the end the log's summary is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("NPROC", "1")  # bit-equality is claimed for one machine type
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

from support import survival
from support.mortal import Mortals

import crowdmesh_jax as cm

SPARES = 3
DEVICES = 3 + SPARES


def read(log: Path) -> list[dict[str, Any]]:
    """What was run before; a line that broke off does not count."""
    rows = []
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def run(seeds: list[int], log: Path, folder: Path) -> None:
    """Runs these seeds; a crew serves until a run fails on it."""
    cache_dir = survival.share_compiled(folder / "compiled", DEVICES)
    crowd = cm.Crowd.local((1.0,) * DEVICES)
    left = list(seeds)
    while left:
        mortals = Mortals(folder / f"orders-{left[0]}", ("--chunk-bytes", "512"))
        logs = folder / f"logs-{left[0]}"
        with (
            cm.launch(
                crowd, agent_command=mortals.command, cache_dir=cache_dir, log_dir=logs
            ) as crew,
            log.open("a") as file,
        ):
            while left:
                row = run_one(left.pop(0), crew, mortals, folder)
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(row["trial"], "ok" if row["ok"] else f"FAILED: {row['error']}", flush=True)
                if not row["ok"]:
                    break
                survival.relaunch_dead(crew)


def run_one(seed: int, crew: cm.Crew, mortals: Mortals, folder: Path) -> dict[str, Any]:
    """A trial, as the log's row."""
    trial = survival.draw(seed, spares=SPARES)
    began_s = time.monotonic()
    row: dict[str, Any] = {"seed": seed, "trial": str(trial), "kills": trial.kills}
    try:
        story = survival.run_trial(trial, crew, mortals, folder / "runs")
        survival.judge(story)
        row |= {"ok": True, "recoveries": [event.line() for event in story.result.recoveries]}
        row["recovery_s"] = [round(e.total_s, 3) for e in story.result.recoveries]
    except Exception as exc:
        row |= {"ok": False, "error": f"{type(exc).__name__}: {exc}"}
        row["trace"] = traceback.format_exc()
    fired = list(mortals.fired().values())
    return {**row, "fired": fired, "seconds": round(time.monotonic() - began_s, 2)}


def summary(rows: list[dict[str, Any]]) -> str:
    """Of a log, for people."""
    good = [row for row in rows if row["ok"]]
    fired = [entry for row in rows for entry in row["fired"]]
    killed = sum(1 + len(entry.get("beside", ())) for entry in fired)
    kinds = Counter(f"{e['kind']}, {e.get('when', 'at a step')}" for e in fired)
    times = sorted(t for row in good for t in row["recovery_s"])
    wrong = [row for row in rows if not row["ok"]]
    seeds = [row["seed"] for row in rows]
    minutes = sum(row["seconds"] for row in rows) / 60
    lines = []
    lines.append(
        f"{len(rows)} runs (seeds {min(seeds)}-{max(seeds)}), {killed} processes killed by"
        f" SIGKILL, {len(times)} recoveries; {minutes:.0f} minutes."
    )
    lines.append(
        f"{len(good)} runs: parameters, state and optimizer state bit-equal to the undisturbed"
        " run's, each step shown once, every recovery a replay from a device's copy."
    )
    lines.append(f"{len(wrong)} runs failed" + (":" if wrong else "."))
    lines += [f"  {row['trial']}: {row['error'][:300]}" for row in wrong]
    if times:
        lines.append(
            f"From the last word of the lost device to the next committed step: median"
            f" {times[len(times) // 2]:.2f} s, 90 % {times[int(0.9 * len(times))]:.2f} s,"
            f" longest {times[-1]:.2f} s."
        )
    lines += ["Killed at:", *(f"  {count:4d}  {kind}" for kind, count in kinds.most_common())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--summary", action="store_true", help="only show the log's summary")
    arguments = parser.parse_args()
    before = {row["seed"] for row in read(arguments.log)}
    seeds = range(arguments.first, arguments.first + arguments.runs)
    left = [seed for seed in seeds if seed not in before]
    if left and not arguments.summary:
        run(left, arguments.log, Path(tempfile.mkdtemp(prefix="exactly-once-")))
    print(summary(read(arguments.log)))


if __name__ == "__main__":
    main()
