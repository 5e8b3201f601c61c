"""The repair changes as little as can be, against every layout there is."""

from __future__ import annotations

from itertools import combinations

import pytest
from hand_problems import any_problem

from crowdmesh_jax.core import PipelinePlan, Stage
from crowdmesh_jax.solvers import plan_faults
from crowdmesh_jax.solvers.partition.baselines.layout import Limits, Unit, repair


def cheapest(problem, units) -> tuple[int, int, int] | None:
    """Units that leave, stages more or less, layers moved of the nearest layout, by trying all."""
    best = None
    layers = problem.num_layers
    for count in range(1, min(len(units), layers) + 1):
        for chosen in combinations(range(len(units)), count):
            for inner in combinations(range(1, layers), count - 1):
                ends = (*inner, layers)
                plan = PipelinePlan(
                    stages=tuple(
                        Stage(
                            device=units[i].devices[0],
                            first_layer=first,
                            last_layer=end - 1,
                            recompute=problem.recompute != "never",
                        )
                        for i, first, end in zip(chosen, (0, *inner), ends, strict=True)
                    ),
                    num_layers=layers,
                    microbatches=problem.microbatches,
                    schedule=problem.schedule,
                )
                if plan_faults(problem, plan):
                    continue
                gone = sum(unit.wanted and i not in chosen for i, unit in enumerate(units))
                stages = abs(count - sum(unit.wanted for unit in units))
                moved = sum(
                    abs(units[i].wanted_end - end)
                    for i, end in zip(chosen, ends, strict=True)
                    if units[i].wanted
                )
                if best is None or (gone, stages, moved) < best:
                    best = gone, stages, moved
    return best


@pytest.mark.parametrize("start", range(0, 800, 200))
def test_no_layout_that_fits_is_nearer_than_the_repair(start):
    repaired = 0
    for seed in range(start, start + 200):
        problem = any_problem(seed, max_layers=6, max_devices=4)
        order = problem.allowed_devices
        # The rule gives one of them no layers, most times.
        kept = [device for i, device in enumerate(order) if i != seed % 5] or list(order)
        kept = kept[: problem.num_layers]
        units = [
            Unit((d,), problem.num_layers * (kept.index(d) + 1) // len(kept))
            if d in kept
            else Unit((d,), problem.num_layers, wanted=False)
            for d in order
        ]
        found, best = repair(Limits(problem), units), cheapest(problem, units)
        assert (found is None) == (best is None), seed
        if found is None or best is None:
            continue
        layout, words = found
        used = {unit for unit, _ in layout}
        gone = sum(unit.wanted and unit not in used for unit in units)
        stages = abs(len(layout) - sum(unit.wanted for unit in units))
        moved = sum(abs(unit.wanted_end - end) for unit, end in layout if unit.wanted)
        assert (gone, stages, moved) == best, seed
        assert bool(words) == (best != (0, 0, 0)), seed
        repaired += best != (0, 0, 0)
    assert repaired > 2
