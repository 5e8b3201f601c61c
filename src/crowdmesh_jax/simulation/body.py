"""One training run of a pipeline in virtual time: steps, waves, hand-overs, losses, recoveries.

It runs from event to event: a second of movement is over, a step ends, a transfer is through, a
device crashes, a phase ends. What it decides itself is the same for all policies; where rules
differ it asks its `Setup`. docs/policies_compared.md says what is modelled and what is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from ..core import PipelinePlan, ReplicaPlan
from ..core.cost import step_time_s
from ..propagation import Budget, Costs, Handover, Holding, PolicyView
from .copies import Copies
from .outcome import CAUSES, Cause, Outcome
from .setups import Setup
from .takers import Chain, Vacancy, fastest
from .transfers import Air, Kind, Transfer
from .world import MICROBATCHES, SERVER, STEP_S, World, crowd_of, profile_of

SNAPSHOT_S = 0.05
SLOWDOWN = 0.1
CHECKPOINT_STEPS = 600
"""Of all policies alike: a copy of everything to the server over the uplink."""

Phase = Literal["run", "silent", "wait", "fetch", "restart", "replay", "switch", "settle"]
_CAUSE: dict[Phase, Cause] = {
    "silent": "detection", "wait": "waiting", "fetch": "transfer", "restart": "restart",
    "replay": "redone", "switch": "switching", "settle": "switching",
}  # fmt: skip


class Body:
    """One run. `run` may be called once."""

    def __init__(
        self, world: World, setup: Setup, *, checkpoint_steps: int = CHECKPOINT_STEPS
    ) -> None:
        self._world, self._setup, self._scenario = world, setup, world.scenario
        self._server = world.devices
        self._crowd = crowd_of(world, server=setup.server)
        self._profile = profile_of(world.scenario)
        self._names = (*world.ids, SERVER)
        self._rows = {name: row for row, name in enumerate(self._names)}
        self._stages = world.scenario.stages
        self._steps = max(1, round(world.scenario.work_s / STEP_S))
        self._checkpoint_steps = checkpoint_steps
        self._step_times: dict[Chain, float] = {}
        self._plans: dict[Chain, PipelinePlan] = {}
        self.spent: dict[Cause, float] = dict.fromkeys(CAUSES, 0.0)
        self.count = dict.fromkeys(
            ("commits", "losses", "rollbacks", "replays", "restores", "handovers", "switches",
             "waves", "sent_bytes"), 0,
        )  # fmt: skip
        self.now_s, self._second = 0.0, 0
        self._gone = list(world.departures(0))
        self._there = [*(bool(v) for v in world.moment(0).there), True]
        self._linked = world.moment(0).linked
        self._air = Air(
            self._scenario.d2d_bytes_per_s, self._scenario.uplink_bytes_per_s, self._server
        )
        self.copies = Copies(self._stages)
        self.head = 0
        """Version that the pipeline is at."""
        self.reached = 0
        """The highest version that was ever committed."""
        self.phase: Phase = "run"
        self._left_s = 0.0
        self._standing: ReplicaPlan | None = None
        self._handovers: tuple[Handover, ...] = ()
        self._moving: dict[int, int] = {}
        """Stage -> the device that state goes ahead to."""
        self._last_wave = self._last_checkpoint = 0
        self._open: dict[Kind, int] = {}
        """Stream -> version of its open wave."""
        self._checkpoint = 0
        self._wave_due = True
        self._sent_at: dict[tuple[int, int], int] = {}
        self._restoring = False
        """Whether a recovery is under way, so that a link that returns does not end it."""
        self._replay_s = 0.0
        self._consult = True
        # The first chain is the same for all: nothing is known yet but places and speeds.
        chain = fastest(self._vacancy((), frozenset(range(self._stages))))
        self.owners: Chain = chain or ()
        self._live = [bool(chain)] * self._stages
        self._log_from = [0] * self._stages
        """The oldest step whose boundary frames are kept, by stage."""
        self._keeper: dict[int, tuple[int, int]] = {}
        """Stage -> who had it before the last planned move, and until when. It keeps its logs until
        the next wave is complete."""
        for stage in range(self._stages):
            self.copies.add(stage, self._server, 0)
            if chain:
                self.copies.add(stage, chain[stage], 0)
        if chain is None:
            self.phase, self._restoring = "wait", True
            self._live = [False] * self._stages
        self._begin_step()

    # -- the clock -------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Until the work is done or the limit is reached."""
        while self.head < self._steps and self.now_s < self._world.limit_s:
            self._next()
        return Outcome(
            policy=self._setup.name,
            scenario=self._setup.scenario,
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
                self._hand_over(setup.policy.moves(self._view()))  # pyright: ignore

    # -- steps -----------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        self._pause_s = self._done_s = 0.0
        self._left_s = self._step_s(self.owners) if self.owners else 0.0

    def _step_s(self, chain: Chain) -> float:
        if chain not in self._step_times:
            self._step_times[chain] = step_time_s(self._profile, self._crowd, self._plan(chain))
        return self._step_times[chain]

    def _plan(self, chain: Chain) -> PipelinePlan:
        if chain not in self._plans:
            names = [self._names[row] for row in chain]
            self._plans[chain] = PipelinePlan.even(
                self._stages, names, microbatches=MICROBATCHES
            )
        return self._plans[chain]

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

    def _cut_off(self) -> None:
        """The step that was running is lost."""
        self.spent["redone"] += self._done_s
        self._begin_step()

    # -- copies ----------------------------------------------------------------------------------

    def _waves(self) -> None:
        """Starts what is due at this version."""
        if self._standing is not None and "wave" not in self._open:
            every = self._standing.interval_steps
            if every is not None and (
                self._wave_due or self.head - self._last_wave >= every
            ):
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

    # -- the policy ------------------------------------------------------------------------------

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
            # A range whose only copies were at devices that have gone has none until a wave is through.
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
        size = scenario.state_bytes_per_stage
        holdings = [
            Holding(
                device=self._plan(self.owners).devices[0].__class__(self._names[row]),
                first_layer=stage,
                last_layer=stage,
                version=max(self.copies.versions[stage].get(row) or {0}),
                age_s=0.0,
                size_bytes=size,
            )
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
            budget=Budget(),
            holdings=tuple(holdings),
            standing=self._standing,
            handovers=self._handovers,
        )

    def _hand_over(self, wanted: Sequence[Handover]) -> None:
        """Starts to send state ahead, and gives up what is not wanted any more."""
        self._handovers = tuple(wanted)
        moving = {self.owners.index(self._rows[h.owner]): self._rows[h.target] for h in wanted}
        for each in list(self._air.all):
            if each.kind == "ahead" and moving.get(each.stage) != each.target:
                self._air.all.remove(each)
        for stage, row in moving.items():
            under_way = any(
                t.kind == "ahead" and t.stage == stage for t in self._air.all
            )
            if not under_way and row not in self.copies.old_bytes[stage]:
                self._send("ahead", stage, self.owners[stage], row, self.head)
        self._moving = moving
        self._air.retime(self._linked, self._there)

    # -- planned stops ---------------------------------------------------------------------------

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

    def _forget_moves(self) -> None:
        self._moving, self._handovers = {}, ()
        self._air.remove("ahead", "switch")

    def _end_epoch(self) -> None:
        """Open waves die with their epoch. The upload of a checkpoint goes on: it is of a snapshot
        that stays valid, and takes longer than epochs do where devices move much."""
        self._air.remove("wave", "ahead", "fetch")
        self._open.pop("wave", None)

    def _resume(self) -> None:
        self.phase, self._restoring = "run", False
        self._begin_step()
        self._wave_due = self._consult = True

    # -- losses ----------------------------------------------------------------------------------

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

    def _fits(self, chain: Chain) -> bool:
        return all(self._there[row] for row in chain) and all(
            self._linked[a, b] for a, b in zip(chain, chain[1:], strict=False)
        )

    def _broken(self) -> bool:
        return not self.owners or not self._fits(self.owners)

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
        if self.phase == "wait" and (self.now_s == self._second):
            self._recover()

    def _stop(self) -> None:
        """Silence: nobody knows yet whether it lasts."""
        if self.phase != "run":
            self._restoring = True
            self._air.remove("fetch")
        self.phase, self._left_s = "silent", self._scenario.detect_s

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
        silent = frozenset(
            s for s, row in enumerate(self.owners) if not (heard[row] and self._there[row])
        ) if self.owners else frozenset(range(self._stages))
        if self.owners and not silent and not self._broken():
            chain: Chain | None = self.owners
        else:
            chain = self._successors(silent)
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
        if not self.owners or self._setup.takers is not None:
            return (self._setup.takers or fastest)(self._vacancy(self.owners, silent))
        cut = {
            stage
            for first in range(self._stages - 1)
            if not self._linked[self.owners[first], self.owners[first + 1]]
            for stage in (first, first + 1)
        }
        view = self._view(frozenset(self.owners[stage] for stage in silent))
        names = self._setup.policy.take_over(view, sorted(silent | cut))  # pyright: ignore
        return None if names is None else tuple(self._rows[name] for name in names)

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
                    row == self._server or not self._linked[row, to], row == self._server, row
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
        """The longest run: without bubbles where it is one stage, else those of a short pipeline."""
        worst_s = 0.0
        for run in _runs(sorted(versions)):
            steps = self.head - versions[run[0]]
            # The run's own step on its devices: the pipeline's, with its bubbles only.
            slowest = min(self._world.speeds[self.owners[s]] for s in run)
            share = (MICROBATCHES + len(run) - 1) / (MICROBATCHES + self._stages - 1)
            worst_s = max(worst_s, steps * share * STEP_S / slowest)
        return worst_s

    def _fetched(self) -> None:
        """All have what they need: the epoch begins."""
        if self.phase == "fetch" and not any(t.kind == "fetch" for t in self._air.all):
            self.phase, self._left_s = "restart", self._scenario.restart_s
        elif self.phase == "switch" and not any(t.kind == "switch" for t in self._air.all):
            self.phase, self._left_s = "settle", self._scenario.restart_s


def _runs(stages: Sequence[int]) -> list[list[int]]:
    """Groups of adjacent stages."""
    found: list[list[int]] = []
    for stage in stages:
        if found and found[-1][-1] == stage - 1:
            found[-1].append(stage)
        else:
            found.append([stage])
    return found
