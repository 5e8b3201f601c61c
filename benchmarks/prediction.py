"""Emulated pipelines: the measured step against the one predicted from stage times taken alone.

2, 3 and 4 devices, equal and unequal, on the loopback and over a link of 200 Mbit/s and 2 ms, a
CNN and a transformer, cut by the ILP. A row's repeats are the steps of its run after the warm-up;
each run's prediction was made before it, and sees nothing of it. What ops took longer than alone is
told apart: the same timeline from the run's own op times, "explained".

    python benchmarks/prediction.py [--repeats 7] [--quick]
"""

from __future__ import annotations

import os
import statistics
import tempfile

os.environ["NPROC"] = "1"  # XLA's threads, as in agents

from _measure import Figure, arguments, figure, report
from _pipelines import step_times
from _workloads import Workload, workload

import crowdmesh_jax as cm

NETS = ("cnn", "transformer")
SPEEDS = {
    2: ((1.0, 1.0), (1.0, 0.4)),
    3: ((1.0, 1.0, 1.0), (1.0, 0.6, 0.3)),
    4: ((1.0, 1.0, 1.0, 1.0), (1.0, 0.7, 0.5, 0.3)),
}
LINKS = {"loopback": {}, "200 Mbit/s": {"bandwidth_bytes_per_s": 25e6, "latency_s": 2e-3}}
WITHIN = 0.08


def grid(quick: bool) -> list[tuple[str, cm.Crowd]]:
    rows = []
    for count, kinds in SPEEDS.items():
        for speeds in kinds:
            for link, settings in LINKS.items():
                kind = "equal" if len(set(speeds)) == 1 else "unequal"
                rows.append((f"{count} {kind}, {link}", cm.Crowd.local(speeds, **settings)))
    return rows[1:2] if quick else rows


def plan_of(work: Workload, crowd: cm.Crowd) -> cm.PipelinePlan:
    """All devices take part: what is tested is the prediction, not the plan."""
    profile = cm.profile(work.job, crowd, work.data.batch(0))
    return cm.partition(profile, crowd, min_stages=len(crowd.devices))


def main() -> None:
    options = arguments(__doc__, repeats=7)
    works = [workload(net, quick=options.quick) for net in NETS]
    figures: list[Figure] = []
    details: dict[str, dict[str, float]] = {}
    for name, crowd in grid(options.quick):
        with tempfile.TemporaryDirectory() as runs_dir, cm.launch(crowd) as crew:
            for work in works:
                plan = plan_of(work, crew.crowd)
                steps = step_times(crew, work, plan, repeats=options.repeats, runs_dir=runs_dir)
                row = figure(f"{work.name}, {name}", [s / steps.predicted_s for s in steps.seconds])
                print(row.line(), flush=True)
                figures.append(row)
                details[row.name] = {
                    "predicted_s": steps.predicted_s,
                    "explained_s": steps.explained_s,
                    "measured_s": statistics.median(steps.seconds),
                }
    errors = [abs(row.value - 1) for row in figures]
    left = [abs(row["measured_s"] / row["explained_s"] - 1) for row in details.values()]
    figures[:0] = [
        figure("|measured / predicted - 1|, median of all rows", errors, at_most=WITHIN),
        figure("the same, with the seconds that ops took in the run", left),
    ]
    report(
        "prediction",
        "measured over predicted step seconds, emulated devices, 1F1B, M=8",
        figures,
        quick=options.quick,
        settings={"speeds": [list(s) for kinds in SPEEDS.values() for s in kinds]},
        details=details,
    )


if __name__ == "__main__":
    main()
