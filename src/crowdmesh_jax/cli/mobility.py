"""`crowdmesh mobility`: how devices would move, as a summary, a trace or a picture."""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidValueError
from .console import print_json, print_table

if TYPE_CHECKING:
    from ..mobility import Movement, MovementSummary, Snapshot

HELP = "move devices by a model, a frozen scenario or a recorded trace"
EXAMPLES = """\
examples:
  crowdmesh mobility                                  24 random waypoints for ten minutes
  crowdmesh mobility gauss_markov --option alpha=0.95 --devices 100 --seconds 60
  crowdmesh mobility group --side 300 --svg groups.svg
  crowdmesh mobility --scenario waypoint --seed 1000  a scenario that comparisons are made on
  crowdmesh mobility --trace fcd.xml.gz --seconds 300 all nodes of a recorded trace
  crowdmesh mobility static -o places.csv             t_s,node,x_m,y_m
models: random_waypoint, gauss_markov, group, static, and those of installed packages
scenarios: calm, gauss_markov, sumo, waypoint
"""
MAX_ROWS = 20_000_000
"""Of a trace that is written: half a gigabyte."""
DEVICES, SIDE_M, RANGE_M = 24, 150.0, 80.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What moves, for how long, and where to."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="default random_waypoint")
    parser.add_argument("--scenario", metavar="NAME", help="a frozen scenario instead of a model")
    parser.add_argument(
        "--trace", metavar="FILE", help="a recorded one: csv, or .xml by SUMO; also packed (.gz)"
    )
    parser.add_argument("--devices", type=int, metavar="N", help=f"default {DEVICES}")
    parser.add_argument("--seconds", type=float, default=600.0, metavar="S", help="default 600")
    parser.add_argument("--dt", type=float, default=1.0, metavar="S", help="step, default 1 s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    parser.add_argument("--side", type=float, metavar="M", help=f"of the square, {SIDE_M:g} m")
    parser.add_argument("--range", type=float, metavar="M", help=f"of links, {RANGE_M:g} m")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE",
        help="an option of the model, such as speed_max_m_per_s=2",
    )  # fmt: skip
    parser.add_argument("-o", "--output", metavar="FILE", help="write all positions, as .csv")
    parser.add_argument("--svg", metavar="FILE", help="draw the paths")


def run(arguments: argparse.Namespace) -> None:
    """Moves, writes, tells."""
    from ..mobility import paths_svg, watch

    for name, ending in (("output", ".csv"), ("svg", ".svg")):
        path = getattr(arguments, name)
        if path is not None and Path(path).suffix != ending:
            raise InvalidValueError(f"--{name} must end in {ending}, got {path!r}")
    if not 0 < arguments.dt <= arguments.seconds < float("inf"):
        raise InvalidValueError(
            f"--seconds must be finite and at least --dt, which must be > 0; got"
            f" {arguments.seconds} and {arguments.dt}"
        )
    what, movement, range_m = _movement(arguments)
    steps = int(arguments.seconds / arguments.dt * (1 + 1e-12))
    if arguments.output and movement.devices * (steps + 1) > MAX_ROWS:
        raise InvalidValueError(
            f"{movement.devices} devices in {steps} steps would be more than {MAX_ROWS} rows;"
            " ask for fewer of either, or a longer --dt"
        )
    keep = bool(arguments.output or arguments.svg)
    summary, shots = watch(movement, steps, range_m, keep=keep)
    if arguments.output:
        _write(arguments.output, _csv(shots))
    if arguments.svg:
        _write(arguments.svg, paths_svg(shots, range_m, title=f"{what}, seed {arguments.seed}"))
    if arguments.json:
        told = {"what": what, "seed": arguments.seed, "range_m": range_m, "dt_s": arguments.dt}
        files = {"output": arguments.output, "svg": arguments.svg}
        print_json({**told, **files, "summary": summary})
        return
    print_table(("figure", "value"), _rows(summary, range_m), right=("value",))
    print(f"{what}, seed {arguments.seed}: {movement.devices} devices for {summary.seconds:g} s")
    for path in (arguments.output, arguments.svg):
        if path:
            print(f"wrote {path}")


