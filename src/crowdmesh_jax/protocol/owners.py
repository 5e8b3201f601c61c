"""Who takes what was lost: the question that a decision asks, the answer, and the default policy.

A policy may know more (link lifetimes, plans made ahead); a decision takes any answer that keeps
live stages where they are, or a plan with other cuts, which then means a rollback.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ..core.crowd import DeviceId
from ..core.plan import PipelinePlan, Stage
from .evidence import LayerHolders


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnersNeed:
    """Stages without a live owner, and who is there."""

    epoch: int
    plan: PipelinePlan
    """The standing plan, with its lost owners still in it."""
    lost_stages: tuple[int, ...]
    devices: tuple[DeviceId, ...]
    """Fenced and heard, in a fixed order."""
    copies_of: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Device -> lost stages of which it holds a copy that would be used."""
    is_still: bool = False
    """All stages are live, at the version where the epoch starts: any plan may follow, with other
    owners and other cuts, and no work is lost."""
    cannot_hear: tuple[tuple[DeviceId, DeviceId], ...] = ()
    """(listener, speaker): links to leave out of the plan; the same plan again is a livelock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnersChoice:
    """The new plan and holders. No plan: nobody can take what was lost."""

    plan: PipelinePlan | None
    holders: tuple[LayerHolders, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """What a policy knows of a device."""

    memory_bytes: float = float("inf")
    """Left for a stage."""
    compiled: tuple[tuple[int, int], ...] = ()
    """(first layer, last layer) of the stages whose programs it has ready."""


def choose_owners(
    need: OwnersNeed,
    *,
    facts: Mapping[str, DeviceFacts] | None = None,
    stage_bytes: Sequence[float] = (),
    copies: int = 1,
    room: CopyRoom | None = None,
    hazards: Hazards | None = None,
) -> OwnersChoice:
    """Keeps all cuts; gives each lost stage to the best idle device, in this order: one that holds
    the copy and has the program compiled, one that holds the copy, one that has the program, any.

    Args:
        facts: Per device; without: memory for everything, nothing compiled.
        stage_bytes: Per stage of the plan, what it needs; (): nothing.
        copies: Holders per stage, besides its owner.
        room: For copies; None: everywhere enough.
        hazards: What takes several devices; None: nothing does.

    Returns:
        A choice without a plan where an idle device is missing. Survivors take no second stage
        here: that needs other cuts, which the planner makes.
    """
    facts = facts or {}
    stages = list(need.plan.stages)
    lost = set(need.lost_stages)
    busy = {stage.device for index, stage in enumerate(stages) if index not in lost}
    idle = [device for device in need.devices if device not in busy]
    cut_links = {frozenset(pair) for pair in need.cannot_hear}
    words = []
    # The stage that needs most memory chooses first, as it has the fewest devices to choose from.
    order = sorted(lost, key=lambda i: (-(stage_bytes[i] if stage_bytes else 0.0), i))
    for index in order:
        stage = stages[index]
        needs = stage_bytes[index] if stage_bytes else 0.0
        fitting = [d for d in idle if facts.get(d, DeviceFacts()).memory_bytes >= needs]
        fitting = [d for d in fitting if not _is_cut_off(stages, lost, index, d, cut_links)]
        if not fitting:
            name = f"stage {index} (layers {stage.first_layer}-{stage.last_layer})"
            return OwnersChoice(
                plan=None,
                reason=(
                    f"no idle device can take {name}: {len(idle)} idle, none with {needs:g} bytes"
                    " free and links to its neighbours"
                ),
            )
        span = (stage.first_layer, stage.last_layer)

        def rank(device: str, index: int = index, span: tuple[int, int] = span) -> tuple[int, int]:
            holds = index in need.copies_of.get(device, ())
            compiled = span in facts.get(device, DeviceFacts()).compiled
            return -2 * holds - compiled, need.devices.index(DeviceId(device))

        chosen = min(fitting, key=rank)
        idle.remove(chosen)
        lost.discard(index)
        why = "it holds a copy" if index in need.copies_of.get(chosen, ()) else "it is idle"
        words.append(f"{chosen} takes stage {index} ({why})")
        stages[index] = Stage(
            device=chosen,
            first_layer=stage.first_layer,
            last_layer=stage.last_layer,
            recompute=stage.recompute,
            warmup=stage.warmup,
        )
    plan = PipelinePlan(
        stages=tuple(stages),
        num_layers=need.plan.num_layers,
        microbatches=need.plan.microbatches,
        schedule=need.plan.schedule,
    )
    holders = ring_holders(plan, need.devices, copies=copies, room=room, hazards=hazards)
    return OwnersChoice(plan=plan, holders=holders, reason="; ".join(words))


def _is_cut_off(
    stages: list[Stage],
    lost: set[int],
    index: int,
    device: str,
    cut_links: set[frozenset[DeviceId]],
) -> bool:
    """Whether a neighbour of stage `index` cannot hear `device`, or the other way round."""
    beside = (i for i in (index - 1, index + 1) if 0 <= i < len(stages) and i not in lost)
    return any(frozenset((stages[i].device, DeviceId(device))) in cut_links for i in beside)


HELD_VERSIONS = 2
"""Of a copy, at once: the durable one, and that of the open wave (R14)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyRoom:
    """What copies take, and what devices keep for them."""

    layer_bytes: tuple[int, ...]
    """State of each layer: parameters, optimizer, statistics."""
    device_bytes: Mapping[str, float]
    """Not named: no limit."""

    def needs(self, stage: Stage) -> int:
        """What a holder of the stage's copies must have room for."""
        return HELD_VERSIONS * self.state_bytes(stage)

    def state_bytes(self, stage: Stage) -> int:
        """Of one version."""
        return sum(self.layer_bytes[layer] for layer in stage.layers)


