"""Frames between devices that live in one process and on one event loop.

Arrays are handed over as they are: the receiver holds a read-only view of the sender's memory.
Messages take the same form as on a wire (tuples become lists), so that a body that works here
works over gRPC. It knows no processes and no bytes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from ..errors import AddressError, PeerLostError, TransportError
from .api import Frame, Lane, PeerGone, Received
from .codec import Outgoing, plain_message, prepare
from .fetch import Fetcher, are_ready, as_numpy
from .flow import Admission, Inbox, QueueBounds

logger = logging.getLogger(__name__)

SCHEME = "memory:"


class MemoryNetwork:
    """Devices that can reach each other. `network.transport("a")` makes one's transport."""

    def __init__(self, *, queue: QueueBounds | None = None) -> None:
        self._queue = queue or QueueBounds()
        self._listening: dict[str, MemoryTransport] = {}
        self._arrived: asyncio.Event | None = None

    def transport(self, device: str) -> MemoryTransport:
        """A transport of this network; the device can be reached once it has started."""
        return MemoryTransport(device, self, queue=self._queue)

    def _listen(self, transport: MemoryTransport) -> None:
        if transport.device in self._listening:
            raise AddressError(
                f"{SCHEME}{transport.device} is in use: a device of that id has started already"
            )
        self._listening[transport.device] = transport
        if self._arrived is not None:
            self._arrived.set()
            self._arrived = None

    def _stop(self, transport: MemoryTransport) -> None:
        if self._listening.get(transport.device) is transport:
            del self._listening[transport.device]

    async def _find(self, device: str, deadline_s: float) -> MemoryTransport:
        started_s = time.monotonic()
        while device not in self._listening:
            left_s = started_s + deadline_s - time.monotonic()
            if left_s <= 0:
                raise PeerLostError(
                    f"{device!r} did not start within {deadline_s:g} s;"
                    f" listening: {', '.join(sorted(self._listening)) or 'nobody'}"
                )
            if self._arrived is None:
                self._arrived = asyncio.Event()
            limit = asyncio.timeout(left_s)
            try:
                async with limit:
                    await self._arrived.wait()
            except TimeoutError:
                if not limit.expired():
                    raise
        return self._listening[device]


