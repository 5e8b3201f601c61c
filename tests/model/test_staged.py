"""Chains: shapes, initial values, running in one piece and in parts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from support.families import family

from crowdmesh_jax import errors
from crowdmesh_jax.model import Layer, StagedModel
from crowdmesh_jax.model.trees import signature, spec_of


def dense(name, width, borrows=None):
    def init(key, x):
        return {"w": jax.random.normal(key, (x.shape[-1], width))}, {}

    def apply(params, state, x, key, train):
        return x @ params["w"], state, None

    return Layer(name, init, apply, borrows or {})


def x_spec(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("name", ["gpt2", "moe", "nnx_batchnorm", "unet_skip"])
def test_a_cut_anywhere_gives_what_the_whole_chain_gives(name):
    kind = family(name)
    model, (x, _) = kind.model, kind.batch(2)
    specs = model.specs(x)
    rng = np.random.default_rng(0)
    params, state = jax.tree.map(
        lambda s: np.abs(rng.normal(size=s.shape)).astype(s.dtype), (specs.params, specs.state)
    )
    work = {"seed": 1, "step": 2, "microbatch": 3, "train": True}
    whole = model.apply(params, state, x, **work)
    last = len(model.layers) - 1
    cut = last // 2
    first_names = [layer.name for layer in model.layers[: cut + 1]]
    head, tail = (
        {n: t for n, t in params.items() if (n in first_names) == own} for own in (True, False)
    )
    y, state0, aux0 = model.apply_layers(0, cut, head, state, x, **work)
    lent = {
        (owner, path): params[owner][path]
        for layer in model.layers[cut + 1 :]
        for owner, path in layer.borrows.values()
    }
    y, state1, aux1 = model.apply_layers(cut + 1, last, tail, state, y, borrowed=lent, **work)
    aux = None if whole[2] is None else (aux0 or 0) + (aux1 or 0)
    for ours, theirs in zip(
        jax.tree.leaves((y, {**state0, **state1}, aux)), jax.tree.leaves(whole), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_specs_are_the_shapes_of_what_runs():
    kind = family("moe")
    x = kind.batch(2)[0]
    specs = kind.model.specs(x)
    params, state = kind.model.init(0, x)
    y, after, aux = kind.model.apply(params, state, x, seed=0, step=0, microbatch=0, train=True)
    assert signature(spec_of((params, state, y))) == signature((specs.params, specs.state, specs.y))
    assert signature(spec_of(after)) == signature(specs.state)
    assert [row.has_aux for row in specs.layers] == [False, True, True, False]
    assert aux.dtype == jnp.float32
    assert not kind.model.specs(x, train=False).has_aux


def test_like_layers_start_from_different_numbers_and_the_seed_fixes_them():
    model = StagedModel((dense("a", 4), dense("b", 4), dense("c", 4)))
    first, _ = model.init(0, x_spec(2, 4))
    again, _ = StagedModel(model.layers).init(0, x_spec(3, 4))
    other, _ = model.init(1, x_spec(2, 4))
    a, b = np.asarray(first["a"]["w"]), np.asarray(first["b"]["w"])
    assert (a != b).all()
    np.testing.assert_array_equal(a, again["a"]["w"])
    assert (a != np.asarray(other["a"]["w"])).all()


def test_a_layer_has_one_program_for_init_however_often_it_stands_in_the_chain(monkeypatch):
    compiled = []
    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, **k: compiled.append(f) or jit(f, **k))
    StagedModel((dense("a", 4), dense("b", 4), dense("c", 3))).init(0, x_spec(2, 4))
    assert len(compiled) == 2


def test_a_module_that_stands_in_several_places_is_traced_once_and_has_parameters_in_each():
    calls = []

    class Counted(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            calls.append(x.shape)
            return nn.Dense(self.width)(x)

    block = Counted(4)
    model = StagedModel.from_linen([Counted(4), block, block, block], ["a", "b", "c", "d"])
    specs = model.specs(x_spec(2, 4))
    assert len(calls) == 4  # init and apply of `a`, the same of `b`
    assert specs.parameter_count == 4 * (4 * 4 + 4)
    params, _ = model.init(0, x_spec(2, 4))
    kernels = [np.asarray(params[name]["Dense_0"]["kernel"]) for name in "bcd"]
    assert not any((one == other).any() for one, other in itertools.combinations(kernels, 2))


def test_one_module_before_and_after_a_change_of_shape_is_traced_for_each():
    block = nn.Dense(4)
    model = StagedModel.from_linen([block, block, block], ["a", "b", "c"])
    specs = model.specs(x_spec(2, 6))
    assert [row.params["kernel"].shape for row in specs.layers] == [(6, 4), (4, 4), (4, 4)]


def test_weak_types_end_at_each_layer():
    model = StagedModel.from_functions(
        [lambda x: 2.0, lambda x: jnp.ones(3, jnp.bfloat16) * x], ["number", "scale"]
    )
    assert model.specs(x_spec(3)).y.dtype == jnp.float32  # a weak 2.0 would give bfloat16


def test_borrowed_leaves_are_the_owners():
    def init(key, x):
        return {}, {}

    def apply(params, state, x, key, train):
        return x @ params["table"].T, state, None

    tied = Layer("head", init, apply, {"table": ("embed", "w")})
    model = StagedModel((dense("embed", 5), tied))
    specs = model.specs(x_spec(2, 3))
    assert specs.layer("head").borrowed["table"].shape == (3, 5)
    assert specs.parameter_count == 15
    params, state = model.init(0, x_spec(2, 3))
    assert params["head"] == {}
    x = np.ones((2, 3), np.float32)
    y, _, _ = model.apply(params, state, x, seed=0, step=0, microbatch=0, train=True)
    w = params["embed"]["w"]
    np.testing.assert_allclose(y, x @ w @ w.T, rtol=1e-5)


def test_state_is_updated_in_training_only():
    def apply(params, state, x, key, train):
        return x, {"seen": state["seen"] + 1}, None

    counter = Layer("count", lambda key, x: ({}, {"seen": jnp.zeros((), jnp.int32)}), apply)
    model = StagedModel((counter,))
    params, state = model.init(0, x_spec(1))
    for train, seen in ((True, 1), (False, 0)):
        _, after, _ = model.apply(
            params, state, jnp.ones(1), seed=0, step=0, microbatch=0, train=train
        )
        assert int(after["count"]["seen"]) == seen


def test_chains_that_are_none_are_refused():
    with pytest.raises(errors.ModelError, match="no layers"):
        StagedModel(())
    with pytest.raises(errors.ModelError, match="layers 0 and 2 are both called 'a'"):
        StagedModel((dense("a", 1), dense("b", 1), dense("a", 1)))
    with pytest.raises(errors.ModelError, match="from_linen"):
        StagedModel((nn.Dense(3),))
    with pytest.raises(errors.ModelError, match="must start with a letter"):
        dense("2nd layer", 1)
    with pytest.raises(errors.ModelError, match="1 names for 2 layers"):
        StagedModel.from_functions([jnp.sin, jnp.cos], ["one"])


def test_borrows_of_later_unknown_and_missing_leaves_are_refused():
    def borrower(owner, path):
        return dense("head", 2, {"table": (owner, path)})

    for owner in ("nobody", "head", "late"):
        with pytest.raises(errors.ModelError, match=f"'{owner}' is no earlier layer; known: first"):
            StagedModel((dense("first", 2), borrower(owner, "w"), dense("late", 2)))
    model = StagedModel((dense("first", 2), borrower("first", "kernel")))
    with pytest.raises(errors.ModelError, match=r"no leaf 'kernel'; known: 'w'"):
        model.specs(x_spec(1, 2))
    with pytest.raises(errors.ModelError, match="no linen layer 'nobody'"):
        StagedModel.from_linen([nn.Dense(2)], borrows={"nobody": {"kernel": ("Dense_0", "k")}})


def test_a_misfit_names_both_layers_and_the_shapes():
    fixed = Layer(
        "fixed",
        lambda key, x: ({"w": jnp.zeros((7, 2))}, {}),
        lambda params, state, x, key, train: (x @ params["w"], state, None),
    )
    with pytest.raises(errors.ShapeMismatchError, match="CM-121") as caught:
        StagedModel((dense("wide", 5), fixed)).specs(x_spec(3, 4))
    told = str(caught.value)
    assert "layer 1 'fixed'" in told
    assert "layer 0 'wide'" in told
    assert "float32[3,5]" in told
    with pytest.raises(errors.ShapeMismatchError, match="cannot take the model's input"):
        StagedModel((fixed,)).specs(x_spec(3, 4))
    with pytest.raises(errors.ShapeMismatchError, match="Conv_1"):
        StagedModel.from_linen([nn.Dense(3), nn.Conv(2, (3, 3, 3))]).specs(x_spec(2, 4))


@pytest.mark.parametrize(
    ("tree", "told", "first"),
    [
        (
            {"image": x_spec(3, 4), "mask": x_spec(3, 4)},
            "a dict of 2 arrays {image: float32[3,4], mask: float32[3,4]}",
            "x['image']",
        ),
        ((x_spec(3, 4), x_spec(3)), "a tuple of 2 arrays {0: float32[3,4], 1: float32[3]}", "x[0]"),
        ([x_spec(3, 4)], "a list of 1 array {0: float32[3,4]}", "x[0]"),
    ],
)
def test_a_tree_for_a_layer_that_takes_one_array_is_told_as_such(tree, told, first):
    """A tuple was said to be read in Python ("use jnp.where"): NumPy had tried to stack it."""
    for layers in ([nn.Dense(3)], [lambda x: x, nn.Dense(3)], [nn.Sequential([nn.Dense(3)])]):
        with pytest.raises(errors.ShapeMismatchError, match="CM-121") as caught:
            StagedModel.from_linen(layers).specs(tree)
        assert f"layer {len(layers) - 1} '{type(layers[-1]).__name__}" in str(caught.value)
        assert f"given  {told}\n" in str(caught.value)
        assert f"`lambda x: {first}` say" in str(caught.value)


def test_an_unknown_layer_name_tells_the_known_ones():
    model = StagedModel((dense("a", 1),))
    assert model.index("a") == 0
    with pytest.raises(errors.ModelError, match="no layer 'b'; known: a"):
        model.index("b")
    with pytest.raises(errors.ModelError, match="no layer 'b'; known: a"):
        model.specs(x_spec(1, 1)).layer("b")
