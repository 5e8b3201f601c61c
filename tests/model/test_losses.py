"""Losses against their definitions, and the weighted mean against the whole batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crowdmesh_jax import errors
from crowdmesh_jax.model import losses

seeds = st.integers(0, 2**20)


@given(seeds)
def test_softmax_cross_entropy_is_the_negative_log_of_the_labels_probability(seed):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(3, 5, 4)) * 5, rng.integers(0, 4, (3, 5))
    e = np.exp(logits)
    p = np.take_along_axis(e, labels[..., None], -1)[..., 0] / e.sum(-1)
    values = losses.softmax_cross_entropy(np.float32(logits), np.int32(labels))
    np.testing.assert_allclose(values, -np.log(p), rtol=1e-4, atol=1e-5)


@given(seeds)
def test_sigmoid_cross_entropy_is_the_two_class_softmax(seed):
    rng = np.random.default_rng(seed)
    logits, wanted = rng.normal(size=7).astype(np.float32) * 5, rng.integers(0, 2, 7)
    two = np.stack([np.zeros_like(logits), logits], -1)
    np.testing.assert_allclose(
        losses.sigmoid_binary_cross_entropy(logits, np.int32(wanted)),
        losses.softmax_cross_entropy(two, np.int32(wanted)),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


@given(seeds, st.sampled_from([1, 2, 3, 6]))
def test_masked_loss_by_microbatches_is_the_mean_over_unmasked_tokens(seed, microbatches):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(6, 4, 3)).astype(np.float32)
    labels = rng.integers(0, 3, (6, 4)).astype(np.int32)
    mask = rng.random((6, 4)) < 0.5
    mask[0, 0] = True
    whole = np.asarray(losses.softmax_cross_entropy(logits, labels))[mask].mean()
    total = 0.0
    for part in np.split(np.arange(6), microbatches):
        values, weights = losses.masked_softmax_cross_entropy(
            logits[part], {"labels": labels[part], "mask": mask[part]}
        )
        total += float((values * weights).sum()) / mask.sum()
    np.testing.assert_allclose(total, whole, rtol=1e-5)


def test_squared_error_and_accuracy():
    y = np.float32([[1, 3], [4, 2]])
    np.testing.assert_array_equal(losses.mean_squared_error(y, y - 2), np.full((2, 2), 4.0))
    assert tuple(map(float, losses.accuracy(y, np.int32([1, 1])))) == (1.0, 2.0)
    masked = (np.int32([1, 1]), np.bool_([True, False]))
    assert tuple(map(float, losses.accuracy(y, masked))) == (1.0, 1.0)


def test_shapes_that_do_not_fit_are_refused_instead_of_broadcast():
    with pytest.raises(errors.JobError, match=r"\(4, 1\), targets \(4,\)"):
        losses.mean_squared_error(np.zeros((4, 1)), np.zeros(4))
    with pytest.raises(errors.JobError, match=r"shape \(4,\), targets \(4, 1\)"):
        losses.softmax_cross_entropy(np.zeros((4, 3)), np.zeros((4, 1), int))
    with pytest.raises(errors.JobError, match="labels, mask"):
        losses.masked_softmax_cross_entropy(np.zeros((4, 3)), np.zeros(4, int))
