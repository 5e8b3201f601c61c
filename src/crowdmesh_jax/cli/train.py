"""`crowdmesh train`: a model of the zoo, over the devices of a crowd."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import Crowd, PipelinePlan, values
from ..data import ArraySource
from ..errors import JobError
from .console import format_seconds, print_json
from .going_on import (
    add_going_on_arguments,
    complete,
    options_to_keep,
    own_plan,
    read_evaluation,
    read_keep_best,
)
from .inputs import (
    add_crowd_arguments,
    add_job_arguments,
    add_measure_argument,
    add_plan_arguments,
    example_batch,
    find_model,
    make_job,
    problem_of,
    profile_of,
    read_crowd,
    read_data,
)

if TYPE_CHECKING:
    from ..model import TrainingJob
    from ..runtime import Crew, Recovery, TrainResult
    from ..solvers import PartitionResult
    from .live import JsonView, LiveView

HELP = "train a model over a crowd; leaves a folder in runs/"
EXAMPLES = """\
examples:
  crowdmesh train lenet --data digits --steps 200
  crowdmesh train mlp --crowd crowd.toml --data mine.npz --steps 1000 --microbatches 4
  crowdmesh train lenet --plan plan.json --crowd crowd.toml   a plan kept by `crowdmesh plan`
  crowdmesh train lenet --evaluate-every 50 --keep-best accuracy
  crowdmesh train --resume runs/mine --steps 1000             goes on, on this crowd or another
  crowdmesh train lenet --speeds 1,1,0.5,0.5 --copies 2       survives losses, keeps two copies
  crowdmesh train gpt2_nano --data book.txt --learning-rate 1e-3
  crowdmesh train lenet --json | jq 'select(.event == "step") | .loss'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, its data, the crowd, the job and the plan."""
    parser.add_argument("model", nargs="?", help="see `crowdmesh models`")
    parser.add_argument(
        "--data",
        metavar="NAME|FILE",
        help="digits, a FILE.npz with arrays inputs and targets, or a text",
    )
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="default 200")
    add_run_arguments(parser)
    add_crowd_arguments(parser)
    add_job_arguments(parser)
    add_plan_arguments(parser)
    add_measure_argument(parser)
    parser.add_argument("--plan", metavar="FILE", help="use this plan instead of solving for one")
    add_recovery_arguments(parser)
    add_going_on_arguments(parser)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the run itself, the same for `train` and `demo`."""
    group = parser.add_argument_group("run")
    group.add_argument("--transport", default="grpc", choices=("grpc", "memory"))
    group.add_argument("--runs-dir", default="runs", metavar="DIR", help="default runs")
    group.add_argument("--name", metavar="NAME", help="of the run's folder; default date and time")
    group.add_argument("--checkpoint-every", type=int, metavar="STEPS", help="default: at the end")


def add_recovery_arguments(parser: argparse.ArgumentParser) -> None:
    """`--recover`, `--copies`, `--wave-every`."""
    group = parser.add_argument_group("recovery")
    group.add_argument(
        "--recover",
        action=argparse.BooleanOptionalAction,
        help="go on when a device dies; default: where devices are left over as spares",
    )
    group.add_argument(
        "--copies", type=int, default=1, metavar="N", help="of each stage, elsewhere; default 1"
    )
    group.add_argument(
        "--wave-every",
        type=int,
        metavar="STEPS",
        help="between two rounds of copies; a loss redoes at most about so many; default: learned,"
        " at most 3 %% of the time, or what the logs allow (`crowdmesh demo`: 8)",
    )
    group.add_argument(
        "--replan",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="cut the layers anew where that pays after devices went or came; changes rounding;"
        " default: yes (`crowdmesh demo`: no)",
    )


def read_recovery(
    arguments: argparse.Namespace, plan: PipelinePlan, crowd: Crowd
) -> Recovery | None:
    """The terms of the options; None where a loss ends the run.

    In one process (`--transport memory`) nobody can be lost, so it must be asked for.
    """
    from ..runtime import Recovery

    recovers = arguments.recover
    if recovers is None:
        recovers = arguments.transport != "memory" and bool(spares_of(plan, crowd))
    if not recovers:
        return None
    return Recovery(
        copies=arguments.copies, wave_every=arguments.wave_every, replan=arguments.replan
    )


def spares_of(plan: PipelinePlan, crowd: Crowd) -> tuple[str, ...]:
    """Devices of the crowd without a stage."""
    return tuple(device.id for device in crowd.devices if device.id not in plan.devices)


