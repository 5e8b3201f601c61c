"""ResNet-18 and ResNet-50, one layer of the chain for each residual block.

Source: He et al., Deep Residual Learning for Image Recognition (CVPR 2016). Conventions are those
of torchvision, so that its published weights fit: explicit padding, BatchNorm with epsilon 1e-5,
and in the bottleneck the stride in the 3x3 convolution ("v1.5", 4.09 G multiply-accumulates). Only
the running variance differs in training: torchvision corrects it for the sample size, Flax does
not.

A cut inside a block would carry the skip beside the activation: twice the bytes in ResNet-18, a
quarter more in ResNet-50. So a block is not divided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from ..staged import StagedModel
from .conv import ConvNorm, check_images, mean_over_places

EXPANSION = 4
"""Output channels of a bottleneck for each of its inner ones."""


class Stem(nn.Module):
    """First convolution, BatchNorm, ReLU: 7x7 with stride 2, or 3x3 for small images."""

    features: int
    small_inputs: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        check_images(x)
        kernel, stride = (3, 1) if self.small_inputs else (7, 2)
        return nn.relu(ConvNorm(self.features, kernel, stride, name="part1")(x, train))


class Basic(nn.Module):
    """Two 3x3 convolutions beside a skip."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.relu(ConvNorm(self.features, 3, self.stride, name="part1")(x, train))
        y = ConvNorm(self.features, 3, name="part2")(y, train)
        return nn.relu(y + _skip(x, y.shape[-1], self.stride, train))


class Bottleneck(nn.Module):
    """1x1 down, 3x3 (with the stride), 1x1 up to `4 * features` channels, beside a skip."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = nn.relu(ConvNorm(self.features, 1, name="part1")(x, train))
        y = nn.relu(ConvNorm(self.features, 3, self.stride, name="part2")(y, train))
        y = ConvNorm(EXPANSION * self.features, 1, name="part3")(y, train)
        return nn.relu(y + _skip(x, y.shape[-1], self.stride, train))


def _skip(x: jax.Array, features: int, stride: int, train: bool) -> jax.Array:
    """The input itself, or projected where the block changes its shape."""
    if stride == 1 and x.shape[-1] == features:
        return x
    return ConvNorm(features, 1, stride, name="skip")(x, train)


def max_pool(x: jax.Array) -> jax.Array:
    """3x3 with stride 2: halves height and width."""
    around: Any = ((1, 1), (1, 1))  # flax takes it, its annotation knows strings only
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=around)


class Head(nn.Module):
    """Logits; starts as torch.nn.Linear does."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        bound = 1 / math.sqrt(x.shape[-1])

        def uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        return nn.Dense(self.classes, kernel_init=uniform, bias_init=uniform, name="dense")(x)


def resnet18(classes: int = 1000, small_inputs: bool = False, width: int = 64) -> StagedModel:
    """ResNet-18: stem, pool, eight blocks, mean, head. Input: (rows, height, width, channels).

    Args:
        classes: Width of the output, logits. 1000 classes: 11,689,512 parameters.
        small_inputs: The form for 32x32 images: 3x3 stem, no pooling; 10 classes: 11,173,962.
        width: Channels of the first group of blocks; each later group has twice as many.
    """
    return _resnet("resnet18", Basic, (2, 2, 2, 2), classes, small_inputs, width)


def resnet50(classes: int = 1000, small_inputs: bool = False, width: int = 64) -> StagedModel:
    """ResNet-50: stem, pool, sixteen bottlenecks, mean, head.

    Args:
        classes: Width of the output, logits. 1000 classes: 25,557,032 parameters.
        small_inputs: The form for 32x32 images: 3x3 stem, no pooling.
        width: Inner channels of the first group; each later group has twice as many.
    """
    return _resnet("resnet50", Bottleneck, (3, 4, 6, 3), classes, small_inputs, width)


def _resnet(
    name: str,
    block: type[Basic] | type[Bottleneck],
    depths: Sequence[int],
    classes: int,
    small_inputs: bool,
    width: int,
) -> StagedModel:
    """Block `i` of group `g` is called `block{g}_{i}`: torchvision's `layer{g}.{i}`."""
    chain: list[tuple[str, object]] = [("stem", Stem(width, small_inputs))]
    if not small_inputs:
        chain.append(("pool", max_pool))
    for group, depth in enumerate(depths, start=1):
        features = width * 2 ** (group - 1)
        first = 1 if group == 1 else 2
        # Blocks but the first are alike, and one module: what is traced for one serves them all.
        blocks = [block(features, first), *[block(features, 1)] * (depth - 1)]
        chain += [(f"block{group}_{index}", module) for index, module in enumerate(blocks)]
    chain += [("mean", mean_over_places), ("head", Head(classes))]
    names, modules = zip(*chain, strict=True)
    return StagedModel.from_linen(modules, names, name=name)
