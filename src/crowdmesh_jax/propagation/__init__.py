"""Who holds what, how fresh, at what byte budget; likely losses; hand-over.

The deciding part: pure functions of a plan, of what was seen so far and of what stands. Nothing
here sends a byte or reads a clock; the runtime and the simulator do what it says.
docs/propagation.md has the rules with their derivations.
"""

from .budget import Budget, copy_bytes, hosted_bytes, rooms, stage_need
from .foresight import Ahead, ChainChoice, ChainRule, best_chain
from .groups import HazardGroups
from .handover import (
    Departure,
    Handover,
    HandoverRule,
    Target,
    decide_handover,
    lead_s,
    worth_s,
)
from .interval import (
    Interval,
    exact_overhead,
    interval_s,
    interval_steps,
    loss_rate_per_s,
    overhead,
)
from .losses import Loss, likely_losses
from .placement import place
from .policies import (
    CentralPolicy,
    MobilityPolicy,
    NeighbourPolicy,
    NextStagePolicy,
    NonePolicy,
)
from .policy import (
    Costs,
    Heard,
    PolicyDecision,
    PolicyView,
    ReplicationPolicy,
    StandbyWish,
    check_decision,
)
from .prospects import Outlook
from .registry import make_replication_policy, replication_policies
from .report import HeldCopy, Holding, IfLost, LayerRow, ReplicaReport, replica_report
from .seats import (
    Placement,
    PlacementProblem,
    PlacementRange,
    Prospect,
    Room,
    Unprotected,
    feasible,
)

__all__ = [
    "Ahead",
    "Budget",
    "CentralPolicy",
    "ChainChoice",
    "ChainRule",
    "Costs",
    "Departure",
    "Handover",
    "HandoverRule",
    "HazardGroups",
    "Heard",
    "HeldCopy",
    "Holding",
    "IfLost",
    "Interval",
    "LayerRow",
    "Loss",
    "MobilityPolicy",
    "NeighbourPolicy",
    "NextStagePolicy",
    "NonePolicy",
    "Outlook",
    "Placement",
    "PlacementProblem",
    "PlacementRange",
    "PolicyDecision",
    "PolicyView",
    "Prospect",
    "ReplicaReport",
    "ReplicationPolicy",
    "Room",
    "StandbyWish",
    "Target",
    "Unprotected",
    "best_chain",
    "check_decision",
    "copy_bytes",
    "decide_handover",
    "exact_overhead",
    "feasible",
    "hosted_bytes",
    "interval_s",
    "interval_steps",
    "lead_s",
    "likely_losses",
    "loss_rate_per_s",
    "make_replication_policy",
    "overhead",
    "place",
    "replica_report",
    "replication_policies",
    "rooms",
    "stage_need",
    "worth_s",
]
