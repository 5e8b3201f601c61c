"""Replication policies on the frozen scenarios, in virtual time: seconds until the work is done.

Every policy meets the same movement, crashes and noise, seed by seed; `interval_scale` of each is
tuned on the tuning seeds with the same tries (`--tune 1` does it anew and prints what belongs into
src/crowdmesh_jax/simulation/tuned.py). Figures are of the reporting seeds. The floors were set
before our policy was written, of ours below the better of FTPipeHD's two central nodes.

    python benchmarks/replication_policies.py [--repeats 20] [--ablation-seeds 8] [--sumo-seeds 8]
        [--only calm,waypoint] [--keep FILE] [--tune 1] [--quick]

`--keep` appends each run to a file and takes what is there from it, so that a long try can go on.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _measure import Figure, arguments, report

from crowdmesh_jax.mobility import REPORTING_SEED
from crowdmesh_jax.mobility import scenario as frozen
from crowdmesh_jax.simulation import (
    ABLATIONS,
    INTERVAL_SCALES,
    POLICIES,
    TRIES,
    TUNING_SEEDS,
    Comparison,
    Mean,
    Outcome,
    World,
    simulate,
    summarise,
    tune,
)

FLOORS = {"calm": 15.0, "gauss_markov": 25.0, "waypoint": 35.0, "sumo": None}


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
    half = mean.half_width or 0.0
    return Figure(
        name=name,
        value=float(f"{mean.value:.4g}"),
        low=float(f"{mean.value - half:.4g}"),
        high=float(f"{mean.value + half:.4g}"),
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
    variants = [name for name in ("neighbour", "neighbour_server") if name in rows]
    neighbour = min(variants, key=lambda name: rows[name])
    figures.append(
        mean_figure(
            f"{scenario}: mobility below {neighbour}",
            below(comparison, "mobility", neighbour),
            "%",
            FLOORS[scenario],
        )
    )
    for rival in [name for name in ("next_stage", "central") if name in rows]:
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


def outcomes_of(
    scenario: str, names: Sequence[str], seeds: Sequence[int], keep: Path | None
) -> list[Outcome]:
    """Runs, but for those that an interrupted try left in `keep`, a line of JSON each."""
    lines = keep.read_text().splitlines() if keep is not None and keep.exists() else []
    done = {(o.scenario, o.policy, o.seed): o for o in (Outcome(**json.loads(x)) for x in lines)}
    found = []
    for seed in seeds:
        world = World(frozen(scenario), seed)
        for name in names:
            outcome = done.get((scenario, name, seed))
            if outcome is None:
                outcome = simulate(scenario, name, seed, world=world)
                if keep is not None:
                    with keep.open("a") as file:
                        file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            found.append(outcome)
    return found


def comparison_of(
    scenario: str, names: Sequence[str], seeds: Sequence[int], keep: Path | None
) -> Comparison:
    """All of them, seed by seed."""
    outcomes = outcomes_of(scenario, names, seeds, keep)
    return Comparison(
        scenario=scenario,
        seeds=tuple(seeds),
        rows=summarise(names, outcomes),
        outcomes=tuple(outcomes),
    )


def main() -> None:
    options: Any = arguments(
        __doc__, repeats=20, ablation_seeds=8, sumo_seeds=8, only="", tune=0, keep=""
    )
    scenarios = tuple(FLOORS) if not options.only else tuple(options.only.split(","))
    if options.tune:
        print(json.dumps(tell_tuning(scenarios, TUNING_SEEDS), indent=1))
        return
    keep = Path(options.keep) if options.keep else None
    figures: list[Figure] = []
    details: dict[str, Any] = {}
    for name in scenarios if not options.quick else scenarios[:1]:
        count = options.sumo_seeds if name == "sumo" else options.repeats
        if options.quick:
            seeds = range(REPORTING_SEED, REPORTING_SEED + 2)
            comparison = comparison_of(name, ("mobility", "neighbour"), seeds, None)
            values = below(comparison, "mobility", "neighbour")
            figures.append(mean_figure(f"{name}: mobility below neighbour", values, "%"))
            continue
        seeds = range(REPORTING_SEED, REPORTING_SEED + count)
        # Where no run gets anywhere there is nothing to take apart.
        parts_seeds = () if name == "sumo" else seeds[: options.ablation_seeds]
        names = ("mobility", "neighbour") if name == "sumo" else POLICIES
        comparison = comparison_of(name, names, seeds, keep)
        figures += figures_of(comparison, name)
        rows = list(comparison.rows)
        if parts_seeds:
            parts = comparison_of(name, ("mobility", "neighbour", *ABLATIONS), parts_seeds, keep)
            figures += ablation_figures(parts, name)
            rows += parts.rows[2:]
        details[name] = {
            "rows": [
                {
                    "policy": row.policy, "runs": row.runs, "finished": row.finished,
                    "elapsed_s": row.elapsed_s.value, "half_width_s": row.elapsed_s.half_width,
                    **{f"{cause}_s": round(s, 1) for cause, s in row.split_s.items()},
                    "losses": row.losses, "handovers": row.handovers, "waves": row.waves,
                    "restores": row.restores,
                }
                for row in rows
            ],
            "elapsed_s": {
                policy: [round(o.elapsed_s, 3) for o in comparison.outcomes if o.policy == policy]
                for policy in names
            },
        }  # fmt: skip
        print(f"{name}: done", file=sys.stderr, flush=True)
    report(
        "replication_policies",
        "virtual seconds until 3,600 s of work are done, mean and 95 % interval over seeds"
        f" from {REPORTING_SEED} on; intervals tuned on {len(TUNING_SEEDS)} other seeds with"
        f" {len(TRIES)} tries for each policy and scenario",
        figures,
        quick=options.quick,
        settings={
            "seeds": options.repeats,
            "ablation_seeds": options.ablation_seeds,
            "sumo_seeds": options.sumo_seeds,
            "interval_scales": INTERVAL_SCALES,
        },
        details=details,
    )


if __name__ == "__main__":
    main()