Hazards = Mapping[str, Collection[str]]
"""Device -> names of what takes it and others at once (a vehicle, a power strip). Not named: it
fails alone."""


def ring_holders(
    plan: PipelinePlan,
    devices: Sequence[DeviceId],
    *,
    copies: int,
    room: CopyRoom | None = None,
    hazards: Hazards | None = None,
) -> tuple[LayerHolders, ...]:
    """For each stage the next `copies` of `devices` after its owner: idle ones first, then the ring
    of owners, so that the copies of neighbours lie on different devices. Who has no room is passed
    over; a stage may have no holder at all.

    No two copies, the owner's among them, are behind one hazard while others have room. What is
    missing then is filled with who shares a hazard with another holder, and at the very last with
    who shares the owner's: against the failure of one device alone such a copy helps, too.
    """
    owners = list(plan.devices)
    idle = [device for device in devices if device not in owners]
    left = dict(room.device_bytes) if room is not None else {}
    behind = {device: frozenset(names) for device, names in (hazards or {}).items()}
    chosen: list[list[DeviceId]] = [[] for _ in plan.stages]

    def are_apart(one: str, other: str) -> bool:
        return not behind.get(one, frozenset()) & behind.get(other, frozenset())

    def fill(fits: Callable[[str, Sequence[str], str], bool]) -> None:
        for index, (stage, kept) in enumerate(zip(plan.stages, chosen, strict=True)):
            turned = idle[index % len(idle) :] + idle[: index % len(idle)] if idle else []
            needed = room.needs(stage) if room is not None else 0
            ring = (owner for owner in owners[index + 1 :] + owners[:index] if owner in devices)
            for device in [*turned, *ring]:
                has_room = left.get(device, float("inf")) >= needed
                if len(kept) == copies or device in kept or not has_room:
                    continue
                if fits(stage.device, kept, device):
                    kept.append(device)
                    left[device] = left.get(device, float("inf")) - needed

    fill(lambda owner, kept, device: all(are_apart(device, other) for other in (owner, *kept)))
    if behind:
        fill(lambda owner, kept, device: are_apart(device, owner))
        fill(lambda owner, kept, device: True)
    return tuple(
        LayerHolders(
            first_layer=stage.first_layer, last_layer=stage.last_layer, devices=tuple(kept)
        )
        for stage, kept in zip(plan.stages, chosen, strict=True)
    )
