"""What one core makes of a net's arithmetic: Gflop/s of the stage program beside plain products.

One stage with the whole net, one microbatch, forward and backward, compiled as agents compile it,
on one core. The limit is a large float32 product by numpy's BLAS. The same program with other
choices of XLA's takes turns with it: what could be had by asking the compiler for more.

    python benchmarks/kernels.py [--repeats 7] [--quick]
"""

from __future__ import annotations

import os
import time
from typing import Any

if __name__ == "__main__":  # one core and one thread; before numpy and jax count them
    os.environ.update(NPROC="1", OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import numpy as np
from _measure import arguments, figure, ratio, report
from _workloads import WORKLOADS, workload

import crowdmesh_jax as cm
from crowdmesh_jax.execution import Pace, StageWorker
from crowdmesh_jax.export import build_bundles, initial_arrays
from crowdmesh_jax.programs import load

SIDE = 1024
"""Of the matrices that BLAS multiplies."""
USUAL = "as agents compile"
CHOICES: dict[str, dict[str, Any]] = {
    USUAL: {},
    "XNNPACK": {"xla_cpu_use_xnnpack": True},
    "oneDNN": {"xla_cpu_use_onednn": True},
    "YNNPACK": {
        "xla_cpu_experimental_ynn_fusion_type": (
            "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
        )
    },
    "fast math": {"xla_cpu_enable_fast_math": True},
    "without fusion emitters": {"xla_cpu_use_fusion_emitters": False},
}


def blas_flops_per_s() -> float:
    """One large product, best of three."""
    left = np.ones((SIDE, SIDE), np.float32)
    took_s = []
    for _ in range(3):
        start_s = time.perf_counter()
        left @ left
        took_s.append(time.perf_counter() - start_s)
    return 2.0 * SIDE**3 / min(took_s)


def workers(job: cm.TrainingJob, specs: tuple[Any, Any]) -> dict[str, StageWorker]:
    """The whole net as one stage, once for each choice."""
    plan = cm.PipelinePlan.even(len(job.model.layers), ["core"], microbatches=job.microbatches)
    bundle = build_bundles(job, plan, *specs)[0]
    arrays = initial_arrays(job, specs[0])
    usual, made = dict(load.COMPILER_OPTIONS), {}
    for name, options in CHOICES.items():
        load.COMPILER_OPTIONS = {**usual, **options}
        stage = load.load_stage(bundle)
        stage.compile(leave_out=("eval_forward",))
        made[name] = StageWorker(stage)
        made[name].install(dict(arrays), 0)
    load.COMPILER_OPTIONS = usual
    return made


def main() -> None:
    options = arguments(__doc__)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    figures, details = [], {}
    for net in WORKLOADS:
        work = workload(net, quick=options.quick)
        batch = work.data.batch(0)
        layers = cm.profile(work.job, cm.Crowd.local((1.0,)), batch).layers
        flops = sum(layer.forward_flops + layer.backward_flops for layer in layers)
        stages = workers(work.job, work.job.microbatch_specs(batch))
        seconds: dict[str, list[float]] = {name: [] for name in stages}
        blas: list[float] = []
        for _ in range(options.repeats):
            blas.append(blas_flops_per_s())
            for name, stage in stages.items():
                seconds[name].append(stage.measure(Pace(1.0), 3)["loss_backward"])
        usual = [flops / s for s in seconds[USUAL]]
        figures += [
            figure(f"{net}: XLA", [rate / 1e9 for rate in usual], unit="Gflop/s"),
            ratio(f"{net}: XLA / a large product by BLAS", usual, blas),
        ]
        figures += [
            ratio(f"{net}, seconds: {name} / {USUAL}", seconds[name], seconds[USUAL])
            for name in stages
            if name != USUAL
        ]
        details[net] = {"flops": flops, "blas_flops_per_s": blas, "seconds": seconds}
    report(
        "kernels",
        "forward and backward of one microbatch, the whole net as one stage, one core",
        figures,
        quick=options.quick,
        settings={"choices": CHOICES, "side": SIDE},
        details=details,
    )


if __name__ == "__main__":
    main()
