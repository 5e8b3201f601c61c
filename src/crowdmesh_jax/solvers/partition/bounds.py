"""Lower bounds on R_0 for a given period, by dynamic programming over device sets.

A period `T` forbids segments and links slower than `T`, and windows from either end of the chain
that take more than their share of periods. With windows in the middle forgotten, the cheapest chain
through each segment and link follows from tables over (device set, cut, device). These bounds are
nearly the truth where links are cheap beside compute; hardly anything is left to a program then.
They also yield chains that are good starts.

It knows tables, no programs. Work grows as 2^D D L^2; for more than `MOST_DEVICES` devices the
sets are dropped (a device may then return), which weakens the bounds and keeps them valid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .arrays import Costs
from .tables import Chain, Segment, Tables

MOST_DEVICES = 12


@dataclass(frozen=True, slots=True)
class Bounds:
    """What any chain with a period of at most `period_s` costs at least."""

    period_s: float
    least_s: float
    """R_0 of any such chain."""
    segment_s: np.ndarray
    """R_0 of any such chain through (device, first, end)."""
    link_s: np.ndarray
    """R_0 of any such chain over (source, target, cut)."""
    chain: Chain | None
    """A chain of R_0 `least_s` under the forgotten conditions; None where there is none."""


def bounds_at(costs: Costs, period_s: float) -> Bounds:
    """The bounds for one period."""
    limit_s = period_s * (1 + 1e-9)
    compute = np.where(costs.compute <= limit_s, costs.compute, np.inf)
    link = np.where(costs.busiest <= limit_s, costs.round_trip, np.inf)
    if len(costs.tables.devices) > MOST_DEVICES:
        return _with_returns(costs, period_s, compute, link)
    by_depth = np.where(costs.by_depth <= limit_s, costs.by_depth, np.inf)
    return _over_sets(costs, period_s, compute, by_depth, link)


def _members(mask: int, count: int) -> Iterator[int]:
    return (device for device in range(count) if mask >> device & 1)


def _over_sets(
    costs: Costs, period_s: float, compute: np.ndarray, by_depth: np.ndarray, link: np.ndarray
) -> Bounds:
    tables, limit_s = costs.tables, period_s * (1 + 1e-9)
    count, layers = len(tables.devices), tables.num_layers
    full, most = 1 << count, tables.max_stages
    # start[B][i][e]: layers i.. on exactly the set B, the first of them on e.
    # after[B][i][d]: the same with the hand-over from d, outside B, to whoever is first.
    start = np.full((full, layers + 1, count), np.inf)
    after = np.full((full, layers + 1, count), np.inf)
    # stop[A][j][e], before[A][j][d]: likewise for layers ..j-1, ending on e, and handing over to d.
    stop = np.full((full, layers + 1, count), np.inf)
    before = np.full((full, layers + 1, count), np.inf)
    after[0, layers, :] = 0.0
    before[0, 0, :] = 0.0
    for mask in range(1, full):
        size = mask.bit_count()
        if size > most:
            continue
        for device in _members(mask, count):
            rest = mask ^ (1 << device)
            seconds = by_depth[size, device]
            start[mask, :, device] = (seconds + after[rest, :, device][None, :]).min(axis=1)
            seconds = compute[device]
            stop[mask, :, device] = (seconds + before[rest, :, device][:, None]).min(axis=0)
        if tables.schedule != "gpipe":
            # The window of all stages so far: dearer than its share of periods, it is too slow.
            share = size if tables.schedule == "1f1b" else 2 * size - 1
            for seconds in (start[mask], stop[mask]):
                seconds[seconds > share * limit_s] = np.inf
        after[mask] = (link.transpose(2, 0, 1) + start[mask][:, None, :]).min(axis=2)
        before[mask] = (link.transpose(2, 1, 0) + stop[mask][:, None, :]).min(axis=2)

    after_within, start_within = after.copy(), start.copy()  # min over subsets of the mask
    for device in range(count):
        bit = 1 << device
        having = [mask for mask in range(full) if mask & bit]
        lacking = [mask ^ bit for mask in having]
        after_within[having] = np.minimum(after_within[having], after_within[lacking])
        start_within[having] = np.minimum(start_within[having], start_within[lacking])
    segment_s = np.full_like(compute, np.inf)
    link_s = np.full_like(link, np.inf)
    masks = np.arange(full)
    for device in range(count):
        bit = 1 << device
        without = masks[(masks & bit) == 0]
        ahead, behind = (
            before[without, :, device],
            after_within[full - 1 - without - bit, :, device],
        )
        useful = np.isfinite(ahead).any(axis=1) & np.isfinite(behind).any(axis=1)
        for left, right in zip(ahead[useful], behind[useful], strict=True):
            np.minimum(segment_s[device], left[:, None] + right[None, :], out=segment_s[device])
        ending = masks[(masks & bit) != 0]
        done = stop[ending, :, device]
        for target in range(count):
            todo = start_within[full - 1 - ending, :, target]
            link_s[device, target] = (done + todo).min(axis=0)
    return Bounds(
        period_s=period_s,
        least_s=float(start[:, 0, :].min()),
        segment_s=segment_s + compute,
        link_s=link_s + link,
        chain=_read_chain(tables, start, after, by_depth, link),
    )


def handed_over(costs: Costs, period_s: float) -> np.ndarray:
    """What the layers before a stage add to R_0 at least, for chains of at most this period.

    Returns:
        Seconds by (set, cut, device): layers `..cut - 1` on some devices of the set, and the
        hand-over of the last of them to the device. 0 at cut 0; infinite where nothing fits.
    """
    tables, limit_s = costs.tables, period_s * (1 + 1e-9)
    count, layers = len(tables.devices), tables.num_layers
    full, most = 1 << count, tables.max_stages
    compute = np.where(costs.compute <= limit_s, costs.compute, np.inf)
    link = np.where(costs.busiest <= limit_s, costs.round_trip, np.inf)
    before = np.full((full, layers + 1, count), np.inf)
    before[0, 0, :] = 0.0
    into = link.transpose(2, 1, 0)
    for mask in range(1, full):
        size = mask.bit_count()
        if size >= most:
            continue
        stop = np.full((layers + 1, count), np.inf)
        for device in _members(mask, count):
            rest = before[mask ^ (1 << device), :, device]
            stop[:, device] = (compute[device] + rest[:, None]).min(axis=0)
        if tables.schedule != "gpipe" and tables.has_windows:
            stop[stop > (size if tables.schedule == "1f1b" else 2 * size - 1) * limit_s] = np.inf
        before[mask] = (into + stop[:, None, :]).min(axis=2)
    for device in range(count):
        bit = 1 << device
        having = [mask for mask in range(full) if mask & bit]
        before[having] = np.minimum(before[having], before[[mask ^ bit for mask in having]])
    return before


def _read_chain(
    tables: Tables,
    start: np.ndarray,
    after: np.ndarray,
    by_depth: np.ndarray,
    link: np.ndarray,
) -> Chain | None:
    """Follows the minima from the first layer on, over sets that the problem accepts."""
    count, layers = len(tables.devices), tables.num_layers
    needed = sum(1 << device for device in tables.required)
    best, mask = math.inf, 0
    for candidate in range(1, 1 << count):
        if candidate & needed == needed and candidate.bit_count() >= tables.min_stages:
            value = float(start[candidate, 0, :].min())
            if value < best:
                best, mask = value, candidate
    if mask == 0:
        return None
    cuts, first, device = [], 0, int(start[mask, 0, :].argmin())
    while True:
        size, rest = mask.bit_count(), mask ^ (1 << device)
        end = int((by_depth[size, device, first] + after[rest, :, device]).argmin())
        cuts.append((device, end))
        if end == layers:
            return tables.chain(cuts)
        mask, first = rest, end
        device = int((link[device, :, first] + start[mask, first, :]).argmin())


def _with_returns(costs: Costs, period_s: float, compute: np.ndarray, link: np.ndarray) -> Bounds:
    tables = costs.tables
    count, layers = len(tables.devices), tables.num_layers
    before = np.full((layers + 1, count), np.inf)
    after = np.full((layers + 1, count), np.inf)
    stop, start = before.copy(), after.copy()
    before[0], after[layers] = 0.0, 0.0
    for layer in range(1, layers):
        stop[layer] = (compute[:, :, layer] + before.T).min(axis=1)
        before[layer] = (link[:, :, layer] + stop[layer][:, None]).min(axis=0)
    for layer in reversed(range(layers)):
        start[layer] = (compute[:, layer, :] + after.T).min(axis=1)
        if layer:
            after[layer] = (link[:, :, layer] + start[layer][None, :]).min(axis=1)
    return Bounds(
        period_s=period_s,
        least_s=float(start[0].min()),
        segment_s=compute + before.T[:, :, None] + after.T[:, None, :],
        link_s=link + stop.T[:, None, :] + start.T[None, :, :],
        chain=None,
    )


def surviving(
    costs: Costs, bands: list[tuple[float, Bounds]], cap_s: float
) -> tuple[list[Segment], dict[tuple[int, int, int], float]]:
    """Segments and links that a chain of cost at most `cap_s` may use, in any of the bands.

    Args:
        bands: (least period, bounds at the largest period) of each.

    Returns:
        The segments; round-trip seconds by (source, target, cut).
    """
    rest = costs.tables.microbatches - 1
    limit_s = cap_s * (1 + 1e-9)
    segments = np.zeros(costs.compute.shape, dtype=bool)
    links = np.zeros(costs.round_trip.shape, dtype=bool)
    for least_period_s, bounds in bands:
        for found, least_s, own_s in (
            (segments, bounds.segment_s, costs.compute),
            (links, bounds.link_s, costs.busiest),
        ):
            possible = np.isfinite(least_s)
            period_s = np.maximum(least_period_s, own_s[possible])
            found[possible] |= least_s[possible] + rest * period_s <= limit_s
    kept = [s for s in costs.tables.segments if segments[s.device, s.first, s.end]]
    return kept, {
        (int(source), int(target), int(layer)): float(costs.round_trip[source, target, layer])
        for source, target, layer in zip(*np.nonzero(links), strict=True)
    }
