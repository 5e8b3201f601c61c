"""GPT-2: a decoder-only transformer, one layer of the chain for each block, tied embedding.

Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019). The default
shape is the small model's: 124,439,808 parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ...errors import ModelError
from ..staged import StagedModel

SCALE = nn.initializers.normal(0.02)


class Embed(nn.Module):
    """Token and position embeddings: int (rows, tokens) to (rows, tokens, width)."""

    vocab: int
    context: int
    width: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool) -> jax.Array:
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(f"{length} tokens, but the context holds {self.context}")
        table = self.param("table", SCALE, (self.vocab, self.width))
        positions = self.param("positions", SCALE, (self.context, self.width))
        x = jnp.take(table, tokens, axis=0) + positions[None, :length]
        return nn.Dropout(self.dropout, deterministic=not train)(x.astype(self.dtype))


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each behind a norm and beside a skip."""

    heads: int
    depth: int
    """Blocks in the model: the last weights of each branch start smaller by sqrt(2 depth)."""
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        width = x.shape[-1]
        last = nn.initializers.normal(0.02 / (2 * self.depth) ** 0.5)

        def drop(y: jax.Array) -> jax.Array:
            return nn.Dropout(self.dropout, deterministic=not train)(y)

        def dense(features: int, name: str, init: Any = SCALE) -> nn.Dense:
            return nn.Dense(features, kernel_init=init, dtype=self.dtype, name=name)

        y = dense(3 * width, "qkv")(nn.LayerNorm(1e-5, dtype=self.dtype, name="norm1")(x))
        x = x + drop(dense(width, "merge", last)(self._attend(y, drop)))
        y = dense(4 * width, "up")(nn.LayerNorm(1e-5, dtype=self.dtype, name="norm2")(x))
        return x + drop(dense(width, "down", last)(nn.gelu(y)))

    def _attend(self, qkv: jax.Array, drop: Any) -> jax.Array:
        rows, length, three = qkv.shape
        size = three // 3 // self.heads
        q, k, v = jnp.moveaxis(qkv.reshape(rows, length, 3, self.heads, size), 2, 0)
        scores = jnp.einsum("rqhs,rkhs->rhqk", q, k) / size**0.5
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
        # float32: sums over a long context lose too much in bfloat16.
        scores = jnp.where(causal, scores.astype(jnp.float32), -1e9)
        weights = drop(jax.nn.softmax(scores, axis=-1).astype(self.dtype))
        return jnp.einsum("rhqk,rkhs->rqhs", weights, v).reshape(rows, length, three // 3)


class Head(nn.Module):
    """Logits, float32: the output embedding is a table (vocab, width), tied or its own."""

    vocab: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        table = self.param("table", SCALE, (self.vocab, x.shape[-1]))
        logits = jnp.einsum("rtw,vw->rtv", x, table.astype(self.dtype))
        return logits.astype(jnp.float32)


def gpt2(
    vocab: int = 50257,
    context: int = 1024,
    width: int = 768,
    heads: int = 12,
    depth: int = 12,
    dropout: float = 0.1,
    tied: bool = True,
    dtype: Any = jnp.float32,
) -> StagedModel:
    """`depth + 3` layers: embed, block0 .., norm, head. Input: int tokens, (rows, up to context).

    Args:
        vocab: Number of tokens; outputs are logits (rows, tokens, vocab), float32.
        context: Longest input, in tokens.
        width: Numbers per token inside; a multiple of `heads`.
        dropout: As in the paper, on embeddings, attention weights and both branches.
        tied: The head borrows the embedding's table; it counts, and is updated, once.
        dtype: Of the computation; parameters are float32.
    """
    if width % heads:
        raise ModelError(f"gpt2: width {width} is not a multiple of heads {heads}")
    modules: list[nn.Module] = [
        Embed(vocab, context, width, dropout, dtype),
        *[Block(heads, depth, dropout, dtype)] * depth,  # one module, traced once
        nn.LayerNorm(1e-5, dtype=dtype),
        Head(vocab, dtype),
    ]
    names = ["embed", *(f"block{i}" for i in range(depth)), "norm", "head"]
    borrows: Mapping[str, Mapping[str, tuple[str, str]]] = {}
    if tied:
        borrows = {"head": {"table": ("embed", "table")}}
    return StagedModel.from_linen(modules, names, borrows=borrows, name="gpt2")
