"""Planned moves of one or several stages, and who takes over: the chain rule applied to a view."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...core import DeviceId, Stage
from ..budget import copy_bytes, hosted_bytes, stage_need
from ..foresight import (
    Ahead,
    ChainChoice,
    ChainRule,
    Rows,
    best_chain,
    rate_of,
    rows_of,
    step_share,
)
from ..handover import SOON_S, Handover
from ..policy import PolicyView
from ..report import Holding

KEEPS = 0.03
"""Moves under way are left for others only where g is lower by more than this."""


SAFE = 0.02
"""Chance that a link ends before the next look at which nothing else is looked at."""


def is_safe(view: PolicyView, rule: ChainRule) -> bool:
    """Whether no link of the pipeline is about to end: then moves can wait for the next decision,
    which looks for better places too."""
    ahead = Ahead.of(view, rule, view.plan.devices)
    if ahead is None:
        return True
    owners = rows_of(ahead, view.plan.devices)
    lead_s = rule.look_s + whole_copy_s(view)
    return min(owners) >= 0 and ahead.lasts_until(owners, lead_s) >= 1 - SAFE


def planned_moves(
    view: PolicyView, rule: ChainRule, interval_s: float, ahead: Ahead | None = None
) -> tuple[Handover, ...]:
    """The hand-overs of all stages that should move at the next stop; () where none should.

    Args:
        interval_s: Seconds of training between waves.
        ahead: What is expected of the view, if that was worked out before.
    """
    ahead = ahead or Ahead.of(view, rule)
    owners = () if ahead is None else rows_of(ahead, view.plan.devices)
    if ahead is None or min(owners) < 0 or any(s.shares for s in view.plan.stages):
        return ()
    needs_s, ahead_s = _transfers(view, ahead, owners)
    costs, microbatches = view.costs, view.plan.microbatches

    planned_s = rule.stop_s + _worst(needs_s)
    more_s = max(0.0, _loss_s(view, rule) + costs.replay_share * interval_s / 2 - planned_s)

    def best(allowed_s: np.ndarray) -> ChainChoice | None:
        while True:
            found = best_chain(
                ahead, rule, microbatches=microbatches, owners=owners, needs_s=allowed_s,
                ahead_s=ahead_s, slowdown=costs.slowdown, loss_s=more_s,
            )  # fmt: skip
            full = [] if found is None else _without_room(view, ahead, owners, found.chain)
            if not full:
                return found
            allowed_s = allowed_s.copy()
            for stage, row in full:
                allowed_s[stage, row] = math.inf

    choice = best(needs_s)
    if choice is None:
        return ()
    under_way = _under_way(view, ahead, owners)
    if under_way is not None and under_way != choice.chain:
        again = best(_only(needs_s, under_way))
        if again is not None and again.chain == under_way and again.g <= choice.g + KEEPS:
            choice = again
    chain, best_g, early_s = choice.chain, choice.g, choice.ahead_s
    lead_s = rule.look_s + early_s
    stays = step_share(ahead, owners, microbatches)
    danger = float(
        rate_of(ahead.lasts(np.array([owners])), 0.0, np.array([lead_s]), more_s, rule.missed)[0]
    )
    if stays * (1 + danger) <= best_g + rule.gain:
        return ()
    leaves_s = ahead.breaks_s(owners)
    return tuple(
        Handover(
            owner=stage.device,
            target=DeviceId(ahead.ids[row]),
            first_layer=stage.first_layer,
            last_layer=stage.last_layer,
            lead_s=lead_s,
            leaves_s=leaves_s,
            why=f"a second of work takes {best_g:.2f} there, {stays * (1 + danger):.2f} here",
        )
        for stage, row, now in zip(view.plan.stages, chain, owners, strict=True)
        if row != now
    )


def successors(view: PolicyView, rule: ChainRule, lost: Sequence[int]) -> tuple[str, ...] | None:
    """Who should go on after a loss; None where no chain is in range.

    Args:
        lost: Stages whose state has to come from a copy, if another device takes them.
    """
    ahead = Ahead.of(view, rule)
    if ahead is None:
        return None
    owners = rows_of(ahead, view.plan.devices)
    needs_s, ahead_s = _transfers(view, ahead, owners)
    needs_s = needs_s + ahead_s * (1 - view.costs.changed_share)  # nothing can go ahead now
    for index, stage in enumerate(view.plan.stages):
        if index not in lost:
            continue
        held = [h for h in view.holdings if holds(h, stage)]
        newest = max((h.version for h in held), default=-1)
        old = {h.device for h in held}
        fresh = {h.device for h in held if h.version == newest}
        sources = {row: name for row, name in enumerate(ahead.ids) if name in fresh}
        size = copy_bytes(view.profile, stage.first_layer, stage.last_layer)
        for row, name in enumerate(ahead.ids):
            if row == owners[index]:
                continue
            part = view.costs.changed_share if name in old else 1.0
            known = sources or {owners[index]: stage.device}
            rates = {at: link_bytes_per_s(view, s, name) for at, s in known.items() if at != row}
            near = [rates[at] for at in rates if at in sources and ahead.near[row, at]]
            rate = max(near, default=0.0) or rule.far_share * max(rates.values(), default=0.0)
            lacks = 0.0 if name in fresh else part * size
            needs_s[index, row] = lacks / rate if rate > 0 else (math.inf if lacks else 0.0)
    costs = view.costs
    choice = best_chain(
        ahead, replace(rule, stage_s=rule.recovery_stage_s),
        microbatches=view.plan.microbatches, owners=owners, needs_s=needs_s,
        ahead_s=np.zeros_like(needs_s), slowdown=costs.slowdown,
        loss_s=_loss_s(view, rule),
    )  # fmt: skip
    return None if choice is None else tuple(ahead.ids[row] for row in choice.chain)


def whole_copy_s(view: PolicyView) -> float:
    """Seconds that the largest stage takes to where its owner has the fastest link; 0: none has."""
    slowest_s = 0.0
    for stage in view.plan.stages:
        others = (name for name in view.ids if name != stage.device)
        rate = max((link_bytes_per_s(view, stage.device, name) for name in others), default=0.0)
        if rate > 0:
            size = copy_bytes(view.profile, stage.first_layer, stage.last_layer)
            slowest_s = max(slowest_s, size / rate)
    return slowest_s


def _loss_s(view: PolicyView, rule: ChainRule) -> float:
    """What a loss costs without steps that are done again."""
    costs = view.costs
    return costs.detect_s + costs.recovery_s + rule.fetch_share * whole_copy_s(view)


def holds(holding: Holding, stage: Stage) -> bool:
    """Whether it is of all the stage's layers."""
    return holding.first_layer <= stage.first_layer and stage.last_layer <= holding.last_layer


