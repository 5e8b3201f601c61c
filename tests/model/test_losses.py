"""Losses against their definitions, and the weighted mean against the whole batch."""

import jax
import jax.numpy as jnp
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


LOGITS = jax.ShapeDtypeStruct((2, 10), jnp.float32)


def test_a_label_without_a_class_is_refused_by_label_row_and_number_of_classes():
    labels = np.array([0, 9, 3, 10, 11])
    with pytest.raises(errors.DataError, match=r"found 10 in row 3; .* 12 classes") as told:
        losses.check_targets(losses.softmax_cross_entropy, LOGITS, labels)
    assert "expected 0 .. 9, as the model has 10 classes" in str(told.value)
    losses.check_targets(losses.softmax_cross_entropy, LOGITS, labels[:3])
    with pytest.raises(errors.DataError, match=r"tokens: .* found -1 in row 1"):
        losses.check_targets(losses.softmax_cross_entropy, LOGITS, np.array([2, -1]), "tokens")
    losses.check_targets(losses.mean_squared_error, LOGITS, labels)


def test_a_label_without_weight_may_be_anything():
    labels, mask = np.array([1, -100, 3]), np.array([1.0, 0.0, 1.0])
    loss = losses.masked_softmax_cross_entropy
    losses.check_targets(loss, LOGITS, (labels, mask))
    with pytest.raises(errors.DataError, match="found -100 in row 1"):
        losses.check_targets(loss, LOGITS, (labels, np.ones(3)))
    values, weights = loss(jnp.zeros((3, 10)), (jnp.asarray(labels), jnp.asarray(mask)))
    assert np.isfinite(np.asarray(values)).all()
    np.testing.assert_array_equal(weights, mask)
