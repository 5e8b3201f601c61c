"""Opening a user's data file, so that whatever is wrong with it is told by the file's name.

Knows paths and gzip; knows no format.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path

from ..errors import DataFileError

GZIP_MAGIC = b"\x1f\x8b"
CHUNK_BYTES = 1 << 22


def existing_file(path: str | Path, *, get: str = "check the path") -> Path:
    """The path, proved to be a readable file.

    Args:
        get: What a user without the file should do.

    Raises:
        DataFileError: Nothing is there, or something that is no file.
    """
    path = Path(path)
    try:
        if path.is_file():
            return path
        found = "a folder" if path.is_dir() else "nothing"
    except OSError as exc:
        found = exc.strerror or str(exc)
    raise DataFileError(f"{path}: expected a data file, found {found}; {get}")


def read_start(path: Path, most_bytes: int | None = None) -> bytes:
    """The first bytes of a file, unpacked where it is gzip's; all of them for None.

    Raises:
        DataFileError: It cannot be read, or the gzip stream is damaged or cut off.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == GZIP_MAGIC
            raw.seek(0)
            with gzip.GzipFile(fileobj=raw) if packed else raw as stream:
                return _read(stream, most_bytes)
    except EOFError as exc:
        raise DataFileError(
            f"{path}: truncated: its gzip stream has no end; get the file again"
        ) from exc
    except (gzip.BadGzipFile, zlib.error) as exc:
        raise DataFileError(f"{path}: damaged gzip stream ({exc}); get the file again") from exc
    except OSError as exc:
        raise DataFileError(f"{path}: cannot be read: {exc.strerror or exc}") from exc


def _read(stream: io.BufferedIOBase, most_bytes: int | None) -> bytes:
    """In chunks: `read(n)` makes room for n bytes, and a header may announce any number."""
    if most_bytes is None:
        return stream.read()
    data = bytearray()
    while chunk := stream.read(min(CHUNK_BYTES, most_bytes - len(data))):
        data += chunk
    return bytes(data)
