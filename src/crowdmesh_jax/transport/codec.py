"""Frames to bytes and back.

    0   magic "CMFR"            4 bytes
    4   version                 u16 little endian
    6   zero                    u16
    8   header length           u64, bytes of JSON
    16  frame length            u64, bytes of everything, prefix and padding included
    24  header                  {"message": {...}, "leaves": [[dtype, shape, offset, nbytes], ...]}
    ..  leaves                  little endian, C order, each at the next multiple of 64

Every size is checked against `FrameBounds` before memory is allocated, and the layout must be the
one that `encode` makes: no gap, no overlap, no leaf out of range. Only plain numbers travel (the
list in `dtype_of`); nothing is pickled. The arrays of a received frame start at multiples of 64
bytes, so jax adopts them without a copy. It knows nothing about lanes, peers or the meaning of
messages.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import FrameError
from .api import Frame, FrameBounds

MAGIC = b"CMFR"
VERSION = 1
ALIGNMENT = 64
"""Bytes; what XLA's CPU client needs to adopt a buffer."""
OWN_MEMORY_BYTES = 2**20
"""A received array of this size is allocated apart from its frame's others."""
PREFIX = struct.Struct("<4sHHQQ")
MAX_DEPTH = 32
"""Nesting of a message: deeper ones are a mistake or an attack."""
MAX_DIMS = 32

