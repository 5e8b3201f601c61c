"""What one layer costs, from its traced forward and backward: flops and bytes kept in between.

Asks XLA's cost analysis on shapes alone: no weights, nothing is compiled or run. XLA counts a
multiply and an add each as one operation, and leaves transcendental functions out. It knows one
layer at a time, nothing of devices.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ..export import jaxpr as jp
from ..model import Layer, LayerSpecs, call_layer
from ..model.randomness import key_spec
from ..model.trees import signature

PyTree = Any


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Costs of one layer for one microbatch."""

    forward_flops: float
    backward_flops: float
    equations: int
    """Of both traced programs."""
    own_residual_bytes: int
    """Kept for backward: made by the layer from data, other than its input."""
    kept_outputs: tuple[bool, ...]
    """Per output leaf: whether it is among these."""
    reads_input: tuple[bool, ...]
    """Per input leaf: whether backward reads it."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerTrace:
    """Forward and backward of one layer, ready to be counted or run.

    `forward(params, x_active, x_rest, state, key) -> (y_active, rest, residuals)`;
    `backward(residuals, dy) -> (dparams, dx)`. None where there is nothing to differentiate.
    """

    forward: Any
    backward: Any
    forward_inputs: tuple[Any, ...]
    forward_outputs: tuple[Any, ...]
    closed: core.ClosedJaxpr
    """`forward`, traced."""


def split_leaves(tree: PyTree, active: Sequence[bool]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The leaves that carry gradients, and the others."""
    leaves = jax.tree.leaves(tree)
    chosen = tuple(leaf for leaf, on in zip(leaves, active, strict=True) if on)
    return chosen, tuple(leaf for leaf, on in zip(leaves, active, strict=True) if not on)


def trace_layer(
    layer: Layer, specs: LayerSpecs, x_active: Sequence[bool], y_active: Sequence[bool]
) -> LayerTrace:
    """Makes the two functions of a layer in training mode and their shapes.

    Args:
        x_active, y_active: Per leaf of x and y, whether a gradient flows back through it.
    """
    structure = jax.tree.structure(specs.x)

    def join(chosen: Sequence[Any], others: Sequence[Any]) -> PyTree:
        active, rest = iter(chosen), iter(others)
        leaves = [next(active) if on else next(rest) for on in x_active]
        return jax.tree.unflatten(structure, leaves)

    def forward(params: PyTree, chosen: Any, others: Any, state: PyTree, key: Any) -> Any:
        def primal(params: PyTree, chosen: Any) -> Any:
            y, after, aux = call_layer(layer, params, state, join(chosen, others), key, True)
            out, rest = split_leaves(y, y_active)
            return (out, aux), (rest, after)

        (out, aux), vjp, (rest, after) = jax.vjp(primal, params, chosen, has_aux=True)
        return (out, aux), (rest, after), vjp

    chosen, others = split_leaves(specs.x, x_active)
    params = {**specs.params, **specs.borrowed} if specs.borrowed else specs.params
    inputs = (params, chosen, others, specs.state, key_spec())
    closed, shapes = jax.make_jaxpr(forward, return_shape=True)(*inputs)
    return LayerTrace(forward, lambda vjp, dy: vjp(dy), inputs, shapes, closed)


