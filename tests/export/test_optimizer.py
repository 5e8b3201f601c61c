"""Laws of the sliced optimizer: run piece by piece it is the whole update, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from optimizer_runs import LAYERS, THREE, TWO, Params, assert_equals_whole


def labels(params: Params) -> Params:
    """Labels that are also names of layers, to tempt the search for owners."""
    names = dict.fromkeys(params, "embed") | {"head": "slow"}
    return {
        layer: jax.tree.map(lambda _, name=names[layer]: name, tree)
        for layer, tree in params.items()
    }


def decay_mask(params: Params) -> Params:
    return jax.tree.map(lambda p: p.ndim > 1, params)


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10)
SEPARABLE: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adamw masked": lambda: optax.adamw(SCHEDULE, weight_decay=0.1, mask=decay_mask),
    "rmsprop": lambda: optax.rmsprop(1e-2, momentum=0.9),
    "lion": lambda: optax.lion(1e-3),
    "lamb": lambda: optax.lamb(1e-2, weight_decay=0.1),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "multi_transform": lambda: optax.multi_transform(
        {"embed": optax.adam(1e-2), "slow": optax.sgd(1e-3)}, labels
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(
        learning_rate=SCHEDULE, weight_decay=0.01
    ),
    "clip": lambda: optax.chain(optax.clip(0.1), optax.adam(1e-2)),
    "MultiSteps": lambda: optax.MultiSteps(
        optax.adam(1e-2), every_k_schedule=2
    ).gradient_transformation(),
    "add_noise": lambda: optax.chain(
        optax.add_noise(0.1, 0.5, key=jax.random.key(7)), optax.sgd(0.1)
    ),
}
ONE_ROUND: dict[str, Callable[[], optax.GradientTransformation]] = {
    "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 2),
    "apply_if_finite of clip": lambda: optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), 2
    ),
    "MultiSteps of clip": lambda: optax.MultiSteps(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), every_k_schedule=2
    ).gradient_transformation(),
    "MultiSteps skips": lambda: optax.MultiSteps(
        optax.adam(1e-2), every_k_schedule=2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
}


@pytest.mark.parametrize("name", SEPARABLE)
def test_separable_optimizer_needs_no_exchange_and_equals_the_whole(name):
    sliced = assert_equals_whole(SEPARABLE[name](), TWO)
    assert sliced.cut_leaves == ()
    assert sliced.shared_leaves == ()
    assert all(sliced.scalars((layer,)) is None for layer in LAYERS)
    assert sliced.describe_global() is None


@pytest.mark.parametrize("name", ONE_ROUND)
def test_optimizer_with_one_exchange_equals_the_whole(name):
    sliced = assert_equals_whole(ONE_ROUND[name](), THREE)
    assert sliced.cut_leaves
    assert all(np.prod(leaf.shape) == 1 for leaf in sliced.cut_leaves)
    order = [LAYERS.index(leaf.layer) for leaf in sliced.cut_leaves]
    assert order == sorted(order)
    assert "per step" in (sliced.describe_global() or "")


def test_the_plan_changes_no_bit_of_a_clipped_adam():
    """One stage, stages of one layer each, and the whole agree."""
    for cut in ((LAYERS,), tuple((layer,) for layer in LAYERS)):
        assert_equals_whole(ONE_ROUND["clip_by_global_norm"](), cut, nan_step=None)


@pytest.mark.parametrize("name", ["adam", "clip"])
def test_bfloat16_parameters_take_float32_gradients_and_equal_the_whole(name):
    optimizer = SEPARABLE[name]()
    sliced = assert_equals_whole(optimizer, TWO, dtype=jnp.bfloat16)
    inputs = sliced.update(LAYERS).inputs
    assert {leaf.dtype for leaf in inputs if leaf.role == "grad"} == {"float32"}
    assert {leaf.dtype for leaf in inputs if leaf.role == "param"} == {"bfloat16"}
