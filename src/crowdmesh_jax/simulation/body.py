"""One training run of a pipeline in virtual time: steps, waves, hand-overs, losses, recoveries.

It runs from event to event: a second of movement is over, a step ends, a transfer is through, a
device crashes, a phase ends. What it decides itself is the same for all policies; where rules
differ it asks its `Setup`. docs/policies_compared.md says what is modelled and what is not.
"""

from __future__ import annotations

from .outcome import Cause, Outcome
from .pipeline import SLOWDOWN, Phase
from .recovering import Recovering
from .setups import Foresighted

_CAUSE: dict[Phase, Cause] = {
    "silent": "detection", "wait": "waiting", "fetch": "transfer", "restart": "restart",
    "replay": "redone", "switch": "switching", "settle": "switching",
}  # fmt: skip


class Body(Recovering):
    """One run. `run` may be called once."""

    def run(self) -> Outcome:
        """Until the work is done or the limit is reached."""
        while self.head < self._steps and self.now_s < self._world.limit_s:
            self._next()
        return Outcome(
            policy=self._setup.name,
            scenario=self._scenario_name,
            seed=self._world.seed,
            finished=self.head >= self._steps,
            elapsed_s=self.now_s,
            steps=self._steps,
            **{f"{cause}_s": seconds for cause, seconds in self.spent.items()},
            **self.count,
        )

    def _next(self) -> None:
        """To the next event, whatever comes first."""
        ends_s = self._second + 1.0 - self.now_s
        phase_s = self._phase_seconds()
        gone_s = self._gone[0][0] - self.now_s if self._gone else float("inf")
        passed_s = max(0.0, min(ends_s, phase_s, gone_s, self._air.seconds_left()))
        self._spend(passed_s)
        through = self._air.advance(passed_s)
        is_tick = ends_s <= passed_s
        self.now_s = self._second + 1.0 if is_tick else self.now_s + passed_s
        changed = bool(through)
        for each in through:
            self._arrived(each)
        while self._gone and self._gone[0][0] <= self.now_s:
            self._lose(self._gone.pop(0)[1])
            changed = True
        if is_tick:
            self._tick()
            changed = True
        if changed:
            self._notice()
        if phase_s <= passed_s and self._phase_seconds() <= 0:
            self._phase_ends()
        if through or is_tick or changed:
            self._air.retime(self._linked, self._there)

    def _phase_seconds(self) -> float:
        if self.phase == "run":
            if self._pause_s > 0:
                return self._pause_s
            return self._left_s / self._rate
        if self.phase in ("wait", "fetch", "switch"):
            return float("inf")
        return self._left_s

    @property
    def _rate(self) -> float:
        return 1 - SLOWDOWN if self._air.background else 1.0

    def _spend(self, seconds: float) -> None:
        if self.phase != "run":
            self.spent[_CAUSE[self.phase]] += seconds
            self._left_s -= seconds
        elif self._pause_s > 0:
            self.spent["overhead"] += seconds
            self._pause_s -= seconds
            if self._pause_s < 1e-9:
                self._pause_s = 0.0
        else:
            done_s = seconds * self._rate
            self.spent["overhead"] += seconds - done_s
            self._done_s += done_s
            self._left_s -= done_s
        if self._left_s < 1e-9:
            self._left_s = 0.0

    def _tick(self) -> None:
        self._second += 1
        moment = self._world.moment(self._second)
        self._linked = moment.linked
        self._gone = list(self._world.departures(self._second))
        while self._gone and self._gone[0][0] <= self.now_s:
            self._lose(self._gone.pop(0)[1])
        self._there = [*(bool(v) for v in moment.there), True]
        if self.phase == "run" and not self._broken():
            setup = self._setup
            if self._consult or self._second % setup.decide_every_s == 0:
                self._decide()
            elif setup.moves_every_s and self._second % setup.moves_every_s == 0:
                assert isinstance(setup.policy, Foresighted)
                self._hand_over(setup.policy.moves(self._view()))

    def _commit(self) -> None:
        self.head += 1
        self.count["commits"] += 1
        first = self.head > self.reached
        self.spent["useful" if first else "redone"] += self._done_s
        self.reached = max(self.reached, self.head)
        self._begin_step()
        if self.head >= self._steps:
            return
        if self._moving and not any(t.kind == "ahead" for t in self._air.all):
            self._begin_switch()
            return
        self._waves()

    def _phase_ends(self) -> None:
        if self.phase == "run":
            if self._pause_s <= 0 and self._left_s <= 0:
                self._commit()
        elif self.phase == "silent":
            self._recover()
        elif self.phase == "restart":
            self.phase, self._left_s = "replay", self._replay_s
        elif self.phase == "replay":
            self._live = [True] * self._stages
            self._resume()
        elif self.phase == "settle":
            self._switched()
