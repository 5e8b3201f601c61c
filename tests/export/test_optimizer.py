"""Laws of the sliced optimizer: run piece by piece it is the whole update, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from crowdmesh_jax.export.optimizer import SlicedOptimizer, gradient_dtype, slice_optimizer

Params = dict[str, Any]
Cut = tuple[tuple[str, ...], ...]
LAYERS = ("embed", "block", "act", "head")
TWO: Cut = (("embed",), ("block", "act", "head"))
THREE: Cut = (("embed",), ("block", "act"), ("head",))
STEPS = 6
NAN_STEP = 3


def make_params(seed: int = 0, dtype: Any = np.float32) -> Params:
    rng = np.random.default_rng(seed)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "embed": {"kernel": array(5, 4), "bias": array(4)},
        "block": {"Dense_0": {"kernel": array(4, 4), "bias": array(1)}, "scale": array(4)},
        "act": {},
        "head": {"kernel": array(4, 3), "temperature": array(1)},
    }


def specs_of(params: Params) -> Params:
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    return {layer: shapes[layer] for layer in LAYERS}


def make_grads(params: Params, step: int, *, nan_step: int | None) -> Params:
    """Norms around 3, so that clipping to 1 bites; one NaN in one leaf where asked."""
    grads = make_params(100 + step, np.float32)
    grads = jax.tree.map(lambda g, p: g.astype(gradient_dtype(p.dtype)), grads, params)
    if step == nan_step:
        grads["block"]["scale"] = grads["block"]["scale"].at[1].set(jnp.nan)
    return grads


def keyed(role: str, tree: Params) -> dict[tuple[str, str, str], jax.Array]:
    return {
        (role, path[0].key, "/".join(p.key for p in path[1:])): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


class Stages:
    """Runs one step after another as the runtime would: each program sees its own stage only."""

    def __init__(
        self,
        sliced: SlicedOptimizer,
        params: Params,
        cut: Cut,
    ) -> None:
        self.cut = cut
        self.scalars = [sliced.scalars(stage) for stage in cut]
        self.reduce = sliced.reduce()
        self.updates = [sliced.update(stage) for stage in cut]
        programs = (*self.scalars, self.reduce, *self.updates)
        self.compiled = {id(p): jax.jit(p.fn) for p in programs if p is not None}
        state = sliced.init_arrays(params)
        self.env = {key: jnp.asarray(a) for key, a in state.items()} | keyed("param", params)

    def _run(self, program: Any, env: dict[Any, Any]) -> dict[Any, Any]:
        outputs = self.compiled[id(program)](*(env[leaf.key] for leaf in program.inputs))
        assert len(outputs) == len(program.outputs)
        for leaf, out in zip(program.outputs, outputs, strict=True):
            assert (out.shape, out.dtype.name) == (leaf.shape, leaf.dtype)
        return {leaf.key: out for leaf, out in zip(program.outputs, outputs, strict=True)}

    def step(self, grads: Params) -> None:
        grad_env = keyed("grad", grads)
        cut: dict[Any, Any] = {}
        own = []
        for stage, program in zip(self.cut, self.scalars, strict=True):
            visible = {
                key: a
                for key, a in (self.env | grad_env).items()
                if key[1] in stage or key[0] == "global"
            }
            own.append(visible)
            if program is not None:
                cut |= self._run(program, visible)
        globals_ = {key: a for key, a in self.env.items() if key[0] == "global"}
        made = self._run(self.reduce, cut | globals_) if self.reduce else {}
        shared = {key: a for key, a in made.items() if key[0] == "shared"}
        for visible, program in zip(own, self.updates, strict=True):
            self.env |= self._run(program, visible | shared)
        self.env |= {key: a for key, a in made.items() if key[0] == "global"}


def whole_step(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    @jax.jit
    def step(grads: Params, state: Any, params: Params) -> Any:
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def raw(leaf: Any) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def assert_same_bits(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    flat = jax.tree_util.tree_leaves_with_path(expected)
    for (path, want), got in zip(flat, jax.tree.leaves(actual), strict=True):
        want, got = raw(want), raw(got)
        assert want.dtype == got.dtype
        assert want.tobytes() == got.tobytes(), f"{jax.tree_util.keystr(path)}: {got} != {want}"


def assert_close(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(raw(got), raw(want), rtol=1e-5, atol=1e-6)


def assert_equals_whole(
    optimizer: optax.GradientTransformation,
    cut: Cut,
    *,
    dtype: Any = np.float32,
    same: Callable[[Any, Any], None] = assert_same_bits,
    nan_step: int | None = NAN_STEP,
) -> SlicedOptimizer:
    params = make_params(dtype=dtype)
    sliced = slice_optimizer(optimizer, specs_of(params))
    stages = Stages(sliced, params, cut)
    step = whole_step(optimizer)
    state = optimizer.init(params)
    for number in range(STEPS):
        grads = make_grads(params, number, nan_step=nan_step)
        params, state = step(grads, state, params)
        stages.step(grads)
        new = {leaf: array for leaf, array in stages.env.items() if leaf[0] == "param"}
        assert new.keys() == keyed("param", params).keys()
        same(new, keyed("param", params))
        same(sliced.assemble(stages.env), state)
    return sliced


def labels(params: Params) -> Params:
    """Labels that are also names of layers, to tempt the search for owners."""
    names = dict.fromkeys(params, "embed") | {"head": "slow"}
    return {
        layer: jax.tree.map(lambda _, name=names[layer]: name, tree)
        for layer, tree in params.items()
    }


def decay_mask(params: Params) -> Params:
    return jax.tree.map(lambda p: p.ndim > 1, params)


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10)
SEPARABLE: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-2),
    "adamw masked": lambda: optax.adamw(SCHEDULE, weight_decay=0.1, mask=decay_mask),
    "amsgrad": lambda: optax.amsgrad(1e-2),
    "nadam": lambda: optax.nadam(1e-2),
    "radam": lambda: optax.radam(1e-2),
    "adabelief": lambda: optax.adabelief(1e-2),
    "yogi": lambda: optax.yogi(1e-2),
    "rmsprop": lambda: optax.rmsprop(1e-2, momentum=0.9),
    "adagrad": lambda: optax.adagrad(1e-2),
    "lion": lambda: optax.lion(1e-3),
    "lamb": lambda: optax.lamb(1e-2, weight_decay=0.1),
    "lars": lambda: optax.lars(1e-2, weight_decay=0.1),
    "novograd": lambda: optax.novograd(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "sm3": lambda: optax.sm3(1e-2),
    "multi_transform": lambda: optax.multi_transform(
        {"embed": optax.adam(1e-2), "slow": optax.sgd(1e-3)}, labels
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(
        learning_rate=SCHEDULE, weight_decay=0.01
    ),
    "clip": lambda: optax.chain(optax.clip(0.1), optax.adam(1e-2)),
    "clip_by_block_rms": lambda: optax.chain(optax.clip_by_block_rms(0.1), optax.sgd(0.1)),
    "adaptive_grad_clip": lambda: optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    "MultiSteps": lambda: optax.MultiSteps(
        optax.adam(1e-2), every_k_schedule=2
    ).gradient_transformation(),
    "ema": lambda: optax.chain(optax.sgd(0.1), optax.ema(0.9)),
    "add_noise": lambda: optax.chain(
        optax.add_noise(0.1, 0.5, key=jax.random.key(7)), optax.sgd(0.1)
    ),
    "zero_nans": lambda: optax.chain(optax.zero_nans(), optax.adam(1e-2)),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2),
}
CLOSE = {"muon": lambda: optax.contrib.muon(1e-2)}
"""XLA fuses its matrix products differently in the whole: last bits differ."""
ONE_ROUND: dict[str, Callable[[], optax.GradientTransformation]] = {
    "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 2),
    "apply_if_finite of clip": lambda: optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), 2
    ),
    "MultiSteps of clip": lambda: optax.MultiSteps(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), every_k_schedule=2
    ).gradient_transformation(),
    "MultiSteps skips": lambda: optax.MultiSteps(
        optax.adam(1e-2), every_k_schedule=2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "normalize_by_update_norm": lambda: optax.chain(
        optax.normalize_by_update_norm(), optax.sgd(0.1)
    ),
    "prodigy": lambda: optax.contrib.prodigy(1.0),
    "dadapt": lambda: optax.contrib.dadapt_adamw(1.0),
}


@pytest.mark.parametrize("name", SEPARABLE)
def test_separable_optimizer_needs_no_exchange_and_equals_the_whole(name):
    sliced = assert_equals_whole(SEPARABLE[name](), TWO)
    assert sliced.cut_leaves == ()
    assert sliced.shared_leaves == ()
    assert all(sliced.scalars((layer,)) is None for layer in LAYERS)
    assert sliced.describe_global() is None


@pytest.mark.parametrize("name", CLOSE)
def test_separable_optimizer_of_matrices_equals_the_whole_to_rounding(name):
    sliced = assert_equals_whole(CLOSE[name](), TWO, same=assert_close)
    assert sliced.cut_leaves == ()


@pytest.mark.parametrize("name", ONE_ROUND)
def test_optimizer_with_one_exchange_equals_the_whole(name):
    sliced = assert_equals_whole(ONE_ROUND[name](), THREE)
    assert sliced.cut_leaves
    assert all(np.prod(leaf.shape) == 1 for leaf in sliced.cut_leaves)
    order = [LAYERS.index(leaf.layer) for leaf in sliced.cut_leaves]
    assert order == sorted(order)
    assert "per step" in (sliced.describe_global() or "")


def test_the_plan_changes_no_bit_of_a_clipped_adam():
    """One stage, stages of one layer each, and the whole agree."""
    for cut in ((LAYERS,), tuple((layer,) for layer in LAYERS)):
        assert_equals_whole(ONE_ROUND["clip_by_global_norm"](), cut, nan_step=None)


@pytest.mark.parametrize("name", ["adam", "clip"])
def test_bfloat16_parameters_take_float32_gradients_and_equal_the_whole(name):
    optimizer = SEPARABLE[name]()
    sliced = assert_equals_whole(optimizer, TWO, dtype=jnp.bfloat16)
    inputs = sliced.update(LAYERS).inputs
    assert {leaf.dtype for leaf in inputs if leaf.role == "grad"} == {"float32"}
    assert {leaf.dtype for leaf in inputs if leaf.role == "param"} == {"bfloat16"}
