"""The one thread that computes. Work runs in the order it was given; results return to the loop.

The loop may queue several ops ahead, so the thread never waits for a hop through the loop between
two ops whose inputs are there.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

from ..execution import Pace, Timed

Done = Callable[[Timed | None, BaseException | None], None]


class ComputeThread:
    """FIFO of calls at an emulated pace."""

    def __init__(self, pace: Pace, loop: asyncio.AbstractEventLoop) -> None:
        self.pace = pace
        self._loop = loop
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Done, bool] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._work, name="compute", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Any], done: Done, *, paced: bool = True) -> None:
        """Queues `call`; `done(timed, error)` runs on the loop afterwards.

        Args:
            paced: False for what is not a device's own work in a step (loading, compiling).
        """
        self._queue.put((call, done, paced))

    async def run(self, call: Callable[[], Any], *, paced: bool = False) -> Any:
        """Queues `call` and waits for its result."""
        future: asyncio.Future[Any] = self._loop.create_future()

        def finish(timed: Timed | None, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(timed.result if timed is not None else None)

        self.submit(call, finish, paced=paced)
        return await future

    def clear(self) -> None:
        """Forgets what is queued and not begun."""
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                return

    def close(self) -> None:
        """Ends the thread after the call it is in."""
        self.clear()
        self._queue.put(None)

    def _work(self) -> None:
        unpaced = Pace(1.0)
        while True:
            item = self._queue.get()
            if item is None:
                return
            call, done, paced = item
            timed, error = None, None
            try:
                timed = (self.pace if paced else unpaced).run(call)
            except BaseException as exc:  # handed to the loop, which owns the decision
                error = exc
            try:
                self._loop.call_soon_threadsafe(done, timed, error)
            except RuntimeError:
                return  # the loop is closed: nobody listens any more
            del item, call, done, timed  # they hold the stage and its results