class MemoryTransport:
    """One device's end in a `MemoryNetwork`; see `Transport` for what the methods promise."""

    def __init__(
        self,
        device: str,
        network: MemoryNetwork,
        *,
        queue: QueueBounds | None = None,
        flush_s: float = 2.0,
    ) -> None:
        self._device = device
        self._network = network
        self._queue = queue or QueueBounds()
        self._flush_s = flush_s
        self._inbox = Inbox(self._queue)
        self._peers: dict[str, MemoryTransport] = {}
        self._outboxes: dict[tuple[str, Lane], _Outbox] = {}
        self._fetcher = Fetcher(f"memory-{device}")
        self._closed = False

    @property
    def device(self) -> str:
        return self._device

    @property
    def peers(self) -> frozenset[str]:
        return frozenset(self._peers)

    async def start(self) -> str:
        self._network._listen(self)
        return f"{SCHEME}{self._device}"

    async def connect(self, peer: str, address: str, *, deadline_s: float) -> None:
        if not address.startswith(SCHEME):
            raise AddressError(f"{address!r} is not of this network; addresses look like memory:ID")
        if peer in self._peers:
            return
        found = address.removeprefix(SCHEME)
        if found != peer:
            raise PeerLostError(f"{address} is {found!r}, not {peer!r}")
        if peer == self._device:
            raise PeerLostError(f"{peer!r} cannot connect to itself")
        other = await self._network._find(peer, deadline_s)
        if self._closed:
            raise PeerLostError(f"{self._device!r} is closed")
        self._peers[peer] = other
        other._peers[self._device] = self

    async def send(self, peer: str, frame: Frame, lane: Lane = Lane.CONTROL) -> None:
        outgoing = prepare(frame)
        other = self._peers.get(peer)
        if other is None or self._closed:
            raise PeerLostError(f"{self._device!r} has no channel to {peer!r}")
        message = plain_message(frame.message)
        outbox = self._outboxes.get((peer, lane))
        if are_ready(outgoing.arrays) and (outbox is None or outbox.is_idle):
            arrays = as_numpy(outgoing.arrays)
            await self._hand_over(other, lane, outgoing, message, arrays)
            return
        if outbox is None:
            outbox = self._outboxes[peer, lane] = _Outbox(self._queue, f"to {peer} {lane.value}")

        async def hand_over() -> None:
            arrays = await self._fetcher.fetch(outgoing.arrays)
            await self._hand_over(other, lane, outgoing, message, arrays)

        await outbox.put(hand_over, outgoing.size_bytes)

    async def receive(self) -> Received | PeerGone:
        return await self._inbox.get()

    def disconnect(self, peer: str, reason: str) -> None:
        other = self._peers.get(peer)
        if other is not None:
            self._forget(peer, reason)
            other._forget(self._device, f"{self._device!r} ended the channel")

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._network._stop(self)
        self._inbox.close()
        limit = asyncio.timeout(self._flush_s)
        try:
            async with limit:
                for outbox in tuple(self._outboxes.values()):
                    await outbox.drained()
        except TimeoutError:
            if not limit.expired():
                raise
        for peer, other in tuple(self._peers.items()):
            self._drop(peer, "closed by this side")
            other._forget(self._device, f"{self._device!r} closed")
        self._fetcher.close()

    async def _hand_over(
        self,
        other: MemoryTransport,
        lane: Lane,
        outgoing: Outgoing,
        message: dict[str, Any],
        arrays: tuple[np.ndarray, ...],
    ) -> None:
        if self._peers.get(other.device) is not other:
            raise PeerLostError(f"{other.device!r} is gone")
        views = tuple(
            _read_only(array, leaf.dtype)
            for array, leaf in zip(arrays, outgoing.leaves, strict=True)
        )
        item = Received(
            self._device, lane, Frame(message, views), outgoing.size_bytes, time.monotonic()
        )
        try:
            await other._inbox.put(item)
        except TransportError as exc:
            raise PeerLostError(f"{other.device!r} was lost while a frame waited: {exc}") from exc

    def _forget(self, peer: str, reason: str) -> None:
        if peer in self._peers:
            self._drop(peer, reason)
            self._inbox.gone(PeerGone(peer, reason))

    def _drop(self, peer: str, reason: str) -> None:
        del self._peers[peer]
        for lane in Lane:
            outbox = self._outboxes.pop((peer, lane), None)
            if outbox is not None:
                outbox.end(f"{peer!r} was lost while a frame waited: {reason}")


class _Outbox:
    """Frames of one lane that wait for their arrays to be computed, in order."""

    def __init__(self, bounds: QueueBounds, name: str) -> None:
        self._name = name
        self._waiting: deque[tuple[Callable[[], Awaitable[None]], int]] = deque()
        self._admission: Admission[tuple[Callable[[], Awaitable[None]], int]] = Admission(
            self._accept, bounds
        )
        self._task: asyncio.Task[None] | None = None

    @property
    def is_idle(self) -> bool:
        return self._task is None

    async def put(self, hand_over: Callable[[], Awaitable[None]], size_bytes: int) -> None:
        await self._admission.put((hand_over, size_bytes), size_bytes)

    async def drained(self) -> None:
        if self._task is not None:
            await asyncio.wait([self._task])

    def end(self, reason: str) -> None:
        self._admission.fail(lambda: PeerLostError(reason))
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    def _accept(self, item: tuple[Callable[[], Awaitable[None]], int]) -> None:
        self._waiting.append(item)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._work(), name=self._name)

    async def _work(self) -> None:
        try:
            while self._waiting:
                hand_over, size_bytes = self._waiting.popleft()
                await hand_over()
                self._admission.release(size_bytes)
        except PeerLostError as exc:
            self.end(exc.message)
        except Exception as exc:
            # Order is a promise: nothing may follow a frame that cannot be read.
            logger.exception("%s: an array could not be read", self._name)
            self.end(f"an earlier frame could not be read: {type(exc).__name__}: {exc}")
        finally:
            self._task = None


def _read_only(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    view = array.astype(dtype, copy=False).view()  # a wire would make big endian little
    view.flags.writeable = False
    return view
