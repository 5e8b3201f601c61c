"""A lower bound on the label distance of many pairs at once: a matrix product.

With x the label histogram of two coalitions together, both measures of distance are convex in x, so
the tangent at any point lies below them everywhere. A column's tangent is taken at its histogram
with one typical device of the crowd's mix added, near where it will be used; there every class that
the crowd has has a share, so the slope is finite. It knows histograms alone.
"""

from __future__ import annotations

import numpy as np

from .value import Facts

SLACK = 1e-4
"""What rounding to float32 may lift a tangent by."""


class Tangents:
    """Slopes of `columns` many histograms; a column that was never set bounds nothing."""

    def __init__(self, facts: Facts, columns: int) -> None:
        self._facts = facts
        self._kind = facts.problem.imbalance
        self._typical = float(facts.labels.sum(axis=1).mean())
        classes = facts.labels.shape[1]
        self._slope = np.zeros((columns, classes), np.float32)
        self._offset, self._self, self._rows = np.zeros((3, columns), np.float32)

    def grown(self, columns: int) -> Tangents:
        """The same with room for more columns."""
        made, used = Tangents(self._facts, columns), len(self._offset)
        for name in ("_slope", "_offset", "_self", "_rows"):
            getattr(made, name)[:used] = getattr(self, name)
        return made

    def set(self, at: np.ndarray, labels: np.ndarray) -> None:
        """Takes the tangents of columns `at` anew, whose label sums are `labels` [len(at), C]."""
        whole = self._facts.whole
        rows = labels.sum(axis=1)
        point = (labels + self._typical * whole) / (rows + self._typical)[:, None]
        value = self._facts.imbalance(point)
        if self._kind == "emd":
            slope = np.sign(point - whole)
        else:
            value = value * value
            middle = 0.5 * (point + whole)
            ratio = np.where(point > 0, point, 1.0) / np.where(point > 0, middle, 1.0)
            slope = 0.5 * np.log2(ratio)
        self._slope[at], self._rows[at] = slope, rows
        self._offset[at] = value - (slope * point).sum(axis=1)
        self._self[at] = (slope * labels).sum(axis=1)

    def below(self, labels: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """No more than delta of each newcomer [B, C] together with each column, [B, k]; float32."""
        few = labels.astype(np.float32)
        rows = few.sum(axis=1)[:, None] + self._rows[columns]
        low = few @ self._slope[columns].T
        low += self._self[columns]
        low /= np.maximum(rows, 1e-30)
        low += self._offset[columns]
        low -= SLACK
        np.maximum(low, 0.0, out=low)
        if not self._rows[columns].all():
            low = np.where(rows > 0, low, 0.0)
        return low if self._kind == "emd" else np.sqrt(low, out=low)


__all__ = ["Tangents"]
