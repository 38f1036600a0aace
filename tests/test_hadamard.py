"""Hadamard transforms: the matrices' defining properties, the fast product against them, what can't be had."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqopt import _hadamard as hadamard
from jqopt.errors import PlanError

# Sylvester, Paley I over a prime and over 27, 343; Paley II over a prime and over 9, 25; a Paley order times a power
# of two; a product of two Paley orders (5184 = 648 x 8 has one of its own, 400 = 20 x 20 too).
ORDERS = [1, 2, 4, 12, 16, 20, 24, 28, 36, 40, 44, 52, 60, 72, 76, 84, 96, 100, 108, 140, 148, 256, 344, 768, 924]


@pytest.mark.parametrize("n", ORDERS)
def test_matrices_are_orthonormal_symmetric_and_flat(n):
    m = hadamard.matrix(n)
    assert m.shape == (n, n) and m.dtype == np.float32
    sign = np.sign(m).astype(np.int64)
    np.testing.assert_array_equal(sign @ sign.T, n * np.eye(n, dtype=np.int64))  # exact: whole numbers
    np.testing.assert_array_equal(m, m.T)
    np.testing.assert_array_equal(np.abs(m), np.full((n, n), np.float32(1 / np.sqrt(n))))


def test_the_matrix_of_a_power_of_two_is_sylvesters():
    scipy = pytest.importorskip("scipy.linalg")
    np.testing.assert_array_equal(np.sign(hadamard.matrix(64)), scipy.hadamard(64))
    np.testing.assert_array_equal(
        hadamard.matrix(4) * 2, [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    )


@pytest.mark.parametrize(
    "width",  # of Llama 3 8B, Llama 2 7B and 13B, Qwen2 7B, 1.5B, 0.5B, 72B, Llama 3 405B, TinyLlama
    [14336, 11008, 13824, 18944, 8960, 4864, 29568, 53248, 5632, 3584, 896, 4096, 5120],
)
def test_widths_of_language_models_have_whole_transforms(width):
    assert hadamard.sizes(width)[-1] == width


@pytest.mark.parametrize(
    ("k", "block"), [(64, 64), (96, 32), (96, 96), (2048, 2048), (768, 12), (28 * 256, 28 * 256), (6, 1)]
)
def test_the_fast_product_is_the_matrix(k, block):
    x = np.random.default_rng(0).standard_normal((3, 2, k)).astype(np.float32)
    whole = np.kron(np.eye(k // block), hadamard.matrix(block)) if k < 5000 else None
    y = hadamard.transform(jnp.asarray(x), block)
    assert y.shape == x.shape and y.dtype == jnp.float32
    if whole is not None:
        np.testing.assert_allclose(y, x @ whole, atol=2e-5)
    np.testing.assert_allclose(y, hadamard.host(x, block), atol=2e-5)
    np.testing.assert_allclose(hadamard.inverse(y, block), x, atol=2e-5)
    np.testing.assert_allclose(hadamard.transform(y, block), x, atol=2e-5)  # symmetric: its own inverse
    norms = [np.linalg.norm(v.reshape(6, k // block, block).astype(np.float64), axis=-1) for v in (x, np.asarray(y))]
    np.testing.assert_allclose(*norms, rtol=1e-5)


def test_an_outlier_is_spread_evenly():
    x = np.zeros(64, np.float32)
    x[5] = 32
    np.testing.assert_array_equal(np.abs(hadamard.transform(jnp.asarray(x), 16)), [4.0 * 2] * 16 + [0] * 48)


def test_a_product_of_transformed_operands_is_the_product():
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((2, 40, 96)).astype(np.float32)
    got = hadamard.transform(jnp.asarray(x), 32) @ hadamard.transform(jnp.asarray(w), 32).T
    np.testing.assert_allclose(got, x @ w.T, atol=3e-5)


def test_it_passes_jit_vmap_grad_and_keeps_the_type():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((4, 48)), jnp.float32)
    c = jnp.arange(48, dtype=jnp.float32)
    plain = hadamard.transform(x, 24)
    # Other batches, other order of summation: one unit in the last place of the largest term.
    np.testing.assert_allclose(jax.jit(hadamard.transform, static_argnums=1)(x, 24), plain, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda r: hadamard.transform(r, 24))(x), plain, atol=1e-6)
    slope = jax.grad(lambda r: jnp.vdot(hadamard.transform(r, 24), c))(x[0])
    np.testing.assert_allclose(slope, hadamard.transform(c, 24), atol=1e-4)  # the transpose is the matrix
    half = hadamard.transform(x.astype(jnp.bfloat16), 24)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        half, hadamard.transform(x.astype(jnp.bfloat16).astype(jnp.float32), 24).astype(jnp.bfloat16)
    )


def test_signs_are_fixed_by_the_seed():
    np.testing.assert_array_equal(hadamard.signs(512, 3), hadamard.signs(512, 3))
    assert set(hadamard.signs(512, 3).tolist()) == {1.0, -1.0}
    assert 200 < (hadamard.signs(512, 3) == hadamard.signs(512, 4)).sum() < 312  # 5 sigma around one half
    # numpy.random.RandomState(7).randint(0, 2, 8), frozen by NumPy's own promise.
    np.testing.assert_array_equal(hadamard.signs(8, 7), np.random.RandomState(7).randint(0, 2, 8) * 2 - 1)


@pytest.mark.parametrize(
    ("k", "block", "message"),
    [
        (11008, 172, r"11008 can't .* order 172 .* write a block of 128 or 256; the largest is 11008"),
        (768, 100, r"100 does not divide it; write a block of 96 or 128; the largest is 768"),
        (22, 22, r"no Hadamard matrix of order 22 .* write a block of 1 or 2$"),
        (64, 0, r"found a Hadamard block of 0, expected a positive number"),
    ],
)
def test_what_cannot_be_had(k, block, message):
    with pytest.raises(PlanError, match=message):
        hadamard.check(k, block)
    with pytest.raises(PlanError, match=message):
        hadamard.transform(jnp.zeros((2, k)), block)


def test_sizes_are_those_that_check_allows():
    for k in (96, 344, 1376):
        assert hadamard.sizes(k) == tuple(d for d in range(1, k + 1) if k % d == 0 and hadamard._orders(d) is not None)
        for d in hadamard.sizes(k):
            hadamard.check(k, d)
