"""Copies of stages' states that an agent keeps: its own snapshots, and those of others.

A copy travels as one stream of bytes, leaf after leaf, in chunks; a seal with size and checksum
ends it. Until the seal has matched, nothing of it can be seen (R12). Copies stay in memory up to a
limit, then in files of a folder up to another; a file is checked again when it is read. It knows
nothing of who may send what.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FrameError, RecordError
from ..protocol.recovery_messages import Manifest
from ..transport.codec import dtype_of
from .envelope import Group, Key

logger = logging.getLogger(__name__)

Name = tuple[int, int, int, int]
"""First layer, last layer, tag, version (`Copy.name`)."""
CHUNK_BYTES = 2**20
ALIGN_BYTES = 64
STATE, VERDICT = "state", "verdict"
DIGEST_BYTES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyArrays:
    """What a copy holds: a stage's state, and the verdict of the step before it."""

    state: Group = field(repr=False)
    verdict: Group = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class _Leaf:
    part: str
    key: Key
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int


class Packing:
    """How a copy's arrays lie in one stream of bytes, each at a multiple of 64."""

    def __init__(self, leaves: list[_Leaf]) -> None:
        self._leaves = leaves
        end = leaves[-1] if leaves else None
        self.size_bytes = 0 if end is None else _aligned(end.offset_bytes + end.size_bytes)

    @property
    def leaves(self) -> int:
        return len(self._leaves)

    @classmethod
    def of(cls, arrays: CopyArrays) -> Packing:
        """The layout of these arrays."""
        leaves, offset = [], 0
        for part, group in ((STATE, arrays.state), (VERDICT, arrays.verdict)):
            for key, value in group.items():
                array = np.asarray(value)
                leaf = _Leaf(part, key, array.dtype.name, array.shape, offset, array.nbytes)
                leaves.append(leaf)
                offset = _aligned(offset + array.nbytes)
        return cls(leaves)

    @classmethod
    def read(cls, plain: Any, limit_bytes: int) -> Packing:
        """The layout that a chunk brought.

        Raises:
            FrameError: It is none, or asks for more than `limit_bytes`.
        """
        leaves, offset = [], 0
        try:
            for part, role, layer, path, dtype_name, shape in plain:
                dtype = dtype_of(str(dtype_name))
                dims = tuple(int(n) for n in shape)
                if part not in (STATE, VERDICT) or any(n < 0 for n in dims):
                    raise FrameError(f"a copy's leaf {part!r} of shape {dims}")
                size = int(np.prod(dims, dtype=object)) * dtype.itemsize
                key = (str(role), str(layer), str(path))
                leaves.append(_Leaf(part, key, str(dtype_name), dims, offset, size))
                offset = _aligned(offset + size)
                if offset > limit_bytes:
                    raise FrameError(f"a copy of more than the {limit_bytes} bytes that are free")
        except (TypeError, ValueError) as exc:
            raise FrameError(f"a copy's leaves cannot be read: {exc}") from exc
        return cls(leaves)

    def to_plain(self) -> list[list[Any]]:
        """As a chunk brings it."""
        return [[leaf.part, *leaf.key, leaf.dtype, list(leaf.shape)] for leaf in self._leaves]

    def chunks(self, arrays: CopyArrays) -> Iterator[np.ndarray]:
        """The stream, in pieces of at most `CHUNK_BYTES`; each a buffer of its own."""
        for start in range(0, self.size_bytes, CHUNK_BYTES):
            stop = min(start + CHUNK_BYTES, self.size_bytes)
            piece = np.zeros(stop - start, np.uint8)
            for leaf in self._leaves:
                low = max(start, leaf.offset_bytes)
                high = min(stop, leaf.offset_bytes + leaf.size_bytes)
                if low < high:
                    group = arrays.state if leaf.part == STATE else arrays.verdict
                    flat = _bytes_of(group[leaf.key])
                    inside = slice(low - leaf.offset_bytes, high - leaf.offset_bytes)
                    piece[low - start : high - start] = flat[inside]
            yield piece

    def arrays(self, buffer: np.ndarray) -> CopyArrays:
        """Views on a whole stream."""
        parts: dict[str, dict[Key, np.ndarray]] = {STATE: {}, VERDICT: {}}
        for leaf in self._leaves:
            raw = buffer[leaf.offset_bytes : leaf.offset_bytes + leaf.size_bytes]
            parts[leaf.part][leaf.key] = raw.view(dtype_of(leaf.dtype)).reshape(leaf.shape)
        return CopyArrays(state=parts[STATE], verdict=parts[VERDICT])


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN_BYTES) * ALIGN_BYTES


def _bytes_of(value: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(value)).reshape(-1).view(np.uint8)


def new_checksum() -> Any:
    """Of a copy's stream: it finds accidents, not malice."""
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


