"""Files that are either the old one or the new one, whatever happens in between.

Knows bytes and paths; nothing of what they mean. Failures of the file system become RecordError.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import RecordError


@contextlib.contextmanager
def record_errors(path: Path, doing: str) -> Iterator[None]:
    """Turns the operating system's errors into ours, at this one place."""
    try:
        yield
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise RecordError(f"{path}: cannot {doing}: {reason}; check space and permissions") from exc


def sync_folder(path: Path) -> None:
    """Makes names in a folder durable: a rename is lost with the power until this is done."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Writes a file so that readers, and a restart after a crash, see all of it or the old one.

    Raises:
        RecordError: The folder is missing, full or not writable; the old file stands.
    """
    with record_errors(path, "write"):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fchmod(stream.fileno(), 0o644)
                os.fsync(stream.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
        sync_folder(path.parent)


def read_bytes(path: Path) -> bytes:
    """The whole file.

    Raises:
        RecordError: It is missing or unreadable.
    """
    with record_errors(path, "read"):
        return path.read_bytes()
