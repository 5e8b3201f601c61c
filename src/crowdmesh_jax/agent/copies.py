"""Copies of stages' states that an agent keeps: its own snapshots, and those of others.

A copy is offered, then its pieces come, then a seal; until that has matched, nothing of it can be
seen (R12). Pieces that are here already are not asked for: of an older copy where nothing changed,
or of an attempt that a fence broke off. Copies stay in memory up to a limit, then in files of a
folder up to another; a file is checked again when it is read. It knows nothing of who may send
what. Methods are called on one thread; `Incoming.complete`, `OnDisk.read` and `write`, which are
slow, on any.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import FrameError, RecordError
from ..protocol.recovery_messages import Manifest
from .packing import CopyArrays, Offer

logger = logging.getLogger(__name__)

Name = tuple[int, int, int, int]
"""First layer, last layer, tag, version (`Copy.name`)."""
MOST_OFFERS = 64
"""Open at once, of all senders; the oldest goes."""


@dataclass(frozen=True, slots=True)
class _InMemory:
    offer: Offer
    buffer: np.ndarray


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A copy in a file."""

    offer: Offer
    path: Path

    def read(self) -> np.ndarray:
        """Its bytes, checked. Slow.

        Raises:
            RecordError: It cannot be read, or is damaged.
        """
        try:
            data = self.path.read_bytes()
        except OSError as exc:
            raise RecordError(f"{self.path}: the copy cannot be read: {exc}") from exc
        buffer = np.frombuffer(data, np.uint8)
        if not self.offer.fits(buffer):
            raise RecordError(f"{self.path}: damaged: the copy's checksum does not match")
        return buffer


@dataclass(slots=True)
class Incoming:
    """A copy on its way here."""

    offer: Offer
    local: dict[int, tuple[np.ndarray | OnDisk, int]] = field(default_factory=dict)
    """Piece -> where it lies already: bytes, and the first of them."""
    buffer: np.ndarray | None = None
    came: set[int] = field(default_factory=set)
    came_bytes: int = 0
    """Of this attempt."""
    _first_bytes: int = 0
    _first_s: float = 0.0
    _last_s: float = 0.0

    @property
    def missing(self) -> tuple[int, ...]:
        """Pieces that must be sent."""
        pieces = range(len(self.offer.checksums))
        return tuple(i for i in pieces if i not in self.came and i not in self.local)

    @property
    def size_bytes(self) -> int:
        """What it takes now."""
        return 0 if self.buffer is None else self.buffer.size

    @property
    def seconds_and_bytes(self) -> tuple[float, int]:
        """From the first piece's arrival to the last one's, and what came between: what the link
        carried. Of a single piece it says nothing: both are 0."""
        return self._last_s - self._first_s, self.came_bytes - self._first_bytes

    def put(self, offset_bytes: int, piece: np.ndarray) -> None:
        """Adds a piece.

        Raises:
            FrameError: None begins there, or it has another size.
        """
        index, rest = divmod(offset_bytes, self.offer.piece_bytes)
        if rest or not 0 <= index < len(self.offer.checksums):
            raise FrameError(f"no piece of the copy begins at byte {offset_bytes}")
        start, stop = self.offer.span(index)
        if piece.size != stop - start:
            raise FrameError(
                f"a piece of {piece.size} bytes at byte {start}, expected {stop - start}"
            )
        if self.buffer is None:
            self.buffer = np.empty(self.offer.packing.size_bytes, np.uint8)
        self.buffer[start:stop] = piece
        self.came.add(index)
        self._last_s = time.monotonic()
        if not self.came_bytes:
            self._first_s, self._first_bytes = self._last_s, piece.size
        self.came_bytes += piece.size

    def complete(self, manifest: Manifest) -> str:
        """Fetches what lies here already and checks everything. Slow.

        Returns:
            What is wrong; "": nothing.
        """
        if self.offer.manifest != manifest:
            return f"its seal says {manifest}, it was offered as {self.offer.manifest}"
        if self.missing:
            return f"{len(self.missing)} of {len(self.offer.checksums)} pieces did not come"
        if self.buffer is None:
            self.buffer = np.empty(self.offer.packing.size_bytes, np.uint8)
        files: dict[Path, np.ndarray] = {}
        for index, (source, offset) in self.local.items():
            if index in self.came:
                continue
            if isinstance(source, OnDisk):
                try:
                    if source.path not in files:
                        files[source.path] = source.read()
                except RecordError as exc:
                    return exc.message
                source = files[source.path]
            start, stop = self.offer.span(index)
            self.buffer[start:stop] = source[offset : offset + stop - start]
        return "" if self.offer.fits(self.buffer) else "a piece's checksum does not match"


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyLimits:
    """How much an agent keeps for others."""

    memory_bytes: int = 2**30
    disk_bytes: int = 0
    folder: Path | None = None
    """For copies that memory has no room for."""


