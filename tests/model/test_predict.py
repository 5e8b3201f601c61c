"""Predictions of a trained model: every row once, compiled once."""

import numpy as np
import pytest
from flax import linen as nn

import crowdmesh_jax as cm
from crowdmesh_jax import errors


@pytest.fixture(scope="module")
def trained():
    model = cm.zoo.lenet(classes=3, width=2)
    x = np.random.default_rng(0).normal(size=(7, 8, 8, 1)).astype(np.float32)
    return model, *model.init(0, x), x


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_every_row_comes_once_and_in_order_whatever_the_batch(trained, rows):
    model, params, state, x = trained
    whole = model.predict(params, state, x)
    made = model.predict_rows(params, state, x, batch_size=rows)
    np.testing.assert_allclose(made, whole, rtol=1e-4, atol=1e-6)


def test_trees_stay_trees():
    double = cm.StagedModel.from_functions([lambda x: {"twice": x["a"] * 2, "b": (x["b"],)}])
    x = {"a": np.arange(5.0, dtype=np.float32), "b": np.arange(5)}
    made = double.predict_rows(
        {"layer_0": {}} | {double.layers[0].name: {}}, {double.layers[0].name: {}}, x, batch_size=2
    )
    np.testing.assert_array_equal(made["twice"], 2 * x["a"])
    np.testing.assert_array_equal(made["b"][0], x["b"])


def test_a_second_call_compiles_nothing(trained):
    model, params, state, x = trained
    model.predict_rows(params, state, x, batch_size=2)
    compiled = model._predict._cache_size()
    model.predict_rows(params, state, x[:4], batch_size=2)
    assert model._predict._cache_size() == compiled


def test_rows_of_another_shape_are_refused_with_the_layer_and_both_shapes():
    """Flax told of a kernel, and of a scope that the user never wrote."""
    made = cm.StagedModel.from_linen([nn.relu, nn.Dense(4), nn.Dense(3)])
    params, state = made.init(0, np.zeros((2, 6), np.float32))
    wide = np.zeros((5, 7), np.float32)
    with pytest.raises(errors.ShapeMismatchError, match="CM-121") as caught:
        made.predict_rows(params, state, wide)
    told = str(caught.value)
    assert "layer 1 'Dense_1' cannot take the output of layer 0 'relu_0'" in told
    assert "given  float32[5,7]\n" in told
    assert "wanted float32[2,6], with any rows\n" in told
    fresh = cm.StagedModel.from_linen([nn.relu, nn.Dense(4), nn.Dense(3)])
    with pytest.raises(errors.ShapeMismatchError, match=r"given  float32\[5,7\]\n  reason"):
        fresh.predict_rows(params, state, wide)  # it has not seen the right shape


def test_what_fails_for_another_reason_keeps_its_own_error(trained, monkeypatch):
    model, params, state, x = trained

    def fail(*args):
        raise MemoryError("no room")

    monkeypatch.setitem(model.__dict__, "_predict", fail)
    with pytest.raises(MemoryError, match="no room"):
        model.predict_rows(params, state, x)
