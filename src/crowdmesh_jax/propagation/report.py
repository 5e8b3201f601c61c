"""The replica report: who holds which layer at which version, how stale, at what cost, and what
would be lost if a device went now.

A pure function of what is known. It judges no validity: it is given copies that are valid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..core import DeviceId, Keep, PipelinePlan, to_json
from ..errors import InvalidValueError
from ..solvers.units import format_bytes
from .groups import HazardGroups


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """A complete, valid copy that lies somewhere now."""

    device: DeviceId
    """The holder; an owner too, with its own snapshot."""
    first_layer: int
    last_layer: int
    version: int
    age_s: float
    """Since its owner was at that version."""
    size_bytes: int
    keep: Keep = "memory"

    def __post_init__(self) -> None:
        who = f"holding at {self.device!r}"
        if not 0 <= self.first_layer <= self.last_layer:
            raise InvalidValueError(f"{who}: layers {self.first_layer}-{self.last_layer}")
        for name in ("version", "age_s", "size_bytes"):
            if not getattr(self, name) >= 0:
                raise InvalidValueError(f"{who}: {name} must be >= 0, got {getattr(self, name)}")

    def has(self, layer: int) -> bool:
        return self.first_layer <= layer <= self.last_layer


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldCopy:
    """One copy of one layer."""

    device: DeviceId
    version: int
    behind_steps: int
    age_s: float
    keep: Keep


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """Adjacent layers of one owner with the same copies."""

    first_layer: int
    last_layer: int
    owner: DeviceId
    copies: tuple[HeldCopy, ...]
    """At others than the owner, newest first."""
    shared_hazards: tuple[str, ...]
    """Hazards that take the owner and every one of the copies; () where a copy is apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IfLost:
    """What the loss of those devices, now, would cost."""

    cause: str
    """"device pi-3", "cell A"."""
    devices: tuple[DeviceId, ...]
    owned: tuple[tuple[int, int], ...]
    """Ranges of layers that would have to be restored."""
    outcome: str
    """"nothing": only copies go. "replay": the lost layers are recomputed from `version`, nobody
    else goes back. "rollback": all go back to `version`. "checkpoint": no common version is left
    among the devices."""
    version: int | None
    redone_steps: int | None
    """Steps to replay or to redo; None where the checkpoint's version is not known."""
    bare: tuple[tuple[int, int], ...]
    """Ranges whose last copy would be gone."""
    last_copies: tuple[tuple[int, int], ...]
    """Ranges that would go on, but without any second copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    head_version: int
    durable_version: int | None
    """Newest version of which every layer has a copy at another device than its owner."""
    rows: tuple[LayerRow, ...]
    held_bytes: Mapping[str, int]
    """Holder -> bytes of copies, own snapshots included."""
    sent_bytes: int
    """Spent on copies so far."""
    budget_bytes: int | None
    if_lost: tuple[IfLost, ...]
    common_hazards: tuple[str, ...] = ()
    """Hazards that take the whole crowd; no placement escapes them."""

    def to_json(self) -> str:
        """JSON text."""
        return to_json(self)

    def text(self) -> str:
        """Lines for people."""
        lines = [
            f"replicas at version {self.head_version}: "
            + (
                "no version of which every layer has a second copy"
                if self.durable_version is None
                else f"every layer has a second copy at version {self.durable_version},"
                f" {self.head_version - self.durable_version} steps behind"
            )
        ]
        for row in self.rows:
            copies = ", ".join(
                f"{c.device} v{c.version} ({c.behind_steps} behind, {c.age_s:.0f} s"
                + (", disk)" if c.keep == "disk" else ")")
                for c in row.copies
            )
            danger = f"   all behind {', '.join(row.shared_hazards)}" if row.shared_hazards else ""
            lines.append(
                f"  layers {_span(row.first_layer, row.last_layer)} of {row.owner}:"
                f" {copies or 'no copy'}{danger}"
            )
        held = ", ".join(f"{d} {format_bytes(size)}" for d, size in self.held_bytes.items())
        budget = "" if self.budget_bytes is None else f" of {format_bytes(self.budget_bytes)}"
        lines.append(f"  bytes  sent {format_bytes(self.sent_bytes)}{budget}; held: {held or '-'}")
        if self.common_hazards:
            lines.append(f"  nothing helps against {', '.join(self.common_hazards)}: all are in it")
        lines += [f"  if {item.cause} went now: {_told(item)}" for item in self.if_lost]
        return "\n".join(lines)


def replica_report(
    plan: PipelinePlan,
    holdings: Iterable[Holding],
    *,
    head_version: int,
    groups: HazardGroups | None = None,
    logs_from: int | None = None,
    checkpoint_version: int | None = None,
    sent_bytes: int = 0,
    budget_bytes: int | None = None,
) -> ReplicaReport:
    """The report.

    Args:
        holdings: Copies and own snapshots, in any order.
        head_version: Where the owners are.
        logs_from: Oldest step of which neighbours still have what they sent; None: no logs, so
            every loss of a stage rolls back, unless the copy is at the head.
        checkpoint_version: Newest checkpoint; None: not known.

    Raises:
        InvalidValueError: A copy of layers that the plan does not have, or beyond the head.
    """
    groups = groups or HazardGroups()
    held = sorted(
        holdings, key=lambda h: (h.device, h.first_layer, h.last_layer, -h.version, h.keep)
    )
    for item in held:
        if item.last_layer >= plan.num_layers or item.version > head_version:
            raise InvalidValueError(
                f"holding at {item.device!r}: layers {item.first_layer}-{item.last_layer} at"
                f" version {item.version} in a plan of {plan.num_layers} layers at version"
                f" {head_version}"
            )
    stages = {layer: stage for stage in plan.stages for layer in stage.layers}
    rows: list[LayerRow] = []
    for layer, stage in stages.items():
        others = sorted(
            (h for h in held if h.has(layer) and h.device not in stage.devices),
            key=lambda h: (-h.version, h.device, h.keep),
        )
        row = LayerRow(
            first_layer=layer,
            last_layer=layer,
            owner=stage.device,
            copies=tuple(
                HeldCopy(
                    device=h.device,
                    version=h.version,
                    behind_steps=head_version - h.version,
                    age_s=h.age_s,
                    keep=h.keep,
                )
                for h in others
            ),
            shared_hazards=_shared(groups, stage.devices, [h.device for h in others]),
        )
        if rows and replace(rows[-1], first_layer=layer, last_layer=layer) == row:
            rows[-1] = replace(rows[-1], last_layer=layer)
        else:
            rows.append(row)
    sizes: dict[str, int] = {}
    for item in held:
        sizes[item.device] = sizes.get(item.device, 0) + item.size_bytes
    elsewhere = {
        layer: {h.version for h in held if h.has(layer) and h.device not in stage.devices}
        for layer, stage in stages.items()
    }
    common = set.intersection(*elsewhere.values())
    state = _State(plan, held, head_version, logs_from, checkpoint_version)
    devices = sorted({*plan.all_devices, *sizes})
    causes = [(f"device {d}", (d,)) for d in devices]
    causes += [
        (name, members)
        for name, members in sorted(groups.members.items())
        if len(set(members) & set(devices)) > 1
    ]
    return ReplicaReport(
        head_version=head_version,
        durable_version=max(common, default=None),
        rows=tuple(rows),
        held_bytes=sizes,
        sent_bytes=sent_bytes,
        budget_bytes=budget_bytes,
        if_lost=tuple(
            state.without(cause, [d for d in lost if d in devices]) for cause, lost in causes
        ),
        common_hazards=groups.common,
    )


@dataclass(frozen=True, slots=True)
class _State:
    plan: PipelinePlan
    held: Sequence[Holding]
    head: int
    logs_from: int | None
    checkpoint: int | None

    def without(self, cause: str, lost: Sequence[str]) -> IfLost:
        """By the protocol's decision: replay runs of lost stages, else roll back to the newest
        version of which every layer has a copy."""
        left = [h for h in self.held if h.device not in lost]
        versions = {
            layer: {h.version for h in left if h.has(layer)}
            for layer in range(self.plan.num_layers)
        }
        gone = [
            index for index, stage in enumerate(self.plan.stages) if set(stage.devices) <= set(lost)
        ]
        lost_layers = {la for index in gone for la in self.plan.stages[index].layers}
        bare = [la for la in sorted(lost_layers) if not versions[la]]
        alone = [
            layer
            for layer in range(self.plan.num_layers)
            if layer not in lost_layers and self._second(self.held, layer)
            and not self._second(left, layer)
        ]  # fmt: skip
        outcome, version = "nothing", None
        if gone:
            outcome, version = self._decide(gone, versions)
        redone = None if version is None else self.head - version
        if outcome == "nothing":
            redone = 0
        elif outcome == "checkpoint" and self.checkpoint is not None:
            version, redone = self.checkpoint, self.head - self.checkpoint
        return IfLost(
            cause=cause,
            devices=tuple(DeviceId(d) for d in sorted(lost)),
            owned=_ranges(sorted(lost_layers)),
            outcome=outcome,
            version=version,
            redone_steps=redone,
            bare=_ranges(bare),
            last_copies=_ranges(alone),
        )

    def _second(self, held: Sequence[Holding], layer: int) -> bool:
        stage = next(s for s in self.plan.stages if layer in s.layers)
        return any(h.has(layer) and h.device not in stage.devices for h in held)

    def _decide(
        self, gone: Sequence[int], versions: Mapping[int, set[int]]
    ) -> tuple[str, int | None]:
        oldest = self.head
        if len(gone) < len(self.plan.stages):
            runs: list[list[int]] = []
            for index in gone:
                if runs and runs[-1][-1] == index - 1:
                    runs[-1].append(index)
                else:
                    runs.append([index])
            for run in runs:
                layers = [la for index in run for la in self.plan.stages[index].layers]
                common = set.intersection(*(versions[la] for la in layers))
                reach = [
                    v
                    for v in common
                    if v == self.head or (self.logs_from is not None and v >= self.logs_from)
                ]
                if not reach:
                    break
                oldest = min(oldest, max(reach))
            else:
                return "replay", oldest
        common = set.intersection(*versions.values())
        return ("rollback", max(common)) if common else ("checkpoint", None)


def _shared(groups: HazardGroups, owners: Sequence[str], holders: Sequence[str]) -> tuple[str, ...]:
    if not holders:
        return ()
    names = [groups.names_of(device) for device in (*owners, *holders)]
    return tuple(sorted(frozenset.intersection(*names)))


def _ranges(layers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for layer in layers:
        if found and found[-1][1] == layer - 1:
            found[-1] = (found[-1][0], layer)
        else:
            found.append((layer, layer))
    return tuple(found)


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _told(item: IfLost) -> str:
    spans = ", ".join(_span(*pair) for pair in item.owned)
    steps = "step" if item.redone_steps == 1 else "steps"
    if item.outcome == "nothing":
        said = "no layer is lost"
    elif item.outcome == "replay":
        said = (
            f"layers {spans} are replayed from version {item.version}, {item.redone_steps} {steps}"
        )
    elif item.outcome == "rollback":
        said = f"all go back to version {item.version}, {item.redone_steps} {steps} are redone"
    else:
        where = "" if item.version is None else f" of version {item.version}"
        said = f"all go back to the checkpoint{where}"
        if item.redone_steps is not None:
            said += f", {item.redone_steps} {steps} are redone"
    if item.bare:
        said += f"; no copy of layers {', '.join(_span(*p) for p in item.bare)} is left"
    if item.last_copies:
        said += f"; layers {', '.join(_span(*p) for p in item.last_copies)} lose their only copy"
    return said
