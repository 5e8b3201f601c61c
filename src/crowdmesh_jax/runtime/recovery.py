"""How a run survives the loss of devices: the user's terms, and what each recovery came to."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core import PipelinePlan
from ..errors import InvalidValueError
from ..protocol import coordinator_events as ev
from ..protocol import messages as msg
from ..protocol.coordinator import CoordinatorState
from ..protocol.decision import Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """Terms on which a run goes on after a loss. `cm.train(..., recovery=cm.Recovery())`.

    Devices of the crowd without a stage are spares: they hold copies of the stages' states and
    have their programs ready. Without a spare, survivors share the layers anew, from the newest
    version of which every layer has a copy.
    """

    copies: int = 1
    """Holders of each stage's state, beside its owner."""
    wave_every: int = 8
    """Steps from one wave of copies to the next. More: less is sent, and a loss redoes more."""
    log_steps: int | None = None
    """Steps that boundary logs reach back; beyond them a loss takes everyone back. None: twice
    `wave_every`, so that a wave may fail."""
    heartbeat_s: float = 0.5
    """Between two signs of life of a device."""
    silence_s: float = 3.0
    """A device is never held to be lost for a shorter silence. Beyond it, what is usual for that
    device counts."""
    replan: bool = True
    """Cut the layers anew when devices have come or gone and it pays; False: only where nobody can
    take a lost stage as it is. Other cuts change results by float rounding."""
    standby: bool = True
    """Without spares, plans for each single loss are made, exported and compiled ahead."""
    return_s: float = 600.0
    """A run that cannot go on waits so long for a device to return, then it ends."""

    def __post_init__(self) -> None:
        for name in ("copies", "wave_every", "log_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidValueError(f"recovery: {name} must be >= 1, got {value}")
        for name in ("heartbeat_s", "silence_s", "return_s"):
            if not getattr(self, name) > 0:
                raise InvalidValueError(f"recovery: {name} must be > 0, got {getattr(self, name)}")

    @property
    def logged_steps(self) -> int:
        return self.log_steps if self.log_steps is not None else 2 * self.wave_every


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeOver:
    """A stage that got its state anew."""

    stage: int
    layers: tuple[int, int]
    """First and last."""
    device: str
    before: str
    """Who had the stage."""
    from_version: int
    """Of the copy that it starts from."""
    source: str
    """Who had that copy; "coordinator": its disk."""
    compiled_s: float = 0.0
    """Compiling on the hot path; 0: the programs were ready."""
    loaded_s: float = 0.0
    """From the Install until the state was in place, compiling included."""
    moved_bytes: int = 0
    """State that came over the wire for it, now; 0: the copy was there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryEvent:
    """A loss, or a return, and how the run went on. Times in seconds, one after another."""

    epoch: int
    lost: tuple[str, ...]
    reason: str
    """Why the epoch was opened."""
    choice: str
    """How it went on, who took over, and why that one."""
    how: str
    """"replay": only lost stages were redone; "rollback": all were; "keep": nothing was lost."""
    base: int
    """The version at which the run goes on."""
    silent_s: float
    """From the last word of the lost device to the opening: what detection took, at most."""
    fenced_s: float
    """Until everyone had stopped and reported."""
    planned_s: float
    """Until it was decided who takes what."""
    installed_s: float
    """Until everyone was ready: state moved, programs loaded, steps replayed."""
    first_step_s: float
    """Until the next step was committed."""
    replayed_steps: int
    """Steps that only the lost stages ran a second time."""
    redone_steps: int
    """Committed steps that everyone runs a second time."""
    take_overs: tuple[TakeOver, ...] = ()
    plan: PipelinePlan | None = field(default=None, repr=False)
    """From here on."""

    @property
    def total_s(self) -> float:
        """From the last word of the lost device to the next committed step."""
        return self.silent_s + self.fenced_s + self.planned_s + self.installed_s + self.first_step_s

    def line(self) -> str:
        """For people: one line."""
        who = f"lost {', '.join(self.lost)}" if self.lost else self.reason
        redo = (
            f"all redo {self.redone_steps} steps" if self.how == "rollback"
            else f"{self.replayed_steps} steps replayed"
        )  # fmt: skip
        moved = sum(t.moved_bytes for t in self.take_overs)
        compiled_s = sum(t.compiled_s for t in self.take_overs)
        return (
            f"{who}: {self.choice}; {self.how} from version {self.base}, {redo};"
            f" {self.total_s:.2f} s to the next step (noticed {self.silent_s:.2f},"
            f" fenced {self.fenced_s:.2f}, planned {self.planned_s:.2f},"
            f" installed {self.installed_s:.2f}, of it compiled {compiled_s:.2f}; first step"
            f" {self.first_step_s:.2f}), {moved / 1e6:.1f} MB moved"
        )


@dataclass(slots=True)
class RecoveryClock:
    """Times the parts of each recovery as the coordinator's machine goes through them."""

    heard_s: dict[str, float] = field(default_factory=dict)
    """Last word of each device, monotonic."""
    _opened: list[ev.EpochOpened] = field(default_factory=list)
    _times: dict[str, float] = field(default_factory=dict)
    _silent_s: float = 0.0
    _loads: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _recovered: ev.Recovered | None = None
    _decided: Decision | None = None
    _before: tuple[str, ...] = ()
    _plan: PipelinePlan | None = None

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
                if not self._opened:
                    self._times = {"opened": now_s}
                    self._before = state.plan.devices
                    gone = [now_s - self.heard_s.get(device, now_s) for device in news.lost]
                    self._silent_s = max(gone, default=0.0)
                self._opened.append(news)
                self._loads.clear()
            case ev.ChooseOwners():
                self._times["fenced"] = now_s
            case ev.SendMessage(message=msg.Install()) if self._opened:
                self._times["planned"] = now_s
            case ev.Announce(news=ev.Recovered() as news):
                self._times["installed"] = now_s
                self._recovered, self._decided = news, state.decided
                self._plan = state.plan

    def stepped(self) -> RecoveryEvent | None:
        """A step is committed: the recovery that it ends, if there is one."""
        recovered, decided = self._recovered, self._decided
        if recovered is None or decided is None:
            return None
        times, now_s = self._times, time.monotonic()
        at = [times.get(name, now_s) for name in ("opened", "fenced", "planned", "installed")]
        lost = tuple(dict.fromkeys(device for news in self._opened for device in news.lost))
        overs = tuple(self._take_overs(decided))
        event = RecoveryEvent(
            epoch=recovered.epoch,
            lost=lost,
            reason=self._opened[0].reason if self._opened else "",
            choice=recovered.reason,
            how="rollback" if decided.is_rollback else "replay" if overs else "keep",
            base=recovered.base,
            silent_s=self._silent_s,
            fenced_s=at[1] - at[0],
            planned_s=at[2] - at[1],
            installed_s=at[3] - at[2],
            first_step_s=now_s - at[3],
            replayed_steps=max((recovered.base - o.from_version for o in overs), default=0),
            redone_steps=recovered.redone,
            take_overs=overs,
            plan=self._plan,
        )
        self._opened.clear()
        self._recovered = self._decided = None
        return event

    def _take_overs(self, decided: Decision) -> Any:
        for index, (action, stage) in enumerate(
            zip(decided.actions, decided.plan.stages, strict=True)
        ):
            if action.act != "restore":
                continue
            device = str(stage.device)
            figures = self._loads.get(device, {})
            source = next((str(s.device) for s in action.sources), "coordinator")
            same_cuts = len(self._before) == len(decided.plan.stages)
            yield TakeOver(
                stage=index,
                layers=(stage.first_layer, stage.last_layer),
                device=device,
                before=str(self._before[index]) if same_cuts else "",
                from_version=decided.base if action.version is None else action.version,
                source=source,
                compiled_s=float(figures.get("compiled_s", 0.0)),
                loaded_s=float(figures.get("loaded_s", 0.0)),
                moved_bytes=int(figures.get("moved_bytes", 0)),
            )
