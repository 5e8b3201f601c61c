"""Copies as bytes: packing, offers, pieces, seals, limits, files; and the slots that logs keep."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crowdmesh_jax.agent.copies import CopyLimits
from crowdmesh_jax.agent.keeper import DamagedCopyError, Keeper
from crowdmesh_jax.agent.packing import CopyArrays, Offer, Packing
from crowdmesh_jax.agent.slots import Slots
from crowdmesh_jax.errors import FrameError
from crowdmesh_jax.protocol.common import Slot
from crowdmesh_jax.protocol.evidence import Copy

COPY = Copy(first_layer=0, last_layer=2, tag=1, version=7)
NAME = COPY.name
PIECE_BYTES = 2**20


def arrays(large: int = 700_000, seed: int = 3) -> CopyArrays:
    random = np.random.default_rng(seed)
    return CopyArrays(
        state={
            ("param", "frozen", "w"): np.arange(large, dtype=np.float32),
            ("param", "a", "w"): random.standard_normal(large).astype(np.float32),
            ("param", "a", "none"): np.zeros((0, 4), np.float32),
            ("state", "a", "count"): np.int32(5),
            ("opt", "b", "mask"): np.array([True, False, True]),
        },
        verdict={("global", "", "norm"): np.float32(1.5)},
    )


def send(
    keeper: Keeper,
    copy: CopyArrays,
    *,
    name: Copy = COPY,
    flip: int | None = None,
    pieces: int | None = None,
) -> tuple[Offer, tuple[int, ...]]:
    """Offers a copy and sends what is wanted, at most so many pieces; one byte of the stream may be
    flipped on the way."""
    offer = Offer.of(copy, PIECE_BYTES)
    wanted = keeper.offered("owner", name.name, offer.to_plain())
    for index in wanted[:pieces]:
        piece = offer.packing.piece(copy, index, PIECE_BYTES)
        start, stop = offer.span(index)
        if flip is not None and start <= flip < stop:
            piece[flip - start] ^= 1
        keeper.store.store_piece("owner", name.name, start, piece)
    return offer, wanted


def sealed(keeper: Keeper, offer: Offer, name: Copy = COPY) -> bool:
    return asyncio.run(keeper.keep("owner", name, offer.manifest))


def whole(keeper: Keeper, copy: CopyArrays, name: Copy = COPY) -> tuple[int, ...]:
    offer, wanted = send(keeper, copy, name=name)
    assert sealed(keeper, offer, name)
    return wanted


def make(**limits: Any) -> Keeper:
    return Keeper(CopyLimits(**limits), Slots())


def on_the_disk(folder: Path) -> dict[str, Any]:
    return {"memory_bytes": 0, "disk_bytes": 2**24, "folder": folder}


def found(keeper: Keeper, name: Copy = COPY) -> CopyArrays | None:
    try:
        outgoing = asyncio.run(keeper.outgoing(name, None))
    except AssertionError:
        return None
    return outgoing.arrays


def assert_same(kept: CopyArrays | None, copy: CopyArrays) -> None:
    assert kept is not None
    for ours, theirs in ((kept.state, copy.state), (kept.verdict, copy.verdict)):
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert np.asarray(ours[key]).dtype == np.asarray(value).dtype
            assert np.array_equal(ours[key], value), key


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_copy_comes_out_as_it_went_in_and_only_once_its_seal_matched(tmp_path, on_disk):
    keeper = make(**(on_the_disk(tmp_path) if on_disk else {}))
    copy = arrays()
    offer, wanted = send(keeper, copy)
    assert len(wanted) > 2
    assert keeper.store.find(NAME) is None, "invisible before its seal"
    assert sealed(keeper, offer)
    assert_same(found(keeper), copy)
    assert (keeper.store.disk_bytes > 0) is on_disk
    keeper.store.drop(NAME)
    assert found(keeper) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", [0, PIECE_BYTES + 5, 5_599_999])
def test_a_byte_that_was_flipped_on_the_way_is_found(where):
    keeper = make()
    offer, _ = send(keeper, arrays(), flip=where)
    assert not sealed(keeper, offer)
    assert keeper.store.find(NAME) is None
    assert keeper.store.memory_bytes == 0


def test_a_byte_that_was_flipped_on_the_disk_is_found_when_it_is_read(tmp_path):
    keeper = make(**on_the_disk(tmp_path))
    whole(keeper, arrays())
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedCopyError, match="checksum does not match"):
        asyncio.run(keeper.outgoing(COPY, None))
    path.unlink()
    with pytest.raises(DamagedCopyError, match="cannot be read"):
        asyncio.run(keeper.gather([COPY]))


# Only what is not there -------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True])
def test_pieces_that_an_older_copy_has_are_not_sent_again(tmp_path, on_disk):
    keeper = make(**(on_the_disk(tmp_path) if on_disk else {}))
    first, second = arrays(seed=3), arrays(seed=4)
    assert len(whole(keeper, first)) == 6
    newer = replace(COPY, version=9)
    assert whole(keeper, second, newer) == (2, 3, 4, 5), "2.7 pieces of the state are frozen"
    assert_same(found(keeper, newer), second)
    assert_same(found(keeper), first)


def test_what_rotted_in_an_older_copy_is_found_and_then_sent(tmp_path):
    keeper = make(**on_the_disk(tmp_path))
    whole(keeper, arrays(seed=3))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    newer = replace(COPY, version=9)
    offer, wanted = send(keeper, arrays(seed=4), name=newer)
    assert 0 not in wanted
    assert not sealed(keeper, offer, newer)
    assert len(whole(keeper, arrays(seed=4), newer)) == 6, "asked again, all of it must come"


def test_a_transfer_goes_on_where_a_fence_broke_it_off():
    keeper, copy = make(), arrays()
    offer, _ = send(keeper, copy, pieces=4)
    keeper.break_off()
    assert not sealed(keeper, offer), "of the copy in the making nothing stays"
    again = replace(COPY, tag=2)  # the same version, decided in another epoch
    assert whole(keeper, copy, again) == (4, 5)
    assert_same(found(keeper, again), copy)


def test_what_a_fence_left_gives_way_to_a_copy_that_needs_the_room():
    copy, other = arrays(), arrays(seed=8)
    other.state["param", "frozen", "w"][:] += 1
    size_bytes = Packing.of(copy).size_bytes
    keeper = make(memory_bytes=int(1.5 * size_bytes))
    send(keeper, copy, pieces=3)
    keeper.break_off()
    whole(keeper, other, replace(COPY, version=8))
    assert keeper.store.memory_bytes == size_bytes
    keeper.store.drop(replace(COPY, version=8).name)
    assert len(whole(keeper, copy)) == 6


def test_a_piece_that_rotted_in_what_a_fence_left_is_found_and_then_sent():
    keeper, copy = make(), arrays()
    send(keeper, copy, pieces=4, flip=2**20 + 1)
    keeper.break_off()
    offer, wanted = send(keeper, copy)
    assert 1 not in wanted
    assert not sealed(keeper, offer)
    assert len(whole(keeper, copy)) == 6, "nothing of it is trusted any more"


# Limits and bad input ---------------------------------------------------------------------------


def test_a_copy_without_room_is_refused_before_memory_is_taken(caplog):
    keeper = make(memory_bytes=1000, disk_bytes=2**24)
    with pytest.raises(FrameError, match="1000 bytes that are free"):
        keeper.offered("owner", NAME, Offer.of(arrays(), PIECE_BYTES).to_plain())
    keeper = make(memory_bytes=8_000_000)
    whole(keeper, arrays())
    offer, wanted = send(keeper, arrays(seed=4), name=replace(COPY, version=8))
    assert wanted == ()
    assert "bytes that are free" in caplog.text
    assert not sealed(keeper, offer, replace(COPY, version=8))


def test_a_piece_that_was_not_offered_is_refused_and_nothing_of_it_stays():
    keeper, copy = make(), arrays(100)
    store, name = keeper.store, NAME
    store.store_piece("owner", name, 0, np.zeros(64, np.uint8))
    assert store.memory_bytes == 0, "nobody offered it"
    for offset, size in ((64, 64), (0, 64), (-PIECE_BYTES, 64), (PIECE_BYTES, 64)):
        send(keeper, copy, pieces=0)
        with pytest.raises(FrameError, match="piece"):
            store.store_piece("owner", name, offset, np.zeros(size, np.uint8))
        assert store.incoming("owner", name) is None


def test_a_seal_that_is_not_of_the_offer_makes_no_copy():
    keeper = make()
    offer, _ = send(keeper, arrays())
    other = Offer.of(arrays(seed=5), PIECE_BYTES)
    assert not asyncio.run(keeper.keep("owner", COPY, other.manifest))
    send(keeper, arrays(), pieces=5)
    assert not sealed(keeper, offer), "a piece is missing"


def test_copies_may_come_and_go_while_others_are_checked(tmp_path):
    """Checking takes its time in a thread; the store is not held up, nor does it break."""
    keeper = make(memory_bytes=2**26, disk_bytes=2**26, folder=tmp_path)

    async def busy() -> list[bool]:
        versions = [replace(COPY, version=v) for v in range(12)]
        offers = [send(keeper, arrays(seed=v.version), name=v)[0] for v in versions]
        checks = [
            asyncio.create_task(keeper.keep("owner", v, offer.manifest))
            for v, offer in zip(versions, offers, strict=True)
        ]
        for number in range(2000):
            keeper.store.keep_own((9, 9, 1, number), arrays(4))
            assert keeper.store.memory_bytes >= 0
            if number % 50 == 0:
                await asyncio.sleep(0)
        return await asyncio.gather(*checks)

    assert all(asyncio.run(busy()))


@pytest.mark.parametrize(
    "change",
    [
        {"piece_bytes": 0}, {"piece_bytes": "1"}, {"checksums": []}, {"checksums": ["x" * 40]},
        {"checksums": [7] * 6}, {"leaves": 3}, {"more": 1}, {"piece_bytes": 1},
    ],
)  # fmt: skip
def test_an_offer_that_is_none_is_one_clear_error(change):
    plain = {**Offer.of(arrays(), PIECE_BYTES).to_plain(), **change}
    with pytest.raises(FrameError):
        Offer.read(plain, 2**30)


def test_an_offer_reads_back_as_it_was():
    offer = Offer.of(arrays(), PIECE_BYTES)
    again = Offer.read(offer.to_plain(), 2**30)
    assert again.checksums == offer.checksums
    assert again.manifest == offer.manifest


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
    keeper = make(memory_bytes=0)
    keeper.store.keep_own(NAME, arrays())
    assert_same(found(keeper), arrays())
    assert (keeper.store.memory_bytes, keeper.store.size_bytes(NAME)) == (0, 0)


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
