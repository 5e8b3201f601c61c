"""How long until the first committed step, and what tracing, exporting and compiling take.

Start-up: `crowdmesh train` as a user types it, again and again; the first time fills the compile
cache and does not count. Programs: ResNet-18 and MobileNetV2 for small images in 3 stages, each
time in a new process, as a planner and a device do it, with an empty cache and with a full one.

    python benchmarks/startup.py [--repeats 7] [--model lenet]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from _measure import Figure, arguments, figure, report

STEPS = 2
NETS = {"resnet18": (8, 32), "mobilenet_v2": (8, 32)}
"""Rows of a microbatch, side of an image."""
STAGES = 3


def main() -> None:
    options = arguments(__doc__, model="lenet")
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "XDG_CACHE_HOME": home}
        runs = [start(options.model, environment, home) for _ in range(options.repeats + 1)]
        first, cached = runs[0], runs[1:]
        figures = [
            figure("start to first step, cached", _of(cached, "first step"), unit="s", at_most=10.0)
        ]
        figures += [
            figure(f"of it: {name}", [run["spans"][name] for run in cached], unit="s")
            for name in cached[0]["spans"]
        ]
        nets = list(NETS)[:1] if options.quick else list(NETS)
        for net in nets:
            figures += programs(net, options.repeats, environment)
    report(
        "startup",
        f"crowdmesh train {options.model} over 4 emulated devices; 3 stages of each net",
        figures,
        quick=options.quick,
        settings={"model": options.model, "steps": STEPS, "nets": NETS, "stages": STAGES},
        details={"first": first, "cached": cached},
    )


def _of(runs: list[dict[str, Any]], key: str) -> list[float]:
    return [run[key] for run in runs]


def start(model: str, environment: dict[str, str], folder: str) -> dict[str, Any]:
    """Seconds from the command to the first step's line, and between the lines before it."""
    command = [sys.executable, "-m", "crowdmesh_jax.cli", "train", model, "--json"]
    command += ["--steps", str(STEPS), "--runs-dir", os.path.join(folder, "runs")]
    begin_s = last_s = time.perf_counter()
    spans: dict[str, float] = {}
    before = "imports, profile, plan"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            now_s = time.perf_counter()
            event = json.loads(line)
            if event["event"] not in ("plan", "phase", "step"):
                continue
            spans[before] = spans.get(before, 0.0) + now_s - last_s
            last_s = now_s
            if event["event"] == "step":
                break
            before = event.get("phase", "read data")
        taken_s = last_s - begin_s
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return {"first step": taken_s, "spans": spans}


def programs(net: str, repeats: int, environment: dict[str, str]) -> list[Figure]:
    """Trace and export; then compile all programs of the stages, cold and cached."""
    exports, colds, caches = [], [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            child = {**environment, "JAX_COMPILATION_CACHE_DIR": os.path.join(folder, "compiled")}
            exports.append(_child("export", net, folder, child))
            colds.append(_child("compile", net, folder, child))
            caches.append(_child("compile", net, folder, child))
    rows = (
        ("trace and export", exports, "export"),
        ("read and check programs", colds, "load"),
        ("compile, cold", colds, "compile"),
        ("compile, cached", caches, "compile"),
    )
    return [
        figure(f"{net}, {STAGES} stages: {name}", _of(runs, key), unit="s")
        for name, runs, key in rows
    ]


def _child(what: str, net: str, folder: str, environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", what, net, folder]
    out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def child(what: str, net: str, folder: str) -> None:
    """Runs in a process of its own; prints seconds as JSON."""
    import pickle
    from pathlib import Path

    import jax

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    kept = Path(folder) / "bundles"  # our own, a moment old
    seconds = {}
    if what == "export":
        import numpy as np
        import optax

        import crowdmesh_jax as cm
        from crowdmesh_jax.export import build_bundles

        rows, side = NETS[net]
        model = getattr(cm.zoo, net)(classes=10, small_inputs=True)
        job = cm.TrainingJob(model, cm.losses.softmax_cross_entropy, optax.adam(1e-3), 2 * rows, 2)
        batch = (
            np.zeros((2 * rows, side, side, 3), np.float32),
            np.zeros(2 * rows, np.int32),
        )
        devices = [f"d{index}" for index in range(STAGES)]
        plan = cm.PipelinePlan.even(len(model.layers), devices, microbatches=2)
        start_s = time.perf_counter()
        bundles = build_bundles(job, plan, *job.microbatch_specs(batch))
        seconds["export"] = time.perf_counter() - start_s
        kept.write_bytes(pickle.dumps(bundles))
    else:
        from crowdmesh_jax.programs import load_stage

        bundles = pickle.loads(kept.read_bytes())
        start_s = time.perf_counter()
        stages = [load_stage(bundle) for bundle in bundles]
        seconds["load"] = time.perf_counter() - start_s
        start_s = time.perf_counter()
        for stage in stages:
            stage.compile()
        seconds["compile"] = time.perf_counter() - start_s
    print(json.dumps(seconds))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main()
