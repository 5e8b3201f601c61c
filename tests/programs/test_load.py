"""What a device refuses, and that what it takes runs without the model's libraries."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdmesh_jax.core import values
from crowdmesh_jax.core.plan import PipelinePlan
from crowdmesh_jax.errors import BundleError, ForbiddenProgramError
from crowdmesh_jax.export import build_bundles, initial_arrays
from crowdmesh_jax.model import StagedModel, TrainingJob, losses
from crowdmesh_jax.programs import (
    ProgramCache,
    ProgramSpec,
    StageBundle,
    bundle_from_arrays,
    bundle_to_arrays,
    load_stage,
)
from crowdmesh_jax.programs.checks import check_custom_calls
from crowdmesh_jax.programs.manifest import LeafSpec


def dense(name_size: int):
    def init(key, x):
        return {"w": jax.random.normal(key, (x.shape[-1], name_size))}

    return init, lambda params, x: jnp.tanh(x @ params["w"])


@pytest.fixture(scope="module")
def bundle() -> StageBundle:
    model = StagedModel.from_functions([dense(4), dense(3)], ["a", "b"])
    job = TrainingJob(model, losses.softmax_cross_entropy, optax.sgd(0.1), 4, 2)
    plan = PipelinePlan.even(2, ["p", "q"], microbatches=2)
    x = jax.ShapeDtypeStruct((2, 5), jnp.float32)
    return build_bundles(job, plan, x, jax.ShapeDtypeStruct((2,), jnp.int32))[0]


def with_program(bundle: StageBundle, name: str, data: bytes, **fields) -> StageBundle:
    """The bundle with another program whose digest and size are right."""
    digest = hashlib.sha256(data).hexdigest()
    specs = tuple(
        replace(s, sha256=digest, size_bytes=len(data), **fields) if s.name == name else s
        for s in bundle.manifest.programs
    )
    manifest = replace(bundle.manifest, programs=specs)
    return StageBundle(manifest=manifest, programs={**bundle.programs, name: data})


def exported(fn, *specs, **options) -> bytes:
    program = jax.export.export(jax.jit(fn), platforms=("cpu",), **options)
    return bytes(program(*specs).serialize())


def test_every_program_loads_and_knows_its_keys(bundle):
    stage = load_stage(bundle)
    assert set(stage.names) == {spec.name for spec in bundle.manifest.programs}
    assert stage.has("forward")
    assert not stage.has("loss_backward")
    with pytest.raises(BundleError, match="it has forward"):
        stage.run("loss_backward", {})
    with pytest.raises(BundleError, match="no array for input"):
        stage.run("forward", {})


def test_a_program_loaded_before_is_not_checked_and_compiled_again(bundle):
    cache = ProgramCache()
    first = load_stage(bundle, cache=cache)
    first.compile()
    other_plan = replace(bundle.manifest, plan_sha256="another plan, the same stage")
    second = load_stage(StageBundle(manifest=other_plan, programs=bundle.programs), cache=cache)
    assert second.manifest.plan_sha256 != first.manifest.plan_sha256
    assert all(second.program(name) is first.program(name) for name in first.names)
    # The bytes are still held against their digest, and a tighter bound is another question.
    raw = bytes([bundle.programs["forward"][0] ^ 1]) + bundle.programs["forward"][1:]
    damaged = StageBundle(manifest=other_plan, programs={**bundle.programs, "forward": raw})
    with pytest.raises(BundleError, match="sha256"):
        load_stage(damaged, cache=cache)
    bounded = load_stage(bundle, cache=cache, max_bytes=1)
    with pytest.raises(ForbiddenProgramError):
        bounded.compile()


def test_a_full_cache_forgets_the_program_unused_for_longest(bundle):
    count = len(bundle.manifest.programs)
    cache = ProgramCache(limit=count)
    first = load_stage(bundle, cache=cache)
    newer = load_stage(bundle, cache=cache, max_bytes=2**40)
    again = load_stage(bundle, cache=cache, max_bytes=2**40)
    assert all(again.program(name) is newer.program(name) for name in newer.names)
    later = load_stage(bundle, cache=cache)
    assert all(later.program(name) is not first.program(name) for name in first.names)


@settings(max_examples=25)
@given(data=st.data())
def test_one_changed_byte_is_refused(bundle, data):
    name = data.draw(st.sampled_from(sorted(bundle.programs)))
    raw = bytearray(bundle.programs[name])
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = StageBundle(manifest=bundle.manifest, programs={**bundle.programs, name: bytes(raw)})
    with pytest.raises(BundleError, match="sha256"):
        load_stage(damaged)


@settings(max_examples=25)
@given(cut=st.integers(0, 400), junk=st.binary(max_size=40))
def test_bytes_that_are_no_program_are_one_typed_error_even_with_the_right_digest(
    bundle, cut, junk
):
    raw = bundle.programs["forward"][:cut] + junk
    with pytest.raises(BundleError, match="CM-301"):
        load_stage(with_program(bundle, "forward", raw))


def test_a_program_of_another_signature_is_refused(bundle):
    spec = bundle.manifest.program("forward")
    assert spec is not None
    first = spec.inputs[0]
    wrong = (replace(first, shape=(*first.shape, 1)), *spec.inputs[1:])
    with pytest.raises(BundleError, match="input 0"):
        load_stage(with_program(bundle, "forward", bundle.programs["forward"], inputs=wrong))
    with pytest.raises(BundleError, match="donates input 99"):
        load_stage(with_program(bundle, "forward", bundle.programs["forward"], donate=(99,)))


def test_a_manifest_of_another_version_or_with_other_programs_is_refused(bundle):
    for fields, match in (
        ({"format_version": 99}, "format 99"),
        ({"calling_convention_version": 1}, "calling convention 1"),
        ({"programs": bundle.manifest.programs[1:]}, "bundle only"),
        ({"programs": bundle.manifest.programs * 2}, "twice"),
    ):
        manifest = replace(bundle.manifest, **fields)
        with pytest.raises(BundleError, match=match):
            load_stage(StageBundle(manifest=manifest, programs=bundle.programs))


def lone(data: bytes, bundle: StageBundle, shape: tuple[int, ...], out: tuple[int, ...]):
    """A bundle of one program from one float leaf to one float leaf."""
    spec = ProgramSpec(
        name="forward",
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        inputs=(LeafSpec("x", "", "0", "float32", shape),),
        outputs=(LeafSpec("y", "", "0", "float32", out),),
    )
    return StageBundle(
        manifest=replace(bundle.manifest, programs=(spec,)), programs={"forward": data}
    )


def test_a_custom_call_off_the_list_is_refused_and_a_listed_one_is_not(bundle):
    def forged(x):
        kind = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return (jax.ffi.ffi_call('run"anything', kind)(x),)

    x = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    checks = [jax.export.DisabledSafetyCheck.custom_call('run"anything')]
    data = exported(forged, x, disabled_checks=checks)
    with pytest.raises(ForbiddenProgramError, match="anything"):
        load_stage(lone(data, bundle, (3, 3), (3, 3)))
    listed = exported(lambda x: (jnp.linalg.cholesky(x),), x)
    assert b"lapack_spotrf_ffi" in listed
    check_custom_calls(jax.export.deserialize(bytearray(listed)), "cholesky")


def test_a_custom_call_inside_a_loop_is_found(bundle):
    def forged(x):
        kind = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return (jax.lax.fori_loop(0, 3, lambda _, v: jax.ffi.ffi_call("hidden", kind)(v), x),)

    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    checks = [jax.export.DisabledSafetyCheck.custom_call("hidden")]
    data = exported(forged, x, disabled_checks=checks)
    with pytest.raises(ForbiddenProgramError, match="hidden"):
        load_stage(lone(data, bundle, (3,), (3,)))


def test_a_program_for_another_platform_is_refused(bundle):
    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    data = bytes(jax.export.export(jax.jit(lambda x: (x * 2,)), platforms=("tpu",))(x).serialize())
    with pytest.raises(ForbiddenProgramError, match="tpu"):
        load_stage(lone(data, bundle, (3,), (3,)))


def test_a_small_program_that_wants_much_memory_is_refused_before_it_runs(bundle):
    def hungry(x):
        big = jnp.broadcast_to(x[:, None], (3, 40_000_000))
        return (jnp.sum(jnp.sort(jnp.sin(big * jnp.arange(40_000_000.0)), axis=1), axis=1),)

    data = exported(hungry, jax.ShapeDtypeStruct((3,), jnp.float32))
    assert len(data) < 20_000
    stage = load_stage(lone(data, bundle, (3,), (3,)), max_bytes=100_000_000)
    with pytest.raises(ForbiddenProgramError, match=r"bound is 100\.0 MB"):
        stage.compile()
    with pytest.raises(ForbiddenProgramError):
        stage.run("forward", {("x", "", "0"): np.ones(3, np.float32)})


def test_a_bundle_travels_as_json_and_arrays(bundle):
    text, arrays = bundle_to_arrays(bundle)
    assert bundle_from_arrays(text, arrays) == bundle
    plain = json.loads(text)
    plain["programs"][0]["size_bytes"] += 1
    with pytest.raises(BundleError):
        bundle_from_arrays(json.dumps(plain), arrays)
    with pytest.raises(BundleError, match="unknown field"):
        bundle_from_arrays(json.dumps({**plain, "surprise": 1}), arrays)


CHILD = """
import json, sys
import numpy as np
from pathlib import Path
from crowdmesh_jax.programs import bundle_from_arrays, load_stage
folder = Path(sys.argv[1])
with np.load(folder / "programs.npz") as found:
    stage = load_stage(bundle_from_arrays((folder / "manifest.json").read_text(), dict(found)))
