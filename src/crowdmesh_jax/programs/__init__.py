"""Stage programs on a device: manifest, checks, loading. Imports JAX, never flax or optax."""

from .bundle import StageBundle
from .load import COMPILER_OPTIONS, LoadedProgram, LoadedStage, ProgramCache, load_stage
from .manifest import FORMAT_VERSION, LeafSpec, ProgramSpec, StageManifest
from .wire import bundle_from_arrays, bundle_to_arrays

__all__ = [
    "COMPILER_OPTIONS",
    "FORMAT_VERSION",
    "LeafSpec",
    "LoadedProgram",
    "LoadedStage",
    "ProgramCache",
    "ProgramSpec",
    "StageBundle",
    "StageManifest",
    "bundle_from_arrays",
    "bundle_to_arrays",
    "load_stage",
]
