"""Trace files as streams of bytes with a bound, unpacked where they are gzip's.

A small file may unpack to any size, and a header may announce any number: what is read is counted,
and reading stops at the bound.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import DataFileError

MAX_BYTES = 1 << 31
"""Of a trace, unpacked."""
MAX_ROWS = 10_000_000
MAX_LINE_BYTES = 1 << 16
GZIP_MAGIC = b"\x1f\x8b"


@contextmanager
def opened(path: Path, most_bytes: int) -> Iterator[Bounded]:
    """The file's bytes, unpacked; whatever goes wrong in the block is told by the file's name.

    Raises:
        DataFileError: Missing, unreadable, damaged, truncated, or larger than `most_bytes`.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise DataFileError(f"{path}: expected a trace file, found {found}; check the path")
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == GZIP_MAGIC
            raw.seek(0)
            with gzip.GzipFile(fileobj=raw) if packed else raw as stream:
                yield Bounded(stream, path, most_bytes)  # pyright: ignore[reportArgumentType]
    except EOFError as exc:
        raise DataFileError(
            f"{path}: truncated: its gzip stream has no end; get the file again"
        ) from exc
    except (gzip.BadGzipFile, zlib.error) as exc:
        raise DataFileError(f"{path}: damaged gzip stream ({exc}); get the file again") from exc
    except OSError as exc:
        raise DataFileError(f"{path}: cannot be read: {exc.strerror or exc}") from exc


class Bounded(io.RawIOBase):
    """Reads on until the bound, then refuses."""

    def __init__(self, stream: BinaryIO, path: Path, most_bytes: int) -> None:
        self._stream, self._path, self._left = stream, path, most_bytes
        self._most = most_bytes

    def read(self, size: int = 1 << 16) -> bytes:  # pyright: ignore[reportIncompatibleMethodOverride]
        """At most `size` bytes; `b""` at the end."""
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise DataFileError(
                f"{self._path}: larger than {self._most} bytes unpacked; cut it, or raise max_bytes"
            )
        return data

    def lines(self) -> Iterator[str]:
        """Lines of text without their ends; a line has a bound, too."""
        rest = b""
        while chunk := self.read():
            *whole, rest = (rest + chunk).split(b"\n")
            if len(rest) > MAX_LINE_BYTES:
                raise DataFileError(
                    f"{self._path}: a line of more than {MAX_LINE_BYTES} bytes; this is no csv"
                )
            for line in whole:
                yield self._text(line)
        if rest:
            yield self._text(rest)

    def _text(self, line: bytes) -> str:
        try:
            return line.decode("utf-8").rstrip("\r")
        except UnicodeDecodeError as exc:
            raise DataFileError(f"{self._path}: not text in UTF-8: {exc}") from exc


def rows_of(
    stream: Bounded, path: Path, wanted: Sequence[str], max_rows: int
) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and the wanted columns of a csv file with a header.

    Raises:
        DataFileError: A column is missing, a row is short, there are too many.
    """
    lines = stream.lines()
    header = [name.strip() for name in next(csv.reader(lines), [])]
    if header:
        header[0] = header[0].removeprefix("﻿")
    missing = [name for name in wanted if name not in header]
    if missing:
        raise DataFileError(
            f"{path}: no column {missing[0]!r}; its first line names"
            f" {', '.join(map(repr, header[:20])) or 'none'}, needed are {', '.join(wanted)}"
        )
    twice = [name for name in wanted if header.count(name) > 1]
    if twice:
        raise DataFileError(f"{path}: column {twice[0]!r} stands twice")
    places = [header.index(name) for name in wanted]
    last = max(places)
    count = 0
    for number, cells in enumerate(csv.reader(lines), start=2):
        if not cells:
            continue
        if len(cells) <= last:
            raise DataFileError(
                f"{path}, line {number}: {len(cells)} columns where the first line names"
                f" {len(header)}; the file may be cut off"
            )
        count += 1
        if count > max_rows:
            raise DataFileError(f"{path}: more than {max_rows} rows; cut it, or raise max_rows")
        yield number, [cells[place] for place in places]


def decimal(path: Path, place: str, name: str, text: str | None) -> float:
    """A finite number out of a file.

    Raises:
        DataFileError: It is none.
    """
    try:
        value = float(text) if text is not None else float("nan")
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise DataFileError(f"{path}, {place}: {name} must be a finite number, got {text!r}")
    return value
