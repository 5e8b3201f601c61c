"""Refusing what is no number, no seed, no array: one message each, with the name and the value.

Comparisons are written so that NaN fails them.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InvalidValueError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
MAX_DEVICES = 10_000_000


def number(name: str, value: Any, *, least: float = 0.0, above: bool = False) -> float:
    """A finite number, `>= least`, or `> least` where `above`.

    Raises:
        InvalidValueError: It is not.
    """
    bound = f"{'>' if above else '>='} {least:g}"
    try:
        made = float(value)
    except (TypeError, ValueError, OverflowError):
        made = math.nan
    if isinstance(value, bool) or not (
        math.isfinite(made) and (made > least if above else made >= least)
    ):
        raise InvalidValueError(f"{name} must be a finite number {bound}, got {value!r}")
    return made


def whole(name: str, value: Any, *, least: int = 0, most: int | None = None) -> int:
    """An integer within bounds.

    Raises:
        InvalidValueError: It is not.
    """
    try:
        made = operator.index(value)
    except TypeError:
        made = least - 1
    if isinstance(value, bool) or made < least or (most is not None and made > most):
        upper = "" if most is None else f" and <= {most}"
        raise InvalidValueError(f"{name} must be an integer >= {least}{upper}, got {value!r}")
    return made


def array(name: str, values: ArrayLike, *, last: int | None = None) -> Floats:
    """A finite float64 array; `last`: the length of its last axis.

    Raises:
        InvalidValueError: It is none; tells the first place that is not finite.
    """
    try:
        made = np.asarray(values, np.float64)
    except (TypeError, ValueError) as exc:
        raise InvalidValueError(f"{name} must be an array of numbers: {exc}") from exc
    if last is not None and (made.ndim == 0 or made.shape[-1] != last):
        raise InvalidValueError(f"{name} must have {last} as its last axis, got {made.shape}")
    if not np.isfinite(made).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(made))[0])
        raise InvalidValueError(f"{name} must be finite, got {made[place]} at {place}")
    return made


def at_least_zero(name: str, values: ArrayLike) -> Floats:
    """An array of finite numbers >= 0.

    Raises:
        InvalidValueError: It is none; tells the first place.
    """
    made = array(name, values)
    if (made < 0).any():
        place = tuple(int(i) for i in np.argwhere(made < 0)[0])
        raise InvalidValueError(f"{name} must be >= 0, got {made[place]} at {place}")
    return made


def frozen(values: NDArray[Any]) -> NDArray[Any]:
    """A copy that nobody can write to."""
    made = values.copy()
    made.flags.writeable = False
    return made
