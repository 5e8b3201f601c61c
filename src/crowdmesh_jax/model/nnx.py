"""Flax nnx modules as layers: parameters, rng state and the rest are split once for each mode.

Knows flax, and imports it only when a module is there to be adapted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..errors import ModelError
from .functions import optional_arguments
from .layer import Layer
from .linen import LOSSES, MODE_FLAGS, sum_losses
from .trees import key_text


def is_nnx(item: Any) -> bool:
    """Whether it is an nnx module; does not import flax."""
    return any(
        kind.__name__ == "Module" and kind.__module__.startswith("flax.nnx")
        for kind in type(item).__mro__
    )


def is_factory(item: Any) -> bool:
    """Whether it is a function of `rngs`, which makes an nnx module."""
    return callable(item) and not is_nnx(item) and bool(optional_arguments(item, ("rngs",)))


@dataclass(frozen=True, eq=False)
class _Part:
    """One kind of an nnx module's variables: the paths and the structure, no values."""

    paths: tuple[tuple[str, ...], ...]
    specs: tuple[Any, ...]
    structure: Any

    @classmethod
    def of(cls, state: Any) -> _Part:
        found, structure = jax.tree_util.tree_flatten_with_path(state)
        return cls(tuple(_path(k) for k, _ in found), tuple(leaf for _, leaf in found), structure)

    def nested(self, state: Any) -> dict[str, Any]:
        """The values as nested dicts with string keys."""
        tree: dict[str, Any] = {}
        leaves = jax.tree_util.tree_flatten_with_path(state)[0]
        for keys, leaf in leaves:
            *parents, last = _path(keys)
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = leaf
        return tree

    def state(self, tree: Any) -> Any:
        """The nnx state again from nested dicts."""
        leaves = []
        for path in self.paths:
            node = tree
            for key in path:
                node = node[key]
            # nnx writes into a numpy array in place: BatchNorm would change the caller's state.
            leaves.append(jnp.asarray(node))
        return jax.tree.unflatten(self.structure, leaves)

    def fresh_keys(self, key: Any) -> Any:
        """Rng state made anew from the layer's key: counts 0, key `i` folded in."""
        leaves: list[Any] = []
        for index, spec in enumerate(self.specs):
            if not jnp.issubdtype(spec.dtype, jax.dtypes.prng_key):
                leaves.append(jnp.zeros(spec.shape, spec.dtype))
                continue
            own = jax.random.fold_in(key, index)
            leaves.append(jax.random.split(own, spec.shape) if spec.shape else own)
        return jax.tree.unflatten(self.structure, leaves)


def from_nnx(item: Any, name: str) -> Layer:
    """A layer from a factory `f(rngs) -> module`, or from a module that exists.

    A factory's parameters come from the job's seed; those of a module that exists are as they
    are (pretrained weights, say). Variables but parameters, rng state and sown intermediates are
    state. `module.sow(nnx.Intermediate, "losses", value)` adds `value` to the loss.

    Rng state is not state: it is made anew from the layer's key at each call, else results would
    depend on the plan and on recovery.

    Raises:
        ModelError: Neither a module nor a factory of one.
    """
    from flax import nnx

    factory = is_factory(item)
    if not factory and not is_nnx(item):
        raise ModelError(
            f"layer {name!r}: expected an nnx module or a function of `rngs` that makes one,"
            f" got {type(item).__name__}"
        )

    def blank() -> Any:
        if not factory:
            return nnx.clone(item)
        # Inside eval_shape: shapes and structure only.
        return nnx.eval_shape(lambda: item(rngs=nnx.Rngs(0)))

    def split(module: Any) -> tuple[Any, Any, Any, Any]:
        definition, params, rng, rest = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return definition, params, rng, rest

    def graph(train: bool) -> tuple[Any, _Part, _Part, _Part]:
        module = blank()
        module.train() if train else module.eval()
        nnx.pop(module, nnx.Intermediate)
        definition, params, rng, rest = split(module)
        return definition, _Part.of(params), _Part.of(rng), _Part.of(rest)

    made = blank()
    if not is_nnx(made):
        raise ModelError(
            f"layer {name!r}: the factory returned {type(made).__name__}, no nnx module"
        )
    modes = {train: graph(train) for train in (True, False)}
    flags = optional_arguments(type(made).__call__, tuple(MODE_FLAGS))

    def init(key: Any, x: Any) -> tuple[Any, Any]:
        del x  # nnx modules know their shapes
        module = item(rngs=nnx.Rngs(key)) if factory else nnx.clone(item)
        nnx.pop(module, nnx.Intermediate)
        _, params, _, rest = split(module)
        _, own, _, others = modes[True]
        return own.nested(params), others.nested(rest)

    def apply(params: Any, state: Any, x: Any, key: Any, train: bool) -> tuple[Any, Any, Any]:
        definition, own, rng, rest = modes[train]
        module = nnx.merge(definition, own.state(params), rng.fresh_keys(key), rest.state(state))
        extra = {f: MODE_FLAGS[f] if train else not MODE_FLAGS[f] for f in flags}
        if hasattr(nnx, "capture"):
            y, sown = nnx.capture(module, nnx.Intermediate)(x, **extra)
        else:  # flax 0.12.0: sown values stay in the module
            y = module(x, **extra)
            sown = nnx.pop(module, nnx.Intermediate)
        if not train:
            return y, state, None
        after = split(module)[3]
        return y, rest.nested(after), sum_losses(_losses(sown))

    return Layer(name, init, apply)


def _path(keys: Sequence[Any]) -> tuple[str, ...]:
    # The last key is the variable's own `value` attribute.
    return tuple(key_text(k) for k in keys if not isinstance(k, jax.tree_util.GetAttrKey))


def _losses(sown: Any) -> Sequence[Any]:
    def named(keys: Sequence[Any]) -> bool:
        return any(key_text(key) == LOSSES for key in keys)

    return [x for keys, x in jax.tree_util.tree_flatten_with_path(sown)[0] if named(keys)]
