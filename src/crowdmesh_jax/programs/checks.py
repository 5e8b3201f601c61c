"""What a device asks of a program before it runs it.

Deserialising checks nothing by itself: a forged program is accepted as readily as an honest one.
Knows manifests and JAX's export format, nothing of models or of who sent the bytes. Order: size,
digest, deserialise, signature, platform, effects, custom calls. Memory is checked after compiling.

Source: PROGRAMS.md's experiments, section 10; custom calls by exact name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.export
import numpy as np
from jax.interpreters import mlir

from ..errors import BundleError, ForbiddenProgramError
from .manifest import FORMAT_VERSION, LeafSpec, ProgramSpec, StageManifest

MAX_PROGRAM_BYTES = 256 * 2**20
"""Upper bound on one serialized program."""

ALLOWED_CUSTOM_CALLS = frozenset(
    {"ApproxTopK", "Sharding", "topk", "mhlo.topk"}
    | {
        f"lapack_{kind}{routine}_ffi"
        for kind in "sdcz"
        for routine in (
            "potrf", "getrf", "geqrf", "gesdd", "gesvd", "syevd", "heevd", "geev", "gees",
            "orgqr", "ungqr", "sytrd", "hetrd", "gehrd", "geqp3", "gtsv", "trsm",
        )
    }
)  # fmt: skip
"""Targets that a program may call. Ordinary networks call none on a CPU."""


def check_manifest(manifest: StageManifest, programs: Mapping[str, Any]) -> None:
    """Version, platform and completeness.

    Raises:
        BundleError: Another format version, no CPU programs, or a program is missing or unknown.
    """
    where = f"stage {manifest.stage}"
    if manifest.format_version != FORMAT_VERSION:
        raise BundleError(
            f"{where}: bundle format {manifest.format_version}, this package reads"
            f" {FORMAT_VERSION}; use the same release on the planner and on the device"
        )
    low = jax.export.minimum_supported_calling_convention_version
    high = jax.export.maximum_supported_calling_convention_version
    if not low <= manifest.calling_convention_version <= high:
        raise BundleError(
            f"{where}: programs use calling convention {manifest.calling_convention_version}"
            f" (jax {manifest.jax_version}), jax {jax.__version__} reads {low} to {high}"
        )
    if "cpu" not in manifest.platforms:
        raise ForbiddenProgramError(f"{where}: programs are for {manifest.platforms}, not cpu")
    names = [spec.name for spec in manifest.programs]
    if len(set(names)) != len(names):
        raise BundleError(f"{where}: the manifest lists a program twice: {names}")
    odd = sorted(set(names) ^ set(programs))
    if odd:
        raise BundleError(
            f"{where}: program {odd[0]!r} is in the {'manifest' if odd[0] in names else 'bundle'}"
            " only"
        )


def check_sizes(spec: ProgramSpec, where: str) -> None:
    """What the manifest says of a program's size, before memory is taken for it.

    Raises:
        BundleError: Negative or above the bound.
    """
    if not 0 <= spec.size_bytes <= MAX_PROGRAM_BYTES:
        raise BundleError(f"{where}: {spec.size_bytes} bytes; the bound is {MAX_PROGRAM_BYTES}")


def check_bytes(spec: ProgramSpec, data: bytes, where: str) -> None:
    """Size and digest.

    Raises:
        BundleError: The bytes are not those that the manifest names.
    """
    check_sizes(spec, where)
    if len(data) != spec.size_bytes:
        raise BundleError(
            f"{where}: {len(data)} bytes, manifest says {spec.size_bytes}; fetch the bundle again"
        )
    digest = hashlib.sha256(data).hexdigest()
    if digest != spec.sha256:
        raise BundleError(
            f"{where}: sha256 {digest[:16]}..., manifest says {spec.sha256[:16]}...;"
            " fetch the bundle again"
        )


def deserialize(data: bytes, where: str) -> jax.export.Exported:
    """Reads a serialized program.

    Raises:
        BundleError: Whatever goes wrong inside; damaged bytes end in many kinds of exceptions.
    """
    try:
        return jax.export.deserialize(bytearray(data))
    except Exception as exc:
        raise BundleError(
            f"{where}: cannot be read as an exported program by jax {jax.__version__}"
            f" ({type(exc).__name__}: {str(exc)[:200]})"
        ) from exc


def check_signature(spec: ProgramSpec, exported: jax.export.Exported, where: str) -> None:
    """Arguments, results, platform, devices and effects.

    Raises:
        BundleError: They differ from the manifest.
        ForbiddenProgramError: More than one device, another platform, or side effects.
    """
    _check_avals(spec.inputs, exported.in_avals, f"{where}: input")
    _check_avals(spec.outputs, exported.out_avals, f"{where}: output")
    for index in spec.donate:
        if not 0 <= index < len(spec.inputs):
            raise BundleError(f"{where}: donates input {index} of {len(spec.inputs)}")
    if exported.nr_devices != 1:
        raise ForbiddenProgramError(f"{where}: wants {exported.nr_devices} devices, 1 is allowed")
    if tuple(exported.platforms) != ("cpu",):
        raise ForbiddenProgramError(f"{where}: is for {exported.platforms}, only cpu is allowed")
    effects = [*exported.ordered_effects, *exported.unordered_effects]
    if effects:
        raise ForbiddenProgramError(f"{where}: has side effects {effects}; none are allowed")


def _check_avals(specs: tuple[LeafSpec, ...], avals: Any, where: str) -> None:
    if len(specs) != len(avals):
        raise BundleError(f"{where}s: program has {len(avals)}, manifest {len(specs)}")
    for index, (spec, aval) in enumerate(zip(specs, avals, strict=True)):
        shape, dtype = tuple(aval.shape), np.dtype(aval.dtype).name
        if (dtype, shape) != (spec.dtype, spec.shape):
            raise BundleError(
                f"{where} {index} ({spec.role} {spec.layer}/{spec.path}): program has"
                f" {dtype}{list(shape)}, manifest {spec.dtype}{list(spec.shape)}"
            )


def check_custom_calls(exported: jax.export.Exported, where: str) -> None:
    """Walks the parsed module: names may hold quotes, so text is not searched.

    Raises:
        ForbiddenProgramError: A custom call that is not on the list.
        BundleError: The module cannot be parsed.
    """
    for target in custom_calls(exported, where):
        if target not in ALLOWED_CUSTOM_CALLS:
            raise ForbiddenProgramError(
                f"{where}: custom call {target[:80]!r} is not allowed; take the operation out of"
                " the layer, or extend ALLOWED_CUSTOM_CALLS on every device"
            )


def custom_calls(exported: jax.export.Exported, where: str = "program") -> list[str]:
    """Targets of all custom calls, in module order.

    Raises:
        BundleError: The module cannot be parsed.
    """
    targets: list[str] = []
    try:
        with mlir.make_ir_context():
            module = exported.mlir_module(serialized=False)
            for operation in _walk(module.operation):
                if operation.name.endswith("custom_call"):
                    targets.append(str(operation.attributes["call_target_name"].value))
    except Exception as exc:
        raise BundleError(
            f"{where}: its module cannot be parsed ({type(exc).__name__}: {str(exc)[:200]})"
        ) from exc
    return targets


def _walk(operation: Any) -> Iterator[Any]:
    waiting = [operation]
    while waiting:
        current = waiting.pop()
        yield current
        children = [
            child.operation
            for region in current.regions
            for block in region.blocks
            for child in block.operations
        ]
        waiting.extend(reversed(children))


def check_memory(temp_bytes: int, output_bytes: int, bound_bytes: int | None, where: str) -> None:
    """What the compiler says that a call needs besides its arguments.

    Raises:
        ForbiddenProgramError: More than the bound.
    """
    if bound_bytes is not None and temp_bytes + output_bytes > bound_bytes:
        raise ForbiddenProgramError(
            f"{where}: needs {temp_bytes / 1e6:.1f} MB temporary and {output_bytes / 1e6:.1f} MB"
            f" result memory, the bound is {bound_bytes / 1e6:.1f} MB; use smaller microbatches"
            " or fewer layers on this device"
        )
