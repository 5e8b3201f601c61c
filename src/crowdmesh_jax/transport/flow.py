"""Bounded queues and the order of what waits in them.

`Admission` bounds a queue without knowing it; `Inbox` is where received frames wait for the one
reader; `LaneGate` lets urgent lanes overtake the bulk lane of one peer. All of it runs on one
event loop. It knows lanes, frames only by their size, and no wire.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..errors import CrowdMeshError, TransportError
from .api import Lane, PeerGone, Received

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueBounds:
    """How much may wait in one lane's queue. A single frame always fits, whatever its size."""

    frames: int = 64
    size_bytes: int = 256 * 2**20


class Admission(Generic[T]):
    """Lets items into a bounded queue, in the order of the calls.

    `accept` is called, at once or later, with each item that is let in.
    """

    def __init__(self, accept: Callable[[T], None], bounds: QueueBounds) -> None:
        self._accept = accept
        self._bounds: QueueBounds | None = bounds
        self._items = 0
        self._size_bytes = 0
        self._waiting: deque[tuple[asyncio.Future[None], T, int]] = deque()
        self._error: Callable[[], CrowdMeshError] | None = None

    async def put(self, item: T, size_bytes: int) -> None:
        """Waits for room. A cancelled call leaves nothing behind, unless it was let in already.

        Raises:
            CrowdMeshError: What `fail` was given.
        """
        if self._error is not None:
            raise self._error()
        if not self._waiting and self._fits(size_bytes):
            self._let_in(item, size_bytes)
            return
        room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((room, item, size_bytes))
        await room

    def release(self, size_bytes: int) -> None:
        """An item left the queue."""
        self._items -= 1
        self._size_bytes -= size_bytes
        while self._waiting:
            room, item, size = self._waiting[0]
            if room.done():  # cancelled
                self._waiting.popleft()
            elif self._fits(size):
                self._waiting.popleft()
                self._let_in(item, size)
                room.set_result(None)
            else:
                return

    def unbound(self) -> None:
        """Lets everything in from now on."""
        self._bounds = None
        while self._waiting:
            room, item, size_bytes = self._waiting.popleft()
            if not room.done():
                self._let_in(item, size_bytes)
                room.set_result(None)

    def fail(self, error: Callable[[], CrowdMeshError]) -> None:
        """Ends all waits, and all later calls, with `error()`."""
        self._error = error
        while self._waiting:
            room, _, _ = self._waiting.popleft()
            if not room.done():
                room.set_exception(error())

    def _fits(self, size_bytes: int) -> bool:
        if self._items == 0 or self._bounds is None:
            return True
        return (
            self._items < self._bounds.frames
            and self._size_bytes + size_bytes <= self._bounds.size_bytes
        )

    def _let_in(self, item: T, size_bytes: int) -> None:
        self._items += 1
        self._size_bytes += size_bytes
        self._accept(item)


