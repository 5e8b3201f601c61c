"""Messages to devices, in order per device and lane, while no device holds up another."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from ..errors import PeerLostError
from ..transport import Lane, Transport

logger = logging.getLogger(__name__)

MakeFrame = Callable[[], Coroutine[Any, Any, Any]]


class Outbox:
    """What one run sends.

    Args:
        spawn: Runs a coroutine beside the run.
    """

    def __init__(
        self,
        transport: Transport,
        spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
    ) -> None:
        self._transport, self._spawn = transport, spawn
        self._last: dict[tuple[str, Lane], asyncio.Task[None]] = {}
        """Of what was posted to a device on a lane: what comes next waits for it."""

    def post(self, to: str, lane: Lane, make: MakeFrame) -> None:
        """Sends what `make` returns, behind everything that was posted there before.

        A task each: a member that does not drain must not hold up the others.
        """
        before = self._last.get((to, lane))

        async def work() -> None:
            if before is not None:
                await asyncio.wait([before])
            await self.deliver(to, lane, await make())

        self._last[to, lane] = self._spawn(work(), f"send to {to}")

    def post_frame(self, to: str, lane: Lane, frame: Any) -> None:
        """The same, of a frame that is ready."""

        async def ready() -> Any:
            return frame

        self.post(to, lane, ready)

    async def deliver(self, to: str, lane: Lane, frame: Any) -> None:
        """Sends at once; a device that is gone is told of by its channel's end."""
        try:
            await self._transport.send(to, frame, lane)
        except PeerLostError as exc:
            logger.warning("could not send to %s: %s", to, exc)
