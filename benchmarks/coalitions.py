"""Coalitions: how long forming them takes, and how good they are beside those of other solvers.

Comparison: for each preset of `cm.crowds` (40 devices) and each seed, every baseline and our own
solver get the same profile, links, memory and data, and the same partition solver rates all
structures. Two measures: the mean round (weighted by rows) and the slowest round. Ratios are ours
over the best baseline's, chosen anew for each instance and for each measure, of all baselines under
two powers of the potential (the default, and that of our own solver). Four forms of ours:

    alone    switches only, default potential: no swaps, merges or splits
    default  what `cm.form_coalitions` does
    rounds   power 16, the equilibrium with the best rounds; where it is worse than a baseline on a
             measure, once more with all baselines' structures as further starts ("repaired")
    both     of `default` and `rounds` the one with the shorter slowest round

No structure's slowest round beats the best coalition around a device with much data. `floor` is
that bound as far as a local search around each device finds it.

Times: a crowd of 10,000 by closed forms, one of 200 by plans; wall seconds, all in one process.

    python benchmarks/coalitions.py [--seeds 50] [--presets campus,vehicular] [--minutes 60]
                                    [--partial FILE] [--quick]
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optax
from _measure import MIN_REPEATS, Figure, Sample, arguments, figure, report, walls

import crowdmesh_jax as cm
from crowdmesh_jax.core import ModelProfile
from crowdmesh_jax.solvers import CoalitionProblem, HedonicSolver
from crowdmesh_jax.solvers.coalition import CoalitionResult, make_coalition_solver
from crowdmesh_jax.solvers.coalition.game import Game

MICROBATCHES = ROWS = 8
DEVICES = 40
POWER = 16.0
"""Of the form `rounds`: the slowest coalition counts for nearly all."""
BASELINES = (
    "grand", "singletons", "random", "kmeans", "greedy", "data_only", "latency_and_data",
)  # fmt: skip
FORMS = ("alone", "default", "rounds", "both")
PRESETS = ("campus", "two_cells", "vehicular", "lab_shelf")


def profiled() -> ModelProfile:
    """MobileNetV2 by its flops and bytes; a device's seconds follow from its flops per second."""
    batch = ROWS * MICROBATCHES
    job = cm.TrainingJob(
        cm.zoo.mobilenet_v2(classes=1000),
        cm.losses.softmax_cross_entropy,
        optax.adam(1e-3),
        batch,
        MICROBATCHES,
    )
    example = np.zeros((batch, 224, 224, 3), np.float32), np.zeros(batch, np.int32)
    return cm.profile(job, cm.Crowd.local((1.0,)), example)


def rounds_of(result: CoalitionResult) -> dict[str, Any]:
    """What is kept of a result."""
    return {
        "mean_s": result.mean_round_s,
        "slowest_s": result.slowest_round_s,
        "coalitions": len(result.structure),
        "unheld": len(result.unheld),
        "stable": result.certificate.is_nash_stable and not result.certificate.is_sampled,
        "seconds": result.solve_s,
    }


def compare(profile: ModelProfile, crowd: cm.Crowd) -> dict[str, Any]:
    """All structures of one instance, by both measures."""
    usual = CoalitionProblem(profile=profile, crowd=crowd)
    steep = CoalitionProblem(profile=profile, crowd=crowd, power=POWER)
    found = {
        f"{name}, p={problem.power:g}": rounds_of(make_coalition_solver(name).form(problem))
        for name in BASELINES
        for problem in (usual, steep)
    }
    ours = {
        "alone": rounds_of(HedonicSolver(repair=False).form(usual)),
        "default": rounds_of(HedonicSolver().form(usual)),
        "rounds": rounds_of(HedonicSolver(choose="rounds").form(steep)),
    }
    row = {"baselines": found, **ours, "floor_s": floor_s(Game(usual)), "is_repaired": False}
    if any(against(row, "rounds", measure) > 1 + 1e-9 for measure in ("mean_s", "slowest_s")):
        solver = HedonicSolver(rivals=BASELINES, choose="rounds")
        row |= {"rounds": rounds_of(solver.form(steep)), "is_repaired": True}
    return row


