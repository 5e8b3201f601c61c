"""The dynamic program on as many devices as the time allows: the most promising ones.

Over device sets its work doubles with each device. A good plan rarely needs all of a large crowd,
so the program runs over those that good chains use, then the fastest others, until its tables would
take too long. What it finds are candidates; it proves nothing of the whole crowd.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from .arrays import table_work
from .bounds import MOST_DEVICES
from .dp import Labels
from .tables import Chain, Tables


def promising(tables: Tables, chains: Sequence[Chain], count: int) -> list[int]:
    """`count` devices: those that must be, those of the best chains, then the fastest."""
    problem = tables.problem
    must = {tables.devices.index(d) for d in problem.pins.values() if d in tables.devices}
    order = sorted(must | tables.required)
    for chain in sorted(chains, key=lambda chain: (tables.cost_s(chain), tables.rank(chain))):
        order += [segment.device for segment in chain]

    def alone_s(device: int) -> float:
        rows = problem.profile.layer_seconds(problem.crowd, tables.devices[device])
        return sum(row.forward_s + row.backward_s for row in rows)

    order += sorted(range(len(tables.devices)), key=lambda device: (alone_s(device), device))
    return sorted(list(dict.fromkeys(order))[: max(count, len(must | tables.required))])


def chains_of_few(
    tables: Tables,
    chains: Sequence[Chain],
    until_s: float,
    *,
    work: float,
    slack: float = 0.0,
    most: int = 10_000,
) -> list[Chain]:
    """Chains of the dynamic program over the most promising devices, as chains of `tables`.

    Args:
        chains: Good ones so far.
        until_s: `time.monotonic()` at which it stops.
        work: Most steps of its tables, see `table_work`; fewer where less than a second is left.
        slack, most: As of `Labels`.
    """
    work *= min(1.0, max(0.0, until_s - time.monotonic()))
    all_of = len(tables.devices)
    count = min(all_of, MOST_DEVICES)
    while count > 1 and table_work(tables, count) > work:
        count -= 1
    if count < 2:
        return []
    few = promising(tables, chains, count)
    if len(few) > MOST_DEVICES or table_work(tables, len(few)) > work:
        return []
    if len(few) == all_of:
        own = tables
    else:
        names = tuple(tables.devices[device] for device in few)
        own = type(tables)(replace(tables.problem, devices=names), like=tables)
    known = []
    for chain in chains:
        if all(segment.device in few for segment in chain):
            made = own.chain([(few.index(segment.device), segment.end) for segment in chain])
            if made is not None:
                known.append(made)
    labels = Labels(own, until_s, list(known), slack=slack, most=most)
    labels.run()
    found = []
    for chain in labels.chains[len(known) :]:
        made = tables.chain([(few[segment.device], segment.end) for segment in chain])
        if made is not None:
            found.append(made)
    return found
