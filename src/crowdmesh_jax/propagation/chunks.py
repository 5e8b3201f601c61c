"""A transfer as a plan: chunks with offsets and checksums, what is there, what must be sent.

Bulk transfers are cut so that pipeline frames overtake them, go on where they broke off, and send
only what changed since the version that the receiver has. Everything here works on bytes that lie
in memory; it sends nothing. Checksums are SHA-256 (chunks: its first 16 bytes): they find accidents
and mix-ups, not malice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import DataError, InvalidValueError

CHUNK_BYTES = 1_000_000
"""Measured best on a gRPC stream: 0.5 to 2 MB."""
MAX_CHUNKS = 1_000_000
DIGEST_BYTES = 16


def checksum(data: bytes | bytearray | memoryview) -> str:
    """Of one chunk: 32 hexadecimal digits."""
    return hashlib.sha256(data).digest()[:DIGEST_BYTES].hex()


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a finished copy must be: its size, and the checksum of each chunk."""

    size_bytes: int
    chunk_bytes: int
    checksums: tuple[str, ...]
    sha256: str
    """Of all bytes."""

    def __post_init__(self) -> None:
        if self.chunk_bytes < 1 or self.size_bytes < 0:
            raise InvalidValueError(
                f"manifest: chunk_bytes must be >= 1 and size_bytes >= 0, got {self.chunk_bytes}"
                f" and {self.size_bytes}"
            )
        count = -(-self.size_bytes // self.chunk_bytes)
        if count > MAX_CHUNKS:
            raise InvalidValueError(
                f"manifest: {count} chunks, at most {MAX_CHUNKS}; use larger chunks"
            )
        if len(self.checksums) != count:
            raise InvalidValueError(
                f"manifest: {self.size_bytes} bytes in chunks of {self.chunk_bytes} need {count}"
                f" checksums, got {len(self.checksums)}"
            )

    @classmethod
    def of(
        cls, data: bytes | bytearray | memoryview, *, chunk_bytes: int = CHUNK_BYTES
    ) -> Manifest:
        """Of bytes that are there."""
        if chunk_bytes < 1:
            raise InvalidValueError(f"chunk_bytes must be >= 1, got {chunk_bytes}")
        view = memoryview(data).cast("B")
        starts = range(0, len(view), chunk_bytes)
        return cls(
            size_bytes=len(view),
            chunk_bytes=chunk_bytes,
            checksums=tuple(checksum(view[start : start + chunk_bytes]) for start in starts),
            sha256=hashlib.sha256(view).hexdigest(),
        )

    def span(self, index: int) -> tuple[int, int]:
        """(offset, bytes) of a chunk."""
        if not 0 <= index < len(self.checksums):
            raise InvalidValueError(f"chunk {index} is outside 0..{len(self.checksums) - 1}")
        offset = index * self.chunk_bytes
        return offset, min(self.chunk_bytes, self.size_bytes - offset)

    def index_at(self, offset: int) -> int:
        """The chunk that begins there.

        Raises:
            DataError: None does.
        """
        if offset % self.chunk_bytes or not 0 <= offset < self.size_bytes:
            raise DataError(
                f"no chunk begins at {offset} in {self.size_bytes} bytes of chunks of"
                f" {self.chunk_bytes}"
            )
        return offset // self.chunk_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkMove:
    """A chunk that the receiver copies from an older version that it has."""

    index: int
    from_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferPlan:
    """How a receiver gets the bytes of `manifest`."""

    manifest: Manifest
    there: tuple[int, ...]
    """Chunks that already lie where they belong, from an attempt that broke off."""
    local: tuple[ChunkMove, ...]
    """Chunks that an older version holds, at any offset that is a multiple of the chunk."""
    send: tuple[int, ...]
    """Chunks that must cross the wire, in order."""

    @property
    def send_bytes(self) -> int:
        return sum(self.manifest.span(index)[1] for index in self.send)


def plan_transfer(
    manifest: Manifest,
    *,
    older: Manifest | None = None,
    there: Mapping[int, str] | None = None,
) -> TransferPlan:
    """What of a copy has to be sent.

    Args:
        older: Of a complete version that the receiver holds. Ignored where its chunks are of
            another size: nothing could be told equal.
        there: Chunk index -> checksum of what lies in the unfinished copy now, as re-read by the
            receiver. What does not match is sent again; so is what is outside.

    Returns:
        Each chunk in exactly one of the three lists.
    """
    known: dict[tuple[str, int], int] = {}
    if older is not None and older.chunk_bytes == manifest.chunk_bytes:
        for index, digest in enumerate(older.checksums):
            offset, size = older.span(index)
            known.setdefault((digest, size), offset)
    kept, moved, sent = [], [], []
    for index, digest in enumerate(manifest.checksums):
        offset, size = manifest.span(index)
        if there is not None and there.get(index) == digest:
            kept.append(index)
        elif (digest, size) in known:
            # The same place if it holds the same there: the common case, and a sequential read.
            same = (
                older is not None
                and index < len(older.checksums)
                and older.checksums[index] == digest
                and older.span(index)[1] == size
            )
            moved.append(
                ChunkMove(index=index, from_offset=offset if same else known[digest, size])
            )
        else:
            sent.append(index)
    return TransferPlan(manifest=manifest, there=tuple(kept), local=tuple(moved), send=tuple(sent))


class Assembly:
    """A copy that is being put together. It counts only when `finish` has checked all of it."""

    def __init__(self, manifest: Manifest, *, limit_bytes: int) -> None:
        """Nothing is there yet.

        Args:
            limit_bytes: What may be allocated; the manifest came off a wire.

        Raises:
            DataError: The copy is larger.
        """
        if manifest.size_bytes > limit_bytes:
            raise DataError(
                f"a copy of {manifest.size_bytes} bytes is over the limit of {limit_bytes}"
            )
        self.manifest = manifest
        self._data = bytearray(manifest.size_bytes)
        self._done: set[int] = set()

    @classmethod
    def resumed(
        cls, manifest: Manifest, data: bytes | bytearray | memoryview, *, limit_bytes: int
    ) -> Assembly:
        """From what an attempt left, of whatever state: each chunk is read and checked again."""
        made = cls(manifest, limit_bytes=limit_bytes)
        view = memoryview(data).cast("B")
        for index, digest in enumerate(manifest.checksums):
            offset, size = manifest.span(index)
            part = view[offset : offset + size]
            if len(part) == size and checksum(part) == digest:
                made._data[offset : offset + size] = part
                made._done.add(index)
        return made

    @property
    def missing(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.manifest.checksums)) if i not in self._done)

    def there(self) -> dict[int, str]:
        """Chunks that are in place, for `plan_transfer`."""
        return {index: self.manifest.checksums[index] for index in sorted(self._done)}

    def put(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Takes a chunk; the same one again changes nothing.

        Raises:
            DataError: No chunk begins there, or size or checksum differ; nothing is changed.
        """
        index = self.manifest.index_at(offset)
        size = self.manifest.span(index)[1]
        view = memoryview(data).cast("B")
        if len(view) != size:
            raise DataError(f"chunk {index} at {offset}: {len(view)} bytes, expected {size}")
        found = checksum(view)
        if found != self.manifest.checksums[index]:
            raise DataError(
                f"chunk {index} at {offset}: checksum {found}, expected"
                f" {self.manifest.checksums[index]}; it was damaged or is of another version"
            )
        self._data[offset : offset + size] = view
        self._done.add(index)

    def take(self, moves: Sequence[ChunkMove], older: bytes | bytearray | memoryview) -> None:
        """Copies chunks from an older version, each checked: it may have rotted on its disk.

        Raises:
            DataError: A chunk is not what the plan took it for; those before it are in place.
        """
        view = memoryview(older).cast("B")
        for move in moves:
            offset, size = self.manifest.span(move.index)
            self.put(offset, view[move.from_offset : move.from_offset + size])

    def finish(self) -> bytes:
        """The bytes, checked as a whole.

        Raises:
            DataError: Chunks are missing, or the whole does not match.
        """
        if self.missing:
            raise DataError(
                f"{len(self.missing)} of {len(self.manifest.checksums)} chunks are missing,"
                f" chunk {self.missing[0]} first"
            )
        if hashlib.sha256(self._data).hexdigest() != self.manifest.sha256:
            raise DataError("all chunks match, the whole does not: the manifest is inconsistent")
        return bytes(self._data)
