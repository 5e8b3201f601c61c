"""Predictions of a trained model: every row once, compiled once."""

import numpy as np
import pytest

import crowdmesh_jax as cm


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
