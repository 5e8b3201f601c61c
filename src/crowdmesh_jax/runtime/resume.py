"""Going on from a run's folder, on the same crowd or another, and reading what a run kept.

A checkpoint is checked whole and compared with the job before anything is launched. Data, random
numbers and optimizer counts follow from the version, so nothing else needs to be remembered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import PipelinePlan
from ..errors import CrowdMeshError, JobError, RecordError
from ..export import TrainState, assemble, initial_arrays
from ..model import TrainingJob
from ..protocol import Record, record_from_plain, records
from ..protocol.common import BestRule
from ..record import Checkpoint, Journal, RunFolder, load_checkpoint, read_manifest
from ..record.checkpoint import MANIFEST, CheckpointManifest

Key = tuple[str, str, str]
SHOWN_DIFFERENCES = 4
ROLES = {"param": 0, "state": 1, "opt": 2, "global": 3}
"""Of a checkpoint's arrays, in the order in which their differences explain each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """A run whose coordinator ended: its devices may train on, or wait to be let go."""

    run: str
    records: tuple[Record, ...] = field(repr=False)
    plan: PipelinePlan
    """Of its first epoch."""
    plan_now: PipelinePlan
    base: int
    steps: int
    is_finished: bool = False
    """All its steps are made and safe; whether its devices were told is not known."""


