"""A link over slow streams: bulk steps aside for the pipeline, and one broken lane ends all."""

import asyncio

import numpy as np

from crowdmesh_jax.errors import PeerLostError
from crowdmesh_jax.transport import Frame, FrameBounds, Lane, PeerGone, QueueBounds
from crowdmesh_jax.transport.fetch import Fetcher
from crowdmesh_jax.transport.flow import Inbox
from crowdmesh_jax.transport.link import GOODBYE, PeerLink


class SlowStream:
    """Takes a while per message and notes what came when."""

    def __init__(self, lane: Lane, log: list[tuple[Lane, bytes]], pause_s: float) -> None:
        self.lane, self.log, self.pause_s = lane, log, pause_s
        self.incoming: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.is_aborted = False

    async def read(self) -> bytes | None:
        return await self.incoming.get()

    async def write(self, data: bytes) -> None:
        await asyncio.sleep(self.pause_s)
        self.log.append((self.lane, data))

    def abort(self) -> None:
        self.is_aborted = True


def linked(pause_s=0.001, chunk_bytes=4096):
    log, ended = [], []
    streams = {lane: SlowStream(lane, log, pause_s) for lane in Lane}
    inbox = Inbox()
    link = PeerLink(
        "b",
        "life-1",
        device="a",
        inbox=inbox,
        fetcher=Fetcher("a"),
        bounds=FrameBounds(),
        queue=QueueBounds(),
        chunk_bytes=chunk_bytes,
        on_end=ended.append,
    )
    link.attach(streams)
    return link, streams, inbox, log, ended


def payload(chunks: int) -> Frame:
    return Frame({}, (np.zeros(chunks * 4096, np.uint8),))


def test_bulk_has_about_its_floor_share_while_a_pipeline_frame_is_written():
    async def body():
        link, _, _, log, _ = linked()
        await link.send(payload(100), Lane.BULK)
        while len(log) < 10:  # the bulk frame is on its way
            await asyncio.sleep(0.001)
        await link.send(payload(100), Lane.PIPELINE)
        while sum(lane is Lane.PIPELINE for lane, _ in log) < 101:
            await asyncio.sleep(0.001)
        lanes = [lane for lane, _ in log]
        first = lanes.index(Lane.PIPELINE)
        # 100 ms and more of pipeline: a patience of 50 ms gives bulk a few chunks, no credit yet
        assert 1 <= lanes[first:].count(Lane.BULK) <= 20
        link.end("test over")
        await link.finished()

    asyncio.run(asyncio.wait_for(body(), 10))


def test_a_link_ends_once_when_its_lanes_break_and_takes_its_streams_along():
    async def body():
        link, streams, inbox, _, ended = linked()
        for stream in streams.values():
            stream.incoming.put_nowait(None)
        gone = await inbox.get()
        assert isinstance(gone, PeerGone)
        assert isinstance(gone.error, PeerLostError)
        await link.finished()
        link.end("again")
        assert all(stream.is_aborted for stream in streams.values())
        assert ended == [link]
        again = asyncio.create_task(inbox.get())
        await asyncio.sleep(0.05)
        assert not again.done()
        again.cancel()

    asyncio.run(asyncio.wait_for(body(), 10))


def test_goodbye_follows_what_was_queued():
    async def body():
        link, streams, _, log, ended = linked(pause_s=0)
        await link.send(payload(3), Lane.BULK)
        await link.send(payload(0), Lane.PIPELINE)
        link.goodbye()
        while sum(data == GOODBYE for _, data in log) < len(Lane):
            await asyncio.sleep(0.001)
        for lane in Lane:
            of_lane = [data for each, data in log if each is lane]
            assert of_lane[-1] == GOODBYE
            assert GOODBYE not in of_lane[:-1]
        assert not ended  # it is the peer who ends it
        for stream in streams.values():
            stream.incoming.put_nowait(GOODBYE)
        await link.ended.wait()
        await link.finished()

    asyncio.run(asyncio.wait_for(body(), 10))
