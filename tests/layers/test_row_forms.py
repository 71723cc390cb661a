import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from tkfac_jax.layers.layer_call import LayerCall, observing
from tkfac_jax.linalg.factor_structure import SMALLEST_IN_STRIPS as SMALL
from tkfac_jax.linalg.factor_structure import Structure, dense, moment

CONVOLUTIONS = {
    "plain": {},
    "stride": {"strides": 2},
    "uneven strides": {"strides": (2, 3)},
    "valid": {"padding": "VALID"},
    "valid stride": {"padding": "VALID", "strides": (3, 2)},
    "circular": {"padding": "CIRCULAR"},
    "circular stride": {"padding": "CIRCULAR", "strides": 2},
    "reflect": {"padding": "REFLECT"},
    "one number": {"padding": 1},
    "explicit": {"padding": ((2, 0), (1, 3))},
    "mixed": {"padding": (2, (0, 1)), "strides": 2},
    "dilation": {"kernel_dilation": 2},
    "everything": {"kernel_dilation": (2, 1), "strides": (1, 2), "padding": ((1, 2), (0, 1))},
}


def rows_of(model, params, x):
    """The rows of a layer, with its output as the output's gradient; and the output, all as one program."""

    @jax.jit
    def run(params, x):
        calls = []

        def observe(call):
            calls.append(call.layer)
            return call.layer.output

        with observing(observe):
            output = model.apply({"params": params}, x)
        (layer,) = calls
        assert isinstance(layer, LayerCall)
        return layer.form.rows(layer.inputs, output), output

    (rows, gradients), output = jax.tree.map(np.asarray, run(params, x))
    return rows, gradients, output


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("window", [(3, 3), (2, 3), (1, 1)])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_rows_times_kernel_is_the_convolution(name, window, use_bias):
    options = CONVOLUTIONS[name]
    model = nn.Conv(3, window, use_bias=use_bias, dtype=jnp.float64, **options)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 6, 2))
    kernel, bias = rng.normal(size=(*window, 2, 3)), rng.normal(size=3)
    params = {"kernel": kernel, "bias": bias} if use_bias else {"kernel": kernel}

    rows, gradients, expected = rows_of(model, params, x)
    product = rows @ kernel.reshape(-1, 3) + (bias if use_bias else 0)
    np.testing.assert_allclose(product, expected.reshape(2, -1, 3), rtol=1e-12, atol=1e-12)

    broadcast = [
        v if isinstance(v, tuple) else (v, v)
        for v in (options.get("strides", 1), options.get("kernel_dilation", 1))
    ]
    patches = np.stack(
        [
            oracles.patches(
                image, window, broadcast[0], options.get("padding", "SAME"), broadcast[1]
            )
            for image in x
        ]
    )
    np.testing.assert_array_equal(rows, patches)
    np.testing.assert_array_equal(gradients, expected.reshape(2, -1, 3))


def test_negative_padding_crops():
    model = nn.Conv(1, (2, 2), padding=((-1, 0), (0, -2)), use_bias=False, dtype=jnp.float64)
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, 6, 6, 1)), rng.normal(size=(2, 2, 1, 1))
    rows, _, expected = rows_of(model, {"kernel": kernel}, x)
    np.testing.assert_allclose((rows @ kernel.reshape(-1, 1)).ravel(), expected.ravel(), rtol=1e-12)


@pytest.mark.parametrize(
    ("shape", "expected"), [((3,), (1, 1, 3)), ((5, 3), (5, 1, 3)), ((5, 2, 6, 3), (5, 12, 3))]
)
def test_axes_between_batch_and_features_are_locations(shape, expected):
    model = nn.Dense(2)
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    params = {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(2, np.float32)}
    rows, _, _ = rows_of(model, params, x)
    assert rows.shape == expected
    assert rows.dtype == jnp.float32
    np.testing.assert_array_equal(rows.reshape(shape), x)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize(
    "structure",
    [
        *map(Structure.of_size, (2, SMALL - 1, SMALL, SMALL + 1, 5 * SMALL // 2)),
        Structure.of_size(5, 2, "blocks"),
        Structure.of_size(5, 2, "diagonal"),
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [7, SMALL])
def test_moments(structure, count, batch, homogeneous):
    """Also where they are put together from strips, and with a last entry of 1 that is not among the rows."""
    rng = np.random.default_rng(0)
    rows, weights = rng.normal(size=(*batch, count, structure.size)), rng.random((*batch, count))
    given = rows
    if homogeneous:
        rows[..., -1] = 1
        given = rows[..., :-1]
    received = moment(structure, jnp.asarray(given), jnp.asarray(weights))
    expected = np.einsum("...n,...ni,...nj->...ij", weights, rows, rows)
    if structure.kind == "diagonal":
        expected = np.diagonal(expected, axis1=-2, axis2=-1)
    if structure.kind == "blocks":
        block = np.arange(structure.size) // structure.block
        expected = np.where(block[:, None] == block, expected, 0)
        received = dense(structure, received)
    np.testing.assert_allclose(received, expected, rtol=1e-12, atol=1e-12)
