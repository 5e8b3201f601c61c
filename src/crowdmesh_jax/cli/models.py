"""`crowdmesh models`: the zoo. Traces shapes; makes no parameters."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .console import format_count, print_json, print_table
from .inputs import find_model

if TYPE_CHECKING:
    from ..model.zoo import Entry

HELP = "list the models that come with the package"
EXAMPLES = """\
examples:
  crowdmesh models           names, layers, parameters, cost, bytes
  crowdmesh models resnet50 mobilenet_v2
  crowdmesh models --json    one object per model, with the names of its layers
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which models."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="only these (default: all, which takes seconds)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints one row per model."""
    from ..model import zoo

    chosen = [find_model(name) for name in arguments.names] or zoo.models().values()
    rows = [_figures(entry) for entry in chosen]
    if arguments.json:
        for row in rows:
            print_json(row)
        return
    print_table(
        ("model", "layers", "parameters", "MACs", "bytes", "at a cut", "a row", "what it is"),
        [
            (
                row["name"],
                len(row["layers"]),
                format_count(row["parameters"]),
                format_count(row["macs"]),
                f"{format_count(row['parameter_bytes'])}B",
                f"{format_count(row['largest_cut_bytes'])}B",
                row["row"],
                row["description"],
            )
            for row in rows
        ],
        right=("layers", "parameters", "MACs", "bytes", "at a cut"),
    )
    print("MACs: multiply-accumulates forward; at a cut: the largest activation that one row sends")


def _figures(entry: Entry) -> dict[str, Any]:
    """What there is to say of a model, for one row of its default input."""
    from ..model.trees import size_bytes

    specs = entry.build().specs(entry.input_spec(1))
    return {
        "name": entry.name,
        "layers": [layer.name for layer in specs.layers],
        "parameters": specs.parameter_count,
        "macs": specs.macs,
        "parameter_bytes": size_bytes(specs.params),
        "largest_cut_bytes": max(size_bytes(layer.y) for layer in specs.layers[:-1]),
        "row": f"{entry.row.dtype.name}[{', '.join(map(str, entry.row.shape))}]",
        "description": entry.description,
    }
