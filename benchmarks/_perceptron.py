"""A net whose stages are alike: a layer each, as wide as its input. For what surrounds training."""

from __future__ import annotations

import jax
import numpy as np
import optax
from flax import linen as nn

import crowdmesh_jax as cm


class Layer(nn.Module):
    """Dense and ReLU."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return nn.relu(nn.Dense(self.width)(x))


def make_job(
    *, width: int, stages: int, batch: int, microbatches: int
) -> tuple[cm.TrainingJob, cm.ArraySource]:
    """A layer a stage, Adam, and four batches of rows."""
    model = cm.StagedModel.from_linen([Layer(width) for _ in range(stages)], name="perceptron")
    job = cm.TrainingJob(
        model, loss=cm.losses.mean_squared_error, optimizer=optax.adam(1e-4),
        batch_size=batch, microbatches=microbatches,
    )  # fmt: skip
    inputs = np.random.default_rng(0).standard_normal((4 * batch, width), np.float32)
    return job, cm.ArraySource(inputs, np.abs(inputs), batch)
