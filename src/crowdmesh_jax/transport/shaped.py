"""Another transport behind links of a given rate and latency.

Each directed pair has a link of its own (full duplex). A frame occupies its link for bytes / rate
and arrives a latency later; latencies overlap. Urgent frames (pipeline, control) take the link
from bulk ones, which keep a floor share. `SharedLink` is the exact, clockless model; the
transport only waits until the times that it computes, so late wake-ups do not add up. It knows
neither what frames mean nor how the inner transport moves them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from ..errors import InvalidValueError, PeerLostError, TransportError
from .api import Frame, Lane, PeerGone, Received, Transport
from .codec import encoded_size
from .fetch import Fetcher
from .flow import Admission, QueueBounds

logger = logging.getLogger(__name__)

T = TypeVar("T")

LinkOf = Callable[[str], tuple[float, float] | None]
"""Peer to (bytes/s, latency in s) of the link to it; None is an unshaped link."""

WAKE_EARLY_S = 0.0005
"""An event loop wakes up 0 to 1 ms late (epoll counts milliseconds): aim at the middle."""


class SharedLink(Generic[T]):
    """Two classes of items over one link, as a fluid: who is done when, exactly.

    Within a class items go one after another. While both classes wait, urgent ones get
    `1 - floor_share` of the rate and bulk ones the rest.

    Args:
        rate_bytes_per_s: May be 0: nothing moves until `set_rate`.
        floor_share: Of bulk, 0 to 1.
        now_s: Of any clock that never goes back.
    """

    def __init__(self, rate_bytes_per_s: float, *, floor_share: float = 0.05, now_s: float) -> None:
        if not 0 < floor_share < 1:
            raise InvalidValueError(f"floor_share must be between 0 and 1, got {floor_share}")
        self._rate = _checked_rate(rate_bytes_per_s)
        self._floor_share = floor_share
        self._now_s = now_s
        self._urgent: deque[tuple[T, float]] = deque()
        self._bulk: deque[tuple[T, float]] = deque()

    @property
    def is_idle(self) -> bool:
        return not self._urgent and not self._bulk

    def set_rate(self, rate_bytes_per_s: float, now_s: float) -> list[tuple[float, T]]:
        """Changes the rate from `now_s` on; returns what was done before, as `advance`."""
        done = self.advance(now_s)
        self._rate = _checked_rate(rate_bytes_per_s)
        return done

    def push(self, item: T, size_bytes: int, now_s: float, *, bulk: bool) -> list[tuple[float, T]]:
        """Queues an item; returns what was done before `now_s`, as `advance`."""
        done = self.advance(now_s)
        (self._bulk if bulk else self._urgent).append((item, float(size_bytes)))
        return done

    def advance(self, now_s: float) -> list[tuple[float, T]]:
        """Moves the clock on; returns (time, item) of all that is done by then, in order."""
        done: list[tuple[float, T]] = []
        while not self.is_idle and (next_s := self.next_s()) <= now_s:
            done += self._move(next_s)
        if now_s > self._now_s:
            self._move(now_s)
        return done

    def next_s(self) -> float:
        """When the next item is done if nothing else comes; infinite if idle or at rate 0."""
        first_s = math.inf
        for line, rate in self._shares():
            if line and (line[0][1] <= 0 or rate > 0):
                wait_s = line[0][1] / rate if line[0][1] > 0 else 0.0
                first_s = min(first_s, self._now_s + wait_s)
        return first_s

    def _shares(self) -> tuple[tuple[deque[tuple[T, float]], float], ...]:
        floor = self._floor_share if self._urgent else 1.0
        main = 1.0 - self._floor_share if self._bulk else 1.0
        return ((self._urgent, self._rate * main), (self._bulk, self._rate * floor))

    def _move(self, to_s: float) -> list[tuple[float, T]]:
        """Both heads for one stretch in which shares do not change."""
        done = []
        elapsed_s = to_s - self._now_s
        for line, rate in self._shares():
            if not line:
                continue
            item, left = line[0]
            left = 0.0 if rate == math.inf else left - elapsed_s * rate
            # Seconds are floats of the size of an uptime: below a thousandth of a byte is rounding,
            # and so is less than the clock can tell apart.
            if left <= 1e-3 or (rate > 0 and to_s + left / rate <= math.nextafter(to_s, math.inf)):
                line.popleft()
                done.append((to_s, item))
            else:
                line[0] = (item, left)
        self._now_s = max(self._now_s, to_s)
        return done


class ShapedTransport:
    """See `Transport` for what the methods promise.

    Args:
        inner: Carries the frames; closed with this one.
        links: The link to each peer; asked at each send and at `refresh`, so it may change.
        floor_share: Bulk's share while urgent frames wait.
        queue: How much may wait per peer and lane.
        flush_s: How long `close` waits for what is queued.
    """

    def __init__(
        self,
        inner: Transport,
        links: LinkOf,
        *,
        floor_share: float = 0.05,
        queue: QueueBounds | None = None,
        flush_s: float = 2.0,
    ) -> None:
        self._inner = inner
        self._links = links
        self._floor_share = floor_share
        self._queue = queue or QueueBounds()
        self._flush_s = flush_s
        self._fetcher = Fetcher(f"shaped-{inner.device}")
        self._pacers: dict[str, _Pacer] = {}
        self._ended: list[_Pacer] = []
        self._closed = False

    @property
    def device(self) -> str:
        return self._inner.device

    @property
    def peers(self) -> frozenset[str]:
        return self._inner.peers

    async def start(self) -> str:
        return await self._inner.start()

    async def connect(self, peer: str, address: str, *, deadline_s: float) -> None:
        await self._inner.connect(peer, address, deadline_s=deadline_s)

    async def send(self, peer: str, frame: Frame, lane: Lane = Lane.CONTROL) -> None:
        if self._closed or peer not in self._inner.peers:
            raise PeerLostError(f"{self.device!r} has no channel to {peer!r}")
        link = self._links(peer)
        pacer = self._pacers.get(peer)
        if pacer is None and link is None:
            await self._inner.send(peer, frame, lane)  # which makes the header, once
            return
        size_bytes = encoded_size(frame)
        if pacer is None:
            assert link is not None
            pacer = self._pacers[peer] = _Pacer(
                peer, self._inner, self._fetcher, link, self._queue, self._floor_share
            )
        pacer.set_link(link or (math.inf, 0.0))
        await pacer.send(frame, lane, size_bytes)

    def refresh(self) -> None:
        """Asks `links` again for each peer: a rate that changed counts from now on."""
        for peer, pacer in self._pacers.items():
            pacer.set_link(self._links(peer) or (math.inf, 0.0))

    async def receive(self) -> Received | PeerGone:
        item = await self._inner.receive()
        if isinstance(item, PeerGone):
            pacer = self._pacers.pop(item.peer, None)
            if pacer is not None:
                pacer.end(item.reason)
                self._ended.append(pacer)
        return item

    def disconnect(self, peer: str, reason: str) -> None:
        self._inner.disconnect(peer, reason)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        pacers = tuple(self._pacers.values())
        limit = asyncio.timeout(self._flush_s)
        try:
            async with limit:
                for pacer in pacers:
                    await pacer.flushed()
        except TimeoutError:
            if not limit.expired():
                raise
        for pacer in pacers:
            pacer.end("closed by this side")
        for pacer in (*pacers, *self._ended):
            await pacer.finished()
        self._fetcher.close()
        await self._inner.close()


class _Queued:
    """A frame on its way, with its place in the lane's bounded queue."""

    __slots__ = ("arrive_s", "frame", "lane", "size_bytes")

    def __init__(self, frame: Frame, lane: Lane, size_bytes: int) -> None:
        self.frame = frame
        self.lane = lane
        self.size_bytes = size_bytes
        self.arrive_s = 0.0


