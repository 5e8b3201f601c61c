"""What the policy machine knows, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..core.plan import PipelinePlan
from ..errors import InvalidValueError
from ..protocol import OwnersNeed
from ..protocol.evidence import LayerHolders
from ..protocol.owners import CopyRoom
from .events import PlanSolved

KEPT_PLANS = 32
"""That were made and may be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlTerms:
    """How eager the policy is."""

    copies: int = 1
    """Holders per stage, besides its owner."""
    settle_s: float = 1.0
    """Who joined is looked at after so long: others may follow."""
    standby: bool = True
    """Plans for losses that idle devices could not take are solved, exported and compiled ahead."""
    doubles: int = 4
    """How many of them are for several devices lost at once, the likeliest."""
    losses_per_s: Mapping[str, float] = field(default_factory=dict)
    """Device -> how often it is lost, a second. Not named: never."""
    hazards: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Device -> names of the groups that are lost with it. Not named: nothing is."""
    replan: bool = True
    """Cut anew when that pays, though nobody was lost."""
    pause_s: float = 0.5
    """What an epoch without a loss takes, beside moving states."""
    worth: float = 1.5
    """A change must save so many times what it costs; so plans do not flap."""
    room: CopyRoom | None = None
    """For copies; None: everywhere enough."""
    is_ring: bool = True
    """Copies go round the ring of devices; False: a replication policy places them."""
    learn_interval: bool = True
    """Waves come as often as their measured cost and the hazard make best; else as they are."""
    loss_per_s: float = 4e-5
    """Losses of a device with a stage, of the whole pipeline, in a second."""
    most_overhead: float = 0.03
    """Part of training that waves may cost."""
    most_steps: int = 64
    """Between two waves: boundary logs must reach back."""
    speeds: Mapping[str, float] = field(default_factory=dict)
    """Of devices, relative: the fastest are planned for. Without: all alike."""
    lead_s: float = 2.0
    """A hand-over starts so long before a departure, beside what moving the state takes."""

    def __post_init__(self) -> None:
        if self.copies < 1 or self.worth < 1:
            raise InvalidValueError(
                f"control: copies and worth must be >= 1, got {self.copies} and {self.worth}"
            )
        if self.doubles < 0:
            raise InvalidValueError(f"control: doubles must be >= 0, got {self.doubles}")

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Name of each hazard -> its devices."""
        found: dict[str, list[str]] = {}
        for device in sorted(self.hazards):
            for name in self.hazards[device]:
                found.setdefault(name, []).append(device)
        return {name: tuple(found[name]) for name in sorted(found)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """That a replication policy wants a device's stage elsewhere."""

    to: str
    leaves_s: float
    """When the device is likely to be gone."""
    wanted_s: float
    """When the policy said so last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlState:
    """Of one run."""

    terms: ControlTerms = ControlTerms()
    plan: PipelinePlan | None = None
    """In force; None: nothing runs yet."""
    epoch: int = 0
    party: tuple[str, ...] = ()
    holders: tuple[LayerHolders, ...] = ()
    keys: tuple[str, ...] = ()
    """Per stage of the plan, what a device must have ready to run it."""
    present: tuple[str, ...] = ()
    """Devices that are here, members or not."""
    joined_s: float | None = None
    """When the last newcomer came that was not yet looked at."""
    is_running: bool = False
    stages_wanted: int = 0
    """Devices with a stage when the run began."""
    is_disturbed: bool = False
    """A device with a stage was lost, or someone joined: the plan may not be the best any more."""
    began_s: float = 0.0
    """When this epoch began to run."""
    step: int = 0
    steps: int = 0
    ready: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Device -> keys of what it has compiled."""
    asked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Device -> keys that were sent to it."""
    usual_s: tuple[float, ...] = ()
    """Of the last steps without an open wave."""
    wave_steps_s: tuple[float, ...] = ()
    """Of the steps since the open wave began."""
    wave_costs_s: tuple[float, ...] = ()
    """What the last waves cost: the time of their steps beyond the usual."""
    stored: Mapping[str, tuple[tuple[int, tuple[int, int]], ...]] = field(default_factory=dict)
    """Device -> (first layer, (last layer, version)) of the newest copies that it said it has."""
    link_bytes_per_s: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Owner -> member -> what the link carries, by the crowd."""
    measured_bytes_per_s: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Sender -> receiver -> what it carried of copies."""
    failed: tuple[str, ...] = ()
    """Holders that did not store what they should, since they last did."""
    ahead: tuple[tuple[str, ...], ...] = ()
    """Losses, in this epoch, for which plans are made ahead."""
    solved: tuple[PlanSolved, ...] = ()
    """Plans made ahead, newest last."""
    solving: tuple[tuple[str, ...], ...] = ()
    """Sets of devices that are being planned for."""
    need: OwnersNeed | None = None
    """A question that waits for a plan."""
    wish: PipelinePlan | None = None
    """To be taken at the next standstill."""
    wish_reason: str = ""
    wish_moves: tuple[tuple[int, str, str], ...] = ()
    """(stage, owner, taker) of it that a replication policy wants."""
    departing: Mapping[str, float] = field(default_factory=dict)
    """Device -> when it leaves, as announced."""
    moves: Mapping[str, Foreseen] = field(default_factory=dict)
    """Device -> why it will not have its stage for long, or had it until now."""

    def idle(self) -> tuple[str, ...]:
        """Members without a stage."""
        owners = set(self.plan.all_devices) if self.plan is not None else set()
        return tuple(device for device in self.party if device not in owners)

    def will_leave(self, device: str) -> bool:
        """Whether that was announced or foreseen."""
        return device in self.departing or device in self.moves

    def candidates(self) -> tuple[str, ...]:
        """The fastest members, as many as had a stage at first; the others stay spares."""
        order = {device: index for index, device in enumerate(self.party)}
        speeds = self.terms.speeds
        staying = [device for device in self.party if not self.will_leave(device)]
        ranked = sorted(staying, key=lambda d: (-speeds.get(d, 1.0), order[d]))
        return tuple(sorted(ranked[: self.stages_wanted], key=order.__getitem__))

    def plan_for(self, devices: tuple[str, ...]) -> PlanSolved | None:
        """A plan that was made for exactly these devices."""
        wanted = set(devices)
        return next((s for s in reversed(self.solved) if set(s.devices) == wanted), None)
