"""The nets that benchmarks train: a perceptron, a CNN and a transformer, each a chain of layers.

Plain layers that any framework has, so that `_torch_peer.py` builds the same nets; no dropout, so
that losses can be compared. Sizes are chosen for about half a second a step on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

import crowdmesh_jax as cm

MICROBATCHES = 8
LEARNING_RATE = 0.05
WIDTH, DENSE_LAYERS = 1024, 8
CHANNELS = (32, 32, 64, 64, 128, 128, 256, 256)
POOLED = (1, 3, 5)
"""Convolutions with a 2x2 max pooling behind them."""
IMAGE, CLASSES = 32, 10
VOCAB, CONTEXT, MODEL_WIDTH, HEADS, DEPTH = 65, 64, 256, 4, 6


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A job with its data."""

    name: str
    job: cm.TrainingJob
    data: cm.ArraySource
    inputs: np.ndarray
    targets: np.ndarray
    """One batch after the other."""


class Conv(nn.Module):
    """3x3 convolution, BatchNorm, ReLU, and 2x2 max pooling if asked for."""

    features: int
    pool: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.max_pool(x, (2, 2), strides=(2, 2)) if self.pool else x


class PooledHead(nn.Module):
    """Mean over the image, then logits."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.classes)(x.mean((1, 2)))


def _mlp(rng: np.random.Generator, rows: int) -> tuple[Any, np.ndarray, np.ndarray]:
    model = cm.zoo.mlp(features=(WIDTH,) * (DENSE_LAYERS - 1), classes=WIDTH)
    inputs = rng.standard_normal((rows, WIDTH)).astype(np.float32)
    return model, inputs, rng.integers(0, WIDTH, rows).astype(np.int32)


def _cnn(rng: np.random.Generator, rows: int) -> tuple[Any, np.ndarray, np.ndarray]:
    modules: list[nn.Module] = [Conv(n, i in POOLED) for i, n in enumerate(CHANNELS)]
    names = [f"conv{i}" for i in range(len(CHANNELS))]
    model = cm.StagedModel.from_linen(
        [*modules, PooledHead(CLASSES)], [*names, "head"], name="bench_cnn"
    )
    inputs = rng.standard_normal((rows, IMAGE, IMAGE, 3)).astype(np.float32)
    return model, inputs, rng.integers(0, CLASSES, rows).astype(np.int32)


def _transformer(rng: np.random.Generator, rows: int) -> tuple[Any, np.ndarray, np.ndarray]:
    model = cm.zoo.gpt2(
        vocab=VOCAB, context=CONTEXT, width=MODEL_WIDTH, heads=HEADS, depth=DEPTH,
        dropout=0.0, tied=False,
    )  # fmt: skip
    tokens = rng.integers(0, VOCAB, (rows, CONTEXT + 1)).astype(np.int32)
    return model, tokens[:, :-1], tokens[:, 1:]


_BUILDERS: Mapping[str, tuple[Callable[..., Any], int]] = {
    "mlp": (_mlp, 128),
    "cnn": (_cnn, 8),
    "transformer": (_transformer, 8),
}
WORKLOADS = tuple(_BUILDERS)


def workload(name: str, *, quick: bool = False, batches: int = 4) -> Workload:
    """A net with SGD, 8 microbatches and made-up data. `quick`: two rows a microbatch."""
    build, rows = _BUILDERS[name]
    batch = MICROBATCHES * (2 if quick else rows)
    model, inputs, targets = build(np.random.default_rng(0), batches * batch)
    job = cm.TrainingJob(
        model, cm.losses.softmax_cross_entropy, optax.sgd(LEARNING_RATE), batch, MICROBATCHES
    )
    return Workload(
        name=name,
        job=job,
        data=cm.ArraySource(inputs, targets, batch, shuffle=False),
        inputs=inputs,
        targets=targets,
    )
