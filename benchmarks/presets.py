"""Measured pipelines on the presets' crowds: the step of real processes beside its prediction.

Per preset of `cm.crowds` two crowds of four devices, with the preset's links (shaped in the
transport) and its unequal speeds (emulated; the slowest at least a fifth of the fastest: dividing
CPU seconds by less makes ten of each that a cold cache costs). Not `vehicular`, where a step of
these nets takes minutes. Plans: the ILP's under 1F1B on one crowd, solver "eager" on the other,
each over at least three devices, for a CNN and a transformer. Predictions are made before the run,
from stage times that each device measured alone.

    python benchmarks/presets.py [--presets lab_shelf,campus] [--repeats 7] [--quick]
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
from typing import Any

os.environ["NPROC"] = "1"  # XLA's threads, as in agents

from _measure import Figure, arguments, figure, report
from _pipelines import step_times
from _workloads import workload

import crowdmesh_jax as cm
from crowdmesh_jax.core.crowd import LOCAL_FLOPS_PER_S, LOCAL_MEMORY_BYTES

DEVICES, LEAST_STAGES = 4, 3
SLOWEST = 0.2
PRESETS = ("lab_shelf", "campus", "two_cells")
PLANS = (("1f1b", "ilp"), ("eager", "eager"))
"""Schedule and solver, by seed."""
WITHIN = 0.08


def emulated(preset: str, seed: int) -> cm.Crowd:
    """The preset's crowd with speeds that this machine can emulate, links as they are."""
    crowd = cm.crowds.preset(preset, DEVICES, seed=seed)
    fastest = max(device.flops_per_s for device in crowd.devices)
    devices = []
    for device in crowd.devices:
        speed = max(SLOWEST, device.flops_per_s / fastest)
        devices.append(
            dataclasses.replace(
                device,
                speed=speed,
                flops_per_s=LOCAL_FLOPS_PER_S * speed,
                memory_bytes=LOCAL_MEMORY_BYTES,
            )
        )
    return dataclasses.replace(crowd, devices=tuple(devices))


def main() -> None:
    options = arguments(__doc__, repeats=7, presets=",".join(PRESETS))
    works = [workload(net, quick=options.quick) for net in ("cnn", "transformer")]
    presets = options.presets.split(",")[: 1 if options.quick else None]
    rows: list[Figure] = []
    details: dict[str, dict[str, Any]] = {}
    for preset in presets:
        for seed, (schedule, solver) in enumerate(PLANS[: 1 if options.quick else None]):
            crowd = emulated(preset, seed)
            with tempfile.TemporaryDirectory() as runs_dir, cm.launch(crowd) as crew:
                for work in works:
                    profile = cm.profile(work.job, crew.crowd, work.data.batch(0))
                    plan = cm.partition(
                        profile, crew.crowd, solver=solver, schedule=schedule,
                        min_stages=LEAST_STAGES,
                    )  # fmt: skip
                    steps = step_times(crew, work, plan, repeats=options.repeats, runs_dir=runs_dir)
                    row = figure(
                        f"{preset}, {work.name}, {solver} ({len(plan.stages)} stages)",
                        [s / steps.predicted_s for s in steps.seconds],
                    )
                    print(row.line(), flush=True)
                    rows.append(row)
                    details[row.name] = {
                        "seed": seed,
                        "predicted_s": steps.predicted_s,
                        "explained_s": steps.explained_s,
                        "measured_s": statistics.median(steps.seconds),
                        "stages": [
                            [stage.device, stage.first_layer, stage.last_layer]
                            for stage in plan.stages
                        ],
                    }
    errors = [abs(row.value - 1) for row in rows]
    left = [abs(row["measured_s"] / row["explained_s"] - 1) for row in details.values()]
    report(
        "presets",
        "measured over predicted step seconds on the presets' crowds, M=8",
        [
            figure("|measured / predicted - 1|, median of all plans", errors, at_most=WITHIN),
            figure("the same, with the seconds that ops took in the run", left),
            *rows,
        ],
        quick=options.quick,
        settings={"devices": DEVICES, "slowest": SLOWEST, "presets": presets},
        details=details,
    )


if __name__ == "__main__":
    main()
