"""Against `torch.distributed.pipelining` (Schedule1F1B, gloo): the same nets, weights and data.

Two processes, one thread each, SGD, 8 microbatches, plain float32 on the wire on both sides.

*Equal*: each process on a core of its own; each side also against its own single core.
*Unequal*: devices of speed 1 and 0.4 joined by 50 Mbit/s and 2 ms, emulated by one set of rules on
both sides (`_torch_peer.py`, docs/emulation.md).

Torch gets what a careful person gives it: its layers are timed alone, all cuts (and both orders of
unequal devices) are ranked by the same timeline that plans ours, the best few are run and the
fastest is kept; `channels_last` for the CNN and `torch.compile` where they work and are faster.
Ours is what `cm.partition` returns, with the warm-up that the `eager` schedule chooses.

    python benchmarks/torch_pipeline.py [--torch-python .venv-bench/bin/python] [--repeats 7]
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["NPROC"] = "1"  # XLA's threads, as in agents

import numpy as np
from _measure import Figure, arguments, figure, ratio, report
from _pipelines import Trained, best_plan, one_stage, train
from _workloads import (
    HEADS,
    LEARNING_RATE,
    MICROBATCHES,
    POOLED,
    WORKLOADS,
    Workload,
    workload,
)

import crowdmesh_jax as cm
from crowdmesh_jax.core import CutTimes, StageTimes, evaluate, make_schedule
from crowdmesh_jax.export import initial_arrays

TORCH_PYTHON = Path(__file__).parents[1] / ".venv-bench" / "bin" / "python"
SPEEDS = (1.0, 0.4)
BYTES_PER_S, LATENCY_S = 50e6 / 8, 2e-3
TORCH_ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432"
    ":glibc.malloc.trim_threshold=67108864"
}
"""What our agents set too: else each array's pages would be faulted in anew."""
TRIED = 3
"""Cuts that torch is run with before the best is kept."""
LOSS_TOLERANCE = 1e-3
"""Relative, each of the first steps: float32 sums in another order."""


# Torch's side -------------------------------------------------------------------------------------


class TorchError(RuntimeError):
    """A torch process ended; its own words went to standard error."""


class Peers:
    """The processes of one torch run, reused by command after command."""

    def __init__(self, python: str, world: int, cores: Sequence[int | None], store: str) -> None:
        self.processes = []
        for rank in range(world):
            config = {"rank": rank, "world": world, "core": cores[rank], "store": store}
            self.processes.append(
                subprocess.Popen(
                    [python, str(Path(__file__).with_name("_torch_peer.py")), json.dumps(config)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, **TORCH_ENVIRONMENT},
                )
            )

    def do(self, what: str, **values: Any) -> list[dict[str, Any]]:
        """One command to all; their answers by rank."""
        line = json.dumps({"do": what, **values}) + "\n"
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
        answers = []
        for process in self.processes:
            assert process.stdout is not None
            answer = process.stdout.readline()
            if not answer:
                raise TorchError(f"a torch process ended with status {process.wait()}")
            answers.append(json.loads(answer))
        return answers

    def close(self) -> None:
        """Ends them."""
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def peers(python: str, world: int, cores: Sequence[int | None], folder: str) -> Iterator[Peers]:
    """Torch processes that end with the block."""
    with tempfile.NamedTemporaryFile(dir=folder) as store:
        name = store.name + "-store"
    made = Peers(python, world, cores, name)
    try:
        yield made
    finally:
        made.close()


