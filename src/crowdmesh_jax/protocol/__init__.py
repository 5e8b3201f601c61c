"""The protocol: messages, and the pure machines of member and coordinator (no sockets, no arrays).

`member.handle` and `coordinator.handle` share the form `(state, event, now_s) -> (state, actions)`.
What an action demands of a body stands in `member_events` and `coordinator_events`.
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
from .coordinator_events import Deadlines
from .coordinator_state import CoordinatorState
from .member_state import MemberState, waiting_for
from .messages import Message, message_from_plain, message_to_plain
from .records import Record, record_from_plain, record_to_plain

__all__ = [
    "BestRule",
    "CoordinatorState",
    "Deadlines",
    "EvaluationPlan",
    "Fault",
    "Mark",
    "MemberState",
    "Message",
    "NonFinitePolicy",
    "Parts",
    "Record",
    "Slot",
    "Tie",
    "Verdict",
    "coordinator",
    "coordinator_events",
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
