"""Transfers of copies between two bodies: offers, answers, and what is not sent."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import numpy as np
import pytest

from crowdmesh_jax.agent import packing, sending
from crowdmesh_jax.agent.copies import CopyLimits
from crowdmesh_jax.agent.envelope import Envelope, seal, unseal
from crowdmesh_jax.agent.keeper import Keeper
from crowdmesh_jax.agent.packing import CopyArrays
from crowdmesh_jax.agent.sending import CopyTransfers
from crowdmesh_jax.agent.slots import Slots
from crowdmesh_jax.core.crowd import DeviceId
from crowdmesh_jax.errors import PeerLostError
from crowdmesh_jax.protocol import member_events as ev
from crowdmesh_jax.protocol import messages as msg
from crowdmesh_jax.protocol.evidence import Copy
from crowdmesh_jax.transport import Lane

COPY = Copy(first_layer=0, last_layer=1, tag=1, version=5)


class Body:
    """One end; the machine's part is only what `Chunk` and `Seal` lead to."""

    def __init__(self, name: str) -> None:
        self.name, self.peer = name, None
        self.keeper = Keeper(CopyLimits(), Slots())
        self.transfers = CopyTransfers(self.keeper, self.send, lambda event: None)
        self.pieces = 0
        self.answers = True
        self.whole: list[int | None] = []
        self.carried: list[tuple[float, int]] = []

    async def send(self, to: str, envelope: Envelope, lane: Lane) -> None:
        if self.peer is None:
            raise PeerLostError("it is gone")
        await self.peer.take(self.name, unseal(seal(envelope)))

    async def take(self, sender: str, envelope: Envelope) -> None:
        message = envelope.message
        if message is None:
            answer = self.transfers.take(sender, envelope.extra)
            if answer is not None and self.answers:
                await self.send(sender, answer, Lane.CONTROL)
        elif isinstance(message, msg.Chunk):
            self.pieces += 1
            chunk = ev.StoreChunk(
                sender=sender, copy=message.copy, offset_bytes=message.offset_bytes
            )
            self.keeper.do(chunk, envelope, None)
        elif isinstance(message, msg.Seal):
            came = await self.keeper.keep(sender, message.copy, message.manifest)
            self.whole.append(None if came is None else came.came_bytes)
            self.carried.append((0.0, 0) if came is None else came.seconds_and_bytes)


@pytest.fixture
def ends(monkeypatch):
    monkeypatch.setattr(packing, "PIECE_BYTES", 1024)
    owner, holder = Body("owner"), Body("holder")
    owner.peer, holder.peer = holder, owner
    return owner, holder


def state(seed: int, size: int = 1024) -> CopyArrays:
    random = np.random.default_rng(seed)
    return CopyArrays(
        state={
            ("param", "a", "still"): np.arange(size, dtype=np.float32),
            ("param", "b", "moving"): random.standard_normal(size).astype(np.float32),
        }
    )


async def send(owner: Body, copy: Copy, pieces: float = float("inf")) -> None:
    action = ev.SendCopy(to=DeviceId("holder"), copy=copy, epoch=1)
    holder = owner.peer
    limit = (holder.pieces if holder else 0) + pieces
    await owner.transfers.send(
        action, "r1", None, lambda: owner.peer is None or owner.peer.pieces < limit
    )


def test_a_copy_is_sent_whole_once_and_then_only_what_changed(ends):
    owner, holder = ends

    async def story() -> None:
        for version in (5, 6):
            copy = replace(COPY, version=version)
            owner.keeper.store.keep_own(copy.name, state(version))
            await send(owner, copy)

    asyncio.run(story())
    assert holder.whole == [8192, 4096], "a half of it does not change"
    kept = holder.keeper.store.find(replace(COPY, version=6).name)
    assert isinstance(kept, CopyArrays)
    for key, value in state(6).state.items():
        assert np.array_equal(kept.state[key], value)


