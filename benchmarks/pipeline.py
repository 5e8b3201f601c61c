"""Two agent processes, one core each, against one: 1F1B, 8 microbatches, gRPC, a balanced net.

Each repeat trains a few steps with all layers on one agent, then split in the middle over both,
on the same agents. Steps are timed by the coordinator from one commit to the next.

    python benchmarks/pipeline.py [--repeats 7] [--steps 10] [--quick]
"""

from __future__ import annotations

import os
import tempfile

os.environ["NPROC"] = "1"  # XLA's threads, as in agents

from _measure import arguments, figure, ratio, report
from _pipelines import Trained, one_stage, train
from _workloads import MICROBATCHES, workload

import crowdmesh_jax as cm

IDEAL = 2 * MICROBATCHES / (MICROBATCHES + 1)


def main() -> None:
    options = arguments(__doc__, repeats=7, steps=10)
    steps = 3 if options.quick else options.steps
    work = workload("mlp", quick=options.quick)
    crowd = cm.Crowd.local((1.0, 1.0))
    split = cm.PipelinePlan.even(
        len(work.job.model.layers), [d.id for d in crowd.devices], microbatches=MICROBATCHES
    )
    plans = {"one": one_stage(work, crowd.devices[0].id), "two": split}
    runs: dict[str, list[Trained]] = {name: [] for name in plans}
    with tempfile.TemporaryDirectory() as runs_dir, cm.launch(crowd) as crew:
        for repeat in range(options.repeats + 1):
            for name, plan in plans.items():
                trained = train(crew, work, plan, steps=steps, runs_dir=runs_dir)
                if repeat or options.quick:  # the first one fills caches
                    runs[name].append(trained)
    del runs[min(runs)][options.repeats :], runs[max(runs)][options.repeats :]
    step_s = {name: [each.step_s for each in row] for name, row in runs.items()}
    figures = [
        ratio("speed-up of two cores", step_s["one"], step_s["two"], at_least=1.5),
        figure(
            "share of the schedule's ideal",
            [a / b / IDEAL for a, b in zip(step_s["one"], step_s["two"], strict=True)],
        ),
        figure(
            "measured / predicted step",
            [t.step_s / t.predicted_s for t in runs["two"]],
            at_least=0.92,
            at_most=1.08,
        ),
        figure("step on one core", [1e3 * s for s in step_s["one"]], unit="ms"),
        figure("step on two cores", [1e3 * s for s in step_s["two"]], unit="ms"),
        figure(
            "CPU seconds of a step, two / one",
            [
                (b.cpu_s / b.wall_s * b.step_s) / (a.cpu_s / a.wall_s * a.step_s)
                for a, b in zip(runs["one"], runs["two"], strict=True)
            ],
        ),
        figure("one core: cpu / wall of the agents", [t.cpu_s / t.wall_s for t in runs["one"]]),
        figure("two cores: cpu / wall of the agents", [t.cpu_s / t.wall_s for t in runs["two"]]),
    ]
    report(
        "pipeline",
        f"step seconds of 1 and 2 agent processes, one core each; the ideal is {IDEAL:.2f}",
        figures,
        quick=options.quick,
        settings={"net": "mlp 8 x 1024", "rows": work.job.batch_size, "steps": steps},
    )


if __name__ == "__main__":
    main()
