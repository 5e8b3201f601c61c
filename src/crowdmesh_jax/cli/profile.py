"""`crowdmesh profile`: what each layer costs, and how long each device takes for it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..core import Crowd, LayerSeconds, ModelProfile, values
from .console import format_count, format_seconds, print_json, print_table
from .inputs import (
    add_crowd_arguments,
    add_job_arguments,
    add_measure_argument,
    example_batch,
    find_model,
    make_job,
    profile_of,
    read_crowd,
)

if TYPE_CHECKING:
    from ..profiling import LayerComparison

HELP = "show flops, bytes and seconds of each layer of a model"
EXAMPLES = """\
examples:
  crowdmesh profile lenet                       one microbatch of 8 rows, four emulated devices
  crowdmesh profile mlp --batch-size 256 --microbatches 4 --speeds 1,0.1
  crowdmesh profile lenet --measure             predicted against measured, the worst layers named
  crowdmesh profile lenet --crowd crowd.toml --json > profile.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the crowd and the job."""
    parser.add_argument("model", nargs="?", default="lenet", help="see `crowdmesh models`")
    add_crowd_arguments(parser)
    add_job_arguments(parser)
    add_measure_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints one row per layer."""
    crowd = read_crowd(arguments)
    entry = find_model(arguments.model)
    job = make_job(entry, arguments)
    profiled = profile_of(arguments, job, crowd, example_batch(entry, arguments.batch_size))
    compared = _compare(profiled, crowd) if arguments.measure else None
    if arguments.json:
        told = values.to_plain(profiled)
        if compared is not None:
            from ..profiling import why

            told["compared"] = [
                {**values.to_plain(row), "ratio": row.ratio, "why": why(row)} for row in compared
            ]
        print_json(told)
        return
    devices = [device.id for device in crowd.devices]
    seconds = {device: profiled.layer_seconds(crowd, device) for device in devices}
    rows = []
    for index, layer in enumerate(profiled.layers):
        times = (
            format_seconds(seconds[d][index].forward_s + seconds[d][index].backward_s)
            for d in devices
        )
        rows.append(
            (
                layer.name,
                format_count(layer.parameter_count),
                format_count(layer.forward_flops),
                format_count(layer.backward_flops),
                format_count(layer.output_bytes) + "B",
                format_count(layer.residual_bytes) + "B",
                *times,
            )
        )
    columns = ("layer", "parameters", "flops fwd", "flops bwd", "output", "residuals", *devices)
    print(
        f"{arguments.model}: one microbatch of {profiled.microbatch_size} rows,"
        f" {profiled.microbatches} per step; seconds forward and backward, {profiled.source}"
    )
    print_table(columns, rows, right=columns[1:])
    if compared:
        _print_comparison(compared)


def _compare(profile: ModelProfile, crowd: Crowd) -> tuple[LayerComparison, ...]:
    """Predicted against measured at this machine's own speed; empty if no device is here."""
    from ..core.folders import cache_folder
    from ..profiling import calibrate_machine, compare_layers
    from ..profiling.cache import save_calibration

    here = next((device for device in crowd.devices if device.id in profile.seconds), None)
    if here is None:
        return ()
    own = [
        LayerSeconds(
            forward_s=row.forward_s * here.speed,
            backward_s=row.backward_s * here.speed,
            update_s=row.update_s * here.speed,
        )
        for row in profile.seconds[here.id]
    ]
    rates = calibrate_machine()
    save_calibration(cache_folder("profile"), rates)  # what later plans go by
    return compare_layers(profile, own, rates)


def _print_comparison(rows: tuple[LayerComparison, ...]) -> None:
    from ..profiling import why, worst_layers

    print("this machine at its own speed, forward and backward: predicted from its rates, measured")
    table = [
        (
            row.name,
            format_seconds(row.predicted_s),
            format_seconds(row.measured_s),
            f"{row.ratio:.2f}",
            row.bound,
        )
        for row in rows
    ]
    columns = ("layer", "predicted", "measured", "ratio", "bound by")
    print_table(columns, table, right=columns[1:4])
    predicted_s, measured_s = sum(r.predicted_s for r in rows), sum(r.measured_s for r in rows)
    print(
        f"all layers: predicted {format_seconds(predicted_s)}, measured"
        f" {format_seconds(measured_s)} ({measured_s / predicted_s:.2f})"
    )
    for row in worst_layers(rows):
        print(f"worst  {row.name}: {row.ratio:.2f} of the prediction; {why(row)}")
