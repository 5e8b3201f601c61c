"""npz archives whose arrays must be as expected, and windows cut from recordings.

Nothing is unpickled. What an archive announces is checked before its values are read.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from ..errors import DataError, DataFileError
from .reading import existing_file

Expected = tuple[str | None, Sequence[int | str | None] | None]
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError)


def read_npz(
    path: str | Path, expected: Mapping[str, Expected], *, get: str = "check the path"
) -> dict[str, np.ndarray]:
    """Named arrays of an npz archive, each of the dtype and shape that the caller needs.

        arrays = read_npz(path, {"x": ("int16", ("rows", 6)), "y": ("uint8", ("rows",))})

    Args:
        expected: Name -> (dtype, shape). The dtype is a name ("float32") or a kind ("U": text), or
            None for any. The shape, or None for any, has a number, None for any length, or a word
            for each axis; the same word means the same length in all arrays.
        get: What a user without the file should do, for the message.

    Returns:
        The arrays asked for; others in the archive are not read.

    Raises:
        DataFileError: Missing, no npz archive, damaged, truncated, without one of the arrays, with
            Python objects in one, or with an array that is not as expected.
    """
    path = existing_file(path, get=get)
    lengths: dict[str, tuple[int, str]] = {}
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            for name, (dtype, shape) in expected.items():
                if name not in members:
                    raise DataFileError(
                        f"{path}: expected an array {name!r}, found {', '.join(sorted(members))}"
                    )
                info = archive.getinfo(members[name])
                with archive.open(info) as stream:
                    found_shape, found = _announced(stream)
                    _compare(f"{path}: array {name!r}", found_shape, found, shape, dtype, lengths)
                    size = math.prod(found_shape) * found.itemsize
                    if size > info.file_size:  # before numpy makes room for it
                        raise DataFileError(
                            f"{path}: array {name!r} announces {size} bytes, the archive holds"
                            f" {info.file_size}; the file is damaged, get it again"
                        )
                with archive.open(info) as stream:
                    arrays[name] = npy.read_array(stream, allow_pickle=False)
    except _DAMAGED as exc:
        if isinstance(exc, DataFileError):
            raise
        raise DataFileError(
            f"{path}: expected an npz archive, found one that is damaged, truncated or something"
            f" else ({exc}); get the file again"
        ) from exc
    return arrays


def _announced(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _compare(
    what: str,
    found_shape: tuple[int, ...],
    found: np.dtype[Any],
    shape: Sequence[int | str | None] | None,
    dtype: str | None,
    lengths: dict[str, tuple[int, str]],
) -> None:
    if found.hasobject:
        raise DataFileError(f"{what} holds Python objects, which are never unpickled; save numbers")
    if dtype is not None and dtype not in (found.name, found.kind):
        raise DataFileError(f"{what}: expected dtype {dtype}, found {found.name}")
    if shape is None:
        return
    told = f"({', '.join('any' if axis is None else str(axis) for axis in shape)})"
    fits = len(shape) == len(found_shape)
    for axis, length in zip(shape, found_shape, strict=False):
        if isinstance(axis, str):
            first, where = lengths.setdefault(axis, (length, what))
            if first != length:
                raise DataFileError(
                    f"{what}: expected shape {told} with {axis} = {first} as in {where}, found"
                    f" {found_shape}"
                )
        elif axis is not None and axis != length:
            fits = False
    if not fits:
        raise DataFileError(f"{what}: expected shape {told}, found {found_shape}")


def cut_windows(
    signal: np.ndarray, labels: np.ndarray, *, length: int, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """Windows of one recording, each with the label that most of its samples have.

    Args:
        signal: `(samples, channels)` of one recording; windows never reach over its end.
        labels: One class per sample, integers >= 0, `(samples,)`.
        length: Samples of a window.
        stride: Samples from one window's start to the next one's.

    Returns:
        Windows, `(windows, length, channels)`, a copy; labels, int32, `(windows,)`; the smaller
        label where two are equally frequent. No windows from a recording shorter than one.

    Raises:
        DataError: Another shape, lengths that differ, labels that are no classes, length or stride
            below 1.
    """
    signal, labels = np.asarray(signal), np.asarray(labels)
    if signal.ndim != 2 or labels.shape != signal.shape[:1]:
        raise DataError(
            f"cut_windows: expected signal (samples, channels) and labels (samples,), found"
            f" {signal.shape} and {labels.shape}"
        )
    if length < 1 or stride < 1:
        raise DataError(f"cut_windows: length and stride must be >= 1, got {length} and {stride}")
    if labels.dtype.kind not in "iu" or (labels.size and labels.min() < 0):
        raise DataError("cut_windows: labels must be integers >= 0, one class per sample")
    labels = labels.astype(np.int64)
    starts = range(0, len(signal) - length + 1, stride)
    windows = [signal[start : start + length] for start in starts]
    classes = [np.bincount(labels[start : start + length]).argmax() for start in starts]
    empty = np.empty((0, length, signal.shape[1]), signal.dtype)
    return (np.stack(windows) if windows else empty), np.array(classes, np.int32)
