"""DS-CNN: depthwise separable convolutions that find keywords in a second of sound.

Source: Zhang et al., Hello Edge: Keyword Spotting on Microcontrollers (arXiv:1711.07128, 2017).
With BatchNorm folded into the weights, the sizes have the paper's 22,604, 135,032 and 410,700
weights (its 38.6, 189.2 and 497.6 KB are these, one byte each, and the two largest activations).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import jax
from flax import linen as nn

from ...errors import ModelError
from ..staged import StagedModel
from .conv import batch_norm, mean_over_places


@dataclass(frozen=True, slots=True)
class Size:
    """One row of the paper's table: channels, number of blocks, strides (time, coefficients)."""

    features: int
    blocks: int
    stem_stride: tuple[int, int]
    first_stride: tuple[int, int]
    """Of the first separable block."""


SIZES = MappingProxyType(
    {
        "S": Size(64, 4, (2, 2), (1, 1)),
        "M": Size(172, 4, (2, 1), (2, 2)),
        "L": Size(276, 5, (2, 1), (2, 2)),
    }
)


class Stem(nn.Module):
    """10x4 convolution over (time, coefficients), BatchNorm, ReLU."""

    features: int
    stride: tuple[int, int]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if x.ndim != 4 or x.shape[-1] != 1:
            raise ValueError(
                "spectrograms are (rows, frames, coefficients, 1), 49 x 10 for a second of sound;"
                f" got shape {x.shape}"
            )
        x = nn.Conv(self.features, (10, 4), self.stride, use_bias=False, name="conv")(x)
        return nn.relu(batch_norm(train, "norm")(x))


class Separable(nn.Module):
    """3x3 depthwise and 1x1 convolution, each with BatchNorm and ReLU."""

    stride: tuple[int, int]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        features = x.shape[-1]
        x = nn.Conv(
            features,
            (3, 3),
            self.stride,
            feature_group_count=features,
            use_bias=False,
            name="depthwise",
        )(x)
        x = nn.relu(batch_norm(train, "depthwise_norm")(x))
        x = nn.Conv(features, (1, 1), use_bias=False, name="pointwise")(x)
        return nn.relu(batch_norm(train, "pointwise_norm")(x))


def ds_cnn(classes: int = 12, size: str = "S") -> StagedModel:
    """Stem, separable blocks, mean, head. Input: float (rows, 49 frames, 10 MFCCs, 1).

    Args:
        classes: Width of the output, logits; the paper has ten words, silence and unknown.
        size: "S" (64 channels, 4 blocks), "M" (172, 4) or "L" (276, 5).
    """
    if size not in SIZES:
        raise ModelError(f"ds_cnn: size must be one of {', '.join(SIZES)}; got {size!r}")
    chosen = SIZES[size]
    blocks = [Separable(chosen.first_stride), *[Separable((1, 1))] * (chosen.blocks - 1)]
    modules = [
        Stem(chosen.features, chosen.stem_stride), *blocks, mean_over_places, nn.Dense(classes),
    ]  # fmt: skip
    names = ["stem", *(f"block{index}" for index in range(chosen.blocks)), "mean", "head"]
    return StagedModel.from_linen(modules, names, name="ds_cnn")
