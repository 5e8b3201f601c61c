"""The same training without devices: what every distributed run is compared with.

`reference(job, data, steps)` trains the whole model with plain `jax.value_and_grad`; it shares no
code with the stage programs. `reference(job, data, steps, plan=plan)` runs the plan's own programs
in this process, microbatch after microbatch: on the same machine a distributed run of that plan is
bit-equal to it. Knows nothing of protocols, sockets or schedules.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .core.plan import PipelinePlan
from .data import DataSource, known_targets
from .errors import NonFiniteLossError
from .execution import StageWorker
from .export import assemble, build_bundles, initial_arrays
from .model import TrainingJob
from .programs import COMPILER_OPTIONS, load_stage

logger = logging.getLogger(__name__)

Key = tuple[str, str, str]
OnStep = Callable[[int, float], None]


@dataclass(frozen=True, kw_only=True)
class ReferenceResult:
    """What training came to."""

    losses: tuple[float, ...]
    """Loss of each step, before its update."""
    params: Any
    """{layer name: tree}."""
    state: Any
    """{layer name: tree} of layer statistics."""
    opt_state: Any
    """The plain optax state."""
    metrics: Mapping[str, tuple[float, ...]]
    """Per metric its mean (sum / count) at each step; NaN where nothing was counted."""


def reference(
    job: TrainingJob,
    data: DataSource,
    steps: int,
    *,
    plan: PipelinePlan | None = None,
    on_step: OnStep | None = None,
) -> ReferenceResult:
    """Trains in this process.

    Args:
        data: `batch(step)` gives (inputs, targets), numpy trees with `batch_size` rows; microbatch
            m is rows m * microbatch_size and on.
        steps: Number of steps, from step 0.
        plan: None: the whole model at once. Else the plan's stage programs, one after the other.
        on_step: Called with (step, loss) after each step.

    Raises:
        NonFiniteLossError: A loss is NaN or infinite and the job says "halt".
        ModelError, JobError, PlanError, ProgramError: As `build_bundles`.
    """
    example = data.batch(0)
    inputs, targets = job.microbatch_specs(example)
    job.check(inputs, targets)
    job.check_targets(inputs, *known_targets(data, example))
    arrays = initial_arrays(job, inputs)
    trainer: _Whole | _Staged
    if plan is None:
        trainer = _Whole(job, inputs, targets, arrays)
    else:
        trainer = _Staged(job, plan, inputs, targets, arrays)
    losses: list[float] = []
    metrics: dict[str, list[float]] = {name: [] for name in job.metric_functions}
    for step in range(steps):
        batch = _microbatches(job, (inputs, targets), data.batch(step))
        loss, sums = trainer.step(step, batch)
        losses.append(loss)
        for name, values in metrics.items():
            total, count = sums[name]
            values.append(total / count if count else float("nan"))
        if on_step is not None:
            on_step(step, loss)
    final = assemble(job, inputs, trainer.arrays()) if isinstance(trainer, _Staged) else trainer
    return ReferenceResult(
        losses=tuple(losses),
        params=_numpy(final.params),
        state=_numpy(final.state),
        opt_state=_numpy(final.opt_state),
        metrics={name: tuple(values) for name, values in metrics.items()},
    )


def _numpy(tree: Any) -> Any:
    def host(leaf: Any) -> Any:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return leaf if is_key else np.asarray(leaf)

    return jax.tree.map(host, tree)


def _microbatches(
    job: TrainingJob, specs: tuple[Any, Any], batch: tuple[Any, Any]
) -> list[tuple[Any, Any]]:
    """Cuts a batch by rows and gives every leaf the dtype of its spec."""
    rows = job.microbatch_size

    def part(first: int) -> tuple[Any, Any]:
        return jax.tree.map(
            lambda spec, leaf: np.asarray(leaf[first : first + rows], spec.dtype), specs, batch
        )

    return [part(m * rows) for m in range(job.microbatches)]


def _may_apply(job: TrainingJob, step: int, loss: float, weight: float) -> bool:
    """Whether a step's update counts: finite loss and something to weigh."""
    if weight == 0:
        logger.warning("step %d: all loss weights are 0; the step changes nothing", step)
        return False
    if np.isfinite(loss):
        return True
    if job.on_nonfinite == "halt":
        raise NonFiniteLossError(
            f"step {step}: the loss is {loss}; lower the learning rate, or set"
            " on_nonfinite='continue' to skip such steps"
        )
    logger.warning("step %d: the loss is %s; the step changes nothing", step, loss)
    return False