def floor_s(game: Game) -> float:
    """The slowest over all devices of the best round that a coalition with the device can have.

    The best is sought by adding, removing and exchanging members while that helps: an upper bound
    on the true floor of that device, exact as far as the search goes.
    """
    everyone = range(game.count)

    def round_s(mask: int) -> float:
        entry = game.entry(mask)
        return math.inf if entry.rated.missing > 0 else entry.round_s

    worst_s = 0.0
    for device in everyone:
        now, best_s = 1 << device, round_s(1 << device)
        while True:
            others = [other for other in everyone if not now >> other & 1]
            inside = [other for other in everyone if now >> other & 1 and other != device]
            near = [now | 1 << other for other in others]
            near += [now ^ 1 << other for other in inside]
            near += [now ^ 1 << a | 1 << b for a in inside for b in others]
            game.rate(near)
            least_s, chosen = min((round_s(mask), mask) for mask in near)
            if least_s >= best_s:
                break
            best_s, now = least_s, chosen
        worst_s = max(worst_s, best_s)
    return worst_s


def scale(profile: ModelProfile, devices: int, **asked: Any) -> tuple[Sample, bool]:
    """Seconds that forming takes, and whether its certificate is clean."""
    crowd = cm.crowds.campus(devices, seed=0)
    cpu_s, started_s = time.process_time(), time.perf_counter()
    result = cm.form_coalitions(profile, crowd, **asked)
    wall_s = time.perf_counter() - started_s
    clean = result.certificate.is_nash_stable
    return Sample(wall_s, time.process_time() - cpu_s), clean


def scales(profile: ModelProfile, repeats: int, *, quick: bool) -> Iterator[Figure]:
    """Seconds at scale."""
    for words, devices, asked, at_most in (
        ("by closed forms", 10_000, {"value": "closed_form", "max_size": 12}, 10.0),
        ("by plans", 200, {}, 20.0),
    ):
        many = devices // 20 if quick else devices
        runs = [scale(profile, many, **asked) for _ in range(repeats)]
        samples = [sample for sample, _ in runs]
        yield figure(f"{many} devices {words}", walls(samples), unit="s", at_most=at_most)
        yield figure(f"{many} devices {words}: CPU", [s.cpu_s for s in samples], unit="s")
        yield figure(
            f"{many} devices {words}: certificate is clean (1: yes)",
            [float(clean) for _, clean in runs],
            unit="", at_least=1.0,
        )  # fmt: skip


def main() -> None:
    options = arguments(
        __doc__,
        repeats=MIN_REPEATS,
        seeds=50,
        presets=",".join(PRESETS),
        minutes=0.0,
        partial="",
        devices=DEVICES,
    )
    presets = options.presets.split(",")
    seeds, devices = (1, 10) if options.quick else (options.seeds, options.devices)
    if options.quick:
        presets = presets[:1]
    profile = profiled()
    rows = read_rows(options.partial)
    done = {(row["preset"], row["seed"]) for row in rows}
    started_s = time.monotonic()
    for seed in range(seeds):
        if options.minutes and time.monotonic() - started_s > 60 * options.minutes:
            break
        for preset in presets:
            if (preset, seed) in done:
                continue
            crowd = cm.crowds.preset(preset, devices, seed=seed)
            rows.append({"preset": preset, "seed": seed, **compare(profile, crowd)})
            print(told(with_both(rows[-1])), flush=True)
            if options.partial:
                with Path(options.partial).open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    seeds = min(sum(row["preset"] == preset for row in rows) for preset in presets)
    found = list(figures([with_both(row) for row in rows]))

    def write(more: list[Figure]) -> None:
        report(
            "coalitions",
            f"rounds of {devices} devices, MobileNetV2, M = {MICROBATCHES}, ours over the best"
            f" baseline, {seeds} seeds a preset; seconds of forming",
            [*found, *more],
            quick=options.quick,
            settings={"devices": devices, "power of rounds": POWER, "seeds": seeds},
            details={"instances": rows},
        )

    write([])  # what took long is kept before the rest is taken
    write(list(scales(profile, options.repeats, quick=options.quick)))


