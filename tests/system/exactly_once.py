"""Many seeded runs in which devices are killed at exact ops: the long part of `test_exactly_once`.

    python tests/system/exactly_once.py --log exactly_once.log [--runs 100] [--first 0]

Goes on where the log ends. A seed that fails is run no second time: it is a bug, to be repeated
with `--first SEED --runs 1`. At the end the log's summary is printed.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("NPROC", "1")  # bit-equality is claimed for one machine type
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

from support import survival, trials
from support.mortal import Mortals
from support.trials import Row

import crowdmesh_jax as cm

SPARES = 3
DEVICES = 3 + SPARES


def run(seeds: list[int], log: Path, folder: Path) -> None:
    """Runs these seeds; a crew serves until a run fails on it."""
    cache_dir = survival.share_compiled(folder / "compiled", DEVICES)
    crowd = cm.Crowd.local((1.0,) * DEVICES)
    left = list(seeds)
    while left:
        mortals = Mortals(folder / f"orders-{left[0]}", ("--chunk-bytes", "512"))
        logs = folder / f"logs-{left[0]}"
        with cm.launch(
            crowd, agent_command=mortals.command, cache_dir=cache_dir, log_dir=logs
        ) as crew:
            while left:
                row = run_one(left.pop(0), crew, mortals, folder)
                trials.write(log, row)
                if not row["ok"]:
                    break
                survival.relaunch_dead(crew)


def run_one(seed: int, crew: cm.Crew, mortals: Mortals, folder: Path) -> Row:
    """A trial, as the log's row."""
    trial = survival.draw(seed, spares=SPARES)
    began_s = time.monotonic()

    def come_to() -> Row:
        story = survival.run_trial(trial, crew, mortals, folder / "runs")
        survival.judge(story)
        events = story.result.recoveries
        return {
            "recoveries": [event.line() for event in events],
            "recovery_s": [round(event.total_s, 3) for event in events],
        }

    row = trials.attempt({"seed": seed, "trial": str(trial), "kills": trial.kills}, come_to)
    fired = list(mortals.fired().values())
    return {**row, "fired": fired, "seconds": round(time.monotonic() - began_s, 2)}


def summary(rows: list[Row]) -> str:
    """Of a log, for people."""
    good = [row for row in rows if row["ok"]]
    fired = [entry for row in rows for entry in row["fired"]]
    killed = sum(1 + len(entry.get("beside", ())) for entry in fired)
    kinds = Counter(f"{e['kind']}, {e.get('when', 'at a step')}" for e in fired)
    times = sorted(t for row in good for t in row["recovery_s"])
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
    lines += trials.failures(rows)
    if times:
        lines.append(
            f"From the last word of the lost device to the next committed step: median"
            f" {times[len(times) // 2]:.2f} s, 90 % {times[int(0.9 * len(times))]:.2f} s,"
            f" longest {times[-1]:.2f} s."
        )
    lines += ["Killed at:", *(f"  {count:4d}  {kind}" for kind, count in kinds.most_common())]
    return "\n".join(lines)


if __name__ == "__main__":
    trials.main(__doc__, runs=100, run=run, summary=summary)
