"""From a job and a plan to one bundle per stage, and the arrays that go with them.

Knows the chain, the optimizer's slices and JAX's export. The bytes depend on the job and the plan
alone: no path, no object address, no time (two exports are equal byte for byte).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.export
import numpy as np

from ..core.plan import PipelinePlan
from ..errors import ExportError, InvalidPlanError, JobError
from ..model.job import TrainingJob
from ..model.trees import leaf_paths, signature, spec_of, unflatten
from ..programs.bundle import StageBundle
from ..programs.manifest import FORMAT_VERSION, ProgramSpec, StageManifest
from . import stage as st
from .chain import Chain, Key, build_chain
from .flat import FlatProgram, abstract, leaf_spec
from .optimizer import SlicedOptimizer, slice_optimizer

REMEMBERED = 96
"""Stages (and chains, optimizers) kept per job; a stage's programs are 0.1-1 MB."""


@dataclass(frozen=True)
class TrainState:
    """The plain trees of a model in training."""

    params: Any
    """{layer name: tree}."""
    state: Any
    """{layer name: tree} of layer statistics."""
    opt_state: Any
    """The plain optax state."""


def build_bundles(
    job: TrainingJob, plan: PipelinePlan, inputs_spec: Any, targets_spec: Any
) -> tuple[StageBundle, ...]:
    """Traces and exports the programs of each stage.

    Args:
        plan: Its `num_layers` and `microbatches` must be the job's.
        inputs_spec, targets_spec: Pytrees of `jax.ShapeDtypeStruct` for ONE MICROBATCH.

    Raises:
        InvalidPlanError: The plan is of another model or job.
        UnsupportedLayerError, UnsupportedOptimizerError, JobError: Cannot become programs.
        ExportError: JAX cannot export a program.
    """
    layers = len(job.model.layers)
    if plan.num_layers != layers:
        raise InvalidPlanError(f"the plan cuts {plan.num_layers} layers, the model has {layers}")
    if plan.microbatches != job.microbatches:
        raise InvalidPlanError(
            f"the plan has {plan.microbatches} microbatches, the job {job.microbatches}"
        )
    job.check(inputs_spec, targets_spec)
    with _tracing():
        targets = st.Targets.of(spec_of(targets_spec))
        st.check_loss(job, _chain(job, inputs_spec).carries[-1], targets)
        return tuple(
            _build_stage(job, plan, index, inputs_spec, targets)
            for index in range(len(plan.stages))
        )


def _remembered(job: TrainingJob, key: Any, make: Callable[[], Any]) -> Any:
    """`make()`, once for each key; a plan changes a few cuts, and tracing takes seconds."""
    key = (key, bool(jax.config.read("jax_enable_x64")))
    if key in job.made:
        value = job.made.pop(key)  # used last
    else:
        value = make()
        while len(job.made) >= REMEMBERED:
            del job.made[next(iter(job.made))]
    job.made[key] = value
    return value


def _chain(job: TrainingJob, inputs_spec: Any) -> Chain:
    key = ("chain", signature(inputs_spec))
    return _remembered(job, key, lambda: build_chain(job.model, inputs_spec))


def _sliced(job: TrainingJob, inputs_spec: Any) -> SlicedOptimizer:
    params = job.model.specs(inputs_spec).params
    key = ("optimizer", signature(params))

    def make() -> SlicedOptimizer:
        with _tracing():
            return slice_optimizer(job.optimizer, params)

    return _remembered(job, key, make)


@contextmanager
def _tracing() -> Iterator[None]:
    """Settings that end up in the bytes: no source locations, one PRNG behaviour."""
    option = "jax_traceback_in_locations_limit"  # has no context manager of its own
    old = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        with jax.threefry_partitionable(True):
            yield
    finally:
        jax.config.update(option, old)


def _build_stage(
    job: TrainingJob, plan: PipelinePlan, index: int, inputs_spec: Any, targets: st.Targets
) -> StageBundle:
    stage = plan.stages[index]
    chain, sliced = _chain(job, inputs_spec), _sliced(job, inputs_spec)
    wire_in = plan.stages[index - 1].wire_dtype if index else None
    parts = st.StageParts(chain, stage.first_layer, stage.last_layer, wire_in, stage.wire_dtype)
    last = index == len(plan.stages) - 1
    names = tuple(view.layer.name for view in parts.views)
    where = f"stage {index}"
    key = (
        *("stage", signature(inputs_spec), targets.specs, targets.tree),
        *(stage.first_layer, stage.last_layer, stage.recompute and not last),
        *(wire_in, stage.wire_dtype),
    )
    exported: dict[str, tuple[ProgramSpec, bytes]] = _remembered(
        job, key, lambda: _export_stage(job, parts, sliced, targets, stage.recompute, where)
    )
    borrowed = parts.borrowed
    resident = (
        *parts.params,
        *parts.state,
        *(leaf for leaf in sliced.opt_leaves if leaf.layer in names),
        *borrowed,
        *sliced.global_leaves,
    )
    manifest = StageManifest(
        format_version=FORMAT_VERSION,
        plan_sha256=plan.digest(),
        stage=index,
        num_stages=len(plan.stages),
        first_layer=stage.first_layer,
        last_layer=stage.last_layer,
        layer_names=names,
        recompute=stage.recompute,
        microbatches=job.microbatches,
        seed=job.seed,
        programs=tuple(spec for spec, _ in exported.values()),
        boundary_in=parts.x,
        boundary_out=() if last else parts.after.specs("y"),
        gradient_in=() if last else parts.dy,
        gradient_out=parts.dx,
        targets=targets.specs if last else (),
        resident=resident,
        accumulators=parts.accumulators,
        borrows=tuple((leaf.layer, leaf.path) for leaf in borrowed),
        lends=parts.lends,
        calling_convention_version=jax.export.maximum_supported_calling_convention_version,
        jax_version=jax.__version__,
    )
    return StageBundle(
        manifest=manifest, programs={name: data for name, (_, data) in exported.items()}
    )


