"""One peer's lanes: frames to chunks and back, over streams of any kind.

A link lives as long as its peer's process: one broken stream ends it, once. Each lane has a
bounded queue and a writer; bulk chunks leave when `LaneGate` lets them. An empty chunk says
goodbye: nothing follows on that lane. It knows no sockets, addresses or identities.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

from ..errors import CrowdMeshError, FrameError, PeerLostError, TransportError
from .api import Frame, FrameBounds, Lane, PeerGone, Received
from .codec import FrameAssembler, Outgoing, chunks, prepare
from .fetch import Fetcher
from .flow import Admission, Inbox, LaneGate, QueueBounds

logger = logging.getLogger(__name__)

GOODBYE = b""


class Stream(Protocol):
    """One lane's ordered messages, both ways."""

    async def read(self) -> bytes | None:
        """The next message; None when the peer ended the stream.

        Raises:
            PeerLostError: The stream broke.
        """
        ...

    async def write(self, data: bytes) -> None:
        """Hands a message over; waits while the wire is full.

        Raises:
            PeerLostError: The stream broke.
        """
        ...

    def abort(self) -> None:
        """Ends the stream at once. Idempotent."""
        ...


class _Queue:
    """What waits on one lane to be written. None means goodbye."""

    def __init__(self, bounds: QueueBounds) -> None:
        self.items: deque[Outgoing | None] = deque()
        self.admission: Admission[Outgoing | None] = Admission(self.add, bounds)
        self._writer: asyncio.Future[None] | None = None

    def add(self, item: Outgoing | None) -> None:
        self.items.append(item)
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)

    async def get(self) -> Outgoing | None:
        while not self.items:
            self._writer = asyncio.get_running_loop().create_future()
            await self._writer
        item = self.items.popleft()
        if item is not None:
            self.admission.release(item.size_bytes)
        return item


