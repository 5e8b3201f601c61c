"""Stops: planned moves at a step boundary, and losses with their recovery."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .copying import Copying
from .setups import Foresighted
from .takers import Chain, Vacancy, fastest
from .world import MICROBATCHES, STEP_S


class Recovering(Copying):
    """Moves, losses, recoveries."""

    def _begin_switch(self) -> None:
        """At a step boundary all stop; the rest of the state goes over; then all begin anew."""
        after = tuple(self._moving.get(s, row) for s, row in enumerate(self.owners))
        if not self._fits(after):
            self._forget_moves()
            self._waves()
            return
        self._after = after
        self._end_epoch()
        self.phase, self._left_s = "switch", 0.0
        for stage, row in self._moving.items():
            self._send("switch", stage, self.owners[stage], row, self.head)
        self._fetched()

    def _switched(self) -> None:
        self.count["switches"] += 1
        for stage, row in self._moving.items():
            # The old owner keeps what it had, as a copy, until the next wave is complete.
            self.copies.add(stage, self.owners[stage], self.head)
            self.copies.add(stage, row, self.head)
            self._keeper[stage] = (self.owners[stage], self.head)
            self.count["handovers"] += 1
        self.owners = self._after
        self._forget_moves()
        self._resume()
        # Old owners keep copies and logs: nobody is without a second copy.
        self._wave_due = False

    def _lose(self, row: int) -> None:
        """A device has gone with all that it held."""
        self._there[row] = False
        self.copies.wipe(row)
        for stage, owner in enumerate(self.owners):
            if owner == row:
                self._live[stage] = False
        for kind in ("wave", "checkpoint"):
            mine = [t for t in self._air.all if t.kind == kind and row in (t.source, t.target)]
            if any(t.source == row for t in mine):
                self._air.remove(kind)  # a wave without an owner's part is none
                self._open.pop(kind, None)
            elif mine:
                self._air.all = [t for t in self._air.all if t not in mine]
                self._close_wave(kind)
        if row in self._moving.values() and self.phase == "run":
            self._forget_moves()

    def _notice(self) -> None:
        """Whether the pipeline stops, or goes on, now that something has changed."""
        if self.phase == "run":
            if self._broken() or not all(self._live):
                self._stop()
        elif self.phase in ("switch", "settle"):
            sources = [self.owners[s] for s in self._moving]
            if not self._fits(self._after) or not all(self._there[row] for row in sources):
                self._forget_moves()
                self._stop()
        elif self.phase in ("silent", "wait") and not self._restoring:
            if not self._broken() and all(self._live):
                self.phase = "run"
                self._left_s = self._step_s(self.owners) - self._done_s
        elif self.phase in ("fetch", "restart", "replay"):
            stuck = any(not self._there[t.source] for t in self._air.all if t.kind == "fetch")
            if self._broken() or stuck:
                self._stop()
        if self.phase == "wait" and self.now_s == self._second:
            near = self._world.seen(self._second).near
            if self._none_in is None or not np.array_equal(near, self._none_in):
                self._recover()

    def _stop(self) -> None:
        """Silence: nobody knows yet whether it lasts."""
        if self.phase != "run":
            self._restoring = True
            self._air.remove("fetch")
        self.phase, self._left_s = "silent", self._scenario.detect_s

    def _vacancy(self, owners: Chain, lost: frozenset[int]) -> Vacancy:
        seen = self._world.seen(self._second)
        near = seen.near.copy()
        for stage in lost if owners else ():
            near[owners[stage]] = near[:, owners[stage]] = False
        return Vacancy(
            owners=owners or (-1,) * self._stages,
            lost=lost,
            near=near,
            speeds=self._world.speeds,
            positions_m=seen.sightings.positions_m,
        )

    def _recover(self) -> None:
        """Fence, report, decide: who goes on with which stage, from which version."""
        if self._done_s > 0:
            self._cut_off()
        heard = self._world.seen(self._second).heard.present
        silent = (
            frozenset(
                s for s, row in enumerate(self.owners) if not (heard[row] and self._there[row])
            )
            if self.owners
            else frozenset(range(self._stages))
        )
        if self.owners and not silent and not self._broken():
            chain: Chain | None = self.owners
        else:
            chain = self._successors(silent)
        # Whether there is a chain depends on nothing but who is near whom.
        self._none_in = self._world.seen(self._second).near if chain is None else None
        if chain is None:
            self.phase = "wait"
            return
        self.count["losses"] += 1
        self._restoring = True
        self._end_epoch()
        self._forget_moves()
        before = self.owners
        left: set[int] = set()
        for stage, row in enumerate(before):
            if chain[stage] == row:
                continue
            ends = [
                near for near in (stage - 1, stage + 1)
                if 0 <= near < self._stages and not self._linked[row, before[near]]
            ]  # fmt: skip
            # Of the two ends of a cut link, both replaced, one is blamed: the later stage.
            blamed = [near for near in ends if chain[near] == before[near] or near < stage]
            if self._live[stage] and self._there[row] and not blamed:
                # Its links hold; it moves because others do, and hands its state over.
                self.copies.add(stage, row, self.head)
            elif self._live[stage] and self._there[row] and self._setup.leavers_serve:
                self.copies.add(stage, row, self.head)
            else:
                left.add(row)
                self._live[stage] = False
        usable = {row for row, there in enumerate(self._there) if there} - left
        moved = [s for s in range(self._stages) if not before or chain[s] != before[s]]
        kept = [s for s in range(self._stages) if s not in moved and self._live[s]]
        self.owners = chain
        self._restore(usable, kept)

    def _successors(self, silent: frozenset[int]) -> Chain | None:
        policy = self._setup.policy
        names = None
        if self.owners and self._setup.own_takers and isinstance(policy, Foresighted):
            cut = {
                stage
                for first in range(self._stages - 1)
                if not self._linked[self.owners[first], self.owners[first + 1]]
                for stage in (first, first + 1)
            }
            view = self._view(frozenset(self.owners[stage] for stage in silent))
            names = policy.take_over(view, sorted(silent | cut))
        if names is None:
            return fastest(self._vacancy(self.owners, silent))
        return tuple(self._rows[name] for name in names)

    def _restore(self, usable: set[int], kept: list[int]) -> None:
        """Chooses versions (replay, else rollback) and starts to fetch what owners lack."""
        lost = [s for s in range(self._stages) if s not in kept]
        versions = self._replay_versions(usable, kept, lost)
        self._replay_s = 0.0
        if versions is not None:
            if any(v < self.head for v in versions.values()):
                self.count["replays"] += 1
            self._replay_s = self._replay_seconds(versions)
            for stage, version in versions.items():
                self._log_from[stage] = version
        else:
            for stage in kept:
                self.copies.add(stage, self.owners[stage], self.head)
            base = self.copies.common(range(self._stages), usable)
            assert base is not None  # the checkpoint of version 0 is always there
            self.count["rollbacks"] += base < self.head
            self.head = base
            self.copies.drop_after(base)
            if self._open.get("checkpoint", 0) > base:
                self._air.remove("checkpoint")
                self._open.pop("checkpoint")
            versions = dict.fromkeys(range(self._stages), base)
            for stage in lost:
                self._log_from[stage] = base
            self._last_wave = min(self._last_wave, base)
            self._last_checkpoint = min(self._last_checkpoint, base)
        self.phase, self._left_s = "fetch", 0.0
        restored = False
        for stage, version in versions.items():
            target = self.owners[stage]
            if self.copies.holds(stage, target, version):
                continue
            sources = self.copies.sources(stage, version, usable)
            source = min(
                sources,
                key=lambda row, to=target: (
                    row == self._server or not self._linked[row, to],
                    row == self._server,
                    row,
                ),
            )
            restored |= source == self._server
            self._send("fetch", stage, source, target, version)
        self.count["restores"] += restored
        self._live = [s in kept for s in range(self._stages)]
        self._fetched()

    def _replay_versions(
        self, usable: set[int], kept: list[int], lost: list[int]
    ) -> dict[int, int] | None:
        """Lost stage -> the version that its run is replayed from; None: a rollback."""
        if not kept:
            return None
        found: dict[int, int] = {}
        for run in _runs(lost):
            edges = [s for s in (run[0] - 1, run[-1] + 1) if 0 <= s < self._stages]
            at_head = self.copies.common(run, usable, least=self.head)
            if at_head is None and not self._setup.replay:
                return None
            least = max((self._logs(s) for s in edges), default=self.head)
            version = self.copies.common(run, usable, least=min(least, self.head))
            if version is None:
                return None
            found |= dict.fromkeys(run, version)
        return found

    def _logs(self, stage: int) -> int:
        """The oldest step of which that stage's frames can be had."""
        keeper, until = self._keeper.get(stage, (self._server, 0))
        return self._log_from[stage] if self._there[keeper] else until

    def _replay_seconds(self, versions: dict[int, int]) -> float:
        """Of the longest run: one stage without bubbles, several with those of their own."""
        worst_s = 0.0
        for run in _runs(sorted(versions)):
            steps = self.head - versions[run[0]]
            # The run's own step on its devices: the pipeline's, with its bubbles only.
            slowest = min(self._world.speeds[self.owners[s]] for s in run)
            share = (MICROBATCHES + len(run) - 1) / (MICROBATCHES + self._stages - 1)
            worst_s = max(worst_s, steps * share * STEP_S / slowest)
        return worst_s


def _runs(stages: Sequence[int]) -> list[list[int]]:
    """Groups of adjacent stages."""
    found: list[list[int]] = []
    for stage in stages:
        if found and found[-1][-1] == stage - 1:
            found[-1].append(stage)
        else:
            found.append([stage])
    return found
