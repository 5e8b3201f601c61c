"""Sessions learned from heartbeats: how long devices were there, and which of them still are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InvalidValueError
from . import checks
from .checks import Bools, Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Sessions:
    """How long devices stayed. Sessions that go on are counted: they last at least so long."""

    devices: int
    device: NDArray[np.int64]
    """`[sessions]`: whose."""
    duration_s: Floats
    """`[sessions]`: until it ended, or until last heard."""
    ended: Bools
    """`[sessions]`; False: censored, still going on."""

    def __post_init__(self) -> None:
        checks.whole("sessions: devices", self.devices, least=1, most=checks.MAX_DEVICES)
        duration_s = checks.at_least_zero("sessions: duration_s", self.duration_s)
        who, ended = np.asarray(self.device), np.asarray(self.ended)
        if duration_s.ndim != 1 or not duration_s.shape == who.shape == ended.shape:
            raise InvalidValueError(
                f"sessions need as many devices as durations and ends, got {who.shape},"
                f" {duration_s.shape}, {ended.shape}"
            )
        if not np.issubdtype(who.dtype, np.integer) or ended.dtype != np.bool_:
            raise InvalidValueError("sessions: device must be integers and ended booleans")
        if len(who) and not (who.min() >= 0 and who.max() < self.devices):
            raise InvalidValueError(
                f"sessions: device numbers must lie in 0..{self.devices - 1},"
                f" got {who.min()}..{who.max()}"
            )

    @classmethod
    def of(
        cls, device: ArrayLike, duration_s: ArrayLike, ended: ArrayLike, *, devices: int
    ) -> Sessions:
        """From lists."""
        return cls(
            devices=devices,
            device=np.asarray(device, np.int64),
            duration_s=np.asarray(duration_s, np.float64),
            ended=np.asarray(ended, np.bool_),
        )

    @property
    def ends(self) -> Floats:
        """How many sessions of each device ended, `[devices]`."""
        return np.bincount(self.device[self.ended], minlength=self.devices).astype(np.float64)

    def exposure(self, power: float = 1.0) -> Floats:
        """Sum of durations to that power, `[devices]`; of power 1: seconds observed."""
        return np.bincount(self.device, self.duration_s**power, self.devices).astype(np.float64)


class HeartbeatLog:
    """Who was heard when. Bounded: of each device's past only the last sessions are kept.

    A device that is silent for `timeout_s` has left; its session ended half a period after its last
    beat, since it went somewhere between that beat and the next. Heard again, it begins a new one.
    """

    def __init__(
        self, devices: int, *, period_s: float = 1.0, timeout_s: float = 3.0, keep: int = 1_000_000
    ) -> None:
        """Nobody was heard yet.

        Args:
            period_s: How often devices beat.
            keep: Ended sessions that are remembered, of all devices together; oldest go first.
        """
        self.devices = checks.whole("devices", devices, least=1, most=checks.MAX_DEVICES)
        self._period_s = checks.number("period_s", period_s, above=True)
        self._timeout_s = checks.number("timeout_s", timeout_s, least=period_s)
        self._keep = checks.whole("keep", keep, least=1)
        self._first_s = np.full(devices, math.nan)
        self._last_s = np.full(devices, math.nan)
        self._occupants = np.full(devices, -1)
        self._now_s = -math.inf
        self._done: list[tuple[NDArray[np.int64], Floats]] = []
        self._kept = 0

    def hear(self, now_s: float, heard: ArrayLike, occupants: ArrayLike | None = None) -> None:
        """Beats of one moment.

        Args:
            heard: `[devices]` booleans.
            occupants: Who stands behind each number; a newcomer under an old number ends the old
                session at once. None: numbers never change hands.

        Raises:
            InvalidValueError: Time goes back, or a shape is wrong.
        """
        now_s = checks.number("now_s", now_s, least=-math.inf)
        if now_s < self._now_s:
            raise InvalidValueError(f"heard at {now_s:g} s after {self._now_s:g} s")
        beats = np.asarray(heard, np.bool_)
        who = np.zeros(self.devices, np.int64) if occupants is None else np.asarray(occupants)
        if beats.shape != (self.devices,) or who.shape != (self.devices,):
            raise InvalidValueError(
                f"heard must be [{self.devices}] booleans, got {beats.shape} and {who.shape}"
            )
        self._now_s = now_s
        there = ~np.isnan(self._first_s)
        gone = there & (
            (now_s - self._last_s > self._timeout_s) | (beats & (who != self._occupants))
        )
        if gone.any():
            ended = np.flatnonzero(gone)
            self._done.append(
                (ended, self._last_s[ended] - self._first_s[ended] + self._period_s / 2)
            )
            self._kept += len(ended)
            while self._kept > self._keep and len(self._done) > 1:
                self._kept -= len(self._done.pop(0)[0])
            self._first_s[ended] = self._last_s[ended] = math.nan
        new = beats & np.isnan(self._first_s)
        self._first_s[new] = now_s
        self._last_s[beats] = now_s
        self._occupants[beats] = who[beats]

    @property
    def present(self) -> Bools:
        """Who counts as there, `[devices]`."""
        return ~np.isnan(self._first_s)

    @property
    def age_s(self) -> Floats:
        """How long each has been there, as far as heard, `[devices]`; 0 for who is away."""
        return np.where(self.present, self._last_s - self._first_s, 0.0)

    def sessions(self) -> Sessions:
        """All that is remembered: ended sessions, then those going on."""
        going = np.flatnonzero(self.present)
        device = np.concatenate([*(who for who, _ in self._done), going])
        duration_s = np.concatenate([*(length for _, length in self._done), self.age_s[going]])
        ended = np.arange(len(device)) < len(device) - len(going)
        return Sessions.of(device, duration_s, ended, devices=self.devices)
