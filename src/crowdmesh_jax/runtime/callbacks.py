"""What a user's code hears of a run, and what it may ask of it.

A callback is any callable `callback(event, control)`. It is called in the thread that called
`train`, with each event in order; what it raises ends the run. What it asks for takes effect at the
next commit, since that is where all stages agree on a version.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, Protocol

from ..control import Departing
from ..errors import InvalidValueError
from ..protocol import coordinator_events as ev
from ..protocol.common import BestRule
from .evaluation import DIRECTIONS, check_metric
from .result import EvaluationEvent, RunEvent

Ask = ev.StopAsked | ev.CheckpointAsked | Departing


class Control:
    """A callback's handle on the run.

    Attributes:
        evaluated: Names of the values that evaluations give; empty where the run has none.
    """

    def __init__(self, evaluated: tuple[str, ...] = ()) -> None:
        self.evaluated = evaluated
        self._send: Callable[[Ask], None] | None = None
        self._devices: Collection[str] = ()
        self._stop: ev.StopAsked | None = None

    def stop(self, reason: str) -> None:
        """No more steps after the next commit: `train` returns what is trained by then.

        The first call counts; its reason becomes `TrainResult.stopped`. Asked before the run has
        begun, it stops after the first step.
        """
        if self._stop is None:
            self._stop = ev.StopAsked(reason=str(reason) or "asked by a callback")
            if self._send is not None:
                self._send(self._stop)

    def checkpoint(self) -> None:
        """A checkpoint of the next commit's version, unless one is on its way."""
        if self._send is not None:
            self._send(ev.CheckpointAsked())

    def depart(self, device: str, *, in_s: float) -> None:
        """A device is going to leave: its battery is low, its user said so, or your own
        prediction of its movement does. Its stage is handed over to an idle device before that,
        at a step's end, as early as its state needs to move, and no work is lost. Needs a run
        with recovery; elsewhere nothing happens.

        Args:
            in_s: Seconds from now; infinite: it stays after all.

        Raises:
            InvalidValueError: The crowd has no such device, or `in_s` is negative or no number.
        """
        if not in_s >= 0:
            raise InvalidValueError(f"depart({device!r}): in_s must be >= 0, got {in_s}")
        if self._devices and device not in self._devices:
            known = ", ".join(sorted(self._devices))
            raise InvalidValueError(f"depart({device!r}): the crowd has {known}")
        if self._send is not None:
            self._send(Departing(device=device, leaves_in_s=in_s))

    def bind(self, send: Callable[[Ask], None], devices: Collection[str]) -> None:
        """The run of a crowd's devices has begun: what was asked so far, and what will be, goes
        there."""
        self._send, self._devices = send, devices
        if self._stop is not None:
            send(self._stop)


class Callback(Protocol):
    """Hears events; may ask for things through `control`."""

    def __call__(self, event: RunEvent, control: Control, /) -> object: ...


class EarlyStopping:
    """Stops when an evaluated metric has not improved for a while.

    Args:
        metric: "loss" or a metric of the job.
        patience: So many evaluations in a row without improvement stop the run.
        mode: "min" or "max"; may be left out for "loss" and "accuracy".
        min_delta: Smaller improvements do not count.

    A resumed run starts counting anew.
    """

    def __init__(
        self,
        metric: str = "loss",
        *,
        patience: int,
        mode: Literal["min", "max"] | None = None,
        min_delta: float = 0.0,
    ) -> None:
        mode = mode or DIRECTIONS.get(metric)
        if mode not in ("min", "max"):
            raise InvalidValueError(
                f"EarlyStopping: is a high {metric!r} good? Say mode='max' or mode='min'"
            )
        if patience < 1 or not min_delta >= 0:
            raise InvalidValueError(
                f"EarlyStopping: patience must be >= 1 and min_delta >= 0, got {patience},"
                f" {min_delta}"
            )
        self.patience, self.min_delta = patience, min_delta
        self._rule = BestRule(metric=metric, mode=mode)
        self._is_checked = False
        self.best: float | None = None
        self.best_version: int | None = None
        self.waited = 0
        """Evaluations since the best one."""

    def __call__(self, event: RunEvent, control: Control, /) -> None:
        if not self._is_checked:
            check_metric(self._rule.metric, control.evaluated, "EarlyStopping")
            self._is_checked = True
        if not isinstance(event, EvaluationEvent):
            return
        value = event.values[self._rule.metric]
        ahead = value + (self.min_delta if self._rule.mode == "min" else -self.min_delta)
        if self._rule.is_better(ahead, self.best):
            self.best, self.best_version, self.waited = value, event.version, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            control.stop(
                f"{self._rule.metric} has not improved for {self.waited} evaluations"
                f" (best {self.best} at step {self.best_version})"
            )