class PeerLink:
    """The open channel to one life of one peer.

    `on_end` is called once, when the link ends for whatever reason.
    """

    def __init__(
        self,
        peer: str,
        instance: str,
        *,
        device: str,
        inbox: Inbox,
        fetcher: Fetcher,
        bounds: FrameBounds,
        queue: QueueBounds,
        chunk_bytes: int,
        on_end: Callable[[PeerLink], None],
    ) -> None:
        self.peer = peer
        self.instance = instance
        self.ended = asyncio.Event()
        self._device = device
        self._inbox = inbox
        self._fetcher = fetcher
        self._bounds = bounds
        self._chunk_bytes = chunk_bytes
        self._on_end = on_end
        self._gate = LaneGate()
        self._queues = {lane: _Queue(queue) for lane in Lane}
        self.streams: list[Stream] = []
        """Of all connections of this link; the first three are written to."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._goodbyes: set[Lane] = set()
        self._closing = False

    def attach(self, streams: Mapping[Lane, Stream]) -> None:
        """Starts to use a connection. Frames go out on the first, come in on all."""
        is_first = not self.streams
        self.streams += streams.values()
        for lane, stream in streams.items():
            self._spawn(self._read(lane, stream), f"read {lane.value} {self.peer}")
            if is_first:
                self._spawn(self._write(lane, stream), f"write {lane.value} {self.peer}")

    def uses(self, stream: Stream) -> bool:
        """Whether the stream is one of this link's."""
        return any(mine is stream for mine in self.streams)

    async def send(self, frame: Frame, lane: Lane) -> None:
        """Queues a frame; waits while the lane's queue is full.

        Raises:
            FrameError: The frame cannot travel.
            PeerLostError: The link ended, or is closing.
        """
        outgoing = prepare(frame)
        if outgoing.size_bytes > self._bounds.frame_bytes:
            raise FrameError(
                f"frame of {outgoing.size_bytes} bytes to {self.peer!r} is over the bound of"
                f" {self._bounds.frame_bytes}: send it in parts"
            )
        if self._closing:
            raise PeerLostError(f"{self._device!r} is closing its channel to {self.peer!r}")
        await self._queues[lane].admission.put(outgoing, outgoing.size_bytes)

    def goodbye(self) -> None:
        """Accepts no more frames; says goodbye on each lane behind what is queued."""
        self._closing = True
        for lane_queue in self._queues.values():
            lane_queue.add(None)
            lane_queue.admission.fail(
                lambda: PeerLostError(f"{self._device!r} closed while a frame waited to be queued")
            )

    def end(self, reason: str, error: CrowdMeshError | None = None) -> None:
        """Ends the link and tells the inbox, once. Nothing queued is sent any more."""
        if self.ended.is_set():
            return
        self.ended.set()
        for lane_queue in self._queues.values():
            lane_queue.admission.fail(
                lambda: PeerLostError(f"{self.peer!r} was lost while a frame waited: {reason}")
            )
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        for stream in self.streams:
            stream.abort()
        if not self._closing:
            logger.info("%s: %s is gone: %s", self._device, self.peer, reason)
            self._inbox.gone(PeerGone(self.peer, reason, error))
        self._on_end(self)

    async def finished(self) -> None:
        """Waits for the link's tasks, which have ended or are cancelled."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, lane: Lane, stream: Stream) -> None:
        assembler = FrameAssembler(self._bounds)
        try:
            while (chunk := await stream.read()) is not None:
                if chunk == GOODBYE:
                    self._heard_goodbye(lane, assembler)
                    return
                done = assembler.feed(chunk)
                if done is not None:
                    frame, size_bytes = done
                    await self._inbox.put(
                        Received(self.peer, lane, frame, size_bytes, time.monotonic())
                    )
                    # The next frame of this lane may be long in coming: a stage's whole state
                    # must not stay in memory until then.
                    del done, frame, chunk
            reason = f"{self.peer!r} ended its {lane.value} stream"
            self.end(reason, PeerLostError(reason))
        except FrameError as exc:
            logger.warning("%s: dropped %s: %s", self._device, self.peer, exc)
            self.end(f"it broke the format on the {lane.value} lane: {exc.message}", exc)
        except PeerLostError as exc:
            self.end(exc.message, exc)
        except asyncio.CancelledError:
            # gRPC may raise it by itself, in a task that nobody cancelled.
            reason = f"the {lane.value} stream of {self.peer!r} was cancelled"
            self.end(reason, PeerLostError(reason))
            raise
        except Exception as exc:  # no memory for the frame, the inbox refused
            error = TransportError(
                f"reading the {lane.value} stream of {self.peer!r} failed:"
                f" {type(exc).__name__}: {exc}"
            )
            error.__cause__ = exc
            self.end(error.message, error)

    def _heard_goodbye(self, lane: Lane, assembler: FrameAssembler) -> None:
        if not assembler.is_between_frames:
            raise FrameError(f"{self.peer!r} said goodbye within a frame")
        self._goodbyes.add(lane)
        if len(self._goodbyes) == len(Lane):
            self.end(f"{self.peer!r} closed")

    async def _write(self, lane: Lane, stream: Stream) -> None:
        lane_queue = self._queues[lane]
        try:
            while (outgoing := await lane_queue.get()) is not None:
                arrays = await self._fetcher.fetch(outgoing.arrays)
                parts = outgoing.parts(arrays)
                if lane is Lane.BULK:
                    for chunk in chunks(parts, self._chunk_bytes):
                        await self._gate.bulk_turn(len(chunk))
                        await stream.write(chunk)
                else:
                    # Not from when it was queued: until its arrays are computed the link is free.
                    self._gate.urgent_enter()
                    for chunk in chunks(parts, self._chunk_bytes):
                        await stream.write(chunk)
                    self._gate.urgent_leave(outgoing.size_bytes)
                del outgoing, arrays, parts  # as in _read
            await stream.write(GOODBYE)
        except PeerLostError as exc:
            self.end(exc.message, exc)
        except asyncio.CancelledError:
            reason = f"the {lane.value} stream to {self.peer!r} was cancelled"
            self.end(reason, PeerLostError(reason))
            raise
        except Exception as exc:  # an array's computation failed, or it was donated meanwhile
            error = TransportError(
                f"a frame to {self.peer!r} could not be read on the {lane.value} lane:"
                f" {type(exc).__name__}: {exc}"
            )
            error.__cause__ = exc
            logger.exception("%s: %s", self._device, error)
            self.end(error.message, error)
