"""The command line: `crowdmesh COMMAND`, from `demo` to `solvers`; `COMMANDS` has them all.

Thin: each command parses, calls the library and renders. One module per command; this one only
dispatches and turns errors into one line and an exit status:

    0    done
    1    `demo` alone: the run that lost a device did not end as one that lost none
    2    an error of ours, with its code, or a wrong option
    130  stopped by Ctrl-C
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..core.folders import cache_folder
from ..errors import CrowdMeshError, InterruptedRunError
from . import (
    coalitions,
    crowd,
    demo,
    mobility,
    models,
    plan,
    policies,
    profile,
    replicas,
    report,
    solvers,
    train,
)
from .console import show_error

COMMANDS = (
    demo, crowd, mobility, policies, coalitions, plan, profile, train, report, replicas, models,
    solvers,
)  # fmt: skip
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

_EPILOG = """\
examples:
  crowdmesh demo                                   four unequal processes train, one is killed
  crowdmesh crowd campus -o campus.toml            a realistic crowd, as a file
  crowdmesh mobility --scenario waypoint           how its devices would move
  crowdmesh policies --scenario calm               what a policy of copies would save there
  crowdmesh coalitions --crowd campus.toml         who would train together
  crowdmesh plan --speeds 1,0.5,0.25               who would run which layers, and why
  crowdmesh train lenet --data digits --steps 100  train, and leave a folder in runs/
  crowdmesh report runs/NAME                       a page of what a run did
  crowdmesh replicas runs/NAME                     who holds copies, and what a loss would cost
  crowdmesh COMMAND --help                         options and examples of a command
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands; needs no JAX."""
    parser = argparse.ArgumentParser(
        prog="crowdmesh",
        description="Train one neural network across a crowd of unequal devices.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"crowdmesh {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP[0].upper() + module.HELP[1:] + ".",
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        common = command.add_argument_group("output")
        common.add_argument("--json", action="store_true", help="the same values as JSON lines")
        common.add_argument("--debug", action="store_true", help="logs, and tracebacks of errors")
        command.set_defaults(run=module.run)
    return parser


def _keep_compiled_programs() -> None:
    """This process compiles small programs (initial parameters, calibration): once, for all runs.

    A user's own choice stands. Read when JAX loads.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache_folder("compiled") / "planner")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    # An agent computes on one core; what is measured here must be of one, too. Read when JAX loads.
    os.environ.setdefault("NPROC", "1")
    _keep_compiled_programs()
    if arguments.debug:
        import logging

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
        logging.getLogger("crowdmesh_jax").setLevel(logging.DEBUG)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except InterruptedRunError as exc:
        show_error(exc, as_json=arguments.json)
        return EXIT_INTERRUPTED
    except CrowdMeshError as exc:
        if arguments.debug:
            raise
        show_error(exc, as_json=arguments.json)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has gone: nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0
