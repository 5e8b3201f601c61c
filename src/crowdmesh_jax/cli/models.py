"""`crowdmesh models`: the zoo. Traces shapes; makes no parameters."""

from __future__ import annotations

import argparse
import math

from .console import format_count, print_json, print_table

HELP = "list the models that come with the package"
EXAMPLES = """\
examples:
  crowdmesh models           names, layers, parameters
  crowdmesh models --json    one object per model, with the names of its layers
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(arguments: argparse.Namespace) -> None:
    """Prints one row per model."""
    import jax

    from ..model import zoo

    rows = []
    for entry in zoo.models().values():
        model = entry.build()
        layers = [layer.name for layer in model.layers]
        specs = model.specs(entry.input_spec(1))
        leaves = jax.tree.leaves([layer.params for layer in specs.layers])
        count = sum(math.prod(leaf.shape) for leaf in leaves)
        row = f"{entry.row.dtype.name}[{', '.join(map(str, entry.row.shape))}]"
        rows.append((entry.name, layers, count, row, entry.description))
    if arguments.json:
        for name, layers, count, row, description in rows:
            print_json(
                {
                    "name": name,
                    "layers": layers,
                    "parameters": count,
                    "row": row,
                    "description": description,
                }
            )
        return
    print_table(
        ("model", "layers", "parameters", "a row", "what it is"),
        [(n, len(layers), format_count(c), row, text) for n, layers, c, row, text in rows],
        right=("layers", "parameters"),
    )
