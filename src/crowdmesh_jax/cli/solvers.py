"""`crowdmesh solvers`: solvers, schedules and the MIP backends found here."""

from __future__ import annotations

import argparse

from .console import print_json, print_table

HELP = "list the solvers, the schedules and the backends found on this machine"
EXAMPLES = """\
examples:
  crowdmesh solvers
  crowdmesh plan --solver exhaustive --speeds 1,0.5    plan with another one
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(arguments: argparse.Namespace) -> None:
    """Prints one row per solver and schedule, then the backends."""
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
