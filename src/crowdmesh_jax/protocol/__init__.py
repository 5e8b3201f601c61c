"""The protocol: messages, and the pure machines of member and coordinator (no sockets, no arrays).

`member.handle` and `coordinator.handle` share the form `(state, event, now_s) -> (state, actions)`.
What an action demands of a body stands in `member_events` and `coordinator_events`. `decide` is the
pure function that says how a run goes on after a loss.
"""

from . import coordinator, coordinator_events, member, member_events, messages, records
from .common import (
    BestRule,
    EvaluationPlan,
    Fault,
    Mark,
    NonFinitePolicy,
    Parts,
    Slot,
    Tie,
    Verdict,
)
from .coordinator_events import Deadlines, RecoveryTerms
from .coordinator_state import CoordinatorState
from .decision import Decision, Halt, decide
from .evidence import Evidence, LayerHolders, Past
from .member_state import MemberState, waiting_for
from .messages import Message, message_from_plain, message_to_plain
from .owners import OwnersChoice, OwnersNeed, choose_owners
from .records import Record, record_from_plain, record_to_plain

__all__ = [
    "BestRule",
    "CoordinatorState",
    "Deadlines",
    "Decision",
    "EvaluationPlan",
    "Evidence",
    "Fault",
    "Halt",
    "LayerHolders",
    "Mark",
    "MemberState",
    "Message",
    "NonFinitePolicy",
    "OwnersChoice",
    "OwnersNeed",
    "Parts",
    "Past",
    "Record",
    "RecoveryTerms",
    "Slot",
    "Tie",
    "Verdict",
    "choose_owners",
    "coordinator",
    "coordinator_events",
    "decide",
    "member",
    "member_events",
    "message_from_plain",
    "message_to_plain",
    "messages",
    "record_from_plain",
    "record_to_plain",
    "records",
    "waiting_for",
]
