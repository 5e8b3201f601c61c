"""Replication policies on the frozen scenarios, in virtual time: seconds until the work is done.

Every policy meets the same movement, crashes and noise, seed by seed; `interval_scale` of each is
tuned on the tuning seeds with the same tries (`--tune` does it anew and prints what belongs into
src/crowdmesh_jax/simulation/tuned.py). Figures are of the reporting seeds. The floors are those of
the project's task, of ours below the better of FTPipeHD's two central nodes.

    python benchmarks/replication_policies.py [--seeds 20] [--ablation-seeds 20] [--tune] [--quick]
"""

from __future__ import annotations

import json
import sys
from typing import Any

from _measure import Figure, arguments, report

from crowdmesh_jax.mobility import REPORTING_SEED
from crowdmesh_jax.mobility import scenario as frozen
from crowdmesh_jax.simulation import (
    ABLATIONS,
    POLICIES,
    TRIES,
    TUNING_SEEDS,
    Comparison,
    Mean,
    World,
    compare_policies,
    tune,
)

FLOORS = {"calm": 15.0, "gauss_markov": 25.0, "waypoint": 35.0, "sumo": None}
RIVALS = tuple(name for name in POLICIES if name not in ("mobility", "none"))


def tell_tuning(scenarios: tuple[str, ...], seeds: tuple[int, ...]) -> dict[str, Any]:
    """Mean seconds of each try; prints the table for tuned.py."""
    found: dict[str, Any] = {}
    for name in scenarios:
        worlds = [World(frozen(name), seed) for seed in seeds]
        found[name] = {}
        for policy in POLICIES:
            if policy == "none":
                continue  # it has no interval
            found[name][policy] = tune(name, policy, worlds)
            best = min(found[name][policy], key=lambda s, t=found[name][policy]: (t[s], -s))
            means = ", ".join(f"{s:g}: {v:.0f}" for s, v in found[name][policy].items())
            print(f"{name} {policy}: {best:g}   ({means})", flush=True)
    return found


def below(comparison: Comparison, ours: str, theirs: str) -> list[float]:
    """Per cent by which one is below the other, seed by seed."""
    by_seed = {
        name: {o.seed: o.elapsed_s for o in comparison.outcomes if o.policy == name}
        for name in (ours, theirs)
    }
    return [100 * (1 - by_seed[ours][s] / by_seed[theirs][s]) for s in comparison.seeds]


def mean_figure(name: str, values: list[float], unit: str, at_least: float | None = None) -> Figure:
    """A mean with its 95 % interval as the range."""
    mean = Mean.of(values)
    return Figure(
        name=name,
        value=float(f"{mean.value:.4g}"),
        low=float(f"{mean.value - mean.half_width:.4g}"),
        high=float(f"{mean.value + mean.half_width:.4g}"),
        repeats=len(values),
        unit=unit,
        at_least=at_least,
    )


def figures_of(comparison: Comparison, scenario: str) -> list[Figure]:
    """Times of all policies; ours below the best variant of each rival."""
    figures = []
    for row in comparison.rows:
        times = [o.elapsed_s for o in comparison.outcomes if o.policy == row.policy]
        given_up = row.runs - row.finished
        note = f" ({given_up} of {row.runs} given up)" if given_up else ""
        figures.append(mean_figure(f"{scenario}: {row.policy}{note}", times, "s"))
    rows = {row.policy: row.elapsed_s.value for row in comparison.rows}
    neighbour = min(("neighbour", "neighbour_server"), key=lambda name: rows[name])
    figures.append(
        mean_figure(
            f"{scenario}: mobility below {neighbour}",
            below(comparison, "mobility", neighbour),
            "%",
            FLOORS[scenario],
        )
    )
    for rival in ("next_stage", "central"):
        values = below(comparison, "mobility", rival)
        figures.append(mean_figure(f"{scenario}: mobility below {rival}", values, "%"))
    return figures


def ablation_figures(comparison: Comparison, scenario: str) -> list[Figure]:
    """What each part brings: the time without it, over the time with it."""
    figures = []
    for name in ABLATIONS:
        base = "neighbour" if name.startswith("neighbour") else "mobility"
        values = [-v for v in below(comparison, name, base)]
        figures.append(mean_figure(f"{scenario}: {name}, longer than {base}", values, "%"))
    return figures


def main() -> None:
    options: Any = arguments(__doc__, repeats=20, ablation_seeds=20, only="", tune=0)
    scenarios = tuple(FLOORS) if not options.only else tuple(options.only.split(","))
    if options.tune:
        print(json.dumps(tell_tuning(scenarios, TUNING_SEEDS), indent=1))
        return
    count = 2 if options.quick else options.repeats
    more = 1 if options.quick else min(count, options.ablation_seeds)
    seeds = range(REPORTING_SEED, REPORTING_SEED + count)
    figures: list[Figure] = []
    details: dict[str, Any] = {}
    for name in scenarios if not options.quick else scenarios[:1]:
        names = ("mobility", "neighbour") if options.quick else POLICIES
        if options.quick:
            comparison = compare_policies(name, names, seeds)
            values = below(comparison, *names)
            figures.append(mean_figure(f"{name}: mobility below neighbour", values, "%"))
            continue
        comparison = compare_policies(name, names, seeds)
        figures += figures_of(comparison, name)
        parts = compare_policies(name, ("mobility", "neighbour", *ABLATIONS), seeds[:more])
        figures += ablation_figures(parts, name)
        details[name] = {
            "rows": [
                {
                    "policy": row.policy, "runs": row.runs, "finished": row.finished,
                    "elapsed_s": row.elapsed_s.value, "half_width_s": row.elapsed_s.half_width,
                    **{f"{cause}_s": round(s, 1) for cause, s in row.split_s.items()},
                    "losses": row.losses, "handovers": row.handovers, "waves": row.waves,
                    "restores": row.restores,
                }
                for row in (*comparison.rows, *parts.rows[2:])
            ],
            "elapsed_s": {
                policy: [round(o.elapsed_s, 3) for o in comparison.outcomes if o.policy == policy]
                for policy in names
            },
        }  # fmt: skip
        print(f"{name}: done", file=sys.stderr, flush=True)
    report(
        "replication_policies",
        f"virtual seconds until 3,600 s of work are done, mean and 95 % interval of {count} seeds"
        f" from {REPORTING_SEED} on (parts left out: {more} seeds), intervals tuned on"
        f" {len(TUNING_SEEDS)} others with {len(TRIES)} tries for each policy and scenario",
        figures,
        quick=options.quick,
        settings={"seeds": count, "ablation_seeds": more},
        details=details,
    )


if __name__ == "__main__":
    main()
