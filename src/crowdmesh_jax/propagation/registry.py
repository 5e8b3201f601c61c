"""Replication policies by name: the built-in ones and those that other packages bring.

A package adds one through the entry point group `crowdmesh_jax.replication_policies`: a name and a
class (or function) that takes the options and returns an object with `decide(view)`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from importlib import metadata
from types import MappingProxyType
from typing import Any, cast

from ..errors import InvalidValueError
from .policies import (
    CentralPolicy,
    MobilityPolicy,
    NeighbourPolicy,
    NextStagePolicy,
    NonePolicy,
)
from .policy import ReplicationPolicy

ENTRY_POINT_GROUP = "crowdmesh_jax.replication_policies"

_BUILT_IN: Mapping[str, tuple[Callable[..., Any], str]] = MappingProxyType(
    {
        "mobility": (MobilityPolicy, "to who will be there and can run it; departures handed over"),
        "neighbour": (NeighbourPolicy, "FTPipeHD's chain, and all to the central node"),
        "next_stage": (
            NextStagePolicy,
            "Asteroid's: each stage to the next, the last to the first",
        ),
        "central": (CentralPolicy, "all to one place"),
        "none": (NonePolicy, "no copies: checkpoints only"),
    }
)


def replication_policies() -> Mapping[str, str]:
    """Name -> one line on it, built-in policies first, then those of other packages."""
    found = {name: line for name, (_, line) in _BUILT_IN.items()}
    for point in sorted(metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        found.setdefault(point.name, f"from {point.value}")
    return MappingProxyType(found)


def make_replication_policy(policy: str | ReplicationPolicy, **options: Any) -> ReplicationPolicy:
    """The policy of that name with those options, or the object itself.

    Raises:
        InvalidValueError: No policy of that name (names those known), an option that it does not
            take, or an object without `decide`.

    Example:
        >>> from crowdmesh_jax.propagation import make_replication_policy
        >>> make_replication_policy("neighbour", chain_steps=50).chain_steps
        50
    """
    if not isinstance(policy, str):
        if options:
            raise InvalidValueError(
                f"options {', '.join(sorted(options))} come with a policy's name; a policy object"
                " is made with its own"
            )
        made: Any = policy
    else:
        if policy in _BUILT_IN:
            factory: Any = _BUILT_IN[policy][0]
        else:
            points = {p.name: p for p in metadata.entry_points(group=ENTRY_POINT_GROUP)}
            if policy not in points:
                close = difflib.get_close_matches(policy, replication_policies(), n=1, cutoff=0.5)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise InvalidValueError(
                    f"no replication policy {policy!r}{hint}\n"
                    f"  known    {', '.join(replication_policies())}"
                )
            factory = points[policy].load()
        try:
            made = factory(**options)
        except TypeError as exc:
            raise InvalidValueError(
                f"replication policy {policy!r} does not take these options: {exc}"
            ) from exc
    if not callable(getattr(made, "decide", None)):
        raise InvalidValueError(f"{made!r} is no replication policy: it has no decide(view)")
    return cast(ReplicationPolicy, made)
