"""Bounded queues keep their order; urgent lanes come first and bulk is never starved."""

import asyncio
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdmesh_jax.errors import PeerLostError, TransportError
from crowdmesh_jax.transport import Frame, Lane, PeerGone, QueueBounds, Received
from crowdmesh_jax.transport.flow import Admission, Inbox, LaneGate


def received(index: int, lane: Lane = Lane.PIPELINE, peer: str = "b", size: int = 1) -> Received:
    return Received(peer, lane, Frame({"i": index}), size, 0.0)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@settings(deadline=None)
@given(st.lists(st.integers(1, 120), max_size=20), st.integers(1, 4), st.data())
def test_admission_lets_in_in_order_within_bounds_and_everything_in_the_end(sizes, frames, data):
    bounds = QueueBounds(frames=frames, size_bytes=100)

    async def body():
        inside, order = [], []

        def accept(index):
            inside.append(index)
            order.append(index)

        gate = Admission(accept, bounds)
        async with asyncio.TaskGroup() as group:
            for index, size in enumerate(sizes):
                group.create_task(gate.put(index, size))
                if data.draw(st.booleans()):
                    await settle()
                if inside and data.draw(st.booleans()):
                    gate.release(sizes[inside.pop(0)])
                assert len(inside) <= frames
                assert len(inside) <= 1 or sum(sizes[i] for i in inside) <= 100
            await settle()
            while inside:
                gate.release(sizes[inside.pop(0)])
                await settle()
        assert order == list(range(len(sizes)))

    asyncio.run(body())


def test_a_cancelled_put_does_not_block_those_behind_it():
    async def body():
        accepted = []
        gate = Admission(accepted.append, QueueBounds(frames=1))
        await gate.put("first", 1)
        cancelled = asyncio.create_task(gate.put("cancelled", 1))
        behind = asyncio.create_task(gate.put("behind", 1))
        await settle()
        cancelled.cancel()
        await settle()
        gate.release(1)
        await behind
        assert accepted == ["first", "behind"]

    asyncio.run(body())


def test_failing_ends_waits_now_and_later():
    async def body():
        gate = Admission(lambda item: None, QueueBounds(frames=1))
        await gate.put("in", 1)
        waiting = asyncio.create_task(gate.put("waits", 1))
        await settle()
        gate.fail(lambda: PeerLostError("gone"))
        with pytest.raises(PeerLostError):
            await waiting
        with pytest.raises(PeerLostError):
            await gate.put("later", 1)

    asyncio.run(body())


def test_urgent_frames_come_first_and_one_in_bulk_turn_is_bulk():
    async def body():
        inbox = Inbox(bulk_turn=5)
        for index in range(3):
            await inbox.put(received(index, Lane.BULK))
        for index in range(20):
            await inbox.put(received(index, Lane.CONTROL if index % 2 else Lane.PIPELINE))
        got = [await inbox.get() for _ in range(23)]
        assert [at for at, item in enumerate(got) if item.lane is Lane.BULK] == [4, 9, 14]
        urgent = [item.frame.message["i"] for item in got if item.lane is not Lane.BULK]
        assert urgent == list(range(20))

    asyncio.run(body())


def test_the_end_of_a_peer_comes_after_all_its_frames_and_before_its_next_life():
    async def body():
        inbox = Inbox()
        await inbox.put(received(0, Lane.BULK))
        await inbox.put(received(1))
        await inbox.put(received(9, Lane.BULK, peer="c"))
        inbox.gone(PeerGone("b", "test"))
        await inbox.put(received(2))
        got = [await inbox.get() for _ in range(5)]
        of_b = [item for item in got if item.peer == "b"]
        assert [getattr(item, "frame", None) and item.frame.message["i"] for item in of_b] == [
            *(1, 0, None, 2)
        ]

    asyncio.run(body())


def test_each_peer_and_lane_has_a_bound_of_its_own():
    async def body():
        inbox = Inbox(QueueBounds(frames=2))
        for peer in ("b", "c"):
            for lane in Lane:
                for index in range(2):
                    await inbox.put(received(index, lane, peer))
        third = asyncio.create_task(inbox.put(received(2, Lane.PIPELINE, "b")))
        await settle()
        assert not third.done()
        while (item := await inbox.get()).peer != "b" or item.lane is not Lane.PIPELINE:
            pass
        await third

    asyncio.run(body())


def test_a_put_that_waits_ends_with_its_peer():
    async def body():
        inbox = Inbox(QueueBounds(frames=1))
        await inbox.put(received(0))
        waiting = asyncio.create_task(inbox.put(received(1)))
        await settle()
        inbox.gone(PeerGone("b", "test"))
        with pytest.raises(TransportError):
            await waiting

    asyncio.run(body())


def test_closing_lets_writers_go_and_tells_readers():
    async def body():
        inbox = Inbox(QueueBounds(frames=1))
        reading = asyncio.create_task(inbox.get())
        await settle()
        await inbox.put(received(0))
        assert (await reading).frame.message["i"] == 0
        await inbox.put(received(1))
        writing = asyncio.create_task(inbox.put(received(2)))
        await settle()
        inbox.close()
        await writing
        await inbox.put(received(3))
        with pytest.raises(TransportError, match="closed"):
            await inbox.get()

    asyncio.run(body())


def test_bulk_is_free_while_nothing_urgent_is_written():
    async def body():
        gate = LaneGate(patience_s=10)
        for _ in range(100):
            await asyncio.wait_for(gate.bulk_turn(2**20), 0.5)

    asyncio.run(body())


def test_bulk_waits_for_an_urgent_frame_that_is_being_written():
    async def body():
        gate = LaneGate(patience_s=10)
        gate.urgent_enter()
        turn = asyncio.create_task(gate.bulk_turn(2**20))
        await asyncio.sleep(0.05)
        assert not turn.done()
        gate.urgent_leave(10)
        await asyncio.wait_for(turn, 0.5)

    asyncio.run(body())


def test_bulk_gets_its_floor_share_of_the_bytes_under_urgent_load():
    async def body():
        gate = LaneGate(floor_share=0.05, patience_s=100)
        chunk, urgent, bulk = 1000, 0, 0

        async def write_bulk():
            nonlocal bulk
            while True:
                await gate.bulk_turn(chunk)
                bulk += chunk

        task = asyncio.create_task(write_bulk())
        gate.urgent_enter()  # one or two are being written at any time
        for _ in range(2000):
            gate.urgent_enter()
            await settle()
            gate.urgent_leave(500)
            urgent += 500
            await settle()
        task.cancel()
        assert bulk / (bulk + urgent) == pytest.approx(0.05, rel=0.05)

    asyncio.run(body())


def test_bulk_goes_on_slowly_when_an_urgent_lane_is_stuck():
    async def body():
        gate = LaneGate(patience_s=0.05)
        gate.urgent_enter()  # its reader sleeps: it never leaves
        started_s = time.monotonic()
        for _ in range(3):
            await gate.bulk_turn(2**20)
        assert 0.14 < time.monotonic() - started_s < 1.0

    asyncio.run(body())
