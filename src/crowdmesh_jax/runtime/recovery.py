"""How a run survives the loss of devices: the user's terms, and the clock of each recovery."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..core import PipelinePlan
from ..errors import InvalidValueError
from ..programs.manifest import StageManifest
from ..propagation import ReplicationPolicy, make_replication_policy
from ..protocol import coordinator_events as ev
from ..protocol import messages as msg
from ..protocol.coordinator import CoordinatorState
from ..protocol.decision import Decision
from ..record import RecoveryEvent, TakeOver
from .placing import Watch

FIRST_WAVE_EVERY = 8
MOST_LOG_STEPS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """Terms on which a run goes on after a loss. `cm.train(..., recovery=cm.Recovery())`.

    Devices of the crowd without a stage are spares: they hold copies of the stages' states and
    have their programs ready. Without a spare, survivors share the layers anew, from the newest
    version of which every layer has a copy.
    """

    copies: int = 1
    """Holders of each stage's state, beside its owner. Rivals' policies have their own number."""
    wave_every: int | None = None
    """Steps from one wave of copies to the next. More: less is sent, and a loss redoes more. None:
    learned from what waves cost and how often devices are lost, at most 3 % of the time, unless the
    logs reach back too short for that."""
    log_steps: int | None = None
    """Steps that boundary logs reach back; beyond them a loss takes everyone back. None: what
    `log_bytes` allow, and at least twice `wave_every`, so that a wave may fail."""
    log_bytes: int = 256 * 2**20
    """Memory of a device for its boundary logs."""
    crash_per_s: float = 1e-5
    """Losses of a device in a second that nothing foretells; what the crowd says of a device's
    leaving is added."""
    heartbeat_s: float = 0.5
    """Between two signs of life of a device."""
    silence_s: float = 3.0
    """A device is never held to be lost for a shorter silence. Beyond it, what is usual for that
    device counts."""
    policy: str | ReplicationPolicy | None = None
    """Where copies go and who is handed over: "mobility" (ours), a rival's rule ("neighbour",
    "next_stage", "central", "none"), an installed package's name, or an object. None: spares
    first, then the ring of devices with a stage."""
    watch: Watch | None = None
    """Gives what is known of places now (`cm.mobility.Sightings`, rows as the crowd's devices), or
    None; called about once a second. For policies that predict who leaves."""
    range_m: float | None = None
    """Radio range of the devices that are watched; with `watch` only."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name -> devices that are likely to be lost together (a vehicle, a power strip): no two copies
    of a stage, its owner's among them, are put there while other devices have room (the rivals'
    policies know no hazards). A crowd's cells are known."""
    replan: bool = True
    """Cut the layers anew when devices have come or gone and it pays; False: only where nobody can
    take a lost stage as it is. Other cuts change results by float rounding."""
    standby: bool = True
    """Plans for losses that spares could not take are made, exported and compiled ahead: single
    ones, then the likeliest of several at once."""
    return_s: float = 600.0
    """A run that cannot go on waits so long for a device to return, then it ends."""

    def __post_init__(self) -> None:
        for name, least in (("copies", 1), ("wave_every", 1), ("log_steps", 1), ("log_bytes", 0)):
            value = getattr(self, name)
            if value is None and name in ("wave_every", "log_steps"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InvalidValueError(
                    f"recovery: {name} must be a whole number >= {least}, got {value!r}"
                )
        if not 0 <= self.crash_per_s < math.inf:
            raise InvalidValueError(
                f"recovery: crash_per_s must be finite and >= 0, got {self.crash_per_s}"
            )
        for name in ("heartbeat_s", "silence_s", "return_s"):
            if not getattr(self, name) > 0:
                raise InvalidValueError(f"recovery: {name} must be > 0, got {getattr(self, name)}")
        if not self.heartbeat_s < self.silence_s < math.inf:
            raise InvalidValueError(
                "recovery: silence_s must be finite and longer than heartbeat_s, or every device is"
                f" held to be lost: got {self.silence_s} and {self.heartbeat_s}"
            )
        if self.policy is not None:
            make_replication_policy(self.policy)
        if self.range_m is not None and not 0 < self.range_m < math.inf:
            raise InvalidValueError(f"recovery: range_m must be finite and > 0, got {self.range_m}")
        if self.watch is None:
            return
        if not callable(self.watch):
            raise InvalidValueError(f"recovery: watch must be a function, got {self.watch!r}")
        for name in ("policy", "range_m"):
            if getattr(self, name) is None:
                raise InvalidValueError(f"recovery: watch is of no use without {name}; give both")

    def to_record(self) -> dict[str, Any]:
        """As it stands in a run's `config.toml`: a policy by its name; what is code is left out."""
        policy = self.policy if isinstance(self.policy, str | None) else self.policy.name
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**plain, "policy": policy, "watch": None}

    @property
    def first_wave_every(self) -> int:
        """Until something is learned."""
        return self.wave_every if self.wave_every is not None else FIRST_WAVE_EVERY

    def logged_steps(self, boundary_bytes: int) -> int:
        """Steps that logs reach back.

        Args:
            boundary_bytes: What a device sends across its cuts in a step, at most.
        """
        if self.log_steps is not None:
            return self.log_steps
        fitting = self.log_bytes // max(1, boundary_bytes)
        return max(2 * self.first_wave_every, min(fitting, MOST_LOG_STEPS))


