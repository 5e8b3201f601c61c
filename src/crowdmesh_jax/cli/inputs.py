"""What the options name: crowds, models with their losses, and data. Loads JAX when called."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from ..core import Crowd, Medium, ModelProfile, schedules
from ..data import ArraySource, digits
from ..errors import DataError, InvalidCrowdError, JobError, ModelError

if TYPE_CHECKING:
    from ..model import TrainingJob
    from ..model.zoo import Entry
    from ..solvers import PartitionProblem

DEFAULT_SPEEDS = "1,0.5,0.5,0.25"


def find_model(name: str) -> Entry:
    """The model of that name.

    Raises:
        ModelError: There is none; names those there are.
    """
    from ..model import zoo

    models = zoo.models()
    if name not in models:
        raise ModelError(
            f"no model {name!r} in the zoo; known: {', '.join(sorted(models))}; `crowdmesh models`"
            " tells of each"
        )
    return models[name]


def reads_tokens(entry: Entry) -> bool:
    """Whether a row of the model's input is a row of integer tokens."""
    return np.issubdtype(entry.row.dtype, np.integer)


def add_crowd_arguments(parser: argparse.ArgumentParser) -> None:
    """`--crowd` and `--speeds`."""
    group = parser.add_argument_group("crowd")
    group.add_argument("--crowd", metavar="FILE", help="devices and links, TOML or JSON")
    group.add_argument(
        "--speeds",
        metavar="S,S,...",
        help=f"emulated devices on this machine instead of a file (default {DEFAULT_SPEEDS})",
    )


def add_medium_argument(parser: argparse.ArgumentParser) -> None:
    """`--medium`."""
    parser.add_argument(
        "--medium",
        choices=get_args(Medium),
        help="what transfers share: nothing, both ways of a link, a cell's air; else as in FILE",
    )


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """`--batch-size`, `--microbatches`, `--learning-rate`, `--seed`."""
    group = parser.add_argument_group("job")
    group.add_argument("--batch-size", type=int, default=64, metavar="N", help="default 64")
    group.add_argument("--microbatches", type=int, default=8, metavar="M", help="default 8")
    group.add_argument("--learning-rate", type=float, default=2e-3, metavar="R", help="Adam; 2e-3")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """`--solver` and `--schedule`."""
    group = parser.add_argument_group("plan")
    group.add_argument("--solver", default="ilp", metavar="NAME", help="see `crowdmesh solvers`")
    add_schedule_argument(group)
    group.add_argument(
        "--use-all", action="store_true", help="leave no device out, even where that is slower"
    )


def add_schedule_argument(group: argparse._ArgumentGroup) -> None:
    """`--schedule`."""
    group.add_argument(
        "--schedule", default="1f1b", choices=tuple(schedules()), help="see `crowdmesh solvers`"
    )


def add_measure_argument(parser: argparse.ArgumentParser) -> None:
    """`--measure`."""
    parser.add_argument(
        "--measure", action="store_true", help="run each layer here instead of counting its flops"
    )


def profile_of(
    arguments: argparse.Namespace, job: TrainingJob, crowd: Crowd, batch: tuple[Any, Any]
) -> ModelProfile:
    """The job's profile, as exact as the options ask for.

    Emulated devices run on this machine, so its speed is measured for them; what a crowd file says
    of its devices is taken as it is.
    """
    from ..profiling import profile

    emulated = arguments.crowd is None
    return profile(
        job,
        crowd,
        batch,
        measure=arguments.measure,
        calibrate=emulated and not arguments.measure,
    )


def problem_of(
    arguments: argparse.Namespace, profile: ModelProfile, crowd: Crowd, **fields: Any
) -> PartitionProblem:
    """The partition problem of the options; `fields` are further ones of it."""
    from ..solvers import PartitionProblem

    return PartitionProblem(
        profile=profile,
        crowd=crowd,
        schedule=arguments.schedule,
        requires=[device.id for device in crowd.devices] if arguments.use_all else (),
        **fields,
    )


def read_crowd(arguments: argparse.Namespace) -> Crowd:
    """The crowd of `--crowd` or `--speeds`, with the medium of `--medium`.

    Raises:
        FormatError: The file does not describe a crowd.
        InvalidCrowdError: Both were given, or speeds that are no numbers.
    """
    medium = getattr(arguments, "medium", None)
    crowd = _read_crowd(arguments)
    return crowd if medium is None else dataclasses.replace(crowd, medium=medium)


