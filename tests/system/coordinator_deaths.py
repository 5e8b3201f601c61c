"""Many seeded runs whose coordinator is killed: the long part of `test_coordinator_deaths`.

    python tests/system/coordinator_deaths.py --log coordinator_deaths.log [--runs 30] [--first 0]

Goes on where the log ends. A seed that fails is run no second time: it is a bug, to be repeated
with `--first SEED --runs 1`. At the end the log's summary is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("NPROC", "1")  # bit-equality is claimed for one machine type
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

from support import coordinators


def read(log: Path) -> list[dict[str, Any]]:
    """What was run before."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def run(seeds: list[int], log: Path, folder: Path) -> None:
    """Runs these seeds on the same agents; new ones after a run that failed."""
    with coordinators.Agents(folder) as agents, log.open("a") as file:
        for seed in seeds:
            row = run_one(seed, agents)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(row["trial"], "ok" if row["ok"] else f"FAILED: {row['error']}", flush=True)
            if not row["ok"]:
                agents.restart()


def run_one(seed: int, agents: coordinators.Agents) -> dict[str, Any]:
    """A trial, as the log's row."""
    trial = coordinators.draw(seed)
    row: dict[str, Any] = {"seed": seed, "trial": str(trial)}
    try:
        story = coordinators.run_trial(trial, agents)
        row |= {
            "seconds": round(story.seconds, 1),
            "recoveries": story.recoveries,
            "fired": [
                [death.moment, where]
                for death, where in zip(trial.deaths, story.fired, strict=False)
                if where
            ],
        }
        coordinators.judge(story, agents.folder)
        row["ok"] = True
    except Exception as exc:
        row |= {"ok": False, "error": f"{type(exc).__name__}: {exc}"}
        row["trace"] = traceback.format_exc()
    return row


def summary(rows: list[dict[str, Any]]) -> str:
    """Of a log, for people."""
    fired = [entry for row in rows for entry in row.get("fired", ())]
    moments = Counter(moment for moment, _ in fired)
    points = Counter("some ms into a step" if "ms later" in at else at for _, at in fired)
    wrong = [row for row in rows if not row["ok"]]
    seeds = [row["seed"] for row in rows]
    minutes = sum(row.get("seconds", 0.0) for row in rows) / 60
    recoveries = sum(len(row.get("recoveries", ())) for row in rows)
    lines = []
    lines.append(
        f"{len(rows)} runs (seeds {min(seeds)}-{max(seeds)}), their coordinator killed by SIGKILL"
        f" {len(fired)} times and taken up again, {recoveries} recoveries; {minutes:.0f} minutes."
    )
    lines.append(
        f"{len(rows) - len(wrong)} runs: final state bit-equal to the undisturbed run's, each step"
        " recorded once, no term or epoch twice."
    )
    lines.append(f"{len(wrong)} runs failed" + (":" if wrong else "."))
    lines += [f"  {row['trial']}: {row['error'][:300]}" for row in wrong]
    lines.append("Killed during: " + ", ".join(f"{n} {what}" for what, n in moments.most_common()))
    lines += [f"  {count:4d}  {point}" for point, count in points.most_common()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--summary", action="store_true", help="only show the log's summary")
    arguments = parser.parse_args()
    before = {row["seed"] for row in read(arguments.log)}
    seeds = range(arguments.first, arguments.first + arguments.runs)
    left = [seed for seed in seeds if seed not in before]
    if left and not arguments.summary:
        run(left, arguments.log, Path(tempfile.mkdtemp(prefix="coordinator-deaths-")))
    print(summary(read(arguments.log)))


if __name__ == "__main__":
    main()
