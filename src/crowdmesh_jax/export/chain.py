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

from ..errors import UnsupportedLayerError
from ..model.layer import Layer
from ..model.randomness import layer_key
from ..model.staged import StagedModel, call_layer
from ..model.trees import leaf_paths, spec_of
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


def build_chain(model: StagedModel, inputs_spec: Any) -> Chain:
    """Walks the layers on shapes alone.

    Args:
        inputs_spec: Pytree of `jax.ShapeDtypeStruct` for one microbatch.

    Raises:
        UnsupportedLayerError: A layer closes over a large array, or has side effects.
        ModelError: As `StagedModel.specs`, which refuses callbacks, misfits and odd leaves.
    """
    specs = model.specs(inputs_spec)
    views: list[LayerView] = []
    leaves, tree = jax.tree.flatten(spec_of(inputs_spec))
    plain = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    carry = Carry(plain, tree, has_aux=False, active=(False,) * len(plain))
    carries = [carry]
    by_path: dict[Path, LeafSpec] = {}
    known: dict[Any, Carry] = {}
    for index, (layer, spec) in enumerate(zip(model.layers, specs.layers, strict=True)):
        view = _view(index, layer, spec.params, spec.state)
        by_path.update({(leaf.layer, leaf.path): leaf for leaf in view.params})
        program = (layer.init, layer.apply, carry)
        if view.borrows:
            carry = _step(view, carry, by_path)
        else:
            if program not in known:
                known[program] = _step(view, carry, by_path)
            carry = known[program]
        views.append(view)
        carries.append(carry)
    return Chain(tuple(views), tuple(carries))


def _view(index: int, layer: Layer, params: Any, state: Any) -> LayerView:
    return LayerView(
        index,
        layer,
        flat_leaves("param", layer.name, params),
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
    read = [*view.params, *(by_path[path] for path in view.borrows.values())]
    inputs = [abstract(leaf) for leaf in (*read, *view.state)]
    captured: dict[str, Any] = {}

    def run(*arrays: Any) -> list[Any]:
        flat = list(arrays)
        params = {(s.layer, s.path): flat.pop(0) for s in read}
        state = {(s.layer, s.path): flat.pop(0) for s in view.state}
        x = [flat.pop(0) for _ in before.leaves]
        y, _, aux = apply_layer(view, params, state, x, before.tree, flat, train=True)
        captured["y"], captured["aux"] = y, aux is not None
        return [*jax.tree.leaves(y), *([] if aux is None else [aux])]

    scalars = [jax.ShapeDtypeStruct((), jnp.uint32)] * 3
    closed = jp.trace(run, [*inputs, *before.leaves, *scalars])
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
    y, new, aux = call_layer(view.layer, own, old, jax.tree.unflatten(x_tree, list(x)), key, train)
    leaves = jax.tree.leaves(new)
    new_state = {(s.layer, s.path): leaf for s, leaf in zip(view.state, leaves, strict=True)}
    return y, new_state, aux
