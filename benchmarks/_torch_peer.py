"""One process of a `torch.distributed.pipelining` run: the benchmark's other side. Torch only.

Reads commands from standard input, one JSON object a line, and answers each with one. Every
process of a run gets the same commands. Nets are those of `_workloads.py` with the same initial
parameters, taken from a file.

Emulation follows the rules that agents follow (docs/emulation.md). A device of speed v: an op
(forward and loss, backward, update) ends at its start plus (thread CPU seconds) / v. A link: what
is sent occupies it at its rate, one message after another, and arrives a latency later; each
direction has its own. A send counts as done as soon as it is queued, the best that any buffer
could do for the sender.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

# One core, if the parent says which; before torch counts them.
CONFIG = json.loads(sys.argv[1])
if CONFIG.get("core") is not None and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {CONFIG["core"]})

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, schedules  # noqa: E402

torch.set_num_threads(1)

# The nets ----------------------------------------------------------------------------------------


class DenseReLU(nn.Module):
    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.dense(x))


class Conv(nn.Module):
    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, pool: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = conv, norm, pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return F.max_pool2d(x, 2) if self.pool else x


class PooledHead(nn.Module):
    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(x.mean((2, 3)))


class Embed(nn.Module):
    def __init__(self, table: np.ndarray, positions: np.ndarray) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table))
        self.positions = nn.Parameter(torch.tensor(positions))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self.table) + self.positions[None, : tokens.shape[1]]


class Block(nn.Module):
    def __init__(self, heads: int, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.parts = nn.ModuleDict(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        qkv = self.parts["qkv"](self.parts["norm1"](x))
        q, k, v = qkv.view(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.parts["merge"](y.transpose(1, 2).reshape(rows, length, width))
        y = F.gelu(self.parts["up"](self.parts["norm2"](x)), approximate="tanh")
        return x + self.parts["down"](y)


class Head(nn.Module):
    def __init__(self, table: np.ndarray) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.table.T


class Layout(torch.autograd.Function):
    """Another memory format, and back for the gradient: gloo takes plain tensors only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: Any, back: Any) -> torch.Tensor:
        ctx.back = back
        return x.contiguous(memory_format=there)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad.contiguous(memory_format=ctx.back), None, None


class InChannelsLast(nn.Module):
    """A stage of images in `channels_last` inside, plain at its ends."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain, last = torch.contiguous_format, torch.channels_last
        y = self.stage(Layout.apply(x, last, plain) if x.ndim == 4 else x)
        return Layout.apply(y, plain, last) if y.ndim == 4 else y


def linear(given: dict[str, np.ndarray]) -> nn.Linear:
    kernel, bias = given["kernel"], given["bias"]
    made = nn.Linear(*kernel.shape)
    made.weight = nn.Parameter(torch.tensor(np.ascontiguousarray(kernel.T)))
    made.bias = nn.Parameter(torch.tensor(bias))
    return made


def norm(given: dict[str, np.ndarray]) -> nn.LayerNorm:
    made = nn.LayerNorm(len(given["scale"]), eps=1e-5)
    made.weight = nn.Parameter(torch.tensor(given["scale"]))
    made.bias = nn.Parameter(torch.tensor(given["bias"]))
    return made


def convolution(given: dict[str, Any], pool: bool) -> Conv:
    kernel = np.ascontiguousarray(given["Conv_0"]["kernel"].transpose(3, 2, 0, 1))
    out, channels, _, _ = kernel.shape
    conv = nn.Conv2d(channels, out, 3, padding=1, bias=False)
    conv.weight = nn.Parameter(torch.tensor(kernel))
    batch_norm = nn.BatchNorm2d(out, eps=1e-5, momentum=0.1)
    batch_norm.weight = nn.Parameter(torch.tensor(given["BatchNorm_0"]["scale"]))
    batch_norm.bias = nn.Parameter(torch.tensor(given["BatchNorm_0"]["bias"]))
    return Conv(conv, batch_norm, pool)


def build_layer(name: str, given: dict[str, Any], settings: dict[str, Any]) -> nn.Module:
    """A layer by its name in `_workloads.py`."""
    if name.startswith("dense"):
        return DenseReLU(linear(given["Dense_0"]))
    if name.startswith("conv"):
        return convolution(given, int(name[4:]) in settings["pooled"])
    if name == "embed":
        return Embed(given["table"], given["positions"])
    if name.startswith("block"):
        makers = {"norm1": norm, "norm2": norm}
        parts = {part: makers.get(part, linear)(given[part]) for part in given}
        return Block(settings["heads"], parts)
    if name == "norm":
        return norm(given)
    if "table" in given:
        return Head(given["table"])
    return PooledHead(linear(given["Dense_0"])) if "Dense_0" in given else linear(given)


def read_layers(path: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, tree of arrays) of each layer, from an npz whose keys are index|name|path."""
    layers: dict[int, tuple[str, dict[str, Any]]] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            index, name, route = key.split("|")
            tree = layers.setdefault(int(index), (name, {}))[1]
            *parents, leaf = route.split("/")
            for parent in parents:
                tree = tree.setdefault(parent, {})
            tree[leaf] = arrays[key]
    return [layers[index] for index in sorted(layers)]


