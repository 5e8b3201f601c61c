"""Draws a crowd from its specification: vectorised, seeded, the same in every process.

Each topic (machines, links, places, data, stays) has a stream of random numbers of its own, so that
another label skew leaves speeds and links as they were.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ..core import Access, Crowd, Device, DeviceId
from ..errors import InvalidCrowdError
from .spec import CrowdSpec, DataSpec, LinkClass, MachineClass
from .spreads import Floats

_TOPICS = ("machines", "links", "places", "data", "stays")
"""Order is part of what a seed means: append only."""


def generate(spec: CrowdSpec, seed: int) -> Crowd:
    """Draws the crowd that `spec` and `seed` name; 10,000 devices take a fraction of a second.

    Every device has `access`, so the crowd needs no list of links. Groups and link classes get
    their shares exactly, up to rounding; figures within them are drawn. Figures are rounded to
    four digits, so that a crowd file stays readable. The same spec, seed and numpy release give
    the same crowd.

    Args:
        seed: Any integer >= 0.

    Raises:
        InvalidCrowdError: The seed is no such integer.
    """
    streams = _streams(seed)
    sizes = _shares(spec.devices, [group.weight for group in spec.groups])
    members = np.split(np.arange(spec.devices), np.cumsum(sizes)[:-1])
    flops_per_s = np.empty(spec.devices)
    memory_bytes = np.empty(spec.devices, np.int64)
    hazard_per_s = np.zeros(spec.devices)
    links: dict[LinkClass, list[NDArray[np.int64]]] = {}
    for group, mine in zip(spec.groups, members, strict=True):
        speeds, memories = _machines(group.machine, len(mine), streams["machines"])
        flops_per_s[mine], memory_bytes[mine] = speeds, memories
        stays = streams["stays"].standard_normal(len(mine))
        if group.stay_s is not None:
            hazard_per_s[mine] = 1 / group.stay_s.at(stays)
        counts = _shares(len(mine), [weight for _, weight in group.links])
        parts = np.split(streams["links"].permutation(mine), np.cumsum(counts)[:-1])
        for (link, _), part in zip(group.links, parts, strict=True):
            links.setdefault(link, []).append(part)
    access, centres_m = _access(spec, links, streams["links"])
    places_m = _places(spec, links, centres_m, streams["places"])
    labels = _labels(spec.data, spec.devices, streams["data"])
    columns = zip(
        _ids(spec, sizes),
        _rounded(flops_per_s).tolist(),
        memory_bytes.tolist(),
        access,
        map(tuple, labels.tolist()),
        _rounded(hazard_per_s).tolist(),
        np.round(places_m, 1).tolist(),
        strict=True,
    )
    devices = tuple(
        Device(
            id=DeviceId(name),
            flops_per_s=flops,
            memory_bytes=memory,
            access=way,
            label_counts=counts,
            leave_hazard_per_s=hazard,
            position_m=(place[0], place[1]),
        )
        for name, flops, memory, way, counts, hazard, place in columns
    )
    return Crowd(devices=devices, backhaul=spec.backhaul)


def _streams(seed: int) -> dict[str, Generator]:
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if number < 0 or isinstance(seed, bool):
        raise InvalidCrowdError(f"the seed of a crowd must be an integer >= 0, got {seed!r}")
    children = np.random.SeedSequence(number).spawn(len(_TOPICS))
    return {
        topic: np.random.default_rng(child) for topic, child in zip(_TOPICS, children, strict=True)
    }


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """Splits `total` in proportion to `weights`, largest remainders first; ties to the earlier."""
    exact = [total * weight / math.fsum(weights) for weight in weights]
    sizes = [math.floor(size) for size in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (sizes[i] - exact[i], i))
    for i in by_remainder[: total - sum(sizes)]:
        sizes[i] += 1
    return sizes


def _ids(spec: CrowdSpec, sizes: Sequence[int]) -> list[str]:
    """`phone-07`: numbered per name, also where two groups have machines of one name."""
    totals: Counter[str] = Counter()
    for group, size in zip(spec.groups, sizes, strict=True):
        totals[group.machine.name] += size
    next_of: Counter[str] = Counter()
    ids = []
    for group, size in zip(spec.groups, sizes, strict=True):
        name = group.machine.name
        width = len(str(totals[name]))
        ids += [f"{name}-{i:0{width}d}" for i in range(next_of[name] + 1, next_of[name] + size + 1)]
        next_of[name] += size
    return ids


def _machines(
    machine: MachineClass, count: int, random: Generator
) -> tuple[Floats, NDArray[np.int64]]:
    """Flops per second and free bytes of `count` machines; both follow one pair of normals."""
    speed, other = random.standard_normal((2, count))
    together = machine.rank_correlation
    memory = together * speed + math.sqrt(1 - together**2) * other
    sizes = np.array([size for size, _ in machine.ram_bytes])
    cumulative = np.cumsum([weight for _, weight in machine.ram_bytes])
    steps = [NormalDist().inv_cdf(share) for share in cumulative[:-1] / cumulative[-1]]
    free = np.floor(sizes[np.searchsorted(steps, memory)] * machine.memory_share)
    return machine.flops_per_s.at(speed), np.maximum(free, 1).astype(np.int64)


def _access(
    spec: CrowdSpec, links: dict[LinkClass, list[NDArray[np.int64]]], random: Generator
) -> tuple[list[Access], Floats]:
    """Each device's access, and where its cell's middle lies."""
    rates = np.empty((3, spec.devices))
    cells = [""] * spec.devices
    for link, parts in links.items():
        mine = np.concatenate(parts)
        down, up, latency = random.standard_normal((3, len(mine)))
        rates[1, mine] = link.downlink_bytes_per_s.at(down)
        rates[0, mine] = rates[1, mine] * link.uplink_share.at(up)
        rates[2, mine] = link.latency_s.at(latency)
    # Where cells are given, all links share them; else each link class has its own.
    pools = (
        [("cell", spec.cells, list(links))]
        if spec.cells
        else [
            (link.name, math.ceil(sum(map(len, parts)) / link.cell_devices), [link])
            for link, parts in links.items()
        ]
    )
    centres_m = np.zeros((spec.devices, 2))
    for name, count, classes in pools:
        mine = np.concatenate([part for link in classes for part in links[link]])
        numbers = np.arange(len(mine)) % max(count, 1)
        side = math.ceil(math.sqrt(count)) if spec.layout == "square" else count
        grid = np.stack([numbers % max(side, 1), numbers // max(side, 1)], axis=1)
        centres_m[mine] = 2 * max(link.reach_m for link in classes) * grid
        for device, number in zip(mine.tolist(), numbers.tolist(), strict=True):
            cells[device] = f"{name}-{number + 1}"
    up, down, latency = (column.tolist() for column in _rounded(rates))
    access = [
        Access(uplink_bytes_per_s=u, downlink_bytes_per_s=d, latency_s=wait, cell=cell)
        for u, d, wait, cell in zip(up, down, latency, cells, strict=True)
    ]
    return access, centres_m


def _places(
    spec: CrowdSpec,
    links: dict[LinkClass, list[NDArray[np.int64]]],
    centres_m: Floats,
    random: Generator,
) -> Floats:
    """Uniform over the disc that the device's access point reaches; a road's is 10 m wide."""
    reach_m = np.empty(spec.devices)
    for link, parts in links.items():
        reach_m[np.concatenate(parts)] = link.reach_m
    if spec.layout == "road":
        along, across = random.random((2, spec.devices))
        offsets_m = np.stack([reach_m * (2 * along - 1), 10 * (across - 0.5)], axis=1)
    else:
        radius, turn = random.random((2, spec.devices))
        radius_m, angle = reach_m * np.sqrt(radius), 2 * math.pi * turn
        offsets_m = np.stack([radius_m * np.cos(angle), radius_m * np.sin(angle)], axis=1)
    return centres_m + offsets_m


def _labels(data: DataSpec, count: int, random: Generator) -> NDArray[np.int64]:
    """Rows per device and class, `[count, classes]`."""
    rows = np.maximum(1, np.rint(data.rows.at(random.standard_normal(count)))).astype(np.int64)
    mixes = random.dirichlet(np.full(data.classes, data.alpha), size=count)
    return random.multinomial(rows, mixes)


def _rounded(values: Floats) -> Floats:
    """To four digits. Scaled by whole powers of ten, so that they print short."""
    safe = np.where(values > 0, values, 1.0)
    power = np.floor(np.log10(safe)) - 3
    up, down = 10.0 ** np.maximum(power, 0), 10.0 ** np.maximum(-power, 0)
    return np.where(values > 0, np.rint(safe * down / up) * up / down, 0.0)
