"""`crowdmesh solvers`: the partition solvers and the MIP backends found on this machine."""

from __future__ import annotations

import argparse

from .console import print_json, print_table

HELP = "list the partition solvers and the backends found on this machine"
EXAMPLES = """\
examples:
  crowdmesh solvers
  crowdmesh plan --solver exhaustive --speeds 1,0.5    plan with another one
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(arguments: argparse.Namespace) -> None:
    """Prints one row per solver, then the backends."""
    from ..solvers import available_backends, solvers

    found, backends = solvers(), available_backends()
    if arguments.json:
        print_json({"solvers": dict(found), "backends": list(backends)})
        return
    print_table(("solver", "what it does"), found.items())
    print(f"backends of ilp: {', '.join(backends)}")