class CopyStore:
    """All copies of one agent, and those on their way to it."""

    def __init__(self, limits: CopyLimits) -> None:
        self._limits = limits
        self._own: dict[Name, CopyArrays] = {}
        """Snapshots: views on arrays that are there anyway. They count against no limit."""
        self._memory: dict[Name, _InMemory] = {}
        self._disk: dict[Name, OnDisk] = {}
        self._incoming: dict[tuple[str, Name], Incoming] = {}
        self._remains: list[Incoming] = []
        """What a fence broke off: if the same is offered again, it goes on from here. They give way
        to whatever needs the room."""
        self._failed: set[tuple[str, Name]] = set()
        """Came damaged, perhaps for what was here already: next time all of it is asked for."""
        self._reserved: dict[Name, int] = {}
        """Bytes of files that are being written."""

    @property
    def limit_bytes(self) -> int:
        """For others' copies, memory and disk together."""
        disk = self._limits.disk_bytes if self._limits.folder is not None else 0
        return self._limits.memory_bytes + disk

    # What is here --------------------------------------------------------------------------------

    def keep_own(self, name: Name, arrays: CopyArrays) -> None:
        """A snapshot of this device's own stage becomes a copy."""
        self._own[name] = arrays

    def find(self, name: Name) -> CopyArrays | OnDisk | None:
        """A copy, or the file to read it from; None: it is not here."""
        if name in self._own:
            return self._own[name]
        entry = self._memory.get(name)
        if entry is not None:
            return entry.offer.packing.arrays(entry.buffer)
        return self._disk.get(name)

    def offer(self, name: Name) -> Offer | None:
        """As a copy that is kept for others came; None: there is none."""
        entry = self._memory.get(name) or self._disk.get(name)
        return None if entry is None else entry.offer

    def size_bytes(self, name: Name) -> int:
        """Of a copy kept for others; 0: it is not here."""
        offer = self.offer(name)
        return 0 if offer is None else offer.packing.size_bytes

    def drop(self, name: Name) -> None:
        """Frees a copy, wherever it is."""
        self._own.pop(name, None)
        self._memory.pop(name, None)
        entry = self._disk.pop(name, None)
        if entry is not None:
            entry.path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Frees everything."""
        for name in list(self._disk):
            self.drop(name)
        for kept in (self._own, self._memory, self._incoming, self._remains, self._failed):
            kept.clear()

    @property
    def memory_bytes(self) -> int:
        """Held for others, in memory; incomplete ones too, but not what gives way."""
        whole = sum(entry.buffer.size for entry in self._memory.values())
        return whole + sum(entry.size_bytes for entry in self._incoming.values())

    @property
    def disk_bytes(self) -> int:
        """Held for others, in files."""
        whole = sum(entry.offer.packing.size_bytes for entry in self._disk.values())
        return whole + sum(self._reserved.values())

    # What arrives --------------------------------------------------------------------------------

    def offered(self, sender: str, name: Name, offer: Offer) -> tuple[int, ...]:
        """A copy is going to come.

        Returns:
            The pieces that must be sent; all others are here.

        Raises:
            FrameError: There is no room for it.
        """
        self._check_room(offer.packing.size_bytes)
        self._incoming.pop((sender, name), None)
        entry = Incoming(offer)
        if (sender, name) in self._failed:
            self._failed.remove((sender, name))
        else:
            entry = self._taken_up(offer) or entry
            known = self._known()
            entry.local = {i: known[c] for i, c in enumerate(offer.checksums) if c in known}
        self._incoming[sender, name] = entry
        while len(self._incoming) > MOST_OFFERS:
            del self._incoming[next(iter(self._incoming))]
        return entry.missing

    def _known(self) -> dict[str, tuple[np.ndarray | OnDisk, int]]:
        """Checksum -> where such a piece lies."""
        known: dict[str, tuple[np.ndarray | OnDisk, int]] = {}
        for kept in (*self._memory.values(), *self._disk.values()):
            source = kept.buffer if isinstance(kept, _InMemory) else kept
            for index, piece in enumerate(kept.offer.checksums):
                known.setdefault(piece, (source, kept.offer.span(index)[0]))
        return known

    def _taken_up(self, offer: Offer) -> Incoming | None:
        """An attempt that broke off, where it broke off: in its memory, with its pieces."""
        for index, old in enumerate(self._remains):
            if old.offer.manifest == offer.manifest and old.offer.piece_bytes == offer.piece_bytes:
                del self._remains[index]
                return Incoming(offer, buffer=old.buffer, came=old.came)
        return None

    def store_piece(self, sender: str, name: Name, offset_bytes: int, piece: np.ndarray) -> None:
        """Adds a piece of what was offered; of what was not, or was refused, it goes nowhere.

        Raises:
            FrameError: It does not fit to the offer, or there is no room any more.
        """
        entry = self._incoming.get((sender, name))
        if entry is None:
            return  # the seal will not match
        try:
            if entry.buffer is None:
                self._check_room(entry.offer.packing.size_bytes)
            entry.put(offset_bytes, piece)
        except FrameError as exc:
            del self._incoming[sender, name]
            raise FrameError(f"copy {name} of {sender}: {exc.message}") from exc

    def incoming(self, sender: str, name: Name) -> Incoming | None:
        """What has come of a copy."""
        return self._incoming.get((sender, name))

    def forget(self, sender: str, name: Name) -> None:
        """It came damaged."""
        self._incoming.pop((sender, name), None)
        self._failed.add((sender, name))

    def break_off(self) -> None:
        """Nothing is on its way any more (R6). Bytes that came stay, as bytes: should a copy with
        the same checksums be offered in a later epoch, only the rest is sent."""
        self._remains += [entry for entry in self._incoming.values() if entry.came]
        self._incoming.clear()
        self._make_way(0)

    def keep(self, sender: str, name: Name) -> OnDisk | None:
        """A checked copy is whole at once; or, where memory has no room, is to be written: then
        `written` makes it so.

        Raises:
            FrameError: There is no room on the disk either.
        """
        entry = self._incoming.pop((sender, name))
        assert entry.buffer is not None, "it was completed"
        size_bytes = entry.buffer.size
        if self.memory_bytes + size_bytes <= self._limits.memory_bytes:
            self._memory[name] = _InMemory(entry.offer, entry.buffer)
            return None
        folder = self._limits.folder
        if folder is None or self.disk_bytes + size_bytes > self._limits.disk_bytes:
            raise FrameError(f"no room for a copy of {size_bytes} bytes")
        self._reserved[name] = size_bytes
        return OnDisk(entry.offer, folder / ("copy-" + "-".join(map(str, name))))

    def written(self, name: Name, entry: OnDisk | None) -> None:
        """The file is there; None: it could not be written."""
        del self._reserved[name]
        if entry is not None:
            self._disk[name] = entry

    def _check_room(self, size_bytes: int) -> None:
        room_bytes = self.room_bytes
        if size_bytes > room_bytes:
            raise FrameError(
                f"a copy of {size_bytes} bytes is more than the {room_bytes} bytes that are free"
            )
        self._make_way(size_bytes)

    def _make_way(self, size_bytes: int) -> None:
        """Drops remains, the oldest first, until they fit beside a new copy."""
        room_bytes = self.room_bytes - size_bytes
        while self._remains and sum(entry.size_bytes for entry in self._remains) > room_bytes:
            del self._remains[0]

    @property
    def room_bytes(self) -> int:
        """The largest copy that could be taken now."""
        limits = self._limits
        in_memory = limits.memory_bytes - self.memory_bytes
        on_disk = limits.disk_bytes - self.disk_bytes if limits.folder is not None else 0
        return max(in_memory, on_disk, 0)


def write(entry: OnDisk, buffer: np.ndarray) -> None:
    """Temporary name, fsync, rename. Slow.

    Raises:
        OSError: The disk does not take it.
    """
    entry.path.parent.mkdir(parents=True, exist_ok=True)
    part = entry.path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(buffer.data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(entry.path)
