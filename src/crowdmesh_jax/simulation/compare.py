"""Runs of several policies over the same seeds: means, 95 % intervals, paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import InvalidValueError
from ..mobility import Scenario
from ..mobility import scenario as frozen_scenario
from .body import Body
from .outcome import CAUSES, Outcome
from .setups import Setup, make_setup
from .tuned import TRIES
from .world import World

RIVAL = "neighbour"
"""With whom differences are taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A mean with its 95 % interval (Student's t; seeds are independent)."""

    value: float
    half_width: float | None
    """None of one value."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of at least one value."""
        count = len(values)
        if count == 1:
            return cls(value=values[0], half_width=None)
        error = statistics.stdev(values) / math.sqrt(count)
        return cls(value=statistics.fmean(values), half_width=_t975(count - 1) * error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One policy over all seeds."""

    policy: str
    runs: int
    finished: int
    """Runs that were not given up; the times of others are too small."""
    elapsed_s: Mean
    below: Mean | None
    """Share by which it is below the rival, seed by seed; None for the rival."""
    split_s: dict[str, float]
    """Mean seconds of each cause."""
    losses: float
    handovers: float
    waves: float
    restores: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All policies of one scenario."""

    scenario: str
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    outcomes: tuple[Outcome, ...]

    def row(self, policy: str) -> Row:
        """That policy's."""
        return next(row for row in self.rows if row.policy == policy)


def simulate(
    scenario: str | Scenario, policy: str | Setup, seed: int, *, world: World | None = None
) -> Outcome:
    """One run.

    Args:
        scenario: A frozen one by name, with tuned intervals, or any other.
        policy: A name (`POLICIES`, `ABLATIONS`), or a setup.
        world: Of that scenario and seed, if it was made before.

    Example:
        >>> from crowdmesh_jax.simulation import simulate
        >>> simulate("calm", "next_stage", 3).finished
        True
    """
    name = scenario if isinstance(scenario, str) else None
    made = frozen_scenario(scenario) if isinstance(scenario, str) else scenario
    setup = make_setup(policy, name) if isinstance(policy, str) else policy
    return Body(world or World(made, seed), setup, scenario_name=name or made.movement).run()


def runs(scenario: str, policies: Sequence[str], seeds: Sequence[int]) -> Iterator[Outcome]:
    """Run after run, seed by seed: each world is made once."""
    made = frozen_scenario(scenario)
    setups = [make_setup(name, scenario) for name in policies]
    for seed in seeds:
        world = World(made, seed)
        for setup in setups:
            yield simulate(made, setup, seed, world=world)


def compare_policies(
    scenario: str,
    policies: Sequence[str],
    seeds: Sequence[int],
    *,
    on_run: Callable[[Outcome], None] | None = None,
) -> Comparison:
    """Runs them all.

    Raises:
        InvalidValueError: No seeds, no policies, a name twice or unknown.
    """
    if not policies or not seeds or len(set(policies)) < len(policies):
        raise InvalidValueError("a comparison needs seeds, and policies that differ")
    outcomes = []
    for outcome in runs(scenario, policies, seeds):
        outcomes.append(outcome)
        if on_run is not None:
            on_run(outcome)
    return Comparison(
        scenario=scenario,
        seeds=tuple(seeds),
        rows=summarise(policies, outcomes),
        outcomes=tuple(outcomes),
    )


def summarise(policies: Sequence[str], outcomes: Sequence[Outcome]) -> tuple[Row, ...]:
    """A row for each policy; runs of one seed are paired."""
    by_policy = {
        name: sorted((o for o in outcomes if o.policy == name), key=lambda o: o.seed)
        for name in policies
    }
    rows = []
    for name, own in by_policy.items():
        below = None
        if name != RIVAL and RIVAL in by_policy:
            pairs = zip(own, by_policy[RIVAL], strict=True)
            below = Mean.of([1 - a.elapsed_s / b.elapsed_s for a, b in pairs])
        rows.append(
            Row(
                policy=name,
                runs=len(own),
                finished=sum(o.finished for o in own),
                elapsed_s=Mean.of([o.elapsed_s for o in own]),
                below=below,
                split_s={c: statistics.fmean(o.split[c] for o in own) for c in CAUSES},
                losses=statistics.fmean(o.losses for o in own),
                handovers=statistics.fmean(o.handovers for o in own),
                waves=statistics.fmean(o.waves for o in own),
                restores=statistics.fmean(o.restores for o in own),
            )
        )
    return tuple(rows)


def tune(
    scenario: str, policy: str, worlds: Sequence[World], tries: Sequence[float] = TRIES
) -> dict[float, float]:
    """Interval scale -> mean seconds; the smallest wins, of equals the larger scale."""
    made = frozen_scenario(scenario)
    found = {}
    for scale in tries:
        setup = make_setup(policy, scenario, interval_scale=scale)
        found[scale] = statistics.fmean(
            simulate(made, setup, world.seed, world=world).elapsed_s for world in worlds
        )
    return found


def _t975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by its expansion around the normal one (Abramowitz and
    Stegun 26.7.5); below 0.2 % off from 3 degrees of freedom, exact values for 1 and 2."""
    if freedom <= 2:
        return (12.706, 4.303)[freedom - 1]
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))