def test_what_a_link_carried_is_measured_between_the_first_piece_and_the_last(ends):
    owner, holder = ends
    real, held_up = owner.send, 0.01

    async def slowly(to: str, envelope: Envelope, lane: Lane) -> None:
        if isinstance(envelope.message, msg.Chunk):
            await asyncio.sleep(held_up)
        await real(to, envelope, lane)

    owner.transfers = CopyTransfers(owner.keeper, slowly, lambda event: None)

    async def story() -> None:
        owner.keeper.store.keep_own(COPY.name, state(5))
        await send(owner, COPY)
        small = replace(COPY, version=9, last_layer=9)
        arrays = CopyArrays(state={("param", "c", "x"): np.full(16, 7, np.float32)})
        owner.keeper.store.keep_own(small.name, arrays)
        await send(owner, small)

    asyncio.run(story())
    (seconds, size_bytes), alone = holder.carried
    assert size_bytes == 7 * 1024, "the first piece's own way is not seen"
    assert 7 * held_up <= seconds < 70 * held_up
    assert alone == (0.0, 0), "of one piece nothing is known"


def test_a_fence_breaks_a_transfer_off_and_the_next_epoch_goes_on_from_there(ends):
    owner, holder = ends

    async def story() -> None:
        owner.keeper.store.keep_own(COPY.name, state(5))
        await send(owner, COPY, pieces=5)
        assert holder.whole == []
        for end in ends:
            end.transfers.break_off()
        await send(owner, COPY)

    asyncio.run(story())
    assert holder.pieces == 8
    assert holder.whole == [3072]


def test_who_does_not_answer_gets_all_of_it(ends, monkeypatch, caplog):
    owner, holder = ends
    monkeypatch.setattr(sending, "ANSWER_S", 0.05)
    holder.answers = False
    owner.keeper.store.keep_own(COPY.name, state(5))
    asyncio.run(send(owner, COPY))
    assert "holder did not answer" in caplog.text
    assert holder.whole == [8192]


@pytest.mark.parametrize("end", ["peer_gone", "break_off"])
def test_nobody_waits_for_the_answer_of_who_is_gone(ends, end):
    owner, holder = ends
    holder.answers = False

    async def story() -> None:
        owner.keeper.store.keep_own(COPY.name, state(5))
        going = asyncio.create_task(send(owner, COPY, pieces=1))
        await asyncio.sleep(0.05)
        assert not going.done()
        if end == "peer_gone":
            owner.transfers.peer_gone("another")
            await asyncio.sleep(0.01)
            assert not going.done()
            owner.transfers.peer_gone("holder")
        else:
            owner.transfers.break_off()
        await asyncio.wait_for(going, 1.0)

    asyncio.run(story())


def test_a_peer_that_is_lost_ends_a_transfer_with_a_word(ends, caplog):
    caplog.set_level(logging.WARNING)
    owner, _ = ends
    owner.keeper.store.keep_own(COPY.name, state(5))
    owner.peer = None
    asyncio.run(send(owner, COPY))
    assert "a copy did not reach holder" in caplog.text


@pytest.mark.parametrize(
    "extra",
    [
        {"copy_offer": 3},
        {"copy_offer": {"name": [1, 2, 3]}},
        {"copy_offer": {"name": [0, 1, 1, "5"]}},
        {"copy_offer": {"name": [0, 1, 1, 5], "leaves": []}},
        {"copy_wanted": []},
        {"copy_wanted": {"name": [0, 1, 1, 5], "pieces": 3}},
        {"copy_wanted": {"name": [0, 1, 1, 5], "pieces": ["0"]}},
    ],
)
def test_a_frame_that_is_no_offer_is_refused_with_a_word(ends, caplog, extra):
    owner, _ = ends
    assert owner.transfers.is_one(extra)
    assert owner.transfers.take("stranger", extra) is None
    assert "a frame from stranger was refused" in caplog.text
