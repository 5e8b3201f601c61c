"""`crowdmesh crowd`: a realistic crowd from a seed, as a file for `crowdmesh plan`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ..core import values
from ..errors import InvalidValueError
from .console import format_count, format_seconds, print_json, print_table
from .inputs import add_medium_argument

if TYPE_CHECKING:
    from ..core import Crowd
    from ..crowds import Summary

HELP = "make a realistic crowd from a seed, as a crowd file"
EXAMPLES = """\
examples:
  crowdmesh crowd campus                               what forty devices of a campus are like
  crowdmesh crowd vehicular --devices 200 --seed 7 -o cars.toml
  crowdmesh crowd lab_shelf -o shelf.json && crowdmesh plan shelf.json --model resnet18
  crowdmesh crowd two_cells --json                     the crowd and its summary, one object

presets: lab_shelf, campus, vehicular, two_cells
"""
ENDINGS = {".toml": values.to_toml, ".json": values.to_json}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which crowd, how large, and where to."""
    parser.add_argument("preset", metavar="PRESET", help="a named crowd, see below")
    parser.add_argument(
        "--devices", type=int, metavar="N", help="how many (default: the preset's own number)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    add_medium_argument(parser)
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="write the crowd there, as .toml or .json"
    )


def run(arguments: argparse.Namespace) -> None:
    """Draws, writes, summarises."""
    from ..crowds import preset, summarise

    path = None if arguments.output is None else Path(arguments.output)
    if path is not None and path.suffix not in ENDINGS:
        raise InvalidValueError(f"--output must end in .toml or .json, got {arguments.output!r}")
    crowd = preset(arguments.preset, arguments.devices, seed=arguments.seed)
    if arguments.medium is not None:
        crowd = dataclasses.replace(crowd, medium=arguments.medium)
    if path is not None:
        _write(path, crowd)
    rows = summarise(crowd)
    if arguments.json:
        told = {"preset": arguments.preset, "seed": arguments.seed, "output": arguments.output}
        print_json({**told, "summary": rows, "crowd": crowd})
        return
    print_table(
        ("figure", "devices", "least", "10 %", "median", "90 %", "most"),
        [_row(row) for row in rows],
        right=("devices", "least", "10 %", "median", "90 %", "most"),
    )
    cells = {device.access.cell for device in crowd.devices if device.access is not None}
    between = ""
    if crowd.backhaul is not None:
        rate = format_count(crowd.backhaul.bandwidth_bytes_per_s)
        between = f", {rate}B/s and {format_seconds(crowd.backhaul.latency_s)} between them"
    print(
        f"{arguments.preset}, seed {arguments.seed}: {len(crowd.devices)} devices in"
        f" {len(cells)} {'cell' if len(cells) == 1 else 'cells'}{between}"
    )
    print(f"wrote {path}" if path is not None else "not kept; -o FILE.toml writes it")


def _write(path: Path, crowd: Crowd) -> None:
    from ..record import write_atomic

    write_atomic(path, ENDINGS[path.suffix](crowd).encode())


def _row(row: Summary) -> list[str]:
    """In units that people read. Hazards as what they are the inverse of: mean stays."""
    figures = [row.least, row.p10, row.median, row.p90, row.most]
    name, unit = row.figure, ""
    if name == "leave_hazard_per_s":
        name, cells = "mean stay", [format_seconds(1 / figure) for figure in reversed(figures)]
    elif name == "latency_s":
        name, cells = "latency", [format_seconds(figure) for figure in figures]
    elif name == "label_skew":
        name, cells = "label skew", [f"{figure:.2f}" for figure in figures]
    else:
        name, unit = {
            "flops_per_s": ("speed", "FLOP/s"),
            "memory_bytes": ("free memory", "B"),
            "uplink_bytes_per_s": ("uplink", "B/s"),
            "downlink_bytes_per_s": ("downlink", "B/s"),
        }.get(name, (name, ""))
        cells = [_with_unit(figure, unit) for figure in figures]
    return [name, str(row.devices), *cells]


def _with_unit(figure: float, unit: str) -> str:
    number = format_count(figure)
    if not unit:
        return number
    return number + unit if number[-1].isalpha() else f"{number} {unit}"
