"""A small convolutional network after LeNet, with BatchNorm and dropout, for small images.

Source: LeCun et al., Gradient-Based Learning Applied to Document Recognition (1998), with batch
normalisation, ReLU and max pooling in place of its squashing functions and subsampling.
"""

from __future__ import annotations

import jax
from flax import linen as nn

from ..staged import StagedModel


class ConvBlock(nn.Module):
    """3x3 convolution, BatchNorm, ReLU, and 2x2 max pooling if asked for."""

    features: int
    pool: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.max_pool(x, (2, 2), strides=(2, 2)) if self.pool else x


class DenseBlock(nn.Module):
    """Flattens, then dense, ReLU and dropout."""

    features: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.relu(nn.Dense(self.features)(x.reshape(x.shape[0], -1)))
        return nn.Dropout(self.dropout, deterministic=not train)(x)


def lenet(classes: int = 10, dropout: float = 0.25, width: int = 16) -> StagedModel:
    """Seven layers: four convolutions, two dense ones and the head.

    Args:
        classes: Width of the output, logits.
        dropout: Share of the dense blocks' outputs dropped in training.
        width: Channels of the first two convolutions; the others have twice as many.
    """
    modules: list[nn.Module] = [
        ConvBlock(width),
        ConvBlock(width, pool=True),
        ConvBlock(2 * width),
        ConvBlock(2 * width, pool=True),
        DenseBlock(8 * width, dropout),
        DenseBlock(4 * width, dropout),
        nn.Dense(classes),
    ]
    names = ["conv0", "conv1", "conv2", "conv3", "dense0", "dense1", "head"]
    return StagedModel.from_linen(modules, names, name="lenet")
