"""How far training over stage programs drifts from training by one program, in 100 steps.

Both in this process, same data and seed; three stages against none. What a pipeline run adds to
this is nothing: it is bit-equal to the stage programs (`make exact`). Writes results/drift.json and
prints the table of docs/exactness.md.

    python benchmarks/drift.py [--steps 100] [--family bf16]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("NPROC", "1")  # XLA sums differently on one core and on two
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import jax
import numpy as np
import optax
from support.families import FAMILIES, family

import crowdmesh_jax as cm

RESULT = Path(__file__).parent / "results" / "drift.json"
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd, momentum 0.9": lambda: optax.sgd(0.01, momentum=0.9),
    "adam, eps 1e-4": lambda: optax.adam(1e-3, eps=1e-4),
    "adam, eps 1e-8": lambda: optax.adam(1e-3),
}


def distance(ours: Any, theirs: Any) -> float:
    """Norm of the difference of two trees over the norm of the second."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    wide = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    apart = sum(float(((a - b) ** 2).sum()) for a, b in wide)
    return float(np.sqrt(apart / sum(float((b**2).sum()) for _, b in wide)))


def drift(name: str, optimizer: Any, steps: int) -> dict[str, float]:
    """Parameters and losses of both trainings after `steps`."""
    made = family(name)
    job, data = made.job(optimizer), made.source()
    plan = cm.PipelinePlan.even(
        len(job.model.layers), ["a", "b", "c"], microbatches=job.microbatches
    )
    staged, whole = cm.reference(job, data, steps, plan=plan), cm.reference(job, data, steps)
    ours, theirs = np.asarray(staged.losses), np.asarray(whole.losses)
    return {
        "parameters": distance(staged.params, whole.params),
        "worst_loss": float(np.max(np.abs(ours - theirs) / np.abs(theirs))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--family", action="append", help="these families only; other rows stay as they are"
    )
    arguments = parser.parse_args()
    rows = json.loads(RESULT.read_text())["rows"] if arguments.family else {}
    print("| family | " + " | ".join(OPTIMIZERS) + " | worst loss |")
    print("| --- |" + " --- |" * (len(OPTIMIZERS) + 1))
    for name in arguments.family or FAMILIES:
        row = {label: drift(name, make(), arguments.steps) for label, make in OPTIMIZERS.items()}
        rows[name] = row
        figures = " | ".join(f"{each['parameters']:.1e}" for each in row.values())
        worst = max(each["worst_loss"] for each in row.values())
        print(f"| {name} | {figures} | {worst:.1e} |", flush=True)
    report = {
        "command": f"python benchmarks/drift.py --steps {arguments.steps}",
        "what": "norm of the difference over the norm, all parameters; relative loss, worst step",
        "jax": jax.__version__,
        "rows": rows,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
