"""The convolutional networks of the benchmarks, in Flax Linen, as the literature defines them for CIFAR."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

WIDTHS = (16, 32, 64)
# Channels of VGG16's convolutions; a pool stands after each group.
VGG16_GROUPS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def _norm(train: bool) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)


def _conv(features: int, strides: int = 1, *, bias: bool = False) -> nn.Conv:
    """A 3 x 3 convolution, initialised as He et al. 2015."""
    return nn.Conv(
        features,
        (3, 3),
        strides=strides,
        padding=((1, 1), (1, 1)),
        use_bias=bias,
        kernel_init=nn.initializers.he_normal(),
    )


class ResidualBlock(nn.Module):
    """Two convolutions with BatchNorm, and a shortcut without parameters (option A of He et al.)."""

    features: int
    strides: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Features `(batch, height / strides, width / strides, features)`."""
        y = nn.relu(_norm(train)(_conv(self.features, self.strides)(x)))
        y = _norm(train)(_conv(self.features)(y))
        shortcut = x[:, :: self.strides, :: self.strides]
        missing = self.features - x.shape[-1]
        shortcut = jnp.pad(
            shortcut, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2))
        )
        return nn.relu(y + shortcut)


class ResNet(nn.Module):
    """The residual network for CIFAR of He et al. 2016, section 4.2, of `6 n + 2` layers.

    Attributes:
      depth: number of layers with kernels, such as 20 or 32.
      classes: number of outputs.
      widths: channels of the three stages; 64, 128 and 256 in the code that accompanies the paper.
    """

    depth: int = 20
    classes: int = 10
    widths: tuple[int, ...] = WIDTHS

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits `(batch, classes)` of images `(batch, height, width, channels)`."""
        blocks, rest = divmod(self.depth - 2, 2 * len(self.widths))
        if rest:
            msg = f"depth={self.depth}; expected {2 * len(self.widths)} n + 2 layers."
            raise ValueError(msg)
        x = nn.relu(_norm(train)(_conv(self.widths[0])(x)))
        for stage, features in enumerate(self.widths):
            for block in range(blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                x = ResidualBlock(features, strides)(x, train)
        return nn.Dense(self.classes)(x.mean(axis=(1, 2)))


class VGG16(nn.Module):
    """VGG16 for CIFAR: 13 convolutions with BatchNorm (Simonyan and Zisserman 2015, D) and one dense layer.

    Attributes:
      classes: number of outputs.
      width: channels, as a multiple of those of the paper.
    """

    classes: int = 10
    width: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Logits `(batch, classes)` of images `(batch, 32, 32, channels)`."""
        for group in VGG16_GROUPS:
            for features in group:
                x = nn.relu(_norm(train)(_conv(round(features * self.width), bias=True)(x)))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(self.classes)(x.reshape(len(x), -1))


def predict_with_batch_stats(model: nn.Module) -> Any:
    """`predict(params, batch_stats, images) -> (logits, batch_stats)` of a network with BatchNorm, in training mode."""

    def predict(params: Any, batch_stats: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        logits, new = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        return logits, new["batch_stats"]

    return predict
