"""Multi-layer perceptron: one layer of the chain for each width, and the head."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import linen as nn

from ..staged import StagedModel


class DenseReLU(nn.Module):
    """Flattens its input, then `relu(x W + b)`."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.relu(nn.Dense(self.features)(x.reshape(x.shape[0], -1)))


def mlp(features: Sequence[int] = (128, 128, 64), classes: int = 10) -> StagedModel:
    """A perceptron with `len(features)` hidden layers; any input is flattened to (rows, numbers).

    Args:
        features: Width of each hidden layer.
        classes: Width of the output, logits.
    """
    modules: list[nn.Module] = [DenseReLU(width) for width in features]
    names = [f"dense{i}" for i in range(len(features))]
    return StagedModel.from_linen([*modules, nn.Dense(classes)], [*names, "head"], name="mlp")
