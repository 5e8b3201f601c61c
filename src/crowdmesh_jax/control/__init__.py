"""Who takes what over, what is made ready ahead, when a plan changes: the policy machine.

`handle(state, event, now_s) -> (state, actions)` is pure, like the protocol's two machines. Those
keep promises; this one has opinions. Whatever it asks for, the protocol keeps it safe.
"""

from .events import (
    Answer,
    AskChange,
    AskHolders,
    AskInterval,
    Compile,
    CompileFailed,
    ControlAction,
    ControlEvent,
    CopyGone,
    CopyStored,
    Departing,
    HoldersWanted,
    Joined,
    Lost,
    Move,
    MovesWanted,
    OwnersNeeded,
    PlanSolved,
    ProgramCompiled,
    Running,
    Solve,
    StepCommitted,
    Tick,
    TransferFailed,
    WaveKept,
    entry_from_plain,
    entry_to_plain,
)
from .machine import handle
from .replay import replay, terms_to_plain, told_to_plain
from .state import ControlState, ControlTerms

__all__ = [
    "Answer",
    "AskChange",
    "AskHolders",
    "AskInterval",
    "Compile",
    "CompileFailed",
    "ControlAction",
    "ControlEvent",
    "ControlState",
    "ControlTerms",
    "CopyGone",
    "CopyStored",
    "Departing",
    "HoldersWanted",
    "Joined",
    "Lost",
    "Move",
    "MovesWanted",
    "OwnersNeeded",
    "PlanSolved",
    "ProgramCompiled",
    "Running",
    "Solve",
    "StepCommitted",
    "Tick",
    "TransferFailed",
    "WaveKept",
    "entry_from_plain",
    "entry_to_plain",
    "handle",
    "replay",
    "terms_to_plain",
    "told_to_plain",
]
