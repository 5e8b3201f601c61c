"""An append-only file of JSON lines that tells a crash from damage.

A line is the caller's fields between a number and a checksum:
`{"seq":3,"kind":"commit","step":7,"crc":"1f2e3d4c"}`. A crash can leave a last line without its
newline; that record was never promised, and it is cut off. Anything else that does not fit
(a wrong checksum, a gap) is damage, and nothing is read. Knows nothing of what records mean.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core import values
from ..errors import RecordError
from .files import read_bytes, record_errors, sync_folder, write_atomic

logger = logging.getLogger(__name__)

RESERVED = ("seq", "crc")
_TAIL = len(',"crc":"00000000"}')


@dataclass(frozen=True, slots=True)
class _Scan:
    records: list[dict[str, Any]]
    whole_bytes: int
    torn_bytes: int
    damage: str | None
    """What is wrong with the record after the last one."""


def encode_record(seq: int, record: Mapping[str, Any]) -> bytes:
    """One line, newline included.

    Raises:
        RecordError: A reserved field name, or a value that JSON cannot hold.
    """
    for name in RESERVED:
        if name in record:
            raise RecordError(f"journal record: field {name!r} is the journal's own")
    try:
        plain = values.to_plain({"seq": seq, **record})
        body = json.dumps(plain, separators=(",", ":"), allow_nan=False)[:-1].encode()
    except (TypeError, ValueError) as exc:
        raise RecordError(f"journal record {seq}: {exc}") from exc
    return body + b',"crc":"%08x"}\n' % zlib.crc32(body)


def _decode(line: bytes) -> dict[str, Any] | None:
    body, tail = line[:-_TAIL], line[-_TAIL:]
    if tail != b',"crc":"%08x"}' % zlib.crc32(body):
        return None
    try:
        record = json.loads(body + b"}")
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _scan(path: Path) -> _Scan:
    """Reads up to the first record that does not fit."""
    data = read_bytes(path)
    whole = data.rfind(b"\n") + 1
    records: list[dict[str, Any]] = []
    offset = 0
    for line in data[:whole].splitlines(keepends=True):
        record = _decode(line[:-1]) if line.endswith(b"\n") else None
        if record is None or record.get("seq") != len(records):
            damage = (
                f"{path}: record {len(records)} at byte {offset} is damaged;"
                f" restore the file, or keep what is sound: head -c {offset} {path.name}"
            )
            return _Scan(records, whole, len(data) - whole, damage)
        records.append(record)
        offset += len(line)
    return _Scan(records, whole, len(data) - whole, None)


def _sound(path: Path) -> _Scan:
    scan = _scan(path)
    if scan.damage is not None:
        raise RecordError(scan.damage)
    return scan


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """All records, in order, each with its `seq`; a torn last one is left out. Changes nothing.

    Raises:
        RecordError: Missing, unreadable or damaged; names the byte.
    """
    return _without_crc(_sound(Path(path)).records)


def read_sound_records(path: str | Path) -> tuple[list[dict[str, Any]], str | None]:
    """The records up to the first damaged one, and what is wrong with that one (None: nothing).

    For those who show what there is. Who goes on after it must not: see `read_journal`.

    Raises:
        RecordError: Missing or unreadable.
    """
    scan = _scan(Path(path))
    return _without_crc(scan.records), scan.damage


def _without_crc(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for record in records:
        record.pop("crc", None)
    return records


def journal_writer(path: str | Path) -> int | None:
    """The process that holds a journal for appending; None: nobody does, or it cannot be told.

    Only processes of this machine are seen. For a moment it takes a shared lock: do not ask about
    a journal that somebody is about to open.
    """
    path = Path(path)
    try:
        handle = os.open(path.with_name(f".{path.name}.lock"), os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 20, 0).decode(errors="replace").strip()
        return int(holder) if holder.isdecimal() else 0
    except OSError:
        return None
    finally:
        os.close(handle)
    return None


class Journal:
    """Appends records to a file that no other process appends to.

    Opening an existing journal reads it (`records`), cuts off a torn last record and goes on after
    it. `append` returns when the operating system has the line; with `durable=True`, or after
    `sync`, it survives a loss of power too.

    Raises:
        RecordError: Another process holds it (names the pid), or it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = self._file = -1
        try:
            self._lock = self._take_lock()
            with record_errors(self.path, "open"):
                existed = self.path.exists()
                flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
                self._file = os.open(self.path, flags, 0o644)
                if not existed:
                    sync_folder(self.path.parent)
            scan = _sound(self.path)
            if scan.torn_bytes:
                logger.warning("%s: cut off a torn record, %d bytes", self.path, scan.torn_bytes)
                with record_errors(self.path, "cut off a torn record"):
                    os.ftruncate(self._file, scan.whole_bytes)
                    os.fsync(self._file)
        except BaseException:
            self.close()
            raise
        self.records = tuple(scan.records)
        """What the file held when it was opened."""
        self._next = len(scan.records)
        self._size = scan.whole_bytes

    def append(self, record: Mapping[str, Any], *, durable: bool = False) -> int:
        """Writes one record after the last; returns its number.

        Raises:
            RecordError: The journal is closed, the disk is full, or the record is no JSON.
        """
        if self._file < 0:
            raise RecordError(f"{self.path}: the journal is closed")
        line = encode_record(self._next, record)
        with record_errors(self.path, "append"):
            try:
                written = os.write(self._file, line)
                if written != len(line):
                    raise OSError(f"{written} of {len(line)} bytes written; the disk may be full")
                if durable:
                    os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, self._size)  # no torn line under what comes next
                raise
        self._size += len(line)
        self._next += 1
        return self._next - 1

    def rewrite(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Replaces all records: a reader, and a restart after a crash, sees the old or the new.

        Their numbers and checksums are made anew.

        Raises:
            RecordError: It cannot be written, or a record is no JSON; the old records stand.
        """
        fields = [{k: v for k, v in record.items() if k not in RESERVED} for record in records]
        data = b"".join(encode_record(seq, record) for seq, record in enumerate(fields))
        write_atomic(self.path, data)
        with record_errors(self.path, "open"):
            old, self._file = self._file, os.open(self.path, os.O_RDWR | os.O_APPEND)
            os.close(old)
        self._size, self._next = len(data), len(fields)

    def sync(self) -> None:
        """Returns when all appended records would survive a loss of power."""
        if self._file >= 0:
            with record_errors(self.path, "sync"):
                os.fsync(self._file)

    def close(self) -> None:
        """Lets another process append. Idempotent."""
        for name in ("_file", "_lock"):
            handle = getattr(self, name)
            setattr(self, name, -1)
            if handle >= 0:
                os.close(handle)

    def __len__(self) -> int:
        return self._next

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All records as they stand in the file now."""
        return iter(read_journal(self.path))

    def _take_lock(self) -> int:
        # Beside the journal, so that the holder's pid can be written into it. It stays: removing a
        # lock file lets two processes hold locks on two files of one name.
        path = self.path.with_name(f".{self.path.name}.lock")
        with record_errors(path, "open"):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            holder = os.pread(handle, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise RecordError(
                f"{self.path}: process {holder} is writing it; wait for it or stop it first"
            ) from exc
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        return handle
