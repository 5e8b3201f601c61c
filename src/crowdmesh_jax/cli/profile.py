"""`crowdmesh profile`: what each layer costs, and how long each device takes for it."""

from __future__ import annotations

import argparse

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

HELP = "show flops, bytes and seconds of each layer of a model"
EXAMPLES = """\
examples:
  crowdmesh profile lenet                       one microbatch of 8 rows, four emulated devices
  crowdmesh profile mlp --batch-size 256 --microbatches 4 --speeds 1,0.1
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
    if arguments.json:
        print_json(profiled)
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
