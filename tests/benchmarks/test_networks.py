"""The benchmarks' networks have as many parameters as the literature says."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.networks import VGG16, ResNet

pytestmark = pytest.mark.benchmark

IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


def parameters(model):
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), IMAGES)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


# He et al. 2016, table 6, says 0.27M, 0.46M, 0.66M, 0.85M and 1.7M; the exact counts are those of the
# implementations that follow it, batch normalisation's scale and shift counted. VGG16 with batch normalisation
# and biases: 14,728,266.
@pytest.mark.parametrize(
    ("model", "count"),
    [
        (ResNet(20), 269_722),
        (ResNet(32), 464_154),
        (ResNet(44), 658_586),
        (ResNet(56), 853_018),
        (ResNet(110), 1_727_962),
        (VGG16(), 14_728_266),
        (ResNet(20, classes=100), 269_722 + 90 * 65),
        (VGG16(classes=100), 14_728_266 + 90 * 513),
    ],
)
def test_as_many_parameters_as_published(model, count):
    assert parameters(model) == count


def test_the_wide_network_has_four_times_the_channels():
    kernels = 9 * (3 * 64 + 6 * 64**2 + 64 * 128 + 5 * 128**2 + 128 * 256 + 5 * 256**2)
    norms = 2 * (7 * 64 + 6 * 128 + 6 * 256)
    assert parameters(ResNet(20, widths=(64, 128, 256))) == kernels + norms + 256 * 10 + 10


def test_a_depth_that_is_none():
    with pytest.raises(ValueError, match="depth=21; expected 6 n \\+ 2 layers"):
        parameters(ResNet(21))