def _movement(arguments: argparse.Namespace) -> tuple[str, Movement, float]:
    """What was asked for, its movement at time 0, and the range of its links."""
    from ..mobility import (
        Area,
        Movement,
        Recorded,
        make_movement_model,
        read_csv_trace,
        read_sumo_fcd,
        scenario,
    )

    named = [w for w in (arguments.model, arguments.scenario, arguments.trace) if w is not None]
    if len(named) > 1:
        raise InvalidValueError(
            f"a model, --scenario and --trace exclude each other; got {' and '.join(named)}"
        )
    own = {"--side": arguments.side, "--option": arguments.option or None}
    if arguments.scenario is not None or arguments.trace is not None:
        own["--devices"] = arguments.devices
        for option, value in own.items():
            if value is not None:
                raise InvalidValueError(f"{option} is for models; {named[0]} has its own")
    if arguments.scenario is not None:
        frozen = scenario(arguments.scenario)
        range_m = frozen.range_m if arguments.range is None else arguments.range
        return arguments.scenario, frozen.start(arguments.seed, dt_s=arguments.dt), range_m
    range_m = RANGE_M if arguments.range is None else arguments.range
    if arguments.trace is not None:
        is_xml = arguments.trace.removesuffix(".gz").endswith(".xml")
        trace = (read_sumo_fcd if is_xml else read_csv_trace)(arguments.trace)
        model: Any = Recorded(trace=trace)
        devices, what = len(trace.nodes), Path(arguments.trace).name
    else:
        what = arguments.model or "random_waypoint"
        side_m = SIDE_M if arguments.side is None else arguments.side
        model = make_movement_model(what, area=Area.square(side_m), **_options(arguments.option))
        devices = DEVICES if arguments.devices is None else arguments.devices
    return what, Movement(model, devices, seed=arguments.seed, dt_s=arguments.dt), range_m


def _options(texts: Sequence[str]) -> dict[str, int | float]:
    found: dict[str, int | float] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            found[name] = int(value) if value.lstrip("+-").isdigit() else float(value)
        except ValueError:
            equals = ""
        if not equals or not name.isidentifier():
            raise InvalidValueError(
                f"--option must be NAME=NUMBER, alpha=0.95 say; got {text!r}"
            ) from None
    return found


def _csv(shots: Sequence[Snapshot]) -> str:
    """Positions to a millimetre, in the columns that `--trace` reads."""
    text = io.StringIO()
    text.write("t_s,node,x_m,y_m\n")
    for shot in shots:
        rows = zip(
            shot.occupants[shot.present].tolist(),
            shot.positions_m[shot.present].tolist(),
            strict=True,
        )
        text.writelines(f"{shot.time_s:.10g},{who},{x:.3f},{y:.3f}\n" for who, (x, y) in rows)
    return text.getvalue()


def _write(path: str, text: str) -> None:
    from ..record import write_atomic

    write_atomic(Path(path), text.encode())


def _rows(summary: MovementSummary, range_m: float) -> list[tuple[str, str]]:
    def told(value: float, unit: str) -> str:
        return f"{value:.3g} {unit}" if value == value else "-"  # NaN: nothing of the kind

    return [
        ("devices there", told(summary.mean_present, "")),
        ("speed", told(summary.mean_speed_m_per_s, "m/s")),
        ("time standing still", told(100 * summary.standing_share, "%")),
        (f"devices within {range_m:g} m", told(summary.mean_neighbours, "")),
        ("time alone", told(100 * summary.alone_share, "%")),
        ("links that ended", told(60 * summary.links_ended_per_s, "a minute")),
        ("a link lasts, mean", told(summary.mean_link_s, "s")),
        ("links now will last, median", told(summary.median_predicted_s, "s")),
        ("newcomers", told(summary.newcomers, "")),
    ]
