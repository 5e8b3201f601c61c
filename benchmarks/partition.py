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
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import optax
from _measure import MIN_REPEATS, Figure, arguments, figure, report

import crowdmesh_jax as cm
from crowdmesh_jax.core import ModelProfile
from crowdmesh_jax.errors import InfeasibleError
from crowdmesh_jax.solvers import PartitionProblem

MICROBATCHES = 8
ROWS = 8
DEVICES = 8
MODELS: dict[str, tuple[Callable[[], cm.StagedModel], tuple[int, ...]]] = {
    "mobilenet_v2": (lambda: cm.zoo.mobilenet_v2(classes=1000), (224, 224, 3)),
    "resnet18": (lambda: cm.zoo.resnet18(classes=1000), (224, 224, 3)),
    "gpt2": (
        lambda: cm.zoo.gpt2(vocab=8000, context=128, width=384, heads=6, depth=12, tied=False),
        (128,),
    ),
}
"""Model and shape of a row. Stages with BatchNorm cannot be shared, so only the last has any."""
RIVALS = (
    "even", "by_params", "single_best", "cloud_device", "pipedream", "ftpipehd", "dapple",
    "asteroid",
)  # fmt: skip
SHARING = ("pipedream", "dapple", "asteroid")


def profiled(name: str) -> ModelProfile:
    """Flops and bytes; a device's seconds follow from its flops per second."""
    make, row = MODELS[name]
    batch = ROWS * MICROBATCHES
    job = cm.TrainingJob(
        make(), cm.losses.softmax_cross_entropy, optax.adam(1e-3), batch, MICROBATCHES
    )
    tokens = np.zeros((batch, *row), np.int32)
    example = (tokens, tokens) if len(row) == 1 else (tokens.astype(np.float32), tokens[:, 0, 0, 0])
    return cm.profile(job, cm.Crowd.local((1.0,)), example)


def answer(problem: PartitionProblem, solver: str, **options: Any) -> tuple[float, float]:
    """(step seconds, solving seconds); infinite (in results: null) where none was found."""
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
    shared = dataclasses.replace(eager, share=True)
    steps["own: hybrid"], steps["hybrid seconds"] = answer(shared, "hybrid")
    return steps


def main() -> None:
    options = arguments(
        __doc__,
        repeats=MIN_REPEATS,
        seeds=50,
        presets=",".join(cm.crowds.PRESETS),
        models=",".join(MODELS),
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
        details={
            "instances": [
                {key: None if value == float("inf") else value for key, value in row.items()}
                for row in rows
            ]
        },
    )


def figures(rows: list[dict[str, Any]]) -> Iterator[Figure]:
    """The claims, from the step seconds of each instance."""
    rivals = [key for key in rows[0] if key.split(" ")[0] in RIVALS]
    plain = [key for key in rivals if "sharing" not in key]
    for own, chosen, words in (
        ("hybrid", rivals, "sharing allowed on both sides"),
        ("eager", plain, "one device a stage"),
    ):
        for preset in ("", *dict.fromkeys(row["preset"] for row in rows)):
            of = [row for row in rows if preset in ("", row["preset"])]
            gains = [min(row[key] for key in chosen) / row[f"own: {own}"] for row in of]
            asked = {"at_least": 1.05} if not preset and own == "hybrid" else {}
            yield figure(f"best rival / {own} ({words}), {preset or 'all'}", gains, **asked)
    # What `auto` with `also` naming hybrid and all rivals returns: the best plan of them.
    gains = [
        min(row[key] for key in rivals) / min(row["own: hybrid"], *(row[key] for key in rivals))
        for row in rows
    ]
    yield figure("best rival / portfolio of hybrid and all rivals", gains, at_least=1.0)
    for model in dict.fromkeys(row["model"] for row in rows):
        of = [row for row in rows if row["model"] == model]
        gains = [min(row[key] for key in rivals) / row["own: hybrid"] for row in of]
        yield figure(f"best rival / hybrid, {model}", gains)
    gains = [min(row[key] for key in plain) / row["own: auto"] for row in rows]
    yield figure("best rival / auto (one device a stage)", gains)
    for rival in rivals:
        own = "own: hybrid" if "sharing" in rival else "own: eager"
        ratios = [row[rival] / row[own] for row in rows if row[rival] < float("inf")]
        if ratios:
            yield figure(f"{rival} / {own[5:]}", ratios)
    worse = [min(row[key] for key in rivals) < row["own: hybrid"] * (1 - 1e-9) for row in rows]
    yield figure("a rival beats hybrid (0: no, 1: yes)", [float(w) for w in worse], unit="")
    yield figure("seconds that auto takes", [row["auto seconds"] for row in rows], unit="s",
                 at_most=2.0)  # fmt: skip
    yield figure("seconds that eager takes", [row["eager seconds"] for row in rows], unit="s")


if __name__ == "__main__":
    main()
