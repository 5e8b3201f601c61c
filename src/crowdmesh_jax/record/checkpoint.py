"""Checkpoints: arrays by (role, layer, path) in safetensors shards, and a manifest over them.

The manifest is written last and by rename, so a checkpoint is whole or it is the one before. A
load checks everything before it returns anything. Knows nothing of stages or optimizers: what the
arrays mean is in their roles (`programs/manifest.py`) and in `meta`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core import values
from ..errors import FormatError, RecordError
from .files import read_bytes, record_errors, write_atomic

logger = logging.getLogger(__name__)

Key = tuple[str, str, str]
"""(role, layer, path), as in a stage's manifest."""

FORMAT = "crowdmesh-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARD_BYTES = 256 * 2**20

NATIVE = {
    "bool": "BOOL", "int8": "I8", "uint8": "U8", "int16": "I16", "uint16": "U16", "float16": "F16",
    "bfloat16": "BF16", "int32": "I32", "uint32": "U32", "float32": "F32", "int64": "I64",
    "uint64": "U64", "float64": "F64",
}  # fmt: skip
"""Dtypes stored as themselves; others (complex64, float8) as bytes, named in the manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayEntry:
    """One array and where it is."""

    role: str
    layer: str
    path: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def key(self) -> Key:
        return self.role, self.layer, self.path

    @property
    def tensor_name(self) -> str:
        return f"{self.role}:{self.layer}:{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One shard."""

    name: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointManifest:
    """What `manifest.json` holds."""

    format: str
    format_version: int
    version: int
    files: tuple[FileEntry, ...]
    arrays: tuple[ArrayEntry, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was read whole and checked."""

    version: int
    """Committed steps that the arrays contain."""
    arrays: Mapping[Key, np.ndarray] = field(repr=False)
    meta: Mapping[str, Any]
    """What the writer added: "job_sha256", "step", "plan" and the like."""


def _dtype(name: str) -> np.dtype:
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        if not hasattr(ml_dtypes, name):
            raise RecordError(f"dtype {name!r} is unknown here") from None
        return np.dtype(getattr(ml_dtypes, name))


def _shards(arrays: Mapping[Key, np.ndarray], limit: int) -> Iterator[list[tuple[Key, np.ndarray]]]:
    shard: list[tuple[Key, np.ndarray]] = []
    size = 0
    for key in sorted(arrays):
        array = np.asarray(arrays[key])
        if shard and size + array.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append((key, array))
        size += array.nbytes
    if shard:
        yield shard


def _storable(key: Key, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind in "OSUMm" or array.dtype.names:
        raise RecordError(
            f"checkpoint: {':'.join(key)} has dtype {array.dtype}, which holds no numbers"
        )
    array = np.ascontiguousarray(array).reshape(array.shape)  # it would make scalars 1-d
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.name in NATIVE:
        return array
    return array.reshape(-1).view(np.uint8)


def save_checkpoint(
    folder: str | Path,
    version: int,
    arrays: Mapping[Key, np.ndarray],
    meta: Mapping[str, Any] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a checkpoint beside the last one, then makes it the current one.

    Args:
        folder: Made if it is not there. Holds one checkpoint; the one before goes once the new one
            is durable.
        version: Committed steps that the arrays contain.
        meta: JSON-able; "job_sha256" is compared on load.
        shard_bytes: A file holds at least one array and at most about this many bytes.

    Returns:
        The manifest's path.

    Raises:
        RecordError: It cannot be written, or an array holds no numbers; the last one stands.
    """
    from safetensors import numpy as safetensors_numpy

    folder = Path(folder)
    if version < 0:
        raise RecordError(f"checkpoint: version must be >= 0, got {version}")
    for key in arrays:
        if len(key) != 3 or not all(isinstance(k, str) for k in key) or ":" in key[0] + key[1]:
            raise RecordError(f"checkpoint: key must be (role, layer, path), got {key!r}")
    with record_errors(folder, "make"):
        folder.mkdir(parents=True, exist_ok=True)
    files, entries = [], []
    for index, shard in enumerate(_shards(arrays, shard_bytes)):
        tensors = {}
        for key, array in shard:
            entry = ArrayEntry(
                role=key[0], layer=key[1], path=key[2], dtype=array.dtype.name,
                shape=array.shape, file="",
            )  # fmt: skip
            tensors[entry.tensor_name] = _storable(key, array)
            entries.append(entry)
        data = safetensors_numpy.save(tensors)
        digest = hashlib.sha256(data).hexdigest()
        # The digest in the name: saving a version again never writes over what a manifest names.
        name = f"v{version:08d}-{index:04d}-{digest[:8]}.safetensors"
        entries[-len(shard) :] = [
            ArrayEntry(**{**values.to_plain(e), "shape": e.shape, "file": name})
            for e in entries[-len(shard) :]
        ]
        write_atomic(folder / name, data)
        files.append(FileEntry(name=name, sha256=digest, size_bytes=len(data)))
    manifest = CheckpointManifest(
        format=FORMAT, format_version=FORMAT_VERSION, version=version,
        files=tuple(files), arrays=tuple(entries), meta=dict(meta or {}),
    )  # fmt: skip
    try:
        text = values.to_json(manifest, indent=1)
    except (TypeError, ValueError) as exc:
        raise RecordError(f"checkpoint: meta is not JSON-able: {exc}") from exc
    write_atomic(folder / MANIFEST, text.encode())
    kept = {entry.name for entry in files}
    for old in folder.glob("v*.safetensors"):
        if old.name not in kept:
            with contextlib.suppress(FileNotFoundError):
                old.unlink()
    logger.info("checkpoint of version %d: %d arrays in %s", version, len(entries), folder)
    return folder / MANIFEST


def read_manifest(folder: str | Path) -> CheckpointManifest:
    """The manifest alone, checked for format and version.

    Raises:
        RecordError: There is no checkpoint, it is damaged, or a newer release wrote it.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise RecordError(f"{folder}: no checkpoint here ({MANIFEST} is missing)")
    try:
        plain = json.loads(read_bytes(path))
        told, number = plain["format"], plain["format_version"]
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise RecordError(f"{path}: damaged: not a checkpoint manifest") from exc
    if told != FORMAT or not isinstance(number, int) or number < 1:
        raise RecordError(f"{path}: not a checkpoint manifest (format {told!r}, {number!r})")
    if number > FORMAT_VERSION:
        raise RecordError(
            f"{path}: format version {number} is newer than {FORMAT_VERSION}, the newest that this"
            " release reads; upgrade crowdmesh-jax"
        )
    try:
        return values.from_plain(CheckpointManifest, plain, str(path))
    except FormatError as exc:
        raise RecordError(f"damaged: {exc.message}") from exc


def load_checkpoint(folder: str | Path, *, job_sha256: str | None = None) -> Checkpoint:
    """Reads and checks a whole checkpoint; returns all of it or raises.

    Args:
        job_sha256: Refuse a checkpoint of another job.

    Raises:
        RecordError: Missing, damaged (names the file), of a newer format, or of another job.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    theirs = manifest.meta.get("job_sha256")
    if job_sha256 is not None and theirs != job_sha256:
        raise RecordError(
            f"{folder}: checkpoint of another job ({str(theirs)[:12]}, expected {job_sha256[:12]});"
            " model, loss, optimizer, batch and seed must be the same"
        )
    tensors: dict[tuple[str, str], np.ndarray] = {}
    for file in manifest.files:
        for name, array in _read_shard(folder, file):
            tensors[file.name, name] = array
    arrays: dict[Key, np.ndarray] = {}
    for entry in manifest.arrays:
        where = f"{folder / entry.file}: {entry.tensor_name}"
        stored = tensors.pop((entry.file, entry.tensor_name), None)
        if stored is None or entry.key in arrays:
            raise RecordError(
                f"{where}: damaged: {'missing' if stored is None else 'listed twice'}"
            )
        arrays[entry.key] = _restore(stored, entry, where)
    if tensors:
        file, name = next(iter(tensors))
        raise RecordError(f"{folder / file}: damaged: {name} is not in the manifest")
    return Checkpoint(version=manifest.version, arrays=arrays, meta=manifest.meta)


def _read_shard(folder: Path, file: FileEntry) -> Iterator[tuple[str, np.ndarray]]:
    import safetensors

    path = folder / file.name
    if Path(file.name).name != file.name:
        raise RecordError(f"{folder / MANIFEST}: damaged: {file.name!r} is no file name")
    data = read_bytes(path)
    if len(data) != file.size_bytes or hashlib.sha256(data).hexdigest() != file.sha256:
        raise RecordError(
            f"{path}: damaged: {len(data)} bytes whose checksum is not the manifest's"
            f" ({file.size_bytes} bytes expected)"
        )
    spelled = {code: name for name, code in NATIVE.items()}
    try:
        for name, tensor in safetensors.deserialize(data):
            dtype = _dtype(spelled[tensor["dtype"]])
            yield name, np.frombuffer(tensor["data"], dtype=dtype).reshape(tensor["shape"])
    except (safetensors.SafetensorError, KeyError, ValueError) as exc:
        raise RecordError(f"{path}: damaged: {exc}") from exc


def _restore(stored: np.ndarray, entry: ArrayEntry, where: str) -> np.ndarray:
    dtype = _dtype(entry.dtype)
    try:
        array = stored if entry.dtype in NATIVE else stored.view(dtype).reshape(entry.shape)
    except (ValueError, TypeError) as exc:
        raise RecordError(f"{where}: damaged: {exc}") from exc
    if array.dtype != dtype or array.shape != tuple(entry.shape):
        raise RecordError(
            f"{where}: damaged: {array.dtype} {array.shape},"
            f" the manifest says {entry.dtype} {entry.shape}"
        )
    return array
