"""What is to be trained: model, loss, optimizer, batch, microbatches and seed, in one value.

Knows nothing of devices or plans; asks jaxprs, so that wrong losses are refused before a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ..errors import CrowdMeshError, JobError
from . import losses
from .dependence import inputs_read
from .layer import NAME_PATTERN
from .staged import StagedModel
from .trees import describe, leaf_paths, spec_of, zeros_of

PyTree = Any
Loss = Callable[[Any, Any], Any]
Metric = Callable[[Any, Any], tuple[Any, Any]]


@dataclass(frozen=True, eq=False)
class TrainingJob:
    """A training job. `loss(outputs, targets)` returns (values, weights) or values.

    One value per row, token or pixel; a scalar counts as one value per microbatch, which is the
    same for a plain mean and another thing for a masked one.

    Raises:
        JobError: A field is out of range; says which, its value and what would do.
    """

    model: StagedModel
    loss: Loss
    optimizer: Any
    """An optax gradient transformation."""
    batch_size: int
    """Rows of one step, over all microbatches."""
    microbatches: int = 1
    """M: equal parts that a step's batch is cut into."""
    seed: int = 0
    """Fixes parameters, dropout and all other randomness; 0 .. 2**32 - 1."""
    metrics: Mapping[str, Metric] | Sequence[Metric] = ()
    """Name -> `metric(outputs, targets) -> (sum, count)`, or functions with names."""
    on_nonfinite: Literal["halt", "continue"] = "halt"
    """What to do when the loss of a step is NaN or infinite."""
    made: dict[Any, Any] = field(init=False, repr=False, default_factory=dict)
    """What `export` made of this job, by what it depends on: stages come back in other plans."""

    def __post_init__(self) -> None:
        if not isinstance(self.model, StagedModel):
            raise JobError(f"model must be a StagedModel, got {type(self.model).__name__}")
        if not callable(self.loss):
            raise JobError(f"loss must be a function, got {type(self.loss).__name__}")
        if not (hasattr(self.optimizer, "init") and hasattr(self.optimizer, "update")):
            raise JobError(
                "optimizer must be an optax gradient transformation (init, update), got"
                f" {type(self.optimizer).__name__}"
            )
        for name in ("batch_size", "microbatches"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise JobError(f"{name} must be an integer >= 1, got {value!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise JobError(f"seed must be an integer in 0 .. 2**32 - 1, got {self.seed!r}")
        if self.batch_size % self.microbatches:
            raise JobError(
                f"batch_size {self.batch_size} cannot be cut into {self.microbatches} equal"
                f" microbatches; use microbatches={_nearest(self.batch_size, self.microbatches)},"
                f" or a batch_size that is a multiple of {self.microbatches}"
            )
        if self.on_nonfinite not in ("halt", "continue"):
            raise JobError(f"on_nonfinite must be 'halt' or 'continue', got {self.on_nonfinite!r}")
        object.__setattr__(self, "metrics", MappingProxyType(_named_metrics(self.metrics)))

    @property
    def microbatch_size(self) -> int:
        """Rows of one microbatch."""
        return self.batch_size // self.microbatches

    @property
    def metric_functions(self) -> Mapping[str, Metric]:
        """Name -> metric, in the order given."""
        metrics = self.metrics
        assert isinstance(metrics, Mapping)
        return metrics

    def loss_fn(self, outputs: PyTree, targets: PyTree) -> tuple[jax.Array, jax.Array]:
        """The loss as (values, weights): float32 arrays of one shape.

        Raises:
            JobError: The loss returned something else; shows the shapes.
        """
        made = self.loss(outputs, targets)
        pair = isinstance(made, (tuple, list))
        if pair and len(made) != 2:
            raise JobError(f"loss must return (values, weights) or values, got {len(made)} items")
        values = jnp.asarray(made[0] if pair else made)
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise JobError(f"loss values must be floats, got {values.dtype}{list(values.shape)}")
        weights = jnp.asarray(made[1]) if pair else jnp.ones(values.shape, jnp.float32)
        if weights.shape != values.shape:
            raise JobError(
                f"loss values have shape {values.shape}, weights {weights.shape}; they must be"
                " equal, one weight for each value"
            )
        return values.astype(jnp.float32), weights.astype(jnp.float32)

    def microbatch_specs(self, example_batch: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        """Shapes of one microbatch's inputs and targets.

        Args:
            example_batch: (inputs, targets) of one step; arrays with `batch_size` rows.

        Raises:
            JobError: Not a pair, or a leaf with another number of rows.
        """
        if not (isinstance(example_batch, (tuple, list)) and len(example_batch) == 2):
            raise JobError(f"a batch must be (inputs, targets), got {type(example_batch).__name__}")
        specs = []
        for kind, tree in zip(("inputs", "targets"), example_batch, strict=True):
            spec = spec_of(tree)
            if not jax.tree.leaves(spec):
                raise JobError(f"the batch's {kind} hold no array")
            for path, leaf in leaf_paths(spec):
                if not leaf.shape or leaf.shape[0] != self.batch_size:
                    raise JobError(
                        f"{kind} leaf {path!r} has shape {leaf.shape}; its first axis must be"
                        f" batch_size = {self.batch_size}"
                    )
            specs.append(jax.tree.map(self._part, spec))
        return specs[0], specs[1]

    def _part(self, leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.microbatch_size, *leaf.shape[1:]), leaf.dtype)

    def weights(self, outputs_spec: PyTree, targets: PyTree) -> jax.Array:
        """The weights of one microbatch, from its targets alone."""
        return self.loss_fn(zeros_of(outputs_spec), targets)[1]

    def check(self, inputs_spec: PyTree, targets_spec: PyTree) -> None:
        """Traces model, loss and metrics on one microbatch's shapes, in training and evaluation.

        Raises:
            ModelError: The model cannot take such inputs, or has a layer that cannot be cut out.
            JobError: The loss or a metric fails or breaks its contract.
        """
        outputs = self.model.specs(inputs_spec, train=True).y
        evaluated = self.model.specs(inputs_spec, train=False).y
        if jax.tree.map(_shape, outputs) != jax.tree.map(_shape, evaluated):
            raise JobError(
                f"the model returns {describe(outputs)} in training, {describe(evaluated)} in"
                " evaluation; the loss needs one shape"
            )
        self.check_loss(outputs, targets_spec)
        self.check_metrics(outputs, targets_spec)

    def check_loss(self, outputs_spec: PyTree, targets_spec: PyTree) -> None:
        """Traces the loss; refuses weights that depend on outputs.

        Raises:
            JobError: The loss fails, breaks its contract, or weighs by predictions.
        """
        outputs, targets = spec_of(outputs_spec), spec_of(targets_spec)
        try:
            closed = jax.make_jaxpr(self.loss_fn)(outputs, targets)
        except CrowdMeshError:
            raise
        except Exception as exc:
            raise _failed("loss", outputs, targets, exc) from exc
        predictions = len(jax.tree.leaves(outputs))
        if any(inputs_read(closed, [False, True])[:predictions]):
            raise JobError(
                "loss weights depend on the model's outputs; they may depend on targets only, since"
                " the step's normaliser is known before the step (put such factors into the values)"
            )

    def check_targets(self, inputs_spec: PyTree, targets: PyTree, where: str = "targets") -> None:
        """Looks at the targets' numbers: a label that the model has no class for is refused.

        Args:
            inputs_spec: Of one microbatch.
            targets: Arrays of any number of rows, all that are known best.
            where: Said first in the message.

        Raises:
            DataError: Names label, row and number of classes.
        """
        losses.check_targets(self.loss, self.model.specs(inputs_spec).y, targets, where)

    def check_metrics(self, outputs_spec: PyTree, targets_spec: PyTree) -> None:
        """Traces the metrics.

        Raises:
            JobError: One fails, or does not return a pair of scalars.
        """
        outputs, targets = spec_of(outputs_spec), spec_of(targets_spec)
        for name, metric in self.metric_functions.items():
            try:
                made = jax.eval_shape(metric, outputs, targets)
            except CrowdMeshError:
                raise
            except Exception as exc:
                raise _failed(f"metric {name!r}", outputs, targets, exc) from exc
            leaves = jax.tree.leaves(made)
            pair = isinstance(made, (tuple, list)) and len(made) == 2 and len(leaves) == 2
            if not pair or any(leaf.shape != () for leaf in leaves):
                raise JobError(
                    f"metric {name!r} must return two scalars (sum, count), got {describe(made)}"
                )


def _shape(leaf: Any) -> tuple[Any, str]:
    return tuple(leaf.shape), str(leaf.dtype)


def _failed(what: str, outputs: PyTree, targets: PyTree, exc: Exception) -> JobError:
    told = (str(exc) or type(exc).__name__).strip().split("\n\n")[0][:500]
    return JobError(
        f"{what} cannot take outputs {describe(outputs)} and targets {describe(targets)}\n"
        f"  reason {type(exc).__name__}: {told}"
    )


def _nearest(batch_size: int, microbatches: int) -> str:
    divisors = [n for n in range(1, batch_size + 1) if batch_size % n == 0]
    below = max((n for n in divisors if n < microbatches), default=None)
    above = min((n for n in divisors if n > microbatches), default=None)
    return " or ".join(str(n) for n in (below, above) if n is not None)


def _named_metrics(metrics: Any) -> dict[str, Metric]:
    named: dict[str, Any] = {}
    if isinstance(metrics, Mapping):
        named.update(metrics)
    else:
        for metric in (metrics,) if callable(metrics) else metrics:
            if not callable(metric):
                raise JobError(
                    f"metrics must be functions such as cm.losses.accuracy, got {metric!r}"
                )
            name = getattr(metric, "__name__", "")
            if name in named:
                raise JobError(f"two metrics are called {name!r}; use a mapping of names")
            named[name] = metric
    for name, metric in named.items():
        if not isinstance(name, str) or not NAME_PATTERN.match(name):
            raise JobError(
                f"metric name {name!r}: must start with a letter and hold letters, digits and _"
                " only; use a mapping {name: metric}"
            )
        if not callable(metric):
            raise JobError(f"metric {name!r} must be a function, got {type(metric).__name__}")
    return named
