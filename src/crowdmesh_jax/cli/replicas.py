"""`crowdmesh replicas`: who holds which copies in a run, and what would be lost if one went now."""

from __future__ import annotations

import argparse

from ..core import values
from ..record import RunFolder, journal_writer
from .console import print_json

HELP = "who holds which copies in a run, how old, and what is lost if a device goes now"
EXAMPLES = """\
examples:
  crowdmesh replicas runs/NAME             also while the run goes on
  watch -n 1 crowdmesh replicas runs/NAME  as it changes
  crowdmesh replicas runs/NAME --json | jq '.if_lost[] | select(.outcome != "nothing")'

behind: steps that the copy is older than the run; "if ... went now" is the protocol's own decision
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A run's folder."""
    parser.add_argument("run_dir", metavar="RUN", help="a run's folder")


def run(arguments: argparse.Namespace) -> None:
    """Reads the journal, tells."""
    from ..runtime.replicas import read_replicas

    report = read_replicas(arguments.run_dir)
    pid = journal_writer(RunFolder.open(arguments.run_dir).events_path)
    if arguments.json:
        told = {"event": "replicas", "is_running": pid is not None, **values.to_plain(report)}
        print_json(told)
        return
    print(report.text())
    if pid is None:
        print("the run has ended, or was killed: so it stood at its last record")
