"""How long two devices stay in range of each other, if both go on as they do.

Straight motion, closed form (Su, Lee and Gerla, "Mobility prediction and routing in ad hoc wireless
networks", 2001: link expiration time), written so that nothing cancels: with p the place of `b` as
`a` sees it, w its velocity, u = w / |w| and h = p x u the distance at which it passes, the link
ends after (sqrt(r^2 - h^2) - p.u) / |w| seconds.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InvalidValueError
from . import checks
from .checks import Floats

_BLOCK = 8192


def link_lifetime_s(
    position_a_m: ArrayLike,
    velocity_a_m_per_s: ArrayLike,
    position_b_m: ArrayLike,
    velocity_b_m_per_s: ArrayLike,
    range_m: float,
) -> Floats:
    """Seconds until two devices are farther apart than `range_m`.

    Args:
        position_a_m: `[..., 2]`; all four are broadcast against each other: `[n, 1, 2]` against
            `[n, k, 2]` gives the lifetimes of n devices to k others each.
        range_m: Any number > 0.

    Returns:
        `[...]`: 0 where they are out of range now, infinite where they are in range and move alike.
        Never NaN.

    Raises:
        InvalidValueError: Not finite, not pairs, shapes that do not fit.

    Example:
        >>> import numpy as np
        >>> still, east = np.zeros(2), np.array([2.0, 0.0])
        >>> float(link_lifetime_s(still, still, [-10.0, 0.0], east, range_m=50.0))
        30.0
    """
    apart_m, relative = _relative(
        position_a_m, velocity_a_m_per_s, position_b_m, velocity_b_m_per_s
    )
    return relative_lifetime_s(apart_m, relative, range_m)


def relative_lifetime_s(offset_m: ArrayLike, relative_m_per_s: ArrayLike, range_m: float) -> Floats:
    """The same, from where the other is seen and how it moves relative to the one who sees it.

    It is also the time until a device leaves a disc: `offset_m` from its centre.
    """
    apart = checks.array("offset_m", offset_m, last=2)
    relative = checks.array("relative_m_per_s", relative_m_per_s, last=2)
    range_m = checks.number("range_m", range_m, above=True)
    try:
        apart, relative = np.broadcast_arrays(apart, relative)
    except ValueError as exc:
        raise InvalidValueError(f"offsets and velocities do not fit: {exc}") from exc
    lifetime_s = np.empty(apart.shape[:-1])
    flat_s = lifetime_s.reshape(-1)
    # reshape copies where it must; blocks of it stay in the cache and need no fresh pages.
    apart, relative = apart.reshape(-1, 2), relative.reshape(-1, 2)
    for start in range(0, len(flat_s), _BLOCK):
        some = slice(start, start + _BLOCK)
        (x, y), (vx, vy) = apart[some].T, relative[some].T
        flat_s[some] = _closed_form(x, y, vx, vy, range_m)
    return lifetime_s


def _closed_form(x: Floats, y: Floats, vx: Floats, vy: Floats, range_m: float) -> Floats:
    # Out of bounds only for pairs far out of range, whose result is taken from nothing of this.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # hypot neither overflows nor underflows, so the comparison below holds at any scale.
        distance_m, speed = np.hypot(x, y), np.hypot(vx, vy)
        moves = speed > 0
        safe = np.where(moves, speed, 1.0)
        ux, uy = vx / safe, vy / safe
        # In units of the range, so that squares stay in bounds.
        along = (x * ux + y * uy) / range_m
        across = (x * uy - y * ux) / range_m
        near = distance_m / range_m
        half = np.sqrt(np.maximum((1 - across) * (1 + across), 0.0))
        receding = along > 0
        # half - along, without the cancellation where the other recedes from near the border.
        inside = np.maximum((1 - near) * (1 + near), 0.0)
        way = np.where(receding, inside / np.where(receding, half + along, 1.0), half - along)
        lifetime_s = np.where(moves, way * range_m / safe, math.inf)
    return np.where(distance_m <= range_m, lifetime_s, 0.0)


def _relative(*given: ArrayLike) -> tuple[Floats, Floats]:
    names = ("position_a_m", "velocity_a_m_per_s", "position_b_m", "velocity_b_m_per_s")
    arrays = [checks.array(name, value, last=2) for name, value in zip(names, given, strict=True)]
    try:
        return arrays[2] - arrays[0], arrays[3] - arrays[1]
    except ValueError as exc:
        raise InvalidValueError(f"positions and velocities do not fit: {exc}") from exc


def pairwise_lifetime_s(
    positions_m: ArrayLike,
    velocities_m_per_s: ArrayLike,
    members: ArrayLike,
    range_m: float,
) -> Floats:
    """Lifetimes of the links from each device to those it is interested in.

    Args:
        positions_m: `[n, 2]`
        velocities_m_per_s: `[n, 2]`
        members: `[n, k]` integers: whom each device asks about, -1 for nobody.

    Returns:
        `[n, k]`; 0 for nobody.
    """
    positions = checks.array("positions_m", positions_m, last=2)
    velocities = checks.array("velocities_m_per_s", velocities_m_per_s, last=2)
    who = np.asarray(members)
    if who.ndim != 2 or len(who) != len(positions) or not np.issubdtype(who.dtype, np.integer):
        raise InvalidValueError(
            f"members must be integers [{len(positions)}, k], got {who.dtype} {who.shape}"
        )
    if who.size and not (who.min() >= -1 and who.max() < len(positions)):
        raise InvalidValueError(
            f"members must be -1 or device numbers below {len(positions)},"
            f" got {who.min()} to {who.max()}"
        )
    lifetime_s = relative_lifetime_s(
        positions[who] - positions[:, None], velocities[who] - velocities[:, None], range_m
    )
    return np.where(who < 0, 0.0, lifetime_s)
