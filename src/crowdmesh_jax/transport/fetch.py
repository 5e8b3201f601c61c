"""Arrays of any kind to numpy, without holding up the event loop.

A jax array that is still being computed is waited for in a thread, so that neither the compute
thread nor the loop waits. It knows jax arrays only as "has `is_ready`": nothing is imported.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np


class Fetcher:
    """Turns arrays into numpy arrays; a few threads wait for those that are not computed yet."""

    def __init__(self, name: str, *, threads: int = 8) -> None:
        self._name = name
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None

    async def fetch(self, arrays: Sequence[Any]) -> tuple[np.ndarray, ...]:
        """The arrays as numpy, without a copy where their memory allows it."""
        if are_ready(arrays):
            return as_numpy(arrays)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, f"fetch-{self._name}")
        return await asyncio.get_running_loop().run_in_executor(self._pool, as_numpy, arrays)

    def close(self) -> None:
        """Waits for nobody: a computation cannot be stopped."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def as_numpy(arrays: Sequence[Any]) -> tuple[np.ndarray, ...]:
    """Blocks until they are computed; copies only what cannot be viewed."""
    return tuple(np.asarray(array) for array in arrays)


def are_ready(arrays: Sequence[Any]) -> bool:
    """Whether nothing is still being computed."""
    return all(isinstance(array, np.ndarray) or _is_ready(array) for array in arrays)


def _is_ready(array: Any) -> bool:
    is_ready = getattr(array, "is_ready", None)
    return is_ready is None or bool(is_ready())
