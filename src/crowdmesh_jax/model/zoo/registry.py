"""The zoo's models by name, each with an input to try it on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from ...errors import ModelError
from ..staged import StagedModel
from .gpt2 import gpt2
from .lenet import lenet
from .mlp import mlp


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model of the zoo."""

    name: str
    description: str
    build: Callable[..., StagedModel]
    """Takes the model's own arguments; all have defaults."""
    row: jax.ShapeDtypeStruct
    """Shape and dtype of one row of the input."""

    def input_spec(self, rows: int) -> jax.ShapeDtypeStruct:
        """The default input for a microbatch of `rows` rows."""
        return jax.ShapeDtypeStruct((rows, *self.row.shape), self.row.dtype)


def _gpt2_test(**arguments: Any) -> StagedModel:
    return gpt2(**{"vocab": 65, "context": 32, "width": 32, "heads": 4, "depth": 2, **arguments})


def _gpt2_nano(**arguments: Any) -> StagedModel:
    return gpt2(**{"vocab": 65, "context": 64, "width": 128, "heads": 4, "depth": 4, **arguments})


_DIGIT = jax.ShapeDtypeStruct((8, 8, 1), jnp.float32)
_ENTRIES = (
    Entry(
        name="mlp",
        description="perceptron with three hidden layers, 4 layers",
        build=mlp,
        row=_DIGIT,
    ),
    Entry(
        name="lenet",
        description="LeNet-like CNN with BatchNorm and dropout, 7 layers",
        build=lenet,
        row=_DIGIT,
    ),
    Entry(
        name="gpt2",
        description="GPT-2 small: 124,439,808 parameters, tied embedding, 15 layers",
        build=gpt2,
        row=jax.ShapeDtypeStruct((1024,), jnp.int32),
    ),
    Entry(
        name="gpt2_nano",
        description="GPT-2 for characters: width 128, 4 blocks, 64 tokens; trains on a laptop",
        build=_gpt2_nano,
        row=jax.ShapeDtypeStruct((64,), jnp.int32),
    ),
    Entry(
        name="gpt2_test",
        description="GPT-2 for tests: width 32, 2 blocks, 32 tokens",
        build=_gpt2_test,
        row=jax.ShapeDtypeStruct((32,), jnp.int32),
    ),
)


def models() -> Mapping[str, Entry]:
    """All models of the zoo by name."""
    return MappingProxyType({entry.name: entry for entry in _ENTRIES})


def build(name: str, **arguments: Any) -> StagedModel:
    """The model of that name.

    Raises:
        ModelError: There is none; names those there are.
    """
    known = models()
    if name not in known:
        raise ModelError(f"no model {name!r} in the zoo; known: {', '.join(sorted(known))}")
    return known[name].build(**arguments)
