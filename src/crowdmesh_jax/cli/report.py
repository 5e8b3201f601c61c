"""`crowdmesh report`: a page and plots of a run, or a comparison of two."""

from __future__ import annotations

import argparse
import sys

from ..core import values
from ..report import Report, RunSummary, report
from .console import format_seconds, print_json

HELP = "make a page of a run, or compare two: loss, steps, shares, memory, plan, events"
EXAMPLES = """\
examples:
  crowdmesh report runs/NAME                 report.html and plots/*.svg in the run's folder
  crowdmesh report runs/NAME --step 6 --png  draw step 6; plots as PNG, too (extra "plot")
  crowdmesh report runs/A runs/B --out diff  loss, step times and shares side by side
  crowdmesh report runs/NAME --json | jq '.runs[0].measured_shares'
"""
STATES = {"halted": "stopped", "running": "still running", "killed": "killed"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One or two runs, and where to write."""
    parser.add_argument("first", metavar="RUN", help="a run's folder")
    parser.add_argument("other", metavar="RUN2", nargs="?", help="compare with this one")
    parser.add_argument(
        "--out", metavar="DIR", help="default: the run's folder; for two, versus-RUN2 inside it"
    )
    parser.add_argument("--step", type=int, metavar="N", help="draw this step, not the median one")
    parser.add_argument("--png", action="store_true", help="plots as PNG, too; needs matplotlib")


def run(arguments: argparse.Namespace) -> None:
    """Writes the page; says what happened to the run, the step time and where the page is."""
    made = report(
        arguments.first, arguments.other, out=arguments.out, step=arguments.step, png=arguments.png
    )
    if arguments.json:
        print_json({"event": "report", **values.to_plain(_with_paths(made))})
        return
    for summary in made.runs:
        print(_line(summary))
        for problem in summary.problems:
            print(f"warning: {summary.name}: {problem}", file=sys.stderr)
    if len(made.runs) == 2:
        print(f"{len(made.differences)} differences in configuration and plan")
    print(f"report {made.html}   ({len(made.plots)} plots beside it)")


def _with_paths(made: Report) -> dict[str, object]:
    return {
        "html": str(made.html),
        "plots": [str(path) for path in made.plots],
        "runs": made.runs,
        "differences": made.differences,
    }


def _line(summary: RunSummary) -> str:
    state = STATES.get(summary.state, summary.state)
    code = f" [{summary.code}]" if summary.code else ""
    line = f"{summary.name}: {state}{code}, {summary.steps} steps"
    if summary.loss is not None:
        line += f", loss {summary.loss:.4f}"
    measured, predicted = summary.measured_step_s, summary.predicted_step_s
    if measured is not None:
        line += f", step {format_seconds(measured)}"
        if predicted is not None:
            off = (measured / predicted - 1) * 100
            line += f" (predicted {format_seconds(predicted)}, {off:+.1f} %)"
    return line
