"""What a recovery came to: told to the user as it ends, kept as a line of `recoveries.jsonl`.

Knows nothing of how a run recovers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core import PipelinePlan

READY_S = 1e-3
"""Programs that took less than this were ready: what is left is looking them up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeOver:
    """A stage that got its state anew."""

    stage: int
    layers: tuple[int, int]
    """First and last."""
    device: str
    before: str
    """Who had a stage of just these layers; "": nobody, the layers were cut anew."""
    was_spare: bool = False
    """It had no stage before."""
    from_version: int
    """Of the copy that it starts from."""
    source: str
    """Who had that copy; "coordinator": its disk."""
    compiled_s: float = 0.0
    """Compiling on the hot path; next to 0: the programs were ready."""
    loaded_s: float = 0.0
    """From the Install until the state was in place, compiling included."""
    moved_bytes: int = 0
    """State that came over the wire for it, now; 0: the copy was there."""

    @property
    def is_new(self) -> bool:
        """Whether the stage changed hands; else its own device only went back to a copy."""
        return self.device != self.before

    @property
    def why(self) -> str:
        """What made this device the one: "a spare that had the copy and the programs"."""
        had = ["the copy"] if self.source == self.device else []
        had += ["the programs"] if self.compiled_s < READY_S else []
        kind = "a spare" if self.was_spare else "a survivor"
        return f"{kind} that had {' and '.join(had)}" if had else kind


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryEvent:
    """A loss, or a return, and how the run went on. Times in seconds, one after another."""

    epoch: int
    at_s: float
    """Unix time at which the epoch was opened."""
    opened_s: float
    """The same moment on the clock of this run's op times (`time.monotonic`)."""
    lost: tuple[str, ...]
    reason: str
    """Why the epoch was opened."""
    choice: str
    """How it went on, who took over, and why that one."""
    how: str
    """"replay": only lost stages were redone; "rollback": all were; "hand-over": stages moved at a
    standstill, nothing was lost; "keep": every stage stayed where it was."""
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

    @property
    def moved_bytes(self) -> int:
        """State that came over the wire on the hot path."""
        return sum(over.moved_bytes for over in self.take_overs)

    @property
    def compiled_s(self) -> float:
        """Compiling on the hot path, of the device that took longest."""
        return max((over.compiled_s for over in self.take_overs), default=0.0)

    @property
    def devices(self) -> tuple[str, ...]:
        """Who has the stages from here on, in their order."""
        return tuple(map(str, self.plan.devices)) if self.plan is not None else ()

    @property
    def spans(self) -> tuple[tuple[str, float, float], ...]:
        """(what, start, end) of its parts, on the clock of op times, without a gap."""
        at_s = self.opened_s - self.silent_s
        found = []
        for name, length_s in (
            ("noticed", self.silent_s),
            ("fenced", self.fenced_s),
            ("planned", self.planned_s),
            ("installed", self.installed_s),
            ("first_step", self.first_step_s),
        ):
            found.append((name, at_s, at_s + length_s))
            at_s += length_s
        return tuple(found)

    def story(self) -> str:
        """Who was lost, who took over, why that one, and what was done a second time."""
        who = f"lost {', '.join(self.lost)}" if self.lost else self.reason or "a new epoch"
        new = [over for over in self.take_overs if over.is_new]
        if any(not over.before for over in new):
            parts = [f"{over.device} has layers {_range(over.layers)}" for over in new]
            parts = [f"the layers were cut anew: {', '.join(parts)}"]
        else:
            parts = [f"{o.device} took layers {_range(o.layers)} ({o.why})" for o in new]
        return f"{who}: {'; '.join([*parts, self._again()])}"

    def _again(self) -> str:
        if self.how == "rollback":
            return f"all went back to step {self.base}: {_steps(self.redone_steps)} redone"
        if self.replayed_steps:
            return f"it replayed {_steps(self.replayed_steps)}, nobody else redid any"
        return "no step was redone"

    def times(self) -> str:
        """How long it took, part by part, and what was moved."""
        return (
            f"{self.total_s:.2f} s to the next step: noticed in {self.silent_s:.2f}, all stopped in"
            f" {self.fenced_s:.2f}, planned in {self.planned_s:.2f}, moved and replayed in"
            f" {self.installed_s:.2f} (compiling {self.compiled_s:.2f}), first step"
            f" {self.first_step_s:.2f}; {self.moved_bytes / 1e6:.1f} MB moved"
        )

    def line(self) -> str:
        """For people: one line."""
        return f"{self.story()}. {self.times()}"


def _range(layers: tuple[int, int]) -> str:
    first, last = layers
    return str(first) if first == last else f"{first}-{last}"


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"
