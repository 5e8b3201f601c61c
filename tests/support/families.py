"""Exactness families: tiny models of each kind that the package promises to train exactly.

`family(name)` gives a model with its loss and random data; `job(...)` and `batch(...)` make what a
test needs. All have four layers or more, so that they can be cut, and compile fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from crowdmesh_jax.model import StagedModel, TrainingJob, losses
from crowdmesh_jax.model.zoo import gpt2, lenet, mlp

Maker = Callable[[np.random.Generator, int], Any]
VOCAB, TOKENS, CLASSES = 13, 5, 4


@dataclass(frozen=True)
class Family:
    """A model, its loss, and makers of random inputs and targets of `rows` rows."""

    name: str
    model: StagedModel
    loss: Callable[[Any, Any], Any]
    inputs: Maker
    targets: Maker
    metrics: Mapping[str, Any]

    def job(
        self, optimizer: Any, *, batch_size: int = 8, microbatches: int = 4, **fields: Any
    ) -> TrainingJob:
        """A job on this model; `fields` go to `TrainingJob`."""
        return TrainingJob(
            self.model,
            self.loss,
            optimizer,
            batch_size,
            microbatches,
            **{"metrics": self.metrics, **fields},
        )

    def batch(self, batch_size: int = 8, *, seed: int = 0, step: int = 0) -> tuple[Any, Any]:
        """(inputs, targets) of a step, numpy trees; the same for the same arguments."""
        rng = np.random.default_rng([seed, step])
        return self.inputs(rng, batch_size), self.targets(rng, batch_size)

    def source(self, batch_size: int = 8, *, seed: int = 0) -> FamilySource:
        """An endless data source: `source.batch(step)`."""
        return FamilySource(self, batch_size, seed)


@dataclass(frozen=True)
class FamilySource:
    """Random batches by step; each step has numbers of its own."""

    family: Family
    batch_size: int
    seed: int

    def batch(self, step: int) -> tuple[Any, Any]:
        return self.family.batch(self.batch_size, seed=self.seed, step=step)


# Data


def floats(*shape: int) -> Maker:
    return lambda rng, rows: rng.normal(size=(rows, *shape)).astype(np.float32)


def tokens(rng: np.random.Generator, rows: int) -> np.ndarray:
    return rng.integers(0, VOCAB, (rows, TOKENS)).astype(np.int32)


def classes(rng: np.random.Generator, rows: int) -> np.ndarray:
    return rng.integers(0, CLASSES, rows).astype(np.int32)


def masked_tokens(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    mask = (rng.random((rows, TOKENS)) < 0.7).astype(np.float32)
    mask[0, 0] = 1.0  # a batch without any weight is another test's business
    return {"labels": tokens(rng, rows), "mask": mask}


# Modules


class Encode(nn.Module):
    """One step down of a U-net: keeps its input for the way up."""

    depth: int

    @nn.compact
    def __call__(self, carry: dict[str, Any]) -> dict[str, Any]:
        x = carry["x"]
        y = nn.tanh(nn.Dense(6)(x) + 0.1 * carry["position"])
        return {**carry, "x": y, f"skip{self.depth}": x, "level": carry["level"] + 1}


class Decode(nn.Module):
    """One step up: takes what `Encode` kept out of the carry."""

    depth: int

    @nn.compact
    def __call__(self, carry: dict[str, Any]) -> dict[str, Any]:
        rest = {k: v for k, v in carry.items() if k != f"skip{self.depth}"}
        both = jnp.concatenate([carry["x"], carry[f"skip{self.depth}"]], axis=-1)
        level = carry["level"].astype(jnp.float32)[:, None]
        return {**rest, "x": nn.relu(nn.Dense(6)(both)) / level, "level": carry["level"] - 1}


class UnetHead(nn.Module):
    @nn.compact
    def __call__(self, carry: dict[str, Any]) -> jax.Array:
        return nn.Dense(CLASSES)(carry["x"])


class TokenEmbed(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Embed(VOCAB, self.width)(x)


class Recurrent(nn.Module):
    """An LSTM over the tokens: a scan inside a layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.RNN(nn.OptimizedLSTMCell(x.shape[-1]))(x)


class Table(nn.Module):
    """A vocabulary's table, which `Lookup` owns and `Echo` and `Logits` borrow."""

    width: int = 8

    def setup(self) -> None:
        self.table = self.param("table", nn.initializers.normal(0.3), (VOCAB, self.width))


class Lookup(Table):
    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.table[tokens]


class Echo(Table):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + nn.tanh(x @ self.table.T) @ self.table


class Logits(Table):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.table.T


