"""Layers that cannot be cut out or exported are refused by name, before anything runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crowdmesh_jax import errors
from crowdmesh_jax.model import Layer, StagedModel

X = jax.ShapeDtypeStruct((2, 3), jnp.float32)


def nothing(key, x):
    return {}, {}


def same(params, state, x, key, train):
    return x, state, None


def refused(layer, match, kind=errors.UnsupportedLayerError):
    before = Layer("before", nothing, same)
    with pytest.raises(kind, match=match) as caught:
        StagedModel((before, layer)).specs(X)
    assert f"layer 1 {layer.name!r}" in str(caught.value)


def test_state_that_grows():
    def apply(params, state, x, key, train):
        return x, {"rows": jnp.concatenate([state["rows"], x])}, None

    layer = Layer("memory", lambda key, x: ({}, {"rows": jnp.zeros((2, 3))}), apply)
    refused(layer, r"state leaf 'rows' changes from float32\[2,3\] to float32\[4,3\]")


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ({"n": jnp.zeros((), jnp.float32)}, r"'n' changes from int32\[\] to float32\[\]"),
        ({}, r"'n' changes from int32\[\] to nothing"),
        ({"n": jnp.zeros((), jnp.int32), "m": jnp.ones(1)}, "'m' changes from nothing to"),
    ],
)
def test_state_that_changes_dtype_or_leaves(after, told):
    layer = Layer(
        "counter",
        lambda key, x: ({}, {"n": jnp.zeros((), jnp.int32)}),
        lambda params, state, x, key, train: (x, after, None),
    )
    refused(layer, told)


@pytest.mark.parametrize(
    ("leaf", "told"),
    [
        (jnp.arange(3), "parameter leaf 'table/w' is int32"),
        (3.0, "parameter leaf 'table/w' is a float, no array"),
        ("relu", "parameter leaf 'table/w' is a str, no array"),
        (np.zeros(2, bool), "parameter leaf 'table/w' is bool"),
    ],
)
def test_parameters_that_cannot_be_trained(leaf, told):
    refused(Layer("odd", lambda key, x: ({"table": {"w": leaf}}, {}), same), told)


def test_keys_in_state():
    layer = Layer("dice", lambda key, x: ({}, {"key": key}), same)
    refused(layer, "state leaf 'key' is a key<fry>, which cannot travel")


@pytest.mark.parametrize("kind", ["parameter", "state"])
def test_init_that_reads_data(kind):
    def init(key, x):
        made = {"shape": jnp.zeros(x.shape[-1]), "mean": jnp.mean(x, axis=0)}
        return (made, {}) if kind == "parameter" else ({}, made)

    refused(Layer("whiten", init, same), f"its {kind} leaf 'mean' depends on the input's numbers")


@pytest.mark.parametrize("name", ["print", "pure", "io"])
@pytest.mark.parametrize("nested", [False, True])
def test_callbacks_into_python(name, nested):
    def call(x):
        if name == "print":
            jax.debug.print("{}", x.sum())
            return x
        if name == "pure":
            return jax.pure_callback(np.sin, X, x)
        return jax.experimental.io_callback(np.sin, X, x)

    def apply(params, state, x, key, train):
        y = jax.lax.cond(x.sum() > 0, call, jnp.cos, x) if nested else call(x)
        return y, state, None

    refused(Layer("spy", nothing, apply), "calls back into Python")


def test_branches_on_numbers():
    def apply(params, state, x, key, train):
        return (x if x.sum() > 0 else -x), state, None

    refused(Layer("branch", nothing, apply), r"jnp\.where")


def test_an_auxiliary_loss_that_is_no_scalar():
    refused(Layer("aux", nothing, lambda p, s, x, k, t: (x, s, x)), "must be a scalar")


def test_outputs_that_are_no_arrays():
    refused(Layer("void", nothing, lambda p, s, x, k, t: ({}, s, None)), "holds no array")
    refused(Layer("key", nothing, lambda p, s, x, k, t: (k, s, None)), "cannot travel")


def test_failures_that_are_no_misfit_keep_their_cause():
    def apply(params, state, x, key, train):
        raise ZeroDivisionError("a bug of the layer")

    refused(
        Layer("buggy", nothing, apply),
        "apply failed: ZeroDivisionError: a bug of the layer",
        errors.ModelError,
    )


def test_init_that_returns_no_pair():
    refused(Layer("short", lambda key, x: {}, same), "must return", errors.ModelError)
