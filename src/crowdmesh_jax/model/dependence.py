"""What a traced function reads and asks for: which inputs reach which outputs, and callbacks.

Answers come from the jaxpr, so they hold for all values, not only for those tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core
from jax.interpreters import partial_eval

HOST_CALLS = ("callback", "debug_print", "infeed", "outfeed")


def inputs_read(closed: core.ClosedJaxpr, outputs: Sequence[bool] | None = None) -> list[bool]:
    """Which inputs the chosen outputs depend on (all outputs if None); never too few."""
    if outputs is None:
        outputs = [True] * len(closed.jaxpr.outvars)
    return list(partial_eval.dce_jaxpr(closed.jaxpr, list(outputs))[1])


def host_calls(jaxpr: core.Jaxpr) -> Iterator[str]:
    """Names of the primitives that call back into Python, inner functions included."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if any(part in name for part in HOST_CALLS):
            yield name
        for inner in _inner(list(equation.params.values())):
            yield from host_calls(inner)


def _inner(values: Sequence[Any]) -> Iterator[core.Jaxpr]:
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _inner(value)
