"""The three GEMMs of a linear layer: TransformerEngine's numbers, unbiased rounding, properties of each copy."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jqopt
from jqopt import _numerics, formats
from jqopt._recipe_train import TrainSpec
from jqopt.train import _dither, _linear, _operand
from jqopt.train._operand import COLUMNS, ROWS, Quantizer
from jqopt_kernels import quantize_math

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden/te_golden.npz")
NVFP4 = formats.get("nvfp4")
MOST = float(jnp.finfo(jnp.bfloat16).max)
KEY = jnp.asarray([3, 5], jnp.uint32)


def spec(**operands) -> TrainSpec:
    return TrainSpec.model_validate(operands)


def golden(name: str) -> jax.Array:
    return jnp.asarray(GOLDEN[name].view(ml_dtypes.bfloat16))


def numbers(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def shipped(name: str) -> _linear.Gemms:
    return _linear.gemms(jqopt.load_recipe(f"train/{name}").train)


@functools.partial(jax.jit, static_argnums=0)
def layer(how: _linear.Gemms, x, w, dy, key=KEY, scales=None):
    """(y, dx, dw) of a layer, and what the scales get in place of a gradient."""
    y, back = jax.vjp(lambda x, w, s: _linear.linear(how, x, w, s, key), x, w, scales)
    return (y, *back(dy))


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# ---- TransformerEngine's numbers


@pytest.mark.parametrize("eager", [False, True], ids=["jit", "eager"])
@pytest.mark.parametrize("name", ["vanilla", "rht", "2d", "rht_2d"])
def test_a_layer_is_transformer_engines(name, eager):
    """G2: y, dx and dw have the bits of its reference in bfloat16, and 1e-6 of the largest in float32."""
    turned = {"format": "nvfp4", "hadamard": "rht" in name}
    how = _linear.gemms(
        spec(input=turned, grad=turned, weight={"format": "nvfp4", "tile": [16 if "2d" in name else 1, 16]})
    )
    operands = [golden(f"lin/{n}") for n in ("x", "w", "dy")]
    run = layer.__wrapped__ if eager else layer
    for out in ("bfloat16", "float32"):
        if eager and out == "float32":
            continue
        got = run(dataclasses.replace(how, dtypes=(out,) * 3), *(t.astype(out) for t in operands))[:3]
        for n, value in zip(("y", "dx", "dw"), got, strict=True):
            if out == "bfloat16":
                np.testing.assert_array_equal(np.asarray(value).view(np.uint16), GOLDEN[f"lin/{name}/bf16/{n}"])
            else:
                want = GOLDEN[f"lin/{name}/f32/{n}"]
                np.testing.assert_allclose(value, want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_stochastic_rounding_is_transformer_engines_for_each_byte():
    """S2: its software rounder takes byte / 256; ours the middle of each byte, which has no bias."""
    x = jnp.asarray(GOLDEN["sr/x"])
    u = jnp.arange(256, dtype=jnp.float32) / 256
    grid = jax.jit(jax.vmap(lambda u: _numerics.round_to(x, formats.E2M1, jnp.full_like(x, u)), out_axes=1))
    np.testing.assert_array_equal(2 * grid(u), GOLDEN["sr/q_by_byte"])
    middles = np.asarray(grid(u + 1 / 512), np.float64).mean(1)
    clipped = np.clip(np.asarray(x, np.float64), -6, 6)
    step = np.where(np.abs(clipped) >= 4, 2, np.where(np.abs(clipped) >= 2, 1, 0.5))
    assert np.abs((middles - clipped) / step).max() <= 1 / 512 + 1e-6
    codes = _numerics.encode(x, formats.E2M1, jnp.full_like(x, 0.25))
    np.testing.assert_array_equal(_numerics.decode(codes, formats.E2M1), grid(jnp.asarray([0.25]))[:, 0])


# ---- random numbers


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Philox-4x32-10 of one counter in Python's integers, as Salmon et al. 2011, section 3.3 has it."""
    a, b, c, d = counter
    for i in range(10):
        first, second = ((k + i * step) % 2**32 for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        x, y = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (y >> 32) ^ b ^ first, y % 2**32, (x >> 32) ^ d ^ second, x % 2**32
    return [a, b, c, d]


@pytest.mark.parametrize(
    ("key", "counter", "want"),
    [
        ("00000000 00000000", "00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff", "ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("a4093822 299f31d0", "243f6a88 85a308d3 13198a2e 03707344", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_its_authors_known_answers(key, counter, want):
    """The answers that come with Random123 1.14 (kat_vectors)."""
    key, counter, want = ([int(word, 16) for word in each.split()] for each in (key, counter, want))
    assert philox((key[0], key[1]), tuple(counter)) == want
    words = _dither.philox(*(tuple(jnp.full((1,), w, jnp.uint32) for w in each) for each in (key, counter)))
    assert [int(w[0]) for w in words] == want
    words = quantize_math.philox(*(tuple(jnp.full((1,), w, jnp.uint32) for w in each) for each in (key, counter)))
    assert [int(w[0]) for w in words] == want


def test_dither_is_philox_of_the_position():
    """16 bits of (row, column // 8) under the key; a part counts from its place, wherever that is."""
    u = _dither.uniform(KEY, (4, 18))
    key = (int(KEY[0]), int(KEY[1]))
    want = np.array([[philox(key, (row, word, 0, 0)) for word in range(3)] for row in range(4)], "<u4")
    half = want.view(np.uint16).reshape(4, 24)[:, :18]
    np.testing.assert_array_equal(u, (half.astype(np.float32) + 0.5) / 65536)
    np.testing.assert_array_equal(_dither.uniform(KEY, (2, 10), 2, 8), u[2:, 8:])
    for column in (1, 7, jnp.uint32(3), jnp.uint32(8)):
        np.testing.assert_array_equal(_dither.uniform(KEY, (3, 9), 1, column), u[1:, column : column + 9])
    np.testing.assert_array_equal(_dither.uniform(KEY, (2, 2, 18)).reshape(4, 18), u)
    np.testing.assert_array_equal(_dither.uniform(jnp.stack([KEY, KEY + 1]), (4, 18))[0], u)


@functools.partial(jax.jit, static_argnums=(1, 2))
def draws(x, q: Quantizer, count: int):
    """`count` stochastic roundings of x, float32 [count, *x.shape]."""
    m = _operand.measure(x, q, ROWS)

    def one(i):
        values, whole = _operand.values(m, q, ROWS, None, _dither.uniform(jnp.stack([KEY[0], i]), x.shape))
        return values * whole

    return jax.lax.map(one, jnp.arange(count, dtype=jnp.uint32), batch_size=64)


def test_stochastic_rounding_is_unbiased():
    """S1: with scales rounded up the mean of T draws is x: z of each element, and the whole, at the noise floor."""
    x, count = numbers(1, 16, 64), 4096
    for up in (True, False):
        q = Quantizer(NVFP4, (1, 16), stochastic=True, scale_up=up)
        s = np.asarray(draws(x, q, count), np.float64)
        mean, deviation = s.mean(0), s.std(0)
        moving = deviation > 1e-6
        error = mean - np.asarray(x, np.float64)
        z = error[moving] / (deviation[moving] / np.sqrt(count))
        bias = np.linalg.norm(error) / np.linalg.norm(x)
        floor = np.linalg.norm(deviation / np.sqrt(count)) / np.linalg.norm(x)
        if up:
            assert 0.97 < np.sqrt((z**2).mean()) < 1.03 and np.abs(z).max() < 5 and bias < 1.2 * floor
            assert max(len(np.unique(s[:, i, j])) for i in range(4) for j in range(16)) == 2  # the two neighbours
        else:
            assert 0.005 < bias < 0.02  # scales rounded to nearest saturate: 1.0 % for Gaussian data


def test_keys_and_copies():
    """S3: same key, same bits; another key, or the other copy of dy, others."""
    how, x, w, dy = shipped("nvfp4"), numbers(0, 32, 48), numbers(1, 64, 48), numbers(2, 32, 64)
    one, again, other = (layer(how, x, w, dy, k) for k in (KEY, KEY, KEY.at[0].set(4)))
    for a, b, c in zip(one[1:3], again[1:3], other[1:3], strict=True):
        np.testing.assert_array_equal(a, b)
        assert bool((a != c).any())
    np.testing.assert_array_equal(one[0], other[0])
    keys = _linear.copy_keys(how, KEY, (ROWS, COLUMNS))
    both = _linear._dithers(keys, [(ROWS, (32, 64)), (COLUMNS, (32, 64))], None)
    assert float((both[ROWS] == both[COLUMNS]).mean()) < 0.03
    padded = _linear._dithers(keys, [(ROWS, (30, 64)), (COLUMNS, (32, 64))], None)  # of two shapes: the same numbers
    np.testing.assert_array_equal(padded[COLUMNS], both[COLUMNS])
    np.testing.assert_array_equal(padded[ROWS], both[ROWS][:30])


# ---- properties


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_no_rht", "fp8_current", "fp8_block", "mxfp8"])
def test_nan_is_not_lost(name):
    """A NaN of x, w or dy is one in all that the product makes of it, though no code stands for it."""
    how, x, w, dy = shipped(name), numbers(0, 32, 48), numbers(1, 64, 48), numbers(2, 32, 64)
    y = layer(how, x.at[3, 5].set(jnp.nan), w, dy, KEY)[0]
    assert bool(jnp.isnan(y[3]).all())
    y = layer(how, x, w.at[7, 5].set(jnp.nan), dy, KEY)[0]
    assert bool(jnp.isnan(y[:, 7]).all())
    _, dx, dw, *_ = layer(how, x, w, dy.at[3, 7].set(jnp.nan), KEY)
    assert bool(jnp.isnan(dx[3]).all()) and bool(jnp.isnan(dw[7]).all())


@pytest.mark.parametrize("name", ["nvfp4", "fp8_current", "fp8_block", "mxfp8"])
def test_no_rows(name):
    """A product of no tokens: outputs are empty, and its weight has a gradient of zeros."""
    how, x, w, dy = shipped(name), numbers(0, 0, 48), numbers(1, 64, 48), numbers(2, 0, 64)
    y, dx, dw, *_ = layer(how, x, w, dy, KEY)
    assert y.shape == (0, 64) and dx.shape == (0, 48)
    np.testing.assert_array_equal(dw, np.zeros((64, 48)))


def test_error_floor():
    """Two operands with 9.5 % of noise each: 13.3 % to 14.6 %. Below: not quantized. Above: broken."""
    how, x, w, dy = shipped("nvfp4"), numbers(0, 256, 256), numbers(1, 256, 256), numbers(2, 256, 256)
    nearest = dataclasses.replace(
        how, grad=tuple(dataclasses.replace(q, stochastic=False, scale_up=False) for q in how.grad)
    )
    y, dx, dw, _ = layer(nearest, x, w, dy)
    for got, want in ((y, x @ w.T), (dx, dy @ w), (dw, dy.T @ x)):
        assert 0.12 < relative(got, want) < 0.15


@pytest.mark.parametrize(("name", "low", "high"), [
    ("fp8_current", 0.02, 0.06), ("fp8_block", 0.02, 0.05), ("mxfp8", 0.02, 0.05),
])  # fmt: skip
def test_error_floor_of_fp8(name, low, high):
    """3 bits of mantissa (E5M2: 2), anywhere in a binade: 2^-4 / sqrt(3) / 1.5 = 2.4 % (4.8 %) for each of two."""
    how, x, w, dy = shipped(name), numbers(0, 128, 160), numbers(1, 96, 160), numbers(2, 128, 96)
    y, dx, dw, _ = layer(how, x, w, dy)
    for got, want in ((y, x @ w.T), (dx, dy @ w), (dw, dy.T @ x)):
        assert low < relative(got, want) < high


def test_square_tiles_read_the_same_numbers_in_dgrad():
    """Without rounding of dy: dx is the derivative of the product with the weight that fprop read."""
    how = _linear.gemms(spec(weight={"format": "nvfp4", "tile": [16, 16]}))
    x, w, dy = numbers(0, 32, 48), numbers(1, 64, 48), numbers(2, 32, 64)
    m = _operand.measure(w, how.weight[0], ROWS)
    values, whole = _operand.values(m, how.weight[0], ROWS)
    np.testing.assert_allclose(layer(how, x, w, dy)[1], dy @ (values * whole), rtol=1e-5, atol=1e-5)


def test_hadamard_spreads_an_outlier():
    """One value of 3000 sigma: the wgrad error with the transform is below that without."""
    x, w, dy = numbers(0, 128, 64).at[5, 7].set(3000.0), numbers(1, 32, 64), numbers(2, 128, 32)
    errors = {}
    for turned in (False, True):
        o = {"format": "nvfp4", "hadamard": turned}
        dw = layer(_linear.gemms(spec(input=o, grad=o)), x, w, dy)[2]
        quiet = np.arange(64) != 7
        errors[turned] = relative(dw[:, quiet], (dy.T @ x)[:, quiet])
    assert errors[True] < errors[False]


FAST = [Quantizer(NVFP4, (1, 16)), Quantizer(formats.get("mxfp8"), (1, 32)), Quantizer(formats.get("fp8_e5m2"), None)]
REST = [
    Quantizer(NVFP4, (16, 16)), Quantizer(NVFP4, (1, 16), row_scaled=True), Quantizer(NVFP4, (1, 16), scale_up=True),
    Quantizer(NVFP4, (1, 16), four_over_six="mae", scale_max=256.0), Quantizer(formats.get("mxfp6"), (1, 32)),
    Quantizer(formats.get("fp8"), (1, 128), power_of_two=True),
]  # fmt: skip


@pytest.mark.parametrize("axis", [ROWS, COLUMNS])
@pytest.mark.parametrize("q", [*FAST, *(pytest.param(q, marks=pytest.mark.slow) for q in REST)], ids=str)
def test_codes_stand_for_the_values(q, axis):
    """What the backward pass decodes is what a forward pass would multiply; Q8: quantized again, nothing moves."""
    x = numbers(4, 3, 40, 52)  # odd sizes: short tiles, and a stack of three
    m = _operand.measure(x, q, axis)
    values, whole = _operand.values(m, q, axis)
    again = _operand.unpacked(_operand.codes(m, q, axis), q, axis, 52)
    np.testing.assert_array_equal(values, again[0])
    got = values if whole is None else values * whole
    assert relative(got, x) < 0.12
    one = _operand.values(_operand.measure(x[1], q, axis), q, axis)
    np.testing.assert_array_equal(one[0], values[1])  # matrices of a stack don't see each other


@pytest.mark.slow
def test_columnwise_is_rowwise_of_the_transpose():
    x = numbers(5, 48, 64)
    for q in (Quantizer(NVFP4, (1, 16), hadamard=True), Quantizer(NVFP4, (1, 16), row_scaled=True),
              Quantizer(NVFP4, (1, 16), four_over_six="mse")):  # fmt: skip
        columns = _operand.values(_operand.measure(x, q, COLUMNS), q, COLUMNS)
        rows = _operand.values(_operand.measure(x.T, q, ROWS), q, ROWS)
        np.testing.assert_array_equal(columns[0].T, rows[0])
        np.testing.assert_array_equal(columns[1].T, rows[1])


@pytest.mark.slow
@pytest.mark.parametrize("backward", ["high_precision", "dequantized"])
def test_backward_overrides(backward):
    """NVTE_BACKWARD_OVERRIDE: gradients of the float operands, or of the operands that fprop read."""
    how = _linear.gemms(spec(input="nvfp4", weight="nvfp4", backward=backward))
    x, w, dy = numbers(0, 32, 48), numbers(1, 64, 48), numbers(2, 32, 64)
    read = []
    for v, q in ((x, how.input[0]), (w, how.weight[0])):
        values, whole = _operand.values(_operand.measure(v, q, ROWS), q, ROWS)
        read.append(v if backward == "high_precision" else values * whole)
    _, dx, dw, _ = layer(how, x, w, dy)
    np.testing.assert_allclose(dx, dy @ read[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, dy.T @ read[0], rtol=1e-5, atol=1e-5)


def test_odd_shapes():
    """Short blocks and tokens that are no multiple of 16: padding changes no scale."""
    how, x, w, dy = shipped("nvfp4"), numbers(0, 37, 51), numbers(1, 29, 51), numbers(2, 37, 29)
    y, dx, dw, _ = layer(how, x, w, dy)
    for got, want in ((y, x @ w.T), (dx, dy @ w), (dw, dy.T @ x)):
        assert got.shape == want.shape and relative(got, want) < 0.25


@pytest.mark.parametrize(("name", "value"), [
    ("nvfp4", 0.0), ("fp8_current", 0.0), ("mxfp8", 0.0), ("nvfp4", MOST), ("fp8_current", MOST),
])  # fmt: skip
def test_zeros_and_the_largest_numbers(name, value):
    """Q2: nothing but zeros gives zeros; nothing but the largest number gives it back, from each copy."""
    how = shipped(name)
    for q, axis in (
        (how.input[0], ROWS),
        (how.weight[0], ROWS),
        (dataclasses.replace(how.grad[0], stochastic=False), ROWS),
    ):
        x = jnp.full((32, 32), value)
        values, whole = _operand.values(_operand.measure(x, q, axis), q, axis)
        np.testing.assert_allclose(values if whole is None else values * whole, x, rtol=1e-6)


def test_a_gradient_without_a_key_is_refused():
    x = numbers(0, 16, 16)
    how = dataclasses.replace(shipped("nvfp4"), where="layer/kernel")
    _linear.linear(how, x, x)  # evaluation needs none
    with pytest.raises(jqopt.UnsupportedError, match="layer/kernel: its recipe rounds gradients stochastically"):
        jax.grad(lambda x: _linear.linear(how, x, x).sum())(x)