class MoE(nn.Module):
    """Top-k mixture of experts with a skip; sows the balance loss."""

    experts: int = 4
    chosen: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        gates = jax.nn.softmax(nn.Dense(self.experts, use_bias=False, name="router")(x))
        best, index = jax.lax.top_k(gates, self.chosen)
        picked = jax.nn.one_hot(index, self.experts)  # (rows, chosen, experts)
        share = jnp.einsum("rc,rce->re", best / best.sum(-1, keepdims=True), picked)
        init = nn.initializers.lecun_normal(batch_axis=(0,))
        up = self.param("up", init, (self.experts, width, 2 * width))
        down = self.param("down", init, (self.experts, 2 * width, width))
        y = jnp.einsum("ref,efw->rew", nn.relu(jnp.einsum("rw,ewf->ref", x, up)), down)
        load = picked.sum(1).mean(0)
        self.sow("losses", "balance", 0.01 * self.experts * jnp.sum(load * gates.mean(0)))
        return x + jnp.einsum("re,rew->rw", share, y)


def nnx_block(width_in: int, width_out: int) -> Callable[..., nnx.Module]:
    def make(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Sequential(
            nnx.Linear(width_in, width_out, rngs=rngs),
            nnx.BatchNorm(width_out, momentum=0.9, rngs=rngs),
            nnx.relu,
            nnx.Dropout(0.2, rngs=rngs),
        )

    return make


# Families


def _unet_inputs(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    return {
        "x": rng.normal(size=(rows, 6)).astype(np.float32),
        "position": rng.normal(size=(rows, 6)).astype(np.float32),
        "level": np.ones(rows, np.int32),
    }


def _transformer(**fields: Any) -> StagedModel:
    return gpt2(vocab=VOCAB, context=8, width=8, heads=2, depth=2, **fields)


def _unet() -> StagedModel:
    names = ["down0", "down1", "up1", "up0", "head"]
    modules = [Encode(0), Encode(1), Decode(1), Decode(0), UnetHead()]
    return StagedModel.from_linen(modules, names, name="unet_skip")


def _shared() -> StagedModel:
    names = ["embed", "echo", "mix", "logits"]
    modules = [Lookup(), Echo(), nn.Dense(8), Logits()]
    borrows = {name: {"table": ("embed", "table")} for name in ("echo", "logits")}
    return StagedModel.from_linen(modules, names, borrows=borrows, name="shared")


def _lstm() -> StagedModel:
    names = ["embed", "lstm0", "lstm1", "head"]
    modules = [TokenEmbed(), Recurrent(), Recurrent(), nn.Dense(VOCAB)]
    return StagedModel.from_linen(modules, names, name="lstm")


def _moe() -> StagedModel:
    names = ["dense", "moe0", "moe1", "head"]
    modules = [nn.Dense(6), MoE(), MoE(), nn.Dense(CLASSES)]
    return StagedModel.from_linen(modules, names, name="moe")


def _nnx() -> StagedModel:
    def head(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Linear(8, CLASSES, rngs=rngs)

    names = ["block0", "block1", "block2", "head"]
    factories = [nnx_block(6, 8), nnx_block(8, 8), nnx_block(8, 8), head]
    return StagedModel.from_nnx(factories, names, name="nnx_batchnorm")


ACCURACY = {"accuracy": losses.accuracy}
CROSS_ENTROPY = losses.softmax_cross_entropy
MASKED = losses.masked_softmax_cross_entropy

_BUILDERS: dict[str, tuple[Callable[[], StagedModel], Any, Maker, Maker]] = {
    "mlp": (lambda: mlp((8, 8, 8), CLASSES), CROSS_ENTROPY, floats(6), classes),
    "lenet": (lambda: lenet(CLASSES, width=2), CROSS_ENTROPY, floats(8, 8, 1), classes),
    "gpt2": (_transformer, CROSS_ENTROPY, tokens, tokens),
    "shared": (_shared, CROSS_ENTROPY, tokens, tokens),
    "masked": (lambda: _transformer(tied=False, dropout=0.0), MASKED, tokens, masked_tokens),
    "unet_skip": (_unet, CROSS_ENTROPY, _unet_inputs, classes),
    "lstm": (_lstm, CROSS_ENTROPY, tokens, tokens),
    "moe": (_moe, CROSS_ENTROPY, floats(6), classes),
    "nnx_batchnorm": (_nnx, CROSS_ENTROPY, floats(6), classes),
    "bf16": (
        lambda: _transformer(tied=False, dtype=jnp.bfloat16), CROSS_ENTROPY, tokens, tokens,
    ),
}  # fmt: skip

FAMILIES = tuple(_BUILDERS)


def family(name: str) -> Family:
    """The family of that name, built anew; `FAMILIES` lists the names."""
    build, loss, inputs, targets = _BUILDERS[name]
    return Family(name, build(), loss, inputs, targets, ACCURACY)