# Emulation ---------------------------------------------------------------------------------------


class Pace:
    """Ops end at their start plus CPU seconds / speed."""

    def __init__(self, speed: float) -> None:
        self.speed = speed

    def run(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.speed >= 1.0:
            return call(*args, **kwargs)
        start_s, cpu_s = time.monotonic(), time.thread_time()
        result = call(*args, **kwargs)
        left_s = start_s + (time.thread_time() - cpu_s) / self.speed - time.monotonic()
        if left_s > 0:
            time.sleep(left_s)
        return result


class PacedStage(PipelineStage):
    """Forwards and backwards at a device's pace."""

    pace = Pace(1.0)

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        return self.pace.run(super().forward_one_chunk, *args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        return self.pace.run(super().backward_one_chunk, *args, **kwargs)


class Queued:
    """A send that is done for its sender."""

    def wait(self) -> None:
        return


class ShapedSends:
    """Sends to one peer through a link of a rate and a latency."""

    def __init__(self, bytes_per_s: float, latency_s: float) -> None:
        self._rate, self._latency_s = bytes_per_s, latency_s
        self._free_s = 0.0
        self._line: queue.SimpleQueue[tuple[float, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._deliver, daemon=True).start()

    def send(self, op: Any) -> Queued:
        size = op.tensor.numel() * op.tensor.element_size()
        self._free_s = max(time.monotonic(), self._free_s) + size / self._rate
        self._line.put((self._free_s + self._latency_s, op))
        return Queued()

    def _deliver(self) -> None:
        while True:
            arrive_s, op = self._line.get()
            time.sleep(max(0.0, arrive_s - time.monotonic()))
            dist.isend(op.tensor, group=op.group, tag=op.tag, group_dst=op.group_peer).wait()


LINKS: dict[int, ShapedSends] = {}
PLAIN_BATCH = schedules._batch_p2p


def shaped_batch(ops: list[Any], desc: str | None = None) -> list[Any]:
    """Instead of the schedule's own: sends go through the shaped links."""
    link = CONFIG.get("link")
    if link is None:
        return PLAIN_BATCH(ops, desc=desc)
    works: list[Any] = []
    for op in ops:
        if op.op is dist.isend:
            peer = op.group_peer
            if peer not in LINKS:
                LINKS[peer] = ShapedSends(*link)
            works.append(LINKS[peer].send(op))
        else:
            works.append(dist.irecv(op.tensor, group=op.group, tag=op.tag, group_src=op.group_peer))
    return works


schedules._batch_p2p = shaped_batch

# The run -----------------------------------------------------------------------------------------


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.reshape(-1, output.shape[-1]), target.reshape(-1))


class Run:
    """A stage with its data, over all commands that set it up and step it."""

    def __init__(self, command: dict[str, Any]) -> None:
        self.rank, self.world = CONFIG["rank"], CONFIG["world"]
        self.microbatches = command["microbatches"]
        layers = read_layers(command["parameters"])
        cuts = command["cuts"]
        alone = command.get("alone", False)
        first, last = (0, len(layers)) if alone else (cuts[self.rank], cuts[self.rank + 1])
        made = [build_layer(name, tree, command["settings"]) for name, tree in layers[first:last]]
        self.module = nn.Sequential(*made)
        self.layers = made
        if command.get("channels_last"):
            self.module = InChannelsLast(self.module)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=command["learning_rate"])
        with np.load(command["data"]) as arrays:
            self.inputs = torch.tensor(arrays["inputs"])
            self.targets = torch.tensor(arrays["targets"]).long()
        if self.inputs.dtype != torch.float32:
            self.inputs = self.inputs.long()
        if self.inputs.ndim == 4:
            self.inputs = self.inputs.permute(0, 3, 1, 2).contiguous()
        self.batch = command["batch"]
        self.step_index = 0
        self.alone = alone
        self.pace = Pace(command["speeds"][self.rank])
        compiled = torch.compile(self.module) if command.get("compile") else self.module
        self.compiled = compiled
        if not alone:
            # Each device's place in the chain is its rank.
            stage = PacedStage(compiled, self.rank, self.world, torch.device("cpu"))
            stage.pace = self.pace
            self.schedule = Schedule1F1B(
                stage, self.microbatches, loss_fn=lambda o, t: self.pace.run(loss_of, o, t)
            )

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        first = (self.step_index * self.batch) % len(self.inputs)
        return self.inputs[first : first + self.batch], self.targets[first : first + self.batch]

    def step(self) -> float | None:
        """One update; the loss where it is known."""
        inputs, targets = self.rows()
        self.optimizer.zero_grad()
        losses: list[Any] = []
        if self.alone:
            for x, target in zip(
                inputs.chunk(self.microbatches), targets.chunk(self.microbatches), strict=True
            ):
                loss = loss_of(self.compiled(x), target) / self.microbatches
                loss.backward()
                losses.append(loss.detach() * self.microbatches)
        else:
            is_last = self.rank == self.world - 1
            given = (inputs,) if self.rank == 0 else ()
            if is_last:
                self.schedule.step(*given, target=targets, losses=losses, return_outputs=False)
            else:
                self.schedule.step(*given, return_outputs=False)
        self.pace.run(self.optimizer.step)
        self.step_index += 1
        return float(torch.stack(losses).mean().detach()) if losses else None

    def layer_seconds(self, repeats: int) -> list[list[float]]:
        """Per layer its forward and backward CPU seconds for one microbatch, and output bytes."""
        rows = self.inputs[: self.batch // self.microbatches]
        target = self.targets[: self.batch // self.microbatches]
        best: list[list[float]] = []
        for _ in range(repeats):
            x = rows
            took = []
            for index, layer in enumerate(self.layers):
                x = x.detach()
                if x.is_floating_point() and index:
                    x.requires_grad_()
                start_s = time.thread_time()
                y = layer(x)
                loss = loss_of(y, target) if index + 1 == len(self.layers) else None
                middle_s = time.thread_time()
                given = torch.ones_like(y) if loss is None else None
                (y if loss is None else loss).backward(given)
                end_s = time.thread_time()
                took.append([middle_s - start_s, end_s - middle_s, y.numel() * y.element_size()])
                x = y
            best.append(took)
        middle = np.median(np.array(best), axis=0)
        return middle.tolist()


def main() -> None:
    rank, world = CONFIG["rank"], CONFIG["world"]
    if world > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = CONFIG.get("interface", "lo")
        dist.init_process_group(
            "gloo", init_method=f"file://{CONFIG['store']}", rank=rank, world_size=world
        )
    run: Run | None = None
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, Any] = {}
        if command["do"] == "load":
            run = None
            CONFIG["link"] = command.get("link")
            LINKS.clear()
            run = Run(command)
            answer = {"torch": torch.__version__}
        elif command["do"] == "layers":
            assert run is not None
            answer = {"layers": run.layer_seconds(command["repeats"])}
        elif command["do"] == "steps":
            assert run is not None
            seconds, losses = [], []
            if world > 1 and not run.alone:
                dist.barrier()
            cpu_s, start_s = time.process_time(), time.perf_counter()
            for _ in range(command["steps"]):
                step_s = time.perf_counter()
                losses.append(run.step())
                seconds.append(time.perf_counter() - step_s)
            wall_s = time.perf_counter() - start_s
            answer = {
                "seconds": seconds,
                "losses": losses,
                "cpu_per_wall": (time.process_time() - cpu_s) / wall_s,
            }
        print(json.dumps(answer), flush=True)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
