"""What all policies share: ranges of a plan, the interval rule, limits. One cache and one tuning
budget for ours and the rivals, so that they differ by their rules only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ...core import DeviceId, Keep, Replica, ReplicaPlan, ReplicaRange
from ...solvers.units import format_bytes
from ..budget import copy_bytes, rooms
from ..interval import Interval, interval_steps, loss_rate_per_s
from ..policy import PolicyView
from ..prospects import Outlook
from ..seats import Unprotected


@dataclass(frozen=True, slots=True)
class Wanted:
    """A copy that a rule asks for, before limits."""

    device: str
    every: Callable[[int], int]
    """Tuned interval -> the interval of this copy."""
    why: str


def learned_loss_per_s(view: PolicyView) -> float:
    """Losses per second of all stage owners, from heartbeats alone."""
    outlook = Outlook(view=view)
    return loss_rate_per_s(outlook.loss_rate_per_s(d) for d in sorted(view.plan.all_devices))


def tuned_interval(
    view: PolicyView, hops: Iterable[tuple[str, str, int]], loss_per_s: float, *, scale: float = 1.0
) -> Interval:
    """The interval rule on the copies that one wave sends.

    Args:
        hops: (owner, holder, bytes of one version) of each copy.
        scale: Times the optimum: what tuning may change, for every policy alike.
    """
    costs, outlook = view.costs, Outlook(view=view)
    sends, slowest_s = [], 0.0
    for owner, holder, size in hops:
        changed = math.ceil(size * costs.changed_share)
        sends.append(changed)
        rate = outlook.rate_bytes_per_s(owner, holder)
        if rate > 0:
            slowest_s = max(slowest_s, changed / rate)
    total_s = sum(sends) / view.budget.bulk_bytes_per_s
    wave_s = max(slowest_s, total_s)
    return interval_steps(
        (costs.snapshot_s + costs.slowdown * wave_s) * scale**2,
        loss_per_s,
        costs.step_s,
        replay_share=costs.replay_share,
        wave_s=wave_s,
    )


def by_rule(
    view: PolicyView,
    name: str,
    rule: Callable[[int], Sequence[Wanted]],
    *,
    scale: float = 1.0,
) -> tuple[ReplicaPlan, tuple[Unprotected, ...], tuple[str, ...]]:
    """The plan of a policy that names holders by a rule, cut to what fits.

    Limits are kept in layer order: memory before disk, then the bytes of a wave. The owner itself
    and absent devices are passed over.

    Args:
        rule: Stage index -> its wanted copies, in order of preference.
    """
    plan, profile, budget = view.plan, view.profile, view.budget
    left = rooms(plan, profile, view.crowd, budget)
    free = {
        (device, keep): size
        for device, room in left.items()
        for keep, size in (("memory", room.memory_bytes), ("disk", room.disk_bytes))
    }
    wave_left = math.inf if budget.wave_bytes is None else budget.wave_bytes
    chosen: list[list[tuple[Wanted, Keep]]] = []
    unprotected: list[Unprotected] = []
    notes: list[str] = []
    hops: list[tuple[str, str, int]] = []
    for index, stage in enumerate(plan.stages):
        size = copy_bytes(profile, stage.first_layer, stage.last_layer)
        held, sends = size * budget.held_versions, math.ceil(size * view.costs.changed_share)
        taken: list[tuple[Wanted, Keep]] = []
        reasons: list[str] = []
        wanted = rule(index)
        for want in wanted:
            if want.device in stage.devices or want.device in [w.device for w, _ in taken]:
                continue
            if not view.is_present(want.device):
                reasons.append(f"{want.device} is not there")
                continue
            fits: list[Keep] = [k for k in ("memory", "disk") if free[want.device, k] >= held]
            if not fits:
                reasons.append(f"{want.device} has no room for {format_bytes(held)}")
            elif sends > wave_left:
                reasons.append(f"a wave may not send {format_bytes(sends)} more")
            else:
                free[want.device, fits[0]] -= held
                wave_left -= sends
                taken.append((want, fits[0]))
                hops.append((stage.device, want.device, size))
        chosen.append(taken)
        if wanted and not taken and len(stage.devices) == 1:
            unprotected.append(
                Unprotected(
                    owner=stage.device,
                    first_layer=stage.first_layer,
                    last_layer=stage.last_layer,
                    lack="memory" if reasons else "nobody",
                    detail="; ".join(reasons) or "the rule names no other device for it",
                )
            )
        elif reasons:
            notes.append(f"stage {index} ({stage.device}): {'; '.join(reasons)}")
    interval = tuned_interval(view, hops, learned_loss_per_s(view), scale=scale)
    made = ReplicaPlan(
        ranges=tuple(
            ReplicaRange(
                owner=stage.device,
                first_layer=stage.first_layer,
                last_layer=stage.last_layer,
                replicas=tuple(
                    Replica(
                        device=DeviceId(want.device),
                        interval_steps=max(1, want.every(interval.steps)),
                        keep=keep,
                        why=want.why,
                    )
                    for want, keep in taken
                ),
            )
            for stage, taken in zip(plan.stages, chosen, strict=True)
        ),
        num_layers=plan.num_layers,
        policy=name,
    )
    return made, tuple(unprotected), tuple(notes)