@dataclass(slots=True)
class TorchJob:
    """A workload as torch's processes read it."""

    work: Workload
    folder: str
    channels_last: bool = False
    """Found by trying."""

    def write(self) -> None:
        """Initial parameters, and batches in the order in which ours are drawn."""
        job, data = self.work.job, self.work.data
        inputs, _ = job.microbatch_specs(data.batch(0))
        names = [layer.name for layer in job.model.layers]
        arrays = {
            f"{names.index(layer)}|{layer}|{path}": value
            for (role, layer, path), value in initial_arrays(job, inputs).items()
            if role == "param"
        }
        np.savez(f"{self.folder}/parameters.npz", **arrays)
        count = len(self.work.inputs) // job.batch_size
        batches = [data.batch(step) for step in range(count)]
        np.savez(
            f"{self.folder}/data.npz",
            inputs=np.concatenate([x for x, _ in batches]),
            targets=np.concatenate([y for _, y in batches]),
        )

    def load(self, group: Peers, *, cut: int, speeds: Sequence[float] = (1.0, 1.0), **more: Any):
        """Sets the job up anew: from its initial parameters."""
        layers = len(self.work.job.model.layers)
        return group.do(
            "load",
            **{"channels_last": self.channels_last, **more},
            parameters=f"{self.folder}/parameters.npz",
            data=f"{self.folder}/data.npz",
            microbatches=MICROBATCHES,
            batch=self.work.job.batch_size,
            learning_rate=LEARNING_RATE,
            settings={"pooled": POOLED, "heads": HEADS},
            cuts=[0, cut, layers],
            speeds=list(speeds),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How torch is run: found by trying."""

    cut: int
    speeds: tuple[float, float]
    compile: bool = False


def ranked(
    layers: list[list[float]], orders: Sequence[tuple[float, float]], link: tuple[float, float]
) -> list[Setting]:
    """All cuts and orders, the shortest predicted 1F1B step first."""
    rate, latency_s = link
    schedule = make_schedule("1f1b", 2, MICROBATCHES)
    found = []
    for speeds in orders:
        for cut in range(1, len(layers)):
            upper, lower = np.sum(layers[:cut], 0) / speeds[0], np.sum(layers[cut:], 0) / speeds[1]
            transfer_s = layers[cut - 1][2] / rate
            # What torch sends back is as large as what it sent.
            times = CutTimes(
                forward_latency_s=latency_s, forward_transfer_s=transfer_s,
                backward_latency_s=latency_s, backward_transfer_s=transfer_s,
            )  # fmt: skip
            stages = [
                StageTimes(forward_s=float(part[0]), backward_s=float(part[1]))
                for part in (upper, lower)
            ]
            step_s = evaluate(schedule, stages, [times]).step_s
            found.append((step_s, Setting(cut=cut, speeds=speeds)))
    return [setting for _, setting in sorted(found, key=lambda pair: pair[0])]


def torch_run(group: Peers, steps: int) -> tuple[float, list[float], list[float]]:
    """(median step seconds after the warm-up, losses, cpu/wall of each process)."""
    answers = group.do("steps", steps=steps)
    seconds = answers[0]["seconds"]
    losses = answers[-1]["losses"]
    return (
        statistics.median(seconds[2:] or seconds), losses, [a["cpu_per_wall"] for a in answers]
    )  # fmt: skip


def best_setting(
    job: TorchJob,
    single: Peers,
    group: Peers,
    orders: Sequence[tuple[float, float]],
    link: tuple[float, float] | None,
    *,
    compiled: bool,
    quick: bool,
) -> Setting:
    """The fastest of the most promising cuts, as run."""
    job.load(single, cut=1, alone=True)
    single.do("layers", repeats=1)
    layers = single.do("layers", repeats=2 if quick else 7)[0]["layers"]
    settings = ranked(layers, orders, link or (1e9, 2e-4))[: 1 if quick else TRIED]
    took = []
    for setting in settings:
        job.load(group, cut=setting.cut, speeds=setting.speeds, link=link)
        took.append((torch_run(group, 2 if quick else 3)[0], setting))
    step_s, best = min(took, key=lambda pair: pair[0])
    if compiled:
        job.load(group, cut=best.cut, speeds=best.speeds, link=link, compile=True)
        if torch_run(group, 4)[0] < step_s:
            return dataclasses.replace(best, compile=True)
    return best


def is_worth_it(option: str, job: TorchJob, python: str, folder: str) -> bool:
    """Whether an option (`compile` needs a C++ compiler) works here and is faster on one core."""
    with peers(python, 1, [None], folder) as single:
        took = []
        for on in (False, True):
            try:
                job.load(single, cut=1, alone=True, **{option: on})
                took.append(torch_run(single, 6)[0])
            except TorchError:
                print(f"torch: {option} does not work here", flush=True)
                return False
    print(f"{job.work.name}: torch with {option} / without {took[1] / took[0]:.3f}", flush=True)
    return took[1] < took[0]


# Both ---------------------------------------------------------------------------------------------


def compare_equal(
    job: TorchJob, crew: Any, single: Peers, pair: Peers, options: Any, compiled: bool, runs: str
) -> list[Figure]:
    """A core each; also each side against its own single core."""
    work, steps = job.work, 3 if options.quick else options.steps
    setting = best_setting(
        job, single, pair, [(1.0, 1.0)], None, compiled=compiled, quick=options.quick
    )
    plan = best_plan(work, crew.crowd, schedule="eager", min_stages=2)
    alone = one_stage(work, crew.crowd.devices[0].id)
    print(f"{work.name}: torch {setting}, ours {_layers(plan)}", flush=True)
    job.load(single, cut=1, alone=True, compile=compiled)
    job.load(pair, cut=setting.cut, compile=setting.compile)
    torch_s: dict[str, list[float]] = {"one": [], "two": []}
    ours: dict[str, list[Trained]] = {"one": [], "two": []}
    busy: list[float] = []
    for repeat in range(options.repeats + 1):
        row = {
            "one": torch_run(single, steps),
            "two": torch_run(pair, steps),
        }
        mine = {
            "one": train(crew, work, alone, steps=steps, runs_dir=runs, measure=False),
            "two": train(crew, work, plan, steps=steps, runs_dir=runs, measure=False),
        }
        if repeat == 0:
            check_losses(work.name, mine["two"].losses, row["two"][1])
            continue
        for name in ("one", "two"):
            torch_s[name].append(row[name][0])
            ours[name].append(mine[name])
        busy.append(sum(row["two"][2]))
    ours_s = {name: [t.step_s for t in each] for name, each in ours.items()}
    rows = work.job.batch_size
    name = work.name
    return [
        ratio(f"{name}: samples/s, ours / torch", torch_s["two"], ours_s["two"], at_least=1.15),
        ratio(f"{name}: ours, two cores / one", ours_s["one"], ours_s["two"]),
        ratio(f"{name}: torch, two cores / one", torch_s["one"], torch_s["two"]),
        ratio(f"{name}: one core, ours / torch", torch_s["one"], ours_s["one"]),
        figure(f"{name}: ours", [rows / s for s in ours_s["two"]], unit="samples/s"),
        figure(f"{name}: torch", [rows / s for s in torch_s["two"]], unit="samples/s"),
        figure(f"{name}: ours, cpu / wall of both", [t.cpu_s / t.wall_s for t in ours["two"]]),
        figure(f"{name}: torch, cpu / wall of both", busy),
    ]


def compare_unequal(
    job: TorchJob, crew: Any, single: Peers, pair: Peers, options: Any, compiled: bool, runs: str
) -> list[Figure]:
    """Speeds 1 and 0.4 and a slow link."""
    work, steps = job.work, 3 if options.quick else options.steps
    link = (BYTES_PER_S, LATENCY_S)
    speeds = tuple(device.speed for device in crew.crowd.devices)
    orders = [(speeds[0], speeds[1]), (speeds[1], speeds[0])]
    setting = best_setting(job, single, pair, orders, link, compiled=compiled, quick=options.quick)
    plan = best_plan(work, crew.crowd, schedule="eager", min_stages=2)
    print(f"{work.name}: torch {setting}, ours {_layers(plan)}", flush=True)
    job.load(single, cut=1, alone=True, speeds=(speeds[0],), compile=compiled)
    job.load(pair, cut=setting.cut, speeds=setting.speeds, link=link, compile=setting.compile)
    torch_s: list[float] = []
    alone_s: list[float] = []
    ours: list[Trained] = []
    for repeat in range(options.repeats + 1):
        theirs = torch_run(pair, steps)
        alone = torch_run(single, 2)
        mine = train(crew, work, plan, steps=steps, runs_dir=runs, measure=False)
        if repeat == 0:
            check_losses(work.name, mine.losses, theirs[1])
            continue
        torch_s.append(theirs[0])
        alone_s.append(alone[0])
        ours.append(mine)
    ours_s = [t.step_s for t in ours]
    name, rows = f"{work.name}, unequal", work.job.batch_size
    return [
        ratio(f"{name}: samples/s, ours / torch", torch_s, ours_s, at_least=1.3),
        ratio(f"{name}: ours / torch on the fast device alone", alone_s, ours_s),
        figure(f"{name}: ours", [rows / s for s in ours_s], unit="samples/s"),
        figure(f"{name}: torch", [rows / s for s in torch_s], unit="samples/s"),
    ]


def check_losses(name: str, ours: Sequence[float], theirs: Sequence[float]) -> None:
    """Both trained the same net on the same data, or nothing here means anything."""
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if abs(a - b) > LOSS_TOLERANCE * abs(b):
            raise SystemExit(f"{name}, step {step}: losses differ, ours {a}, torch {b}")
    print(f"{name}: losses agree, {ours[-1]:.6f} and {theirs[-1]:.6f}", flush=True)


def _layers(plan: cm.PipelinePlan) -> str:
    return ", ".join(
        f"{s.device} {s.first_layer}-{s.last_layer} warm-up {s.warmup}" for s in plan.stages
    )


def main() -> None:
    options = arguments(__doc__, steps=5, torch_python=str(TORCH_PYTHON), nets=",".join(WORKLOADS))
    python = options.torch_python
    if not Path(python).exists():
        sys.exit(f"no {python}: `make bench` makes it, or give --torch-python a Python with torch")
    version = subprocess.run(
        [python, "-c", "import torch; print(torch.__version__)"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None, None]
    if len(cores) < 2:
        sys.exit("two cores are needed")
    link = {"bandwidth_bytes_per_s": BYTES_PER_S, "latency_s": LATENCY_S}
    equal: list[Figure] = []
    unequal: list[Figure] = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        crew = stack.enter_context(cm.launch(cm.Crowd.local((1.0, 1.0))))
        slow_crew = stack.enter_context(cm.launch(cm.Crowd.local(SPEEDS, **link)))
        single = stack.enter_context(peers(python, 1, cores[:1], folder))
        pair = stack.enter_context(peers(python, 2, cores[:2], folder))
        # As our emulated agents: on any core.
        free_single = stack.enter_context(peers(python, 1, [None], folder))
        free_pair = stack.enter_context(peers(python, 2, [None, None], folder))
        for net in options.nets.split(","):
            # Steps enough in the data that losses are compared before rows come again.
            work = workload(net, quick=options.quick, batches=options.steps)
            job = TorchJob(work, folder)
            job.write()
            is_image = work.inputs.ndim == 4
            job.channels_last = is_image and is_worth_it("channels_last", job, python, folder)
            compiled = not options.quick and is_worth_it("compile", job, python, folder)
            for compare, group, sink in (
                (compare_equal, (crew, single, pair), equal),
                (compare_unequal, (slow_crew, free_single, free_pair), unequal),
            ):
                figures = compare(job, *group, options, compiled, folder)
                for each in figures:
                    print(each.line(), flush=True)
                sink += figures
    report(
        "torch_pipeline",
        "Schedule1F1B on gloo and this package, two processes, a thread each, M=8, SGD, float32",
        equal + unequal,
        quick=options.quick,
        settings={"steps": options.steps, "unequal": {"speeds": SPEEDS, **link}},
        versions={"torch": version},
    )


if __name__ == "__main__":
    main()
