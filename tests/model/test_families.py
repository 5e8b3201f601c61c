"""The exactness families themselves: each can be traced, started, run and differentiated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.families import FAMILIES, family


@pytest.mark.parametrize("name", FAMILIES)
def test_family_is_a_valid_job_that_runs(name):
    kind = family(name)
    job = kind.job(optax.sgd(0.1))
    inputs, targets = kind.batch()
    specs = job.microbatch_specs((inputs, targets))
    job.check(*specs)
    assert len(job.model.layers) >= 4
    params, state = job.model.init(0, specs[0])
    part = jax.tree.map(lambda a: a[: job.microbatch_size], (inputs, targets))

    def loss(params, step):
        y, after, aux = job.model.apply(
            params, state, part[0], seed=0, step=step, microbatch=0, train=True
        )
        values, weights = job.loss_fn(y, part[1])
        return jnp.sum(values * weights) / jnp.sum(weights) + (0.0 if aux is None else aux), after

    (value, after), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, np.uint32(3))
    assert np.isfinite(value)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    flat = jax.tree.leaves(jax.tree.map(lambda g: float(jnp.abs(g).max()), grads))
    assert all(np.isfinite(flat))
    assert sum(g > 0 for g in flat) > len(flat) / 2
