"""A bundle as one JSON text and byte arrays, to be sent in frames or kept in a file, and back.

Knows sizes and digests; nothing of programs' contents. What comes in is not trusted: every size
is bounded before memory is taken for it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..core import values
from ..errors import BundleError, FormatError
from .bundle import StageBundle
from .checks import check_bytes, check_manifest, check_sizes
from .manifest import StageManifest

MAX_MANIFEST_BYTES = 16 * 2**20
_LEVEL = 6


def bundle_to_arrays(bundle: StageBundle) -> tuple[str, dict[str, np.ndarray]]:
    """The manifest as JSON, and per program its zlib-compressed bytes as a uint8 array."""
    arrays = {
        name: np.frombuffer(zlib.compress(data, _LEVEL), np.uint8)
        for name, data in bundle.programs.items()
    }
    return values.to_json(bundle.manifest), arrays


def bundle_from_arrays(manifest_json: str | bytes, arrays: Mapping[str, Any]) -> StageBundle:
    """Reads what `bundle_to_arrays` made; sizes and digests are checked.

    Raises:
        BundleError: Not a manifest, a program is missing, damaged or longer than it says.
    """
    if len(manifest_json) > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"manifest of {len(manifest_json)} bytes; the bound is {MAX_MANIFEST_BYTES}"
        )
    try:
        manifest = values.from_json(StageManifest, manifest_json, "manifest")
    except FormatError as exc:
        raise BundleError(
            f"{exc.message}; the planner may run another release of this package"
        ) from exc
    check_manifest(manifest, arrays)
    programs = {}
    for spec in manifest.programs:
        where = f"stage {manifest.stage} program {spec.name!r}"
        check_sizes(spec, where)
        data = _inflate(arrays[spec.name], spec.size_bytes, where)
        check_bytes(spec, data, where)
        programs[spec.name] = data
    return StageBundle(manifest=manifest, programs=programs)


def _inflate(array: Any, size_bytes: int, where: str) -> bytes:
    """At most one byte more than promised is ever unpacked."""
    reader = zlib.decompressobj()
    try:
        data = reader.decompress(np.asarray(array, np.uint8).tobytes(), size_bytes + 1)
    except (zlib.error, TypeError, ValueError, OverflowError) as exc:
        raise BundleError(f"{where}: cannot be unpacked ({exc}); fetch the bundle again") from exc
    if len(data) != size_bytes or not reader.eof:
        raise BundleError(f"{where}: does not unpack to the {size_bytes} bytes of the manifest")
    return data
