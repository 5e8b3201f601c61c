"""Profiles against arithmetic on paper, and against the programs that export really makes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from support.families import family

from crowdmesh_jax import errors
from crowdmesh_jax.core.crowd import Crowd
from crowdmesh_jax.core.plan import PipelinePlan
from crowdmesh_jax.export import build_bundles
from crowdmesh_jax.model import Layer, StagedModel, TrainingJob, losses, zoo
from crowdmesh_jax.model.trees import size_bytes
from crowdmesh_jax.profiling import optimizer_sizes, profile

CROWD = Crowd.local()
ADAM = optax.adam(1e-3)


def dense_profile(widths, rows=8, optimizer=ADAM):
    model = StagedModel.from_linen([nn.Dense(w, use_bias=False) for w in widths[1:]])
    job = TrainingJob(model, losses.mean_squared_error, optimizer, rows)
    batch = np.zeros((rows, widths[0]), np.float32), np.zeros((rows, widths[-1]), np.float32)
    return profile(job, CROWD, batch)


def matmul(m, k, n):
    return 2.0 * m * k * n


def test_dense_layers_cost_what_paper_says():
    first, second = dense_profile([64, 96, 32]).layers
    assert first.forward_flops == pytest.approx(matmul(8, 64, 96), rel=0.01)
    # The first layer makes no gradient of its input, the second one does.
    assert first.backward_flops == pytest.approx(matmul(8, 64, 96), rel=0.01)
    assert second.backward_flops == pytest.approx(2 * matmul(8, 96, 32), rel=0.01)
    assert first.parameter_count == 64 * 96
    assert first.parameter_bytes == 4 * 64 * 96
    assert first.optimizer_bytes == 8 * 64 * 96
    assert first.output_bytes == first.gradient_bytes == 4 * 8 * 96


def test_costs_grow_with_the_rows_of_a_microbatch():
    for small, large in zip(
        dense_profile([32, 32], 4).layers, dense_profile([32, 32], 16).layers, strict=True
    ):
        assert large.forward_flops == pytest.approx(4 * small.forward_flops, rel=0.01)
        assert large.parameter_bytes == small.parameter_bytes


def scan_layer(turns):
    def apply(params, state, x, key, train):
        def turn(x, _):
            return jnp.sin(x @ params["w"]), None

        return jax.lax.scan(turn, x, None, length=turns)[0], state, None

    return Layer("loop", lambda key, x: ({"w": jnp.ones((32, 32))}, {}), apply)


def test_a_scan_costs_as_much_as_its_turns():
    costs = {}
    for turns in (2, 20):
        model = StagedModel((scan_layer(turns),))
        job = TrainingJob(model, losses.mean_squared_error, ADAM, 8)
        x = np.zeros((8, 32), np.float32)
        costs[turns] = profile(job, CROWD, (x, x)).layers[0]
    assert costs[20].forward_flops == pytest.approx(20 * matmul(8, 32, 32), rel=0.05)
    assert costs[20].forward_flops == pytest.approx(10 * costs[2].forward_flops, rel=0.02)
    # The last turn's gradient of the carry has no reader outside the loop: 2 products per turn.
    assert costs[20].backward_flops == pytest.approx(10 * costs[2].backward_flops, rel=0.05)
    assert costs[20].backward_flops > 1.9 * costs[20].forward_flops


def bytes_of(leaves):
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves)


@pytest.mark.parametrize("name", ["mlp", "unet_skip", "moe", "nnx_batchnorm", "gpt2"])
def test_sizes_are_those_of_the_exported_programs(name):
    kind = family(name)
    job, batch = kind.job(optax.chain(optax.clip_by_global_norm(1.0), ADAM)), kind.batch()
    made = profile(job, CROWD, batch)
    plan = PipelinePlan.even(len(made.layers), ["a", "b"], microbatches=job.microbatches)
    bundles = build_bundles(job, plan, *job.microbatch_specs(batch))
    for stage in (bundle.manifest for bundle in bundles):
        own = made.layers[stage.first_layer : stage.last_layer + 1]
        sums = {
            "param": sum(layer.parameter_bytes for layer in own),
            "opt": sum(layer.optimizer_bytes for layer in own),
            "state": sum(layer.state_bytes for layer in own),
            "global": made.globals_bytes,
        }
        for role, expected in sums.items():
            assert bytes_of(x for x in stage.resident if x.role == role) == expected, role
        assert sum(layer.parameter_count for layer in own) * 4 == sums["param"]
    first = bundles[0].manifest
    last = made.layers[first.last_layer]
    assert bytes_of(first.boundary_in) == made.input_bytes
    assert bytes_of(first.boundary_out) == last.output_bytes
    assert bytes_of(first.gradient_in) == last.gradient_bytes
    assert bytes_of(bundles[1].manifest.targets) == made.target_bytes
    forward = first.program("forward")
    kept = bytes_of(x for x in forward.outputs if x.role == "residual")
    estimate = sum(layer.residual_bytes for layer in made.layers[: first.last_layer + 1])
    # An estimate by layers cannot know that a stage's own output is kept anyway.
    assert kept <= estimate <= kept + last.output_bytes


def test_nothing_comes_back_where_no_parameter_lies_upstream():
    model = StagedModel.from_linen([nn.relu, nn.Dense(3), nn.Dense(2)], ["prepare", "a", "b"])
    job = TrainingJob(model, losses.mean_squared_error, ADAM, 4)
    made = profile(job, CROWD, (np.zeros((4, 5), np.float32), np.zeros((4, 2), np.float32)))
    assert [layer.gradient_bytes for layer in made.layers] == [0, 48, 32]
    prepare = made.layers[0]
    assert prepare.backward_flops == 0
    assert prepare.residual_bytes == prepare.output_bytes  # which layer a's backward reads


OPTIMIZERS = {
    "sgd": (optax.sgd(0.1), 0, 0),
    "momentum": (optax.sgd(0.1, momentum=0.9), 1, 0),
    "adam": (ADAM, 2, 4),
    "clip, adamw, schedule": (
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.adamw(optax.linear_schedule(1e-3, 0.0, 10)),
        ),
        2,
        8,
    ),
}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_optimizer_state_belongs_to_the_layers_whose_parameters_it_follows(name):
    optimizer, copies, shared = OPTIMIZERS[name]
    # Names that occur in each other's paths: only whole paths may match.
    params = jax.tree.map(
        lambda n: jax.ShapeDtypeStruct((n,), jnp.float32),
        {"a": {"b": {"w": 3}}, "b": {"w": 5}, "w": {"mu": 7}, "empty": {}},
    )
    sizes, rest = optimizer_sizes(optimizer, params)
    assert sizes == {name: copies * size_bytes(tree) for name, tree in params.items()}
    assert rest == shared


def test_gpt2_is_profiled_without_making_its_weights():
    job = TrainingJob(zoo.gpt2(), losses.softmax_cross_entropy, ADAM, 2)
    tokens = np.zeros((2, 1024), np.int32)
    live = sum(array.nbytes for array in jax.live_arrays())
    made = profile(job, CROWD, (tokens, tokens))
    assert sum(array.nbytes for array in jax.live_arrays()) - live < 2**20
    assert sum(layer.parameter_count for layer in made.layers) == 124_439_808
    block, head = made.layers[1], made.layers[-1]
    assert made.layers[2].forward_flops == block.forward_flops
    products = 2048 * 2.0 * 12 * 768**2 + 2 * 2 * 2.0 * 1024**2 * 768
    assert block.forward_flops == pytest.approx(products, rel=0.05)
    assert block.backward_flops == pytest.approx(2 * products, rel=0.05)
    assert head.parameter_bytes == head.optimizer_bytes == 0  # tied


def test_a_job_that_cannot_run_has_no_profile():
    job = TrainingJob(zoo.mlp(), losses.mean_squared_error, ADAM, 4)
    with pytest.raises(errors.JobError, match="targets"):
        profile(job, CROWD, (np.zeros((4, 8), np.float32), np.zeros(4, np.float32)))
