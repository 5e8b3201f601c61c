"""What a hop costs here: a microbatch's frame to the neighbour below and a gradient's frame back.

The same lane, codec and threads as in a run, with nothing to compute at either end: sockets, the
event loop and the hand-over to and from the compute thread. A link's own rate and latency are paid
too where they are emulated. Knows nothing of protocol or programs.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import PeerLostError
from ..programs.manifest import LeafSpec
from .envelope import Envelope

WARMUP = 2
LEAST, MOST = 3, 15
"""Round trips that count."""
ENOUGH_S = 0.5
DEADLINE_S = 20.0
"""For one round trip: a megabyte over 1 Mbit/s takes 8 s each way. Said in the error."""

Send = Callable[[str, Envelope], Awaitable[None]]
Compute = Callable[[], Awaitable[None]]


def is_probe(extra: Mapping[str, Any]) -> bool:
    """Whether a frame belongs to a probe."""
    return isinstance(extra.get("probe"), int) and extra.get("way") in ("there", "back")


class Probe:
    """One side of a probe; every stage answers, and asks its neighbour below.

    Args:
        send: Sends on the pipeline lane.
        compute: Passes through the compute thread and does nothing there.
    """

    def __init__(self, send: Send, compute: Compute) -> None:
        self._send = send
        self._compute = compute
        self._waiting: tuple[int, asyncio.Future[None]] | None = None
        self._sent = 0

    async def round_trip_s(self, peer: str, leaves: Sequence[LeafSpec]) -> float:
        """Median seconds until an answer is at this side's compute thread.

        Args:
            leaves: What goes down with each microbatch.

        Raises:
            PeerLostError: No answer in time, or no channel.
        """
        group = made_up(leaves)
        times: list[float] = []
        begin_s = time.monotonic()
        for count in range(WARMUP + MOST):
            start_s = time.monotonic()
            await self._once(peer, group)
            if count >= WARMUP:
                times.append(time.monotonic() - start_s)
            if len(times) >= LEAST and time.monotonic() - begin_s > ENOUGH_S:
                break
        return statistics.median(times)

    async def _once(self, peer: str, group: Mapping[Any, Any]) -> None:
        self._sent += 1
        future = asyncio.get_running_loop().create_future()
        self._waiting = self._sent, future
        envelope = Envelope(None, (group,), {"probe": self._sent, "way": "there"})
        limit = asyncio.timeout(DEADLINE_S)
        try:
            async with limit:
                await self._send(peer, envelope)
                await future
        except TimeoutError as exc:
            if not limit.expired():
                raise
            raise PeerLostError(
                f"waited {DEADLINE_S:g} s for {peer!r} to return a probe of the link to it, as long"
                " as a megabyte takes at 1 Mbit/s: is the link slower, or the process stopped?"
            ) from exc
        finally:
            self._waiting = None

    async def arrived(
        self, peer: str, extra: Mapping[str, Any], answer: Sequence[LeafSpec]
    ) -> None:
        """A probe's frame came: the first half is answered with leaves as gradients have them."""
        await self._compute()
        if extra["way"] == "there":
            back = {"probe": extra["probe"], "way": "back"}
            await self._send(peer, Envelope(None, (made_up(answer),), back))
        elif self._waiting is not None and self._waiting[0] == extra["probe"]:
            future = self._waiting[1]
            if not future.done():
                future.set_result(None)


def made_up(leaves: Sequence[LeafSpec]) -> dict[tuple[str, str, str], np.ndarray]:
    """Zeros of the leaves' shapes."""
    return {leaf.key: np.zeros(leaf.shape, leaf.numpy_dtype) for leaf in leaves}
