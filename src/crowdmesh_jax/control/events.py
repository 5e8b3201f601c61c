"""What the policy machine is told (events) and what it wants done (actions), and their plain form.

    action       the body must                                               answered by
    Solve        plan for these devices, predict both plans, export programs  PlanSolved
    Compile      send a stage's programs and rows to a device, ahead          ProgramCompiled,
                                                                              CompileFailed
    AskChange    ask the coordinator for an epoch without a loss              OwnersNeeded, Running
    AskHolders   ask it for other holders                                     -
    AskInterval  ask it for another number of steps between waves             -
    Answer       tell it who takes what                                       Running

Times are seconds of one clock, the body's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core import values
from ..core.plan import PipelinePlan
from ..errors import FormatError
from ..protocol import OwnersChoice, OwnersNeed
from ..protocol.evidence import LayerHolders

# Events -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A device said Hello: it is here, perhaps again. Nothing that it had is counted on."""

    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A device is gone, or held to be."""

    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Departing:
    """A device says that it is going to leave."""

    device: str
    leaves_in_s: float
    """Infinite: it stays after all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A stage that a replication policy wants elsewhere, since its owner goes or others are better
    placed."""

    device: str
    to: str
    """A member without a stage, or one whose own stage moves as well."""
    leaves_in_s: float
    """When the device is likely to be gone. Until shortly before there is time for compiling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MovesWanted:
    """A replication policy wants these now, at one stop, and no longer what it wanted before."""

    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldersWanted:
    """A replication policy wants copies elsewhere."""

    holders: tuple[LayerHolders, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """An epoch runs, from here on."""

    epoch: int
    plan: PipelinePlan
    party: tuple[str, ...]
    """All its members, in a fixed order."""
    holders: tuple[LayerHolders, ...]
    keys: tuple[str, ...]
    """Per stage of the plan, the name of what a device must have ready to run it."""
    step: int
    steps: int
    link_bytes_per_s: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Owner -> member -> what the link carries, by the crowd."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCommitted:
    """A step is Done."""

    step: int
    step_s: float | None
    in_wave: bool = False
    """A wave of copies was open when it was committed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveKept:
    """Copies of all layers are with their holders."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyStored:
    """A device said that it holds a copy of these layers, whole: its own stage's, or another's."""

    device: str
    first_layer: int
    last_layer: int
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkMeasured:
    """What a link carried of a copy, beside all that training sent over it meanwhile."""

    sender: str
    receiver: str
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyGone:
    """The copy of these layers that a device said it held is damaged, or not there."""

    device: str
    first_layer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFailed:
    """A wave was given up since this holder did not store a copy that its owner has."""

    device: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramCompiled:
    """A device has what `key` names ready: programs of a stage, and its rows."""

    device: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileFailed:
    """A device could not make ready what `key` names. It is asked again in the next epoch."""

    device: str
    key: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSolved:
    """The answer to Solve."""

    devices: tuple[str, ...]
    plan: PipelinePlan | None
    """None: no plan fits."""
    keys: tuple[str, ...] = ()
    """Per stage of the plan, the name of what its device must have ready."""
    step_s: float = float("inf")
    """Predicted, of this plan."""
    standing_step_s: float = float("inf")
    """Predicted, of the plan in force, by the same profile."""
    move_s: float = 0.0
    """To move the states that change hands, at the links' rates."""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnersNeeded:
    """A decision's question: who takes what was lost?"""

    need: OwnersNeed
    keys: tuple[str, ...]
    """Per stage of `need.plan`, the name of what its device must have ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time passes; hand one in every quarter of a second or so."""


ControlEvent = (
    Joined | Lost | Departing | MovesWanted | Running | StepCommitted | ProgramCompiled | PlanSolved
    | OwnersNeeded | WaveKept | HoldersWanted | Tick | CopyStored | CopyGone | TransferFailed
    | CompileFailed | LinkMeasured
)  # fmt: skip

# Actions ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Solve:
    """Plan for these devices."""

    devices: tuple[str, ...]
    urgent: bool = False
    """A recovery waits for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compile:
    """Have a device make a stage ready that it may have to run."""

    device: str
    plan: PipelinePlan
    stage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AskChange:
    """An epoch without a loss."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AskHolders:
    """Copies elsewhere."""

    holders: tuple[LayerHolders, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AskInterval:
    """So many steps between waves."""

    steps: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """To OwnersNeeded."""

    epoch: int
    choice: OwnersChoice


ControlAction = Solve | Compile | AskChange | AskHolders | AskInterval | Answer

_KINDS: Mapping[str, type] = {
    cls.__name__: cls
    for cls in (
        Joined, Lost, Departing, MovesWanted, Running, StepCommitted, ProgramCompiled, PlanSolved,
        OwnersNeeded, WaveKept, HoldersWanted, Tick, CopyStored, CopyGone, TransferFailed,
        CompileFailed, LinkMeasured, Solve, Compile, AskChange, AskHolders, AskInterval, Answer,
    )
}  # fmt: skip


def entry_to_plain(entry: ControlEvent | ControlAction) -> dict[str, Any]:
    """An event or action as dicts, lists and scalars; "kind" is its class name."""
    return {"kind": type(entry).__name__, **values.to_plain(entry)}


def entry_from_plain(plain: Any) -> Any:
    """Reads what `entry_to_plain` made.

    Raises:
        FormatError: Neither an event nor an action, or with unknown, missing or bad fields.
    """
    kind = plain.get("kind") if isinstance(plain, Mapping) else None
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise FormatError(f"policy: unknown kind {str(kind)[:40]!r}")
    fields = {name: item for name, item in plain.items() if name != "kind"}
    return values.from_plain(cls, fields, cls.__name__)
