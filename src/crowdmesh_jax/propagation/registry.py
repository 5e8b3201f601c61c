"""Replication policies by name: the built-in ones and those that other packages bring.

A package adds one through the entry point group `crowdmesh_jax.replication_policies`: a name and a
class (or function) that takes the options and returns an object with `decide(view)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

from ..core.plugins import PlugIns
from .policies import (
    CentralPolicy,
    MobilityPolicy,
    NeighbourPolicy,
    NextStagePolicy,
    NonePolicy,
)
from .policy import ReplicationPolicy

POLICIES = PlugIns(
    group="crowdmesh_jax.replication_policies",
    kind="replication policy",
    built_in=MappingProxyType(
        {
            "mobility": (
                MobilityPolicy,
                "to who will be there and can run it; departures handed over",
            ),
            "neighbour": (NeighbourPolicy, "FTPipeHD's chain, and all to the central node"),
            "next_stage": (
                NextStagePolicy,
                "Asteroid's: each stage to the next, the last to the first",
            ),
            "central": (CentralPolicy, "all to one place"),
            "none": (NonePolicy, "no copies: checkpoints only"),
        }
    ),
    method="decide(view)",
)


def replication_policies() -> Mapping[str, str]:
    """Name -> one line on it, built-in policies first, then those of other packages."""
    return POLICIES.listed()


def make_replication_policy(policy: str | ReplicationPolicy, **options: Any) -> ReplicationPolicy:
    """The policy of that name with those options, or the object itself.

    Raises:
        InvalidValueError: No policy of that name (names those known), an option that it does not
            take, or an object without `decide`.
        MissingExtraError: The package that brings it cannot be imported.

    Example:
        >>> from crowdmesh_jax.propagation import make_replication_policy
        >>> make_replication_policy("neighbour", chain_steps=50).chain_steps
        50
    """
    return cast(ReplicationPolicy, POLICIES.make(policy, **options))
