"""Small jobs of each kind of model that stage programs must serve, with data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from crowdmesh_jax.model import Layer, StagedModel, TrainingJob, losses

BATCH = 4


@dataclass(frozen=True)
class Case:
    """A job with a data source."""

    job: TrainingJob
    make: Callable[[np.random.Generator], tuple[Any, Any]]

    def batch(self, step: int) -> tuple[Any, Any]:
        return self.make(np.random.default_rng(step + 1))


class Dense(nn.Module):
    size: int
    act: bool = True

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(self.size)(x)
        return nn.tanh(x) if self.act else x


class ConvNorm(nn.Module):
    size: int

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = nn.Conv(self.size, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dropout(0.2, deterministic=not train)(x)


class Flat(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def job(model: StagedModel, loss: Any = losses.softmax_cross_entropy, **more: Any) -> TrainingJob:
    settings = {"optimizer": optax.sgd(0.1, momentum=0.9), "batch_size": BATCH, "microbatches": 2}
    return TrainingJob(model, loss, **{**settings, "seed": 5, **more})


def mlp(**more: Any) -> Case:
    model = StagedModel.from_linen([Dense(6), Dense(5), Dense(3, act=False)], ["a", "b", "c"])
    return Case(job(model, **more), lambda r: (floats(r, BATCH, 4), r.integers(0, 3, BATCH)))


def conv(**more: Any) -> Case:
    model = StagedModel.from_linen([ConvNorm(3), ConvNorm(2), Flat()], ["a", "b", "c"])
    return Case(job(model, **more), lambda r: (floats(r, BATCH, 6, 6, 2), r.integers(0, 3, BATCH)))


class Embed(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        table = self.param("table", nn.initializers.normal(0.5), (7, 8))
        return table[x]


class Block(nn.Module):
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        h = nn.LayerNorm(**kinds)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, **kinds)(h, h)
        h = nn.Dense(8, **kinds)(nn.gelu(nn.Dense(16, **kinds)(nn.LayerNorm(**kinds)(x))))
        return x + nn.Dropout(0.1, deterministic=not train)(h)


class TiedHead(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        table = self.param("table", nn.initializers.normal(0.5), (7, 8))
        return nn.LayerNorm()(x) @ table.T


def tied(**more: Any) -> Case:
    model = StagedModel.from_linen(
        [Embed(), Block(), TiedHead()],
        ["embed", "block", "head"],
        borrows={"head": {"table": ("embed", "table")}},
    )

    def make(rng: np.random.Generator) -> tuple[Any, Any]:
        tokens = rng.integers(0, 7, (BATCH, 5))
        mask = (rng.random((BATCH, 5)) < 0.7).astype(np.float32)
        return tokens, {"labels": rng.integers(0, 7, (BATCH, 5)), "mask": mask}

    return Case(job(model, losses.masked_softmax_cross_entropy, **more), make)


def bf16(**more: Any) -> Case:
    block = Block(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    compute = Block(dtype=jnp.bfloat16)
    model = StagedModel.from_linen([Embed(), block, compute, Dense(7, act=False)], list("abcd"))
    make = tied().make
    return Case(job(model, losses.masked_softmax_cross_entropy, **more), make)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.RNN(nn.LSTMCell(4))(x)


class LastStep(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3)(x[:, -1])


def lstm(**more: Any) -> Case:
    model = StagedModel.from_linen([Recurrent(), Recurrent(), LastStep()], list("abc"))
    return Case(job(model, **more), lambda r: (floats(r, BATCH, 5, 3), r.integers(0, 3, BATCH)))


class Skip(nn.Module):
    """A carry of floats, integers and a float mask that no gradient belongs to."""

    last: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.tanh(nn.Dense(4)(x["h"])) * x["mask"]
        if self.last:
            return nn.Dense(3)(h + x["skip"])
        return {"h": h, "skip": x["skip"] + h, "ids": x["ids"] + 1, "mask": x["mask"]}


class Start(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.Embed(5, 4)(x["ids"])
        return {"h": h, "skip": h, "ids": x["ids"], "mask": x["mask"]}


def carry(**more: Any) -> Case:
    model = StagedModel.from_linen([Start(), Skip(), Skip(last=True)], list("abc"))

    def make(rng: np.random.Generator) -> tuple[Any, Any]:
        mask = (rng.random((BATCH, 1)) < 0.8).astype(np.float32)
        return {"ids": rng.integers(0, 4, BATCH), "mask": mask}, rng.integers(0, 3, BATCH)

    return Case(job(model, **more), make)


class Sowing(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = nn.tanh(nn.Dense(5)(x))
        self.sow("losses", "size", 0.1 * jnp.mean(y**2))
        return y


def aux(**more: Any) -> Case:
    model = StagedModel.from_linen(
        [Dense(4), Sowing(), Sowing(), Dense(3, act=False)], list("abcd")
    )
    return Case(job(model, **more), lambda r: (floats(r, BATCH, 4), r.integers(0, 3, BATCH)))


def reads_state(**more: Any) -> Case:
    """A layer whose gradient depends on its state (a running scale)."""

    def init(key: Any, x: Any) -> tuple[Any, Any]:
        return {"w": jax.random.normal(key, (4, 4))}, {"scale": jnp.ones(())}

    def apply(params: Any, state: Any, x: Any, key: Any, train: bool) -> tuple[Any, Any, None]:
        y = jnp.tanh(x @ params["w"] * state["scale"])
        return y, {"scale": 0.9 * state["scale"] + 0.1 * jnp.mean(jnp.abs(y))}, None

    model = StagedModel.from_linen(
        [Layer("a", init, apply), Layer("b", init, apply), Dense(3, act=False)], ["a", "b", "c"]
    )
    return Case(job(model, **more), lambda r: (floats(r, BATCH, 4), r.integers(0, 3, BATCH)))


CASES: dict[str, Callable[..., Case]] = {
    "mlp": mlp,
    "conv": conv,
    "tied": tied,
    "bf16": bf16,
    "lstm": lstm,
    "carry": carry,
    "aux": aux,
    "reads_state": reads_state,
}