def find_unfinished(events: Journal) -> Unfinished | None:
    """The journal's last run, if it has not ended, or ended with its last step.

    Raises:
        FormatError: A record cannot be read.
    """
    read = [record_from_plain(plain) for plain in events.records]
    begun = [i for i, record in enumerate(read) if isinstance(record, records.Term)]
    if not begun:
        return None
    last = read[begun[-1]]
    assert isinstance(last, records.Term)
    first = next(i for i in begun if getattr(read[i], "run", None) == last.run)
    ours = tuple(read[first:])
    decisions = [record for record in ours if isinstance(record, records.Decision)]
    finish = next((record for record in ours if isinstance(record, records.Finish)), None)
    is_halted = any(isinstance(record, records.Halted) for record in ours)
    if is_halted or not decisions or (finish is not None and finish.reason):
        return None
    return Unfinished(
        run=last.run,
        records=ours,
        plan=decisions[0].plan,
        plan_now=decisions[-1].plan,
        base=decisions[0].base,
        steps=decisions[0].steps,
        is_finished=finish is not None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """What an earlier start of a run left."""

    version: int
    arrays: Mapping[Key, np.ndarray] = field(repr=False)
    plan: PipelinePlan | None
    best: float | None
    """Value of the best version kept, by the same rule; None: none was."""
    best_version: int | None
    """Of what is kept as the best, by whatever rule; None: nothing is."""
    term: int
    epoch: int
    unfinished: Unfinished | None = None
    """To be taken up where it is."""


def job_sha256(job: TrainingJob, arrays: Mapping[Key, np.ndarray]) -> str:
    """Identifies a job by what a checkpoint must fit: leaves, batch, microbatches, seed."""
    leaves = sorted((*key, str(a.dtype), list(a.shape)) for key, a in arrays.items())
    text = json.dumps([leaves, job.batch_size, job.microbatches, job.seed])
    return hashlib.sha256(text.encode()).hexdigest()


def job_meta(
    job: TrainingJob, arrays: Mapping[Key, np.ndarray], inputs_spec: Any
) -> dict[str, Any]:
    """What a checkpoint's manifest says of its job: the hash, and what a person can compare.

    And the shapes of a microbatch's inputs: the job's trees depend on them, and `restore` has no
    batch to ask.
    """
    return {
        "inputs": _plain_spec(inputs_spec),
        "job_sha256": job_sha256(job, arrays),
        "job": {
            "model": job.model.name,
            "batch_size": job.batch_size,
            "microbatches": job.microbatches,
            "seed": job.seed,
        },
    }


def _plain_spec(spec: Any) -> Any:
    """A tree of shapes as JSON; None where it has containers of other kinds."""
    if isinstance(spec, jax.ShapeDtypeStruct):
        return {"dtype": jnp.dtype(spec.dtype).name, "shape": list(spec.shape)}
    items: Any = None
    if type(spec) is dict and all(isinstance(key, str) for key in spec):
        items = {key: _plain_spec(item) for key, item in spec.items()}
    elif type(spec) in (tuple, list):
        items = [_plain_spec(item) for item in spec]
    if items is None or None in (items.values() if isinstance(items, dict) else items):
        return None
    return {type(spec).__name__: items}


def _spec_from_plain(plain: Any) -> Any:
    """What `_plain_spec` wrote. Raises what wrong values raise."""
    if "shape" in plain:
        shape = tuple(int(length) for length in plain["shape"])
        return jax.ShapeDtypeStruct(shape, jnp.dtype(plain["dtype"]))
    ((kind, items),) = plain.items()
    if kind == "dict":
        return {key: _spec_from_plain(item) for key, item in items.items()}
    return {"tuple": tuple, "list": list}[kind](_spec_from_plain(item) for item in items)


def read_resumed(
    folder: RunFolder,
    events: Journal,
    job: TrainingJob,
    fresh: Mapping[Key, np.ndarray],
    *,
    steps: int,
    rule: BestRule | None,
    take_up: bool = False,
) -> Resumed:
    """The newest checkpoint of a run and what goes with it.

    Args:
        events: The run's journal, opened: nobody else trains it.
        take_up: Its devices may train on: if the run has not ended, it goes on where it is.
        fresh: The job's initial arrays, whose names, shapes and dtypes the checkpoint must have.

    Raises:
        RecordError: No checkpoint, a damaged one, one of a newer format or of another job.
        JobError: It has all the steps that are asked for.
    """
    checkpoint = load_checkpoint(folder.checkpoint_path)
    check_job(folder.checkpoint_path, checkpoint, job, fresh)
    unfinished = find_unfinished(events) if take_up else None
    if unfinished is not None and unfinished.is_finished and unfinished.steps != steps:
        unfinished = None  # a longer run, from its result
    if unfinished is not None and unfinished.steps != steps:
        raise JobError(
            f"{folder.path}: its devices train to step {unfinished.steps}; steps={steps} is another"
            " end. Take it up with the same number, and go on from its result"
        )
    # One that is taken up may have all its steps: its devices wait for the end.
    if steps <= checkpoint.version and unfinished is None:
        raise JobError(
            f"{folder.path} has made {checkpoint.version} steps; steps={steps} in all leaves"
            f" nothing to do. Give a larger number, steps={2 * checkpoint.version} say"
        )
    kept = _kept_best(folder, rule)
    terms = [r["term"] for r in events.records if r.get("kind") == "Term"]
    epochs = [r["epoch"] for r in events.records if r.get("kind") == "Epoch"]
    try:
        plan = folder.read_plan()
    except CrowdMeshError:
        plan = None  # it can be made anew
    return Resumed(
        version=checkpoint.version,
        arrays=checkpoint.arrays,
        plan=plan,
        best=_best_value(kept, rule),
        best_version=kept.version if kept is not None else None,
        term=max(terms, default=0),
        epoch=max(epochs, default=0),
        unfinished=unfinished,
    )


def _kept_best(folder: RunFolder, rule: BestRule | None) -> CheckpointManifest | None:
    if not (folder.best_path / MANIFEST).exists():
        return None
    try:
        return read_manifest(folder.best_path)
    except RecordError:
        if rule is None:  # nobody will compare with it
            return None
        raise


def _best_value(kept: CheckpointManifest | None, rule: BestRule | None) -> float | None:
    if rule is None or kept is None:
        return None
    best = kept.meta.get("best")
    if not isinstance(best, Mapping) or best.get("metric") != rule.metric:
        return None
    value = best.get("value")
    return float(value) if isinstance(value, (int, float)) else None


def check_job(
    path: Path, checkpoint: Checkpoint, job: TrainingJob, fresh: Mapping[Key, np.ndarray]
) -> None:
    """Refuses a checkpoint of another job, and says in what it differs.

    Raises:
        RecordError: Batch, seed, or a leaf is another.
    """
    if checkpoint.meta.get("job_sha256") == job_sha256(job, fresh):
        return
    found = list(_differences(checkpoint, job, fresh))
    told = "\n".join(f"  differs  {line}" for line in found[:SHOWN_DIFFERENCES])
    more = len(found) - SHOWN_DIFFERENCES
    told += f"\n  differs  {more} more" if more > 0 else ""
    raise RecordError(
        f"{path}: checkpoint of another job\n"
        f"{told or '  differs  the hash of its job'}\n"
        "  try      the model, optimizer, batch_size, microbatches and seed of that run"
    )


def _differences(
    checkpoint: Checkpoint, job: TrainingJob, fresh: Mapping[Key, np.ndarray]
) -> Iterator[str]:
    theirs = checkpoint.meta.get("job")
    ours = job_meta(job, fresh, None)["job"]
    for name, value in ours.items():
        if isinstance(theirs, Mapping) and theirs.get(name) != value:
            yield f"{name}: {theirs.get(name)!r} in the checkpoint, {value!r} in this job"
    stored = checkpoint.arrays
    one_sided = _layers(stored) ^ _layers(fresh)
    for layer in sorted(one_sided):
        yield f"layer {layer!r}: only in {_side(layer in _layers(stored))}"
    told: set[str] = set()  # an optimizer has a leaf for each parameter: each kind is told once
    for key in sorted({*stored, *fresh}, key=lambda key: (ROLES.get(key[0], len(ROLES)), key)):
        if key[1] in one_sided:
            continue
        if key not in fresh or key not in stored:
            line = f"{_name(key)}: only in {_side(key in stored)}"
        elif (was := _spec(stored[key])) != (now := _spec(fresh[key])):
            line = f"{_name(key)}: {was} in the checkpoint, {now} in this job"
        else:
            continue
        if line not in told:
            told.add(line)
            yield line


def _layers(arrays: Mapping[Key, np.ndarray]) -> set[str]:
    return {layer for _, layer, _ in arrays if layer}


def _side(is_stored: bool) -> str:
    return "the checkpoint" if is_stored else "this job"


def _name(key: Key) -> str:
    """A leaf in words that its user knows."""
    role, layer, path = key
    if role in ("param", "state"):
        return f"layer {layer!r}, {'parameter' if role == 'param' else 'state'} {path}"
    # Before the layer's name stand places in a chain, which say nothing, and a name: "1/0/mu".
    words = path.split("/")
    words = words[: words.index(layer)] if layer in words else words
    return "optimizer state " + ("/".join(w for w in words if not w.isdigit()) or path)


def _spec(array: np.ndarray) -> str:
    return f"{array.dtype}{list(array.shape)}"


def rewind_metrics(metrics: Journal, version: int) -> None:
    """Drops rows of steps at and after `version`, which will be made again."""
    kept = [
        row
        for row in metrics.records
        if row.get("step", -1) < version and row.get("version", 0) <= version
    ]
    if len(kept) < len(metrics.records):
        metrics.rewrite(kept)


def restore(
    path: str | Path, job: TrainingJob, example_batch: tuple[Any, Any] | None = None
) -> TrainState:
    """The trees of a checkpoint: parameters, layer statistics, optimizer state.

    Args:
        path: A run's folder (its newest checkpoint), or a checkpoint: `run/best`, say.
        job: The job that made it.
        example_batch: (inputs, targets) of one step of the job, `job.batch_size` rows each; only
            the inputs' shapes count. The trees have the structure that the model's layers give
            them for such inputs. A checkpoint knows the shapes, so leave it out; one written
            before it did, or of inputs in containers but dict, list and tuple, needs it.

    Raises:
        RecordError: No checkpoint, a damaged one, one of a newer format or of another job, or one
            that needs `example_batch`.
    """
    folder = Path(path)
    if not (folder / MANIFEST).exists() and (folder / "checkpoint").is_dir():
        folder = folder / "checkpoint"
    checkpoint = load_checkpoint(folder)
    if example_batch is not None:
        inputs_spec, _ = job.microbatch_specs(example_batch)
    else:
        inputs_spec = _kept_spec(folder, checkpoint)
    check_job(folder, checkpoint, job, initial_arrays(job, inputs_spec))
    return assemble(job, inputs_spec, checkpoint.arrays)


def _kept_spec(folder: Path, checkpoint: Checkpoint) -> Any:
    plain = checkpoint.meta.get("inputs")
    if plain is None:
        raise RecordError(
            f"{folder}: the checkpoint does not say of which shape the job's inputs are, and the"
            " model's trees depend on it; give example_batch, a batch of the job: data.batch(0)"
        )
    try:
        return _spec_from_plain(plain)
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise RecordError(f"{folder / MANIFEST}: damaged: shapes of inputs: {plain!r}") from exc
