"""Keys: randomness depends on the work, never on the device, the stage or the plan."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

IMPLEMENTATION = "threefry2x32"
INIT_STEP = 2**31
"""Initialisation counts its "steps" from here; training never gets as far."""


def layer_key(seed: Any, step: Any, microbatch: Any, layer: Any) -> jax.Array:
    """The key of one layer for one microbatch of one step.

    Args:
        seed: 0 .. 2**32 - 1; this and the others are ints or uint32 scalars, traced or not.
        layer: Index in the model, fixed before any cut.
    """
    key = jax.random.key(jnp.asarray(seed, jnp.uint32), impl=IMPLEMENTATION)
    for part in (step, microbatch, layer):
        key = jax.random.fold_in(key, jnp.asarray(part, jnp.uint32))
    return key


def init_key(seed: Any, layer: int) -> jax.Array:
    """The key of a layer's initial parameters; never one that `layer_key` gives in training."""
    return layer_key(seed, INIT_STEP + layer, 0, 0)


def key_spec() -> jax.ShapeDtypeStruct:
    """Shape and dtype of such a key."""
    return jax.eval_shape(lambda: layer_key(0, 0, 0, 0))
