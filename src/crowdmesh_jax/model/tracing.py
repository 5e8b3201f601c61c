"""Traces a layer's `init` and `apply` on shapes, and refuses what cannot be cut out or exported.

Each refusal names the layer, the leaf and a remedy. It makes no arrays and runs no layer.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from ..errors import CrowdMeshError, ModelError, ShapeMismatchError, UnsupportedLayerError
from .dependence import host_calls, inputs_read
from .macs import multiply_accumulates
from .trees import describe, leaf_paths, spec_of

PyTree = Any

MISFIT = (TypeError, ValueError, KeyError, IndexError, AttributeError, DeprecationWarning)
"""What layers raise when they are given other shapes or another tree than they expect. JAX warns
of a tree where it wants an array, which is an error where warnings are."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the chain a layer stands, for messages."""

    index: int
    name: str
    before: str | None
    x: PyTree
    known: PyTree | None = None
    """What the layer took before, if that is known."""

    @property
    def title(self) -> str:
        return f"layer {self.index} {self.name!r}"

    def failure(self, doing: str, exc: Exception) -> ModelError:
        """The typed error for what a layer's own code raised while it was traced."""
        told = (str(exc) or type(exc).__name__).strip().split("\n\n")[0]
        told = told if len(told) <= 500 else told[:500] + " ..."
        # A module that asks a tuple of arrays for its shape has NumPy stack them.
        stacked = isinstance(self.x, (tuple, list)) and isinstance(
            exc, jax.errors.TracerArrayConversionError
        )
        if not stacked and isinstance(exc, (jax.errors.JAXTypeError, jax.errors.JAXIndexError)):
            return UnsupportedLayerError(
                f"{self.title}: {doing} needs the numbers of its inputs in Python, which are not"
                f" known when it is traced; use jnp.where or lax.cond\n  reason {told}"
            )
        if stacked or isinstance(exc, MISFIT) or "flax" in type(exc).__module__:
            source = "the model's input"
            if self.before is not None:
                source = f"the output of layer {self.index - 1} {self.before!r}"
            return ShapeMismatchError(
                f"{self.title} cannot take {source}\n  given  {self._given()}\n{self._wanted()}"
                f"  reason {type(exc).__name__}: {told}{self._cure()}"
            )
        return ModelError(f"{self.title}: {doing} failed: {type(exc).__name__}: {told}")

    def _given(self) -> str:
        if jax.tree_util.all_leaves([self.x]):
            return describe(self.x)
        count = len(jax.tree.leaves(self.x))
        arrays = "1 array" if count == 1 else f"{count} arrays"
        return f"a {type(self.x).__name__} of {arrays} {describe(self.x)}"

    def _wanted(self) -> str:
        return f"  wanted {describe(self.known)}, with any rows\n" if self.known is not None else ""

    def _cure(self) -> str:
        """What to do where the layer got a tree: most layers take one array."""
        if jax.tree_util.all_leaves([self.x]):
            return ""
        (keys, _), *_ = jax.tree_util.tree_flatten_with_path(self.x)[0]
        first = "x" + jax.tree_util.keystr(keys)
        return (
            "\n  try    if it takes one array: give it one, by a layer before it that chooses or"
            f" joins, `lambda x: {first}` say"
        )


@dataclass(frozen=True, eq=False)
class InitTrace:
    """A layer's `init` as a jaxpr of (key, leaves of x)."""

    closed: core.ClosedJaxpr
    structure: Any
    """Of (params, state)."""
    params: PyTree
    state: PyTree

    @functools.cached_property
    def identity(self) -> str:
        """Equal for layers whose `init` is the same program."""
        # Jaxpr texts leave constants out, so these count by their bytes.
        digest = hashlib.sha256(str(self.closed.jaxpr).encode())
        for constant in self.closed.consts:
            array = np.asarray(constant)
            digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        return digest.hexdigest()


