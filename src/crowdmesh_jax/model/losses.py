"""Losses as (values, weights), so that masks, padding and microbatches change nothing; metrics.

A loss returns one value per example, token or pixel, and a weight for each (or values alone, for
weights 1). The step's loss is sum(values * weights) / sum(weights) over the whole batch. Weights
may depend on targets only. A metric returns (sum, count).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..data import check_labels
from ..errors import JobError


def softmax_cross_entropy(outputs: Any, targets: Any) -> jax.Array:
    """Cross-entropy of integer labels, in nats and float32.

    Args:
        outputs: Logits, (..., classes).
        targets: Labels, (...).
    """
    _same_shape("softmax_cross_entropy", "logits without classes", outputs.shape[:-1], targets)
    log_probabilities = jax.nn.log_softmax(outputs.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)
    return -picked[..., 0]


def masked_softmax_cross_entropy(outputs: Any, targets: Any) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy where the mask is not 0; the mask's values are the weights.

    Args:
        outputs: Logits, (..., classes).
        targets: (labels, mask) or {"labels": ..., "mask": ...}, both (...).
    """
    labels, mask = labels_and_mask(targets)
    if mask is None:
        raise JobError(
            "masked_softmax_cross_entropy: targets must be (labels, mask) or a dict of both"
        )
    # A label without weight may be anything (-100 is usual): out of range it would give NaN * 0.
    labels = jnp.where(mask != 0, labels, jnp.zeros_like(labels))
    return softmax_cross_entropy(outputs, labels), mask.astype(jnp.float32)


def mean_squared_error(outputs: Any, targets: Any) -> jax.Array:
    """Squared difference of each number, in float32; shapes must be equal."""
    _same_shape("mean_squared_error", "outputs", outputs.shape, targets)
    return jnp.square(outputs.astype(jnp.float32) - targets.astype(jnp.float32))


def sigmoid_binary_cross_entropy(outputs: Any, targets: Any) -> jax.Array:
    """Cross-entropy of each logit with a target in 0..1, in nats and float32."""
    _same_shape("sigmoid_binary_cross_entropy", "logits", outputs.shape, targets)
    logits, wanted = outputs.astype(jnp.float32), targets.astype(jnp.float32)
    return -wanted * jax.nn.log_sigmoid(logits) - (1 - wanted) * jax.nn.log_sigmoid(-logits)


def accuracy(outputs: Any, targets: Any) -> tuple[jax.Array, jax.Array]:
    """(weight of the right answers, weight of all), float32; targets may be masked.

    Example:
        >>> outputs, labels = jnp.array([[0.0, 1.0], [2.0, 0.0]]), jnp.array([1, 1])
        >>> right, seen = accuracy(outputs, labels)
        >>> float(right / seen)
        0.5
    """
    labels, mask = labels_and_mask(targets)
    right = (jnp.argmax(outputs, axis=-1) == labels).astype(jnp.float32)
    weights = jnp.ones_like(right) if mask is None else mask.astype(jnp.float32)
    return jnp.sum(right * weights), jnp.sum(weights)


def labels_and_mask(targets: Any) -> tuple[Any, Any | None]:
    """Takes (labels, mask), {"labels": ..., "mask": ...} or labels alone apart."""
    if isinstance(targets, Mapping):
        return targets["labels"], targets.get("mask")
    if isinstance(targets, (tuple, list)):
        labels, mask = targets
        return labels, mask
    return targets, None


def check_targets(loss: Any, outputs: Any, targets: Any, where: str = "targets") -> None:
    """Refuses labels that the model has no class for: the loss would be NaN.

    Only losses of this module that take labels are checked; others know what they take.

    Args:
        outputs: Spec of the logits, (..., classes).
        targets: Arrays with numbers, any count of rows.
        where: Said first in the message.

    Raises:
        DataError: Names the label, its row, and the number of classes.
    """
    if loss is softmax_cross_entropy:
        check_labels(targets, outputs.shape[-1], where=where)
    if loss is masked_softmax_cross_entropy:
        labels, mask = labels_and_mask(targets)
        counted = np.where(np.asarray(mask) != 0, np.asarray(labels), 0)
        check_labels(counted, outputs.shape[-1], where=where)


def _same_shape(loss: str, what: str, shape: tuple[int, ...], targets: Any) -> None:
    if tuple(shape) != tuple(targets.shape):
        raise JobError(
            f"{loss}: {what} have shape {tuple(shape)}, targets {tuple(targets.shape)};"
            " they must be equal"
        )
