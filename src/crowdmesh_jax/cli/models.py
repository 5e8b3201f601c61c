"""`crowdmesh models`: the zoo. Traces shapes; makes no parameters."""

from __future__ import annotations

import argparse
import math

from .console import format_count, print_json, print_table
from .inputs import example_batch, zoo_models

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

    rows = []
    for name, entry in zoo_models().items():
        model = entry.make()
        inputs, _ = example_batch(entry, 1)
        specs = model.specs(jax.eval_shape(lambda x: x, inputs))
        leaves = [jax.tree.leaves(layer.params) for layer in specs.layers]
        count = sum(math.prod(leaf.shape) for part in leaves for leaf in part)
        rows.append((name, [layer.name for layer in model.layers], count, entry))
    if arguments.json:
        for name, layers, count, entry in rows:
            print_json(
                {
                    "name": name,
                    "layers": layers,
                    "parameters": count,
                    "data": entry.data,
                    "summary": entry.summary,
                }
            )
        return
    print_table(
        ("model", "layers", "parameters", "data", "what it is"),
        [
            (name, len(layers), format_count(count), entry.data, entry.summary)
            for name, layers, count, entry in rows
        ],
        right=("layers", "parameters"),
    )
