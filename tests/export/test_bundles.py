"""Bundles: the same bytes each time, only what is needed in them, and what is refused."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from export_cases import BATCH, CASES, Case, Dense, job

from crowdmesh_jax.core.plan import PipelinePlan
from crowdmesh_jax.errors import InvalidPlanError, JobError, ModelError, UnsupportedLayerError
from crowdmesh_jax.export import assemble, build_bundles, initial_arrays
from crowdmesh_jax.export import jaxpr as jp
from crowdmesh_jax.export.chain import build_chain
from crowdmesh_jax.model import Layer, StagedModel, losses
from crowdmesh_jax.programs import StageBundle
from crowdmesh_jax.reference import reference


def bundles(name: str, *, stages: int = 2, recompute: bool = False, **more):
    case = CASES[name](**more)
    inputs, targets = case.job.microbatch_specs(case.batch(0))
    plan = PipelinePlan.even(
        len(case.job.model.layers),
        [f"device-{i}" for i in range(stages)],
        microbatches=case.job.microbatches,
        recompute=recompute,
    )
    return build_bundles(case.job, plan, inputs, targets)


def digest(found: tuple[StageBundle, ...]) -> str:
    total = hashlib.sha256()
    for bundle in found:
        for name in sorted(bundle.programs):
            total.update(name.encode() + bundle.programs[name])
    return total.hexdigest()


def test_a_stage_that_comes_back_in_another_plan_is_not_exported_again(monkeypatch):
    from crowdmesh_jax.export import bundle as module

    case = CASES["conv"]()
    inputs, targets = case.job.microbatch_specs(case.batch(0))
    exported = []
    whole = module.export_program

    def counted(name, program, where):
        exported.append((where, name))
        return whole(name, program, where)

    monkeypatch.setattr(module, "export_program", counted)

    def build(job, *devices, **more):
        layers = len(job.model.layers)
        plan = PipelinePlan.even(layers, devices, microbatches=job.microbatches, **more)
        return build_bundles(job, plan, inputs, targets)

    first = build(case.job, "a", "b")
    assert exported
    exported.clear()
    second = build(case.job, "b", "c", schedule="gpipe")
    assert not exported
    for one, other in zip(first, second, strict=True):
        assert one.programs == other.programs
        assert one.manifest.plan_sha256 != other.manifest.plan_sha256
    build(case.job, "a", "b", recompute=True)
    assert {where for where, _ in exported} == {"stage 0"}, (
        "the last stage has nothing to recompute"
    )
    exported.clear()
    fresh = build(CASES["conv"]().job, "a", "b")
    assert exported, "another job, though alike"
    assert [stage.programs for stage in fresh] == [stage.programs for stage in first]


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import test_bundles
print(test_bundles.digest(test_bundles.bundles("conv")))
"""


