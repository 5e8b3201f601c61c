"""The exactness families themselves: each is a valid job that can be differentiated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.families import FAMILIES, family

from crowdmesh_jax.model.trees import signature


def microbatch_loss(job, params, state, part, step):
    y, after, aux = job.model.apply(
        params, state, part[0], seed=0, step=step, microbatch=0, train=True
    )
    values, weights = job.loss_fn(y, part[1])
    return jnp.sum(values * weights) / jnp.sum(weights) + (0.0 if aux is None else aux), after


@pytest.mark.parametrize("name", FAMILIES)
def test_family_is_a_valid_job_with_four_layers_and_gradients(name):
    kind = family(name)
    job = kind.job(optax.sgd(0.1))
    specs = job.microbatch_specs(kind.batch())
    job.check(*specs)
    model = job.model.specs(specs[0])
    assert len(model.layers) >= 4
    step = jax.ShapeDtypeStruct((), jnp.uint32)
    (_, after), grads = jax.eval_shape(
        jax.value_and_grad(lambda p, *rest: microbatch_loss(job, p, *rest), has_aux=True),
        model.params, model.state, specs, step,
    )  # fmt: skip
    assert signature(after) == signature(model.state)
    assert signature(grads) == signature(model.params)


@pytest.mark.parametrize("name", ["moe", "nnx_batchnorm"])
def test_family_runs_and_most_parameters_get_a_gradient(name):
    kind = family(name)
    job = kind.job(optax.sgd(0.1))
    batch = kind.batch()
    part = jax.tree.map(lambda a: a[: job.microbatch_size], batch)
    params, state = job.model.init(0, part[0])
    run = jax.value_and_grad(lambda p, *rest: microbatch_loss(job, p, *rest), has_aux=True)
    (value, _), grads = jax.jit(run)(params, state, part, np.uint32(3))
    largest = [float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)]
    assert np.isfinite([float(value), *largest]).all()
    assert sum(g > 0 for g in largest) > len(largest) / 2


def test_batches_are_fixed_by_their_arguments():
    source = family("masked").source(4, seed=1)
    one, again, other = source.batch(2), source.batch(2), source.batch(3)
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert (one[0] != other[0]).any()
