"""Every model of the zoo trains a step over three stages exactly. Full depth, small widths and
inputs; agents in memory, since transports are the matrix's business."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from support.equality import assert_bit_equal

import crowdmesh_jax as cm

pytestmark = pytest.mark.system
STAGES, ROWS, MICROBATCHES = 3, 16, 4
SMALL = {
    "mlp": ({}, (8, 8, 1)),
    "lenet": ({"width": 4}, (8, 8, 1)),
    "resnet18": ({"classes": 10, "width": 8}, (64, 64, 3)),
    "resnet18_cifar": ({"width": 8}, (16, 16, 3)),
    "resnet50": ({"classes": 10, "width": 8}, (64, 64, 3)),
    "mobilenet_v2": ({"classes": 10, "width": 0.25}, (64, 64, 3)),
    "mobilenet_v2_cifar": ({"width": 0.25}, (16, 16, 3)),
    "ds_cnn": ({}, (49, 10, 1)),
    "har_cnn": ({"features": (16, 32, 32), "hidden": 64}, (128, 6)),
    "har_lstm": ({"features": 16}, (32, 6)),
    "gpt2": ({"vocab": 65, "context": 16, "width": 48}, (16,)),
    "gpt2_nano": ({"width": 32}, (16,)),
    "gpt2_test": ({}, (16,)),
}
"""Arguments and the shape of a row."""
ALWAYS = ("ds_cnn", "har_cnn")
"""Cheap enough for CI; the others run with `make exact`."""


def job_of(name: str) -> tuple[cm.TrainingJob, cm.ArraySource]:
    """Momentum, whose state after one step is the gradient itself."""
    arguments, row = SMALL[name]
    model = cm.zoo.build(name, **arguments)
    rng = np.random.default_rng(5)
    if len(row) == 1:
        inputs = rng.integers(0, 65, (ROWS, *row)).astype(np.int32)
        targets = np.roll(inputs, -1, axis=1)
    else:
        inputs = rng.normal(size=(ROWS, *row)).astype(np.float32)
        targets = rng.integers(0, 6, ROWS).astype(np.int32)
    optimizer = optax.sgd(0.05, momentum=0.9)
    job = cm.TrainingJob(
        model, cm.losses.softmax_cross_entropy, optimizer, ROWS, MICROBATCHES, seed=7
    )
    return job, cm.ArraySource(inputs, targets, ROWS, seed=3)


@pytest.fixture(scope="module")
def crew(compiled_cache):
    with cm.launch(cm.Crowd.local((1.0,) * STAGES), transport="memory") as agents:
        yield agents


def test_no_model_of_the_zoo_is_left_out():
    assert set(SMALL) == set(cm.zoo.models())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[
                pytest.mark.xdist_group(f"zoo-{name}"),
                *([] if name in ALWAYS else [pytest.mark.exact]),
            ],
        )
        for name in SMALL
    ],
)
def test_a_step_over_three_stages_is_a_step_in_one_process(name, crew, tmp_path):
    job, data = job_of(name)
    plan = cm.PipelinePlan.even(
        len(job.model.layers),
        [f"device-{index}" for index in range(STAGES)],
        microbatches=MICROBATCHES,
    )
    oracle = cm.reference(job, data, 1, plan=plan)
    result = cm.train(job, crew, data, steps=1, plan=plan, measure=False, runs_dir=tmp_path)
    assert_bit_equal(result, oracle)

    whole = cm.reference(job, data, 1)
    np.testing.assert_allclose(result.losses, whole.losses, rtol=1e-5)
    grads, wanted = gradients(result), gradients(whole)
    total = np.sqrt(sum(np.linalg.norm(leaf) ** 2 for leaf in wanted.values()))
    far = {
        path: float(np.linalg.norm(grads[path] - leaf) / total)
        for path, leaf in wanted.items()
        if np.linalg.norm(grads[path] - leaf) > 1e-5 * np.linalg.norm(leaf) + 1e-6 * total
    }
    assert not far, "gradients of one program differ by more than rounding"


def gradients(result) -> dict[str, np.ndarray]:
    """By path, float64: momentum starts at 0, so after a step it is the gradient."""
    leaves = jax.tree_util.tree_leaves_with_path(result.opt_state)
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves}