def test_another_process_and_folder_and_hash_seed_make_the_same_bytes(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[-1] == digest(bundles("conv"))


def test_no_path_of_this_machine_is_in_a_program():
    found = bundles("conv", recompute=True)
    here = [str(Path(__file__).parent), str(Path(jax.__file__).parent), "site-packages", ".py"]
    for bundle in found:
        for name, data in bundle.programs.items():
            for text in here:
                assert text.encode() not in data, name


def roles(bundle: StageBundle, name: str) -> tuple[set[str], set[str]]:
    spec = bundle.manifest.program(name)
    assert spec is not None
    return {x.role for x in spec.inputs}, {x.role for x in spec.outputs}


def test_programs_take_only_what_they_read():
    first, last = bundles("mlp")
    assert roles(first, "forward") == ({"param", "x"}, {"y", "residual"})
    assert "seed" not in roles(first, "backward")[0]  # nothing random in this model
    assert "dx" not in roles(first, "backward")[1]  # nothing is upstream of stage 0
    assert first.manifest.gradient_out == ()
    assert roles(last, "loss_backward")[1] == {"dx", "grad", "loss"}
    assert roles(last, "weigh") == (set(), {"weight"})
    assert roles(last, "eval_forward")[1] == {"loss", "weight", "y"}
    conv = bundles("conv")[0]
    assert {"seed", "step", "microbatch", "state"} <= roles(conv, "forward")[0]


def test_recomputing_keeps_state_only_where_backward_reads_it():
    norm = bundles("conv", recompute=True)[0]
    assert "residual" not in roles(norm, "forward")[1]
    scale = bundles("reads_state", recompute=True)[0]
    spec = scale.manifest.program("forward")
    assert spec is not None
    kept = {x.key for x in spec.outputs if x.role == "residual"}
    assert kept == {("residual", "a", "scale"), ("residual", "b", "scale")}


def test_gradients_return_only_for_leaves_that_depend_on_parameters():
    first = bundles("carry", stages=3)[0].manifest
    # Leaves of the carry in order: h, ids, mask, skip.
    assert [x.path for x in first.boundary_out] == ["0", "1", "2", "3"]
    assert [x.path for x in first.gradient_in] == ["0", "3"]


def test_neighbours_agree_on_the_boundary_under_every_cut():
    for name in ("carry", "aux", "tied"):
        for stages in (2, 3):
            found = [bundle.manifest for bundle in bundles(name, stages=stages)]
            for left, right in itertools.pairwise(found):
                assert [x.key[1:] for x in left.boundary_out] == [
                    x.key[1:] for x in right.boundary_in
                ]
                assert [(x.path, x.shape) for x in left.gradient_in] == [
                    (x.path, x.shape) for x in right.gradient_out
                ]


def test_the_auxiliary_loss_rides_only_behind_layers_that_have_one():
    a, b, c = (bundle.manifest for bundle in bundles("aux", stages=3))
    # Layers a, b | c | d; b and c add an auxiliary loss.
    assert [x.path for x in a.boundary_out] == ["0", "aux"]
    assert [x.path for x in c.gradient_out] == ["0", "aux"]
    assert [x.path for x in b.boundary_in] == ["0", "aux"]
    assert all(x.path != "aux" for m in bundles("mlp") for x in m.manifest.boundary_out)


def test_a_tied_leaf_is_borrowed_across_a_cut_and_plain_within_a_stage():
    first, last = (bundle.manifest for bundle in bundles("tied"))
    assert first.lends == last.borrows == (("embed", "table"),)
    assert ("borrowed", "embed", "table") in {x.key for x in last.resident}
    assert ("tied_grad", "embed", "table") in {x.key for x in last.accumulators}
    assert first.program("merge") is not None
    (alone,) = (bundle.manifest for bundle in bundles("tied", stages=1))
    assert alone.lends == alone.borrows == ()
    assert alone.program("merge") is None


def test_sums_of_16_bit_gradients_are_float32():
    first = bundles("bf16")[0].manifest
    params = {x.key[1:]: x.dtype for x in first.resident if x.role == "param"}
    assert "bfloat16" in params.values()
    assert {x.dtype for x in first.accumulators} == {"float32"}


def test_donated_inputs_have_an_output_of_their_kind():
    for bundle in bundles("conv"):
        for spec in bundle.manifest.programs:
            outputs = [(x.shape, x.dtype) for x in spec.outputs]
            for index in spec.donate:
                leaf = spec.inputs[index]
                outputs.remove((leaf.shape, leaf.dtype))


def test_arrays_and_trees_are_two_views_of_one_state():
    case = CASES["conv"](optimizer=optax.adamw(1e-3))
    inputs, _ = case.job.microbatch_specs(case.batch(0))
    arrays = initial_arrays(case.job, inputs)
    state = assemble(case.job, inputs, arrays)
    params, layer_state = case.job.model.init(case.job.seed, inputs)
    for ours, theirs in (
        (state.params, params),
        (state.state, layer_state),
        (state.opt_state, case.job.optimizer.init(params)),
    ):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    arrays.pop(("param", "a", "Conv_0/bias"))
    with pytest.raises((ModelError, JobError), match="bias"):
        assemble(case.job, inputs, arrays)


def refused(layer, **more):
    model = StagedModel.from_linen([layer, Dense(3, act=False)], ["bad", "b"])
    spec = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    plan = PipelinePlan.even(2, ["p", "q"], microbatches=2)
    build_bundles(job(model, **more), plan, spec, jax.ShapeDtypeStruct((2,), jnp.int32))


def test_a_large_captured_array_is_refused_by_the_layers_name_and_a_small_one_is_not():
    table = jnp.ones((200, 100))
    with pytest.raises(UnsupportedLayerError, match=r"'bad' closes over 80000 bytes"):
        refused(lambda x: x + table[0, 0] * jnp.sum(table))
    refused(lambda x: x + jnp.arange(4.0))


def test_a_callback_in_a_layer_or_metric_is_refused():
    def talks(x):
        jax.debug.print("{}", x[0, 0])
        return x

    with pytest.raises(UnsupportedLayerError, match=r"'bad'.*Python"):
        refused(talks)

    def loud(y, t):
        jax.debug.print("{}", y[0, 0])
        return jnp.sum(y), 1.0

    with pytest.raises(UnsupportedLayerError, match="metric"):
        refused(lambda x: x, metrics={"loud": loud})


def test_weights_that_depend_on_predictions_are_refused():
    def leaning(y, t):
        value = losses.softmax_cross_entropy(y, t)
        return value, value

    with pytest.raises(JobError, match="targets"):
        refused(lambda x: x, loss=leaning)


def test_a_plan_of_another_model_or_job_is_refused():
    case = CASES["mlp"]()
    specs = case.job.microbatch_specs(case.batch(0))
    with pytest.raises(InvalidPlanError, match="layers"):
        build_bundles(case.job, PipelinePlan.even(2, ["p"], microbatches=2), *specs)
    with pytest.raises(InvalidPlanError, match="microbatches"):
        build_bundles(case.job, PipelinePlan.even(3, ["p"], microbatches=4), *specs)


def test_dependence_follows_inexact_values_only_where_gradients_are_meant():
    def fn(w, x):
        y = x @ w
        return y, jnp.argmax(y), jnp.argmax(y) * 1.0, jax.lax.stop_gradient(y), x * 2

    specs = [jax.ShapeDtypeStruct((3, 3), jnp.float32)] * 2
    closed = jp.trace(fn, specs)
    assert jp.dependence(closed) == [3, 3, 3, 3, 2]
    assert jp.dependence(closed, differentiable=True) == [3, 0, 0, 0, 2]


def test_a_slice_of_a_program_computes_what_the_whole_does():
    @jax.jit
    def inner(a, b):
        return jnp.sin(a), b * 2

    def fn(a, b, c):
        s, d = inner(a, b)
        return s + d, d, inner(c, a)[0]

    specs = [jax.ShapeDtypeStruct((3,), jnp.float32)] * 3
    closed = jp.trace(fn, specs)
    assert all(eqn.primitive.name not in ("jit", "pjit") for eqn in closed.jaxpr.eqns)
    arrays = [jnp.arange(3.0) + i for i in range(3)]
    for outputs, inputs in (([0], (0, 1)), ([1], (1,)), ([2, 1], (1, 2))):
        small, used = jp.select(closed, outputs)
        assert used == inputs
        got = jp.as_function(small)(*(arrays[i] for i in used))
        for index, value in zip(outputs, got, strict=True):
            np.testing.assert_allclose(value, fn(*arrays)[index], rtol=1e-6)


def test_activity_at_a_boundary_does_not_depend_on_the_cut():
    case = CASES["carry"]()
    chain = build_chain(case.job.model, case.job.microbatch_specs(case.batch(0))[0])
    assert chain.carries[0].active == (False, False)
    assert chain.carries[1].active == chain.carries[2].active == (True, False, False, True)


def small_tied():
    """Embedding, one dense layer, and a head that borrows the embedding's table."""

    def table(key, x):
        return {"table": jax.random.normal(key, (5, 4))}, {}

    def embed(params, state, x, key, train):
        return params["table"][x], state, None

    def nothing(key, x):
        return {}, {}

    def head(params, state, x, key, train):
        return x @ params["shared"].T, state, None

    model = StagedModel.from_linen(
        [
            Layer("embed", table, embed),
            Dense(4),
            Layer("head", nothing, head, {"shared": ("embed", "table")}),
        ],
        ["embed", "dense", "head"],
    )
    clipped = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1))
    made = job(model, optimizer=clipped)
    return Case(made, lambda r: (r.integers(0, 5, BATCH), r.integers(0, 5, BATCH)))


def test_the_plans_programs_train_as_the_whole_model_does():
    case = small_tied()
    seen: list[int] = []
    whole = reference(case.job, case, 3, on_step=lambda step, loss: seen.append(step))
    plan = PipelinePlan.even(3, ["p", "q"], microbatches=2)
    staged = reference(case.job, case, 3, plan=plan)
    assert seen == [0, 1, 2]
    np.testing.assert_allclose(staged.losses, whole.losses, rtol=1e-5)
    leaves = zip(jax.tree.leaves(whole.params), jax.tree.leaves(staged.params), strict=True)
    gaps = [np.sum(np.square(a - b)) for a, b in leaves]
    size = sum(np.sum(np.square(a)) for a in jax.tree.leaves(whole.params))
    assert np.sqrt(sum(gaps)) <= 1e-5 * np.sqrt(size)
    start, _ = case.job.model.init(case.job.seed, case.job.microbatch_specs(case.batch(0))[0])
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), start, staged.params)
    assert min(jax.tree.leaves(moved)) > 1e-4