@dataclass(slots=True)
class _Incomplete:
    packing: Packing
    buffer: np.ndarray
    filled_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _OnDisk:
    path: Path
    packing: Packing
    checksum: str


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
        self._memory: dict[Name, tuple[CopyArrays, int]] = {}
        self._disk: dict[Name, _OnDisk] = {}
        self._incomplete: dict[tuple[str, Name], _Incomplete] = {}

    @property
    def limit_bytes(self) -> int:
        """For others' copies, memory and disk together."""
        disk = self._limits.disk_bytes if self._limits.folder is not None else 0
        return self._limits.memory_bytes + disk

    # What is here --------------------------------------------------------------------------------

    def keep_own(self, name: Name, arrays: CopyArrays) -> None:
        """A snapshot of this device's own stage becomes a copy."""
        self._own[name] = arrays

    def get(self, name: Name) -> CopyArrays | None:
        """A copy's arrays; None: it is not here.

        Raises:
            RecordError: Its file is damaged.
        """
        if name in self._own:
            return self._own[name]
        if name in self._memory:
            return self._memory[name][0]
        entry = self._disk.get(name)
        return None if entry is None else _read(entry)

    def size_bytes(self, name: Name) -> int:
        """Of a copy kept for others; 0: it is not here."""
        if name in self._memory:
            return self._memory[name][1]
        return self._disk[name].packing.size_bytes if name in self._disk else 0

    def drop(self, name: Name) -> None:
        """Frees a copy, wherever it is."""
        self._own.pop(name, None)
        self._memory.pop(name, None)
        entry = self._disk.pop(name, None)
        if entry is not None:
            entry.path.unlink(missing_ok=True)

    def clear(self) -> None:
        for name in list(self._disk):
            self.drop(name)
        self._own.clear()
        self._memory.clear()
        self._incomplete.clear()

    @property
    def memory_bytes(self) -> int:
        """Held for others, in memory; incomplete ones too."""
        return sum(size for _, size in self._memory.values()) + sum(
            entry.packing.size_bytes for entry in self._incomplete.values()
        )

    @property
    def disk_bytes(self) -> int:
        return sum(entry.packing.size_bytes for entry in self._disk.values())

    # What arrives --------------------------------------------------------------------------------

    def store_chunk(
        self, sender: str, name: Name, offset_bytes: int, leaves: Any, piece: np.ndarray
    ) -> None:
        """Adds a piece; at offset 0 the copy begins anew.

        Raises:
            FrameError: It does not fit to what came before, or there is no room for the copy.
        """
        key = (sender, name)
        if offset_bytes == 0:
            self._incomplete.pop(key, None)
            packing = Packing.read(leaves, self._room_bytes)
            self._incomplete[key] = _Incomplete(packing, np.empty(packing.size_bytes, np.uint8))
        entry = self._incomplete.get(key)
        stop = offset_bytes + piece.size
        if entry is None:
            return  # the beginning was refused or dropped: the seal will not match
        if offset_bytes != entry.filled_bytes or stop > entry.packing.size_bytes:
            del self._incomplete[key]
            raise FrameError(
                f"a chunk of copy {name} from {sender} at byte {offset_bytes}, expected"
                f" {entry.filled_bytes} of {entry.packing.size_bytes}"
            )
        entry.buffer[offset_bytes:stop] = piece
        entry.filled_bytes = stop

    def take_incomplete(self, sender: str, name: Name) -> _Incomplete | None:
        """What has come of a copy, to be checked and kept; it is not incomplete any more."""
        return self._incomplete.pop((sender, name), None)

    def drop_incomplete(self) -> None:
        self._incomplete.clear()

    def keep(self, name: Name, entry: _Incomplete, manifest: Manifest) -> bool:
        """Checks a copy and makes it whole at once: in memory, or on disk after fsync. Slow: call
        it in a thread.

        Returns:
            Whether it matched its manifest, and there was room.
        """
        packing = entry.packing
        checksum = new_checksum()
        checksum.update(entry.buffer.data)
        found = Manifest(
            leaves=packing.leaves,
            size_bytes=packing.size_bytes,
            checksum=checksum.hexdigest(),
        )
        if found != manifest or entry.filled_bytes != packing.size_bytes:
            logger.error("copy %s is damaged: %s, its seal says %s", name, found, manifest)
            return False
        if self.memory_bytes + packing.size_bytes <= self._limits.memory_bytes:
            self._memory[name] = packing.arrays(entry.buffer), packing.size_bytes
            return True
        folder = self._limits.folder
        if folder is None or self.disk_bytes + packing.size_bytes > self._limits.disk_bytes:
            logger.error("no room for copy %s of %d bytes", name, packing.size_bytes)
            return False
        path = folder / ("copy-" + "-".join(map(str, name)))
        _write(path, entry.buffer)
        self._disk[name] = _OnDisk(path, packing, manifest.checksum)
        return True

    @property
    def _room_bytes(self) -> int:
        limits = self._limits
        in_memory = limits.memory_bytes - self.memory_bytes
        on_disk = limits.disk_bytes - self.disk_bytes if limits.folder is not None else 0
        return max(in_memory, on_disk, 0)


def _write(path: Path, buffer: np.ndarray) -> None:
    """Temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(buffer.data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _read(entry: _OnDisk) -> CopyArrays:
    try:
        data = entry.path.read_bytes()
    except OSError as exc:
        raise RecordError(f"{entry.path}: the copy cannot be read: {exc}") from exc
    checksum = new_checksum()
    checksum.update(data)
    if len(data) != entry.packing.size_bytes or checksum.hexdigest() != entry.checksum:
        raise RecordError(f"{entry.path}: damaged: the copy's checksum does not match")
    return entry.packing.arrays(np.frombuffer(data, np.uint8))
