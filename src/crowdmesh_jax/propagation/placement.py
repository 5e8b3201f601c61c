"""Who holds which copies: values of holders, exact for small cases, greedy with a bound for others.

A holder is worth `presence x speed`: the chance that it is there when the owner is lost, times how
fast it would go on. Of several holders the fastest one that is still there takes over, so a set S
of holders, fastest first, is worth

    f(S) = sum_j speed_j presence_j prod_{k < j} (1 - presence_k)

which is monotone and submodular. A plan's value is compared in this order: the weight of ranges
that have a copy at all, then the weighted sum of f. Limits: bytes in memory and on disk of each
device, bytes of one wave, and no two copies (the owner's counts) behind one hazard.

**Bound of the greedy.** The feasible sets are a k-extendible system with k = max(1, G) + r_m + r_b:
to add a copy, at most G copies of the same range have to go (one for each group of the device, G
the most that any is in), and r = ceil(largest / smallest range) of others for its memory and as
many for the wave's bytes, where those limits bind at all. Greedy by gain then reaches at least
1 / (1 + k) of the optimum of a monotone submodular function (Fisher, Nemhauser and Wolsey 1978, for
k-systems). That is a weak promise; `bound` is the certificate of the case at hand: what each range
could get if it were alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ..solvers.units import format_bytes
from .seats import (
    Lack,
    Placement,
    PlacementProblem,
    PlacementRange,
    Room,
    Seat,
    Unprotected,
    Value,
    room_of,
    set_value,
)

EXACT_NODES = 20_000
"""Partial placements that the exact search looks at before the greedy's answer stands."""


def place(problem: PlacementProblem, *, exact_nodes: int = EXACT_NODES) -> Placement:
    """Chooses holders.

    The exact search proves the optimum where it ends within `exact_nodes`; else the better of its
    best and the greedy's is returned, with `optimal=False`. Ties go to memory before disk, then to
    the lower device id, so the order of devices does not matter.
    """
    options = [list(_options(problem, item)) for item in problem.ranges]
    alone = [
        max((set_value(item, [d for d, _ in o]) for o in sets), default=(0, 0.0))
        for item, sets in zip(problem.ranges, options, strict=True)
    ]
    best = _greedy(problem)
    best, proven = _exact(problem, options, alone, best, exact_nodes)
    value = _total(problem, best)
    return Placement(
        seats=tuple(_ordered(item, s) for item, s in zip(problem.ranges, best, strict=True)),
        value=value,
        bound=value if proven else _added(alone),
        optimal=proven,
        guarantee=1.0 if proven else 1 / (1 + _extendible(problem)),
        unprotected=tuple(
            _why_not(problem, item)
            for item, s in zip(problem.ranges, best, strict=True)
            if not s and problem.copies
        ),
    )


def _seats(problem: PlacementProblem, item: PlacementRange) -> list[Seat]:
    """Places where a copy of the range could be by itself."""
    found: list[Seat] = []
    for prospect in sorted(item.prospects, key=lambda p: p.device):
        device = prospect.device
        if prospect.presence < problem.least_presence or prospect.speed <= 0:
            continue
        if not problem.groups.apart([item.owner, device]):
            continue
        if problem.wave_bytes is not None and item.wave_bytes > problem.wave_bytes:
            continue
        for keep in ("memory", "disk"):
            room = problem.rooms.get(device, Room())
            has = room.memory_bytes if keep == "memory" else room.disk_bytes
            if has >= item.held_bytes and (has > 0 or keep == "memory"):
                found.append((device, keep))
    return found


def _options(problem: PlacementProblem, item: PlacementRange) -> Iterator[tuple[Seat, ...]]:
    """Sets of holders of one range, without regard to the others; () among them."""
    seats = _seats(problem, item)

    def grow(chosen: tuple[Seat, ...], start: int) -> Iterator[tuple[Seat, ...]]:
        yield chosen
        if len(chosen) == problem.copies:
            return
        for index in range(start, len(seats)):
            devices = [item.owner, *(d for d, _ in chosen), seats[index][0]]
            if problem.groups.apart(devices):
                yield from grow((*chosen, seats[index]), index + 1)

    yield from grow((), 0)


def _exact(
    problem: PlacementProblem,
    options: list[list[tuple[Seat, ...]]],
    alone: list[Value],
    start: list[tuple[Seat, ...]],
    nodes: int,
) -> tuple[list[tuple[Seat, ...]], bool]:
    """Depth first over ranges, best sets first, pruned by what the rest could get alone."""
    ranked = [
        sorted(
            sets,
            key=lambda o, item=item: (
                tuple(-v for v in set_value(item, [d for d, _ in o])),
                [(keep != "memory", device) for device, keep in o],
            ),
        )
        for item, sets in zip(problem.ranges, options, strict=True)
    ]
    rest: list[Value] = [(0, 0.0)]
    for value in reversed(alone):
        rest.append((rest[-1][0] + value[0], rest[-1][1] + value[1]))
    rest.reverse()
    best = list(start)
    best_value = _total(problem, best)
    used: dict[Seat, int] = {}
    looked = 0

    def search(index: int, chosen: list[tuple[Seat, ...]], value: Value, sent: int) -> bool:
        nonlocal best, best_value, looked
        if index == len(problem.ranges):
            if value > best_value:
                best, best_value = list(chosen), value
            return True
        item = problem.ranges[index]
        for option in ranked[index]:
            looked += 1
            if looked > nodes:
                return False
            gain = set_value(item, [d for d, _ in option])
            after = (value[0] + gain[0], value[1] + gain[1])
            reach = (after[0] + rest[index + 1][0], after[1] + rest[index + 1][1])
            if reach <= best_value:
                break  # the sets that follow are worth no more
            sends = sent + len(option) * item.wave_bytes
            if problem.wave_bytes is not None and sends > problem.wave_bytes:
                continue
            if any(used.get(s, 0) + item.held_bytes > room_of(problem, s) for s in option):
                continue
            for seat in option:
                used[seat] = used.get(seat, 0) + item.held_bytes
            ended = search(index + 1, [*chosen, option], after, sends)
            for seat in option:
                used[seat] -= item.held_bytes
            if not ended:
                return False
        return True

    proven = search(0, [], (0, 0.0), 0)
    return best, proven


