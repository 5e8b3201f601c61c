"""MobileNetV2: one layer of the chain for each inverted residual block.

Source: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks (CVPR 2018).
Conventions are torchvision's (padding, BatchNorm epsilon 1e-5), so that its weights fit. A block is
narrow at both ends and up to six times as wide inside: the chain is cut where it is narrow.
"""

from __future__ import annotations

import jax
from flax import linen as nn

from ...errors import ModelError
from ..staged import StagedModel
from .conv import ConvNorm, check_images, mean_over_places

GROUPS = (
    # expansion, channels, blocks, stride of the first: table 2 of the paper
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM, LAST = 32, 1280


class ConvReLU6(nn.Module):
    """Convolution, BatchNorm, ReLU6; the model's first layer also checks its input."""

    features: int
    kernel: int
    stride: int = 1
    is_first: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if self.is_first:
            check_images(x)
        return nn.relu6(ConvNorm(self.features, self.kernel, self.stride, name="part1")(x, train))


class InvertedResidual(nn.Module):
    """1x1 up, 3x3 depthwise, 1x1 down without an activation; a skip where the shape allows it."""

    features: int
    expansion: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        given = x.shape[-1]
        inner = given * self.expansion
        y = x
        if self.expansion > 1:
            y = nn.relu6(ConvNorm(inner, 1, name="up")(y, train))
        y = nn.relu6(ConvNorm(inner, 3, self.stride, groups=inner, name="depthwise")(y, train))
        y = ConvNorm(self.features, 1, name="down")(y, train)
        return x + y if self.stride == 1 and given == self.features else y


class Head(nn.Module):
    """Dropout and logits."""

    classes: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.01), name="dense")(x)


def mobilenet_v2(
    classes: int = 1000, width: float = 1.0, small_inputs: bool = False, dropout: float = 0.2
) -> StagedModel:
    """21 layers: stem, block0 .. block16, last, mean, head. Input: (rows, height, width, channels).

    Args:
        classes: Width of the output, logits. 1000 classes at width 1: 3,504,872 parameters.
        width: Multiplies all channels, rounded to multiples of 8 as in the paper.
        small_inputs: For images of about 32x32: the stem and the first group that halves do not.
        dropout: Share of the head's inputs dropped in training.
    """
    if not 0 < width <= 16:
        raise ModelError(f"mobilenet_v2: width must be a factor in (0, 16], got {width}")
    chain: list[tuple[str, object]] = [
        ("stem", ConvReLU6(channels(STEM * width), 3, 1 if small_inputs else 2, is_first=True))
    ]
    for group, (expansion, features, depth, stride) in enumerate(GROUPS):
        first = 1 if small_inputs and group == 1 else stride
        features = channels(features * width)
        # Blocks but the first are alike, and one module: what is traced for one serves them all.
        blocks = [
            InvertedResidual(features, expansion, first),
            *[InvertedResidual(features, expansion, 1)] * (depth - 1),
        ]
        chain += [(f"block{len(chain) - 1 + index}", made) for index, made in enumerate(blocks)]
    chain += [
        ("last", ConvReLU6(channels(LAST * max(1.0, width)), 1)),
        ("mean", mean_over_places),
        ("head", Head(classes, dropout)),
    ]
    names, modules = zip(*chain, strict=True)
    return StagedModel.from_linen(modules, names, name="mobilenet_v2")


def channels(wanted: float, multiple: int = 8) -> int:
    """The nearest multiple of 8, never more than a tenth below what is wanted."""
    rounded = max(multiple, int(wanted + multiple / 2) // multiple * multiple)
    return rounded + multiple if rounded < 0.9 * wanted else rounded
