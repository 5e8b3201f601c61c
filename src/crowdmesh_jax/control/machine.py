"""The policy machine: from what is known of a run to what is made ready, asked for and answered.

Running        idle devices compile the stages that they would take; plans for losses, single and
               double, that they could not take are solved ahead
OwnersNeeded   an idle device that holds the copy and the programs; else a plan made ahead; else
               one is solved now
Joined         after a while: members by an epoch without a loss, if there is something for them
Departing      its stage goes to an idle device before it leaves, rather one that has a copy
MovesWanted    stages go where the replication policy says, at one stop, once all have the programs
TransferFailed copies go to another holder
CompileFailed  the device may be asked again
LinkMeasured   hand-overs over that link begin as early as they need to
PlanSolved     taken at the next standstill if it saves more than the change costs
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..core.plan import PipelinePlan
from ..propagation.interval import interval_steps
from ..protocol import OwnersChoice, OwnersNeed, choose_owners
from ..protocol.owners import DeviceFacts
from . import events as ev
from .ahead import compile_for_idle, losses_ahead, plan_ahead
from .holding import (
    drop_beyond,
    forget,
    holders_for,
    on_copy_gone,
    on_copy_stored,
    on_transfer_failed,
)
from .leaving import (
    announced,
    forget_old,
    hand_over_when_due,
    leaving,
    not_leaving,
    on_departing,
    on_moves_wanted,
    settled,
)
from .moving import on_link_measured
from .state import KEPT_PLANS, ControlState
from .turn import Turn, stage_name

KEPT_COSTS = 5
WINDOW = 64
LEAST_USUAL = 8
"""Steps without a wave before anything is learned of one."""
Result = tuple[ControlState, tuple[ev.ControlAction, ...]]


def handle(state: ControlState, event: ev.ControlEvent, now_s: float) -> Result:
    """What `event` makes the policy want. Equal states and events, equal wishes.

    Args:
        now_s: Seconds of the body's clock, which never goes back.
    """
    turn = Turn(state, now_s)
    _HANDLERS[type(event)](turn, event)
    return turn.state, tuple(turn.actions)


# Who is here ------------------------------------------------------------------------------------


def _on_joined(turn: Turn, event: ev.Joined) -> None:
    state = turn.state = forget(turn.state, event.device)
    gone = {name: keys for name, keys in state.ready.items() if name != event.device}
    asked = {name: keys for name, keys in state.asked.items() if name != event.device}
    present = tuple(sorted({*state.present, event.device}))
    turn.set(present=present, ready=gone, asked=asked)
    not_leaving(turn, event.device)
    if state.plan is not None:
        turn.set(joined_s=turn.now_s, is_disturbed=True)


def _on_lost(turn: Turn, event: ev.Lost) -> None:
    state = turn.state = forget(turn.state, event.device)
    if state.plan is not None and state.plan.stage_of(event.device) is not None:
        turn.set(is_disturbed=True)
    turn.set(
        present=tuple(device for device in state.present if device != event.device),
        ready={name: keys for name, keys in state.ready.items() if name != event.device},
        asked={name: keys for name, keys in state.asked.items() if name != event.device},
    )
    not_leaving(turn, event.device)


def _on_tick(turn: Turn, event: ev.Tick) -> None:
    forget_old(turn)
    hand_over_when_due(turn)
    if turn.state.is_running and not turn.state.solving:
        plan_ahead(turn)
    state = turn.state
    if state.joined_s is None or turn.now_s - state.joined_s < state.terms.settle_s:
        return
    if not state.is_running:
        return
    turn.set(joined_s=None)
    newcomers = [device for device in state.present if device not in state.party]
    if newcomers:
        turn.do(ev.AskChange(reason=f"{', '.join(newcomers)} joined"))


# An epoch runs ----------------------------------------------------------------------------------


def _on_running(turn: Turn, event: ev.Running) -> None:
    turn.set(
        plan=event.plan,
        epoch=event.epoch,
        party=event.party,
        holders=event.holders,
        keys=event.keys,
        present=tuple(sorted({*turn.state.present, *event.party})),
        is_running=True,
        step=event.step,
        steps=event.steps,
        link_bytes_per_s=event.link_bytes_per_s,
        need=None,
        wish=None,
        wish_reason="",
        stages_wanted=turn.state.stages_wanted or len(event.plan.devices),
        began_s=turn.now_s,
    )
    settled(turn)
    turn.set(ahead=losses_ahead(turn.state))
    drop_beyond(turn, event.step)
    compile_for_idle(turn)


def _on_step(turn: Turn, event: ev.StepCommitted) -> None:
    state = turn.state
    turn.set(step=event.step + 1)
    if event.step_s is None:
        return
    if event.in_wave:
        turn.set(wave_steps_s=(*state.wave_steps_s, event.step_s))
    else:
        turn.set(usual_s=(*state.usual_s, event.step_s)[-WINDOW:])


def _on_holders_wanted(turn: Turn, event: ev.HoldersWanted) -> None:
    state = turn.state
    if state.is_running and event.holders != state.holders:
        turn.set(holders=event.holders)
        turn.do(ev.AskHolders(holders=event.holders))
        compile_for_idle(turn)


def _on_wave_kept(turn: Turn, event: ev.WaveKept) -> None:
    """What the wave cost is what its steps took beyond the usual; from that and the hazard follows
    how often it is worth it (Young and Daly, see `propagation.interval`)."""
    state = turn.state
    terms, steps_s = state.terms, state.wave_steps_s
    turn.set(wave_steps_s=())
    if not terms.learn_interval or len(state.usual_s) < LEAST_USUAL or not steps_s:
        return
    usual_s = statistics.median(state.usual_s)
    cost_s = max(0.0, math.fsum(steps_s) - len(steps_s) * usual_s)
    costs = (*state.wave_costs_s, cost_s)[-KEPT_COSTS:]
    turn.set(wave_costs_s=costs)
    cost_s = statistics.median(costs)
    if usual_s <= 0:
        return
    least = math.ceil(cost_s / (terms.most_overhead * usual_s))
    best = interval_steps(
        cost_s,
        terms.loss_per_s,
        usual_s,
        least=min(max(1, least), terms.most_steps),
        most=terms.most_steps,
    )
    why = (
        f"a wave costs {1e3 * cost_s:.0f} ms, a step takes {1e3 * usual_s:.0f} ms,"
        f" {terms.loss_per_s:.2g} losses a second: {best.bound_by}"
    )
    turn.do(ev.AskInterval(steps=best.steps, why=why))


def _on_compiled(turn: Turn, event: ev.ProgramCompiled) -> None:
    state = turn.state
    keys = tuple(sorted({*state.ready.get(event.device, ()), event.key}))
    turn.set(ready={**state.ready, event.device: keys})
    _change_when_it_pays(turn)


def _on_compile_failed(turn: Turn, event: ev.CompileFailed) -> None:
    """Forgets that it was asked: the next epoch, or other holders, ask it again. Not at once: what
    failed now (no room on its disk, say) would fail again."""
    state = turn.state
    known = [(state.plan, state.keys), *((made.plan, made.keys) for made in state.solved)]
    names = {
        stage_name(plan, index)
        for plan, keys in known
        if plan is not None
        for index, key in enumerate(keys)
        if key == event.key
    }
    asked = tuple(name for name in state.asked.get(event.device, ()) if name not in names)
    turn.set(asked={**state.asked, event.device: asked})


# Plans that were made ---------------------------------------------------------------------------


def _on_solved(turn: Turn, event: ev.PlanSolved) -> None:
    state = turn.state
    turn.set(
        solving=tuple(devices for devices in state.solving if devices != event.devices),
        solved=(*state.solved, event)[-KEPT_PLANS:],
    )
    if state.need is not None and set(state.need.devices) == set(event.devices):
        _answer_with(turn, state.need, event)
    elif event.plan is not None:
        for index, stage in enumerate(event.plan.stages):
            turn.compile(stage.device, event.plan, index)
        _change_when_it_pays(turn)


def _change_when_it_pays(turn: Turn) -> None:
    """A better plan for exactly those who are here, compiled by all of its devices."""
    state = turn.state
    terms, plan = state.terms, state.plan
    if not (terms.replan and state.is_running) or state.wish is not None or plan is None:
        return
    made = state.plan_for(state.candidates()) if state.is_disturbed else None
    if made is None or made.plan is None or made.plan == plan:
        return
    is_ready = all(
        key in state.ready.get(stage.device, ())
        for key, stage in zip(made.keys, made.plan.stages, strict=True)
    )
    gain_s = (made.standing_step_s - made.step_s) * (state.steps - state.step)
    cost_s = terms.pause_s + made.move_s
    if not is_ready or not math.isfinite(gain_s) or gain_s <= terms.worth * cost_s:
        return
    reason = (
        f"another plan saves {gain_s:.1f} s until the end ({1e3 * made.step_s:.0f} instead of"
        f" {1e3 * made.standing_step_s:.0f} ms a step, predicted) and costs {cost_s:.1f} s"
    )
    turn.set(wish=made.plan, wish_reason=reason)
    turn.do(ev.AskChange(reason=reason))


# Who takes over ---------------------------------------------------------------------------------


def _on_need(turn: Turn, event: ev.OwnersNeeded) -> None:
    state = turn.state
    need = event.need
    turn.set(is_running=False)
    if need.is_still and state.wish is not None:
        devices, new = set(state.wish.devices), set(state.wish.devices) - set(need.plan.devices)
        if devices <= set(need.devices) and not new & announced(turn):
            _answer(turn, need, state.wish, state.wish_reason)
            return
    facts = {
        str(device): DeviceFacts(compiled=_compiled(state, need.plan, event.keys, device))
        for device in need.devices
    }
    going = leaving(turn)
    staying = replace(need, devices=tuple(d for d in need.devices if d not in going))
    choice = choose_owners(staying, facts=facts)
    among = staying
    if choice.plan is None and going:
        choice, among = choose_owners(need, facts=facts), need
    if choice.plan is not None:
        choice = replace(choice, holders=holders_for(state, choice.plan, among.devices))
    if choice.plan is not None or not need.devices:
        turn.do(ev.Answer(epoch=need.epoch, choice=choice))
        return
    turn.set(need=need)
    devices = tuple(str(device) for device in need.devices)
    made = state.plan_for(devices)
    if made is not None:
        _answer_with(turn, need, made)
    else:
        turn.solve(devices, urgent=True)


def _compiled(
    state: ControlState, plan: PipelinePlan, keys: tuple[str, ...], device: str
) -> tuple[tuple[int, int], ...]:
    ready = state.ready.get(device, ())
    return tuple(
        (stage.first_layer, stage.last_layer)
        for stage, key in zip(plan.stages, keys, strict=True)
        if key in ready
    )


def _answer_with(turn: Turn, need: OwnersNeed, made: ev.PlanSolved) -> None:
    if made.plan is None:
        reason = f"no idle device can take what was lost, and no other plan fits: {made.reason}"
        turn.do(ev.Answer(epoch=need.epoch, choice=OwnersChoice(plan=None, reason=reason)))
        return
    stages = ", ".join(f"{s.device}: {s.first_layer}-{s.last_layer}" for s in made.plan.stages)
    _answer(turn, need, made.plan, f"no idle device is left; layers are cut anew ({stages})")


def _answer(turn: Turn, need: OwnersNeed, plan: PipelinePlan, reason: str) -> None:
    # Who leaves is idle once its stage has moved, and would be the first to be given copies.
    going = leaving(turn)
    staying = tuple(device for device in need.devices if device not in going)
    holders = holders_for(turn.state, plan, staying)
    choice = OwnersChoice(plan=plan, holders=holders, reason=reason)
    turn.set(need=None)
    turn.do(ev.Answer(epoch=need.epoch, choice=choice))


_HANDLERS: dict[type, Callable[[Turn, Any], None]] = {
    ev.Joined: _on_joined,
    ev.Lost: _on_lost,
    ev.Departing: on_departing,
    ev.MovesWanted: on_moves_wanted,
    ev.Running: _on_running,
    ev.StepCommitted: _on_step,
    ev.ProgramCompiled: _on_compiled,
    ev.CompileFailed: _on_compile_failed,
    ev.PlanSolved: _on_solved,
    ev.OwnersNeeded: _on_need,
    ev.WaveKept: _on_wave_kept,
    ev.HoldersWanted: _on_holders_wanted,
    ev.CopyStored: on_copy_stored,
    ev.CopyGone: on_copy_gone,
    ev.LinkMeasured: on_link_measured,
    ev.TransferFailed: on_transfer_failed,
    ev.Tick: _on_tick,
}
