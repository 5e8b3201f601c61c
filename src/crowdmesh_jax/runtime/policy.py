"""The body round the policy machine: plans in threads, programs sent ahead, questions answered.

Carries out what `control` wants and feeds it what happens; all of it is written to the run's
`policy.jsonl`, from which `control.replay` can do it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from .. import control
from ..core import Crowd, DeviceId, PipelinePlan
from ..errors import CrowdMeshError, RecordError
from ..programs import StageBundle
from ..propagation.handover import SOON_S
from ..protocol import CoordinatorState, OwnersNeed
from ..protocol import coordinator_events as ev
from ..protocol.coordinator_waves import who_did_not_store
from ..protocol.evidence import Copy
from ..record import Journal
from .outfit import Outfitter
from .placing import Placer

logger = logging.getLogger(__name__)

PLACE_EVERY_S = 1.0
LOW_PRIORITY = 10
"""Of the thread that plans ahead: nobody waits for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan for some devices, and what it is worth."""

    plan: PipelinePlan
    bundles: Sequence[StageBundle] = field(repr=False)
    step_s: float
    standing_step_s: float
    """Of the plan in force, by the same profile."""
    move_s: float
    """To move the states that change hands."""


Planner = Callable[[Sequence[str], PipelinePlan], Planned]
"""(devices, plan in force) -> a plan over some of them. Slow; runs in a thread. Raises a
CrowdMeshError where no plan fits."""
Post = Callable[[str, PipelinePlan, int], None]
"""Sends a stage's programs and rows to a device, ahead."""