def logged_bytes(manifests: Sequence[StageManifest], microbatches: int) -> int:
    """What logs keep of a step, at most on any device: boundary frames, and of tied leaves the
    values that go down and the gradients that go up."""
    frames = max(
        microbatches * sum(leaf.size_bytes for leaf in (*m.boundary_out, *m.gradient_out))
        for m in manifests
    )
    lent = {leaf.key: leaf.size_bytes for m in manifests for leaf in m.resident
            if leaf.role == "borrowed"}  # fmt: skip
    return frames + 2 * sum(lent.values())


@dataclass(slots=True)
class RecoveryClock:
    """Times the parts of each recovery as the coordinator's machine goes through them.

    A recovery is over with the next step that is shown. One that is cut short before it, by the
    next loss, is told as one with the recovery that follows.
    """

    heard_s: dict[str, float] = field(default_factory=dict)
    """Last word of each device, monotonic."""
    _opened: list[ev.EpochOpened] = field(default_factory=list)
    """Since the last recovery that came to its end."""
    _missed: list[str] = field(default_factory=list)
    """Lost while the others were being stopped: no epoch was opened for them."""
    _asked: set[str] = field(default_factory=set)
    """Of whom a report was asked since the epochs' first."""
    _times: dict[str, float] = field(default_factory=dict)
    _silent_s: float = 0.0
    _loads: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _before: PipelinePlan | None = None
    _ready: RecoveryEvent | None = None
    """Everyone was told to go on, and no step is shown yet."""
    _cut_short_s: float = math.inf
    """When an epoch was opened after that."""

    def heard(self, device: str) -> None:
        self.heard_s[device] = time.monotonic()

    def loaded(self, device: str, figures: Mapping[str, Any]) -> None:
        """What a device says of its loading."""
        self._loads[device] = figures

    def saw(self, action: Any, state: CoordinatorState) -> None:
        """An action of the machine, and its state after it."""
        now_s = time.monotonic()
        match action:
            case ev.Announce(news=ev.EpochOpened() as news):
                if self._ready is not None:
                    self._cut_short_s = min(self._cut_short_s, now_s)
                if not self._opened:
                    self._times = {"opened": now_s, "opened_at": time.time()}
                    self._before = state.plan
                    gone = [now_s - self.heard_s.get(device, now_s) for device in news.lost]
                    self._silent_s = max(gone, default=0.0)
                self._opened.append(news)
                self._asked.update(state.crew)
                self._loads.clear()
            case ev.ChooseOwners():
                self._times["fenced"] = now_s
            case ev.SendMessage(message=msg.Install()) if self._opened:
                self._times["planned"] = now_s
            case ev.Announce(news=ev.Recovered() as news) if state.decided is not None:
                self._missed = sorted(self._asked - set(state.crew))
                self._times["installed"] = now_s
                event = self._event(news, state.decided, state.plan)
                self._ready = event if self._ready is None else _as_one(self._ready, event)
                self._cut_short_s = math.inf
                self._opened.clear()
                self._asked.clear()

    def stepped(self) -> RecoveryEvent | None:
        """A step is shown: the recovery that it ends, if there is one."""
        event, self._ready = self._ready, None
        if event is None:
            return None
        # Steps that were committed before the next loss may be shown after it.
        until_s = min(time.monotonic(), self._cut_short_s)
        self._cut_short_s = math.inf
        *_, (_, installed_s, _) = event.spans
        return replace(event, first_step_s=max(0.0, until_s - installed_s))

    def _event(
        self, recovered: ev.Recovered, decided: Decision, plan: PipelinePlan
    ) -> RecoveryEvent:
        """All but its last part."""
        times = self._times
        # Where nobody had to be chosen, or nothing installed, that part took no time.
        at = [0.0] * 4
        until_s = times["installed"]
        for index, name in reversed(tuple(enumerate(("opened", "fenced", "planned", "installed")))):
            at[index] = until_s = min(times.get(name, until_s), until_s)
        named = [str(device) for news in self._opened for device in news.lost]
        lost = tuple(dict.fromkeys([*named, *self._missed]))
        overs = tuple(self._take_overs(decided))
        return RecoveryEvent(
            epoch=recovered.epoch,
            at_s=times.get("opened_at", time.time()),
            opened_s=at[0],
            lost=lost,
            reason=self._opened[0].reason if self._opened else "",
            choice=recovered.reason,
            how=_how(decided.is_rollback, lost, overs),
            base=recovered.base,
            silent_s=self._silent_s,
            fenced_s=at[1] - at[0],
            planned_s=at[2] - at[1],
            installed_s=at[3] - at[2],
            first_step_s=0.0,
            replayed_steps=max((recovered.base - o.from_version for o in overs), default=0),
            redone_steps=recovered.redone,
            take_overs=overs,
            plan=plan,
        )

    def _take_overs(self, decided: Decision) -> Any:
        for index, (action, stage) in enumerate(
            zip(decided.actions, decided.plan.stages, strict=True)
        ):
            if action.act != "restore":
                continue
            device = str(stage.device)
            figures = self._loads.get(device, {})
            source = next((str(s.device) for s in action.sources), "coordinator")
            layers = (stage.first_layer, stage.last_layer)
            yield TakeOver(
                stage=index,
                layers=layers,
                device=device,
                before=self._owner_before(layers),
                was_spare=self._before is not None and device not in self._before.devices,
                from_version=decided.base if action.version is None else action.version,
                source=source,
                compiled_s=float(figures.get("compiled_s", 0.0)),
                loaded_s=float(figures.get("loaded_s", 0.0)),
                moved_bytes=int(figures.get("moved_bytes", 0)),
            )

    def _owner_before(self, layers: tuple[int, int]) -> str:
        stages = self._before.stages if self._before is not None else ()
        mine = (s.device for s in stages if (s.first_layer, s.last_layer) == layers)
        return str(next(mine, ""))


