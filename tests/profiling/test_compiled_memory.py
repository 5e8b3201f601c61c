"""Memory that the compiler tells of, against what can be reckoned by hand."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from crowdmesh_jax.core import Crowd, DeviceId, Stage, stage_memory
from crowdmesh_jax.core.memory import PROGRAM_OP_BYTES
from crowdmesh_jax.model import Layer, StagedModel, TrainingJob, losses
from crowdmesh_jax.profiling import profile
from crowdmesh_jax.profiling.compiled import instructions, temp_bytes

ROWS, WIDTH, FLOAT = 8, 256, 4
CROWD = Crowd.local()


def made(layers, optimizer=None, **options):
    x = np.zeros((ROWS, WIDTH), np.float32)
    return made_of(layers, x, optimizer, **options)


def made_of(layers, x, optimizer=None, **options):
    model = StagedModel.from_linen(layers)
    job = TrainingJob(model, losses.mean_squared_error, optimizer or optax.sgd(0.1), len(x))
    return profile(job, CROWD, (x, x), **options)


def test_a_program_that_must_hold_an_array_between_two_products_is_told_so():
    def twice(x, a):
        return jnp.sin(x @ a) @ a

    big = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    compiled = jax.jit(twice).lower(big, big).compile()
    assert 512 * 512 * FLOAT <= temp_bytes(compiled) <= 2.1 * 512 * 512 * FLOAT


def test_a_dense_layers_backward_holds_its_new_gradient_beside_the_old():
    made_dense = made([nn.Dense(WIDTH, use_bias=False)] * 2, memory=True)
    assert made_dense.memory_source == "compiled"
    layer = made_dense.layers[1]
    by_hand = FLOAT * (WIDTH * WIDTH + 2 * ROWS * WIDTH)
    assert layer.temp_bytes == pytest.approx(by_hand, rel=0.1)


def test_an_update_in_place_needs_next_to_nothing_but_the_clipped_gradients():
    parameter_bytes = 2 * FLOAT * WIDTH * WIDTH
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    for optimizer, copies in ((optax.adam(1e-3), 0), (optax.sgd(0.1), 0), (clipped, 1)):
        found = made([nn.Dense(WIDTH, use_bias=False)] * 2, optimizer, memory=True)
        needs = sum(layer.update_temp_bytes for layer in found.layers)
        assert needs == pytest.approx(copies * parameter_bytes, abs=0.05 * parameter_bytes)


def test_the_estimate_without_compiling_is_near_the_compilers_for_dense_layers():
    layers = [nn.Dense(WIDTH), nn.relu, nn.Dense(WIDTH)]
    guessed = made(layers, optax.adam(1e-3))
    told = made(layers, optax.adam(1e-3), memory=True)
    assert guessed.memory_source == "analytic"
    assert guessed.layers[0].temp_bytes == pytest.approx(told.layers[0].temp_bytes, rel=0.1)
    assert guessed.layers[2].temp_bytes == pytest.approx(told.layers[2].temp_bytes, rel=0.1)


def test_a_stage_needs_room_for_one_layer_at_a_time_or_for_the_whole_update():
    found = made([nn.Dense(WIDTH)] * 3, memory=True)
    stage = Stage(device=DeviceId("d"), first_layer=0, last_layer=2)

    def needs(update_temp_bytes):
        layers = [replace(each, update_temp_bytes=update_temp_bytes) for each in found.layers]
        changed = replace(found, layers=tuple(layers))
        return stage_memory(changed, stage, stage_index=0, num_stages=1, in_flight=1)

    one = max(layer.temp_bytes for layer in found.layers)
    assert needs(0).working_bytes == one
    # When the update runs, the stash is gone.
    assert needs(one + 1000).working_bytes == 3 * (one + 1000) - needs(0).stash_bytes


def test_a_borrowed_parameter_counts_where_its_owner_is_not():
    def init(key, x):
        return {"w": jnp.ones((WIDTH, WIDTH))}, {}

    def apply(params, state, x, key, train):
        return x @ params["w"], state, None

    def no_init(key, x):
        return {}, {}

    layers = (
        Layer("owner", init, apply),
        Layer("between", init, apply),
        Layer("borrower", no_init, apply, borrows={"w": ("owner", "w")}),
    )
    x = np.zeros((ROWS, WIDTH), np.float32)
    job = TrainingJob(StagedModel(layers), losses.mean_squared_error, optax.sgd(0.1), ROWS)
    found = profile(job, CROWD, (x, x))
    weight = FLOAT * WIDTH * WIDTH
    assert found.layers[2].borrows == (("owner", weight),)

    def parts(first, last, index, count):
        stage = Stage(device=DeviceId("d"), first_layer=first, last_layer=last)
        return stage_memory(found, stage, stage_index=index, num_stages=count, in_flight=1)

    apart, alone = parts(2, 2, 2, 3), parts(0, 2, 0, 1)
    assert (apart.parameter_bytes, apart.gradient_bytes) == (weight, weight)
    assert alone.parameter_bytes == 2 * weight
    boundary = FLOAT * ROWS * WIDTH
    assert apart.credit_bytes == 2 * 2 * boundary + weight
    assert parts(0, 0, 0, 2).credit_bytes == 2 * 2 * boundary + weight, "what it lends travels too"
    assert parts(1, 1, 1, 3).credit_bytes == 2 * 4 * boundary


def test_programs_of_many_instructions_hold_more_than_those_of_few():
    one = made([nn.Dense(WIDTH)], memory=True)
    convolutions = [nn.Conv(8, (3, 3)), nn.BatchNorm(use_running_average=True), nn.relu]
    image = np.zeros((2, 8, 8, 8), np.float32)
    many = made_of([*convolutions * 4], image, memory=True)
    guessed = made_of([*convolutions * 4], image)

    def held(found):
        stage = Stage(device=DeviceId("d"), first_layer=0, last_layer=len(found.layers) - 1)
        memory = stage_memory(found, stage, stage_index=0, num_stages=1, in_flight=1)
        assert memory.program_bytes == PROGRAM_OP_BYTES * sum(la.program_ops for la in found.layers)
        return memory.program_bytes

    assert held(many) > 4 * held(one) > 0
    assert held(guessed) == pytest.approx(held(many), rel=0.6)


def test_instructions_are_counted_where_the_program_begins():
    def chain(x):
        for _ in range(5):
            x = jnp.sin(x @ x)
        return x

    small = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    assert 5 < instructions(jax.jit(chain).lower(small).compile()) < 25