def read_rows(path: str) -> list[dict[str, Any]]:
    """Instances that an earlier run of this script has kept."""
    if not path or not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def with_both(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the form that needs no solving of its own."""
    both = min((row["rounds"], row["default"]), key=lambda each: each["slowest_s"])
    return {**row, "both": both}


def told(row: dict[str, Any]) -> str:
    """An instance in one line."""
    parts = [
        f"{form} {against(row, form, 'mean_s'):.3f} {against(row, form, 'slowest_s'):.3f}"
        for form in FORMS
    ]
    return f"{row['preset']} {row['seed']}: " + ", ".join(parts)


def against(row: dict[str, Any], form: str, measure: str) -> float:
    """Ours over the best baseline by this measure."""
    return row[form][measure] / min(each[measure] for each in row["baselines"].values())


def against_one(row: dict[str, Any], form: str, measure: str) -> float:
    """Ours over the one baseline that is best by both measures together."""
    one = min(row["baselines"].values(), key=lambda each: each["mean_s"] * each["slowest_s"])
    return row[form][measure] / one[measure]


def figures(rows: list[dict[str, Any]]) -> Iterator[Figure]:
    """The claims, from the rounds of each instance."""
    named = [row["preset"] for row in rows]
    # A preset has figures of its own where there are seeds enough; all instances are in `details`.
    presets = ("", *(p for p in dict.fromkeys(named) if named.count(p) >= MIN_REPEATS))
    for form in reversed(FORMS):
        for measure, words, bound in (
            ("mean_s", "mean round", 0.85), ("slowest_s", "slowest round", 0.8),
        ):  # fmt: skip
            for preset in presets:
                of = [row for row in rows if preset in ("", row["preset"])]
                asked = {"at_most": bound} if form == "both" and not preset else {}
                ratios = [against(row, form, measure) for row in of]
                yield figure(f"{form} / best baseline: {words}, {preset or 'all'}", ratios, **asked)
            worse = [float(against(row, form, measure) > 1 + 1e-9) for row in rows]
            yield share(f"{form} is worse than the best baseline: {words}", worse, form)
            ratios = [against_one(row, form, measure) for row in rows]
            yield figure(f"{form} / best single baseline: {words}", ratios)
        yield share(
            f"{form} is not Nash-stable", [float(not row[form]["stable"]) for row in rows], form
        )
    best_s = [min(each["slowest_s"] for each in row["baselines"].values()) for row in rows]
    floors = [row["floor_s"] / best for row, best in zip(rows, best_s, strict=True)]
    yield figure("floor / best baseline: slowest round, all", floors)
    for preset in presets[1:]:
        of = [floor for floor, row in zip(floors, rows, strict=True) if row["preset"] == preset]
        yield figure(f"floor / best baseline: slowest round, {preset}", of)
    yield share("rounds was repaired", [float(row["is_repaired"]) for row in rows], "")
    near = [row["rounds"]["slowest_s"] <= 1.005 * row["floor_s"] for row in rows]
    yield share("rounds is within 0.5 % of the floor", [float(n) for n in near], "")
    free = [row for row, floor in zip(rows, floors, strict=True) if floor <= 0.8]
    if len(free) >= MIN_REPEATS:
        yield figure(
            "both / best baseline: slowest round, where the floor leaves 20 %",
            [against(row, "both", "slowest_s") for row in free],
        )


def share(name: str, values: list[float], form: str) -> Figure:
    """Percent of instances, each of which counts: no median."""
    percent = float(f"{100 * sum(values) / len(values):.4g}")
    return Figure(
        name=name, value=percent, low=percent, high=percent, repeats=len(values), unit="%",
        at_most=0.0 if form == "both" else None,
    )  # fmt: skip


if __name__ == "__main__":
    main()
