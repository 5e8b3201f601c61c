"""Multiply-accumulates of a traced program: what papers and model zoos give as a network's cost.

Convolutions and matrix products count, one for each product that is summed; additions, norms and
activations do not. Read off the program's shapes: nothing is compiled. XLA's own count, which
profiles use, knows all operations and counts a multiply-accumulate as two.
"""

from __future__ import annotations

import math
from typing import Any

from jax.extend import core


def multiply_accumulates(jaxpr: core.Jaxpr) -> int:
    """Those of one run. A scan's body counts once for each turn, a `while` body once, since its
    turns are not known; of a `cond`, the dearest branch. Taps of a convolution that fall on its
    padding count as the others do."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "conv_general_dilated":
            kernel = _shape(equation.invars[1])
            features = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += _size(equation.outvars[0]) * (math.prod(kernel) // max(features, 1))
        elif name == "dot_general":
            (summed, _), _ = params["dimension_numbers"]
            left = _shape(equation.invars[0])
            total += _size(equation.outvars[0]) * math.prod(left[axis] for axis in summed)
        elif name == "cond":
            branches = core.jaxprs_in_params(params)
            total += max((multiply_accumulates(branch) for branch in branches), default=0)
        else:
            turns = params["length"] if name == "scan" else 1
            inner = core.jaxprs_in_params(params)
            total += turns * sum(multiply_accumulates(body) for body in inner)
    return total


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _size(variable: core.Var) -> int:
    return math.prod(_shape(variable))