class Counter:
    """Counts layers; like programs are counted once."""

    def __init__(self) -> None:
        self._flops: dict[str, float] = {}
        self._costs: dict[Any, LayerCosts] = {}
        self._repeated: dict[Any, LayerCosts] = {}

    def layer(
        self, layer: Layer, specs: LayerSpecs, x_active: Sequence[bool], y_active: Sequence[bool]
    ) -> LayerCosts:
        """The costs of one layer for one microbatch, in training mode."""
        program = (layer.init, layer.apply, signature(specs.x), tuple(x_active), tuple(y_active))
        if layer.borrows:
            return self._layer(layer, specs, x_active, y_active)
        if program not in self._repeated:
            self._repeated[program] = self._layer(layer, specs, x_active, y_active)
        return self._repeated[program]

    def _layer(
        self, layer: Layer, specs: LayerSpecs, x_active: Sequence[bool], y_active: Sequence[bool]
    ) -> LayerCosts:
        def plain(params: PyTree, x: PyTree, state: PyTree, key: Any) -> Any:
            return call_layer(layer, params, state, x, key, True)

        params = {**specs.params, **specs.borrowed} if specs.borrowed else specs.params
        closed = jax.make_jaxpr(plain)(params, specs.x, specs.state, key_spec())
        known = (_digest(closed), tuple(x_active), tuple(y_active))
        if known not in self._costs:
            trace = trace_layer(layer, specs, x_active, y_active)
            self._costs[known] = self._count_layer(closed, trace, x_active, y_active)
        return self._costs[known]

    def _count_layer(
        self,
        closed: core.ClosedJaxpr,
        trace: LayerTrace,
        x_active: Sequence[bool],
        y_active: Sequence[bool],
    ) -> LayerCosts:
        forward_flops = self.flops(closed)
        params, chosen, *_ = trace.forward_inputs
        if not (jax.tree.leaves(params) or chosen):
            nothing = (False,) * len(y_active), (False,) * len(x_active)
            return LayerCosts(forward_flops, 0.0, equations(trace.closed.jaxpr), 0, *nothing)
        dy, _, vjp = trace.forward_outputs
        backward = jax.make_jaxpr(trace.backward)(vjp, dy)
        backward_flops = self.flops(backward)
        count = equations(trace.closed.jaxpr) + equations(backward.jaxpr)
        kept, kept_outputs, reads_input = _residuals(trace, x_active, y_active)
        return LayerCosts(forward_flops, backward_flops, count, kept, kept_outputs, reads_input)

    def flops(self, closed: core.ClosedJaxpr) -> float:
        """Operations of a program; a scan's body counts once for each of its turns."""
        name = _digest(closed)
        if name not in self._flops:
            self._flops[name] = self._count(closed)
        return self._flops[name]

    def _count(self, closed: core.ClosedJaxpr) -> float:
        specs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars]
        lowered = jax.jit(core.jaxpr_as_fun(closed)).lower(*specs)
        analysis = lowered.cost_analysis()
        found = float((analysis or {}).get("flops", 0.0))
        total = found if math.isfinite(found) and found > 0 else 0.0
        # XLA sees a loop whose number of turns it does not know, and counts its body once.
        for body, turns in _scans(closed.jaxpr):
            total += (turns - 1) * self.flops(body)
        return total


def _digest(closed: core.ClosedJaxpr) -> str:
    """Equal for equal programs; constants count by shape and dtype, which is all that costs."""
    digest = hashlib.sha256(str(closed.jaxpr).encode())
    for constant in closed.consts:
        digest.update(str((np.shape(constant), np.result_type(constant))).encode())
    return digest.hexdigest()


def _scans(jaxpr: core.Jaxpr) -> Iterator[tuple[core.ClosedJaxpr, int]]:
    """The outermost scans of a program, with their numbers of turns."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation.params["jaxpr"], equation.params["length"]
            continue
        for inner in core.jaxprs_in_params(equation.params):
            yield from _scans(inner)


def equations(jaxpr: core.Jaxpr) -> int:
    """Equations of a program, those of programs within it included."""
    return sum(
        sum(map(equations, inner)) if (inner := list(core.jaxprs_in_params(equation.params))) else 1
        for equation in jaxpr.eqns
    )


def _residuals(
    trace: LayerTrace, x_active: Sequence[bool], y_active: Sequence[bool]
) -> tuple[int, tuple[bool, ...], tuple[bool, ...]]:
    """Bytes that depend on data and are no inputs; which outputs and inputs are among them."""
    closed = jp.inline(trace.closed)
    params, chosen, others, _, _ = trace.forward_inputs
    parameters = len(jax.tree.leaves(params))
    (out, aux), (rest, after), _ = trace.forward_outputs
    first = len(jax.tree.leaves((out, aux, rest, after)))
    results = closed.jaxpr.outvars
    residuals = dict.fromkeys(v for v in results[first:] if not isinstance(v, core.Literal))
    depends = zip(results, jp.dependence(closed), strict=True)
    from_data = {v for v, mask in depends if mask >> parameters} & residuals.keys()
    inputs = closed.jaxpr.invars
    total = sum(
        math.prod(v.aval.shape) * v.aval.dtype.itemsize
        for v in from_data
        if v not in inputs and not jnp.issubdtype(v.aval.dtype, jax.dtypes.extended)
    )
    leaves = len(out)
    aux_leaves = len(jax.tree.leaves(aux))
    out_vars = [*results[:leaves], *results[leaves + aux_leaves : leaves + aux_leaves + len(rest)]]
    in_vars = inputs[parameters : parameters + len(chosen) + len(others)]
    kept_outputs = _in_order(out_vars, y_active, residuals)
    return total, kept_outputs, _in_order(in_vars, x_active, residuals)


def _in_order(variables: Sequence[Any], active: Sequence[bool], among: Any) -> tuple[bool, ...]:
    """Membership of variables that come as (active ones, others), in the tree's own order."""
    count = sum(active)
    chosen, others = iter(variables[:count]), iter(variables[count:])
    ordered = [next(chosen) if on else next(others) for on in active]
    return tuple(not isinstance(v, core.Literal) and v in among for v in ordered)
