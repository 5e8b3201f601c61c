"""From a bundle to programs that run: checked, jitted with donation, compiled ahead on request.

Knows keys and arrays. It knows nothing of layers' code, flax or optax, nor of who asks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from ..core.memory import program_ops
from ..errors import BundleError
from .bundle import StageBundle
from .checks import (
    check_bytes,
    check_custom_calls,
    check_manifest,
    check_memory,
    check_signature,
    deserialize,
)
from .manifest import ProgramSpec, StageManifest

logger = logging.getLogger(__name__)

Key = tuple[str, str, str]
Array = Any

COMPILER_OPTIONS: dict[str, Any] = {"xla_allow_excess_precision": False}
"""XLA may keep bfloat16 values in float32 inside a fusion. What is fused depends on the cut, so a
plan would change results in the third digit; without the excess it changes nothing."""


class LoadedProgram:
    """One checked program. Call `run` with an environment of arrays."""

    def __init__(
        self, spec: ProgramSpec, call: Callable[..., Any], where: str, max_bytes: int | None
    ) -> None:
        self.spec = spec
        self._where = where
        self._max_bytes = max_bytes
        self._input_keys = tuple(leaf.key for leaf in spec.inputs)
        order = output_order(spec)
        self._output_keys = tuple(spec.outputs[index].key for index in order)

        def ordered(*arrays: Array) -> tuple[Array, ...]:
            results = call(*arrays)
            return tuple(results[index] for index in order)

        self._jitted = jax.jit(ordered, donate_argnums=spec.donate)
        self._call: Callable[..., Any] | None = None
        self.compile_s: float | None = None
        """Seconds that compiling took; None until compiled."""
        self.temp_bytes: int | None = None
        """Temporary memory of one call, from the compiler; None until compiled."""
        self.ops = 0
        """Instructions that it calls one after another; 0 until compiled."""

    def compile(self) -> Callable[..., Any]:
        """Compiles now, unless done already, and checks the memory that a call needs.

        Raises:
            ForbiddenProgramError: It asks for more memory than the bound.
        """
        if self._call is None:
            # Without a lock: a thread of low priority may be at it ahead of time, and who needs the
            # program now must not wait for a thread that may get no time at all.
            self._call = self._compile()
        return self._call

    def _compile(self) -> Callable[..., Any]:
        started = time.perf_counter()
        avals = [
            jax.ShapeDtypeStruct(leaf.shape, jax.numpy.dtype(leaf.dtype))
            for leaf in self.spec.inputs
        ]
        compiled = self._jitted.lower(*avals).compile(COMPILER_OPTIONS)
        self.compile_s = time.perf_counter() - started
        stats = compiled.memory_analysis()
        if stats is not None:
            self.temp_bytes = int(stats.temp_size_in_bytes)
            output_bytes = int(stats.output_size_in_bytes)
            check_memory(self.temp_bytes, output_bytes, self._max_bytes, self._where)
        self.ops = program_ops(compiled.as_text() or "")
        logger.debug("%s compiled in %.2f s", self._where, self.compile_s)
        return compiled

    def run(self, env: Mapping[Key, Array]) -> dict[Key, Array]:
        """Takes its inputs from `env` by key; returns its outputs by key. Donated inputs die."""
        call = self._call or self.compile()
        try:
            arguments = [env[key] for key in self._input_keys]
        except KeyError as exc:
            raise BundleError(f"{self._where}: no array for input {exc.args[0]}") from None
        return dict(zip(self._output_keys, call(*arguments), strict=True))


class ProgramCache:
    """Programs loaded before, so that the next run, epoch or plan loads only what is new.

    Args:
        limit: Programs kept, those used last; a stage has four to eight.
    """

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._programs: dict[tuple[ProgramSpec, int | None], LoadedProgram] = {}

    def find(self, spec: ProgramSpec, max_bytes: int | None) -> LoadedProgram | None:
        """The program of the same bytes, leaves and bound, if it is here."""
        program = self._programs.pop((spec, max_bytes), None)
        if program is not None:
            self._programs[spec, max_bytes] = program  # used last
        return program

    def keep(self, spec: ProgramSpec, max_bytes: int | None, program: LoadedProgram) -> None:
        """Files a checked program; the one unused for longest goes when the cache is full."""
        self._programs[spec, max_bytes] = program
        while len(self._programs) > self._limit:
            del self._programs[next(iter(self._programs))]


def output_order(spec: ProgramSpec) -> list[int]:
    """Outputs that have a donated input's key first, in the order of those inputs.

    JAX pairs donated buffers with outputs of the same shape in order of appearance. A parameter
    written over Adam's moment must wait until the moment was read: XLA then holds everything twice
    (an update's temporaries were twice the parameters, now nothing).
    """
    place = {spec.inputs[index].key: rank for rank, index in enumerate(spec.donate)}
    last = len(place)
    keys = [leaf.key for leaf in spec.outputs]
    return sorted(range(len(keys)), key=lambda index: (place.get(keys[index], last), index))


class LoadedStage:
    """The checked programs of one stage."""

    def __init__(self, manifest: StageManifest, programs: Mapping[str, LoadedProgram]) -> None:
        self.manifest = manifest
        self._programs = dict(programs)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._programs)

    def has(self, name: str) -> bool:
        """Whether the stage has a program of that name."""
        return name in self._programs

    def program(self, name: str) -> LoadedProgram:
        """The program of that name.

        Raises:
            BundleError: The stage has none; names those it has.
        """
        try:
            return self._programs[name]
        except KeyError:
            raise BundleError(
                f"stage {self.manifest.stage} has no program {name!r};"
                f" it has {', '.join(self._programs)}"
            ) from None

    def run(self, name: str, env: Mapping[Key, Array]) -> dict[Key, Array]:
        """Runs a program on the arrays of `env` that it takes; others are ignored.

        Donated inputs (gradients in backward; parameters and optimizer state in update) must not
        be used again.
        """
        program = self._programs.get(name)
        return (program or self.program(name)).run(env)

    def compile(self, *, leave_out: Sequence[str] = ()) -> dict[str, float]:
        """Compiles all programs now, but those to `leave_out`: they compile when first run.

        Returns:
            Seconds per program.

        Raises:
            ForbiddenProgramError: A program asks for more memory than the bound.
        """
        seconds = {}
        for name, program in self._programs.items():
            if name in leave_out:
                continue
            program.compile()
            seconds[name] = program.compile_s or 0.0
        return seconds

    @property
    def ops(self) -> int:
        """Instructions of all compiled programs."""
        return sum(program.ops for program in self._programs.values())

    @property
    def temp_bytes(self) -> int:
        """Largest temporary memory of a compiled program."""
        return max((p.temp_bytes or 0 for p in self._programs.values()), default=0)


def load_stage(
    bundle: StageBundle,
    *,
    max_bytes: int | None = None,
    trusted: bool = False,
    cache: ProgramCache | None = None,
) -> LoadedStage:
    """Checks a bundle's programs and makes them callable. Nothing is compiled yet.

    Args:
        max_bytes: Bound on temporary plus result memory of one call, checked when compiled; the
            smaller of this and the manifest's own bound holds.
        trusted: Skips the search for custom calls; for bundles built in this process.
        cache: Programs checked and compiled before, of this process; takes the new ones.

    Raises:
        BundleError: Damaged, or not what the manifest says.
        ForbiddenProgramError: Asks for something a device does not allow.
    """
    manifest = bundle.manifest
    check_manifest(manifest, bundle.programs)
    bounds = [b for b in (max_bytes, manifest.temp_bytes_bound) if b is not None]
    programs = {}
    for spec in manifest.programs:
        where = f"stage {manifest.stage} program {spec.name!r}"
        data = bundle.programs[spec.name]
        check_bytes(spec, data, where)
        bound = min(bounds) if bounds else None
        kept = cache.find(spec, bound) if cache is not None else None
        if kept is not None:
            programs[spec.name] = kept
            continue
        exported = deserialize(data, where)
        check_signature(spec, exported, where)
        if not trusted:
            check_custom_calls(exported, where)
        program = LoadedProgram(spec, exported.call, where, bound)
        programs[spec.name] = program
        if cache is not None:
            cache.keep(spec, bound, program)
    return LoadedStage(manifest, programs)
