"""What the sliced optimizer promises to those who export and run it, and what it refuses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from optimizer_runs import (
    LAYERS,
    THREE,
    Cut,
    Stages,
    assert_close,
    assert_same_bits,
    keyed,
    make_grads,
    make_params,
    specs_of,
)

from crowdmesh_jax.errors import UnsupportedOptimizerError
from crowdmesh_jax.export.flat import FlatProgram, abstract
from crowdmesh_jax.export.optimizer import SlicedOptimizer, slice_optimizer

PARAMS = make_params()
CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
GUARDED = optax.apply_if_finite(CLIPPED, 2)


def sliced(optimizer: optax.GradientTransformation) -> SlicedOptimizer:
    return slice_optimizer(optimizer, specs_of(PARAMS))


def programs(s: SlicedOptimizer, cut: Cut = THREE) -> list[FlatProgram]:
    made = [s.reduce(), *(s.scalars(stage) for stage in cut), *(s.update(stage) for stage in cut)]
    return [program for program in made if program is not None]


def custom(update: Any, init: Any = lambda params: ()) -> optax.GradientTransformation:
    return optax.GradientTransformation(init, update)


# --- laws ---------------------------------------------------------------------------------------

LOCAL = [
    lambda: optax.trace(0.9),
    lambda: optax.scale_by_adam(),
    lambda: optax.scale_by_trust_ratio(),
    lambda: optax.add_decayed_weights(0.1),
    lambda: optax.clip_by_block_rms(1.0),
    lambda: optax.scale_by_schedule(optax.linear_schedule(1.0, 0.1, 3)),
    lambda: optax.ema(0.5),
]
MIXING = [lambda: optax.clip_by_global_norm(0.5), lambda: optax.normalize_by_update_norm()]


@st.composite
def optimizers(draw: st.DrawFn) -> optax.GradientTransformation:
    """Chains with at most one transform that looks at all layers, bare, guarded or accumulating."""
    parts = [make() for make in draw(st.lists(st.sampled_from(LOCAL), max_size=2))]
    parts += [make() for make in draw(st.lists(st.sampled_from(MIXING), max_size=1))]
    parts += [make() for make in draw(st.lists(st.sampled_from(LOCAL), max_size=1))]
    chain = optax.chain(*parts, optax.scale(-0.1))
    return chain if draw(st.booleans()) else optax.masked(chain, {k: k != "head" for k in LAYERS})


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    ends = [*sorted(draw(st.sets(st.integers(1, len(LAYERS) - 1)))), len(LAYERS)]
    return tuple(LAYERS[a:b] for a, b in zip([0, *ends], ends, strict=False))


@settings(max_examples=8)
@given(optimizers(), cuts(), st.booleans())
def test_any_cut_of_any_chain_makes_the_same_step(optimizer, cut, not_finite):
    s = sliced(optimizer)
    cut_run = Stages(s, PARAMS, cut, jit=lambda fn: fn)
    uncut_run = Stages(s, PARAMS, (LAYERS,), jit=lambda fn: fn)
    params, state = PARAMS, optimizer.init(PARAMS)
    for step in range(2):
        grads = make_grads(PARAMS, step, nan_step=1 if not_finite else None)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        cut_run.step(grads)
        uncut_run.step(grads)
    assert_same_bits(cut_run.env, uncut_run.env)
    new = {key: array for key, array in cut_run.env.items() if key[0] == "param"}
    assert_close(new, keyed("param", params))
    assert_close(s.assemble(cut_run.env), state)


@pytest.mark.parametrize("optimizer", [CLIPPED, GUARDED], ids=["clipped", "guarded"])
def test_every_listed_input_is_read(optimizer):
    for program in programs(sliced(optimizer)):
        jaxpr = jax.make_jaxpr(program.fn)(*map(abstract, program.inputs)).jaxpr
        read = {id(a) for eqn in jaxpr.eqns for a in eqn.invars} | {id(a) for a in jaxpr.outvars}
        unread = [
            leaf.key
            for leaf, var in zip(program.inputs, jaxpr.invars, strict=True)
            if id(var) not in read
        ]
        assert unread == []


@pytest.mark.parametrize("optimizer", [CLIPPED, GUARDED], ids=["clipped", "guarded"])
def test_programs_read_and_make_the_roles_they_promise(optimizer):
    s = sliced(optimizer)
    reduce = s.reduce()
    assert reduce is not None
    assert {leaf.role for leaf in reduce.inputs} <= {"cut", "global"}
    assert tuple(x for x in reduce.inputs if x.role == "cut") == s.cut_leaves
    assert reduce.outputs == (*s.global_leaves, *s.shared_leaves)
    for stage in THREE:
        update, scalars = s.update(stage), s.scalars(stage)
        assert {x.role for x in update.inputs} <= {"param", "opt", "grad", "global", "shared"}
        assert {x.layer for x in update.inputs} <= {*stage, ""}
        made = {x.key for x in update.outputs}
        assert made == {x.key for x in s.opt_leaves if x.layer in stage} | {
            key for key in keyed("param", PARAMS) if key[1] in stage
        }
        assert {update.inputs[i].key for i in update.donate} == {
            x.key for x in update.inputs if x.role in ("param", "opt")
        }
        assert scalars is not None
        assert {x.role for x in scalars.inputs} <= {"param", "opt", "grad", "global"}
        assert scalars.outputs == tuple(x for x in s.cut_leaves if x.layer in stage)
        assert scalars.donate == ()


def test_every_donated_buffer_can_be_reused():
    """An unusable one would warn, and warnings are errors here."""
    update = sliced(GUARDED).update(("block", "act"))
    arrays = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in update.inputs]
    jax.block_until_ready(jax.jit(update.fn, donate_argnums=update.donate)(*arrays))
    assert all(arrays[i].is_deleted() for i in update.donate)


def test_exported_programs_make_the_same_bits():
    s = sliced(GUARDED)

    for program in programs(s):
        rng = np.random.default_rng(0)
        arrays = [jnp.asarray(rng.uniform(0, 2, leaf.shape), leaf.dtype) for leaf in program.inputs]
        ours = jax.jit(program.fn)(*arrays)
        exported = export.export(jax.jit(program.fn))(*map(abstract, program.inputs))
        theirs = jax.jit(export.deserialize(exported.serialize()).call)(*arrays)
        assert_same_bits(list(theirs), list(ours))


def test_initial_state_goes_apart_and_together_again():
    for optimizer in (GUARDED, optax.add_noise(0.1, 0.5, key=jax.random.key(7)), optax.sm3(0.1)):
        s = sliced(optimizer)
        arrays = s.init_arrays(PARAMS)
        assert set(arrays) == {leaf.key for leaf in (*s.opt_leaves, *s.global_leaves)}
        assert len(set(arrays)) == len(s.opt_leaves) + len(s.global_leaves)
        assert all(type(a) is np.ndarray for a in arrays.values())
        assert_same_bits(s.assemble(arrays), optimizer.init(PARAMS))


# --- owners -------------------------------------------------------------------------------------


def test_state_belongs_to_the_layer_of_its_parameter():
    s = sliced(optax.adam(1e-2))
    assert {(x.layer, x.path) for x in s.opt_leaves} == {
        (layer, f"0/{moment}/{layer}/{path}")
        for _, layer, path in keyed("param", PARAMS)
        for moment in ("mu", "nu")
    }
    assert [x.path for x in s.global_leaves] == ["0/count"]


def test_a_label_that_is_also_a_layer_owns_nothing():
    """`multi_transform` keys its states by label: here the label of all is the name of one layer,
    whose only parameter is a bare array."""
    params = {"embed": jnp.ones((3, 2)), "head": {"kernel": jnp.ones((2, 2))}}
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    labels = jax.tree.map(lambda _: "embed", params)
    s = slice_optimizer(optax.multi_transform({"embed": optax.adam(1e-2)}, labels), specs)
    assert [x.path.split("/")[-1] for x in s.global_leaves] == ["count"]
    assert [x.layer for x in s.opt_leaves] == ["embed", "head", "embed", "head"]
    assert s.cut_leaves == ()


def test_a_layer_without_parameters_updates_nothing():
    update = sliced(CLIPPED).update(("act",))
    assert (update.inputs, update.outputs, update.fn()) == ((), (), ())
    assert sliced(CLIPPED).scalars(("act",)) is None


def test_an_optimizer_without_state_has_no_reduce():
    assert sliced(optax.sgd(0.1)).reduce() is None


def test_a_single_layer_still_sends_what_a_global_needs():
    spec = {"only": jax.ShapeDtypeStruct((3,), jnp.float32)}
    s = slice_optimizer(optax.apply_if_finite(optax.sgd(0.1), 2), spec)
    assert s.cut_leaves
    reduce = s.reduce()
    assert reduce is not None
    assert [x.role for x in reduce.inputs if x.role == "cut"] == ["cut"] * len(s.cut_leaves)


def test_leaves_of_one_element_stay_home():
    """A bias of shape (1,) times a clipping factor is no term of a reduction."""
    s = sliced(CLIPPED)
    leaves = len(jax.tree.leaves(PARAMS))
    assert len(s.cut_leaves) <= leaves
    assert len(s.shared_leaves) == 1
    reduce = s.reduce()
    assert reduce is not None
    assert not any(x.role in ("param", "opt", "grad") for x in reduce.inputs)


def test_a_model_of_many_leaves_sends_its_scalars_in_packs():
    """`jnp.array` packs more than a few dozen scalars in chunks, some of one layer only."""
    names = [f"p{i}" for i in range(27)]
    params = {layer: {n: jnp.ones(3) for n in names} for layer in ("a", "b", "c")}
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    for optimizer in (optax.sgd(0.1), CLIPPED):
        s = slice_optimizer(optax.apply_if_finite(optimizer, 2), specs)
        flags = [x for x in s.cut_leaves if x.dtype == "bool"]
        assert sum(int(np.prod(x.shape)) for x in flags) == 81
        assert len(flags) < 81
        assert all(leaf.shape == () for leaf in s.shared_leaves)


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (optax.adam(1e-2), None),
        (CLIPPED, "one global value per step (clip_by_global_norm)"),
        (
            optax.apply_if_finite(optax.sgd(0.1), 2),
            "one global value per step (apply_if_finite)",
        ),
        (GUARDED, "2 global values per step (apply_if_finite, clip_by_global_norm)"),
    ],
)
def test_describe_names_what_is_reduced(optimizer, words):
    assert sliced(optimizer).describe_global() == words


# --- refusals -----------------------------------------------------------------------------------

BIG = jnp.ones(20_000)
REFUSED = {
    "flatten": (lambda: optax.flatten(optax.adam(1e-2)), "'concatenate' in flatten mixes arrays"),
    "two looks at all layers": (
        lambda: optax.chain(
            optax.clip_by_global_norm(1.0), optax.apply_if_finite(optax.sgd(0.1), 2)
        ),
        "more than one exchange per step: operation 'concatenate' in apply_if_finite",
    ),
    "two norms": (
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.normalize_by_update_norm()),
        "more than one exchange per step",
    ),
    "mechanize": (lambda: optax.contrib.mechanize(optax.sgd(0.1)), "in mechanize mixes scalars"),
    "polyak_sgd": (optax.polyak_sgd, "wants extra arguments.*'value'"),
    "lbfgs": (optax.lbfgs, "wants extra arguments.*'value_fn'"),
    "reduce_on_plateau": (optax.contrib.reduce_on_plateau, "wants extra arguments.*'value'"),
    "loop over the whole tree": (
        lambda: custom(
            lambda u, s, p=None: (
                jax.lax.fori_loop(0, 3, lambda _, t: jax.tree.map(lambda x: x * 2, t), u),
                s,
            )
        ),
        "'scan' mixes arrays",
    ),
    "one layer in another's update": (
        lambda: custom(
            lambda u, s, p=None: (
                {**u, "head": {**u["head"], "kernel": u["embed"]["kernel"][:4, :3]}},
                s,
            )
        ),
        "mixes arrays of layers embed, head",
    ),
    "branches on values": (
        lambda: custom(lambda u, s, p=None: (u if u["embed"]["bias"][0] > 0 else p, s)),
        "cannot be traced.*TracerBoolConversionError",
    ),
    "prints": (
        lambda: custom(lambda u, s, p=None: (jax.debug.print("x") or u, s)),
        "side effect: operation 'debug_",
    ),
    "state of another dtype": (
        lambda: custom(lambda u, s, p=None: (u, s + 1.5), lambda p: jnp.zeros((), jnp.int32)),
        r"global leaf '' is int32\[\] and becomes float32\[\]",
    ),
    "state of another structure": (
        lambda: custom(lambda u, s, p=None: (u, (1,))),
        "changes its structure",
    ),
    "large state without owner": (
        lambda: custom(lambda u, s, p=None: (u, s), lambda p: jnp.zeros(5000)),
        r"state '' of shape \(5000,\) belongs to no layer",
    ),
    "large constant": (
        lambda: custom(lambda u, s, p=None: (jax.tree.map(lambda x: x + BIG.sum(), u), s)),
        r"closes over an array of shape \(20000,\) \(80000 bytes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_names_the_operation_and_a_remedy(name):
    make, message = REFUSED[name]
    with pytest.raises(UnsupportedOptimizerError, match=f"CM-131.*{message}") as caught:
        sliced(make())
    assert caught.value.message.endswith(".")
