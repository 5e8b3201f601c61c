"""The state of one run, and what every part of it needs: chains, steps, epochs.

`Pipeline` < `Copying` (waves, the policy) < `Recovering` (stops, losses) < `Body` (the clock).
"""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np

from ..core import PipelinePlan, ReplicaPlan
from ..core.cost import step_time_s
from ..propagation import Handover, Holding
from .copies import Copies
from .outcome import CAUSES, Cause
from .setups import Setup
from .takers import Chain
from .transfers import Air, Kind
from .world import MICROBATCHES, SERVER, STEP_S, World, crowd_of, profile_of

SNAPSHOT_S = 0.05
SLOWDOWN = 0.1
COPIES = 2
"""Copies of a stage that a policy may ask for beside the owner's: as many as FTPipeHD's rule names,
chain and central."""
CHECKPOINT_STEPS = 600
"""Of all policies alike: a copy of everything to the server over the uplink."""

Phase = Literal["run", "silent", "wait", "fetch", "restart", "replay", "switch", "settle"]


class Pipeline:
    """A pipeline of one world under one setup, at one moment."""

    def __init__(
        self,
        world: World,
        setup: Setup,
        *,
        scenario_name: str = "",
        checkpoint_steps: int = CHECKPOINT_STEPS,
    ) -> None:
        self._world, self._setup, self._scenario = world, setup, world.scenario
        self._scenario_name = scenario_name
        self._server = world.devices
        self._crowd = crowd_of(world, server=setup.server)
        self._profile = profile_of(world.scenario)
        self._names = (*world.ids, SERVER)
        self._rows = {name: row for row, name in enumerate(self._names)}
        self._stages = world.scenario.stages
        self._steps = max(1, round(world.scenario.work_s / STEP_S))
        self._checkpoint_steps = checkpoint_steps
        self._step_times: dict[Chain, float] = {}
        self._holdings: dict[tuple[int, int, int], Holding] = {}
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
        self._none_in: np.ndarray | None = None
        """Who was near whom when no chain was found last."""
        # The first chain is the same for all: nothing is known yet but places and speeds.
        chain = world.first_chain
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
            self._plans[chain] = PipelinePlan.even(self._stages, names, microbatches=MICROBATCHES)
        return self._plans[chain]

    def _fits(self, chain: Chain) -> bool:
        return all(self._there[row] for row in chain) and all(
            self._linked[a, b] for a, b in itertools.pairwise(chain)
        )

    def _broken(self) -> bool:
        return not self.owners or not self._fits(self.owners)

    def _cut_off(self) -> None:
        """The step that was running is lost."""
        self.spent["redone"] += self._done_s
        self._begin_step()

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
