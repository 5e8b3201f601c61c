"""What the machine demands of copies: keeping own snapshots, taking those of others.

Between the machine's actions and the store of bytes (`copies`). Slow parts run in threads. Decides
nothing: who may leave a copy here, and when one is dropped, the machine says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import FrameError, RecordError
from ..protocol import member_events as ev
from ..protocol.common import Slot
from ..protocol.evidence import Copy
from ..protocol.recovery_messages import Manifest
from . import packing
from .copies import CopyLimits, CopyStore, Incoming, Name, OnDisk, write
from .envelope import Envelope, Key
from .packing import CopyArrays, Offer
from .slots import Slots
from .stage import HeldStage

logger = logging.getLogger(__name__)


class DamagedCopyError(RecordError):
    """A copy that was whole cannot be read any more."""

    def __init__(self, copy: Copy, reason: str) -> None:
        super().__init__(reason)
        self.copy = copy


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A copy that is to be sent."""

    offer: Offer
    arrays: CopyArrays = field(repr=False)

    def piece(self, index: int) -> np.ndarray:
        """One of its pieces. Slow."""
        return self.offer.packing.piece(self.arrays, index, self.offer.piece_bytes)


class Keeper:
    """The copies of one agent, as the machine names them."""

    def __init__(self, limits: CopyLimits, slots: Slots) -> None:
        self.store = CopyStore(limits)
        self._slots = slots
        self._offers: dict[Name, Offer] = {}
        """Of own snapshots that were sent: equal names, equal bytes."""
        self._came_bytes: dict[Name, int] = {}

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
                    self._offers.pop(copy.name, None)
                    self._came_bytes.pop(copy.name, None)
                    self._slots.drop(_state_slot(copy))
            case ev.StoreChunk():
                self._store_piece(action, envelope)
            case _:
                return False
        return True

    def _verdict(self, copy: Copy) -> Mapping[Key, Any]:
        return self._slots.get(Slot(kind="verdict", step=copy.version - 1))

    # What arrives --------------------------------------------------------------------------------

    def offered(self, sender: str, name: Name, plain: Any) -> tuple[int, ...]:
        """A copy is going to come; the pieces that are wanted: none of them, if there is no room,
        and then its seal will not match.

        Raises:
            FrameError: It is no offer.
        """
        offer = Offer.read(plain)
        try:
            return self.store.offered(sender, name, offer)
        except FrameError as exc:
            logger.error("%s: refused: %s", sender, exc.message)
            return ()

    def _store_piece(self, action: ev.StoreChunk, envelope: Envelope | None) -> None:
        groups = envelope.groups if envelope is not None else ()
        pieces = [array for group in groups for array in group.values()]
        if len(pieces) != 1 or pieces[0].dtype != np.uint8 or pieces[0].ndim != 1:
            logger.error("a chunk from %s without its bytes was dropped", action.sender)
            return
        try:
            self.store.store_piece(action.sender, action.copy.name, action.offset_bytes, pieces[0])
        except FrameError as exc:
            logger.error("%s: refused: %s", action.sender, exc.message)

    async def keep(self, sender: str, copy: Copy, manifest: Manifest) -> Incoming | None:
        """Checks what came and makes it whole at once.

        Returns:
            How it came; None: it is not whole, or there is no room.
        """
        name = copy.name
        incoming = self.store.incoming(sender, name)
        if incoming is None:
            return None
        fault = await asyncio.to_thread(incoming.complete, manifest)
        if self.store.incoming(sender, name) is not incoming:
            return None  # a fence came between
        if fault:
            logger.error("copy %s from %s is damaged: %s", name, sender, fault)
            self.store.forget(sender, name)
            return None
        try:
            file = self.store.keep(sender, name)
        except FrameError as exc:
            logger.error("copy %s from %s: %s", name, sender, exc.message)
            return None
        if file is not None:
            assert incoming.buffer is not None
            try:
                await asyncio.to_thread(write, file, incoming.buffer)
            except OSError as exc:
                logger.error("copy %s cannot be kept: %s", name, exc)
                self.store.written(name, None)
                return None
            self.store.written(name, file)
        self._came_bytes[name] = incoming.came_bytes
        return incoming

    # What is read and sent -----------------------------------------------------------------------

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

    async def outgoing(self, copy: Copy, held: HeldStage | None) -> Outgoing:
        """A copy to be sent. One that is the resident state itself is read from there: it is
        frozen.

        Raises:
            DamagedCopyError: It cannot be read.
        """
        arrays = await self._read(copy)
        if arrays is None:
            assert held is not None, "the machine sends only what is there"
            arrays = CopyArrays(state=held.worker.snapshot(), verdict=self._verdict(copy))
        offer = self.store.offer(copy.name) or self._offers.get(copy.name)
        if offer is None:
            offer = await asyncio.to_thread(Offer.of, arrays, packing.PIECE_BYTES)
            self._offers[copy.name] = offer
        return Outgoing(offer, arrays)

    async def _read(self, copy: Copy) -> CopyArrays | None:
        found = self.store.find(copy.name)
        if not isinstance(found, OnDisk):
            return found
        try:
            buffer = await asyncio.to_thread(found.read)
        except RecordError as exc:
            raise DamagedCopyError(copy, exc.message) from exc
        return found.offer.packing.arrays(buffer)

    def came_bytes(self, copies: Iterable[Copy]) -> int:
        """Of those that are here for others, what crossed the wire."""
        return sum(self._came_bytes.get(copy.name, 0) for copy in copies)

    def drop_unless_known(self, copy: Copy, known: Iterable[Copy]) -> None:
        """Frees a copy that became whole too late to count."""
        if all(have.name != copy.name for have in known):
            self.store.drop(copy.name)

    def break_off(self) -> None:
        """A fence: nothing is on its way any more."""
        self.store.break_off()

    def clear(self) -> None:
        """Frees everything."""
        self.store.clear()
        self._offers.clear()
        self._came_bytes.clear()


def _state_slot(copy: Copy) -> Slot:
    return Slot(kind="state", step=copy.version, layer=copy.first_layer)
