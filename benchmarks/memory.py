"""Memory of an agent above an idle one, against the planner's prediction, for six models.

Each model is cut over two or three agent processes that train a few steps. Measured: the peak of
each process's resident bytes once its stage is in place (what loading and compiling peak at
stands in the result's details), less what it held before it had a stage. Predicted: `stage_memory`
with the sizes of the profile and the compiler's own figures per layer (`planned`), and from the
exported programs (`programs`, what a run's memory.json holds). Two rounds: with an empty compile
cache, and again with a full one.

    python benchmarks/memory.py [--models resnet18,lstm] [--steps 3]
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import optax
from _measure import MIN_REPEATS, arguments, figure, report

import crowdmesh_jax as cm
from crowdmesh_jax.core import predict
from crowdmesh_jax.core.memory import RUNTIME_BYTES

Case = tuple[cm.StagedModel, tuple[int, ...] | None, int, int, int]
"""Model, shape of a row (None: tokens), classes, rows of a microbatch, stages."""
MICROBATCHES = 4
CONTEXT, VOCAB = 128, 8000


def cases() -> dict[str, Callable[[], Case]]:
    """Models whose weights or activations are hundreds of megabytes."""
    zoo = cm.zoo
    return {
        "mlp_wide": lambda: (
            zoo.mlp(features=(2048,) * 7, classes=16), (2048,), 16, 16, 2,
        ),
        "lenet_wide": lambda: (
            zoo.lenet(width=64), (28, 28, 1), 10, 128, 2,
        ),
        "resnet18": lambda: (zoo.resnet18(classes=10, small_inputs=True), (32, 32, 3), 10, 16, 3),
        "mobilenet_v2": lambda: (
            zoo.mobilenet_v2(classes=10, small_inputs=True), (32, 32, 3), 10, 16, 3,
        ),
        "gpt2": lambda: (
            zoo.gpt2(vocab=VOCAB, context=CONTEXT, width=512, heads=8, depth=6, tied=False),
            None, VOCAB, 4, 2,
        ),
        "lstm": lambda: (zoo.har_lstm(features=128), (128, 9), 6, 256, 2),
    }  # fmt: skip


def measure(case: Case, cache_dir: str, steps: int) -> list[dict[str, Any]]:
    """One run: a row per agent."""
    model, row, classes, rows, stages = case
    batch = rows * MICROBATCHES
    rng = np.random.default_rng(0)
    if row is None:
        inputs = rng.integers(0, classes, (batch, CONTEXT)).astype(np.int32)
        targets = inputs
    else:
        inputs = rng.standard_normal((batch, *row)).astype(np.float32)
        targets = rng.integers(0, classes, batch).astype(np.int32)
    job = cm.TrainingJob(
        model, cm.losses.softmax_cross_entropy, optax.adam(1e-3), batch, MICROBATCHES
    )
    crowd = cm.Crowd.local((1.0,) * stages)
    devices = [device.id for device in crowd.devices]
    plan = cm.PipelinePlan.even(len(model.layers), devices, microbatches=MICROBATCHES)
    profile = cm.profile(job, crowd, (inputs, targets), memory=True)
    planned = {s.device: s.memory.training_bytes for s in predict(profile, crowd, plan).stages}
    with tempfile.TemporaryDirectory() as runs, cm.launch(crowd, cache_dir=cache_dir) as agents:
        data = cm.ArraySource(inputs, targets, batch)
        result = cm.train(job, agents, data, steps=steps, plan=plan, runs_dir=runs)
        table = json.loads((result.run_dir / "memory.json").read_text())
    found = []
    for device, held in table.items():
        above = held["peak_bytes"] - held["idle_bytes"]
        planned_bytes = RUNTIME_BYTES + planned[device]
        found.append(
            {
                "device": device,
                "idle_mb": round(held["idle_bytes"] / 1e6),
                "above_idle_mb": round(above / 1e6),
                "loading_above_idle_mb": round(
                    (held["loading_peak_bytes"] - held["idle_bytes"]) / 1e6
                ),
                "planned_mb": round(planned_bytes / 1e6),
                "programs_mb": round(held["predicted_bytes"] / 1e6),
                "measured_over_planned": round(above / planned_bytes, 3),
                "measured_over_programs": round(above / held["predicted_bytes"], 3),
            }
        )
    return found


def main() -> None:
    options = arguments(__doc__, repeats=MIN_REPEATS, models=",".join(cases()), steps=3)
    figures, details = [], {}
    for name in options.models.split(","):
        make = cases()[name]
        with tempfile.TemporaryDirectory() as cache_dir:
            cold = measure(make(), cache_dir, options.steps)
            runs = 1 if options.quick else -(-options.repeats // len(cold))  # an agent, a repeat
            cached = [measure(make(), cache_dir, options.steps) for _ in range(runs)]
        details[name] = {"cold": cold, "cached": cached}
        for source in ("planned", "programs"):
            ratios = [agent[f"measured_over_{source}"] for run in cached for agent in run]
            figures.append(
                figure(
                    f"{name}: measured / predicted ({source})",
                    ratios,
                    **({"at_least": 0.85, "at_most": 1.15} if source == "planned" else {}),
                )
            )
        held = [agent["above_idle_mb"] for run in cached for agent in run]
        figures.append(figure(f"{name}: above idle", held, unit="MB"))
        print(json.dumps({name: details[name]}), flush=True)
    report(
        "memory",
        "peak resident bytes of agents above idle ones, against the prediction; Adam, M=4",
        figures,
        quick=options.quick or set(details) != set(cases()),
        settings={"microbatches": MICROBATCHES, "context": CONTEXT, "vocabulary": VOCAB},
        details=details,
    )


if __name__ == "__main__":
    main()
