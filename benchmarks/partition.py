"""Partition solvers: how long they take, what they prove, and how good plans are beside rivals'.

Plans: for each preset of `cm.crowds` (its first 8 devices), each model and each seed, every rival
and our own solver answer the same problem, with the same profile, links and memory. All plans are
scored by `predict`, that is by the exact timeline. A ratio is the best rival's step over ours; the
best rival is chosen anew for each instance. Rivals that may share stages (`share`) do.

Times: random crowds of a preset; each solver in turn, wall seconds.

    python benchmarks/partition.py [--seeds 50] [--presets campus,vehicular] [--quick]
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import numpy as np
import optax
from _measure import arguments, figure, report

import crowdmesh_jax as cm
from crowdmesh_jax.core import ModelProfile
from crowdmesh_jax.errors import InfeasibleError
from crowdmesh_jax.solvers import PartitionProblem

MICROBATCHES = 8
ROWS = 8
DEVICES = 8
MODELS = {
    "mobilenet_v2": (lambda: cm.zoo.mobilenet_v2(classes=1000), (224, 224, 3)),
    "resnet18": (lambda: cm.zoo.resnet18(classes=1000), (224, 224, 3)),
}
RIVALS = (
    "even", "by_params", "single_best", "cloud_device", "pipedream", "ftpipehd", "dapple",
    "asteroid",
)  # fmt: skip
SHARING = ("pipedream", "dapple", "asteroid")
OWN = {"1f1b": "dp", "eager": "eager"}


def profiled(name: str) -> ModelProfile:
    """Flops and bytes; a device's seconds follow from its flops per second."""
    make, row = MODELS[name]
    batch = ROWS * MICROBATCHES
    job = cm.TrainingJob(
        make(), cm.losses.softmax_cross_entropy, optax.adam(1e-3), batch, MICROBATCHES
    )
    example = np.zeros((batch, *row), np.float32), np.zeros(batch, np.int32)
    return cm.profile(job, cm.Crowd.local((1.0,)), example)


def answer(problem: PartitionProblem, solver: str, **options: Any) -> tuple[float, float]:
    """(step seconds, solving seconds); infinite where the solver finds nothing."""
    started_s = time.perf_counter()
    try:
        step_s = cm.solve(problem, solver=solver, **options).predicted.step_s
    except InfeasibleError:
        step_s = float("inf")
    return step_s, time.perf_counter() - started_s


def compare(profile: ModelProfile, crowd: cm.Crowd) -> dict[str, float]:
    """Step seconds by solver, for one instance."""
    eager = PartitionProblem(profile=profile, crowd=crowd, schedule="eager")
    steps = {}
    for rival in RIVALS:
        for share in (False, True) if rival in SHARING else (False,):
            step_s, _ = answer(dataclasses.replace(eager, share=share), rival)
            steps[f"{rival}{' (sharing)' if share else ''}"] = step_s
    steps["own: eager"], steps["eager seconds"] = answer(eager, "eager")
    steps["own: auto"], steps["auto seconds"] = answer(eager, "auto")
    return steps


def main() -> None:
    options = arguments(
        __doc__, repeats=1, seeds=50, presets=",".join(cm.crowds.PRESETS), models=",".join(MODELS)
    )
    seeds = 2 if options.quick else options.seeds
    profiles = {name: profiled(name) for name in options.models.split(",")}
    rows: list[dict[str, Any]] = []
    for preset in options.presets.split(","):
        for name, profile in profiles.items():
            for seed in range(seeds):
                crowd = cm.crowds.preset(preset, DEVICES, seed=seed)
                steps = compare(profile, crowd)
                rows.append({"preset": preset, "model": name, "seed": seed, **steps})
                print(json.dumps(rows[-1]), flush=True)
    report(
        "partition",
        f"step seconds of plans for {DEVICES} devices, best rival over ours, by evaluate; M = 8",
        list(figures(rows)),
        quick=options.quick,
        settings={"devices": DEVICES, "rows": ROWS, "microbatches": MICROBATCHES, "seeds": seeds},
        details={"instances": rows},
    )


def figures(rows: list[dict[str, Any]]):
    rivals = [key for key in rows[0] if key.split(" ")[0] in RIVALS]
    for label, chosen in (
        ("all", rivals),
        ("none sharing", [key for key in rivals if "sharing" not in key]),
    ):
        for preset in ("", *dict.fromkeys(row["preset"] for row in rows)):
            of = [row for row in rows if preset in ("", row["preset"])]
            gains = [min(row[key] for key in chosen) / row["own: eager"] for row in of]
            asked = {"at_least": 1.05} if not preset and label == "all" else {}
            yield figure(f"best rival ({label}) / eager, {preset or 'all presets'}", gains, **asked)
    gains = [min(row[key] for key in rivals) / row["own: auto"] for row in rows]
    yield figure("best rival (all) / auto", gains)
    for rival in rivals:
        ratios = [row[rival] / row["own: eager"] for row in rows if row[rival] < float("inf")]
        if ratios:
            yield figure(f"{rival} / eager", ratios)
    worse = sum(min(row[key] for key in rivals) < row["own: eager"] * (1 - 1e-9) for row in rows)
    yield figure("instances in which a rival is better", [worse / len(rows)], unit="share")
    yield figure("seconds that auto takes", [row["auto seconds"] for row in rows], unit="s",
                 at_most=2.0)  # fmt: skip
    yield figure("seconds that eager takes", [row["eager seconds"] for row in rows], unit="s")


if __name__ == "__main__":
    main()
