"""The built-in replication policies."""

from .mobility import MobilityPolicy
from .rivals import CentralPolicy, NeighbourPolicy, NextStagePolicy, NonePolicy

__all__ = [
    "CentralPolicy",
    "MobilityPolicy",
    "NeighbourPolicy",
    "NextStagePolicy",
    "NonePolicy",
]
