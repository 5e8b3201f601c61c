"""A traced function as a flat list of operations on numbered values, each with a label.

Knows jaxprs: it inlines calls, turns a `cond` that mixes owners into both branches and a select,
and can evaluate any part of the list again. What labels mean and which mixtures are allowed is
decided by the `join` it is given. All use of JAX internals for the optimizer is in this file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from ..errors import UnsupportedOptimizerError

Value = int
"""The number of a value in a graph."""

Source = Callable[[], str | None]
"""Finds the user-level function that asked for an operation (`clip_by_global_norm`), if known.
Looked up only for operations that mix layers: reading a traceback is slow."""

Region = tuple[tuple[int, int], ...]
"""The branches an operation was written in: (number of the `cond`, branch), outermost first."""


class Kind(Enum):
    """When in a step a value can be known."""

    GLOBAL = "global"
    """From globals and constants alone: anywhere, at once."""
    LOCAL = "local"
    """From leaves of one layer, before anything is exchanged."""
    REDUCED = "reduced"
    """From scalars of several layers: made by `reduce`."""
    FINAL = "final"
    """From leaves of one layer and reduced values: only after `reduce`."""


@dataclass(frozen=True, slots=True)
class Label:
    """When and where a value is known; `layer` for LOCAL and FINAL only."""

    kind: Kind
    layer: str | None = None
    is_packed: bool = False
    """Made of one layer's scalars alone: a short vector of them may be sent like each of them."""


