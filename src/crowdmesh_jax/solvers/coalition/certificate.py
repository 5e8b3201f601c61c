"""Is a structure stable? Each device's best single move, worked out, whoever made the structure.

Nash-stable: no device gains more than epsilon by any switch. Individually stable: none gains by a
switch that its hosts would welcome (none of them waits longer). Bounds spare work, never truth:
the best deviation's gain is exact. For large crowds a seeded sample of devices is looked at, and
said so.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from .arrays import ArrayGame
from .game import Game
from .preferences import Preference, marginal
from .problem import Certificate, Cost, Deviation
from .search import TOGETHER, Search
from .value import members_of

FEW = 64
"""Devices beyond which a game by closed forms is looked at as arrays: the same, sooner."""


def certify(
    game: Game,
    masks: Sequence[int],
    *,
    name: str,
    preference: Preference,
    epsilon: float,
    sample: int | None = None,
    seed: int = 0,
) -> Certificate:
    """Looks at every single deviation of all devices, or of `sample` of them."""
    if game.is_by_sums and preference is marginal and game.count > FEW:
        looked = None
        if sample is not None and sample < game.count:
            looked = random.Random(f"certificate {seed}").sample(range(game.count), sample)
        arrays = ArrayGame(game, [members_of(mask) for mask in masks], epsilon=epsilon)
        return arrays.certificate(name, looked)
    search = Search(game, masks, preference=preference, epsilon=epsilon, rng=random.Random(seed))
    devices = list(range(game.count))
    if sample is not None and sample < game.count:
        devices = sorted(random.Random(f"certificate {seed}").sample(devices, sample))
    ids, found = game.facts.ids, []
    for place, device in enumerate(devices):
        if place % TOGETHER == 0:
            search.foresee(devices[place : place + TOGETHER])
        targets = search.targets(device)
        best = search.best_switch(device, targets)
        if best is None:  # alone in the whole crowd, or no room anywhere
            continue
        gain, target = best
        welcome: Cost | None = None
        if gain.is_gain(epsilon):
            for other in sorted(targets):
                own = search.gain(device, other)
                if own.is_gain(epsilon) and (welcome is None or own > welcome):
                    host = game.entry(other).wait if other else None
                    if host is None or game.entry(other | 1 << device).wait <= host:
                        welcome = own
        found.append(
            Deviation(
                device=ids[device],
                target=tuple(ids[d] for d in members_of(target)),
                gain=gain,
                welcome_gain=welcome,
            )
        )
    looked = {deviation.device for deviation in found}
    for device in devices:
        if ids[device] not in looked:
            found.append(
                Deviation(device=ids[device], target=(), gain=Cost(0.0, 0.0), welcome_gain=None)
            )
    return Certificate(
        preference=name,
        epsilon=epsilon,
        deviations=tuple(sorted(found, key=lambda deviation: deviation.device)),
        devices=game.count,
    )
