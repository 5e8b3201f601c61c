"""What the machine demands of copies: keeping own snapshots, taking those of others, sending them.

Between the machine's actions and the store of bytes (`copies`). Slow parts run in threads. Decides
nothing: who may leave a copy here, and when one is dropped, the machine says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

import numpy as np

from ..errors import FrameError, RecordError
from ..protocol import member_events as ev
from ..protocol.common import Slot
from ..protocol.evidence import Copy
from ..protocol.recovery_messages import Manifest
from .copies import CopyArrays, CopyLimits, CopyStore, Name, Packing, new_checksum
from .envelope import Envelope, Key
from .slots import Slots
from .stage import HeldStage

logger = logging.getLogger(__name__)


class DamagedCopyError(RecordError):
    """A copy that was whole cannot be read any more."""

    def __init__(self, copy: Copy, reason: str) -> None:
        super().__init__(reason)
        self.copy = copy


class Keeper:
    """The copies of one agent, as the machine names them."""

    def __init__(self, limits: CopyLimits, slots: Slots) -> None:
        self.store = CopyStore(limits)
        self._slots = slots
        self._manifests: dict[Name, Manifest] = {}
        """Of copies that were sent: equal names, equal bytes."""

    def do(
        self, action: ev.MemberAction, envelope: Envelope | None, held: HeldStage | None
    ) -> bool:
        """Carries out an action on copies that takes no time; False: it is none."""
        match action:
            case ev.KeepState(copy=copy):
                assert held is not None, "the machine keeps only what is there"
                arrays = CopyArrays(state=held.worker.snapshot(), verdict=self._verdict(copy))
                self.store.keep_own(copy.name, arrays)
            case ev.KeepCopy(copy=copy):
                state = self._slots.get(_state_slot(copy))
                arrays = CopyArrays(state=state, verdict=self._verdict(copy))
                self.store.keep_own(copy.name, arrays)
            case ev.DropCopies(copies=copies):
                for copy in copies:
                    self.store.drop(copy.name)
                    self._manifests.pop(copy.name, None)
                    self._slots.drop(_state_slot(copy))
            case ev.StoreChunk():
                self._store_chunk(action, envelope)
            case _:
                return False
        return True

    def _verdict(self, copy: Copy) -> Mapping[Key, Any]:
        return self._slots.get(Slot(kind="verdict", step=copy.version - 1))

    def _store_chunk(self, action: ev.StoreChunk, envelope: Envelope | None) -> None:
        groups = envelope.groups if envelope is not None else ()
        pieces = [array for group in groups for array in group.values()]
        if len(pieces) != 1 or pieces[0].dtype != np.uint8 or pieces[0].ndim != 1:
            logger.error("a chunk from %s without its bytes was dropped", action.sender)
            return
        leaves = envelope.extra.get("leaves") if envelope is not None else None
        try:
            self.store.store_chunk(
                action.sender, action.copy.name, action.offset_bytes, leaves, pieces[0]
            )
        except FrameError as exc:
            logger.error("%s: refused: %s", action.sender, exc)

    async def keep(self, sender: str, copy: Copy, manifest: Manifest) -> bool:
        """Checks what came and makes it whole at once; whether it is."""
        entry = self.store.take_incomplete(sender, copy.name)
        if entry is None:
            return False
        try:
            return await asyncio.to_thread(self.store.keep, copy.name, entry, manifest)
        except OSError as exc:
            logger.error("copy %s cannot be kept: %s", copy.name, exc)
            return False

    async def gather(self, copies: Iterable[Copy]) -> dict[Key, Any]:
        """State from these copies, and the slot of the verdict that they bring.

        Raises:
            DamagedCopyError: One cannot be read.
        """
        state: dict[Key, Any] = {}
        for copy in copies:
            arrays = await self._read(copy)
            if arrays is None:
                raise DamagedCopyError(copy, "it is not here")
            state.update(arrays.state)
            slot = Slot(kind="verdict", step=copy.version - 1)
            if arrays.verdict and not self._slots.get(slot):
                self._slots.fill(slot, arrays.verdict)
        return state

    async def stream(
        self, copy: Copy, held: HeldStage | None
    ) -> AsyncIterator[tuple[np.ndarray, Mapping[str, Any]]]:
        """A copy's bytes, piece by piece, with what goes beside the first; then `manifest` has its
        seal. A copy that is the resident state itself is read from there: it is frozen.

        Raises:
            DamagedCopyError: It cannot be read.
        """
        arrays = await self._read(copy)
        if arrays is None:
            assert held is not None, "the machine sends only what is there"
            arrays = CopyArrays(state=held.worker.snapshot(), verdict=self._verdict(copy))
        packing = Packing.of(arrays)
        checksum = new_checksum()
        extra: Mapping[str, Any] = {"leaves": packing.to_plain()}
        pieces = packing.chunks(arrays)

        def next_piece() -> np.ndarray | None:
            piece = next(pieces, None)
            if piece is not None:
                checksum.update(piece.data)
            return piece

        while (piece := await asyncio.to_thread(next_piece)) is not None:
            yield piece, extra
            extra = {}
        self._manifests[copy.name] = Manifest(
            leaves=packing.leaves,
            size_bytes=packing.size_bytes,
            checksum=checksum.hexdigest(),
        )

    async def _read(self, copy: Copy) -> CopyArrays | None:
        try:
            return await asyncio.to_thread(self.store.get, copy.name)
        except RecordError as exc:
            raise DamagedCopyError(copy, exc.message) from exc

    def manifest(self, copy: Copy) -> Manifest:
        """Of a copy whose stream has ended."""
        return self._manifests[copy.name]

    def size_bytes(self, copies: Iterable[Copy]) -> int:
        """Of those that are here for others."""
        return sum(self.store.size_bytes(copy.name) for copy in copies)

    def drop_unless_known(self, copy: Copy, known: Iterable[Copy]) -> None:
        """Frees a copy that became whole too late to count."""
        if all(have.name != copy.name for have in known):
            self.store.drop(copy.name)

    def drop_incomplete(self) -> None:
        self.store.drop_incomplete()

    def clear(self) -> None:
        self.store.clear()
        self._manifests.clear()


def _state_slot(copy: Copy) -> Slot:
    return Slot(kind="state", step=copy.version, layer=copy.first_layer)
