"""`interval_scale` of each policy in each frozen scenario: the best of `TRIES` on tuning seeds.

Written by `benchmarks/replication_policies.py --tune`, with the same tries for every policy.
"""

from __future__ import annotations

from collections.abc import Mapping

TRIES = (0.15, 0.25, 0.4, 0.6, 1.0, 1.6, 2.5, 4.0)
TUNING_SEEDS = tuple(range(8))
INTERVAL_SCALES: Mapping[str, Mapping[str, float]] = {}
