"""What a coalition solver is asked, and what it answers.

Values only: the question (profile, crowd, what counts how much), the answer (a structure with its
rated coalitions and a certificate), and the Protocol that joins them. It knows no search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from ...core import COMPILE_PEAK_BYTES, CoalitionStructure, Crowd, ModelProfile, warmup_depths
from ...errors import InvalidCrowdError, InvalidValueError
from ..problem import PartitionSolver, Recompute

Imbalance = Literal["js", "emd"]
Amounts = Literal["rows", "equal"]
ValueKind = Literal["partition", "closed_form"]


class Cost(NamedTuple):
    """Compared in this order: what holds no model is worse than anything that does."""

    lack: float
    """Devices in coalitions that cannot hold the model, plus for each such coalition the missing
    share of memory, in (0, 1]. Multiples of 2^-20, so that sums are exact."""
    phi: float
    """The potential: sum of (n_K / n) [tau_K (1 + kappa delta_K^2) / tau_0]^p."""

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.lack - other.lack, self.phi - other.phi)

    def plus(self, other: Cost) -> Cost:
        """Sum, part by part (`+` of tuples would append)."""
        return Cost(self.lack + other.lack, self.phi + other.phi)

    def is_gain(self, epsilon: float) -> bool:
        """Whether this difference, before less after, is worth a move."""
        return self.lack > 0 or (self.lack == 0 and self.phi > epsilon)


@dataclass(frozen=True, slots=True, kw_only=True)
class CoalitionProblem:
    """Which devices may train one copy of a profiled model together, and what counts.

    A round: every coalition passes once over the rows of its members, so it takes steps in
    proportion to them; the round ends when the slowest coalition ends.
    """

    profile: ModelProfile
    crowd: Crowd
    kappa: float = 0.5
    """Weight of data imbalance: a coalition's time counts 1 + kappa delta^2 times."""
    power: float = 4.0
    """p of the potential: 1 looks at the mean round time, large p at the slowest coalition."""
    imbalance: Imbalance = "js"
    """delta: "js", the square root of the Jensen-Shannon divergence in bits between a coalition's
    label histogram and the crowd's, 0..1; "emd", the sum over labels of absolute differences,
    0..2 (the earth mover's distance of Zhao et al. 2018)."""
    amounts: Amounts = "rows"
    """What a round's work is: "rows" that members hold, or one "equal" share per device."""
    sync_s: float = 0.0
    """Seconds that joining the coalitions' models takes, per round and coalition."""
    stall_s: float = 10.0
    """Seconds that one departure of a device with a stage costs its coalition."""
    max_size: int | None = None
    """Most members of a coalition; None: no bound."""
    value: ValueKind = "partition"
    """"partition": a coalition is rated by a plan for it; "closed_form": by sums over its members,
    which rates a coalition in less time."""
    partition_solver: str | PartitionSolver = "quick"
    """Rates coalitions: "quick", a name of `solvers()`, or an object with `solve(problem)`."""
    partition_options: Mapping[str, object] = field(default_factory=dict)
    """For the constructor of a named partition solver."""
    schedule: str = "1f1b"
    recompute: Recompute = "never"
    compile_peak_bytes: int = COMPILE_PEAK_BYTES

    def __post_init__(self) -> None:
        for name, least in (("kappa", 0.0), ("power", 1.0), ("sync_s", 0.0), ("stall_s", 0.0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise InvalidValueError(f"{name} must be finite and >= {least:g}, got {value}")
        for name, choices in (
            ("imbalance", ("js", "emd")),
            ("amounts", ("rows", "equal")),
            ("value", ("partition", "closed_form")),
            ("recompute", ("never", "always", "auto")),
        ):
            if getattr(self, name) not in choices:
                raise InvalidValueError(
                    f"{name} must be one of {choices}, got {getattr(self, name)!r}"
                )
        if self.max_size is not None and self.max_size < 1:
            raise InvalidValueError(f"max_size must be >= 1, got {self.max_size}")
        if self.compile_peak_bytes < 0:
            raise InvalidValueError(
                f"compile_peak_bytes must be >= 0, got {self.compile_peak_bytes}"
            )
        warmup_depths(self.schedule, 1, self.profile.microbatches)  # raises for an unknown one
        if self.amounts == "rows" and not any(device.rows for device in self.crowd.devices):
            raise InvalidCrowdError(
                "no device holds data: give label_counts, or amounts='equal' to count each device"
                " alike"
            )

    @property
    def size_limit(self) -> int:
        """Most members that a coalition can have."""
        count = len(self.crowd.devices)
        return count if self.max_size is None else min(self.max_size, count)


@dataclass(frozen=True, slots=True, kw_only=True)
class CoalitionValue:
    """One coalition, rated."""

    members: tuple[str, ...]
    holds_model: bool
    """Whether a plan was found; else the times are what its members would need with room."""
    step_s: float
    steps: float
    """Of one round."""
    round_s: float
    """tau: steps, expected stalls and sync."""
    imbalance: float
    """delta."""
    share: float
    """n_K / n: of the crowd's rows (or devices)."""
    cost: Cost
    stages: tuple[tuple[str, int, int], ...] = ()
    """(device, first layer, last layer) of the plan behind the value; () for closed forms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """The best thing that one device could do alone."""

    device: str
    target: tuple[str, ...]
    """The coalition it would join; () to be alone."""
    gain: Cost
    """By the preference: positive in lexicographic order is worth going."""
    welcome_gain: Cost | None
    """The best gain among coalitions none of whose members would wait longer for it; None where
    there is none. Only looked for where `gain` is worth going."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What was checked about single deviations, and what came out."""

    preference: str
    epsilon: float
    deviations: tuple[Deviation, ...]
    """One per device looked at, in the order of ids."""
    devices: int
    """Of the crowd. `len(deviations)` of them were looked at."""

    @property
    def is_sampled(self) -> bool:
        """Whether only some of the devices were looked at."""
        return len(self.deviations) < self.devices

    @property
    def is_nash_stable(self) -> bool:
        """No device looked at gains more than epsilon by any single move."""
        return not any(deviation.gain.is_gain(self.epsilon) for deviation in self.deviations)

    @property
    def is_individually_stable(self) -> bool:
        """No device looked at gains more than epsilon by a move that its hosts would welcome."""
        return not any(
            deviation.welcome_gain is not None and deviation.welcome_gain.is_gain(self.epsilon)
            for deviation in self.deviations
        )

    @property
    def worst(self) -> Deviation | None:
        """The deviation with the largest gain (the least loss)."""
        return max(self.deviations, key=lambda d: (d.gain, d.device), default=None)

    def line(self) -> str:
        """In one line."""
        looked = (
            f"{len(self.deviations)} of {self.devices} devices, sampled"
            if self.is_sampled
            else f"all {self.devices} devices"
        )
        verdict = (
            "Nash-stable"
            if self.is_nash_stable
            else "individually stable, not Nash-stable"
            if self.is_individually_stable
            else "not stable"
        )
        worst = self.worst
        told = ""
        if worst is not None:
            target = f"{worst.target[0]}'s" if worst.target else "alone"
            told = f"; best deviation {worst.device} -> {target}, gain {worst.gain.phi:.2g}"
            if worst.gain.lack:
                told += f" and {worst.gain.lack:+.3g} of devices without a model"
        return f"{verdict} under {self.preference!r}, epsilon {self.epsilon:g}, {looked}{told}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CoalitionResult:
    """A structure, what each coalition is rated at, and what is proven about it."""

    structure: CoalitionStructure
    values: tuple[CoalitionValue, ...]
    """In the order of `structure.coalitions`."""
    problem: CoalitionProblem
    potential: Cost
    certificate: Certificate
    rounds: int
    """Passes over the devices, all starts together."""
    switches: int
    """Accepted moves: switches, swaps, merges and splits."""
    evaluations: int
    """Coalitions whose value was worked out (by the partition solver, if that rates)."""
    solve_s: float
    solver: str
    notes: tuple[str, ...] = ()
    """What a reader should know: ended by the history rule, devices without a model, ..."""

    @property
    def mean_round_s(self) -> float:
        """Round time of the coalitions, weighted by their share of the rows."""
        return math.fsum(value.share * value.round_s for value in self.values)

    @property
    def slowest_round_s(self) -> float:
        """Round time of the slowest coalition: what all wait for."""
        return max(value.round_s for value in self.values)

    @property
    def unheld(self) -> tuple[str, ...]:
        """Devices in coalitions that cannot hold the model."""
        return tuple(
            device for value in self.values if not value.holds_model for device in value.members
        )

    def explain(self) -> str:
        """The structure in words and numbers."""
        from .explain import explain

        return explain(self)


@runtime_checkable
class CoalitionSolver(Protocol):
    """Forms coalitions. Same problem, same structure, whatever the order of the crowd."""

    def form(self, problem: CoalitionProblem) -> CoalitionResult:
        """Answers a problem.

        Raises:
            InfeasibleError: No coalition of the crowd can hold the model.
        """
        ...


Progress = Callable[[str], None]
