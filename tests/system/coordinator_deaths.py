"""Many seeded runs whose coordinator is killed: the long part of `test_coordinator_deaths`.

    python tests/system/coordinator_deaths.py --log coordinator_deaths.log [--runs 30] [--first 0]

Goes on where the log ends. A seed that fails is run no second time: it is a bug, to be repeated
with `--first SEED --runs 1`. At the end the log's summary is printed.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("NPROC", "1")  # bit-equality is claimed for one machine type
os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))

from support import coordinators, trials
from support.trials import Row


def run(seeds: list[int], log: Path, folder: Path) -> None:
    """Runs these seeds on the same agents; new ones after a run that failed."""
    with coordinators.Agents(folder) as agents:
        for seed in seeds:
            trial = coordinators.draw(seed)
            row: Row = {"seed": seed, "trial": str(trial)}
            row = trials.attempt(row, lambda trial=trial: come_to(trial, agents))
            trials.write(log, row)
            if not row["ok"]:
                agents.restart()


def come_to(trial: coordinators.Trial, agents: coordinators.Agents) -> Row:
    """Runs and judges a trial."""
    story = coordinators.run_trial(trial, agents)
    coordinators.judge(story, agents.folder)
    deaths = zip(trial.deaths, story.fired, strict=False)
    return {
        "seconds": round(story.seconds, 1),
        "recoveries": story.recoveries,
        "fired": [[death.moment, where] for death, where in deaths if where],
    }


def summary(rows: list[Row]) -> str:
    """Of a log, for people."""
    fired = [entry for row in rows for entry in row.get("fired", ())]
    moments = Counter(moment for moment, _ in fired)
    points = Counter("some ms into a step" if "ms later" in at else at for _, at in fired)
    good = [row for row in rows if row["ok"]]
    seeds = [row["seed"] for row in rows]
    minutes = sum(row.get("seconds", 0.0) for row in rows) / 60
    recoveries = sum(len(row.get("recoveries", ())) for row in rows)
    lines = []
    lines.append(
        f"{len(rows)} runs (seeds {min(seeds)}-{max(seeds)}), their coordinator killed by SIGKILL"
        f" {len(fired)} times and taken up again, {recoveries} recoveries; {minutes:.0f} minutes."
    )
    lines.append(
        f"{len(good)} runs: final state bit-equal to the undisturbed run's, each step"
        " recorded once, no term or epoch twice."
    )
    lines += trials.failures(rows)
    lines.append("Killed during: " + ", ".join(f"{n} {what}" for what, n in moments.most_common()))
    lines += [f"  {count:4d}  {point}" for point, count in points.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    trials.main(__doc__, runs=30, run=run, summary=summary)
