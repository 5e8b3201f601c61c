"""Options of `crowdmesh train` that evaluate, keep the best version, and go on from a run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core import Crowd, PipelinePlan
from ..data import ArraySource, digits
from ..errors import CrowdMeshError, DataError, JobError
from ..record import RunFolder
from .inputs import read_data

if TYPE_CHECKING:
    from ..model.zoo import Entry
    from ..runtime import Evaluation

KEPT = (
    "model", "data", "steps", "checkpoint_every", "evaluate_every", "evaluate_data", "keep_best",
    "batch_size", "microbatches", "learning_rate", "seed", "crowd", "speeds", "recover", "copies",
    "wave_every", "replan",
)  # fmt: skip
"""Options that a run's folder remembers, so that `--resume RUN` alone goes on."""


def add_going_on_arguments(parser: argparse.ArgumentParser) -> None:
    """`--evaluate-every`, `--evaluate-data`, `--keep-best`, `--resume`. Add them last."""
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--evaluate-every", type=int, metavar="STEPS", help="evaluate on the devices as they train"
    )
    group.add_argument(
        "--evaluate-data",
        metavar="NAME|FILE",
        help="as --data; for digits the images that are not trained on",
    )
    group.add_argument(
        "--keep-best",
        metavar="METRIC[:min|:max]",
        help="keep the state of the best evaluation in the run's folder: loss, accuracy",
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on from a run's folder; its options hold unless others are given",
    )
    # None tells what was not given from what was; `complete` puts the usual values in.
    usual = {name: parser.get_default(name) for name in KEPT}
    parser.set_defaults(usual=usual, **dict.fromkeys(KEPT))


def complete(arguments: argparse.Namespace) -> None:
    """Fills options that were not given: from the run that is resumed, or the usual ones.

    Raises:
        JobError: No model, or the run's folder remembers no options.
        RecordError: The folder is no run's.
    """
    stored: Mapping[str, Any] = {}
    if arguments.resume is not None:
        config = RunFolder.open(arguments.resume).read_config()
        stored = config.get("notes", {}).get("cli", {})
        if not stored and arguments.model is None:
            raise JobError(
                f"{arguments.resume}: `crowdmesh train` did not make this run; go on with"
                " cm.train(..., resume=...), or give the model and its options"
            )
    crowd_given = arguments.crowd is not None or arguments.speeds is not None
    for name in KEPT:
        if getattr(arguments, name) is not None or (name in ("crowd", "speeds") and crowd_given):
            continue
        setattr(arguments, name, stored.get(name, arguments.usual[name]))
    if arguments.model is None:
        raise JobError("which model? `crowdmesh models` tells what there is")


def options_to_keep(arguments: argparse.Namespace) -> dict[str, Any]:
    """What goes into the run's folder, for `--resume`."""
    kept = {name: getattr(arguments, name) for name in KEPT}
    for name in ("data", "evaluate_data", "crowd"):
        value = kept[name]
        if value is not None and Path(value).exists():
            kept[name] = str(Path(value).absolute())
    return {"cli": {name: value for name, value in kept.items() if value is not None}}


def read_evaluation(arguments: argparse.Namespace, entry: Entry) -> Evaluation | None:
    """The evaluation of the options; None where they ask for none.

    Raises:
        DataError: No rows to evaluate are named.
    """
    from ..runtime import Evaluation

    every, name = arguments.evaluate_every, arguments.evaluate_data
    if every is None and name is None and arguments.keep_best is None:
        return None
    if every is not None and every < 1:
        raise JobError(f"--evaluate-every must be >= 1, got {every}")
    trains_on_digits = arguments.data in (None, "digits")
    if name == "digits" or (name is None and trains_on_digits):
        source: Any = digits("test")
    elif name is None:
        raise DataError(f"--evaluate-data: which rows? {arguments.data} is trained on")
    else:
        source = read_data(name, entry, 1, 0)
        assert isinstance(source, ArraySource)
    return Evaluation(source, every=every)


def read_keep_best(arguments: argparse.Namespace) -> str | tuple[str, str] | None:
    """The rule of `--keep-best`."""
    if arguments.keep_best is None:
        return None
    metric, _, mode = arguments.keep_best.partition(":")
    return (metric, mode) if mode else metric


def own_plan(arguments: argparse.Namespace, crowd: Crowd) -> PipelinePlan | None:
    """The plan of the run that is resumed, if this crowd has its devices."""
    if arguments.resume is None:
        return None
    try:
        plan = RunFolder.open(arguments.resume).read_plan()
    except CrowdMeshError:
        return None
    there = {device.id for device in crowd.devices}
    fits = set(plan.devices) <= there and plan.microbatches == arguments.microbatches
    return plan if fits else None
