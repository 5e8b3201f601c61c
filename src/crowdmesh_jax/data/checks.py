"""Checks that several sources and readers make."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import DataError


def checked_integer(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    """The value as an int.

    Raises:
        DataError: It is none, or out of its range.
    """
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        bound = f"an integer >= {least}" + (f" and <= {most}" if most is not None else "")
        raise DataError(f"{name} must be {bound}, got {value!r}")
    return int(value)


def check_labels(labels: Any, classes: int, *, where: str = "labels") -> None:
    """Proves that integer labels name one of `classes` classes.

    Args:
        labels: Integers of any shape.
        classes: Labels must be 0 .. classes - 1: the width of the model's output.
        where: What they are called in the message; a file's name, say.

    Raises:
        DataError: No integers, or a label outside; names the first such row and what to do.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "biu":
        raise DataError(f"{where}: labels must be integers, found {labels.dtype}")
    wrong = np.argwhere((labels < 0) | (labels >= classes))
    if not len(wrong):
        return
    value, row = labels[tuple(wrong[0])], (wrong[0][0] if labels.ndim else 0)
    if labels.min() < 0:
        cure = "correct the labels, or give such rows label 0 and weight 0 in a masked loss"
    else:
        cure = f"correct the labels, or use a model with {int(labels.max()) + 1} classes"
    raise DataError(
        f"{where}: expected 0 .. {classes - 1}, as the model has {classes} classes; found {value}"
        f" in row {row}; {cure}"
    )