def _how(is_rollback: bool, lost: tuple[str, ...], overs: tuple[TakeOver, ...]) -> str:
    if is_rollback:
        return "rollback"
    if not overs:
        return "keep"
    return "replay" if lost else "hand-over"


def _as_one(first: RecoveryEvent, then: RecoveryEvent) -> RecoveryEvent:
    """A recovery without a step, and the one that followed: one, as long as both."""
    anew = {over.layers for over in then.take_overs}
    owners = {} if then.plan is None else {
        (stage.first_layer, stage.last_layer): str(stage.device) for stage in then.plan.stages
    }  # fmt: skip
    kept = [
        over
        for over in first.take_overs
        if over.layers not in anew and owners.get(over.layers) == over.device
    ]
    lost = tuple(dict.fromkeys((*first.lost, *then.lost)))
    overs = (*kept, *then.take_overs)
    return replace(
        then,
        at_s=first.at_s,
        opened_s=first.opened_s,
        lost=lost,
        reason=first.reason,
        how=_how("rollback" in (first.how, then.how), lost, overs),
        silent_s=first.silent_s,
        fenced_s=then.opened_s + then.fenced_s - first.opened_s,
        replayed_steps=max(first.replayed_steps, then.replayed_steps),
        redone_steps=first.redone_steps + then.redone_steps,
        take_overs=overs,
    )
