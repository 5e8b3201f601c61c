"""Copies as bytes: packing, chunks, seals, limits, files; and the slots that logs keep."""

from __future__ import annotations

import numpy as np
import pytest

from crowdmesh_jax.agent.copies import (
    CHUNK_BYTES,
    CopyArrays,
    CopyLimits,
    CopyStore,
    Packing,
    new_checksum,
)
from crowdmesh_jax.agent.slots import Slots
from crowdmesh_jax.errors import FrameError, RecordError
from crowdmesh_jax.protocol.common import Slot
from crowdmesh_jax.protocol.recovery_messages import Manifest

NAME = (0, 2, 1, 7)


def arrays(large: int = 700_000) -> CopyArrays:
    random = np.random.default_rng(3)
    return CopyArrays(
        state={
            ("param", "a", "w"): random.standard_normal(large).astype(np.float32),
            ("param", "a", "none"): np.zeros((0, 4), np.float32),
            ("state", "a", "count"): np.int32(5),
            ("opt", "b", "mask"): np.array([True, False, True]),
        },
        verdict={("global", "", "norm"): np.float32(1.5)},
    )


def sent(store: CopyStore, copy: CopyArrays, *, flip: int | None = None) -> Manifest:
    """All chunks of a copy, one byte of which may be flipped on the way; its seal."""
    packing, checksum, offset = Packing.of(copy), new_checksum(), 0
    leaves = packing.to_plain()
    for piece in packing.chunks(copy):
        checksum.update(piece.data)
        if flip is not None and offset <= flip < offset + piece.size:
            piece[flip - offset] ^= 1
        store.store_chunk("owner", NAME, offset, leaves if offset == 0 else None, piece)
        offset += piece.size
    return Manifest(
        leaves=packing.leaves, size_bytes=packing.size_bytes, checksum=checksum.hexdigest()
    )


def kept(store: CopyStore, seal: Manifest) -> bool:
    entry = store.take_incomplete("owner", NAME)
    return entry is not None and store.keep(NAME, entry, seal)


def assert_same(found: CopyArrays | None, copy: CopyArrays) -> None:
    assert found is not None
    for ours, theirs in ((found.state, copy.state), (found.verdict, copy.verdict)):
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert np.asarray(ours[key]).dtype == np.asarray(value).dtype
            assert np.array_equal(ours[key], value), key


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_copy_comes_out_as_it_went_in_and_only_once_its_seal_matched(tmp_path, on_disk):
    limits = CopyLimits(memory_bytes=0, disk_bytes=2**24, folder=tmp_path)
    store = CopyStore(limits if on_disk else CopyLimits())
    copy = arrays()
    assert Packing.of(copy).size_bytes > 2 * CHUNK_BYTES
    seal = sent(store, copy)
    assert store.get(NAME) is None, "invisible before its seal"
    assert kept(store, seal)
    assert_same(store.get(NAME), copy)
    assert (store.disk_bytes > 0) is on_disk
    store.drop(NAME)
    assert store.get(NAME) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", [0, CHUNK_BYTES + 5, 2_799_999])
def test_a_byte_that_was_flipped_on_the_way_is_found(where):
    store = CopyStore(CopyLimits())
    assert not kept(store, sent(store, arrays(), flip=where))
    assert store.get(NAME) is None
    assert store.memory_bytes == 0


def test_a_byte_that_was_flipped_on_the_disk_is_found_when_it_is_read(tmp_path):
    store = CopyStore(CopyLimits(memory_bytes=0, disk_bytes=2**24, folder=tmp_path))
    assert kept(store, sent(store, arrays()))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(RecordError, match="checksum does not match"):
        store.get(NAME)
    path.unlink()
    with pytest.raises(RecordError, match="cannot be read"):
        store.get(NAME)


def test_a_copy_without_room_is_refused_before_memory_is_taken():
    store = CopyStore(CopyLimits(memory_bytes=1000))
    with pytest.raises(FrameError, match="1000 bytes that are free"):
        sent(store, arrays())
    assert store.memory_bytes == 0


def test_a_chunk_out_of_order_or_beyond_the_end_is_refused():
    store, copy = CopyStore(CopyLimits()), arrays(100)
    leaves = Packing.of(copy).to_plain()
    store.store_chunk("owner", NAME, 0, leaves, np.zeros(64, np.uint8))
    with pytest.raises(FrameError, match="expected 64"):
        store.store_chunk("owner", NAME, 128, None, np.zeros(64, np.uint8))
    store.store_chunk("owner", NAME, 0, leaves, np.zeros(64, np.uint8))
    with pytest.raises(FrameError, match="at byte 64"):
        store.store_chunk("owner", NAME, 64, None, np.zeros(10_000, np.uint8))
    store.store_chunk("owner", NAME, 64, None, np.zeros(64, np.uint8))
    assert store.take_incomplete("owner", NAME) is None, "its beginning was dropped"


@pytest.mark.parametrize(
    "leaf",
    [
        ["state", "param", "a", "w", "object", [3]],
        ["state", "param", "a", "w", "float32", [-3]],
        ["other", "param", "a", "w", "float32", [3]],
        ["state", "param", "a", "w", "float32"],
        7,
    ],
)
def test_a_layout_that_is_none_is_one_clear_error(leaf):
    with pytest.raises(FrameError):
        Packing.read([leaf], 2**20)


def test_own_snapshots_count_against_no_limit():
    store = CopyStore(CopyLimits(memory_bytes=0))
    store.keep_own(NAME, arrays())
    assert_same(store.get(NAME), arrays())
    assert (store.memory_bytes, store.size_bytes(NAME)) == (0, 0)


def test_what_was_logged_outlives_its_sending_until_it_is_dropped_or_taken_back():
    slots = Slots()
    y = [Slot(kind="y", step=step, microbatch=0) for step in range(4)]
    verdicts = [Slot(kind="verdict", step=step) for step in range(4)]
    state = Slot(kind="state", step=3, layer=0)
    for slot in (*y, *verdicts, state):
        slots.fill(slot, {("y", "", ""): np.ones(2, np.float32)})
    slots.log(y[:3])
    for slot in y:
        slots.drop_unlogged(slot)
    assert [bool(slots.get(slot)) for slot in y] == [True, True, True, False]
    assert slots.logged_bytes == 3 * 8
    slots.drop_logs(2)
    assert [bool(slots.get(slot)) for slot in y] == [False, False, True, False]
    assert [bool(slots.get(slot)) for slot in verdicts] == [False, True, True, True]
    slots.rewind(2)
    assert not slots.get(y[2])
    assert [bool(slots.get(slot)) for slot in verdicts] == [False, True, False, False]
    assert slots.get(state), "a snapshot is of a version, and done"
