"""The zoo's models have the shapes they promise, and learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crowdmesh_jax import errors
from crowdmesh_jax.data import digits
from crowdmesh_jax.model import TrainingJob, leaf_paths, losses, zoo
from crowdmesh_jax.model.zoo.mobilenet import channels


@pytest.mark.parametrize("name", sorted(zoo.models()))
def test_each_model_takes_its_default_input_in_both_modes(name):
    entry = zoo.models()[name]
    assert entry.name == name
    for train in (True, False):
        specs = model_of(name).specs(entry.input_spec(1), train=train)
        assert specs.y.shape[0] == 1
        assert len(specs.layers) >= 4


@functools.cache
def model_of(name, **arguments):
    """Built once: a model keeps the specs that it has traced."""
    return zoo.build(name, **arguments)


def specs_of(name, **arguments):
    return model_of(name, **arguments).specs(zoo.models()[name].input_spec(1))


def test_gpt2_has_the_published_number_of_parameters():
    specs = specs_of("gpt2")
    assert specs.parameter_count == 124_439_808
    assert specs.y.shape == (1, 1024, 50257)
    assert zoo.gpt2(tied=False).specs(specs.x).parameter_count == 124_439_808 + 50257 * 768


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_689_512),
        ("resnet18_cifar", 11_173_962),
        ("resnet50", 25_557_032),
        ("mobilenet_v2", 3_504_872),
    ],
)
def test_networks_for_images_have_the_published_number_of_parameters(name, count):
    assert specs_of(name).parameter_count == count


@pytest.mark.parametrize(("size", "weights"), [("S", 22_604), ("M", 135_032), ("L", 410_700)])
def test_ds_cnn_has_the_published_number_of_weights_once_batch_norm_is_folded(size, weights):
    """The paper's memory is a byte for each and for each number of the two largest activations."""
    specs = specs_of("ds_cnn", size=size)
    scales = sum(
        leaf.size
        for layer in specs.layers
        for path, leaf in leaf_paths(layer.params)
        if path.endswith("scale")
    )
    assert specs.parameter_count - scales == weights
    outputs = sorted(layer.y.size for layer in specs.layers)
    published_kb = {"S": 38.6, "M": 189.2, "L": 497.6}[size]
    assert (weights + sum(outputs[-2:])) / 1000 == pytest.approx(published_kb, abs=0.05)


def test_mobilenet_v2_rounds_its_channels_as_the_paper_does():
    assert [channels(wanted) for wanted in (1, 11.2, 12, 33.6, 1280)] == [8, 16, 16, 32, 1280]


def test_small_forms_keep_more_places_before_the_mean():
    rows = {name: specs_of(name).layers for name in ("resnet18_cifar", "mobilenet_v2_cifar")}
    for layers in rows.values():
        assert next(row.x.shape for row in layers if row.name == "mean")[1:3] == (4, 4)
    assert "pool" not in [row.name for row in rows["resnet18_cifar"]]


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
    with pytest.raises(errors.ModelError, match="width must be a factor in"):
        zoo.mobilenet_v2(width=0)
    with pytest.raises(errors.ModelError, match="size must be one of S, M, L; got 'XL'"):
        zoo.ds_cnn(size="XL")
    with pytest.raises(errors.ModelError, match="features must name"):
        zoo.har_cnn(features=())
    with pytest.raises(errors.ModelError, match="depth must be >= 1, got 0"):
        zoo.har_lstm(depth=0)
    with pytest.raises(errors.ModelError, match="no model 'vgg' in the zoo; known: ds_cnn"):
        zoo.build("vgg")


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("resnet18", (224, 224), "images are .rows, height, width, channels."),
        ("mobilenet_v2", (224 * 224 * 3,), "images are .rows, height, width, channels."),
        ("resnet50", (3, 224, 224), "has its channels first"),
        ("mobilenet_v2", (3, 96, 96), "has its channels first"),
        ("ds_cnn", (49, 10), "spectrograms are .rows, frames, coefficients, 1."),
        ("har_cnn", (128 * 6,), "windows are .rows, time, channels."),
        ("har_cnn", (8, 6), "2 time steps are left, fewer than the pool of 3"),
        ("har_lstm", (128, 6, 1), "windows are .rows, time, channels."),
    ],
)
def test_an_input_of_the_wrong_shape_is_refused_with_the_shape_that_is_wanted(name, row, told):
    with pytest.raises(errors.ShapeMismatchError, match=told):
        model_of(name).specs(jax.ShapeDtypeStruct((2, *row), jnp.float32))


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
