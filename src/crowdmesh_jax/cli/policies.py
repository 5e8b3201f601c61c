"""`crowdmesh policies`: how long a training run takes under each replication policy, simulated."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from ..errors import InvalidValueError
from .console import print_json, print_table

if TYPE_CHECKING:
    from ..simulation import Comparison, Outcome, Row

HELP = "compare replication and recovery policies on a frozen scenario, in virtual time"
EXAMPLES = """\
examples:
  crowdmesh policies                                  ours and FTPipeHD's rule on waypoint, 3 seeds
  crowdmesh policies --scenario calm --seeds 5 --json
  crowdmesh policies --policies mobility,next_stage,central --scenario gauss_markov
  crowdmesh policies --policies 'mobility,mobility - hand-over,neighbour'
policies: mobility, neighbour, neighbour_server, next_stage, central, none;
  and parts left out: 'mobility - hand-over', '- placement', '- newcomers', '- interval',
  '- replay', '- takers', and 'neighbour + replay'
scenarios: calm, gauss_markov, sumo, waypoint
"""
MOST_SEEDS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is compared, and how often."""
    parser.add_argument("--scenario", default="waypoint", metavar="NAME", help="default waypoint")
    parser.add_argument(
        "--policies", default="mobility,neighbour", metavar="A,B", help="default mobility,neighbour"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how many, default 3")
    parser.add_argument(
        "--first-seed", type=int, metavar="N",
        help="default 1000, where the seeds for reporting begin; lower ones are for tuning",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Simulates, and tells."""
    from ..mobility import REPORTING_SEED
    from ..simulation import compare_policies

    if not 1 <= arguments.seeds <= MOST_SEEDS:
        raise InvalidValueError(f"--seeds must lie in 1..{MOST_SEEDS}, got {arguments.seeds}")
    first = REPORTING_SEED if arguments.first_seed is None else arguments.first_seed
    names = [name.strip() for name in arguments.policies.split(",") if name.strip()]
    with _progress(len(names) * arguments.seeds, quiet=arguments.json) as tell:
        comparison = compare_policies(
            arguments.scenario, names, range(first, first + arguments.seeds), on_run=tell
        )
    if arguments.json:
        print_json(comparison)
        return
    _show(comparison)


def _progress(
    total: int, *, quiet: bool
) -> AbstractContextManager[Callable[[Outcome], None] | None]:
    """A bar on a terminal's stderr; nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    class Bar(Progress):
        task: Any = None

        def __enter__(self) -> Any:
            super().__enter__()
            self.task = self.add_task("runs", total=total)
            return self.tell

        def tell(self, outcome: Outcome) -> None:
            self.update(self.task, advance=1, description=f"{outcome.policy}, seed {outcome.seed}")

    return Bar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip


def _show(comparison: Comparison) -> None:
    columns = ("policy", "time to finish", "below neighbour", "useful", "redone", "waiting",
               "detection", "transfer", "restart", "switching", "overhead", "losses",
               "moves")  # fmt: skip
    rows = [_cells(row) for row in comparison.rows]
    print_table(columns, rows, right=columns[1:])
    seeds = comparison.seeds
    print(
        f"{comparison.scenario}, seeds {seeds[0]} to {seeds[-1]}: means in seconds of virtual time,"
        " with 95 % intervals; docs/policies_compared.md says what is modelled"
    )


def _cells(row: Row) -> Sequence[str]:
    def mean(value: float, half: float | None, digits: int) -> str:
        around = "" if half is None else f" +- {half:.{digits}f}"
        return f"{value:.{digits}f}{around}"

    time = mean(row.elapsed_s.value, row.elapsed_s.half_width, 0)
    if row.finished < row.runs:
        time = f"> {time} ({row.finished}/{row.runs} done)"
    below = "-"
    if row.below is not None:
        half = row.below.half_width
        below = mean(100 * row.below.value, None if half is None else 100 * half, 1) + " %"
    return (
        row.policy, time, below, *(f"{seconds:.0f}" for seconds in row.split_s.values()),
        f"{row.losses:.1f}", f"{row.handovers:.1f}",
    )  # fmt: skip
