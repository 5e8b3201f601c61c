"""Who is in range of whom: all pairs, found through a grid of cells as wide as the range."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InvalidValueError
from . import checks

Ints = NDArray[np.int64]
MAX_PAIRS = 20_000_000


def pairs_in_range(
    positions_m: ArrayLike,
    range_m: float,
    *,
    present: ArrayLike | None = None,
    max_pairs: int = MAX_PAIRS,
) -> tuple[Ints, Ints]:
    """The pairs (a, b), a < b, that are at most `range_m` apart, in order of a, then b.

    Args:
        positions_m: `[n, 2]`
        present: `[n]` booleans; who is absent is in nobody's range.
        max_pairs: A bound on the memory: a crowd in one spot has n^2 / 2 pairs.

    Raises:
        InvalidValueError: More candidates than `max_pairs`; a value out of range.
    """
    places = checks.array("positions_m", positions_m, last=2)
    range_m = checks.number("range_m", range_m, above=True)
    if places.ndim != 2:
        raise InvalidValueError(f"positions_m must be [n, 2], got {places.shape}")
    who = np.arange(len(places)) if present is None else np.flatnonzero(np.asarray(present, bool))
    if len(who) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    shown = places[who]
    with np.errstate(over="ignore"):
        cells = np.floor((shown - shown.min(axis=0)) / range_m)
    rows = float(cells[:, 1].max()) + 3
    if not (float(cells[:, 0].max()) + 3) * rows < 2**53:
        raise InvalidValueError(
            f"range_m = {range_m:g} is too small for an area of {np.ptp(shown, axis=0)} m"
        )
    # One number a cell; neighbouring columns are `rows` apart, and the border is never occupied.
    keys = ((cells[:, 0] + 1) * rows + cells[:, 1] + 1).astype(np.int64)
    order = np.argsort(keys, kind="stable")
    keys, who = keys[order], who[order]
    x, y = np.ascontiguousarray(shown[order].T)
    # From a cell: the rest of it and the cell above, and the three cells of the next column. Each
    # is one run of keys, and together they find every pair once.
    height = int(rows)
    index = np.arange(len(keys))
    found, total = [], 0
    for low, high in ((0, 1), (height - 1, height + 1)):
        start = index + 1 if low == 0 else np.searchsorted(keys, keys + low, "left")
        counts = np.searchsorted(keys, keys + high, "right") - start
        total += int(counts.sum())
        if total > max_pairs:
            raise InvalidValueError(
                f"more than {max_pairs} pairs of {len(who)} devices lie within {range_m:g} m or"
                " nearly so; use a shorter range or fewer devices"
            )
        a = np.repeat(index, counts)
        b = np.arange(len(a)) + np.repeat(start - np.cumsum(counts) + counts, counts)
        near = np.hypot(x[b] - x[a], y[b] - y[a]) <= range_m
        one, other = who[a[near]], who[b[near]]
        found.append(np.minimum(one, other) * len(places) + np.maximum(one, other))
    # Sorted as single numbers: an order that does not depend on the cells.
    first, second = np.divmod(np.sort(np.concatenate(found)), len(places))
    return first.astype(np.int64, copy=False), second.astype(np.int64, copy=False)
