"""`crowdmesh coalitions`: who would train one copy together, and how stable that is."""

from __future__ import annotations

import argparse
from pathlib import Path

from .console import print_json, print_table
from .inputs import (
    add_crowd_arguments,
    add_job_arguments,
    add_measure_argument,
    example_batch,
    find_model,
    make_job,
    profile_of,
    read_crowd,
)

HELP = "group a crowd into coalitions that train one copy each; nothing is trained"
EXAMPLES = """\
examples:
  crowdmesh crowd campus -o campus.toml
  crowdmesh coalitions --crowd campus.toml --model mobilenet_v2 --max-size 8
  crowdmesh coalitions --crowd campus.toml --solver kmeans
  crowdmesh coalitions --crowd campus.toml --compare all     every solver, by the same measure
  crowdmesh coalitions --crowd campus.toml --svg map.svg     who is with whom, where they stand
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The crowd, the model, the job and the solver."""
    parser.add_argument("--model", default="lenet", metavar="NAME", help="see `crowdmesh models`")
    add_crowd_arguments(parser)
    add_job_arguments(parser)
    add_measure_argument(parser)
    game = parser.add_argument_group("coalitions")
    game.add_argument("--solver", default="hedonic", metavar="NAME", help="hedonic, greedy, ...")
    game.add_argument("--max-size", type=int, metavar="N", help="most members of a coalition")
    game.add_argument("--kappa", type=float, default=0.5, help="weight of data imbalance")
    game.add_argument(
        "--amounts", choices=("rows", "equal"),
        help="what a round's work is; rows where the crowd has data, else equal",
    )  # fmt: skip
    game.add_argument(
        "--compare", metavar="NAMES", help="other solvers, separated by commas, or 'all'"
    )
    game.add_argument("--svg", metavar="FILE", help="draw devices by place and coalition")
    game.add_argument(
        "--value", choices=("partition", "closed_form"), default="partition",
        help="what rates a coalition: a plan for it, or sums over its members (large crowds)",
    )  # fmt: skip
    game.add_argument(
        "--power", type=float, default=4.0,
        help="1 looks at the mean round, 16 at little but the slowest",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Profiles, forms, explains."""
    crowd = read_crowd(arguments)
    entry = find_model(arguments.model)
    job = make_job(entry, arguments)
    from ..errors import InvalidValueError
    from ..solvers import CoalitionProblem, coalition_solvers
    from ..solvers.coalition import make_coalition_solver

    names = [arguments.solver]
    if arguments.compare:
        wanted = arguments.compare.split(",")
        names += list(coalition_solvers()) if wanted == ["all"] else wanted
    names = list(dict.fromkeys(names))
    made = {name: make_coalition_solver(name, seed=arguments.seed) for name in names}
    profiled = profile_of(arguments, job, crowd, example_batch(entry, arguments.batch_size))
    has_data = any(device.rows for device in crowd.devices)
    problem = CoalitionProblem(
        profile=profiled,
        crowd=crowd,
        kappa=arguments.kappa,
        max_size=arguments.max_size,
        power=arguments.power,
        value=arguments.value,
        amounts=arguments.amounts or ("rows" if has_data else "equal"),
    )
    results, refused = {}, {}
    for name, solver in made.items():
        try:
            results[name] = solver.form(problem)
        except InvalidValueError as error:  # the exhaustive one, beyond ten devices
            if name == arguments.solver:
                raise
            refused[name] = error.message.splitlines()[0]
    result = results[arguments.solver]
    if arguments.svg:
        from ..record import write_atomic
        from ..report.mapped import draw_coalitions

        rounds_s = [value.round_s for value in result.values]
        picture = draw_coalitions(crowd, result.structure, rounds_s)
        write_atomic(Path(arguments.svg), picture.encode())
    if arguments.json:
        print_json(
            {
                "structure": result.structure,
                "values": result.values,
                "potential": result.potential.phi,
                "certificate": result.certificate.line(),
                "is_nash_stable": result.certificate.is_nash_stable,
                "mean_round_s": result.mean_round_s,
                "slowest_round_s": result.slowest_round_s,
                "solve_s": result.solve_s,
                "compared": {
                    name: {
                        "mean_round_s": other.mean_round_s,
                        "slowest_round_s": other.slowest_round_s,
                        "coalitions": len(other.structure),
                    }
                    for name, other in results.items()
                },
                "refused": refused,
            }
        )
        return
    print(result.explain())
    if len(results) > 1:
        from ..solvers.units import format_seconds

        rows = [
            (
                name,
                str(len(other.structure)),
                format_seconds(other.mean_round_s),
                format_seconds(other.slowest_round_s),
                "yes" if other.certificate.is_nash_stable else "no",
            )
            for name, other in sorted(results.items(), key=lambda pair: pair[1].slowest_round_s)
        ]
        print_table(("solver", "coalitions", "mean round", "slowest round", "Nash-stable"), rows)
    for name, why in refused.items():
        print(f"{name}: {why}")