_NUMPY_DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
_ML_DTYPES = (
    *("bfloat16", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
    *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
DTYPES = (*_NUMPY_DTYPES, *_ML_DTYPES)
"""Names of the dtypes that travel."""

Buffer = bytes | bytearray | memoryview
_INT_LIMIT = 2**64


@functools.cache
def dtype_of(name: str) -> np.dtype:
    """The dtype of an allowed name.

    Raises:
        FrameError: The name is not in `DTYPES` (object, string and void types never are).
    """
    if name in _NUMPY_DTYPES:
        return np.dtype(name)
    if name in _ML_DTYPES:
        import ml_dtypes  # comes with jax; frames of plain numpy do not need it

        return np.dtype(getattr(ml_dtypes, name))
    raise FrameError(f"dtype {name[:80]!r} does not travel; allowed: {', '.join(DTYPES)}")


@functools.cache
def _wire_dtype(dtype: np.dtype) -> np.dtype:
    """The little-endian dtype that stands for this one on the wire."""
    return dtype_of(dtype.name)


@functools.cache
def _wire_name(dtype: np.dtype) -> str:
    return dtype.name  # numpy takes microseconds to find it


def aligned_empty(size_bytes: int, *, alignment: int = ALIGNMENT) -> np.ndarray:
    """Uninitialised uint8 of shape `(size_bytes,)`, starting at a multiple of `alignment`."""
    raw = np.empty(size_bytes + alignment, dtype=np.uint8)
    start = -raw.__array_interface__["data"][0] % alignment
    return raw[start : start + size_bytes]


@dataclass(frozen=True, slots=True)
class Leaf:
    """Where one array lies: `offset` and `size_bytes` count from the frame's first byte."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A frame's first bytes, understood: all but the arrays' contents."""

    message: dict[str, Any]
    leaves: tuple[Leaf, ...]
    size_bytes: int

    @property
    def cuts(self) -> tuple[int, ...]:
        """Where the frame's memory may be divided: around each large leaf, at aligned offsets.

        A receiver that keeps one array of a large frame then keeps only that array's memory.
        """
        cuts = {0, self.size_bytes}
        for leaf in self.leaves:
            if leaf.size_bytes >= OWN_MEMORY_BYTES:
                end = min(_aligned(leaf.offset + leaf.size_bytes), self.size_bytes)
                cuts |= {leaf.offset, end}
        return tuple(sorted(cuts))

    def frame(self, buffer: Buffer | np.ndarray) -> Frame:
        """The frame in `buffer`: read-only views, nothing copied.

        Raises:
            FrameError: The buffer has another length than the layout, or a bool is neither 0 nor 1.
        """
        flat = np.frombuffer(buffer, dtype=np.uint8)
        if flat.size != self.size_bytes:
            raise FrameError(f"frame of {self.size_bytes} bytes arrived as {flat.size}")
        return self.frame_of((0, self.size_bytes), (flat,))

    def frame_of(self, cuts: Sequence[int], pieces: Sequence[np.ndarray]) -> Frame:
        """The frame whose bytes from `cuts[i]` to `cuts[i + 1]` are `pieces[i]` (uint8).

        Raises:
            FrameError: A bool is neither 0 nor 1.
        """
        arrays = []
        for index, leaf in enumerate(self.leaves):
            piece = bisect.bisect_right(cuts, leaf.offset, hi=len(pieces)) - 1
            start = leaf.offset - cuts[piece]
            raw = pieces[piece][start : start + leaf.size_bytes]
            # numpy and XLA take a bool's byte to be 0 or 1; any other value makes them disagree
            if leaf.dtype.kind == "b" and raw.size and raw.max() > 1:
                raise FrameError(f"leaf {index}: a bool must be 0 or 1, got {int(raw.max())}")
            array = raw.view(leaf.dtype).reshape(leaf.shape)
            array.flags.writeable = False
            arrays.append(array)
        return Frame(self.message, tuple(arrays))


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A frame whose header is made and whose arrays are not fetched yet."""

    head: bytes
    """Prefix, header and padding: the first leaf follows."""
    arrays: tuple[Any, ...]
    leaves: tuple[Leaf, ...]
    size_bytes: int

    def parts(self, fetched: Sequence[np.ndarray] | None = None) -> list[Buffer]:
        """The frame's bytes as a list of buffers; C-ordered numpy arrays are not copied.

        Args:
            fetched: The arrays as numpy; without them it blocks until jax arrays are computed.
        """
        parts: list[Buffer] = [self.head]
        at = len(self.head)
        arrays = self.arrays if fetched is None else fetched
        for leaf, array in zip(self.leaves, arrays, strict=True):
            if leaf.offset > at:
                parts.append(bytes(leaf.offset - at))
            if leaf.size_bytes:
                parts.append(_raw(array, leaf))
            at = leaf.offset + leaf.size_bytes
        return parts


def prepare(frame: Frame) -> Outgoing:
    """Makes a frame's header from shapes and dtypes alone, without waiting for the arrays.

    Raises:
        FrameError: The message is not JSON-able, or an array's dtype does not travel.
    """
    arrays = tuple(a if hasattr(a, "dtype") else np.asarray(a) for a in frame.arrays)
    # A leaf's offset depends on the header's length and is written in the header: offsets are told
    # from the end of the header's padding, which only `size` then moves.
    described, relative, at = [], [], 0
    for index, array in enumerate(arrays):
        try:
            dtype = _wire_dtype(np.dtype(array.dtype))
        except (TypeError, FrameError) as exc:
            raise FrameError(
                f"array {index} has dtype {array.dtype}, which does not travel;"
                f" allowed: {', '.join(DTYPES)}"
            ) from exc
        shape = array.shape
        if len(shape) > MAX_DIMS:
            raise FrameError(f"array {index} has {len(shape)} dimensions; at most {MAX_DIMS}")
        size_bytes = math.prod(shape) * dtype.itemsize
        at = _aligned(at)
        described.append([_wire_name(dtype), shape, at, size_bytes])
        relative.append((dtype, shape, at, size_bytes))
        at += size_bytes
    message = plain_message(frame.message)
    header = _ENCODER.encode({"message": message, "leaves": described}).encode("ascii")
    start = _aligned(PREFIX.size + len(header))
    leaves = tuple(Leaf(dtype, shape, start + o, n) for dtype, shape, o, n in relative)
    size_bytes = start + at
    prefix = PREFIX.pack(MAGIC, VERSION, 0, len(header), size_bytes)
    head = (prefix + header).ljust(start, b"\0")
    return Outgoing(head, arrays, leaves, size_bytes)


def encode(frame: Frame) -> list[Buffer]:
    """A frame as a list of buffers, in order; arrays in C order are views, not copies.

    Raises:
        FrameError: As in `prepare`.
    """
    return prepare(frame).parts()


def encode_bytes(frame: Frame) -> bytes:
    """A frame as one bytes object (one copy)."""
    return b"".join(encode(frame))


def encoded_size(frame: Frame) -> int:
    """Bytes that a frame takes on a wire; its arrays are not fetched."""
    return prepare(frame).size_bytes


def chunks(parts: Sequence[Buffer], chunk_bytes: int) -> Iterator[bytes]:
    """Joins buffers into pieces of `chunk_bytes` (the last may be shorter); one copy in all."""
    piece: list[Buffer] = []
    room = chunk_bytes
    for part in parts:
        view = memoryview(part)
        while len(view) >= room:
            piece.append(view[:room])
            yield b"".join(piece)
            view = view[room:]
            piece, room = [], chunk_bytes
        if len(view):
            piece.append(view)
            room -= len(view)
    if piece:
        yield b"".join(piece)


def decode(buffer: Buffer | np.ndarray, bounds: FrameBounds | None = None) -> Frame:
    """Reads a frame; its arrays are read-only views of `buffer`.

    They start at multiples of 64 bytes if the buffer does (`aligned_empty`).

    Raises:
        FrameError: The bytes are not exactly one frame, or break a bound.
    """
    view = (buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)).cast("B")
    layout = read_layout(view, bounds or FrameBounds())
    if layout is None:
        raise FrameError(f"a frame's header is cut off after {len(view)} bytes")
    return layout.frame(view)


def read_layout(start: Buffer, bounds: FrameBounds) -> Layout | None:
    """Understands a frame from its first bytes; None while the header is not complete.

    Raises:
        FrameError: Not a frame, or it breaks a bound. No leaf's memory is allocated.
    """
    if len(start) < PREFIX.size:
        return None
    magic, version, zero, header_bytes, size_bytes = PREFIX.unpack_from(start)
    if magic != MAGIC:
        raise FrameError(f"not a frame: starts with {bytes(magic)!r}, not {MAGIC!r}")
    if version != VERSION or zero != 0:
        raise FrameError(
            f"frame version {version}.{zero}, this side speaks {VERSION}.0: use one release"
        )
    _bound("header", header_bytes, bounds.header_bytes, "bytes")
    _bound("frame", size_bytes, bounds.frame_bytes, "bytes")
    end = PREFIX.size + header_bytes
    if size_bytes < _aligned(end):
        raise FrameError(f"frame of {size_bytes} bytes is shorter than its header of {end}")
    if len(start) < end:
        return None
    message, described = _parse_header(bytes(start[PREFIX.size : end]), bounds)
    leaves = _read_leaves(described, _aligned(end), size_bytes, bounds)
    return Layout(message, leaves, size_bytes)


class FrameAssembler:
    """Puts one lane's chunks together: each frame straight into aligned memory.

    A large leaf has memory of its own, so that it can be let go before the others. Allocates only
    what a checked header asks for, plus at most one header.
    """

    def __init__(self, bounds: FrameBounds | None = None) -> None:
        self._bounds = bounds or FrameBounds()
        self._head = bytearray()
        self._layout: Layout | None = None
        self._cuts: tuple[int, ...] = ()
        self._pieces: list[np.ndarray] = []
        self._filled = 0

    @property
    def is_between_frames(self) -> bool:
        """Whether no frame is half received."""
        return self._layout is None and not self._head

    def feed(self, chunk: bytes) -> tuple[Frame, int] | None:
        """Takes the next chunk; returns the frame that it completes and the frame's bytes.

        A chunk belongs to one frame: the next frame starts with a chunk of its own.

        Raises:
            FrameError: The frame breaks the format or a bound. The assembler is of no more use.
        """
        if self._layout is None:
            whole: bytes | bytearray = chunk
            if self._head:
                self._head += chunk
                whole = self._head
            layout = read_layout(whole, self._bounds)
            if layout is None:
                if whole is chunk:
                    self._head += chunk
                return None
            if len(whole) > layout.size_bytes:
                raise FrameError(f"frame of {layout.size_bytes} bytes arrived as {len(whole)}")
            self._layout = layout
            self._cuts = layout.cuts
            self._pieces = [aligned_empty(b - a) for a, b in itertools.pairwise(self._cuts)]
            self._filled = 0
            self._head = bytearray()
            return self._append(layout, whole)
        return self._append(self._layout, chunk)

    def _append(self, layout: Layout, chunk: Buffer) -> tuple[Frame, int] | None:
        end = self._filled + len(chunk)
        if end > layout.size_bytes:
            raise FrameError(f"frame of {layout.size_bytes} bytes arrived as {end} or more")
        view = memoryview(chunk)
        while len(view):
            piece = bisect.bisect_right(self._cuts, self._filled) - 1
            start = self._filled - self._cuts[piece]
            part = view[: self._cuts[piece + 1] - self._filled]
            self._pieces[piece].data[start : start + len(part)] = part
            self._filled += len(part)
            view = view[len(part) :]
        if end < layout.size_bytes:
            return None
        pieces, self._pieces, self._layout = self._pieces, [], None
        return layout.frame_of(self._cuts, pieces), layout.size_bytes


def plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as its receiver sees it: dicts with string keys, lists, strings, finite numbers.

    Raises:
        FrameError: Something in it has no such form; says where.
    """
    if not isinstance(message, Mapping):
        raise FrameError(f"a message must be an object, got {type(message).__name__}")
    try:
        return _plain(message, 0)
    except _NotPlainError as exc:
        where = "".join(f"[{key!r:.40}]" for key in reversed(exc.path[-5:]))
        raise FrameError(f"message{where}: {exc}") from None


class _NotPlainError(Exception):
    """What is wrong; the keys on the way to it are collected while it rises."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.path: list[object] = []


def _plain(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind is str and value.isascii():  # the two usual cases first: this runs for every frame
        return value
    if kind is int and -_INT_LIMIT < value < _INT_LIMIT:
        return value
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise _NotPlainError("text with half a surrogate pair") from None
        return str(value)
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        if not -_INT_LIMIT < value < _INT_LIMIT:
            raise _NotPlainError("an integer beyond 64 bits")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _NotPlainError(f"{value} is not a finite number")
        return float(value)
    if depth >= MAX_DEPTH:
        raise _NotPlainError(f"nested deeper than {MAX_DEPTH}")
    key: object = None
    try:
        if isinstance(value, (list, tuple)):
            plain_items = []
            for key, item in enumerate(value):  # noqa: B007  told below
                plain_items.append(_plain(item, depth + 1))
            return plain_items
        if isinstance(value, Mapping):
            plain = {}
            for key, item in value.items():
                if not isinstance(key, str):
                    raise _NotPlainError(f"keys must be strings, got {key!r:.80}")
                plain[key if type(key) is str and key.isascii() else _plain(key, depth)] = _plain(
                    item, depth + 1
                )
            return plain
    except _NotPlainError as exc:
        exc.path.append(key)
        raise
    raise _NotPlainError(f"{type(value).__name__} is not JSON-able; send arrays as arrays")


def _raw(array: Any, leaf: Leaf) -> memoryview:
    data = np.asarray(array)
    if data.dtype != leaf.dtype:
        data = data.astype(leaf.dtype)  # big endian
    if data.shape != leaf.shape or not data.flags.c_contiguous:
        data = np.ascontiguousarray(data).reshape(leaf.shape)
    return data.reshape(-1).view(np.uint8).data


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _bound(what: str, value: int, most: int, unit: str) -> None:
    if value > most:
        raise FrameError(f"{what} of {value} {unit} is over the bound of {most}: FrameBounds")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise FrameError("an object of the header has the same key twice")
    return table


def _no_constant(name: str) -> Any:
    raise FrameError(f"{name} is not a finite number")


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _parse_header(raw: bytes, bounds: FrameBounds) -> tuple[dict[str, Any], list[Any]]:
    try:
        header = _DECODER.decode(raw.decode("ascii"))
    except RecursionError:
        raise FrameError("the header is nested too deeply") from None
    except ValueError as exc:  # also UnicodeDecodeError and integers of thousands of digits
        raise FrameError(f"the header is not JSON: {exc}") from None
    if not isinstance(header, dict) or header.keys() != {"message", "leaves"}:
        raise FrameError("a header must have exactly the fields 'message' and 'leaves'")
    described = header["leaves"]
    if not isinstance(described, list):
        raise FrameError(f"leaves must be a list, got {type(described).__name__}")
    _bound("frame", len(described), bounds.leaves, "leaves")
    return plain_message(header["message"]), described


def _read_leaves(
    described: list[Any], start: int, size_bytes: int, bounds: FrameBounds
) -> tuple[Leaf, ...]:
    leaves = []
    at = 0
    for index, item in enumerate(described):
        leaf = _read_leaf(index, item, bounds)
        if leaf.offset != _aligned(at):
            raise FrameError(f"leaf {index} is at {leaf.offset}, expected {_aligned(at)}")
        at = leaf.offset + leaf.size_bytes
        leaves.append(Leaf(leaf.dtype, leaf.shape, start + leaf.offset, leaf.size_bytes))
    if start + at != size_bytes:
        raise FrameError(f"frame of {size_bytes} bytes, but its leaves end at {start + at}")
    return tuple(leaves)


def _read_leaf(index: int, item: Any, bounds: FrameBounds) -> Leaf:
    if not isinstance(item, list) or len(item) != 4:
        raise FrameError(f"leaf {index}: expected [dtype, shape, offset, nbytes]")
    name, shape, offset, size_bytes = item
    if not isinstance(name, str):
        raise FrameError(f"leaf {index}: the dtype must be a string")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS:
        raise FrameError(f"leaf {index}: the shape must be a list of at most {MAX_DIMS}")
    for number in (*shape, offset, size_bytes):
        if type(number) is not int or not 0 <= number < _INT_LIMIT:  # bool is an int too
            raise FrameError(f"leaf {index}: sizes must be integers from 0, got {number!r:.80}")
    dtype = dtype_of(name)
    # An empty array may still have dimensions that numpy cannot multiply.
    span = math.prod(n for n in shape if n) * dtype.itemsize
    if span > bounds.leaf_bytes:
        raise FrameError(
            f"leaf {index}: shape {shape!r:.80} of {name} is over the bound of"
            f" {bounds.leaf_bytes} bytes: FrameBounds"
        )
    expected = 0 if 0 in shape else span
    if size_bytes != expected:
        raise FrameError(
            f"leaf {index}: {name}{shape!r:.80} takes {expected} bytes, the header says"
            f" {size_bytes}"
        )
    return Leaf(dtype, tuple(shape), offset, size_bytes)
