"""A pipeline of two processes against one, and against what `evaluate` predicts.

Two agents, a core each, 1F1B, 8 microbatches, a balanced net. Interleaved: each repeat trains a
few steps with all layers on one device, then split over two, on the same agents. Written beside
this script: ratios of medians, every figure, the machine.

    python benchmarks/pipeline.py [--repeats 7] [--steps 6]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path

import numpy as np
import optax

import crowdmesh_jax as cm
from crowdmesh_jax.runtime.emulation import available_cores

RESULT = Path(__file__).parent / "results" / "pipeline.json"
WIDTH, LAYERS, BATCH, MICROBATCHES = 1024, 8, 1024, 8


def make_job() -> tuple[cm.TrainingJob, cm.ArraySource]:
    """A chain of equal dense layers: two halves are balanced by construction."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((4 * BATCH, WIDTH)).astype(np.float32)
    targets = rng.integers(0, WIDTH, 4 * BATCH).astype(np.int32)
    model = cm.zoo.mlp(features=(WIDTH,) * (LAYERS - 1), classes=WIDTH)
    job = cm.TrainingJob(
        model, cm.losses.softmax_cross_entropy, optax.sgd(1e-3), BATCH, MICROBATCHES
    )
    return job, cm.ArraySource(inputs, targets, BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    job, data = make_job()
    crowd = cm.Crowd.local((1.0, 1.0))
    layers = len(job.model.layers)
    plans = {
        count: cm.PipelinePlan.even(
            layers, [d.id for d in crowd.devices[:count]], microbatches=MICROBATCHES
        )
        for count in (1, 2)
    }
    rows: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as runs, cm.launch(crowd) as agents:
        for repeat in range(arguments.repeats + 1):
            for count, plan in plans.items():
                result = cm.train(
                    job, agents, data, steps=arguments.steps, plan=plan, runs_dir=runs
                )
                row = {"measured_s": result.measured_step_s, "predicted_s": result.predicted_step_s}
                if repeat:  # the first one fills caches
                    rows[count].append(row)
                print(f"repeat {repeat} stages {count}: {row}", flush=True)
    report = summarise(rows, arguments.steps)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "rows"}, indent=1))


def summarise(rows: dict[int, list[dict[str, float]]], steps: int) -> dict[str, object]:
    """Medians and the two ratios that matter."""
    one = [row["measured_s"] for row in rows[1]]
    two = [row["measured_s"] for row in rows[2]]
    speedups = [a / b for a, b in zip(one, two, strict=True)]
    errors = [row["measured_s"] / row["predicted_s"] for row in rows[2]]
    return {
        "command": f"python benchmarks/pipeline.py --repeats {len(one)} --steps {steps}",
        "what": "step seconds of 1 and 2 agent processes, one core each, 1F1B, M=8, MLP 8 x 1024",
        "machine": f"{platform.machine()}, {len(available_cores())} cores, {_cpu_name()}",
        "repeats": len(one),
        "one_core_s": statistics.median(one),
        "two_cores_s": statistics.median(two),
        "speedup": statistics.median(speedups),
        "speedup_range": [min(speedups), max(speedups)],
        "ideal_speedup": 2 * MICROBATCHES / (MICROBATCHES + 1),
        "measured_over_predicted": statistics.median(errors),
        "measured_over_predicted_range": [min(errors), max(errors)],
        "rows": {str(count): each for count, each in rows.items()},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or os.uname().sysname
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


if __name__ == "__main__":
    main()