def run(arguments: argparse.Namespace) -> None:
    """Plans if need be, trains, tells where the run's folder is."""
    complete(arguments)
    if arguments.steps < 1:
        raise JobError(f"--steps must be >= 1, got {arguments.steps}")
    crowd = read_crowd(arguments)
    entry = find_model(arguments.model)
    job = make_job(entry, arguments)
    data = read_data(arguments.data, entry, arguments.batch_size, arguments.seed)
    plan = values.load(PipelinePlan, arguments.plan) if arguments.plan else None
    result = run_training(
        arguments,
        job,
        crowd,
        data,
        plan,
        example_batch(entry, job.batch_size),
        evaluate=read_evaluation(arguments, entry),
        keep_best=read_keep_best(arguments),
        resume=arguments.resume,
        notes=options_to_keep(arguments),
    )
    if arguments.json:
        print_json(result_summary(result))


def run_training(
    arguments: argparse.Namespace,
    job: TrainingJob,
    crowd: Crowd | Crew,
    data: ArraySource,
    plan: PipelinePlan | None,
    example: tuple[Any, Any],
    **fields: Any,
) -> TrainResult:
    """Plans (and explains), trains with a live view, and prints predicted against measured.

    Args:
        fields: More of `train`'s arguments.
    """
    from ..runtime import emulate, train

    real = emulate(crowd).crowd if isinstance(crowd, Crowd) else crowd.crowd
    solved = None
    if plan is None and fields.get("resume"):
        plan = own_plan(arguments, real)
    if plan is None:
        solved = plan_for(arguments, job, real, example)
        plan = solved.plan
    recovery = read_recovery(arguments, plan, real)
    with make_view(arguments, plan, real, recovery) as view:
        result = train(
            job,
            crowd,
            data,
            plan=solved or plan,
            steps=arguments.steps,
            transport=arguments.transport,
            runs_dir=arguments.runs_dir,
            name=arguments.name,
            checkpoint_every=arguments.checkpoint_every,
            recovery=recovery or False,
            on_event=view,
            **fields,
        )
    tell_result(arguments, result)
    return result


def make_view(
    arguments: argparse.Namespace, plan: PipelinePlan, crowd: Crowd, recovery: Recovery | None
) -> JsonView | LiveView:
    """What shows the run as it goes."""
    from .live import JsonView, LiveView

    if arguments.json:
        return JsonView()
    return LiveView(plan, crowd, spares_of(plan, crowd) if recovery else ())


def tell_result(arguments: argparse.Namespace, result: TrainResult) -> None:
    """Predicted against measured, and where the folder is."""
    if not arguments.json:
        if result.best_version is not None:
            print(f"best version {result.best_version}, kept in {result.run_dir}/best")
        print(_step_line(result))
        print(f"run folder {result.run_dir}   (trace.json opens in https://ui.perfetto.dev)")


def plan_for(
    arguments: argparse.Namespace, job: TrainingJob, crowd: Crowd, example: tuple[Any, Any]
) -> PartitionResult:
    """Profiles, solves, and explains the plan."""
    from ..solvers import make_solver, solve

    solver = make_solver(arguments.solver)  # an unknown one is told before the profile is taken
    profiled = profile_of(arguments, job, crowd, example)
    problem = problem_of(arguments, profiled, crowd)
    solved = solve(problem, solver=solver)
    if arguments.json:
        print_json({"event": "plan", "plan": solved.plan, "predicted": solved.predicted})
    else:
        print(solved.explain())
        print(flush=True)
    return solved


def _step_line(result: TrainResult) -> str:
    measured, predicted = result.measured_step_s, result.predicted_step_s
    if math.isnan(measured):
        return "step time: too few steps to measure it"
    line = f"step time  measured {format_seconds(measured)}"
    if not math.isnan(predicted):
        off = (measured / predicted - 1) * 100
        line += f", predicted {format_seconds(predicted)} ({off:+.1f} %)"
    return line


def result_summary(result: TrainResult) -> dict[str, Any]:
    """What a finished run tells in one JSON object."""
    return {
        "event": "result",
        "steps": result.first_step + len(result.losses),
        "loss": float(result.losses[-1]),
        "metrics": {name: float(np.asarray(row)[-1]) for name, row in result.metrics.items()},
        "predicted_step_s": result.predicted_step_s,
        "measured_step_s": result.measured_step_s,
        "evaluations": result.evaluations,
        "best_version": result.best_version,
        "recoveries": len(result.recoveries),
        "run_dir": str(result.run_dir),
    }