class _Whole:
    """The whole model as two jitted functions: one microbatch's gradients, and the update."""

    def __init__(
        self, job: TrainingJob, inputs: Any, targets: Any, arrays: Mapping[Key, np.ndarray]
    ) -> None:
        self._job = job
        start = assemble(job, inputs, arrays)
        self.params, self.state, self.opt_state = start.params, start.state, start.opt_state
        outputs = job.model.specs(inputs).y
        names = tuple(job.metric_functions)

        def loss_of(params: Any, state: Any, batch: Any, inv: Any, step: Any, m: Any) -> Any:
            x, wanted = batch
            y, state, aux = job.model.apply(
                params, state, x, seed=np.uint32(job.seed), step=step, microbatch=m, train=True
            )
            values, weights = job.loss_fn(y, wanted)
            loss = jnp.sum(values * weights) * inv
            if aux is not None:
                loss = loss + aux / job.microbatches
            sums = {name: job.metric_functions[name](y, wanted) for name in names}
            return loss, (state, sums)

        def microbatch(total: Any, *args: Any) -> Any:
            (loss, (state, sums)), grads = jax.value_and_grad(loss_of, has_aux=True)(*args)
            total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)
            return total, state, loss, sums

        def update(params: Any, opt_state: Any, total: Any) -> Any:
            grads = jax.tree.map(lambda p, t: t.astype(p.dtype), params, total)
            updates, opt_state = job.optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        compiled = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
        self._weigh = compiled(lambda wanted: jnp.sum(job.weights(outputs, wanted)))
        self._microbatch = compiled(microbatch)
        self._update = compiled(update)

    def step(
        self, step: int, batch: list[tuple[Any, Any]]
    ) -> tuple[float, dict[str, tuple[float, float]]]:
        weight = np.float32(0)
        for _, wanted in batch:
            weight = np.float32(weight + np.float32(self._weigh(wanted)))
        inv = np.float32(1) / weight if weight > 0 else np.float32(0)
        totals = jax.tree.map(_accumulator, self.params)
        state, loss = self.state, np.float32(0)
        sums = dict.fromkeys(self._job.metric_functions, (0.0, 0.0))
        with jax.threefry_partitionable(True):
            for m, part in enumerate(batch):
                totals, state, share, made = self._microbatch(
                    totals, self.params, state, part, inv, np.uint32(step), np.uint32(m)
                )
                loss = np.float32(loss + np.float32(share))
                for name, (total, count) in made.items():
                    old = sums[name]
                    sums[name] = (old[0] + float(total), old[1] + float(count))
        if _may_apply(self._job, step, float(loss), float(weight)):
            self.params, self.opt_state = self._update(self.params, self.opt_state, totals)
            self.state = state
        return float(loss), sums


def _accumulator(leaf: Any) -> jax.Array:
    small = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
    return jnp.zeros(leaf.shape, jnp.float32 if small else leaf.dtype)


class _Staged:
    """A plan's stage programs, each microbatch forth and back through all of them."""

    def __init__(
        self,
        job: TrainingJob,
        plan: PipelinePlan,
        inputs: Any,
        targets: Any,
        arrays: Mapping[Key, np.ndarray],
    ) -> None:
        self._job = job
        bundles = build_bundles(job, plan, inputs, targets)
        self._workers = [StageWorker(load_stage(bundle, trusted=True)) for bundle in bundles]
        shared = {("borrowed", *k[1:]): v for k, v in arrays.items() if k[0] == "param"}
        for worker in self._workers:
            worker.install({**arrays, **shared}, 0)

    def step(
        self, step: int, batch: list[tuple[Any, Any]]
    ) -> tuple[float, dict[str, tuple[float, float]]]:
        workers = self._workers
        last = workers[-1]
        last.load_targets([jax.tree.leaves(wanted) for _, wanted in batch])
        for m, (inputs, _) in enumerate(batch):
            leaves: list[Any] = jax.tree.leaves(inputs)
            for worker in workers:
                leaves = worker.forward(m, leaves)
            for worker in reversed(workers):
                leaves = worker.backward(m, leaves)
        tied: dict[Key, Any] = {}
        for worker in reversed(workers):
            tied.update(worker.tied_gradients(tied))
        cuts: dict[Key, Any] = {}
        for worker in workers:
            cuts.update(worker.finish_step(tied))
        totals = last.totals
        loss, metrics = float(totals.loss), dict(totals.metrics)
        if _may_apply(self._job, step, loss, float(totals.weight)):
            values = workers[0].reduce(cuts)
            for worker in workers:
                worker.apply(values)
            for worker in workers:
                for borrower in workers:
                    wanted = {("borrowed", *path) for path in borrower.manifest.borrows}
                    lent = {k: v for k, v in worker.lent().items() if k in wanted}
                    borrower.set_borrowed(lent)
        else:
            for worker in workers:
                worker.apply({}, skip=True)
        return loss, metrics

    def arrays(self) -> dict[Key, np.ndarray]:
        found: dict[Key, np.ndarray] = {}
        for worker in self._workers:
            found.update(worker.snapshot())
        return found
