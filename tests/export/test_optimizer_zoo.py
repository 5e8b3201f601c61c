"""The same laws for optimizers that fewer people use."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import optax
import optax.contrib
import pytest
from optimizer_runs import LAYERS, THREE, TWO, assert_close, assert_equals_whole

SEPARABLE: dict[str, Callable[[], optax.GradientTransformation]] = {
    "amsgrad": lambda: optax.amsgrad(1e-2),
    "nadam": lambda: optax.nadam(1e-2),
    "radam": lambda: optax.radam(1e-2),
    "adabelief": lambda: optax.adabelief(1e-2),
    "yogi": lambda: optax.yogi(1e-2),
    "adagrad": lambda: optax.adagrad(1e-2),
    "lars": lambda: optax.lars(1e-2, weight_decay=0.1),
    "novograd": lambda: optax.novograd(1e-2),
    "sm3": lambda: optax.sm3(1e-2),
    "clip_by_block_rms": lambda: optax.chain(optax.clip_by_block_rms(0.1), optax.sgd(0.1)),
    "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    "ema": lambda: optax.chain(optax.sgd(0.1), optax.ema(0.9)),
    "zero_nans": lambda: optax.chain(optax.zero_nans(), optax.adam(1e-2)),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2),
}
CLOSE = {"muon": lambda: optax.contrib.muon(1e-2)}
"""XLA fuses its matrix products differently in the whole: last bits differ."""
ONE_ROUND: dict[str, Callable[[], optax.GradientTransformation]] = {
    "normalize_by_update_norm": lambda: optax.chain(
        optax.normalize_by_update_norm(), optax.sgd(0.1)
    ),
    "prodigy": lambda: optax.contrib.prodigy(1.0),
    "dadapt": lambda: optax.contrib.dadapt_adamw(1.0),
}


@pytest.mark.parametrize("name", SEPARABLE)
def test_separable_optimizer_needs_no_exchange_and_equals_the_whole(name):
    sliced = assert_equals_whole(SEPARABLE[name](), TWO)
    assert sliced.cut_leaves == ()
    assert sliced.shared_leaves == ()
    assert all(sliced.scalars((layer,)) is None for layer in LAYERS)
    assert sliced.describe_global() is None


@pytest.mark.parametrize("name", CLOSE)
def test_separable_optimizer_of_matrices_equals_the_whole_to_rounding(name):
    sliced = assert_equals_whole(CLOSE[name](), TWO, same=assert_close)
    assert sliced.cut_leaves == ()


@pytest.mark.parametrize("name", ONE_ROUND)
def test_optimizer_with_one_exchange_equals_the_whole(name):
    sliced = assert_equals_whole(ONE_ROUND[name](), THREE)
    assert sliced.cut_leaves
    assert all(np.prod(leaf.shape) == 1 for leaf in sliced.cut_leaves)
    order = [LAYERS.index(leaf.layer) for leaf in sliced.cut_leaves]
    assert order == sorted(order)
    assert "per step" in (sliced.describe_global() or "")
