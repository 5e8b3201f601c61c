"""Partition solvers by size: how long they take, what they prove, how near they come.

Chains of L layers on the first D devices of each preset of `cm.crowds`, M = 8; 1F1B, and schedule
"eager" where a row says so. Layers are made up: flops and bytes are log-normal (sigma 0.7) around
those of a small transformer's block, so that no two are alike. Every solver gets the same problem;
a gap is its own proof for the closed form, and "above the best step" compares its step by the exact
timeline with the best that any solver found under that schedule.

    python benchmarks/solvers.py [--seeds 2] [--sizes 53x8,100x8,100x12] [--quick]
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from collections.abc import Iterator
from typing import Any

from _measure import MIN_REPEATS, Figure, arguments, figure, report

import crowdmesh_jax as cm
from crowdmesh_jax.core import LayerProfile, ModelProfile
from crowdmesh_jax.errors import InfeasibleError, SolverError
from crowdmesh_jax.solvers import PartitionProblem
from crowdmesh_jax.solvers.backends import available_backends

MICROBATCHES, ROWS = 8, 8
FLOPS, PARAMETER_BYTES, OUTPUT_BYTES, RESIDUAL_BYTES = 2e9, 3e6, 1.6e6, 2e7
"""Around which a layer's forward flops and bytes lie, per microbatch."""
LIMIT_S = {(53, 8): 10.0, (100, 8): 30.0, (100, 12): 30.0}
BUDGET_S = 2.0
"""Of solver "auto": its default."""


def chain(layers: int, seed: int) -> ModelProfile:
    """A chain of unequal layers."""
    rng = random.Random(f"chain {layers} {seed}")

    def around(value: float) -> float:
        return value * math.exp(rng.gauss(0.0, 0.7))

    found = []
    for index in range(layers):
        flops, parameters = around(FLOPS), round(around(PARAMETER_BYTES))
        output = round(around(OUTPUT_BYTES))
        found.append(
            LayerProfile(
                name=f"layer{index}",
                forward_flops=flops,
                backward_flops=2 * flops,
                parameter_bytes=parameters,
                optimizer_bytes=2 * parameters,
                output_bytes=output,
                gradient_bytes=output,
                residual_bytes=round(around(RESIDUAL_BYTES)),
            )
        )
    return ModelProfile(
        layers=tuple(found),
        microbatches=MICROBATCHES,
        microbatch_size=ROWS,
        input_bytes=round(OUTPUT_BYTES),
        target_bytes=4 * ROWS,
    )


def solvers_for(limit_s: float) -> dict[str, dict[str, Any]]:
    """Name in the results -> the solver's name and options."""
    found: dict[str, dict[str, Any]] = {
        f"ilp/{backend}": {"solver": "ilp", "backend": backend, "time_limit_s": limit_s}
        for backend in available_backends()
    }
    found["dp"] = {"solver": "dp", "time_limit_s": 60.0}
    found["auto"] = {"solver": "auto", "budget_s": BUDGET_S}
    found["eager, schedule eager"] = {"solver": "eager"}
    found["auto, schedule eager"] = {"solver": "auto", "budget_s": BUDGET_S}
    return found


def _schedule(name: str) -> str:
    return "eager" if name.endswith("schedule eager") else "1f1b"


def answers(problem: PartitionProblem, limit_s: float) -> dict[str, dict[str, Any] | None]:
    """What each solver says of one problem; None where it found nothing."""
    found: dict[str, dict[str, Any] | None] = {}
    for name, options in solvers_for(limit_s).items():
        own = dataclasses.replace(problem, schedule=_schedule(name))
        started_s = time.perf_counter()
        try:
            result = cm.solve(own, **options)
        except (InfeasibleError, SolverError) as exc:
            found[name] = None
            print(f"{name}: {exc.message.splitlines()[0]}", flush=True)
            continue
        found[name] = {
            "seconds": round(time.perf_counter() - started_s, 3),
            "optimal": result.optimal,
            "gap": result.gap,
            "step_s": result.predicted.step_s,
        }
    return found


def main() -> None:
    options = arguments(
        __doc__,
        repeats=MIN_REPEATS,
        seeds=2,
        sizes=",".join(f"{layers}x{devices}" for layers, devices in LIMIT_S),
        presets=",".join(cm.crowds.PRESETS),
    )
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes.split(",")]
    seeds, presets = options.seeds, options.presets.split(",")
    if options.quick:
        sizes, seeds, presets = [(12, 4)], 1, presets[:1]
    rows: list[dict[str, Any]] = []
    for layers, devices in sizes:
        for preset in presets:
            for seed in range(seeds):
                problem = PartitionProblem(
                    profile=chain(layers, seed), crowd=cm.crowds.preset(preset, devices, seed=seed)
                )
                found = answers(problem, LIMIT_S.get((layers, devices), 10.0))
                row = {"layers": layers, "devices": devices, "preset": preset, "seed": seed}
                rows.append({**row, "solvers": found})
                print(json.dumps(rows[-1]), flush=True)
    report(
        "solvers",
        "seconds, proofs and steps of partition solvers by layers x devices; 1F1B, M = 8",
        list(figures(rows)),
        quick=options.quick,
        settings={"sizes": sizes, "presets": presets, "seeds": seeds},
        details={"instances": rows},
    )


ASKED: dict[tuple[str, str], dict[str, float]] = {
    ("53x8 ilp", "seconds"): {"at_most": 10.0},
    ("53x8 ilp", "its own gap"): {"at_most": 0.005},
    ("100x12 ilp", "seconds"): {"at_most": 30.5},
    ("100x12 ilp", "its own gap"): {"at_most": 0.05},
    ("100x8 dp", "seconds"): {"at_most": 5.0},
    ("auto", "seconds"): {"at_most": BUDGET_S},
    ("auto", "above the best step"): {"at_most": 0.03},
}
"""(size and solver, figure) -> what is asked of it."""


def figures(rows: list[dict[str, Any]]) -> Iterator[Figure]:
    """Per size and solver: seconds, gaps, distance from the best."""
    for layers, devices in dict.fromkeys((row["layers"], row["devices"]) for row in rows):
        of = [row for row in rows if (row["layers"], row["devices"]) == (layers, devices)]
        for name in of[0]["solvers"]:
            kept = [row["solvers"] for row in of if row["solvers"][name]]
            if not kept:
                continue
            own = [each[name] for each in kept]
            alike = [n for n in of[0]["solvers"] if _schedule(n) == _schedule(name)]
            best = [min(each[n]["step_s"] for n in alike if each[n]) for each in kept]
            series = {
                "seconds": [a["seconds"] for a in own],
                "above the best step": [
                    a["step_s"] / b - 1 for a, b in zip(own, best, strict=True)
                ],
                "its own gap": [a["gap"] for a in own if a["gap"] is not None],
            }
            size, kind = f"{layers}x{devices}", name.split("/")[0].split(",")[0]
            for what, values in series.items():
                if not values:
                    continue
                asked = ASKED.get((f"{size} {kind}", what), ASKED.get((kind, what), {}))
                unit = "s" if what == "seconds" else ""
                yield figure(f"{size}, {name}: {what}", values, unit=unit, **asked)


if __name__ == "__main__":
    main()
