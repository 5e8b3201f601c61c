"""The zoo's models have the shapes they promise, and learn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crowdmesh_jax import errors
from crowdmesh_jax.data import digits
from crowdmesh_jax.model import TrainingJob, losses, zoo


@pytest.mark.parametrize("name", sorted(zoo.models()))
def test_each_model_takes_its_default_input_in_both_modes(name):
    entry = zoo.models()[name]
    assert entry.name == name
    model = zoo.build(name)
    for train in (True, False):
        specs = model.specs(entry.input_spec(2), train=train)
        assert specs.y.shape[0] == 2
        assert len(specs.layers) >= 4


def test_gpt2_has_the_published_number_of_parameters():
    specs = zoo.gpt2().specs(jax.ShapeDtypeStruct((1, 1024), jnp.int32))
    assert specs.parameter_count == 124_439_808
    assert specs.y.shape == (1, 1024, 50257)
    assert zoo.gpt2(tied=False).specs(specs.x).parameter_count == 124_439_808 + 50257 * 768


def test_gpt2_sees_no_later_token():
    model = zoo.build("gpt2_test", vocab=7)
    tokens = np.random.default_rng(0).integers(0, 7, (1, 8)).astype(np.int32)
    params, state = model.init(0, tokens)
    run = jax.jit(
        lambda x: model.apply(params, state, x, seed=0, step=0, microbatch=0, train=False)[0]
    )
    changed = tokens.copy()
    changed[0, 5] = (changed[0, 5] + 1) % 7
    one, other = np.asarray(run(tokens)), np.asarray(run(changed))
    np.testing.assert_array_equal(one[:, :5], other[:, :5])
    assert (one[:, 5:] != other[:, 5:]).any()


def test_wrong_arguments_are_refused():
    with pytest.raises(errors.ModelError, match="width 10 is not a multiple of heads 4"):
        zoo.gpt2(width=10, heads=4)
    with pytest.raises(errors.ShapeMismatchError, match="33 tokens, but the context holds 32"):
        zoo.build("gpt2_test").specs(jax.ShapeDtypeStruct((1, 33), jnp.int32))
    with pytest.raises(errors.ModelError, match="no model 'vgg' in the zoo; known: gpt2"):
        zoo.build("vgg")


@pytest.mark.slow
def test_lenet_reads_the_bundled_digits():
    images, labels = digits("train")
    test_images, test_labels = digits("test")
    job = TrainingJob(zoo.lenet(), losses.softmax_cross_entropy, optax.adam(1e-3), 64)
    params, state = job.model.init(0, images[:64])
    opt_state = job.optimizer.init(params)

    @jax.jit
    def step(params, state, opt_state, x, y, number):
        def loss(params):
            out, after, _ = job.model.apply(
                params, state, x, seed=0, step=number, microbatch=0, train=True
            )
            return job.loss_fn(out, y)[0].mean(), after

        grads, after = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = job.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), after, opt_state

    number = 0
    for epoch in range(8):
        order = np.random.default_rng(epoch).permutation(len(images))
        for part in np.split(order[: len(order) // 64 * 64], len(order) // 64):
            params, state, opt_state = step(
                params, state, opt_state, images[part], labels[part], np.uint32(number)
            )
            number += 1
    outputs, _, _ = job.model.apply(
        params, state, test_images, seed=0, step=0, microbatch=0, train=False
    )
    right, seen = losses.accuracy(outputs, test_labels)
    assert float(right / seen) >= 0.97
