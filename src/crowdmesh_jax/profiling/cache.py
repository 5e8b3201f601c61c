"""Measured layers and a machine's rates, kept on disk between calls; good for one machine only.

A folder holds one file of each. Layers go by the hash of their programs and the jaxlib version.
Times hold for the machine that took them: a file of another one, or a damaged file, is refused with
a typed error, which is logged before it starts afresh. Knows nothing of layers.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jaxlib.version

from ..errors import InvalidValueError, ProfileCacheError
from .roofline import Calibration

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
FILE_NAME = "layers.json"
CALIBRATION_NAME = "machine.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMeasure:
    """What a machine found of one layer, one microbatch."""

    forward_s: float
    backward_s: float
    temp_bytes: int
    ops: int
    """Instructions of its compiled programs."""


def machine_identity() -> dict[str, str]:
    """What must be equal for times to hold: processor, architecture, cores that may be used."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": _processor(), "architecture": platform.machine(), "cores": str(cores)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for field in ("model name", "Model", "Hardware", "CPU part"):
        for line in lines:
            if line.startswith(field):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.system()


class ProfileCache:
    """Measures of this machine. `get`, `put`, then `save`; nothing is written in between."""

    def __init__(self, path: Path, entries: Mapping[str, LayerMeasure] | None = None) -> None:
        self.path = path
        self._entries = dict(entries or {})
        self._new: dict[str, LayerMeasure] = {}
        self.hits = 0
        self.misses = 0

    @classmethod
    def load(cls, path: Path) -> ProfileCache:
        """Reads a cache file; an empty cache where there is none.

        Raises:
            ProfileCacheError: It is of another machine or format, damaged, or cannot be read.
        """
        plain = _read(path)
        return cls(path) if plain is None else cls(path, _entries(path, plain))

    def get(self, key: str) -> LayerMeasure | None:
        """The measure under that key, None if there is none."""
        found = self._entries.get(key)
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
        return found

    def put(self, key: str, measure: LayerMeasure) -> None:
        """Files a measure; the one before is forgotten."""
        self._entries[key] = self._new[key] = measure

    def save(self) -> None:
        """Writes the file, whole or not at all, if anything was put.

        What another process wrote meanwhile is kept. A folder that cannot be written is a warning:
        the next call measures again.
        """
        if not self._new:
            return
        try:
            others = ProfileCache.load(self.path)._entries
        except ProfileCacheError:
            others = {}
        entries = {**others, **self._entries}
        plain = {
            "format_version": FORMAT_VERSION,
            "machine": machine_identity(),
            "layers": {key: asdict(measure) for key, measure in sorted(entries.items())},
        }
        if _write(self.path, plain, "measured layers"):
            self._new.clear()


def open_cache(folder: Path | None) -> ProfileCache | None:
    """The folder's cache; one that is refused is reported and begun afresh. None for None."""
    if folder is None:
        return None
    path = Path(folder) / FILE_NAME
    try:
        return ProfileCache.load(path)
    except ProfileCacheError as exc:
        logger.warning("%s; measuring again", exc)
        return ProfileCache(path)


def load_calibration(folder: Path) -> Calibration | None:
    """The rates kept in a folder; None where there are none.

    Raises:
        ProfileCacheError: They are of another machine, jaxlib or format, or damaged.
    """
    path = folder / CALIBRATION_NAME
    plain = _read(path)
    if plain is None:
        return None
    if not isinstance(plain, dict):
        raise ProfileCacheError(f"{path}: damaged: no table of rates")
    _check_origin(path, plain, _process_identity())
    rates = plain.get("rates")
    names = sorted(field.name for field in fields(Calibration))
    if not isinstance(rates, dict) or sorted(rates) != names:
        raise ProfileCacheError(f"{path}: damaged: rates has not {', '.join(names)}")
    if not all(type(value) in (int, float) for value in rates.values()):
        raise ProfileCacheError(f"{path}: damaged: rates are no numbers: {rates}")
    try:
        return Calibration(**rates)
    except InvalidValueError as exc:
        raise ProfileCacheError(f"{path}: damaged: {exc.message}") from exc


def save_calibration(folder: Path, rates: Calibration) -> None:
    """Keeps a machine's rates; a folder that cannot be written is a warning."""
    plain = {
        "format_version": FORMAT_VERSION,
        "machine": _process_identity(),
        "rates": asdict(rates),
    }
    _write(folder / CALIBRATION_NAME, plain, "this machine's rates")


def _process_identity() -> dict[str, str]:
    """Rates also depend on the compiler and on how many threads it was allowed."""
    threads = os.environ.get("NPROC", "any")
    return {**machine_identity(), "jaxlib": jaxlib.version.__version__, "threads": threads}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise ProfileCacheError(f"{path}: cannot be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise ProfileCacheError(f"{path}: damaged: no JSON ({exc})") from exc


def _write(path: Path, plain: Any, what: str) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, delete=False
        ) as file:
            json.dump(plain, file, indent=1)
        os.replace(file.name, path)
    except OSError as exc:
        logger.warning("%s: %s could not be kept: %s", path, what, exc)
        return False
    return True


def _check_origin(path: Path, plain: dict[str, Any], ours: dict[str, str]) -> None:
    version = plain.get("format_version")
    if version != FORMAT_VERSION:
        raise ProfileCacheError(
            f"{path}: format version {version!r}, this release reads {FORMAT_VERSION}"
        )
    theirs = plain.get("machine")
    if theirs != ours:
        raise ProfileCacheError(
            f"{path}: its times were measured on another machine and do not hold here\n"
            f"  there    {_told(theirs)}\n"
            f"  here     {_told(ours)}"
        )


def _entries(path: Path, plain: Any) -> dict[str, LayerMeasure]:
    if not isinstance(plain, dict) or not isinstance(plain.get("layers"), dict):
        raise ProfileCacheError(f"{path}: damaged: no table of layers")
    _check_origin(path, plain, machine_identity())
    names = [field.name for field in fields(LayerMeasure)]
    entries = {}
    for key, item in plain["layers"].items():
        if not isinstance(item, dict) or sorted(item) != sorted(names):
            raise ProfileCacheError(f"{path}: damaged: layer {key:.16} has not {', '.join(names)}")
        for name, value in item.items():
            if type(value) not in (int, float) or not (math.isfinite(value) and value >= 0):
                raise ProfileCacheError(f"{path}: damaged: layer {key:.16}: {name} is {value!r}")
        entries[key] = LayerMeasure(**item)
    return entries


def _told(machine: Any) -> str:
    if not isinstance(machine, dict):
        return repr(machine)
    return ", ".join(f"{name} {value}" for name, value in machine.items())