def trace_init(init: Callable[..., Any], place: Place, key: Any, x: PyTree) -> InitTrace:
    """Traces `init(key, x)` with an `x` that has shapes but no numbers.

    Raises:
        UnsupportedLayerError: A parameter that is no float array, or that depends on x.
        ShapeMismatchError: `init` cannot take such an x.
    """

    def traced(key: Any, x: PyTree) -> tuple[PyTree, PyTree]:
        made = init(key, x)
        if not (isinstance(made, tuple) and len(made) == 2):
            raise ModelError(
                f"{place.title}: init must return (params, state), got {type(made).__name__}"
            )
        for kind, tree in zip(("parameter", "state"), made, strict=True):
            for path, leaf in leaf_paths(tree):
                _check_leaf(place, kind, path, leaf)
        return jax.tree.map(jnp.asarray, made)

    try:
        closed, shapes = jax.make_jaxpr(traced, return_shape=True)(key, x)
    except CrowdMeshError:
        raise
    except Exception as exc:
        raise place.failure("init", exc) from exc
    _refuse_host_calls(place, "init", closed)
    if any(inputs_read(closed)[1:]):
        raise UnsupportedLayerError(
            f"{place.title}: its {_reader(closed, shapes)} depends on the input's numbers at"
            " initialisation, which are not there yet; make it from the key and the shapes alone"
        )
    params, state = spec_of(shapes)
    return InitTrace(closed, jax.tree.structure(shapes), params, state)


def trace_apply(
    apply: Callable[..., Any], place: Place, params: PyTree, state: PyTree, x: PyTree, key: Any
) -> tuple[PyTree, bool, int]:
    """Traces `apply(params, state, x, key)`: (spec of y, whether there is an aux, its MACs).

    Raises:
        ShapeMismatchError: It cannot take such an x.
        UnsupportedLayerError: State changes its shape, a callback, a leaf that cannot travel.
    """

    try:
        closed, (y, after, aux) = jax.make_jaxpr(apply, return_shape=True)(params, state, x, key)
    except CrowdMeshError:
        raise
    except Exception as exc:
        raise place.failure("apply", exc) from exc
    _refuse_host_calls(place, "apply", closed)
    _check_state(place, state, after)
    for path, leaf in leaf_paths(y):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise UnsupportedLayerError(
                f"{place.title}: output leaf {path!r} is a {leaf.dtype}, which cannot travel;"
                " layers get a key of their own"
            )
    if not jax.tree.leaves(y):
        raise UnsupportedLayerError(f"{place.title}: its output holds no array")
    if aux is not None and (not hasattr(aux, "shape") or aux.shape != ()):
        raise UnsupportedLayerError(
            f"{place.title}: the auxiliary loss must be a scalar, got {describe(aux)}; sum it"
        )
    return spec_of(y), aux is not None, multiply_accumulates(closed.jaxpr)


def _check_leaf(place: Place, kind: str, path: str, leaf: Any) -> None:
    where = f"{place.title}: {kind} leaf {path!r}"
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        raise UnsupportedLayerError(
            f"{where} is a {type(leaf).__name__}, no array; keep settings in the layer itself"
        )
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise UnsupportedLayerError(
            f"{where} is a {leaf.dtype}, which cannot travel; layers get a key of their own"
        )
    if kind == "parameter" and not jnp.issubdtype(leaf.dtype, jnp.inexact):
        raise UnsupportedLayerError(
            f"{where} is {leaf.dtype}: gradients need a float dtype; keep it in state, or make it"
            " a constant of the layer"
        )


def _check_state(place: Place, before: PyTree, after: PyTree) -> None:
    old, new = dict(leaf_paths(before)), dict(leaf_paths(spec_of(after)))
    for path in [*old, *(path for path in new if path not in old)]:
        was = describe(old[path]) if path in old else "nothing"
        now = describe(new[path]) if path in new else "nothing"
        if was != now:
            raise UnsupportedLayerError(
                f"{place.title}: state leaf {path!r} changes from {was} to {now} in one call;"
                " state must keep its leaves, shapes and dtypes"
            )
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise UnsupportedLayerError(
            f"{place.title}: state changes its containers from {jax.tree.structure(before)} to"
            f" {jax.tree.structure(after)} in one call; return the same kind of tree"
        )


def _refuse_host_calls(place: Place, function: str, closed: core.ClosedJaxpr) -> None:
    names = sorted(set(host_calls(closed.jaxpr)))
    if names:
        raise UnsupportedLayerError(
            f"{place.title}: {function} calls back into Python ({', '.join(names)}), which a"
            " device without this code cannot do; remove it (jax.debug.print, pure_callback,"
            " io_callback), or report values as metrics"
        )


def _reader(closed: core.ClosedJaxpr, shapes: tuple[PyTree, PyTree]) -> str:
    kinds: Mapping[str, PyTree] = dict(zip(("parameter", "state"), shapes, strict=True))
    leaves = [f"{kind} leaf {p!r}" for kind, tree in kinds.items() for p, _ in leaf_paths(tree)]
    for position, title in enumerate(leaves):
        chosen = [i == position for i in range(len(leaves))]
        if any(inputs_read(closed, chosen)[1:]):
            return title
    return "initial value"
