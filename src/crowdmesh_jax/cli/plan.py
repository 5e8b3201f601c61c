"""`crowdmesh plan`: who would run which layers, and why."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..core import values
from ..errors import InvalidCrowdError, InvalidValueError
from .console import print_json
from .inputs import (
    add_crowd_arguments,
    add_job_arguments,
    add_measure_argument,
    add_medium_argument,
    add_plan_arguments,
    example_batch,
    find_model,
    make_job,
    problem_of,
    profile_of,
    read_crowd,
)

HELP = "plan a model over a crowd and explain the plan; nothing is trained"
EXAMPLES = """\
examples:
  crowdmesh plan                                       lenet over four emulated devices
  crowdmesh plan crowd.toml --model lenet --microbatches 16
  crowdmesh plan --speeds 1,0.5,0.25 --schedule eager --solver exhaustive
  crowdmesh plan crowd.toml --output plan.json         keep it for `crowdmesh train --plan`
  crowdmesh plan crowd.toml --schedule eager --solver eager --svg plan.svg
  crowdmesh plan crowd.toml --try-microbatches 4,8,16 --recompute auto --wire-dtype auto
  crowdmesh plan crowd.toml --medium shared_cell       as if each cell's air were shared
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The crowd, the model, the job and the solver."""
    parser.add_argument("file", nargs="?", metavar="CROWD", help="the same as --crowd")
    parser.add_argument("--model", default="lenet", metavar="NAME", help="see `crowdmesh models`")
    parser.add_argument("--output", metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--svg", metavar="FILE", help="draw the predicted step")
    group = parser.add_argument_group("chosen together, the shortest step wins")
    group.add_argument(
        "--try-microbatches", metavar="M,M,...", help="counts to choose from, instead of one"
    )
    group.add_argument("--recompute", default="never", choices=("never", "always", "auto"))
    group.add_argument(
        "--wire-dtype",
        choices=("bfloat16", "auto"),
        help="cast what cuts send: on all, or where it shortens the step (loses bits)",
    )
    add_crowd_arguments(parser)
    add_job_arguments(parser)
    add_measure_argument(parser)
    add_medium_argument(parser)
    add_plan_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Profiles, solves, explains."""
    if arguments.file is not None:
        if arguments.crowd is not None:
            raise InvalidCrowdError(f"two crowds: {arguments.file} and --crowd {arguments.crowd}")
        arguments.crowd = arguments.file
    crowd = read_crowd(arguments)
    entry = find_model(arguments.model)
    job = make_job(entry, arguments)
    from ..solvers import make_solver, plan, solve

    counts = _counts(arguments.try_microbatches)
    solver = make_solver(arguments.solver)  # an unknown one is told before the profile is taken
    profiled = profile_of(arguments, job, crowd, example_batch(entry, arguments.batch_size))
    problem = problem_of(
        arguments, profiled, crowd, recompute=arguments.recompute, wire_dtype=arguments.wire_dtype
    )
    choice = None
    if counts:
        choice = plan(
            profiled,
            crowd,
            microbatches=counts,
            schedule=problem.schedule,
            recompute=problem.recompute,
            wire_dtype=problem.wire_dtype,
            solver=solver,
            requires=problem.requires,
        )
        result = choice.result
    else:
        result = solve(problem, solver=solver)
    if arguments.output:
        from ..record import write_atomic

        write_atomic(Path(arguments.output), values.to_json(result.plan, indent=1).encode())
    if arguments.svg:
        from ..record import write_atomic
        from ..report.planned import draw_plan

        write_atomic(Path(arguments.svg), draw_plan(result.plan, result.predicted).encode())
    if arguments.json:
        print_json(
            {
                "plan": result.plan,
                "predicted": result.predicted,
                "optimal": result.optimal,
                "gap": result.gap,
                "solve_s": result.solve_s,
                "solver": result.solver,
                "left_out": dict(result.left_out),
                "notes": list(result.notes),
                "tried": choice.choices if choice is not None else (),
            }
        )
    else:
        print((choice or result).explain())


def _counts(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidValueError(
            f"--try-microbatches must be counts between commas, 4,8,16 say; got {text!r}"
        ) from None
