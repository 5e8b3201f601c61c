"""What cutting a model costs: S stage programs in one process against one, the same microbatches.

All stages of a plan run one after another in this process, on one core: a step of S stages does
the work of a step of one, and what it takes longer is the price of the cut (boundary arrays,
more calls, fusions that end at the cut). Ratios are of CPU seconds, which the wall time of other
processes does not enter.

    python benchmarks/stage_split.py [--repeats 9] [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from _measure import arguments, cpu_per_wall, figure, interleave, like_an_agent, ratio, report

if __name__ == "__main__":
    like_an_agent()

import jax

jax.config.update("jax_cpu_enable_async_dispatch", False)  # as agents do

from _workloads import MICROBATCHES, Workload, workload  # noqa: E402

import crowdmesh_jax as cm  # noqa: E402
from crowdmesh_jax.execution import StageWorker  # noqa: E402
from crowdmesh_jax.export import build_bundles, initial_arrays  # noqa: E402
from crowdmesh_jax.programs import load_stage  # noqa: E402

NETS = ("cnn", "transformer")
BOUNDS = {2: 1.10, 4: 1.20}


def stepper(work: Workload, stages: int) -> Callable[[], None]:
    """One training step by `stages` stage programs, compiled, as agents run them."""
    job = work.job
    inputs_spec, targets_spec = job.microbatch_specs(work.data.batch(0))
    plan = cm.PipelinePlan.even(
        len(job.model.layers), [f"stage{s}" for s in range(stages)], microbatches=MICROBATCHES
    )
    arrays = initial_arrays(job, inputs_spec)
    workers = []
    for bundle in build_bundles(job, plan, inputs_spec, targets_spec):
        loaded = load_stage(bundle)
        loaded.compile()
        workers.append(StageWorker(loaded))
        workers[-1].install(arrays, 0)
    rows = job.microbatch_size
    x = [work.inputs[m * rows : (m + 1) * rows] for m in range(MICROBATCHES)]
    targets = [[work.targets[m * rows : (m + 1) * rows]] for m in range(MICROBATCHES)]

    def step() -> None:
        workers[-1].load_targets(targets)
        for microbatch in range(MICROBATCHES):
            carry: list[Any] = [x[microbatch]]
            for worker in workers:
                carry = worker.forward(microbatch, carry)
            for worker in reversed(workers):
                carry = worker.backward(microbatch, carry)
        for worker in workers:
            worker.finish_step()
            worker.apply({})

    return step


def main() -> None:
    options = arguments(__doc__, repeats=9)
    figures = []
    for net in NETS:
        work = workload(net, quick=options.quick)
        counts = (1, *BOUNDS)
        works = {str(stages): stepper(work, stages) for stages in counts}
        samples = interleave(works, repeats=options.repeats)
        cpu_s = {name: [s.cpu_s for s in row] for name, row in samples.items()}
        for stages, bound in BOUNDS.items():
            name = f"{net}: {stages} stages / 1"
            figures.append(ratio(name, cpu_s[str(stages)], cpu_s["1"], at_most=bound))
        figures.append(figure(f"{net}: step of 1 stage", [1e3 * s for s in cpu_s["1"]], unit="ms"))
        figures.append(cpu_per_wall(f"{net}: 1 stage", samples["1"]))
    report(
        "stage_split",
        "CPU seconds of a training step by S stage programs in one process on one core, M=8, SGD",
        figures,
        quick=options.quick,
        settings={"microbatches": MICROBATCHES, "rows a microbatch": "cnn 8, transformer 8"},
    )


if __name__ == "__main__":
    main()