class Inbox:
    """Received frames of all peers, until the one reader takes them.

    Pipeline and control frames come before bulk ones; while both wait, one in
    `bulk_turn` is bulk. Per peer and lane the order is kept; a peer's `PeerGone` comes after all
    of its frames and before those of its next life.
    """

    def __init__(self, bounds: QueueBounds | None = None, *, bulk_turn: int = 20) -> None:
        self._bounds = bounds or QueueBounds()
        self._bulk_turn = bulk_turn
        self._urgent: deque[Received | PeerGone] = deque()
        self._bulk: deque[Received] = deque()
        self._since_bulk = 0
        self._gates: dict[tuple[str, Lane], Admission[Received]] = {}
        self._readers: deque[asyncio.Future[None]] = deque()
        self._closed = False

    async def put(self, received: Received) -> None:
        """Waits while the bounded queue of this peer and lane is full. Drops it if closed."""
        key = (received.peer, received.lane)
        gate = self._gates.get(key)
        if gate is None:
            gate = self._gates[key] = Admission(self._add, self._bounds)
        if not self._closed:
            await gate.put(received, received.size_bytes)

    def gone(self, event: PeerGone) -> None:
        """Queues the end of a peer behind its frames; ends its waiting `put`s."""
        for lane in Lane:
            gate = self._gates.pop((event.peer, lane), None)
            if gate is not None:
                gate.fail(lambda: TransportError(f"{event.peer} is gone: {event.reason}"))
        left = [received for received in self._bulk if received.peer == event.peer]
        if left:
            self._bulk = deque(item for item in self._bulk if item.peer != event.peer)
            self._urgent.extend(left)
        self._urgent.append(event)
        self._wake()

    async def get(self) -> Received | PeerGone:
        """The next frame or the end of a peer.

        Raises:
            TransportError: Closed.
        """
        while not self._urgent and not self._bulk:
            if self._closed:
                raise TransportError("this transport is closed: nothing more will be received")
            ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._readers.append(ready)
            try:
                await ready
            except asyncio.CancelledError:
                if ready.done() and not ready.cancelled():
                    self._wake()  # woken and cancelled at once: the next reader's turn
                raise
        item = self._pop()
        if isinstance(item, Received):
            gate = self._gates.get((item.peer, item.lane))
            if gate is not None:
                gate.release(item.size_bytes)
        if self._urgent or self._bulk:
            self._wake()
        return item

    def close(self) -> None:
        """Drops what waits and whatever still comes; ends all waits."""
        self._closed = True
        self._urgent.clear()
        self._bulk.clear()
        for gate in self._gates.values():
            gate.unbound()
        while self._readers:
            self._wake()

    def _add(self, received: Received) -> None:
        if self._closed:
            return
        (self._bulk if received.lane is Lane.BULK else self._urgent).append(received)
        self._wake()

    def _pop(self) -> Received | PeerGone:
        bulk_due = self._bulk and self._since_bulk >= self._bulk_turn - 1
        if self._urgent and not bulk_due:
            self._since_bulk = self._since_bulk + 1 if self._bulk else 0
            return self._urgent.popleft()
        self._since_bulk = 0
        return self._bulk.popleft()

    def _wake(self) -> None:
        while self._readers:
            ready = self._readers.popleft()
            if not ready.done():
                ready.set_result(None)
                return


class LaneGate:
    """Decides when a bulk chunk may leave for one peer.

    While pipeline or control frames are being written, bulk gets `floor_share` of the
    bytes, and at least one chunk per `patience_s` (an urgent lane that is blocked by its reader
    leaves the link idle). Otherwise bulk is free.
    """

    def __init__(self, *, floor_share: float = 0.05, patience_s: float = 0.05) -> None:
        self._credit_rate = floor_share / (1 - floor_share)
        self._patience_s = patience_s
        self._urgent = 0
        self._credit_bytes = 0.0
        self._turn: asyncio.Future[None] | None = None

    def urgent_enter(self) -> None:
        """A pipeline or control frame is being written from now on."""
        self._urgent += 1

    def urgent_leave(self, size_bytes: int) -> None:
        """It is written, and was of that size."""
        self._urgent -= 1
        self._credit_bytes += size_bytes * self._credit_rate
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)

    async def bulk_turn(self, size_bytes: int) -> None:
        """Waits until a bulk chunk of that size may leave."""
        loop = asyncio.get_running_loop()
        until_s = time.monotonic() + self._patience_s
        while self._urgent and self._credit_bytes < size_bytes:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                break
            self._turn = loop.create_future()
            timer = loop.call_later(left_s, _resolve, self._turn)
            try:
                await self._turn
            finally:
                timer.cancel()
                self._turn = None
        # What was saved up while nobody competed is not a right to a burst later.
        self._credit_bytes = max(0.0, self._credit_bytes - size_bytes) if self._urgent else 0.0


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
