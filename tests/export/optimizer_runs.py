"""Runs a sliced optimizer over stages beside the whole one, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

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
        jit: Callable[..., Any] = jax.jit,
    ) -> None:
        self.cut = cut
        self.scalars = [sliced.scalars(stage) for stage in cut]
        self.reduce = sliced.reduce()
        self.updates = [sliced.update(stage) for stage in cut]
        programs = (*self.scalars, self.reduce, *self.updates)
        self.compiled = {id(p): jit(p.fn) for p in programs if p is not None}
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