GLOBAL = Label(Kind.GLOBAL)
REDUCED = Label(Kind.REDUCED)


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One step of the computation."""

    run: Callable[..., Sequence[Any]]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    primitive: str
    source: Source
    region: Region = ()
    choice: int | None = None
    """Set where this picks one output of a `cond`: inputs are the index, then a value per branch.
    The picks of one `cond` share the number."""


Join = Callable[[Sequence[Label], Sequence[int], Sequence[int], str, Source], Label]
"""(labels and sizes of inputs, sizes of outputs, primitive, source) -> label of the outputs."""


@dataclass(slots=True)
class Graph:
    """Operations in order; filled by `build_graph`, only read afterwards."""

    operations: list[Operation] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    avals: list[Any] = field(default_factory=list)
    constants: dict[Value, Any] = field(default_factory=dict)
    inputs: tuple[Value, ...] = ()
    outputs: tuple[Value, ...] = ()

    def new_value(self, aval: Any, label: Label) -> Value:
        self.avals.append(aval)
        self.labels.append(label)
        return len(self.avals) - 1

    def size(self, value: Value) -> int:
        """Number of elements."""
        return int(np.prod(self.avals[value].shape, dtype=np.int64))

    def needed(
        self, targets: Iterable[Value], stop: Callable[[Value], bool]
    ) -> tuple[list[Operation], list[Value]]:
        """The operations that make `targets` from inputs and stopped values, and what they read.

        Walks back from `targets` and does not look behind values for which `stop` holds.
        """
        wanted: set[Value] = set()
        ends: set[Value] = set()

        def want(values: Iterable[Value]) -> None:
            for value in values:
                if value not in self.constants:
                    (ends if stop(value) else wanted).add(value)

        want(targets)
        chosen: list[Operation] = []
        for operation in reversed(self.operations):
            if not wanted.isdisjoint(operation.outputs):
                wanted.difference_update(operation.outputs)
                chosen.append(operation)
                want(operation.inputs)
        return chosen[::-1], sorted(wanted | ends)


def build_graph(closed: jex.ClosedJaxpr, labels: Sequence[Label], join: Join) -> Graph:
    """Flattens a jaxpr whose inputs carry `labels`. What `join` raises passes through."""
    graph = Graph()
    graph.inputs = tuple(
        graph.new_value(v.aval, label) for v, label in zip(closed.jaxpr.invars, labels, strict=True)
    )
    graph.outputs = tuple(_Flattener(graph, join).closed(closed, graph.inputs))
    return graph


_CALLS: Mapping[str, str] = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}
"""Primitives that only call a function, and the parameter that holds it."""


class _Flattener:
    """Walks a jaxpr and its calls once, adding to `graph`."""

    def __init__(self, graph: Graph, join: Join) -> None:
        self.graph = graph
        self.join = join
        self.region: Region = ()
        self.choices = 0

    def closed(self, closed: Any, arguments: Sequence[Value]) -> list[Value]:
        jaxpr = getattr(closed, "jaxpr", closed)
        env: dict[Any, Value] = dict(zip(jaxpr.invars, arguments, strict=True))
        for var, constant in zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True):
            env[var] = self.constant(var.aval, constant)
        for equation in jaxpr.eqns:
            operands = [self.read(env, atom) for atom in equation.invars]
            env.update(zip(equation.outvars, self.equation(equation, operands), strict=True))
        return [self.read(env, atom) for atom in jaxpr.outvars]

    def read(self, env: Mapping[Any, Value], atom: Any) -> Value:
        if isinstance(atom, jex.Literal):
            aval: Any = atom.aval
            return self.constant(aval, np.asarray(atom.val, dtype=aval.dtype))
        return env[atom]

    def constant(self, aval: Any, array: Any) -> Value:
        value = self.graph.new_value(aval, GLOBAL)
        self.graph.constants[value] = array
        return value

    def equation(self, equation: Any, operands: list[Value]) -> list[Value]:
        name = equation.primitive.name
        if name in _CALLS and _CALLS[name] in equation.params:
            return self.closed(equation.params[_CALLS[name]], operands)
        if name == "cond" and self.mixes(equation, operands):
            return self.select(equation, operands)
        if equation.effects or "callback" in name:
            raise UnsupportedOptimizerError(
                f"the optimizer has a side effect: operation {name!r}"
                f"{' in ' + source if (source := source_of(equation)) else ''}. Stage programs are "
                "pure; remove prints and callbacks from it."
            )
        avals = [v.aval for v in equation.outvars]
        return self.emit(_evaluator(equation), operands, avals, name, partial(source_of, equation))

    def mixes(self, equation: Any, operands: list[Value]) -> bool:
        """Whether some outputs of a `cond` need owners that others do not."""
        layers = {self.graph.labels[v].layer for v in operands} - {None}
        if len(layers) != 1:
            return bool(layers)
        index, *rest = (self.graph.labels[v].layer is not None for v in operands)
        if index:
            return False
        branches = [_dependence(b.jaxpr, rest) for b in equation.params["branches"]]
        return not all(any(per_branch) for per_branch in zip(*branches, strict=True))

    def select(self, equation: Any, operands: list[Value]) -> list[Value]:
        """Both branches, then a choice of each output."""
        index, *rest = operands
        number = self.choices = self.choices + 1
        outer = self.region
        results = []
        for i, branch in enumerate(equation.params["branches"]):
            self.region = (*outer, (number, i))
            results.append(self.closed(branch, rest))
        self.region = outer
        source = partial(source_of, equation)
        chosen: list[Value] = []
        for var, cases in zip(equation.outvars, zip(*results, strict=True), strict=True):
            if len(set(cases)) == 1:
                chosen.append(cases[0])
            else:
                chosen += self.emit(_choose, [index, *cases], [var.aval], "cond", source, number)
        return chosen

    def emit(
        self,
        run: Callable[..., Sequence[Any]],
        operands: list[Value],
        avals: list[Any],
        primitive: str,
        source: Source,
        choice: int | None = None,
    ) -> list[Value]:
        graph = self.graph
        sizes = [int(np.prod(a.shape, dtype=np.int64)) for a in avals]
        labels = [graph.labels[v] for v in operands]
        label = self.join(labels, [graph.size(v) for v in operands], sizes, primitive, source)
        outputs = [graph.new_value(aval, label) for aval in avals]
        graph.operations.append(
            Operation(run, tuple(operands), tuple(outputs), primitive, source, self.region, choice)
        )
        return outputs


def _evaluator(equation: Any) -> Callable[..., Sequence[Any]]:
    """Evaluates one equation as a jaxpr of its own: keeps its names, context and custom rules."""
    operands = [a for a in equation.invars if not isinstance(a, jex.Literal)]
    invars = list(dict.fromkeys(operands))
    places = [i for i, a in enumerate(equation.invars) if not isinstance(a, jex.Literal)]
    first = [places[operands.index(var)] for var in invars]
    kept = [isinstance(v, jex.DropVar) for v in equation.outvars]
    outvars = [v for v, drop in zip(equation.outvars, kept, strict=True) if not drop]
    debug_info = jex.DebugInfo("optimizer", equation.primitive.name, None, None)
    jaxpr = jex.Jaxpr((), invars, outvars, [equation], equation.effects, debug_info)
    evaluate = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))

    def run(*arrays: Any) -> Sequence[Any]:
        made = iter(evaluate(*(arrays[i] for i in first)))
        return [None if drop else next(made) for drop in kept]

    return run


def _choose(index: Any, *cases: Any) -> list[Any]:
    return [jax.lax.select_n(index != 0 if len(cases) == 2 else index, *cases)]


def _dependence(jaxpr: Any, marked: Sequence[bool]) -> list[bool]:
    """Which outputs of a jaxpr depend on marked inputs; calls inside are looked into."""
    env: dict[Any, bool] = dict(zip(jaxpr.invars, marked, strict=True))

    def read(atom: Any) -> bool:
        return not isinstance(atom, jex.Literal) and env.get(atom, False)

    for equation in jaxpr.eqns:
        operands = [read(a) for a in equation.invars]
        name = equation.primitive.name
        if name in _CALLS and _CALLS[name] in equation.params:
            callee = equation.params[_CALLS[name]]
            made = _dependence(getattr(callee, "jaxpr", callee), operands)
        else:
            made = [any(operands)] * len(equation.outvars)
        env.update(zip(equation.outvars, made, strict=True))
    return [read(a) for a in jaxpr.outvars]


_NOT_A_SOURCE = tuple(os.path.dirname(f) + os.sep for f in (jax.__file__, __file__))
_INNER = re.compile(r"^(\w+)\.<locals>\.")


def source_of(equation: Any) -> str | None:
    """The function that built the transform which asked for this equation, where known.

    Optax writes `def clip_by_global_norm(...): def update_fn(...)`: the innermost frame of that
    form outside JAX and this package names the transform.
    """
    traceback = getattr(getattr(equation, "source_info", None), "traceback", None)
    for frame in _frames(traceback):
        match = _INNER.match(frame.function_name)
        if match:
            return match.group(1)
    return None


def _frames(traceback: Any) -> Iterator[Any]:
    for frame in getattr(traceback, "frames", ()):
        if not frame.file_name.startswith(_NOT_A_SOURCE):
            yield frame
