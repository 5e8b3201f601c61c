"""What each layer and each boundary of a model looks like, found once by tracing layer by layer.

Knows layers and jaxprs, nothing of stages: which leaves carry gradients at a boundary must not
depend on where the plan cuts. Refuses what cannot become a stage program, naming the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import CrowdMeshError, ModelError, UnsupportedLayerError
from ..model.layer import Layer
from ..model.randomness import layer_key
from ..model.trees import leaf_paths
from ..programs.manifest import LeafSpec
from . import jaxpr as jp
from .flat import abstract, leaf_spec

Key = tuple[str, str, str]
Path = tuple[str, str]
AUX = "aux"
CAPTURED_BYTES_BOUND = 65536


@dataclass(frozen=True)
class Carry:
    """What crosses a boundary: the flat leaves of x, then the summed auxiliary loss, if any."""

    leaves: tuple[jax.ShapeDtypeStruct, ...]
    tree: Any
    has_aux: bool
    active: tuple[bool, ...]
    """Per leaf (the auxiliary loss last): whether a gradient comes back for it."""

    @property
    def paths(self) -> tuple[str, ...]:
        return (*map(str, range(len(self.leaves))), *((AUX,) if self.has_aux else ()))

    def specs(self, role: str, *, active_only: bool = False) -> tuple[LeafSpec, ...]:
        """The leaves under a role (x, y, dx, dy)."""
        scalar = (jax.ShapeDtypeStruct((), jnp.float32),) if self.has_aux else ()
        every = zip(self.paths, (*self.leaves, *scalar), self.active, strict=True)
        return tuple(
            leaf_spec(role, "", path, leaf)
            for path, leaf, active in every
            if active or not active_only
        )


@dataclass(frozen=True)
class LayerView:
    """One layer with its flat leaves."""

    index: int
    layer: Layer
    params: tuple[LeafSpec, ...]
    params_tree: Any
    state: tuple[LeafSpec, ...]
    state_tree: Any
    borrows: Mapping[str, Path]


@dataclass(frozen=True)
class Chain:
    """A model's layers and the boundaries before, between and after them."""

    layers: tuple[LayerView, ...]
    carries: tuple[Carry, ...]
    """`carries[i]` lies before layer i; the last one holds the model's outputs."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(view.layer.name for view in self.layers)


def build_chain(model: Any, inputs_spec: Any) -> Chain:
    """Walks the layers on shapes alone.

    Args:
        model: A `StagedModel`.
        inputs_spec: Pytree of `jax.ShapeDtypeStruct` for one microbatch.

    Raises:
        UnsupportedLayerError: A layer calls back into Python, closes over a large array, has a
            parameter that is no floating array, or changes its statistics' shapes.
    """
    specs = model.specs(inputs_spec)
    views: list[LayerView] = []
    leaves, tree = jax.tree.flatten(inputs_spec)
    plain = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    carry = Carry(plain, tree, has_aux=False, active=(False,) * len(plain))
    carries = [carry]
    by_path: dict[Path, LeafSpec] = {}
    for index, (layer, spec) in enumerate(zip(model.layers, specs.layers, strict=True)):
        view = _view(index, layer, spec.params, spec.state)
        by_path.update({(leaf.layer, leaf.path): leaf for leaf in view.params})
        carry = _step(view, carry, by_path)
        views.append(view)
        carries.append(carry)
    return Chain(tuple(views), tuple(carries))


def _view(index: int, layer: Layer, params: Any, state: Any) -> LayerView:
    param_leaves = flat_leaves("param", layer.name, params)
    for leaf in param_leaves:
        if not jp.is_inexact(abstract(leaf)):
            raise UnsupportedLayerError(
                f"layer {layer.name!r}: parameter {leaf.path!r} is {leaf.dtype}; parameters must be"
                " floating-point arrays, keep integers in the layer's state"
            )
    return LayerView(
        index,
        layer,
        param_leaves,
        jax.tree.structure(params),
        flat_leaves("state", layer.name, state),
        jax.tree.structure(state),
        dict(layer.borrows),
    )


def flat_leaves(role: str, layer: str, tree: Any) -> tuple[LeafSpec, ...]:
    """The leaves of a tree of arrays or specs, in flattening order."""
    return tuple(leaf_spec(role, layer, path, leaf) for path, leaf in leaf_paths(tree))


def _step(view: LayerView, before: Carry, by_path: Mapping[Path, LeafSpec]) -> Carry:
    """Traces one layer in training mode and derives the boundary behind it."""
    name = view.layer.name
    for local, path in view.borrows.items():
        if path not in by_path:
            raise ModelError(
                f"layer {name!r} borrows {local!r} from {path}, which is no parameter of an"
                " earlier layer"
            )
    read = [*view.params, *(by_path[path] for path in view.borrows.values())]
    inputs = [abstract(leaf) for leaf in (*read, *view.state)]
    captured: dict[str, Any] = {}

    def run(*arrays: Any) -> list[Any]:
        flat = list(arrays)
        params = {(s.layer, s.path): flat.pop(0) for s in read}
        state = {(s.layer, s.path): flat.pop(0) for s in view.state}
        x = [flat.pop(0) for _ in before.leaves]
        y, new_state, aux = apply_layer(view, params, state, x, before.tree, flat, train=True)
        captured["y"], captured["aux"] = y, aux is not None
        for spec in view.state:
            value = new_state[spec.layer, spec.path]
            if (value.shape, value.dtype) != (spec.shape, jnp.dtype(spec.dtype)):
                raise UnsupportedLayerError(
                    f"layer {name!r}: state {spec.path!r} was {spec.dtype}{list(spec.shape)} and"
                    f" becomes {value.dtype}{list(value.shape)}; state must keep shape and dtype"
                )
        return [*jax.tree.leaves(y), *([] if aux is None else [aux])]

    scalars = [jax.ShapeDtypeStruct((), jnp.uint32)] * 3
    closed = traced_layer(name, run, [*inputs, *before.leaves, *scalars])
    refuse(closed, f"layer {name!r}")
    flowing = sum(1 << i for i in range(len(read)))
    first_x = len(inputs)
    for i in range(len(before.leaves)):
        flowing |= int(before.active[i]) << (first_x + i)
    active = [
        bool(mask & flowing) and jp.is_inexact(aval)
        for mask, aval in zip(
            jp.dependence(closed, differentiable=True), closed.out_avals, strict=True
        )
    ]
    y_leaves, y_tree = jax.tree.flatten(captured["y"])
    own_aux = active.pop() if captured["aux"] else False
    has_aux = before.has_aux or captured["aux"]
    if has_aux:
        active.append(own_aux or (before.has_aux and before.active[-1]))
    after = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in y_leaves)
    return Carry(after, y_tree, has_aux, tuple(active))


def traced_layer(name: str, fn: Any, specs: Sequence[Any]) -> Any:
    """Traces user code; what it raises gets the layer's name."""
    try:
        return jp.trace(fn, specs)
    except CrowdMeshError:
        raise
    except Exception as exc:
        raise UnsupportedLayerError(
            f"layer {name!r} cannot be traced: {type(exc).__name__}: {exc}"
        ) from exc


