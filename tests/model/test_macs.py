"""Multiply-accumulates are those of arithmetic on paper, and of the papers."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax

from crowdmesh_jax.model import StagedModel, zoo
from crowdmesh_jax.model.macs import multiply_accumulates


def macs_of(function, *shapes):
    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return multiply_accumulates(jax.make_jaxpr(function)(*specs).jaxpr)


def conv(x, kernel, stride=1, groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def test_a_matrix_product_counts_rows_times_columns_times_what_is_summed():
    assert macs_of(jnp.matmul, (3, 5), (5, 7)) == 3 * 5 * 7
    batched = macs_of(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (2, 3, 5), (2, 7, 5))
    assert batched == 2 * 3 * 5 * 7


def test_a_convolution_counts_outputs_times_taps():
    assert macs_of(conv, (2, 8, 8, 3), (3, 3, 3, 16)) == 2 * 8 * 8 * 16 * 3 * 3 * 3
    halved = macs_of(lambda x, k: conv(x, k, stride=2), (2, 8, 8, 3), (3, 3, 3, 16))
    assert halved == 2 * 4 * 4 * 16 * 3 * 3 * 3


def test_a_depthwise_convolution_counts_one_channel_per_output():
    assert macs_of(lambda x, k: conv(x, k, groups=6), (1, 8, 8, 6), (3, 3, 1, 6)) == 8 * 8 * 6 * 9


def test_loops_count_each_turn_and_branches_the_dearest():
    def loop(x, w):
        return lax.scan(lambda x, _: (x @ w, None), x, length=4)[0]

    assert macs_of(loop, (3, 5), (5, 5)) == 4 * 3 * 5 * 5

    def branch(x, w):
        return lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert macs_of(branch, (3, 5), (5, 5)) == 2 * 3 * 5 * 5
    assert macs_of(jax.jit(jax.checkpoint(jnp.matmul)), (3, 5), (5, 7)) == 3 * 5 * 7
    assert macs_of(jax.nn.relu, (3, 5)) == 0


def test_layers_and_models_know_theirs():
    model = StagedModel.from_linen([nn.Dense(4), nn.relu, nn.Dense(2)])
    specs = model.specs(jax.ShapeDtypeStruct((3, 5), jnp.float32))
    assert [layer.macs for layer in specs.layers] == [3 * 5 * 4, 0, 3 * 4 * 2]
    assert specs.macs == 84


@pytest.mark.parametrize(
    ("name", "published"),
    [("resnet18", 1.814e9), ("resnet50", 4.089e9), ("mobilenet_v2", 0.301e9), ("ds_cnn", 2.7e6)],
)
def test_the_zoo_costs_what_is_published(name, published):
    """torchvision's figures at 224 x 224; for DS-CNN-S half the operations of the paper (5.4 M)."""
    entry = zoo.models()[name]
    assert entry.build().specs(entry.input_spec(1)).macs == pytest.approx(published, rel=0.02)