def _worst(needs_s: np.ndarray) -> float:
    return float(needs_s[np.isfinite(needs_s)].max(initial=0.0))


def link_bytes_per_s(view: PolicyView, source: str, target: str) -> float:
    """Bytes per second; 0 where they cannot talk."""
    link = view.crowd.link(source, target)
    return 0.0 if link is None else link.bandwidth_bytes_per_s


def _transfers(view: PolicyView, ahead: Ahead, owners: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of transfer in the stop, and ahead of it; infinite for those that cannot."""
    stages, count = len(view.plan.stages), len(ahead.ids)
    needs_s, ahead_s = np.full((stages, count), np.inf), np.zeros((stages, count))
    leaving = {d.device for d in view.departures if d.leaves_s <= SOON_S}
    for index, stage in enumerate(view.plan.stages):
        size = copy_bytes(view.profile, stage.first_layer, stage.last_layer)
        has = {h.device for h in view.holdings if holds(h, stage)}
        for row, name in enumerate(ahead.ids):
            if row == owners[index]:
                needs_s[index, row] = 0.0
                continue
            if name in leaving or (owners[index] >= 0 and not ahead.near[owners[index], row]):
                continue
            rate = link_bytes_per_s(view, stage.device, name)
            if not rate > 0:
                continue
            needs_s[index, row] = view.costs.changed_share * size / rate
            if name not in has:
                ahead_s[index, row] = size / rate
    return needs_s, ahead_s


def _without_room(
    view: PolicyView, ahead: Ahead, owners: Rows, chain: Rows
) -> list[tuple[int, int]]:
    """Those of a chain that have no memory for their new stage and the copies that they host."""
    found = []
    for index, (row, now) in enumerate(zip(chain, owners, strict=True)):
        if row == now:
            continue
        name = ahead.ids[row]
        hosted = (
            0
            if view.standing is None
            else hosted_bytes(view.standing, view.profile, name, versions=view.budget.held_versions)
        )
        need = stage_need(
            view.profile, view.plan, index, hosted_bytes=hosted,
            snapshots=view.budget.snapshots, log_steps=view.budget.log_steps,
        ).total_bytes  # fmt: skip
        if need > view.crowd.device(name).memory_bytes:
            found.append((index, row))
    return found


def _under_way(view: PolicyView, ahead: Ahead, owners: Rows) -> Rows | None:
    if not view.handovers:
        return None
    targets = {h.owner: h.target for h in view.handovers}
    chain = rows_of(ahead, tuple(targets.get(d, d) for d in view.plan.devices))
    return chain if chain != owners and min(chain) >= 0 else None


def _only(needs_s: np.ndarray, chain: Rows) -> np.ndarray:
    """Nobody but that chain's devices may have the stages."""
    only = np.full_like(needs_s, np.inf)
    for stage, row in enumerate(chain):
        only[stage, row] = needs_s[stage, row]
    return only
