"""`crowdmesh solvers`: what is found here, and what each solver makes of one problem."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InvalidCrowdError
from .console import format_seconds, print_json, print_table
from .inputs import (
    add_crowd_arguments,
    add_job_arguments,
    add_measure_argument,
    add_medium_argument,
    add_schedule_argument,
    example_batch,
    find_model,
    make_job,
    problem_of,
    profile_of,
    read_crowd,
)

if TYPE_CHECKING:
    from ..solvers import Compared

HELP = "list solvers, schedules and backends, or compare all solvers on one crowd and model"
EXAMPLES = """\
examples:
  crowdmesh solvers                                    what there is
  crowdmesh solvers crowd.toml --model mobilenet_v2    each solver's plan, side by side
  crowdmesh solvers --speeds 1,0.5,0.25 --schedule eager --svg solvers.svg
  crowdmesh plan --solver exhaustive --speeds 1,0.5    one of them, explained
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A crowd, a model, a job: without any of them the solvers are listed."""
    parser.add_argument("file", nargs="?", metavar="CROWD", help="the same as --crowd")
    parser.add_argument("--model", metavar="NAME", help="see `crowdmesh models`; default lenet")
    parser.add_argument("--svg", metavar="FILE", help="draw each solver's step")
    add_crowd_arguments(parser)
    add_job_arguments(parser)
    add_measure_argument(parser)
    add_medium_argument(parser)
    add_schedule_argument(parser.add_argument_group("plan"))


def run(arguments: argparse.Namespace) -> None:
    """Lists, or compares where there is something to compare on."""
    if arguments.file is not None:
        if arguments.crowd is not None:
            raise InvalidCrowdError(f"two crowds: {arguments.file} and --crowd {arguments.crowd}")
        arguments.crowd = arguments.file
    asked = (arguments.crowd, arguments.speeds, arguments.model, arguments.svg)
    if any(value is not None for value in asked):
        _compare(arguments)
    else:
        _list(arguments)


def _list(arguments: argparse.Namespace) -> None:
    from ..core import schedules
    from ..solvers import available_backends, coalition_solvers, solvers

    found, backends, grouping = solvers(), available_backends(), coalition_solvers()
    if arguments.json:
        print_json(
            {
                "solvers": dict(found),
                "coalition_solvers": dict(grouping),
                "schedules": dict(schedules()),
                "backends": list(backends),
            }
        )
        return
    print_table(("solver", "who runs which layers"), found.items())
    print_table(("coalition solver", "who trains together"), grouping.items())
    print_table(("schedule", "in which order a stage works"), schedules().items())
    print(f"backends of ilp: {', '.join(backends)}")


def _compare(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from ..solvers import compare_solvers

    crowd = read_crowd(arguments)
    entry = find_model(arguments.model or "lenet")
    job = make_job(entry, arguments)
    arguments.use_all = False
    with Console(stderr=True).status("profiling") as status:
        profiled = profile_of(arguments, job, crowd, example_batch(entry, arguments.batch_size))
        rows: list[Compared] = []
        for row in compare_solvers(problem_of(arguments, profiled, crowd)):
            rows.append(row)
            status.update(f"{row.solver}: {format_seconds(row.solve_s)}")
    rows.sort(key=lambda row: (row.step_s, row.solver))
    if arguments.svg:
        from ..record import write_atomic
        from ..report.compared import draw_compared

        title = f"{entry.name} on {len(crowd.devices)} devices"
        drawn = draw_compared(title, [(row.solver, row.step_s, _remark(row)) for row in rows])
        write_atomic(Path(arguments.svg), drawn.encode())
    if arguments.json:
        print_json(
            [
                {
                    "solver": row.solver,
                    "schedule": row.schedule,
                    "step_s": None if row.result is None else row.step_s,
                    "solve_s": row.solve_s,
                    "optimal": row.result is not None and row.result.optimal,
                    "plan": None if row.result is None else row.result.plan,
                    "refusal": row.refusal,
                }
                for row in rows
            ]
        )
        return
    best_s = rows[0].step_s
    print_table(
        ("solver", "schedule", "step", "of the best", "solved in", "plan"),
        [
            (
                row.solver,
                row.schedule,
                "-" if row.result is None else format_seconds(row.step_s),
                "-" if row.result is None else f"{row.step_s / best_s:.2f}",
                format_seconds(row.solve_s),
                _remark(row),
            )
            for row in rows
        ],
        right=("step", "of the best", "solved in"),
    )


def _remark(row: Compared) -> str:
    if row.result is None:
        return row.refusal
    stages = [
        f"{' + '.join(stage.devices)} {stage.first_layer}-{stage.last_layer}"
        for stage in row.result.plan.stages
    ]
    return ", ".join(stages) + ("; proven" if row.result.optimal else "")
