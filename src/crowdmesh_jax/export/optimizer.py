"""Cuts any optax optimizer along the layers of a model into programs that each stage can run.

The optimizer is traced once for the whole parameter tree, on shapes only, so that labels, masks
and paths mean what the user wrote; then every operation is given to the layer it belongs to.
Knows optax and parameter trees; the cut itself is in `optimizer_slice`, jaxprs in
`optimizer_graph`. Knows nothing of stages, bundles or plans beyond a tuple of layer names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import KeyPath, tree_flatten_with_path, tree_unflatten

from ..errors import UnsupportedOptimizerError
from ..model.trees import key_text
from ..programs.manifest import LeafSpec
from .flat import FlatProgram, abstract, leaf_spec
from .optimizer_graph import GLOBAL, Graph, Kind, Label, Value, build_graph
from .optimizer_regions import as_function
from .optimizer_slice import REMEDY, Placement, join, place

logger = logging.getLogger(__name__)

Key = tuple[str, str, str]
GLOBAL_ELEMENTS = 1024
"""An optimizer value that no layer owns may have this many elements: every stage keeps it and each
commit carries it."""
CONSTANT_BYTES = 65536
"""Arrays closed over by the optimizer become program bytes; larger ones are refused."""


def gradient_dtype(dtype: Any) -> np.dtype:
    """What gradients of a parameter are summed in: float32 for 16-bit floats, else its own."""
    dtype = np.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        return np.dtype(np.float32)
    return dtype


def slice_optimizer(
    optimizer: optax.GradientTransformation, param_specs: Mapping[str, Any]
) -> SlicedOptimizer:
    """Traces `optimizer.update` and `optax.apply_updates` and cuts them by layer.

    Gradients enter in `gradient_dtype` and are cast to the parameter's dtype first: from there on
    the computation is what `jax.grad` and the optimizer do in one process.

    Args:
        optimizer: Any gradient transformation whose update needs no extra arguments.
        param_specs: {layer name: tree of `jax.ShapeDtypeStruct`}, layers in model order.

    Raises:
        UnsupportedOptimizerError: It mixes layers other than through one round of scalars, wants
            extra arguments, or cannot be traced. Names the operation and what to do.
    """
    specs = {layer: jax.tree.map(_strong, tree) for layer, tree in param_specs.items()}
    traced = _trace(optimizer, specs)
    return SlicedOptimizer(optimizer, traced, tuple(param_specs))


class SlicedOptimizer:
    """An optimizer as programs per set of layers. Made by `slice_optimizer`.

    One step: `scalars` on every stage, `reduce` on stage 0, its results to all, then `update` on
    every stage with the globals from *before* the step. Stages without cut scalars skip the first.
    """

    def __init__(
        self, optimizer: optax.GradientTransformation, traced: _Traced, layers: tuple[str, ...]
    ) -> None:
        self._optimizer = optimizer
        self._traced = traced
        self._layers = layers
        graph = traced.graph
        placement = place(graph, [leaf.layer or None for leaf in traced.outputs], layers)
        self._placement: Placement = placement
        self._leaf_of = dict(zip(graph.inputs, traced.inputs, strict=True))
        counts = dict.fromkeys(layers, 0)
        cut: list[LeafSpec] = []
        for value in placement.cut:
            layer = graph.labels[value].layer or ""
            cut.append(leaf_spec("cut", layer, str(counts[layer]), graph.avals[value]))
            counts[layer] += 1
        self.cut_leaves: tuple[LeafSpec, ...] = tuple(cut)
        """Scalars that each step sends to stage 0, with the layer they come from."""
        self.shared_leaves: tuple[LeafSpec, ...] = tuple(
            leaf_spec("shared", "", str(i), graph.avals[v]) for i, v in enumerate(placement.shared)
        )
        """What `reduce` makes for `update` besides new globals."""
        leaves = traced.state_leaves
        self.opt_leaves: tuple[LeafSpec, ...] = tuple(x for x in leaves if x.role == "opt")
        """Optimizer state that belongs to a layer, in the order of the state tree."""
        self.global_leaves: tuple[LeafSpec, ...] = tuple(x for x in leaves if x.role == "global")
        """Optimizer state that every stage keeps: counts, schedules, hyperparameters."""

    def scalars(self, layers: tuple[str, ...]) -> FlatProgram | None:
        """grad, param, opt, global leaves of `layers` -> their cut leaves; None without any."""
        chosen = [
            (value, leaf)
            for value, leaf in zip(self._placement.cut, self.cut_leaves, strict=True)
            if leaf.layer in layers
        ]
        if not chosen:
            return None
        return self._program([v for v, _ in chosen], [leaf for _, leaf in chosen], {})

    def reduce(self) -> FlatProgram | None:
        """Cut leaves of all layers and globals -> all new globals and shared leaves.

        None if there are neither globals nor cut scalars.
        """
        if not self.global_leaves and not self.cut_leaves:
            return None
        values, leaves = self._new(lambda leaf: leaf.role == "global")
        values += self._placement.shared
        leaves += self.shared_leaves
        known = dict(zip(self._placement.cut, self.cut_leaves, strict=True))
        return self._program(values, leaves, known)

    def update(self, layers: tuple[str, ...]) -> FlatProgram:
        """param, opt, grad, old global, shared leaves -> new param and opt leaves of `layers`.

        Donates parameters and optimizer state. Without parameters in `layers` it has no outputs.
        """
        values, leaves = self._new(lambda leaf: leaf.layer in layers)
        known = dict(zip(self._placement.shared, self.shared_leaves, strict=True))
        return self._program(values, leaves, known, donate=("param", "opt"))

    def init_arrays(self, params: Mapping[str, Any]) -> dict[Key, np.ndarray]:
        """The initial optimizer state of the whole model, keyed by (role, layer, path)."""
        state = self._optimizer.init(dict(params))
        arrays = jax.tree.leaves(state)
        return {
            leaf.key: np.asarray(key.unwrap(array), dtype=abstract(leaf).dtype)
            for leaf, key, array in zip(
                self._traced.state_leaves, self._traced.random_keys, arrays, strict=True
            )
        }

    def assemble(self, arrays: Mapping[Key, Any]) -> Any:
        """The plain optax state, put together from opt and global leaves."""
        leaves = [
            key.wrap(arrays[leaf.key])
            for leaf, key in zip(self._traced.state_leaves, self._traced.random_keys, strict=True)
        ]
        return tree_unflatten(self._traced.state_tree, leaves)

    def describe_global(self) -> str | None:
        """What crosses between layers in a step, in words; None if nothing does."""
        if not self.cut_leaves:
            return None
        made = len(self.shared_leaves) or len(self.global_leaves)
        number = "one global value" if made == 1 else f"{made} global values"
        return f"{number} per step ({', '.join(self._placement.mixers)})"

    def _new(self, wanted: Callable[[LeafSpec], bool]) -> tuple[list[Value], list[LeafSpec]]:
        pairs = zip(self._traced.graph.outputs, self._traced.outputs, strict=True)
        chosen = [(value, leaf) for value, leaf in pairs if wanted(leaf)]
        return [value for value, _ in chosen], [leaf for _, leaf in chosen]

    def _program(
        self,
        outputs: Sequence[Value],
        leaves: Sequence[LeafSpec],
        known: Mapping[Value, LeafSpec],
        donate: tuple[str, ...] = (),
    ) -> FlatProgram:
        """The part of the graph that makes `outputs` from inputs and `known` values."""
        graph = self._traced.graph
        operations, ends = graph.needed(outputs, known.__contains__)
        order = {value: i for i, value in enumerate(known)}  # known values first, in their order
        ends = sorted(ends, key=lambda v: (order.get(v, len(order)), v))
        inputs = [known.get(v) or self._leaf_of[v] for v in ends]
        return FlatProgram(
            fn=as_function(graph, operations, ends, outputs),
            inputs=tuple(inputs),
            outputs=tuple(leaves),
            donate=tuple(i for i, leaf in enumerate(inputs) if leaf.role in donate),
        )


@dataclass(frozen=True, slots=True)
class _RandomKey:
    """Whether a leaf is a typed PRNG key; those travel as their uint32 data."""

    impl: Any = None

    def unwrap(self, array: Any) -> Any:
        return array if self.impl is None else jax.random.key_data(array)

    def wrap(self, array: Any) -> Any:
        if self.impl is None:
            return array
        return jax.random.wrap_key_data(jnp.asarray(array), impl=self.impl)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Traced:
    """The whole update as a graph, with a leaf for each input and output."""

    graph: Graph
    inputs: tuple[LeafSpec, ...]
    outputs: tuple[LeafSpec, ...]
    state_leaves: tuple[LeafSpec, ...]
    state_tree: Any
    random_keys: tuple[_RandomKey, ...]


def _trace(optimizer: optax.GradientTransformation, specs: dict[str, Any]) -> _Traced:
    params, param_tree = tree_flatten_with_path(specs)
    param_leaves = [leaf_spec("param", key_text(p[0]), _join(p[1:]), s) for p, s in params]
    state = _shapes("init", optimizer.init, specs)
    state_paths, state_tree = tree_flatten_with_path(state)
    random_keys = tuple(_random_key(leaf) for _, leaf in state_paths)
    raw_state = [
        jax.eval_shape(key.unwrap, leaf)
        for key, (_, leaf) in zip(random_keys, state_paths, strict=True)
    ]
    by_path = dict(params)
    owners = [_owner(path, leaf.shape, by_path) for path, leaf in state_paths]
    names = _unique(_join(path) for path, _ in state_paths)
    state_leaves = [
        leaf_spec("opt" if owner else "global", owner or "", name, leaf)
        for owner, name, leaf in zip(owners, names, raw_state, strict=True)
    ]
    grad_leaves = [
        LeafSpec("grad", x.layer, x.path, gradient_dtype(x.dtype).name, x.shape)
        for x in param_leaves
    ]
    inputs = (*grad_leaves, *state_leaves, *param_leaves)

    def whole(*arrays: Any) -> list[Any]:
        flat = list(arrays)
        grads, rest = flat[: len(params)], flat[len(params) :]
        old_state, old = rest[: len(state_leaves)], rest[len(state_leaves) :]
        cast = [g.astype(p.dtype) for g, p in zip(grads, old, strict=True)]
        wrapped = [key.wrap(x) for key, x in zip(random_keys, old_state, strict=True)]
        tree = tree_unflatten(param_tree, old)
        updates, new_state = optimizer.update(
            tree_unflatten(param_tree, cast), tree_unflatten(state_tree, wrapped), tree
        )
        new = optax.apply_updates(tree, updates)
        leaves, new_tree = jax.tree.flatten(new_state)
        if new_tree != state_tree:
            raise UnsupportedOptimizerError(
                "the optimizer's state changes its structure in an update; "
                f"it was {state_tree} and becomes {new_tree}. Keep the structure fixed."
            )
        kept = [key.unwrap(x) for key, x in zip(random_keys, leaves, strict=True)]
        return [*jax.tree.leaves(new), *kept]

    closed = _shapes("update", jax.make_jaxpr(whole), *map(abstract, inputs), evaluate=False)
    outputs = (*param_leaves, *state_leaves)
    for leaf, aval in zip(outputs, closed.out_avals, strict=True):
        if (leaf.shape, leaf.dtype) != (aval.shape, np.dtype(aval.dtype).name):
            where = f" of layer {leaf.layer!r}" if leaf.layer else ""
            raise UnsupportedOptimizerError(
                f"{leaf.role} leaf {leaf.path!r}{where} is {leaf.dtype}{list(leaf.shape)} and "
                f"becomes {aval.dtype}{list(aval.shape)} in an update. Make the optimizer keep "
                "shapes and dtypes."
            )
    labels = [Label(Kind.LOCAL, leaf.layer) if leaf.layer else GLOBAL for leaf in inputs]
    graph = build_graph(closed, labels, join)
    _check_sizes(state_leaves, graph)
    return _Traced(
        graph=graph,
        inputs=inputs,
        outputs=outputs,
        state_leaves=tuple(state_leaves),
        state_tree=state_tree,
        random_keys=random_keys,
    )


def _shapes(what: str, fn: Callable[..., Any], *args: Any, evaluate: bool = True) -> Any:
    """Runs user code on shapes; what it raises becomes one typed error."""
    try:
        return jax.eval_shape(fn, *args) if evaluate else fn(*args)
    except UnsupportedOptimizerError:
        raise
    except TypeError as exc:
        if "required keyword-only argument" not in str(exc):
            raise _untraceable(what, exc) from exc
        raise UnsupportedOptimizerError(
            f"the optimizer's update wants extra arguments: {exc}. Stages update without the loss "
            "value or the whole gradient; use an optimizer whose update takes "
            "(grads, state, params) only."
        ) from exc
    except Exception as exc:  # whatever the user's optimizer raises
        raise _untraceable(what, exc) from exc


def _untraceable(what: str, exc: Exception) -> UnsupportedOptimizerError:
    line = str(exc).strip().splitlines()[0] if str(exc).strip() else ""
    return UnsupportedOptimizerError(
        f"the optimizer's {what} cannot be traced for {{layer: parameters}}: "
        f"{type(exc).__name__}: {line}. It must be a pure function of (grads, state, params)."
    )


def _check_sizes(state_leaves: Iterable[LeafSpec], graph: Graph) -> None:
    for leaf in state_leaves:
        if leaf.role == "global" and np.prod(leaf.shape, dtype=np.int64) > GLOBAL_ELEMENTS:
            raise UnsupportedOptimizerError(
                f"optimizer state {leaf.path!r} of shape {leaf.shape} belongs to no layer and is "
                f"too large to be kept by every stage ({GLOBAL_ELEMENTS} elements). {REMEDY}"
            )
    for constant in graph.constants.values():
        if getattr(constant, "nbytes", 0) > CONSTANT_BYTES:
            raise UnsupportedOptimizerError(
                f"the optimizer closes over an array of shape {constant.shape} "
                f"({constant.nbytes} bytes, at most {CONSTANT_BYTES}). Keep it in the optimizer's "
                "state instead."
            )


def _owner(path: KeyPath, shape: tuple[int, ...], params: Mapping[KeyPath, Any]) -> str | None:
    """The layer whose parameter's path occurs in a state leaf's path and whose shape fits.

    At the end of the path any shape fits (factored moments, one norm per leaf). Further inside
    (per-axis accumulators) the dimensions must be the parameter's or 1, or else the label of a
    `multi_transform` that is also a layer's name would claim its count.
    """
    best: tuple[bool, int, str] | None = None
    for start in range(len(path)):
        for end in range(start + 1, len(path) + 1):
            spec = params.get(path[start:end])
            if spec is None:
                continue
            is_end = end == len(path)
            if is_end or (len(shape) > 0 and set(shape) <= {1, *spec.shape}):
                best = max(best or (False, 0, ""), (is_end, end - start, key_text(path[start])))
    return best[2] if best else None


def _random_key(leaf: Any) -> _RandomKey:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        impl: list[Any] = []
        jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), leaf)
        return _RandomKey(impl[0])
    return _RandomKey()


def _strong(spec: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype)


def _join(path: KeyPath) -> str:
    return "/".join(map(key_text, path))


def _unique(names: Iterable[str]) -> list[str]:
    """Numbers repeats, which only odd keys ("a/b" beside {"a": {"b"}}) can make."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return result
