"""Evaluation during training, as the user asks for it: which rows, how often, what is the best.

Turns what the user wrote into microbatches of the job's shape and checks them before anything is
launched. Knows nothing of how stages evaluate (`protocol.member_evaluation`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from ..data import ArraySource, DataSource, checked_batch
from ..errors import DataError, InvalidValueError, JobError
from ..model import TrainingJob
from ..protocol.common import BestRule, EvaluationPlan

logger = logging.getLogger(__name__)

DIRECTIONS: Mapping[str, Any] = {"loss": "min", "accuracy": "max"}
"""Of the metrics whose name says what is better."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation set, and how often it is evaluated on the devices.

    Rows beyond whole microbatches are left out (the run says how many). Order does not matter and
    is not shuffled.
    """

    source: Any = field(repr=False)
    """An `ArraySource` (all its rows, in order), a pair (inputs, targets) of arrays, or any data
    source of `job.batch_size` rows a batch, which then needs `batches`."""
    every: int | None = None
    """Steps between evaluations: at versions `every`, 2 `every`, ... and at the last one; None: at
    the last one only."""
    batches: int | None = None
    """How many batches make the set; for arrays at most so many are taken."""

    def __post_init__(self) -> None:
        for name in ("every", "batches"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InvalidValueError(f"evaluation: {name} must be >= 1 or None, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSet:
    """An evaluation that fits its job: `source.batch(k)` gives microbatch k."""

    source: DataSource = field(repr=False)
    microbatches: int
    every: int | None
    rows: int
    """Rows that are evaluated."""
    left_out_rows: int

    def plan(self, *, keeps_state: bool) -> EvaluationPlan:
        """What the devices are told."""
        return EvaluationPlan(
            microbatches=self.microbatches, every=self.every, keeps_state=keeps_state
        )


class _Cut:
    """Microbatches of a source that gives whole batches."""

    def __init__(self, source: DataSource, job: TrainingJob) -> None:
        self._source, self._job = source, job
        self._newest: tuple[int, Any] = (-1, None)

    def batch(self, step: int) -> tuple[Any, Any]:
        """Inputs and targets of microbatch `step`."""
        number, part = divmod(step, self._job.microbatches)
        if self._newest[0] != number:
            batch = checked_batch(self._source, number, self._job.batch_size)
            self._newest = (number, batch)
        rows = self._job.microbatch_size
        first = part * rows
        inputs, targets = jax.tree.map(
            lambda leaf: np.asarray(leaf)[first : first + rows], self._newest[1]
        )
        return inputs, targets


def prepare_evaluation(
    evaluate: Any, job: TrainingJob, inputs_spec: Any, targets_spec: Any
) -> EvaluationSet | None:
    """The evaluation of a run, checked; None where there is none.

    Raises:
        DataError: Smaller than a microbatch, or of other shapes than the training rows.
    """
    if evaluate is None:
        return None
    wanted = evaluate if isinstance(evaluate, Evaluation) else Evaluation(evaluate)
    rows = job.microbatch_size
    source = wanted.source
    if isinstance(source, (tuple, list)) and len(source) == 2:
        source = ArraySource(*source, batch_size=1, shuffle=False)
    if isinstance(source, ArraySource):
        there = source.rows
        if there < rows:
            raise DataError(
                f"the evaluation set has {there} rows, less than a microbatch of {rows} rows"
                f" (batch_size {job.batch_size} / {job.microbatches} microbatches)"
            )
        cut: DataSource = ArraySource(source.inputs, source.targets, rows, shuffle=False)
        count = there // rows
        if wanted.batches is not None:
            count = min(count, wanted.batches * job.microbatches)
    else:
        if not isinstance(source, DataSource):
            raise DataError(
                "evaluate must be a data source, a pair (inputs, targets) or cm.Evaluation, got"
                f" {type(source).__name__}"
            )
        if wanted.batches is None:
            raise DataError(
                f"{type(source).__name__} does not say how many rows it has: use"
                " cm.Evaluation(source, batches=...)"
            )
        cut = _Cut(source, job)
        count = wanted.batches * job.microbatches
        there = count * rows
    _check_shapes(cut.batch(0), (inputs_spec, targets_spec))
    left_out = there - count * rows
    if left_out:
        logger.warning(
            "evaluation: %d of %d rows are left out; microbatches have %d rows",
            left_out, there, rows,
        )  # fmt: skip
    return EvaluationSet(
        source=cut,
        microbatches=count,
        every=wanted.every,
        rows=count * rows,
        left_out_rows=left_out,
    )


def _check_shapes(batch: Any, specs: Any) -> None:
    for name, part, spec in zip(("inputs", "targets"), batch, specs, strict=True):
        if jax.tree.structure(part) != jax.tree.structure(spec):
            raise DataError(
                f"evaluation {name} are {jax.tree.structure(part)}, in training"
                f" {jax.tree.structure(spec)}"
            )
        for leaf, want in zip(jax.tree.leaves(part), jax.tree.leaves(spec), strict=True):
            if leaf.shape != want.shape or leaf.dtype != want.dtype:
                raise DataError(
                    f"evaluation {name} have rows of {leaf.dtype}{list(leaf.shape[1:])}, in"
                    f" training {want.dtype}{list(want.shape[1:])}"
                )


def best_rule(keep_best: Any, job: TrainingJob) -> BestRule | None:
    """What `keep_best` says: "loss", "accuracy", or (metric, "min" or "max").

    Raises:
        JobError: An unknown metric, or no direction.
    """
    if keep_best is None:
        return None
    metric, mode = keep_best, None
    if isinstance(keep_best, (tuple, list)) and len(keep_best) == 2:
        metric, mode = keep_best
    check_metric(metric, evaluated_names(job), "keep_best")
    mode = mode or DIRECTIONS.get(metric)
    if mode not in ("min", "max"):
        raise JobError(
            f"keep_best: is a high {metric!r} good or bad? Write ({metric!r}, 'max') or"
            f" ({metric!r}, 'min')"
        )
    return BestRule(metric=metric, mode=mode)


def evaluated_names(job: TrainingJob) -> tuple[str, ...]:
    """What an evaluation gives."""
    return ("loss", *job.metric_functions)


def check_metric(metric: Any, names: Iterable[str], what: str) -> None:
    """Refuses a metric that evaluations do not give.

    Raises:
        JobError: Names those they give.
    """
    names = tuple(names)
    if metric not in names:
        known = ", ".join(map(repr, names)) or "nothing, as the run has no evaluate="
        raise JobError(f"{what}: no metric {metric!r}; evaluations give {known}")
