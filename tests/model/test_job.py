"""Jobs check themselves: sizes, losses, weights and metrics, before anything is compiled."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crowdmesh_jax import errors
from crowdmesh_jax.model import StagedModel, TrainingJob, losses

MODEL = StagedModel.from_functions([jnp.tanh], ["squash"])
SGD = optax.sgd(0.1)
X = jax.ShapeDtypeStruct((2, 3), jnp.float32)
Y = jax.ShapeDtypeStruct((2,), jnp.int32)


def job(loss=losses.softmax_cross_entropy, batch_size=8, microbatches=4, **fields):
    return TrainingJob(MODEL, loss, SGD, batch_size, microbatches, **fields)


def test_a_valid_job_knows_its_microbatches():
    made = job(metrics=(losses.accuracy,))
    assert made.microbatch_size == 2
    assert list(made.metric_functions) == ["accuracy"]
    batch = np.zeros((8, 3)), {"y": np.zeros(8, np.int64)}
    inputs, targets = made.microbatch_specs(batch)
    assert inputs == jax.ShapeDtypeStruct((2, 3), jnp.float32)
    assert targets == {"y": jax.ShapeDtypeStruct((2,), jnp.int32)}
    made.check(X, Y)


def test_a_batch_that_does_not_divide_tells_the_nearest_numbers():
    with pytest.raises(errors.JobError, match=r"batch_size 64 .* 6 equal .*microbatches=4 or 8"):
        job(batch_size=64, microbatches=6)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"microbatches": 2.0}, "microbatches must be an integer >= 1, got 2.0"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**32}, "seed must be"),
        ({"on_nonfinite": "retry"}, "'halt' or 'continue', got 'retry'"),
        ({"metrics": {"a b": losses.accuracy}}, "metric name 'a b'"),
        ({"metrics": ["accuracy"]}, "functions such as cm.losses.accuracy, got 'accuracy'"),
        ({"metrics": {"a": 3}}, "metric 'a' must be a function"),
        ({"metrics": [losses.accuracy, losses.accuracy]}, "two metrics are called 'accuracy'"),
        ({"loss": "mse"}, "loss must be a function"),
    ],
)
def test_fields_out_of_range_are_refused(fields, told):
    with pytest.raises(errors.JobError, match=told):
        job(**fields)


def test_models_and_optimizers_that_are_none_are_refused():
    with pytest.raises(errors.JobError, match="model must be a StagedModel"):
        TrainingJob(jnp.tanh, losses.softmax_cross_entropy, SGD, 8)
    with pytest.raises(errors.JobError, match="optimizer must be an optax"):
        TrainingJob(MODEL, losses.softmax_cross_entropy, 0.1, 8)


def test_batches_of_other_sizes_are_refused_by_leaf():
    with pytest.raises(errors.JobError, match=r"inputs leaf 'b' has shape \(7, 3\)"):
        job().microbatch_specs(({"a": np.zeros(8), "b": np.zeros((7, 3))}, np.zeros(8)))
    with pytest.raises(errors.JobError, match="targets leaf '' has shape"):
        job().microbatch_specs((np.zeros(8), np.float32(1)))
    with pytest.raises(errors.JobError, match="targets hold no array"):
        job().microbatch_specs((np.zeros(8), None))
    with pytest.raises(errors.JobError, match=r"must be \(inputs, targets\)"):
        job().microbatch_specs(np.zeros(8))


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (lambda y, t: (y**2).mean(), ()),
        (lambda y, t: (y**2).mean(-1), (2,)),
        (lambda y, t: (y**2, jnp.ones(y.shape, bool)), (2, 3)),
        (lambda y, t: (y.astype(jnp.bfloat16), t[:, None] * jnp.ones((1, 3))), (2, 3)),
    ],
)
def test_losses_become_values_and_weights_of_one_shape(loss, shape):
    values, weights = job(loss).loss_fn(jnp.ones((2, 3)), jnp.ones(2))
    assert values.shape == weights.shape == shape
    assert values.dtype == weights.dtype == jnp.float32
    job(loss).check(X, jax.ShapeDtypeStruct((2,), jnp.float32))


def test_a_scalar_is_a_microbatchs_mean_which_masks_do_not_survive():
    """As docs/own_optimizer_and_loss.md says: allowed, and right for plain means only."""
    y = jnp.arange(8.0)
    masked = (jnp.arange(8) < 3).astype(jnp.float32)

    def of_step(loss):
        parts = [job(loss).loss_fn(y[i : i + 2], masked[i : i + 2]) for i in range(0, 8, 2)]
        total = sum((values * weights).sum() for values, weights in parts)
        return float(total / sum(weights.sum() for _, weights in parts))

    assert of_step(lambda y, t: y.mean()) == of_step(lambda y, t: y) == y.mean()
    assert of_step(lambda y, t: (y, t)) == 1.0
    assert of_step(lambda y, t: (y * t).sum() / jnp.maximum(t.sum(), 1)) != 1.0
    page = Path(__file__).parents[2] / "docs" / "own_optimizer_and_loss.md"
    assert "A scalar is allowed too" in page.read_text()


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda y, t: (y, jnp.ones(2)), r"values have shape \(2, 3\), weights \(2,\)"),
        (lambda y, t: (y, y, y), "got 3 items"),
        (lambda y, t: y.argmax(-1), r"must be floats, got int32\[2\]"),
        (lambda y, t: y @ t, r"loss cannot take outputs float32\[2,3\] and targets int32\[2\]"),
        (lambda y, t: (y, jax.nn.softmax(y)), "weights depend on the model's outputs"),
        (lambda y, t: (y, (y > 0).astype(jnp.float32)), "weights depend on the model's outputs"),
    ],
)
def test_losses_that_break_the_contract_are_refused(loss, told):
    with pytest.raises(errors.JobError, match=told):
        job(loss).check(X, Y)


def test_weights_may_take_shapes_of_outputs():
    def loss(y, t):
        return y, jnp.zeros_like(y) + t[:, None]

    job(loss).check(X, Y)
    np.testing.assert_array_equal(job(loss).weights(X, jnp.int32([2, 3])), [[2, 2, 2], [3, 3, 3]])


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        (lambda y, t: y.sum(), "two scalars"),
        (lambda y, t: (y.sum(-1), y.sum()), "two scalars"),
        (lambda y, t: y @ t, "metric 'm' cannot take"),
    ],
)
def test_metrics_that_break_the_contract_are_refused(metric, told):
    with pytest.raises(errors.JobError, match=told):
        job(metrics={"m": metric}).check(X, Y)


def test_models_whose_output_depends_on_the_mode_are_refused():
    def pool(x, train):
        return x if train else x[:1]

    model = StagedModel.from_functions([pool])
    odd = TrainingJob(model, losses.softmax_cross_entropy, SGD, 8, 4)
    with pytest.raises(errors.JobError, match=r"float32\[2,3\] in training, float32\[1,3\]"):
        odd.check(X, Y)
