"""`interval_scale` of each policy in each frozen scenario: the best of `TRIES` on tuning seeds.

Written by `benchmarks/replication_policies.py --tune`, with the same tries for every policy.
"""

from __future__ import annotations

from collections.abc import Mapping

TRIES = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
TUNING_SEEDS = tuple(range(4))
INTERVAL_SCALES: Mapping[str, Mapping[str, float]] = {
    "calm": {
        "mobility": 1.0,
        "neighbour": 0.5,
        "neighbour_server": 0.5,
        "next_stage": 0.5,
        "central": 0.5,
    },
    "gauss_markov": {
        "mobility": 2.0,
        "neighbour": 0.25,
        "neighbour_server": 0.25,
        "next_stage": 0.25,
        "central": 0.25,
    },
    "waypoint": {
        "mobility": 2.0,
        "neighbour": 0.25,
        "neighbour_server": 0.5,
        "next_stage": 0.25,
        "central": 0.5,
    },
}
"""A policy that is not named has 1."""