def refuse(closed: Any, where: str) -> None:
    """Refuses callbacks, effects and large captured arrays.

    Raises:
        UnsupportedLayerError: One is there; says which and what to do.
    """
    found = jp.callbacks(closed)
    if found:
        raise UnsupportedLayerError(
            f"{where} calls back into Python ({', '.join(found)}), which no device can run; remove"
            " the call, or train in one process"
        )
    if closed.jaxpr.effects:
        raise UnsupportedLayerError(
            f"{where} has side effects {sorted(map(str, closed.jaxpr.effects))}; stage programs"
            " must be pure functions"
        )
    size = sum(c.nbytes for c in jp.captured(closed))
    if size > CAPTURED_BYTES_BOUND:
        shapes = [tuple(c.shape) for c in jp.captured(closed)]
        raise UnsupportedLayerError(
            f"{where} closes over {size} bytes of arrays (shapes {shapes[:3]}), which would become"
            f" program bytes (bound {CAPTURED_BYTES_BOUND}); make them parameters, state or inputs"
        )


def apply_layer(
    view: LayerView,
    params: Mapping[Path, Any],
    state: Mapping[Path, Any],
    x: Sequence[Any],
    x_tree: Any,
    scalars: Sequence[Any],
    *,
    train: bool,
) -> tuple[Any, dict[Path, Any], Any]:
    """Runs one layer on flat leaves; `scalars` are seed, step and microbatch.

    Returns:
        y as a tree, the new state by (layer, path), and the layer's auxiliary loss or None.
    """
    seed, step, microbatch = scalars
    own = jax.tree.unflatten(view.params_tree, [params[s.layer, s.path] for s in view.params])
    if view.borrows:
        own = {**own, **{local: params[path] for local, path in view.borrows.items()}}
    old = jax.tree.unflatten(view.state_tree, [state[s.layer, s.path] for s in view.state])
    key = layer_key(seed, step, microbatch, view.index)
    y, new, aux = view.layer.apply(own, old, jax.tree.unflatten(x_tree, list(x)), key, train)
    leaves, tree = jax.tree.flatten(new)
    if tree != view.state_tree:
        raise UnsupportedLayerError(
            f"layer {view.layer.name!r}: its state changes structure from {view.state_tree} to"
            f" {tree}; state must keep its structure"
        )
    new_state = {
        (s.layer, s.path): jnp.asarray(leaf) for s, leaf in zip(view.state, leaves, strict=True)
    }
    y = jax.tree.map(jnp.asarray, y)
    return y, new_state, None if aux is None else jnp.asarray(aux, jnp.float32)
