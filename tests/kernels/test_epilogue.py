"""Bias and activation after a product: every kernel of qdot that runs here against float64, and their gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqopt_kernels import Epilogue, reference
from tests.kernels.cases import case
from tests.kernels.test_contract import kernel_named

ERF = np.vectorize(math.erf)
BY_DEFINITION = {
    None: lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: z * (1 + ERF(z / math.sqrt(2))) / 2,  # arXiv:1606.08415, section 2
    "gelu_tanh": lambda z: z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
    "silu": lambda z: z / (1 + np.exp(-z)),
}
STEEPEST = 1.13  # the largest slope of all of them: gelu's, at sqrt(2)
# Triton's are in test_triton.py. (kernel, formats, rows, activation)
CASES = [
    ("reference", "nvfp4", 5, None),
    ("reference", "nvfp4", 5, "relu"),
    ("reference", "nvfp4", 5, "gelu"),
    ("reference", "nvfp4", 5, "gelu_tanh"),
    ("reference", "nvfp4", 5, "silu"),
    ("xla_decode", "nvfp4", 5, "gelu"),
    ("xla_lookup", "nvfp4", 5, "gelu"),
    ("xla_row", "nvfp4", 1, "silu"),
    ("xla_tiled", "int4", 5, "relu"),
    ("xla_tiled_bf16", "nvfp4 x nvfp4", 5, "gelu_tanh"),
    ("xla_int8", "int8 x int8", 5, "silu"),
    ("xla_int8_row", "int8 x int8", 1, None),
    ("xla_fp8", "fp8 x fp8", 5, "relu"),
    ("xla_fp8_dot", "fp8_channel x fp8_channel", 5, "gelu"),
    ("ffi_gemm", "nvfp4", 5, "gelu_tanh"),
    ("pallas_gemv", "nvfp4", 2, "gelu"),
    ("pallas_skinny", "nvfp4 x nvfp4", 5, "silu"),
    ("pallas_gemm", "int8", 65, "relu"),
]


@pytest.fixture(autouse=True)
def installed(request):
    if "ffi" in request.node.name:
        request.getfixturevalue("library")


def biased(c, kind=jnp.float32):
    """(bias, what it is in float64)"""
    bias = jnp.asarray(np.random.default_rng(1).normal(size=c.y.shape[1]), kind)
    return bias, np.asarray(bias.astype(jnp.float32), np.float64)


def sized(c):
    """The same product with results of about one, where activations bend."""
    to = np.float32(2.0 ** -round(math.log2(np.abs(c.y).max() or 1)))
    if isinstance(c.lhs, jax.Array):
        x = c.lhs * to
    elif c.lhs.global_scale is not None:
        x = c.lhs._replace(global_scale=c.lhs.global_scale * to)
    elif c.lhs.scale.dtype == jnp.uint8:  # e8m0: exponents
        x = c.lhs._replace(scale=(c.lhs.scale.astype(jnp.int32) + round(math.log2(to))).astype(jnp.uint8))
    else:
        x = c.lhs._replace(scale=c.lhs.scale * to)
    return c._replace(lhs=x, y=c.y * float(to), bound=c.bound * float(to))


@pytest.mark.parametrize(("name", "pair", "m", "activation"), CASES)
def test_equals_numpy(name, pair, m, activation):
    c = sized(case(pair, m, 21, 72))
    bias, exact = biased(c)
    run = kernel_named(name).run
    y = jax.jit(lambda x, w, b: run(x, w, **c.specs, epilogue=Epilogue(b, activation)))(c.lhs, c.rhs, bias)
    z = c.y + exact
    # products, one addition, and an activation within four units in the last place
    allowed = STEEPEST * (c.bound + 2.0**-24 * np.abs(z)) + 2.0**-21 * np.abs(z)
    assert np.all(np.abs(np.asarray(y, np.float64) - BY_DEFINITION[activation](z)) <= allowed)


@pytest.mark.parametrize(
    ("name", "m"), [("reference", 3), ("xla_decode", 3), ("xla_row", 1), ("ffi_gemm", 3), ("pallas_gemv", 3)]
)
def test_gradients(name, m):
    c = sized(case("nvfp4", m, 21, 72))
    bias, exact = biased(c)
    g = np.random.default_rng(2).normal(size=c.y.shape)
    run = kernel_named(name).run

    def total(x, b):
        return jnp.sum(run(x, c.rhs, **c.specs, epilogue=Epilogue(b, "gelu")) * g.astype(np.float32))

    dx, db = jax.jit(jax.grad(total, (0, 1)))(c.lhs, bias)
    w = weight(c)
    z, h, gelu = c.y + exact, 1e-5, BY_DEFINITION["gelu"]
    dz = g * (gelu(z + h) - gelu(z - h)) / (2 * h)
    np.testing.assert_allclose(db, dz.sum(0), rtol=0, atol=1e-5 * np.abs(dz).sum(0).max())
    np.testing.assert_allclose(dx, dz @ w.T, rtol=0, atol=1e-5 * (np.abs(dz) @ np.abs(w).T).max())


def weight(c) -> np.ndarray:
    """[k, n] float64"""
    return np.asarray(reference.dequantize(c.rhs, c.specs["rhs_spec"], 21, 72), np.float64).T


def test_bfloat16_bias_and_results():
    c = sized(case("nvfp4", 5, 21, 72))
    bias, exact = biased(c, jnp.bfloat16)
    y = kernel_named("xla_decode").run(c.lhs, c.rhs, **c.specs, out_dtype=jnp.bfloat16, epilogue=Epilogue(bias, "relu"))
    assert y.dtype == jnp.bfloat16
    want = np.maximum(c.y + exact, 0)
    assert np.all(np.abs(np.asarray(y.astype(jnp.float32)) - want) <= 2.0**-8 * want + 2 * c.bound + 2.0**-22)


def test_a_bias_under_vmap():
    """A bias for each of three products with one weight."""
    c = sized(case("nvfp4", 5, 21, 72))
    biases = jnp.asarray(np.random.default_rng(3).normal(size=(3, 21)), jnp.float32)
    run = kernel_named("xla_decode").run
    ys = jax.vmap(lambda b: run(c.lhs, c.rhs, **c.specs, epilogue=Epilogue(b)))(biases)
    want = c.y + np.asarray(biases, np.float64)[:, None]
    assert np.all(np.abs(np.asarray(ys, np.float64) - want) <= c.bound + 2.0**-22 * (1 + np.abs(want)))


@pytest.mark.parametrize("name", ["reference", "xla_decode", "pallas_gemv", "xla_row"])
def test_what_cannot_be_is_said(name):
    c = case("nvfp4", 1, 21, 72)
    with pytest.raises(ValueError, match="activation 'swish' is unknown; known: relu, gelu, gelu_tanh, silu, or None"):
        kernel_named(name).run(c.lhs, c.rhs, **c.specs, epilogue=Epilogue(None, "swish"))
    with pytest.raises(ValueError, match=r"n=21 columns takes a bias \[21\], not \[20\]"):
        kernel_named(name).run(c.lhs, c.rhs, **c.specs, epilogue=Epilogue(jnp.zeros(20)))
