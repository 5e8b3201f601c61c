"""Flax modules and functions as layers do what they do by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from crowdmesh_jax import errors
from crowdmesh_jax.model import StagedModel

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def run(model, *, train, step=0, microbatch=0, params=None, state=None):
    made = model.init(0, X)
    return model.apply(
        params or made[0],
        state or made[1],
        X,
        seed=0,
        step=step,
        microbatch=microbatch,
        train=train,
    )


def unchanged(ours, theirs):
    assert jax.tree.leaves(theirs)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


class Mixed(nn.Module):
    """BatchNorm, dropout, noise of another name, sown losses and intermediates."""

    flag: str = "train"
    noise: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        if self.noise and train:
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        self.sow("losses", "norm", jnp.sum(x * 0 + 1))
        self.sow("losses", "more", 2.0)
        self.sow("intermediates", "seen", x)
        return x


def test_linen_modules_train_with_state_dropout_and_sown_losses():
    model = StagedModel.from_linen([Mixed()])
    y, state, aux = run(model, train=True)
    assert float(aux) == X.size + 2
    assert list(state["Mixed_0"]) == ["batch_stats"]
    mean = state["Mixed_0"]["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, X.mean(0) / 2, atol=1e-6)
    assert 0.2 < (np.asarray(y) == 0).mean() < 0.8


def test_linen_modules_evaluate_as_flax_does_and_leave_state_alone():
    model = StagedModel.from_linen([Mixed()])
    params, state = model.init(0, X)
    y, after, aux = run(model, train=False)
    assert aux is None
    unchanged(after, state)
    variables = {"params": params["Mixed_0"], **state["Mixed_0"]}
    np.testing.assert_array_equal(y, Mixed().apply(variables, X, train=False))


def test_any_rng_name_draws_from_the_layers_key():
    noisy = StagedModel.from_linen([Mixed(noise=True)])
    first, again, later = (run(noisy, train=True, step=s)[0] for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(later)).all()


@pytest.mark.parametrize("flag", ["train", "training", "deterministic"])
def test_the_mode_flag_is_found_by_name(flag):
    class Told(nn.Module):
        if flag == "train":

            def __call__(self, x, *, train):
                return x * train

        elif flag == "training":

            def __call__(self, x, training):
                return x * training

        else:

            def __call__(self, x, deterministic=None):
                return x * (not deterministic)

    model = StagedModel.from_linen([Told()])
    np.testing.assert_array_equal(run(model, train=True)[0], X)
    np.testing.assert_array_equal(run(model, train=False)[0], 0 * X)


def test_flags_fixed_when_the_module_was_built_stay():
    model = StagedModel.from_linen(
        [nn.Dropout(0.5, deterministic=True), nn.BatchNorm(use_running_average=True), nn.relu]
    )
    y, _, _ = run(model, train=True)
    np.testing.assert_allclose(y, np.maximum(X, 0), rtol=1e-4)


def test_names_come_from_the_list_the_module_or_its_class():
    model = StagedModel.from_linen([nn.Dense(2), nn.Dense(2, name="mine"), nn.relu, lambda x: x])
    assert [layer.name for layer in model.layers] == ["Dense_0", "mine", "relu_2", "layer_3"]
    named = StagedModel.from_linen([nn.Dense(2), nn.relu], ["a", "b"])
    assert [layer.name for layer in named.layers] == ["a", "b"]


def test_a_linen_parameter_can_be_borrowed():
    model = StagedModel.from_linen(
        [nn.Dense(4, use_bias=False), nn.Dense(4, use_bias=False)],
        ["a", "b"],
        borrows={"b": {"kernel": ("a", "kernel")}},
    )
    params, _ = model.init(0, X)
    assert params["b"] == {}
    w = params["a"]["kernel"]
    np.testing.assert_allclose(run(model, train=True)[0], X @ w @ w, rtol=1e-4, atol=1e-5)


def block(rngs):
    return nnx.Sequential(
        nnx.Linear(4, 5, rngs=rngs), nnx.BatchNorm(5, momentum=0.5, rngs=rngs),
        nnx.Dropout(0.5, rngs=rngs),
    )  # fmt: skip


def test_nnx_rng_state_is_made_anew_so_that_results_depend_on_the_work_only():
    model = StagedModel.from_nnx([block, lambda rngs: nnx.Dropout(0.3, rngs=rngs)])
    assert all("rng" not in path for path in str(model.specs(X).state).split("'"))
    first, again = run(model, train=True, step=3)[0], run(model, train=True, step=3)[0]
    np.testing.assert_array_equal(first, again)
    for other in ({"step": 4}, {"step": 3, "microbatch": 1}):
        assert (np.asarray(run(model, train=True, **other)[0]) != np.asarray(first)).any()


def test_nnx_modules_evaluate_as_flax_does():
    model = StagedModel.from_nnx([block], ["block"])
    _, state, _ = run(model, train=True)
    params, _ = model.init(0, X)
    y, after, _ = run(model, train=False, params=params, state=state)
    unchanged(after, state)
    linear, stats = params["block"]["layers"]["0"], state["block"]["layers"]["1"]
    hidden = X @ linear["kernel"] + linear["bias"]
    np.testing.assert_allclose(
        y, (hidden - stats["mean"]) / np.sqrt(stats["var"] + 1e-5), rtol=1e-4, atol=1e-5
    )


def test_nnx_state_of_the_caller_is_never_written_to():
    model = StagedModel.from_nnx([block], ["block"])
    params, state = model.init(0, X)
    held = jax.tree.map(np.array, state)
    run(model, train=True, params=params, state=held)
    unchanged(held, state)


def test_nnx_factories_start_from_the_seed_and_modules_from_what_they_hold():
    module = nnx.Linear(4, 3, rngs=nnx.Rngs(5))
    model = StagedModel.from_nnx([module, lambda rngs: nnx.Linear(3, 3, rngs=rngs)], ["a", "b"])
    zero, one = model.init(0, X)[0], model.init(1, X)[0]
    np.testing.assert_array_equal(zero["a"]["kernel"], module.kernel[...])
    np.testing.assert_array_equal(one["a"]["kernel"], module.kernel[...])
    assert (np.asarray(zero["b"]["kernel"]) != np.asarray(one["b"]["kernel"])).all()


def test_nnx_sown_losses_are_auxiliary_losses():
    class Sown(nnx.Module):
        def __call__(self, x):
            self.sow(nnx.Intermediate, "losses", jnp.sum(x))
            self.sow(nnx.Intermediate, "seen", x)
            return x

    _, state, aux = run(StagedModel.from_nnx([Sown()], ["s"]), train=True)
    np.testing.assert_allclose(aux, X.sum(), rtol=1e-5)
    assert not jax.tree.leaves(state)


def test_a_factory_that_makes_no_module_is_refused():
    with pytest.raises(errors.ModelError, match="returned dict"):
        StagedModel.from_nnx([lambda rngs: {}], ["odd"])


def test_functions_take_params_key_and_train_where_they_ask_for_them():
    def init(key, x):
        return {"w": jnp.full(x.shape[-1], 2.0)}

    def scale(params, x, train):
        return x * params["w"][None] * (1 if train else -1)

    def noise(x, key):
        return x + jax.random.normal(key, x.shape)

    model = StagedModel.from_functions([jnp.tanh, (init, scale)], ["squash", "scale"])
    np.testing.assert_allclose(run(model, train=True)[0], 2 * np.tanh(X), rtol=1e-5)
    np.testing.assert_allclose(run(model, train=False)[0], -2 * np.tanh(X), rtol=1e-5)
    noisy = StagedModel.from_functions([noise, noise], ["a", "b"])
    y = run(noisy, train=True)[0]
    assert (np.asarray(y) != np.asarray(run(noisy, train=True, step=1)[0])).all()


def test_what_is_no_layer_is_refused():
    with pytest.raises(errors.ModelError, match="layer 'layer_0': expected f"):
        StagedModel.from_functions([3])
    with pytest.raises(errors.ModelError, match="expected f"):
        StagedModel.from_linen([(jnp.sin, jnp.cos, jnp.tan)])
