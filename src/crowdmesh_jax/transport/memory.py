"""Frames between devices that live in one process and on one event loop.

Arrays are handed over as they are: the receiver holds a read-only view of the sender's memory.
Messages take the same form as on a wire (tuples become lists), so that a body that works here
works over gRPC. It knows no processes and no bytes.
"""

from __future__ import annotations

import asyncio
import time

import numpy as np

from ..errors import AddressError, PeerLostError, TransportError
from .api import Frame, Lane, PeerGone, Received
from .codec import plain_message, prepare
from .fetch import Fetcher
from .flow import Inbox, QueueBounds

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
        self, device: str, network: MemoryNetwork, *, queue: QueueBounds | None = None
    ) -> None:
        self._device = device
        self._network = network
        self._inbox = Inbox(queue)
        self._peers: dict[str, MemoryTransport] = {}
        self._lane_locks: dict[tuple[str, Lane], asyncio.Lock] = {}
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
        self._peers[peer] = other
        other._peers[self._device] = self

    async def send(self, peer: str, frame: Frame, lane: Lane = Lane.CONTROL) -> None:
        other = self._peers.get(peer)
        if other is None:
            raise PeerLostError(f"{self._device!r} has no channel to {peer!r}")
        outgoing = prepare(frame)
        message = plain_message(frame.message)
        lock = self._lane_locks.setdefault((peer, lane), asyncio.Lock())
        async with lock:  # arrays that are not ready yet must not be overtaken
            arrays = await self._fetcher.fetch(outgoing.arrays)
            views = tuple(
                _read_only(array, leaf.dtype)
                for array, leaf in zip(arrays, outgoing.leaves, strict=True)
            )
            if self._peers.get(peer) is not other:
                raise PeerLostError(f"{peer!r} is gone")
            item = Received(
                self._device, lane, Frame(message, views), outgoing.size_bytes, time.monotonic()
            )
            try:
                await other._inbox.put(item)
            except TransportError as exc:
                raise PeerLostError(f"{peer!r} was lost while a frame waited: {exc}") from exc

    async def receive(self) -> Received | PeerGone:
        return await self._inbox.get()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._network._stop(self)
        for peer, other in tuple(self._peers.items()):
            del self._peers[peer]
            other._forget(self._device, f"{self._device!r} closed")
        self._inbox.close()
        self._fetcher.close()

    def _forget(self, peer: str, reason: str) -> None:
        if self._peers.pop(peer, None) is not None:
            self._inbox.gone(PeerGone(peer, reason))


def _read_only(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    view = array.astype(dtype, copy=False).view()  # a wire would make big endian little
    view.flags.writeable = False
    return view
