"""What every transport promises, held against each of them."""

import asyncio
import contextlib
import threading
import time

import numpy as np
import pytest

from crowdmesh_jax.errors import FrameError, PeerLostError, TransportError
from crowdmesh_jax.transport import (
    Frame,
    GrpcTransport,
    Lane,
    MemoryNetwork,
    PeerGone,
    QueueBounds,
    Received,
    ShapedTransport,
    Transport,
)

KINDS = ("memory", "grpc", "shaped memory", "shaped grpc")
QUEUE = QueueBounds(frames=8, size_bytes=64 * 2**20)
FAST_LINK = (2e9, 0.0005)
"""bytes/s, s"""


class Crowd:
    """Makes started transports of one kind and closes them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.network = MemoryNetwork(queue=QUEUE)
        self.transports: list[Transport] = []
        self.addresses: dict[str, str] = {}

    async def add(self, device: str) -> Transport:
        if "grpc" in self.kind:
            transport = GrpcTransport(device, run="run-1", token="secret", queue=QUEUE)
        else:
            transport = self.network.transport(device)
        if "shaped" in self.kind:
            transport = ShapedTransport(transport, lambda peer: FAST_LINK, queue=QUEUE)
        self.transports.append(transport)
        self.addresses[device] = await transport.start()
        return transport

    async def pair(self) -> tuple[Transport, Transport]:
        a, b = await self.add("a"), await self.add("b")
        await a.connect("b", self.addresses["b"], deadline_s=5)
        return a, b


def claim(body):
    """Runs `body(crowd)` on a loop of its own, within 15 s, for each kind."""

    @pytest.mark.parametrize("kind", KINDS)
    def test(kind):
        async def run():
            crowd = Crowd(kind)
            try:
                async with asyncio.timeout(15):
                    await body(crowd)
            finally:
                for transport in crowd.transports:
                    await transport.close()

        asyncio.run(run())

    test.__name__ = body.__name__
    return test


@claim
async def test_it_is_a_transport_that_knows_its_device_and_its_peers(crowd):
    a, b = await crowd.pair()
    assert isinstance(a, Transport)
    assert (a.device, b.device) == ("a", "b")
    assert (a.peers, b.peers) == ({"b"}, {"a"})


@claim
async def test_a_frame_arrives_as_it_was_sent_in_both_directions(crowd):
    a, b = await crowd.pair()
    arrays = (np.arange(12.0).reshape(3, 4).T, np.zeros((0, 3), np.int8), np.array(True))
    for sender, receiver in ((a, b), (b, a)):
        for lane in Lane:
            before_s = time.monotonic()
            await sender.send(receiver.device, Frame({"at": (1, {"x": 2.5})}, arrays), lane)
            got = await receiver.receive()
            assert isinstance(got, Received)
            assert (got.peer, got.lane) == (sender.device, lane)
            assert got.frame.message == {"at": [1, {"x": 2.5}]}  # tuples become lists, everywhere
            for sent, array in zip(arrays, got.frame.arrays, strict=True):
                assert array.dtype == sent.dtype
                assert np.array_equal(array, sent)
                assert not array.flags.writeable
            assert got.size_bytes > sum(array.nbytes for array in arrays)
            assert before_s <= got.received_s <= time.monotonic()


@claim
async def test_a_disconnected_peer_and_this_side_are_told_and_others_are_not(crowd):
    a, b = await crowd.pair()
    c = await crowd.add("c")
    await a.connect("c", crowd.addresses["c"], deadline_s=5)
    a.disconnect("b", "it broke a rule")
    gone = await a.receive()
    assert isinstance(gone, PeerGone)
    assert (gone.peer, gone.reason) == ("b", "it broke a rule")
    told = await b.receive()
    assert isinstance(told, PeerGone)
    assert told.peer == "a"
    assert a.peers == {"c"}
    with pytest.raises(PeerLostError):
        await a.send("b", Frame({}), Lane.CONTROL)
    a.disconnect("b", "again")  # harmless
    await a.send("c", Frame({"still": "here"}), Lane.CONTROL)
    got = await c.receive()
    assert isinstance(got, Received)
    await a.connect("b", crowd.addresses["b"], deadline_s=5)
    assert a.peers == {"b", "c"}


class StillComputed:
    """Behaves as a jax array that is not ready: reading it blocks."""

    def __init__(self, value: np.ndarray) -> None:
        self.value, self.dtype, self.shape = value, value.dtype, value.shape
        self.done = threading.Event()

    def is_ready(self) -> bool:
        return self.done.is_set()

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if not self.done.wait(3):
            raise TimeoutError("nobody computed it: the loop was blocked")
        return self.value


@claim
async def test_arrays_that_are_still_computed_hold_up_their_lane_alone(crowd):
    a, b = await crowd.pair()
    late = StillComputed(np.arange(5))
    async with asyncio.timeout(1):  # sends do not wait for it either
        await a.send("b", Frame({"n": 0}, (late,)), Lane.PIPELINE)
        await a.send("b", Frame({"n": 1}), Lane.PIPELINE)
        await a.send("b", Frame({"n": 2}, (np.ones(10),)), Lane.PIPELINE)
        await a.send("b", Frame({"other": "lane"}), Lane.BULK)
        assert (await b.receive()).frame.message == {"other": "lane"}
    late.done.set()
    got = [await b.receive() for _ in range(3)]
    assert [item.frame.message["n"] for item in got] == [0, 1, 2]
    assert np.array_equal(got[0].frame.arrays[0], late.value)
    await a.send("b", Frame({"n": 3}), Lane.PIPELINE)
    assert (await b.receive()).frame.message == {"n": 3}


@claim
async def test_jax_arrays_can_be_sent_right_after_their_dispatch(crowd):
    import jax

    a, b = await crowd.pair()
    x = jax.numpy.ones((400, 400))
    y = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: y @ x / 400, x))(x)
    await a.send("b", Frame({}, (y,)), Lane.PIPELINE)
    assert np.array_equal((await b.receive()).frame.arrays[0], np.asarray(y))


@claim
async def test_each_lane_keeps_its_order(crowd):
    a, b = await crowd.pair()
    frames = 60
    sizes = np.random.default_rng(0).integers(0, 300_000, (len(Lane), frames))

    async def send(lane, sizes):
        for index, size in enumerate(sizes):
            await a.send("b", Frame({"i": index}, (np.zeros(size, np.uint8),)), lane)

    async with asyncio.TaskGroup() as group:
        for lane, row in zip(Lane, sizes, strict=True):
            group.create_task(send(lane, row))
        seen = {lane: [] for lane in Lane}
        for _ in range(len(Lane) * frames):
            got = await b.receive()
            seen[got.lane].append(got.frame.message["i"])
            assert got.frame.arrays[0].size == sizes[list(Lane).index(got.lane)][seen[got.lane][-1]]
    assert all(indices == list(range(frames)) for indices in seen.values())


@claim
async def test_calls_of_send_that_wait_are_served_in_their_order(crowd):
    a, b = await crowd.pair()
    async with asyncio.TaskGroup() as group:
        for index in range(50):  # the queue holds 8
            group.create_task(a.send("b", Frame({"i": index}), Lane.BULK))
        seen = [(await b.receive()).frame.message["i"] for _ in range(50)]
    assert seen == list(range(50))


@claim
async def test_a_frame_of_20_mb_arrives_whole_and_aligned_on_any_lane(crowd):
    a, b = await crowd.pair()
    array = np.random.default_rng(0).integers(0, 255, 20_000_000, dtype=np.uint8)
    for lane in Lane:
        await a.send("b", Frame({}, (array[:3], array)), lane)
        got = await b.receive()
        assert np.array_equal(got.frame.arrays[1], array)
        if "grpc" in crowd.kind:
            assert all(leaf.ctypes.data % 64 == 0 for leaf in got.frame.arrays)
        else:
            assert np.shares_memory(got.frame.arrays[1], array)  # nothing was copied


@claim
async def test_small_pipeline_frames_overtake_a_bulk_frame_of_50_mb(crowd):
    a, b = await crowd.pair()
    await a.send("b", Frame({}, (np.zeros(50_000_000, np.uint8),)), Lane.BULK)
    if "shaped" in crowd.kind:
        await asyncio.sleep(0.002)  # 25 ms of link: the bulk frame has the link now
    for index in range(5):
        await a.send("b", Frame({"i": index}), Lane.PIPELINE)
    await a.send("b", Frame({}), Lane.CONTROL)
    lanes = [(await b.receive()).lane for _ in range(7)]
    assert lanes[-1] is Lane.BULK


@claim
async def test_bulk_still_gets_through_while_the_pipeline_is_never_idle(crowd):
    a, b = await crowd.pair()
    frame = Frame({}, (np.zeros(500_000, np.uint8),))
    sent = 0

    async def flood():
        nonlocal sent
        while True:
            await a.send("b", frame, Lane.PIPELINE)
            sent += 1
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        floods = [group.create_task(flood()) for _ in range(2)]
        while sent < 20:
            await b.receive()
        await a.send("b", Frame({}, (np.zeros(3_000_000, np.uint8),)), Lane.BULK)
        meanwhile = 0
        while (await b.receive()).lane is not Lane.BULK:
            meanwhile += 1
        for task in floods:
            task.cancel()
    # 5 % of the bytes would be 114 frames of the pipeline; the queues hold a few more
    assert meanwhile < 400


@claim
async def test_send_waits_while_nobody_reads_and_goes_on_when_somebody_does(crowd):
    a, b = await crowd.pair()
    sent = 0

    async def send_all():
        nonlocal sent
        for index in range(60):
            await a.send("b", Frame({"i": index}, (np.zeros(4_000_000, np.uint8),)), Lane.PIPELINE)
            sent += 1

    async with asyncio.TaskGroup() as group:
        group.create_task(send_all())
        for _ in range(100):  # until nothing has moved for a while
            before = sent
            await asyncio.sleep(0.1)
            if sent == before:
                break
        held = sent
        # two bounded queues (four if shaped), what is between them, and gRPC's own windows
        assert held < 50
        seen = [(await b.receive()).frame.message["i"] for _ in range(60)]
    assert seen == list(range(60))


@claim
async def test_a_cancelled_send_leaves_the_lane_usable(crowd):
    a, b = await crowd.pair()
    frame = Frame({}, (np.zeros(8_000_000, np.uint8),))
    cancelled = 0
    for _ in range(40):
        try:
            async with asyncio.timeout(0.02):
                await a.send("b", frame, Lane.PIPELINE)
        except TimeoutError:
            cancelled += 1
            if cancelled == 3:
                break
    assert cancelled == 3  # the queues were full
    last = asyncio.create_task(a.send("b", Frame({"last": True}), Lane.PIPELINE))
    while "last" not in (await b.receive()).frame.message:
        pass
    await last


@claim
async def test_close_sends_what_is_queued_and_the_peer_hears_of_it_once(crowd):
    for closer in ("dialler", "listener"):
        left, right = f"{closer}-a", f"{closer}-b"
        a, b = await crowd.add(left), await crowd.add(right)
        await a.connect(right, crowd.addresses[right], deadline_s=5)
        goes, stays = (a, b) if closer == "dialler" else (b, a)
        await goes.send(stays.device, Frame({}, (np.zeros(20_000_000, np.uint8),)), Lane.BULK)
        for index in range(5):
            await goes.send(stays.device, Frame({"i": index}), Lane.PIPELINE)
        closing = asyncio.create_task(goes.close())
        events = [await stays.receive() for _ in range(7)]
        await closing
        assert all(isinstance(event, Received) for event in events[:6])
        assert isinstance(events[6], PeerGone)
        assert (events[6].peer, events[6].error) == (goes.device, None)
        assert stays.peers == frozenset()
        with pytest.raises(PeerLostError):
            await stays.send(goes.device, Frame({}))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await stays.receive()
        with pytest.raises(PeerLostError):
            await goes.send(stays.device, Frame({}))
        with pytest.raises(TransportError):
            await goes.receive()
        await goes.close()  # again is harmless


@claim
async def test_a_send_that_waits_ends_when_the_peer_goes(crowd):
    a, b = await crowd.pair()

    async def flood():
        while True:
            await a.send("b", Frame({}, (np.zeros(8_000_000, np.uint8),)), Lane.PIPELINE)

    task = asyncio.create_task(flood())
    await asyncio.sleep(0.3)
    assert not task.done()
    await b.close()
    gone = await a.receive()
    assert isinstance(gone, PeerGone)
    with pytest.raises(PeerLostError):
        await task


@claim
async def test_both_sides_may_dial_at_once_and_dial_again(crowd):
    a, b = await crowd.add("a"), await crowd.add("b")
    for _ in range(2):
        await asyncio.gather(
            a.connect("b", crowd.addresses["b"], deadline_s=5),
            a.connect("b", crowd.addresses["b"], deadline_s=5),
            b.connect("a", crowd.addresses["a"], deadline_s=5),
        )
    for index in range(20):
        for sender, receiver in ((a, b), (b, a)):
            await sender.send(receiver.device, Frame({"i": index}), Lane.PIPELINE)
            assert (await receiver.receive()).frame.message == {"i": index}
    await b.close()
    assert isinstance(await a.receive(), PeerGone)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await a.receive()


@claim
async def test_an_address_of_another_device_is_refused(crowd):
    a = await crowd.add("a")
    await crowd.add("b")
    with pytest.raises(PeerLostError, match=r"b.*c"):
        await a.connect("c", crowd.addresses["b"], deadline_s=2)
    assert a.peers == frozenset()


@claim
async def test_who_does_not_answer_by_the_deadline_is_lost(crowd):
    a, b = await crowd.add("a"), await crowd.add("b")
    await b.close()
    started_s = time.monotonic()
    with pytest.raises(PeerLostError, match="b"):
        await a.connect("b", crowd.addresses["b"], deadline_s=0.3)
    assert 0.25 < time.monotonic() - started_s < 1.0


@claim
async def test_frames_that_cannot_travel_are_refused_where_they_are_sent(crowd):
    a, b = await crowd.pair()
    with pytest.raises(FrameError):
        await a.send("b", Frame({"a": object()}))
    with pytest.raises(FrameError):
        await a.send("b", Frame({}, (np.array([object()]),)))
    await a.send("b", Frame({"fine": 1}))
    assert (await b.receive()).frame.message == {"fine": 1}


@claim
async def test_nobody_is_known_before_connect(crowd):
    a, _ = await crowd.add("a"), await crowd.add("b")
    with pytest.raises(PeerLostError, match="no channel"):
        await a.send("b", Frame({}))


@claim
async def test_frames_of_many_peers_come_through_one_receive(crowd):
    hub = await crowd.add("hub")
    others = [await crowd.add(f"d{index}") for index in range(4)]
    for other in others:
        await other.connect("hub", crowd.addresses["hub"], deadline_s=5)
    for other in others:
        await other.send("hub", Frame({"me": other.device}))
    peers = {(got := await hub.receive()).peer: got.frame.message["me"] for _ in others}
    assert peers == {other.device: other.device for other in others}
    for other in others:
        await hub.send(other.device, Frame({"hello": other.device}))
        assert (await other.receive()).frame.message == {"hello": other.device}


@claim
async def test_receive_can_be_cancelled_without_losing_a_frame(crowd):
    a, b = await crowd.pair()
    for index in range(20):
        waiting = asyncio.create_task(b.receive())
        await asyncio.sleep(0)
        await a.send("b", Frame({"i": index}))
        for _ in range(index % 7):
            await asyncio.sleep(0)
        waiting.cancel()
        got = None
        with contextlib.suppress(asyncio.CancelledError):
            got = await waiting
        got = got or await b.receive()
        assert got.frame.message == {"i": index}
