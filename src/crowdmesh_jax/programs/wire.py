"""A bundle as it travels: the manifest as JSON, each program's bytes compressed.

Sizes are bounded by the manifest before anything is inflated. What the programs may do is checked
later, by `load_stage`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np

from ..core import values
from ..errors import BundleError, FormatError
from .bundle import StageBundle
from .manifest import StageManifest

MAX_PROGRAM_BYTES = 256 * 2**20
"""No stage program comes near; a manifest that says so is wrong or hostile."""


def bundle_to_arrays(bundle: StageBundle) -> tuple[str, dict[str, np.ndarray]]:
    """The manifest's JSON, and a uint8 array of compressed bytes per program."""
    packed = {
        name: np.frombuffer(zlib.compress(data, 6), np.uint8)
        for name, data in bundle.programs.items()
    }
    return values.to_json(bundle.manifest), packed


def bundle_from_arrays(manifest_json: str, packed: Mapping[str, np.ndarray]) -> StageBundle:
    """Reads what `bundle_to_arrays` made.

    Raises:
        BundleError: The manifest is no manifest, a program is missing, or its size is not as said.
    """
    try:
        manifest = values.from_json(StageManifest, manifest_json, "manifest")
    except FormatError as exc:
        raise BundleError(f"unreadable manifest: {exc.message}") from exc
    programs = {}
    for spec in manifest.programs:
        if spec.name not in packed:
            raise BundleError(f"stage {manifest.stage}: program {spec.name!r} did not come")
        programs[spec.name] = _inflate(
            packed[spec.name], spec.size_bytes, f"stage {manifest.stage} program {spec.name!r}"
        )
    return StageBundle(manifest=manifest, programs=programs)


def _inflate(packed: np.ndarray, size_bytes: int, where: str) -> bytes:
    if not 0 < size_bytes <= MAX_PROGRAM_BYTES:
        raise BundleError(f"{where}: says {size_bytes} bytes; at most {MAX_PROGRAM_BYTES} may be")
    if packed.dtype != np.uint8 or packed.ndim != 1:
        raise BundleError(f"{where}: its bytes came as {packed.dtype}{list(packed.shape)}")
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(packed.tobytes(), size_bytes + 1)
    except zlib.error as exc:
        raise BundleError(f"{where}: damaged ({exc})") from exc
    if len(data) != size_bytes or not inflater.eof:
        raise BundleError(f"{where}: {len(data)} bytes or more came, {size_bytes} were announced")
    return data
