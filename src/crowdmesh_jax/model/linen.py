"""Flax linen modules as layers, unchanged: `train` flags, rngs, batch_stats, sown losses.

Knows flax, and imports it only when a module is there to be adapted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .functions import optional_arguments
from .layer import Layer
from .trees import zeros_of

LOSSES = "losses"
"""Collection of sown auxiliary losses: `self.sow("losses", "balance", value)`."""
NOT_STATE = ("params", "intermediates", LOSSES)
MODE_FLAGS: Mapping[str, bool] = {
    "train": True,
    "training": True,
    "deterministic": False,
    "use_running_average": False,
}
"""Arguments of `__call__` that tell the mode, with their value in training."""


def is_linen(item: Any) -> bool:
    """Whether it is a linen module; does not import flax."""
    return any(
        kind.__name__ == "Module" and kind.__module__.startswith("flax.linen")
        for kind in type(item).__mro__
    )


def sum_losses(tree: Any) -> jax.Array | None:
    """All sown values added up as float32; None where nothing was sown."""
    values = [jnp.sum(jnp.asarray(leaf, jnp.float32)) for leaf in jax.tree.leaves(tree)]
    return sum(values[1:], values[0]) if values else None


def from_linen(
    module: Any, name: str, borrows: Mapping[str, tuple[str, str]] | None = None
) -> Layer:
    """A layer from a linen module whose `__call__` takes one input, and maybe a mode flag.

    Collections but `params`, `intermediates` and `losses` are state, updated in training only.
    Each `make_rng`, whatever its name, draws from the layer's key. A borrowed name is a parameter
    of the module's top level (`self.param(name, ...)`): its value comes from the owner.
    """
    from flax.core import meta

    borrowed = dict(borrows or {})
    flags = {
        flag: value
        for flag, value in MODE_FLAGS.items()
        if flag in optional_arguments(type(module).__call__, tuple(MODE_FLAGS))
        and getattr(module, flag, None) is None  # fixed when it was built: flax takes only one
    }

    def mode(train: bool) -> dict[str, bool]:
        return {flag: value if train else not value for flag, value in flags.items()}

    def init(key: Any, x: Any) -> tuple[Any, Any]:
        variables = meta.unbox(module.init({"params": key}, zeros_of(x), **mode(True)))
        params = {k: v for k, v in variables.get("params", {}).items() if k not in borrowed}
        return params, {k: v for k, v in variables.items() if k not in NOT_STATE}

    def apply(params: Any, state: Any, x: Any, key: Any, train: bool) -> tuple[Any, Any, Any]:
        variables = {"params": params, **state}
        # `make_rng` of any other name falls back on "params", so no list of names is needed.
        rngs = {"params": key}
        if not train:
            return module.apply(variables, x, rngs=rngs, **mode(False)), state, None
        y, changed = module.apply(variables, x, rngs=rngs, mutable=[*state, LOSSES], **mode(True))
        aux = sum_losses(changed.get(LOSSES, {}))
        return y, {k: v for k, v in changed.items() if k != LOSSES}, aux

    return Layer(name, init, apply, borrowed)
