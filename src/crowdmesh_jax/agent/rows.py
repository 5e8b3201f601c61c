"""Where an agent's stage gets its rows: from a copy of the source, or asked of the coordinator.

The first stage reads inputs only, the last one targets only. Rows come per microbatch, as flat
leaves in the order of the stage's manifest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..data import ShippableSource
from ..errors import DataError, PeerLostError

Leaves = list[np.ndarray]
ROWS_DEADLINE_S = 60.0
"""For a batch from the user's own source, which may read a disk; said in the error."""


class Rows:
    """The rows of one stage.

    Args:
        source: A copy of the user's source; None to ask the coordinator for each step.
        ask: Sends the coordinator a request for a step's rows.
        is_reachable: Whether it is there to answer.
    """

    def __init__(
        self,
        *,
        microbatches: int,
        has_inputs: bool,
        has_targets: bool,
        source: ShippableSource | None,
        ask: Callable[[int], Any],
        is_reachable: Callable[[], bool],
    ) -> None:
        self._microbatches = microbatches
        self._has_inputs = has_inputs
        self._has_targets = has_targets
        self._source = source
        self._ask = ask
        self._is_reachable = is_reachable
        self._arriving: dict[int, asyncio.Future[Mapping[str, Leaves]]] = {}
        self._inputs: dict[int, list[Leaves]] = {}
        self._targets: dict[int, list[Leaves]] = {}

    async def read(self, step: int) -> None:
        """Brings a step's rows into memory.

        Raises:
            DataError: The source broke its promise.
            PeerLostError: The coordinator did not send them in time.
        """
        if self._source is not None:
            parts = await asyncio.to_thread(self._read_copy, self._source, step)
        else:
            parts = await self._read_remote(step)
        if self._has_inputs:
            self._inputs[step] = split(parts["inputs"], self._microbatches)
        if self._has_targets:
            self._targets[step] = split(parts["targets"], self._microbatches)

    def _read_copy(self, source: ShippableSource, step: int) -> Mapping[str, Leaves]:
        import jax

        parts = {}
        if self._has_inputs:
            parts["inputs"] = jax.tree.leaves(source.batch_inputs(step))
        if self._has_targets:
            parts["targets"] = jax.tree.leaves(source.batch_targets(step))
        return parts

    async def _read_remote(self, step: int) -> Mapping[str, Leaves]:
        future = asyncio.get_running_loop().create_future()
        self._arriving[step] = future
        await self._ask(step)
        try:
            while True:
                done, _ = await asyncio.wait([future], timeout=ROWS_DEADLINE_S)
                if done:
                    return future.result()
                if self._is_reachable():
                    raise PeerLostError(
                        f"waited {ROWS_DEADLINE_S:g} s for the rows of step {step} from the"
                        " coordinator, which reads them from your data source; is batch() slow or"
                        " stuck?"
                    )
                # It is away: on its silence alone nobody stops; it is asked again when it is back.
        finally:
            self._arriving.pop(step, None)

    async def ask_again(self) -> None:
        """Asks for all that has not come."""
        for step in tuple(self._arriving):
            await self._ask(step)

    def arrived(self, step: int, parts: Mapping[str, Leaves]) -> None:
        """Rows that were asked for came."""
        future = self._arriving.get(step)
        if future is not None and not future.done():
            future.set_result(parts)

    def failed(self, step: int, error: Exception) -> None:
        """The user's source raised."""
        future = self._arriving.get(step)
        if future is not None and not future.done():
            future.set_exception(error)

    def inputs(self, step: int, microbatch: int) -> Leaves:
        """Leaves of one microbatch's inputs."""
        return self._inputs[step][microbatch]

    def targets(self, step: int) -> list[Leaves]:
        """Leaves of all microbatches' targets."""
        return self._targets[step]

    def drop(self, step: int) -> None:
        """Forgets a step's rows."""
        self._inputs.pop(step, None)
        self._targets.pop(step, None)

    def drop_from(self, step: int) -> None:
        """Forgets the rows of `step` and later."""
        for held in (self._inputs, self._targets):
            for later in [known for known in held if known >= step]:
                del held[later]


def split(leaves: Leaves, microbatches: int) -> list[Leaves]:
    """Cuts a batch into microbatches of equal, consecutive rows.

    Raises:
        DataError: A leaf's rows are not a multiple of the microbatches.
    """
    for leaf in leaves:
        if leaf.ndim == 0 or leaf.shape[0] % microbatches:
            raise DataError(
                f"a leaf of shape {leaf.shape} cannot be split into {microbatches} microbatches"
            )
    # Contiguous copies: rows of a batch are views, and programs adopt aligned memory only.
    return [
        [
            np.ascontiguousarray(
                leaf[m * (leaf.shape[0] // microbatches) :][: leaf.shape[0] // microbatches]
            )
            for leaf in leaves
        ]
        for m in range(microbatches)
    ]
