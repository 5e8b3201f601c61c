"""A program as a function of flat arrays, before it becomes bytes.

Knows leaves by their `LeafSpec`, nothing of stages, optimizers or serialisation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ..programs.manifest import LeafSpec


@dataclass(frozen=True, kw_only=True)
class FlatProgram:
    """A pure function of flat arrays whose arguments and results have (role, layer, path)."""

    fn: Callable[..., tuple[Any, ...]]
    """`fn(*arrays) -> tuple of arrays`, in the order of `inputs` and `outputs`."""
    inputs: tuple[LeafSpec, ...]
    outputs: tuple[LeafSpec, ...]
    donate: tuple[int, ...] = ()
    """Indices of inputs whose buffers the call may reuse."""


def leaf_spec(role: str, layer: str, path: str, leaf: Any) -> LeafSpec:
    """The `LeafSpec` of anything with a shape and a dtype."""
    return LeafSpec(
        role=role, layer=layer, path=path, dtype=np.dtype(leaf.dtype).name, shape=tuple(leaf.shape)
    )


def abstract(spec: LeafSpec) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a leaf, as JAX wants it for tracing."""
    return jax.ShapeDtypeStruct(spec.shape, jax.numpy.dtype(spec.dtype))