def _export_stage(
    job: TrainingJob,
    parts: st.StageParts,
    sliced: SlicedOptimizer,
    targets: st.Targets,
    recompute: bool,
    where: str,
) -> dict[str, tuple[ProgramSpec, bytes]]:
    """The programs of layers `parts`; nothing else of the plan enters."""
    names = tuple(view.layer.name for view in parts.views)
    programs: dict[str, FlatProgram | None] = {}
    last = parts.last == len(parts.chain.layers) - 1
    if last:
        programs["loss_backward"] = st.loss_backward(parts, job, targets)
        programs["weigh"] = st.weigh(job, parts.chain.carries[-1], targets)
    else:
        forward, backward = st.forward_and_backward(parts, recompute=recompute)
        programs.update(forward=forward, backward=backward)
    programs["merge"] = st.merge(parts)
    programs["scalars"] = sliced.scalars(names)
    programs["reduce"] = sliced.reduce() if parts.first == 0 else None
    programs["update"] = sliced.update(names)
    programs["eval_forward"] = st.eval_forward(parts, job, targets if last else None)
    return {
        name: export_program(name, program, where)
        for name, program in programs.items()
        if program is not None
    }


def export_program(name: str, program: FlatProgram, where: str) -> tuple[ProgramSpec, bytes]:
    """Turns a flat program into bytes and their entry in the manifest.

    Raises:
        ExportError: JAX cannot export it.
    """

    def run(*arrays: Any) -> tuple[Any, ...]:
        return tuple(program.fn(*arrays))

    run.__name__ = run.__qualname__ = name
    try:
        with _tracing():
            exported = jax.export.export(jax.jit(run), platforms=("cpu",))(
                *(abstract(leaf) for leaf in program.inputs)
            )
            data = bytes(exported.serialize())
    except Exception as exc:
        raise ExportError(
            f"{where}: program {name!r} cannot be exported: {type(exc).__name__}: {exc}"
        ) from exc
    for leaf, aval in zip(program.outputs, exported.out_avals, strict=True):
        if leaf != leaf_spec(*leaf.key, aval):
            raise ExportError(f"{where}: program {name!r} makes {aval} where {leaf} is due")
    spec = ProgramSpec(
        name=name,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        inputs=program.inputs,
        outputs=program.outputs,
        donate=program.donate,
    )
    return spec, data


def initial_arrays(job: TrainingJob, inputs_spec: Any) -> dict[Key, np.ndarray]:
    """Parameters, statistics and optimizer state of the whole model at version 0.

    Make them in one place and ship them: normal variates differ in the last bit between machines.
    """
    with jax.threefry_partitionable(True):
        params, state = job.model.init(job.seed, inputs_spec)
    arrays: dict[Key, np.ndarray] = {}
    for role, trees in (("param", params), ("state", state)):
        for name, tree in trees.items():
            arrays.update(((role, name, path), np.asarray(leaf)) for path, leaf in leaf_paths(tree))
    arrays.update(_sliced(job, inputs_spec).init_arrays(params))
    return arrays


def assemble(job: TrainingJob, inputs_spec: Any, arrays: Mapping[Key, Any]) -> TrainState:
    """Puts leaves back into the plain trees of params, state and optimizer state.

    Raises:
        ModelError, JobError: A leaf of the model or of the optimizer is missing.
    """
    specs = job.model.specs(inputs_spec)
    trees: dict[str, dict[str, Any]] = {}
    for role, tree in (("param", specs.params), ("state", specs.state)):
        trees[role] = {}
        for name, spec in tree.items():
            found = {k[2]: v for k, v in arrays.items() if k[:2] == (role, name)}
            trees[role][name] = unflatten(spec, found)
    try:
        opt_state = _sliced(job, inputs_spec).assemble(arrays)
    except KeyError as exc:
        raise JobError(f"no array for leaf {exc.args[0]}: arrays of another job?") from None
    return TrainState(trees["param"], trees["state"], opt_state)