def _read_crowd(arguments: argparse.Namespace) -> Crowd:
    if arguments.crowd is not None:
        if arguments.speeds is not None:
            raise InvalidCrowdError("--crowd and --speeds both describe the crowd; give one")
        return Crowd.load(arguments.crowd)
    text = arguments.speeds or DEFAULT_SPEEDS
    try:
        speeds = [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidCrowdError(
            f"--speeds must be numbers between commas, {DEFAULT_SPEEDS} say; got {text!r}"
        ) from None
    return Crowd.local(speeds)


def read_data(name: str | None, entry: Entry, batch_size: int, seed: int) -> ArraySource:
    """The training data of that name or file.

    Args:
        name: "digits" (the default for images); an `.npz` file with arrays `inputs` and
            `targets`; a text file for a language model, which learns its characters.

    Raises:
        DataError: No such data, or it does not hold what is needed.
    """
    tokens = reads_tokens(entry)
    if name == "digits" or (name is None and not tokens):
        if tokens:
            raise DataError(f"{entry.name} reads tokens, digits are images; give a text file")
        inputs, targets = digits("train")
        return ArraySource(inputs, targets, batch_size, seed)
    if name is None:
        raise DataError(f"{entry.name} reads tokens: give --data FILE, a text or an .npz file")
    path = Path(name)
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as archive:
                missing = {"inputs", "targets"} - set(archive.files)
                if missing:
                    raise DataError(
                        f"{path}: needs arrays 'inputs' and 'targets', it has"
                        f" {', '.join(sorted(archive.files)) or 'none'}"
                    )
                inputs, targets = archive["inputs"], archive["targets"]
        except (OSError, ValueError) as exc:
            raise DataError(f"{path}: needs arrays 'inputs' and 'targets': {exc}") from exc
        return ArraySource(inputs, targets, batch_size, seed)
    if tokens and path.is_file():
        return _text_rows(path, entry, batch_size, seed)
    text = ", or a text file" if tokens else ""
    raise DataError(
        f"no data {name!r}; known: 'digits', a FILE.npz with arrays inputs and targets{text}"
    )


def _text_rows(path: Path, entry: Entry, batch_size: int, seed: int) -> ArraySource:
    """Rows of a text: each token a character, each target the character that follows."""
    (length,) = entry.row.shape
    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror}") from exc
    rows = (len(data) - 1) // length
    if rows < 1:
        raise DataError(f"{path}: {len(data)} bytes; at least {length + 1} are needed for one row")
    characters, tokens = np.unique(data, return_inverse=True)
    outputs = entry.build().specs(entry.input_spec(1)).y
    vocabulary = outputs.shape[-1]
    if len(characters) > vocabulary:
        raise DataError(
            f"{path}: {len(characters)} different bytes; {entry.name} knows {vocabulary} tokens"
        )
    tokens = tokens.astype(np.int32)
    inputs = tokens[: rows * length].reshape(rows, length)
    targets = tokens[1 : rows * length + 1].reshape(rows, length)
    return ArraySource(inputs, targets, batch_size, seed)


def example_batch(entry: Entry, batch_size: int) -> tuple[Any, Any]:
    """A batch of the model's shapes; the values do not matter."""
    spec = entry.input_spec(batch_size)
    inputs = np.zeros(spec.shape, spec.dtype)
    shape = spec.shape if reads_tokens(entry) else (batch_size,)
    return inputs, np.zeros(shape, np.int32)


def make_job(entry: Entry, arguments: argparse.Namespace, **options: Any) -> TrainingJob:
    """The job of the options: softmax cross-entropy and Adam; `options` are the model's own.

    Raises:
        JobError: Sizes that do not fit together.
    """
    import optax

    from ..model import TrainingJob, losses

    if not 0 < arguments.learning_rate < float("inf"):
        raise JobError(f"--learning-rate must be finite and > 0, got {arguments.learning_rate}")
    return TrainingJob(
        entry.build(**options),
        loss=losses.softmax_cross_entropy,
        optimizer=optax.adam(arguments.learning_rate),
        batch_size=arguments.batch_size,
        microbatches=arguments.microbatches,
        seed=arguments.seed,
        metrics={"accuracy": losses.accuracy},
    )
