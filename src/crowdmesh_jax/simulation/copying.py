"""Copies under way (waves, checkpoints, state ahead of moves), and what the policy sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..core import DeviceId
from ..propagation import Budget, Costs, Handover, Holding, PolicyView
from .pipeline import COPIES, SLOWDOWN, SNAPSHOT_S, Pipeline
from .transfers import Kind, Transfer
from .world import MICROBATCHES


class Copying(Pipeline):
    """Waves and decisions."""

    def _waves(self) -> None:
        """Starts what is due at this version."""
        if self._standing is not None and "wave" not in self._open:
            every = self._standing.interval_steps
            if every is not None and (self._wave_due or self.head - self._last_wave >= every):
                self._start_wave()
        if (
            "checkpoint" not in self._open
            and self.head - self._last_checkpoint >= self._checkpoint_steps
        ):
            self._last_checkpoint = self.head
            self._open_wave("checkpoint", [(s, self._server) for s in range(self._stages)])

    def _start_wave(self) -> None:
        assert self._standing is not None
        due: list[tuple[int, int]] = []
        for stage, item in enumerate(self._standing.ranges):
            for replica in item.replicas:
                row = self._rows[replica.device]
                if row == self.owners[stage] or not self._there[row]:
                    continue
                last = self._sent_at.get((stage, row))
                fresh = last is not None and self.copies.holds(stage, row, last)
                if self._wave_due or not fresh or self.head - (last or 0) >= replica.interval_steps:
                    due.append((stage, row))
        self._wave_due = False
        self._last_wave = self.head
        if due:
            self.count["waves"] += 1
            self._open_wave("wave", due)

    def _open_wave(self, kind: Kind, due: Sequence[tuple[int, int]]) -> None:
        self._pause_s += SNAPSHOT_S
        self._open[kind] = self.head
        for stage in range(self._stages):
            self.copies.add(stage, self.owners[stage], self.head)
        for stage, row in due:
            self._send(kind, stage, self.owners[stage], row, self.head)

    def _send(self, kind: Kind, stage: int, source: int, target: int, version: int) -> None:
        size = float(self._scenario.state_bytes_per_stage)
        if target in self.copies.old_bytes[stage]:
            size *= self._scenario.changed_share
        self._air.all.append(
            Transfer(
                kind=kind, stage=stage, source=source, target=target, version=version,
                left_bytes=size,
            )
        )  # fmt: skip
        if kind in ("wave", "checkpoint", "ahead"):
            self.count["sent_bytes"] += round(size)
        self._air.retime(self._linked, self._there)

    def _arrived(self, transfer: Transfer) -> None:
        stage, row, version = transfer.stage, transfer.target, transfer.version
        if transfer.kind != "switch":
            self.copies.add(stage, row, version)
        kind = transfer.kind
        if kind in ("wave", "checkpoint"):
            if kind == "wave":
                self._sent_at[stage, row] = version
            self._close_wave(kind)
        elif kind in ("fetch", "switch"):
            self._fetched()

    def _fetched(self) -> None:
        """All have what they need: the epoch begins."""
        if self.phase == "fetch" and not any(t.kind == "fetch" for t in self._air.all):
            self.phase, self._left_s = "restart", self._scenario.restart_s
        elif self.phase == "switch" and not any(t.kind == "switch" for t in self._air.all):
            self.phase, self._left_s = "settle", self._scenario.restart_s

    def _close_wave(self, kind: Kind) -> None:
        """Discards what is older, once all holders have the wave."""
        if kind not in self._open or any(t.kind == kind for t in self._air.all):
            return
        version = self._open.pop(kind)
        if kind == "checkpoint":
            self._checkpoint = version
        else:
            self._keeper.clear()
            self._log_from = [max(version, oldest) for oldest in self._log_from]
        below = version if kind == "wave" else min(version, self._open.get("wave", self._last_wave))
        for stage in range(self._stages):
            for row in list(self.copies.versions[stage]):
                limit = version if row == self._server else below
                if row == self._server or self.copies.holds(stage, row, version):
                    self.copies.discard(stage, row, limit, self._checkpoint)
                elif kind == "wave":
                    self.copies.keep_newest(stage, row, self._checkpoint)

    def _decide(self) -> None:
        self._consult = False
        view = self._view()
        decision = self._setup.policy.decide(view)
        standing = decision.replicas
        if self._standing is None or standing.ranges != self._standing.ranges:
            old = {} if self._standing is None else self._standing.ranges
            moved = not old or any(
                a.owner != b.owner or set(a.holders) - set(b.holders)
                for a, b in zip(standing.ranges, old, strict=True)
            )
            # Where all holders are new there is no second copy until a wave is through.
            bare = moved and not all(
                set(self.copies.versions[stage]) - {self.owners[stage], self._server}
                for stage, item in enumerate(standing.ranges)
                if item.replicas
            )
            self._wave_due = self._wave_due or bare
        self._standing = standing
        self._hand_over(decision.handovers)

    def _view(self, silent: frozenset[int] = frozenset()) -> PolicyView:
        """What the policy may know. `silent`: who did not answer, though their last heartbeat is
        not old enough yet."""
        seen = self._world.seen(self._second)
        heard = seen.heard
        if silent:
            present = heard.present.copy()
            present[sorted(silent)] = False
            heard = replace(heard, present=present)
        scenario = self._scenario
        replay = MICROBATCHES / (MICROBATCHES + self._stages - 1) if self._setup.replay else 1.0
        holdings = [
            self._holding(stage, row)
            for stage in range(self._stages)
            for row in sorted(self.copies.old_bytes[stage])
            if row != self._server and row != self.owners[stage]
        ]
        return PolicyView(
            plan=self._plan(self.owners),
            profile=self._profile,
            crowd=self._crowd,
            costs=Costs(
                step_s=self._step_s(self.owners),
                snapshot_s=SNAPSHOT_S,
                slowdown=SLOWDOWN,
                changed_share=scenario.changed_share,
                detect_s=scenario.detect_s,
                recovery_s=scenario.restart_s,
                replay_share=replay,
                crash_per_s=scenario.crash_per_s,
            ),
            ids=self._world.ids,
            sightings=seen.sightings,
            heard=heard,
            range_m=scenario.range_m,
            budget=Budget(copies=COPIES),
            holdings=tuple(holdings),
            standing=self._standing,
            handovers=self._handovers,
        )

    def _holding(self, stage: int, row: int) -> Holding:
        version = max(self.copies.versions[stage].get(row) or {0})
        key = (stage, row, version)
        if key not in self._holdings:
            self._holdings[key] = Holding(
                device=DeviceId(self._names[row]),
                first_layer=stage,
                last_layer=stage,
                version=version,
                age_s=0.0,
                size_bytes=self._scenario.state_bytes_per_stage,
            )
        return self._holdings[key]

    def _hand_over(self, wanted: Sequence[Handover]) -> None:
        """Starts to send state ahead, and gives up what is not wanted any more."""
        self._handovers = tuple(wanted)
        moving = {self.owners.index(self._rows[h.owner]): self._rows[h.target] for h in wanted}
        for each in list(self._air.all):
            if each.kind == "ahead" and moving.get(each.stage) != each.target:
                self._air.all.remove(each)
        for stage, row in moving.items():
            under_way = any(t.kind == "ahead" and t.stage == stage for t in self._air.all)
            if not under_way and row not in self.copies.old_bytes[stage]:
                self._send("ahead", stage, self.owners[stage], row, self.head)
        self._moving = moving
        self._air.retime(self._linked, self._there)
