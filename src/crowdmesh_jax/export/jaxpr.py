"""Reading and slicing traced programs: inlining, dependence, dead code, captured constants.

All surgery on jaxprs for stage programs is here. It knows equations and variables, nothing of
layers or stages. Inner programs other than plain jit calls (scan, while, cond, remat, custom
rules) stay whole: each of their results is taken to depend on each of their arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

Atom = core.Var | core.Literal

_INLINED = {"pjit": "jaxpr", "jit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
_CALLBACKS = frozenset({"pure_callback", "io_callback", "debug_callback", "debug_print"})


def trace(fn: Callable[..., Any], specs: Sequence[jax.ShapeDtypeStruct]) -> core.ClosedJaxpr:
    """Traces `fn(*arrays)`; plain jit calls inside are written out."""
    return inline(jax.make_jaxpr(fn)(*specs))


def inline(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """Writes the bodies of plain jit calls into the program, so that variables show identity."""
    consts: list[Any] = list(closed.consts)
    constvars: list[core.Var] = list(closed.jaxpr.constvars)
    eqns: list[core.JaxprEqn] = []

    def walk(jaxpr: core.Jaxpr, env: dict[core.Var, Atom], names: Any) -> list[Atom]:
        def read(atom: Atom) -> Atom:
            return atom if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            invars = [read(v) for v in eqn.invars]
            source = eqn.source_info
            if names is not None:
                source = source.replace(name_stack=names + source.name_stack)
            inner = eqn.params.get(_INLINED.get(eqn.primitive.name, ""))
            if inner is not None:
                body, values = (
                    (inner.jaxpr, inner.consts)
                    if isinstance(inner, core.ClosedJaxpr)
                    else (inner, ())
                )
                inner_env: dict[core.Var, Atom] = dict(zip(body.invars, invars, strict=True))
                for var, value in zip(body.constvars, values, strict=True):
                    fresh = core.Var(var.aval)
                    constvars.append(fresh)
                    consts.append(value)
                    inner_env[var] = fresh
                results = walk(body, inner_env, source.name_stack)
                env.update(zip(eqn.outvars, results, strict=True))
                continue
            outvars = []
            for var in eqn.outvars:
                fresh = type(var)(var.aval)
                env[var] = fresh
                outvars.append(fresh)
            eqns.append(eqn.replace(invars=invars, outvars=outvars, source_info=source))
        return [read(v) for v in jaxpr.outvars]

    top = closed.jaxpr
    env: dict[core.Var, Atom] = {v: v for v in (*top.constvars, *top.invars)}
    outvars = walk(top, env, None)
    names = _names(top, len(top.invars), len(outvars))
    jaxpr = core.Jaxpr(constvars, top.invars, outvars, eqns, top.effects, names)
    return core.ClosedJaxpr(jaxpr, consts)


def _names(jaxpr: core.Jaxpr, inputs: int, outputs: int) -> Any:
    """Debug names without the user's file and line: they would become bytes of the program."""
    return jaxpr.debug_info._replace(
        func_src_info="stage",
        arg_names=tuple(f"a{i}" for i in range(inputs)),
        result_paths=tuple(f"r{i}" for i in range(outputs)),
    )


def dependence(closed: core.ClosedJaxpr, *, differentiable: bool = False) -> list[int]:
    """Which inputs each output depends on, one bit mask per output (bit i: input i).

    Args:
        differentiable: Follow only inexact values, so that what passes through an integer
            (an argmax, say) does not count: no gradient flows there.
    """
    jaxpr = closed.jaxpr
    masks: dict[core.Var, int] = {}
    for index, var in enumerate(jaxpr.invars):
        masks[var] = 1 << index if not differentiable or is_inexact(var.aval) else 0

    def read(atom: Atom) -> int:
        return 0 if isinstance(atom, core.Literal) else masks.get(atom, 0)

    for eqn in jaxpr.eqns:
        mask = 0
        if not (differentiable and eqn.primitive.name == "stop_gradient"):
            for atom in eqn.invars:
                mask |= read(atom)
        for var in eqn.outvars:
            masks[var] = mask if not differentiable or is_inexact(var.aval) else 0
    return [read(v) for v in jaxpr.outvars]


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is of a floating or complex type, so that gradients exist."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jax.numpy.issubdtype(dtype, jax.numpy.inexact)


def select(
    closed: core.ClosedJaxpr, outputs: Sequence[int]
) -> tuple[core.ClosedJaxpr, tuple[int, ...]]:
    """The part of a program that makes the given outputs.

    Returns:
        The smaller program and the indices of the inputs that it still takes, in order.
    """
    jaxpr = closed.jaxpr
    invars = [*jaxpr.constvars, *jaxpr.invars]
    picked = core.Jaxpr(
        (),
        invars,
        [jaxpr.outvars[i] for i in outputs],
        jaxpr.eqns,
        jaxpr.effects,
        _names(jaxpr, len(invars), len(outputs)),
    )
    live, used = partial_eval.dce_jaxpr(picked, [True] * len(outputs))
    split = len(jaxpr.constvars)
    consts = [c for c, u in zip(closed.consts, used[:split], strict=True) if u]
    kept = tuple(i for i, u in enumerate(used[split:]) if u)
    small = core.Jaxpr(
        live.invars[: len(consts)],
        live.invars[len(consts) :],
        live.outvars,
        live.eqns,
        live.effects,
        _names(jaxpr, len(kept), len(outputs)),
    )
    return core.ClosedJaxpr(small, consts), kept


def as_function(closed: core.ClosedJaxpr) -> Callable[..., tuple[Any, ...]]:
    """The program as `fn(*arrays) -> tuple of arrays`."""
    run = core.jaxpr_as_fun(closed)
    return lambda *arrays: tuple(run(*arrays))


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """All equations, those of inner programs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def callbacks(closed: core.ClosedJaxpr) -> list[str]:
    """Names of host callbacks in the program."""
    found = {eqn.primitive.name for eqn in equations(closed.jaxpr)}
    return sorted(found & _CALLBACKS)


def captured(closed: core.ClosedJaxpr) -> list[Any]:
    """Arrays that the program carries in itself, because a function closed over them."""
    found = {id(c): c for c in closed.consts}

    def literals(jaxpr: core.Jaxpr) -> None:
        atoms = [*jaxpr.outvars]
        for eqn in jaxpr.eqns:
            atoms.extend(eqn.invars)
            for value in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda v: isinstance(v, core.ClosedJaxpr)
            ):
                if isinstance(value, core.ClosedJaxpr):
                    found.update((id(c), c) for c in value.consts)
        for atom in atoms:
            if isinstance(atom, core.Literal) and np.ndim(atom.val):
                found[id(atom.val)] = atom.val
        for eqn in jaxpr.eqns:
            for inner in core.jaxprs_in_params(eqn.params):
                literals(inner)

    literals(closed.jaxpr)
    return [c for c in found.values() if hasattr(c, "nbytes")]


def is_variable(atom: Any) -> bool:
    """Whether an output is a variable (and no literal constant)."""
    return isinstance(atom, core.Var)
