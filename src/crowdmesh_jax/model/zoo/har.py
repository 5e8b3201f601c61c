"""Human activity recognition: a 1-D CNN and an LSTM over windows of motion sensors.

A row is a window (time steps, channels), 128 x 6 in the UCI data: 2.56 s of a phone's accelerometer
and gyroscope at 50 Hz.

Sources: the CNN is that of Ronao and Cho, Human activity recognition with smartphone sensors using
deep learning neural networks (Expert Systems with Applications 59, 2016); the LSTM is the forward
one of Hammerla et al., Deep, Convolutional, and Recurrent Models for Human Activity Recognition
using Wearables (IJCAI 2016), behind a dense layer that widens the channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from ...errors import ModelError
from ..staged import StagedModel


class ConvPool(nn.Module):
    """Convolution over time, ReLU, max pooling over time."""

    features: int
    kernel: int
    pool: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _check_window(x)
        if x.shape[1] < self.pool:
            raise ValueError(
                f"{x.shape[1]} time steps are left, fewer than the pool of {self.pool}"
            )
        x = nn.relu(nn.Conv(self.features, (self.kernel,), name="conv")(x))
        return nn.max_pool(x, (self.pool,), strides=(self.pool,))


class Hidden(nn.Module):
    """Flattens, then dense, ReLU and dropout."""

    features: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.relu(nn.Dense(self.features, name="dense")(x.reshape(x.shape[0], -1)))
        return nn.Dropout(self.dropout, deterministic=not train)(x)


class Widen(nn.Module):
    """Dense and ReLU at each time step."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _check_window(x)
        return nn.relu(nn.Dense(self.features, name="dense")(x))


class Recurrent(nn.Module):
    """An LSTM over time, and dropout on its outputs."""

    features: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y: Any = nn.RNN(nn.OptimizedLSTMCell(self.features, name="cell"), name="lstm")(x)
        return nn.Dropout(self.dropout, deterministic=not train)(y)


def last_step(x: jax.Array) -> jax.Array:
    """The last time step: (rows, time, features) to (rows, features)."""
    return x[:, -1]


def har_cnn(
    classes: int = 6,
    features: Sequence[int] = (96, 192, 192),
    kernel: int = 9,
    pool: int = 3,
    hidden: int = 1000,
    dropout: float = 0.5,
) -> StagedModel:
    """Convolutions over time, a dense layer and the head. Input: float (rows, time, channels).

    Args:
        classes: Width of the output, logits.
        features: Channels of each convolution; one layer each.
        kernel: Time steps that a convolution sees.
        pool: Time steps that each layer makes one of.
        hidden: Width of the dense layer.
        dropout: Share of its outputs dropped in training.
    """
    if not features:
        raise ModelError("har_cnn: features must name the channels of one convolution at least")
    modules = [
        *(ConvPool(width, kernel, pool) for width in features),
        Hidden(hidden, dropout),
        nn.Dense(classes),
    ]
    names = [*(f"conv{index}" for index in range(len(features))), "hidden", "head"]
    return StagedModel.from_linen(modules, names, name="har_cnn")


def har_lstm(
    classes: int = 6, features: int = 64, depth: int = 2, dropout: float = 0.5
) -> StagedModel:
    """`depth + 3` layers: widen, lstm0 .., last, head. Input: float (rows, time, channels).

    Args:
        classes: Width of the output, logits.
        features: Width of the dense layer and of each LSTM.
        depth: LSTMs, one on another.
        dropout: Share of each LSTM's outputs dropped in training.
    """
    if depth < 1:
        raise ModelError(f"har_lstm: depth must be >= 1, got {depth}")
    modules = [
        Widen(features),
        *[Recurrent(features, dropout)] * depth,  # one module, traced once
        last_step,
        nn.Dense(classes),
    ]
    names = ["widen", *(f"lstm{index}" for index in range(depth)), "last", "head"]
    return StagedModel.from_linen(modules, names, name="har_lstm")


def _check_window(x: jax.Array) -> None:
    if x.ndim != 3:
        raise ValueError(f"windows are (rows, time, channels), got shape {x.shape}")