class PolicyBody:
    """Of one run. All methods run on the run's loop.

    Args:
        ask: Hands an event to the coordinator's machine.
        post: See `Post`.
        spawn: Runs a coroutine beside the run.
        placer: Asked where copies go; None: the ring of devices.
        log: Where events and actions are written; None: nowhere.
    """

    def __init__(
        self,
        terms: control.ControlTerms,
        crowd: Crowd,
        outfitter: Outfitter,
        planner: Planner,
        *,
        ask: Callable[[Any], None],
        post: Post,
        spawn: Callable[[Coroutine[Any, Any, None], str], Any],
        placer: Placer | None = None,
        log: Journal | None = None,
    ) -> None:
        self.state = control.ControlState(terms=terms)
        self._crowd, self._outfitter, self._planner = crowd, outfitter, planner
        self._ask, self._post, self._spawn = ask, post, spawn
        self._placer = placer
        self._placed_s = 0.0
        """When it was asked last."""
        self._place_error = ""
        """What the placer failed with, if it failed when it was asked last."""
        self._moves_wanted = False
        """By the placer, when it was asked last."""
        self._log = log
        self._ready: dict[str, set[str]] = {}
        """Device -> keys of what it has: it need not be sent again."""
        self._ahead = ThreadPoolExecutor(1, "plan ahead", initializer=_lower_priority)
        self._write(control.terms_to_plain(terms))

    def close(self) -> None:
        """Ends the thread; what it plans is not waited for."""
        self._ahead.shutdown(wait=False, cancel_futures=True)

    def tell(self, event: control.ControlEvent) -> None:
        """Something happened."""
        now_s, before = time.monotonic(), self.state
        self.state, actions = control.handle(self.state, event, now_s)
        if actions or self.state is not before:
            self._write(control.told_to_plain(now_s, event, actions))
        for action in actions:
            self._do(action)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._log is None:
            return
        try:
            self._log.append(line)
        except RecordError as exc:  # what it says is of use, but nothing is built on it
            logger.error("%s; it is not written any more", exc.message)
            self._log = None

    def tick(self) -> None:
        """Time passes."""
        self.tell(control.Tick())
        if self._placer is None or not self.state.is_running or self.state.plan is None:
            return
        if time.monotonic() - self._placed_s >= PLACE_EVERY_S:
            self._placed_s = time.monotonic()
            self._place(self._placer, self.state.plan)

    def _place(self, placer: Placer, plan: PipelinePlan) -> None:
        """Asks the placer; its holders are asked for, its hand-overs are moves to make. If it
        fails now, though it answered before the run began, what it said last stands."""
        state, now_s = self.state, time.monotonic()
        leave_in_s = {device: at - now_s for device, at in state.departing.items()}
        try:
            decision = placer.decide(
                plan,
                statistics.median(state.usual_s) if state.usual_s else 1.0,
                stored=state.stored,
                measured_bytes_per_s=state.measured_bytes_per_s,
                leave_in_s=leave_in_s,
            )
            holders = placer.holders(
                decision,
                plan,
                state.party,
                leaving=[d for d, left_s in leave_in_s.items() if left_s <= SOON_S],
                failed=state.failed,
                room=state.terms.room,
            )
        except Exception as exc:
            if str(exc) != self._place_error:  # it is asked again in a second
                self._place_error = str(exc)
                logger.exception("policy %r failed; copies stay where they are", placer.policy.name)
            return
        self._place_error = ""
        if holders != self.state.holders:
            self.tell(control.HoldersWanted(holders=holders))
        moves = tuple(
            control.Move(
                device=str(item.owner), to=str(item.target), leaves_in_s=max(0.0, item.leaves_s)
            )
            for item in decision.handovers
        )
        if moves or self._moves_wanted:
            self._moves_wanted = bool(moves)
            self.tell(control.MovesWanted(moves=moves))

    # What the body knows of devices

    def has(self, device: str, key: str) -> bool:
        """Whether a stage's programs and rows need not be sent again."""
        return key in self._ready.get(device, ())

    def joined(self, device: str) -> None:
        """A process said Hello: what one before it had is gone."""
        self._ready.pop(device, None)
        if self._placer is not None:
            self._placer.presence.joined(device)
        self.tell(control.Joined(device=device))

    def lost(self, device: str) -> None:
        """Its channel ended."""
        if self._placer is not None:
            self._placer.presence.lost(device)
        self.tell(control.Lost(device=device))

    def ready(self, device: str, key: str) -> None:
        """A device has what the key names."""
        self._ready.setdefault(device, set()).add(key)
        self.tell(control.ProgramCompiled(device=device, key=key))

    def unready(self, device: str, key: str, reason: str) -> None:
        """A device could not make ready what the key names."""
        logger.warning("%s cannot make a stage ready ahead: %s", device, reason)
        self.tell(control.CompileFailed(device=device, key=key, reason=reason))

    def stored(self, device: str, copy: Copy) -> None:
        """A device holds a copy, whole."""
        self.tell(
            control.CopyStored(
                device=device,
                first_layer=copy.first_layer,
                last_layer=copy.last_layer,
                version=copy.version,
            )
        )

    def wave_given_up(self, state: CoordinatorState, missing: Sequence[DeviceId]) -> None:
        """A wave did not become complete for want of these."""
        for device in who_did_not_store(state, missing):
            reason = f"the wave of version {state.wave_from} was given up without it"
            self.tell(control.TransferFailed(device=str(device), reason=reason))

    def running(self, state: CoordinatorState) -> None:
        """An epoch runs."""
        stages = range(len(state.plan.stages))
        self.tell(
            control.Running(
                keys=tuple(self._outfitter.key(state.plan, stage) for stage in stages),
                epoch=state.epoch,
                plan=state.plan,
                party=tuple(str(device) for device in state.party),
                holders=state.holders,
                step=state.committed,
                steps=state.started.steps,
                link_bytes_per_s=self._links(state),
            )
        )

    def _links(self, state: CoordinatorState) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for owner in state.devices:
            for device in state.party:
                link = None if device == owner else self._crowd.link(owner, device)
                if link is not None:
                    found.setdefault(owner, {})[device] = link.bandwidth_bytes_per_s
        return found

    def needed(self, need: OwnersNeed) -> None:
        """A decision asks who takes what was lost."""
        stages = range(len(need.plan.stages))
        keys = tuple(self._outfitter.key(need.plan, stage) for stage in stages)
        self.tell(control.OwnersNeeded(need=need, keys=keys))

    # What the machine wants

    def _do(self, action: control.ControlAction) -> None:
        match action:
            case control.Solve():
                self._spawn(self._solve(action), "planning")
            case control.Compile(device=device, plan=plan, stage=stage):
                if not self.has(device, self._outfitter.key(plan, stage)):
                    self._post(device, plan, stage)
            case control.AskChange(reason=reason):
                self._ask(ev.ChangeAsked(reason=reason))
            case control.AskHolders(holders=holders):
                self._ask(ev.HoldersAsked(holders=holders))
            case control.AskInterval(steps=steps):
                self._ask(ev.IntervalAsked(steps=steps))
            case control.Answer(epoch=epoch, choice=choice):
                self._ask(ev.OwnersChosen(epoch=epoch, choice=choice))

    async def _solve(self, action: control.Solve) -> None:
        standing = self.state.plan
        assert standing is not None, "plans are asked for once one runs"
        loop = asyncio.get_running_loop()
        thread = None if action.urgent else self._ahead
        try:
            made = await loop.run_in_executor(thread, self._planner, action.devices, standing)
        except CrowdMeshError as exc:
            self._no_plan(action, exc.message)
            return
        except Exception as exc:  # a solver of the user's own: the run can do without this plan
            logger.exception("planning for %s failed", ", ".join(action.devices))
            self._no_plan(action, f"{type(exc).__name__}: {exc}")
            return
        self._outfitter.learn(made.plan, made.bundles)
        stages = range(len(made.plan.stages))
        self.tell(
            control.PlanSolved(
                devices=action.devices,
                plan=made.plan,
                keys=tuple(self._outfitter.key(made.plan, stage) for stage in stages),
                step_s=made.step_s,
                standing_step_s=made.standing_step_s,
                move_s=made.move_s,
            )
        )

    def _no_plan(self, action: control.Solve, reason: str) -> None:
        self.tell(control.PlanSolved(devices=action.devices, plan=None, reason=reason))


def _lower_priority() -> None:
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY)
