"""A copy as a stream of bytes, cut into pieces that are told apart by their checksums.

The arrays of a stage's state lie one after another, each at a multiple of 64 bytes. An offer names
the layout and each piece's checksum, so that a receiver need ask only for pieces that it has not.
Checksums find accidents, not malice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import FrameError
from ..protocol.recovery_messages import Manifest
from ..transport.codec import dtype_of
from .envelope import Group, Key

PIECE_BYTES = 2**20 - 2**14
"""Of a stream, at once: pipeline frames overtake between pieces. With its frame, one chunk of the
transport."""
MOST_PIECES = 2**16
ALIGN_BYTES = 64
DIGEST_BYTES = 20
STATE, VERDICT = "state", "verdict"


def checksum(data: Any) -> str:
    """Of a piece: 40 hexadecimal digits of its SHA-256, for which most processors have instructions
    (measured 2.5 times as fast as BLAKE2b)."""
    return hashlib.sha256(data).digest()[:DIGEST_BYTES].hex()


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
        """The layout that an offer brought.

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
        """As an offer brings it."""
        return [[leaf.part, *leaf.key, leaf.dtype, list(leaf.shape)] for leaf in self._leaves]

    def span(self, index: int, piece_bytes: int) -> tuple[int, int]:
        """(first byte, byte behind the last) of a piece."""
        start = index * piece_bytes
        return start, min(start + piece_bytes, self.size_bytes)

    def pieces(self, piece_bytes: int) -> int:
        """How many there are."""
        return -(-self.size_bytes // piece_bytes)

    def piece(self, arrays: CopyArrays, index: int, piece_bytes: int) -> np.ndarray:
        """One piece of the stream: uint8, a buffer of its own."""
        start, stop = self.span(index, piece_bytes)
        piece = np.zeros(stop - start, np.uint8)
        for leaf in self._leaves:
            low = max(start, leaf.offset_bytes)
            high = min(stop, leaf.offset_bytes + leaf.size_bytes)
            if low < high:
                group = arrays.state if leaf.part == STATE else arrays.verdict
                flat = _bytes_of(group[leaf.key])
                inside = slice(low - leaf.offset_bytes, high - leaf.offset_bytes)
                piece[low - start : high - start] = flat[inside]
        return piece

    def arrays(self, buffer: np.ndarray) -> CopyArrays:
        """Views on a whole stream."""
        parts: dict[str, dict[Key, np.ndarray]] = {STATE: {}, VERDICT: {}}
        for leaf in self._leaves:
            raw = buffer[leaf.offset_bytes : leaf.offset_bytes + leaf.size_bytes]
            parts[leaf.part][leaf.key] = raw.view(dtype_of(leaf.dtype)).reshape(leaf.shape)
        return CopyArrays(state=parts[STATE], verdict=parts[VERDICT])


@dataclass(frozen=True, slots=True)
class Offer:
    """A copy's layout and what each of its pieces must be."""

    packing: Packing
    piece_bytes: int
    checksums: tuple[str, ...]

    @classmethod
    def of(cls, arrays: CopyArrays, piece_bytes: int) -> Offer:
        """Of arrays that are here. Slow: it reads all of them."""
        packing = Packing.of(arrays)
        pieces = (
            packing.piece(arrays, index, piece_bytes)
            for index in range(packing.pieces(piece_bytes))
        )
        return cls(packing, piece_bytes, tuple(checksum(piece.data) for piece in pieces))

    @classmethod
    def read(cls, plain: Any, limit_bytes: int) -> Offer:
        """What a frame brought.

        Raises:
            FrameError: It is none, or asks for more than `limit_bytes`.
        """
        if not isinstance(plain, Mapping) or set(plain) != {"leaves", "piece_bytes", "checksums"}:
            raise FrameError("an offer of a copy needs leaves, piece_bytes and checksums")
        piece_bytes, checksums = plain["piece_bytes"], plain["checksums"]
        if not isinstance(piece_bytes, int) or piece_bytes < 1:
            raise FrameError(f"an offer of pieces of {piece_bytes!r} bytes")
        packing = Packing.read(plain["leaves"], limit_bytes)
        count = packing.pieces(piece_bytes)
        if not isinstance(checksums, list) or count > MOST_PIECES or len(checksums) != count:
            raise FrameError(f"an offer of {count} pieces without as many checksums")
        if not all(isinstance(c, str) and len(c) == 2 * DIGEST_BYTES for c in checksums):
            raise FrameError(f"a checksum of an offer has not {2 * DIGEST_BYTES} digits")
        return cls(packing, piece_bytes, tuple(checksums))

    def to_plain(self) -> dict[str, Any]:
        """As a frame brings it."""
        return {
            "leaves": self.packing.to_plain(),
            "piece_bytes": self.piece_bytes,
            "checksums": list(self.checksums),
        }

    @property
    def manifest(self) -> Manifest:
        """Of the whole copy."""
        return Manifest(
            leaves=self.packing.leaves,
            size_bytes=self.packing.size_bytes,
            checksum=checksum("".join(self.checksums).encode()),
        )

    def span(self, index: int) -> tuple[int, int]:
        """(first byte, byte behind the last) of a piece."""
        return self.packing.span(index, self.piece_bytes)

    def fits(self, buffer: np.ndarray, indices: Iterable[int] | None = None) -> bool:
        """Whether these pieces of a whole stream are what was offered; None: all."""
        if buffer.size != self.packing.size_bytes:
            return False
        for index in range(len(self.checksums)) if indices is None else indices:
            start, stop = self.span(index)
            if checksum(buffer[start:stop].data) != self.checksums[index]:
                return False
        return True


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN_BYTES) * ALIGN_BYTES


def _bytes_of(value: Any) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(value)).reshape(-1).view(np.uint8)
