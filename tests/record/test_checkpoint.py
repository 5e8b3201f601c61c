"""Checkpoints: bytes survive, a load is all or nothing, a crash keeps the one before."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from crowdmesh_jax.errors import RecordError
from crowdmesh_jax.record import (
    checkpoint as checkpoint_module,
)
from crowdmesh_jax.record import (
    load_checkpoint,
    read_manifest,
    save_checkpoint,
)

DTYPES = [
    np.float32, np.float16, np.int32, np.uint32, np.uint8, np.int64, np.bool_, np.complex64,
    ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4,
]  # fmt: skip


@st.composite
def arrays(draw):
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    raw = draw(hnp.arrays(np.uint8, (*shape, 2)))
    return raw[..., 0].astype(dtype) if dtype.itemsize == 1 else raw.sum(-1).astype(dtype)


names = st.text("abc_/.0é ", min_size=1, max_size=8)
layers = st.text("abc0", min_size=0, max_size=4)
trees = st.dictionaries(
    st.tuples(st.sampled_from(["param", "opt", "global"]), layers, names), arrays(), max_size=6
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(trees, st.integers(0, 10**9), st.sampled_from([1, 16, 2**20]))
def test_a_checkpoint_gives_back_the_same_bytes(tmp_path, tree, version, shard_bytes):
    folder = tmp_path / os.urandom(6).hex()
    save_checkpoint(folder, version, tree, {"step": version}, shard_bytes=shard_bytes)
    read = load_checkpoint(folder)
    assert read.version == version
    assert read.meta == {"step": version}
    assert set(read.arrays) == set(tree)
    for key, array in tree.items():
        assert read.arrays[key].dtype == array.dtype
        assert read.arrays[key].shape == array.shape
        assert read.arrays[key].tobytes() == array.tobytes()


def _tree(value=0.0):
    return {
        ("param", "dense", "kernel"): np.full((3, 4), value, np.float32),
        ("param", "dense", "scale"): np.full((4,), value, ml_dtypes.bfloat16),
        ("opt", "dense", "0/mu/kernel"): np.full((3, 4), value, np.float32),
        ("global", "", "0/count"): np.int32(7),
    }


def test_unordered_and_foreign_memory_is_stored_by_value(tmp_path):
    square = np.arange(12, dtype=np.float32).reshape(3, 4)
    tree = {("param", "a", "t"): square.T, ("param", "a", "big"): square.astype(">f4")}
    save_checkpoint(tmp_path, 1, tree)
    read = load_checkpoint(tmp_path).arrays
    np.testing.assert_array_equal(read["param", "a", "t"], square.T)
    np.testing.assert_array_equal(read["param", "a", "big"], square)


def test_equal_arrays_give_equal_files(tmp_path):
    for name in ("one", "two"):
        save_checkpoint(tmp_path / name, 3, _tree(2.0), {"job_sha256": "ab"})
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [p.name for p in one] == [p.name for p in two]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]


def test_the_next_checkpoint_replaces_the_last_and_leaves_no_files_behind(tmp_path):
    for version in (1, 2, 2, 3):
        save_checkpoint(tmp_path, version, _tree(version), shard_bytes=40)
        assert load_checkpoint(tmp_path).arrays["param", "dense", "kernel"][0, 0] == version
    listed = {file.name for file in read_manifest(tmp_path).files}
    assert len(listed) > 1
    assert {path.name for path in tmp_path.iterdir()} == listed | {"manifest.json"}


@pytest.mark.parametrize("crash_at", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("version", [1, 2])
def test_a_crash_while_saving_keeps_the_last_checkpoint(tmp_path, monkeypatch, crash_at, version):
    save_checkpoint(tmp_path, 1, _tree(1.0), shard_bytes=40)
    write, calls = checkpoint_module.write_atomic, iter(range(100))

    def crash(path, data):
        if next(calls) == crash_at:
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_module, "write_atomic", crash)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, version, _tree(2.0), shard_bytes=40)
    assert load_checkpoint(tmp_path).arrays["param", "dense", "kernel"][0, 0] == 1.0
    save_checkpoint(tmp_path, 3, _tree(3.0))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def _change_manifest(folder, change):
    path = folder / "manifest.json"
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=2), "format version 2 is newer than 1.*upgrade"),
        (lambda m: m.update(format="other"), "not a checkpoint manifest"),
        (lambda m: m.update(extra=1), "damaged: .*unknown field 'extra'"),
        (lambda m: m["files"].pop(), "damaged: missing"),
        (lambda m: m["files"][0].update(name="../x"), "damaged: '../x' is no file name"),
        (lambda m: m["files"][0].update(sha256="0" * 64), "damaged: .* checksum"),
        (lambda m: m["arrays"].pop(), "is not in the manifest"),
        (lambda m: m["arrays"].append(m["arrays"][0]), "damaged: missing|listed twice"),
        (lambda m: m["arrays"][1].update(shape=[4, 3]), r"the manifest says float32 \(4, 3\)"),
        (lambda m: m["arrays"][1].update(dtype="int32"), "the manifest says int32"),
        (lambda m: m["arrays"][1].update(dtype="quux"), "dtype 'quux' is unknown"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, change, message):
    save_checkpoint(tmp_path, 1, _tree())
    _change_manifest(tmp_path, change)
    with pytest.raises(RecordError, match=message) as caught:
        load_checkpoint(tmp_path)
    assert caught.value.code == "CM-520"


def test_any_changed_byte_of_a_shard_is_found(tmp_path):
    save_checkpoint(tmp_path, 1, _tree())
    (shard,) = tmp_path.glob("*.safetensors")
    sound = shard.read_bytes()
    for at in range(0, len(sound), 7):
        damaged = bytearray(sound)
        damaged[at] ^= 1
        shard.write_bytes(damaged)
        with pytest.raises(RecordError, match="damaged"):
            load_checkpoint(tmp_path)
    shard.write_bytes(sound[:-1])
    with pytest.raises(RecordError, match="damaged"):
        load_checkpoint(tmp_path)
    shard.unlink()
    with pytest.raises(RecordError, match="cannot read"):
        load_checkpoint(tmp_path)


def test_missing_foreign_and_garbled_checkpoints_are_told(tmp_path):
    with pytest.raises(RecordError, match="no checkpoint here"):
        load_checkpoint(tmp_path / "none")
    save_checkpoint(tmp_path, 1, _tree(), {"job_sha256": "a" * 64})
    assert load_checkpoint(tmp_path, job_sha256="a" * 64).version == 1
    with pytest.raises(RecordError, match=r"another job \(aaaaaaaaaaaa, expected bbbbbbbbbbbb\)"):
        load_checkpoint(tmp_path, job_sha256="b" * 64)
    for text in ("", "[]", '{"format": 1', "[" * 100_000):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(RecordError, match="damaged"):
            load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "meta", "version"),
    [
        ({("param", "a", "b"): np.array(["text"])}, {}, 1),
        ({("param", "a"): np.ones(1)}, {}, 1),
        ({("pa:ram", "a", "b"): np.ones(1)}, {}, 1),
        ({}, {"x": object()}, 1),
        ({}, {}, -1),
    ],
)
def test_what_cannot_be_saved_is_refused_and_the_last_one_stands(tmp_path, arrays, meta, version):
    save_checkpoint(tmp_path, 1, _tree(1.0))
    with pytest.raises(RecordError):
        save_checkpoint(tmp_path, version, arrays, meta)
    assert load_checkpoint(tmp_path).version == 1