with np.load(folder / "env.npz") as found:
    env = {tuple(key.split("|")): value for key, value in found.items()}
out = stage.run("forward", env)
np.save(folder / "y.npy", out["y", "", "0"])
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def test_a_process_without_flax_and_optax_runs_a_bundle(bundle, tmp_path):
    text, arrays = bundle_to_arrays(bundle)
    (tmp_path / "manifest.json").write_text(text)
    np.savez(tmp_path / "programs.npz", **arrays)
    rng = np.random.default_rng(0)
    spec = bundle.manifest.program("forward")
    assert spec is not None
    env = {leaf.key: rng.normal(size=leaf.shape).astype(leaf.dtype) for leaf in spec.inputs}
    np.savez(tmp_path / "env.npz", **{"|".join(key): value for key, value in env.items()})
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    loaded = set(json.loads(ran.stdout.splitlines()[-1]))
    assert not loaded & {"flax", "optax", "pulp"}
    here = load_stage(bundle).run("forward", env)["y", "", "0"]
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), here)


def test_the_manifest_survives_json(bundle):
    text = values.to_json(bundle.manifest)
    assert values.from_json(type(bundle.manifest), text) == bundle.manifest


def test_initial_arrays_fill_what_a_stage_needs(bundle):
    model = StagedModel.from_functions([dense(4), dense(3)], ["a", "b"])
    job = TrainingJob(model, losses.softmax_cross_entropy, optax.sgd(0.1), 4, 2)
    arrays = initial_arrays(job, jax.ShapeDtypeStruct((2, 5), jnp.float32))
    for leaf in bundle.manifest.resident:
        assert (arrays[leaf.key].shape, arrays[leaf.key].dtype.name) == (leaf.shape, leaf.dtype)