def _greedy(problem: PlacementProblem) -> list[tuple[Seat, ...]]:
    """The copy that gains most, again and again."""
    chosen: list[tuple[Seat, ...]] = [() for _ in problem.ranges]
    candidates = [_seats(problem, item) for item in problem.ranges]
    used: dict[Seat, int] = {}
    sent = 0
    while True:
        best: tuple[Value, int, Seat] | None = None
        for index, item in enumerate(problem.ranges):
            if len(chosen[index]) == problem.copies:
                continue
            if problem.wave_bytes is not None and sent + item.wave_bytes > problem.wave_bytes:
                continue
            has = [device for device, _ in chosen[index]]
            now = set_value(item, has)
            for seat in candidates[index]:
                if used.get(seat, 0) + item.held_bytes > room_of(problem, seat):
                    continue
                if not problem.groups.apart([item.owner, *has, seat[0]]):
                    continue
                then = set_value(item, [*has, seat[0]])
                gain = (then[0] - now[0], then[1] - now[1])
                # Strictly: the first of equals stays, in the order of ranges, then of devices.
                if gain > (0, 0.0) and (best is None or gain > best[0]):
                    best = (gain, index, seat)
        if best is None:
            return chosen
        _, index, seat = best
        chosen[index] = (*chosen[index], seat)
        used[seat] = used.get(seat, 0) + problem.ranges[index].held_bytes
        sent += problem.ranges[index].wave_bytes


def _added(values: Sequence[Value]) -> Value:
    return (sum(v[0] for v in values), math.fsum(v[1] for v in values))


def _total(problem: PlacementProblem, seats: Sequence[Sequence[Seat]]) -> Value:
    total = (0, 0.0)
    for item, chosen in zip(problem.ranges, seats, strict=True):
        value = set_value(item, [device for device, _ in chosen])
        total = (total[0] + value[0], total[1] + value[1])
    return total


def _ordered(item: PlacementRange, seats: Sequence[Seat]) -> tuple[Seat, ...]:
    return tuple(sorted(seats, key=lambda s: (tuple(-v for v in set_value(item, [s[0]])), s[0])))


def _extendible(problem: PlacementProblem) -> int:
    """k of the module's docstring."""
    devices = {prospect.device for item in problem.ranges for prospect in item.prospects}
    most_groups = max((len(problem.groups.names_of(device)) for device in devices), default=1)

    def ratio(sizes: list[int]) -> int:
        some = [size for size in sizes if size > 0]
        return math.ceil(max(some) / min(some)) if some else 0

    k = max(1, most_groups) + ratio([item.held_bytes for item in problem.ranges])
    if problem.wave_bytes is not None:
        k += ratio([item.wave_bytes for item in problem.ranges])
    return k


def _why_not(problem: PlacementProblem, item: PlacementRange) -> Unprotected:
    lack, detail = _lack(problem, item)
    return Unprotected(
        owner=item.owner,
        first_layer=item.first_layer,
        last_layer=item.last_layer,
        lack=lack,
        detail=detail,
    )


def _lack(problem: PlacementProblem, item: PlacementRange) -> tuple[Lack, str]:
    there = [
        p for p in item.prospects if p.presence >= problem.least_presence and p.speed > 0
        and p.device != item.owner
    ]  # fmt: skip
    if not there:
        return "nobody", "no other device is expected to be there when the owner is lost"
    apart = [p for p in there if problem.groups.apart([item.owner, p.device])]
    if not apart:
        shared = sorted({g for p in there for g in problem.groups.together(item.owner, p.device)})
        return "hazard", f"all {len(there)} candidates share a hazard with it: {', '.join(shared)}"
    needs = format_bytes(item.held_bytes)
    sizes = [
        (size, p.device)
        for p in apart
        for size in (
            problem.rooms.get(p.device, Room()).memory_bytes,
            problem.rooms.get(p.device, Room()).disk_bytes,
        )
    ]
    most, who = max(sizes, key=lambda pair: (pair[0], pair[1]))
    if most < item.held_bytes:
        return "memory", f"needs room for {needs}, the most is {format_bytes(most)} at {who}"
    if problem.wave_bytes is not None and item.wave_bytes > problem.wave_bytes:
        return "bytes", (
            f"a copy sends {format_bytes(item.wave_bytes)}, a wave may send"
            f" {format_bytes(problem.wave_bytes)}"
        )
    return "competition", f"{needs} would fit alone; other ranges have the room or the bytes"
