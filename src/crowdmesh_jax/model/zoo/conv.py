"""What the zoo's convolutional models share: convolution with BatchNorm, pooling, input checks.

Padding is spelled out as PyTorch's `padding=kernel // 2`: "SAME" pads strided convolutions on the
other side, and published weights would no longer fit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

BATCH_NORM_MOMENTUM = 0.9
"""Share of the old statistics that is kept; PyTorch writes the same as momentum=0.1."""
BATCH_NORM_EPSILON = 1e-5
HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ConvNorm(nn.Module):
    """Convolution without bias, then BatchNorm; square kernel, odd, padded by half of it.

    Parameters: `conv/kernel` (height, width, inputs / groups, features), `norm/scale`, `norm/bias`;
    state: `batch_stats/norm/mean` and `.../var`.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        around = (self.kernel // 2, self.kernel // 2)
        x = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            (self.stride, self.stride),
            (around, around),
            feature_group_count=self.groups,
            use_bias=False,
            kernel_init=HE_FAN_OUT,
            name="conv",
        )(x)
        return batch_norm(train, "norm")(x)


def batch_norm(train: bool, name: str) -> nn.BatchNorm:
    """BatchNorm over all axes but the last, with PyTorch's defaults."""
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=BATCH_NORM_MOMENTUM,
        epsilon=BATCH_NORM_EPSILON,
        name=name,
    )


def mean_over_places(x: jax.Array) -> jax.Array:
    """Global average pooling: (rows, places..., channels) to (rows, channels)."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))


def check_images(x: jax.Array) -> None:
    """Refuses what is no batch of images with channels last.

    Raises:
        ValueError: Shape and what is wrong with it; `StagedModel.specs` names the layer.
    """
    if x.ndim != 4:
        raise ValueError(f"images are (rows, height, width, channels), got shape {x.shape}")
    if x.shape[1] in (1, 3) and x.shape[1] < min(x.shape[2:]):
        raise ValueError(
            f"images are (rows, height, width, channels), got shape {x.shape}, which has its"
            " channels first; use numpy.moveaxis(images, 1, -1)"
        )
