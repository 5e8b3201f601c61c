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
from .ds_cnn import ds_cnn
from .gpt2 import gpt2
from .har import har_cnn, har_lstm
from .lenet import lenet
from .mlp import mlp
from .mobilenet import mobilenet_v2
from .resnet import resnet18, resnet50


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


def _resnet18_cifar(**arguments: Any) -> StagedModel:
    return resnet18(**{"classes": 10, "small_inputs": True, **arguments})


def _mobilenet_v2_cifar(**arguments: Any) -> StagedModel:
    return mobilenet_v2(**{"classes": 10, "small_inputs": True, **arguments})


_DIGIT = jax.ShapeDtypeStruct((8, 8, 1), jnp.float32)
_SMALL_IMAGE = jax.ShapeDtypeStruct((32, 32, 3), jnp.float32)
_IMAGE = jax.ShapeDtypeStruct((224, 224, 3), jnp.float32)
_SENSORS = jax.ShapeDtypeStruct((128, 6), jnp.float32)
_ENTRIES = (
    Entry(
        name="mlp",
        description="perceptron with three hidden layers",
        build=mlp,
        row=_DIGIT,
    ),
    Entry(
        name="lenet",
        description="LeNet-like CNN with BatchNorm and dropout",
        build=lenet,
        row=_DIGIT,
    ),
    Entry(
        name="resnet18",
        description="ResNet-18 for 1000 classes",
        build=resnet18,
        row=_IMAGE,
    ),
    Entry(
        name="resnet18_cifar",
        description="ResNet-18 for small images: 3x3 stem, no pooling, 10 classes",
        build=_resnet18_cifar,
        row=_SMALL_IMAGE,
    ),
    Entry(
        name="resnet50",
        description="ResNet-50 (v1.5) for 1000 classes",
        build=resnet50,
        row=_IMAGE,
    ),
    Entry(
        name="mobilenet_v2",
        description="MobileNetV2 for 1000 classes",
        build=mobilenet_v2,
        row=_IMAGE,
    ),
    Entry(
        name="mobilenet_v2_cifar",
        description="MobileNetV2 for small images: halves three times, 10 classes",
        build=_mobilenet_v2_cifar,
        row=_SMALL_IMAGE,
    ),
    Entry(
        name="ds_cnn",
        description="DS-CNN-S: keywords in a second of sound (49 frames, 10 MFCCs), 12 classes",
        build=ds_cnn,
        row=jax.ShapeDtypeStruct((49, 10, 1), jnp.float32),
    ),
    Entry(
        name="har_cnn",
        description="1-D CNN: activities in windows of motion sensors, 6 classes",
        build=har_cnn,
        row=_SENSORS,
    ),
    Entry(
        name="har_lstm",
        description="LSTM: activities in windows of motion sensors, 6 classes",
        build=har_lstm,
        row=_SENSORS,
    ),
    Entry(
        name="gpt2",
        description="GPT-2 small: 124,439,808 parameters, tied embedding",
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