class _Line(Generic[T]):
    """A queue of one reader."""

    def __init__(self) -> None:
        self.items: deque[T] = deque()
        self._some = asyncio.Event()

    def add(self, item: T) -> None:
        self.items.append(item)
        self._some.set()

    async def get(self) -> T:
        while not self.items:
            self._some.clear()
            await self._some.wait()
        return self.items.popleft()


class _Pacer:
    """The link to one peer: intake (arrays ready?), the wire, delivery; per lane in order."""

    def __init__(
        self,
        peer: str,
        inner: Transport,
        fetcher: Fetcher,
        link: tuple[float, float],
        queue: QueueBounds,
        floor_share: float,
    ) -> None:
        self._peer = peer
        self._inner = inner
        self._fetcher = fetcher
        self._rate, self._latency_s = link
        self._wire: SharedLink[_Queued] = SharedLink(
            self._rate, floor_share=floor_share, now_s=time.monotonic()
        )
        self._intake: dict[Lane, _Line[_Queued]] = {lane: _Line() for lane in Lane}
        self._flying: dict[Lane, _Line[_Queued]] = {lane: _Line() for lane in Lane}
        self._admission = {lane: Admission(self._intake[lane].add, queue) for lane in Lane}
        self._changed = asyncio.Event()
        self._outstanding = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._ended = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._spawn(self._pace(), "pace")
        for lane in Lane:
            self._spawn(self._take(lane), f"take {lane.value}")
            self._spawn(self._deliver(lane), f"deliver {lane.value}")

    async def send(self, frame: Frame, lane: Lane, size_bytes: int) -> None:
        self._outstanding += 1
        self._idle.clear()
        try:
            await self._admission[lane].put(_Queued(frame, lane, size_bytes), size_bytes)
        except BaseException:
            self._settle()
            raise

    def set_link(self, link: tuple[float, float]) -> None:
        if link == (self._rate, self._latency_s):
            return
        self._launch(self._wire.set_rate(link[0], time.monotonic()))  # at the old latency
        self._rate, self._latency_s = link
        self._changed.set()

    async def flushed(self) -> None:
        await self._idle.wait()

    def end(self, reason: str) -> None:
        """Drops what is on its way; later sends raise."""
        if self._ended:
            return
        self._ended = True
        for admission in self._admission.values():
            admission.fail(lambda: PeerLostError(f"{self._peer!r} is gone: {reason}"))
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self._idle.set()

    async def finished(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=f"{name} {self._peer}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _settle(self) -> None:
        self._outstanding -= 1
        if self._outstanding == 0:
            self._idle.set()

    async def _take(self, lane: Lane) -> None:
        while True:
            queued = await self._intake[lane].get()
            try:
                # A link cannot carry what is not computed yet.
                arrays = await self._fetcher.fetch(queued.frame.arrays)
                queued.frame = Frame(queued.frame.message, arrays)
            except Exception as exc:  # the inner transport meets it too, and reports it
                logger.debug("an array for %s cannot be read: %s", self._peer, exc)
            done = self._wire.push(
                queued, queued.size_bytes, time.monotonic(), bulk=lane is Lane.BULK
            )
            self._launch(done)
            self._changed.set()

    async def _pace(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            now_s = time.monotonic()
            next_s = self._wire.next_s()
            self._launch(
                self._wire.advance(next_s if now_s < next_s <= now_s + WAKE_EARLY_S else now_s)
            )
            next_s = self._wire.next_s()
            timer = None
            if next_s < math.inf:
                # loop.time() is time.monotonic()
                timer = loop.call_at(next_s - WAKE_EARLY_S, self._changed.set)
            try:
                await self._changed.wait()
            finally:
                if timer is not None:
                    timer.cancel()

    def _launch(self, done: list[tuple[float, _Queued]]) -> None:
        for left_s, queued in done:
            queued.arrive_s = left_s + self._latency_s
            self._flying[queued.lane].add(queued)

    async def _deliver(self, lane: Lane) -> None:
        while True:
            queued = await self._flying[lane].get()
            wait_s = queued.arrive_s - WAKE_EARLY_S - time.monotonic()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            try:
                await self._inner.send(self._peer, queued.frame, lane)
            except TransportError as exc:
                logger.warning(
                    "%s: %s lane to %s ends: %s", self._inner.device, lane.value, self._peer, exc
                )
                self.end(exc.message)
                return
            finally:
                self._admission[lane].release(queued.size_bytes)
                self._settle()


def _checked_rate(rate_bytes_per_s: float) -> float:
    if not rate_bytes_per_s >= 0:
        raise InvalidValueError(f"a link's rate must be bytes/s >= 0, got {rate_bytes_per_s}")
    return rate_bytes_per_s
