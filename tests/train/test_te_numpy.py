"""TransformerEngine's tests on numbers of our own: jqopt against an oracle in NumPy that equals its vectors."""

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
from jqopt._recipe_train import TrainSpec
from jqopt.formats import E4M3, E5M2
from jqopt.train import _linear, _operand, quantizers
from tests.train import te_numpy as te

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden/te_golden.npz")
BFLOAT16 = ml_dtypes.bfloat16
TILES = {"1d": (1, 16), "2d": (16, 16)}


def large(*cases):
    """The last of these cases is slow."""
    return [*cases[:-1], pytest.param(cases[-1], marks=pytest.mark.slow)]


def random(seed: int, *shape: int, dtype=BFLOAT16) -> np.ndarray:
    """Rows and blocks of unlike size, so that most block scales are unlike too."""
    rng = np.random.default_rng(seed)
    sizes = np.exp2(rng.uniform(-6, 2, (shape[0], 1)) + rng.uniform(-3, 0, (1, shape[1])))
    return (rng.standard_normal(shape, np.float32) * sizes).astype(dtype)


def same(ours, theirs) -> None:
    a, b = np.asarray(ours), np.asarray(theirs)
    assert a.shape == b.shape
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def same_nvfp4(ours: quantizers.Nvfp4, theirs: te.Quantized) -> None:
    same(ours.data, theirs.packed)
    same(ours.scale, theirs.scales)
    assert np.float32(ours.amax) == theirs.amax


@functools.partial(jax.jit, static_argnums=1)
def jitted(x, tile):
    return quantizers.nvfp4(x, tile=tile)


# ---- The oracle


def golden(key: str) -> np.ndarray:
    x = GOLDEN[key]
    return x.view(BFLOAT16) if x.dtype == np.uint16 else x


NAMES = ("randn", "odd", "grad", "outlier", "f32", "zeros", "maxbf16", "maxf32", "boundary", "scale_ties", "underflow")
VECTORS = [(n, v) for n in NAMES for v in ("1d", "2d", "1d_rht") if f"q/{n}/{v}/data" in GOLDEN]


@pytest.mark.parametrize(("name", "variant"), VECTORS)
def test_the_oracle_is_transformer_engine(name, variant):
    x = golden(f"in/{name}")
    column = te.transformed(x.T) if variant == "1d_rht" else x.T
    for q, suffix, side in (
        (te.nvfp4(x, variant == "2d"), "", "row"),
        (te.nvfp4(column, variant == "2d"), "_t", "col"),
    ):
        same(q.packed, GOLDEN[f"q/{name}/{variant}/data{suffix}"])
        same(q.scales, GOLDEN[f"q/{name}/{variant}/scale{suffix}"])
        assert q.amax == GOLDEN[f"q/{name}/{variant}/amax_{side}"][0]


@pytest.mark.parametrize("name", ["vanilla", "rht", "2d", "rht_2d"])
def test_the_oracles_layer_is_transformer_engines(name):
    x, w, dy = (golden(f"lin/{n}") for n in ("x", "w", "dy"))
    for value, n in zip(te.linear(x, w, dy, "rht" in name, "2d" in name), ("y", "dx", "dw"), strict=True):
        want = GOLDEN[f"lin/{name}/f32/{n}"]
        np.testing.assert_allclose(value, want, rtol=0, atol=1e-6 * np.abs(want).max())
        same(value.astype(np.float32).astype(BFLOAT16), golden(f"lin/{name}/bf16/{n}"))


def test_the_oracles_fp8_is_transformer_engines():
    x = golden("fp8/in/randn")
    codes, scale = te.fp8(x, x.shape, ml_dtypes.float8_e4m3fn, False)
    same(codes, GOLDEN["fp8/randn/current_e4m3_f32/data"])
    assert scale.item() == GOLDEN["fp8/randn/current_e4m3_f32/scale_inv"].item()
    codes, scale = te.fp8(x, (1, 128), ml_dtypes.float8_e4m3fn, True)
    same(codes, GOLDEN["fp8/randn/block1x128_p2/data"])
    same(scale.T.copy(), GOLDEN["fp8/randn/block1x128_p2/scale_inv"])
    codes, scale = te.mxfp8(x)
    same(codes, GOLDEN["fp8/randn/mxfp8/data"])
    same(scale, GOLDEN["fp8/randn/mxfp8/scale_e8m0"])


# ---- Quantizers

SHAPES = [(128, 128), (256, 256), (256, 1024), (1024, 256), (256, 272), (304, 304), (320, 256)]
HUGE = [(2048, 2048), (1024, 2048), (8192, 8192)]


@pytest.mark.parametrize("tile", ["1d", "2d"])
@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(s, marks=pytest.mark.slow) for s in HUGE)], ids=str)
def test_codes_and_scales(shape, dtype, tile):
    """Q1, Q4, Q5: of x, and of its transpose: transposed inside of jit, and lying so."""
    x = random(sum(shape), *shape, dtype=dtype)
    rows, columns = (te.nvfp4(each, tile == "2d") for each in (x, x.T))
    same_nvfp4(jitted(jnp.asarray(x), TILES[tile]), rows)
    same_nvfp4(jax.jit(lambda x: quantizers.nvfp4(x.T, tile=TILES[tile]))(x), columns)
    if shape == SHAPES[0]:
        same_nvfp4(quantizers.nvfp4(jnp.asarray(x), tile=TILES[tile]), rows)
        same_nvfp4(quantizers.nvfp4(jnp.asarray(x.T), tile=TILES[tile]), columns)
    if tile == "2d":
        np.testing.assert_array_equal(columns.codes.T, rows.codes)


@pytest.mark.parametrize("offset", [0.0, 1e-3, -1e-3])
@pytest.mark.parametrize("rows", [16, 32])
def test_the_ladder(rows, offset):
    """Q3: -12 to 12 in steps of a quarter, and just beside them."""
    x = np.resize(np.linspace(-12, 12, 97, dtype=np.float32), (rows, 128)) + np.float32(offset)
    same_nvfp4(jitted(jnp.asarray(x), TILES["1d"]), te.nvfp4(x))
    same_nvfp4(quantizers.nvfp4(jnp.asarray(x)), te.nvfp4(x))


@pytest.mark.parametrize("signs", [quantizers.RHT_SIGNS, (1,) * 16], ids=["signs", "no signs"])
@pytest.mark.parametrize("shape", large((256, 272), (304, 304), (320, 256), (1024, 256), (4096, 3072)), ids=str)
def test_transformed(shape, signs):
    """Q6: the rowwise copy of x, the columnwise of its transform, each with the amax of its own."""
    x = random(sum(shape), *shape)
    turned = te.transformed(x.T, np.asarray(signs, np.float64))
    same_nvfp4(jitted(jnp.asarray(x), TILES["1d"]), te.nvfp4(x))
    run = jax.jit(lambda x: quantizers.nvfp4(quantizers.hadamard16(x.T, signs)))
    same_nvfp4(run(x), te.nvfp4(turned))


@pytest.mark.parametrize("hadamard", [False, True])
def test_the_copies_of_a_layer(hadamard):
    """What the training GEMMs multiply, rowwise and columnwise, is what the oracle's codes stand for."""
    x = random(5, 320, 272)
    spec = TrainSpec.model_validate({"input": {"format": "nvfp4"}, "weight": {"format": "nvfp4", "tile": [16, 16]}})
    assert spec.input is not None and spec.weight is not None
    plain = _operand.quantizer(spec.input)
    square = _operand.quantizer(spec.weight)
    assert plain is not None and square is not None
    turned = dataclasses.replace(plain, hadamard=hadamard)
    column = te.transformed(x.T) if hadamard else x.T
    cases = [(plain, -1, te.nvfp4(x), False), (turned, -2, te.nvfp4(column), True),
             (square, -1, te.nvfp4(x, True), False), (square, -2, te.nvfp4(x.T, True), True)]  # fmt: skip
    for q, axis, want, turn in cases:
        measured = _operand.measure(_operand.pinned(jnp.asarray(x)), q, axis)
        values, whole = _operand.values(measured, q, axis)
        assert whole is not None
        same(np.asarray(values).T.copy() if turn else values, want.values())
        assert np.float32(np.asarray(whole).item()) == want.amax / np.float32(6 * 448)


def test_twice_is_once():
    """Q8: what codes stand for is quantized to itself."""
    first = jitted(jnp.asarray(random(8, 256, 512, dtype=np.float32)), TILES["1d"])
    again = quantizers.nvfp4(quantizers.nvfp4_values(first) * (first.amax / np.float32(6 * 448)), amax=first.amax)
    same(first.scale, again.scale)
    np.testing.assert_array_equal(quantizers.nvfp4_values(again), quantizers.nvfp4_values(first))  # -0 counts as 0


@pytest.mark.parametrize("shape", [(128, 4), (256, 12), (128, 3), (1, 1), (130, 7), (48, 5)], ids=str)
def test_swizzled(shape):
    """Q7: also of shapes that no GEMM takes as they are."""
    scale = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    same(quantizers.swizzle(jnp.asarray(scale)), te.swizzled(scale))
    same(quantizers.unswizzle(quantizers.swizzle(jnp.asarray(scale)), *shape), scale)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("element", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_fp8(element, power_of_two):
    """F1: current scaling and blocks, scales and codes."""
    dtype = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[element.name]
    x = random(9, 256, 384)
    for tile in (x.shape, (1, 128), (128, 128)):
        codes, scale = te.fp8(x, tile, dtype, power_of_two)
        if tile == x.shape:
            q = jax.jit(lambda x: quantizers.fp8_current(x, element, power_of_two=power_of_two))(x)
        else:
            q = jax.jit(lambda x, t=tile: quantizers.fp8_block(x, t, element, power_of_two=power_of_two))(x)
        same(q.data, codes)
        same(q.scale, scale)


def test_mxfp8():
    x = random(10, 256, 384)
    codes, scale = te.mxfp8(x)
    q = jax.jit(quantizers.mxfp8)(x)
    same(q.data, codes)
    same(q.scale, scale)


# ---- Products and layers


def close(ours, wanted: np.ndarray, dtype) -> None:
    """float32: 1e-5 of the largest; bfloat16: one unit in the last place, of what is not cancelled away."""
    got = np.asarray(ours).astype(np.float64)
    largest = np.abs(wanted).max()
    if dtype is BFLOAT16:
        step = np.exp2(np.floor(np.log2(np.maximum(np.abs(wanted), 1e-5 * largest))) - 7)
        assert (np.abs(got - wanted) <= step).all()
    else:
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * largest)


@functools.partial(jax.jit, static_argnums=0)
def layer(how, x, w, dy):
    y, back = jax.vjp(lambda x, w: _linear.linear(how, x, w), x, w)
    return (y, *back(dy))


def gemms(hadamard: bool, square: bool, dtype) -> _linear.Gemms:
    operand = {"format": "nvfp4", "hadamard": hadamard}
    weight = {"format": "nvfp4", "tile": [16 if square else 1, 16]}
    how = _linear.gemms(TrainSpec.model_validate({"input": operand, "grad": operand, "weight": weight}))
    return dataclasses.replace(how, dtypes=(np.dtype(dtype).name,) * 3)


GEMMS = [(128, 128, 128), (256, 1024, 256), (112, 128, 96), (304, 640, 304), (256, 64, 256)]
LARGE_GEMMS = [(1024, 1024, 1024), (4096, 512, 3072), (1008, 3072, 992)]


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [*GEMMS, *(pytest.param(s, marks=pytest.mark.slow) for s in LARGE_GEMMS)], ids=str)
def test_products(shape, dtype):
    """G1: the three products against float64 products of what the codes stand for; also added to a sum."""
    m, k, n = shape
    x, w, dy = random(1, m, k, dtype=dtype), random(2, n, k, dtype=dtype), random(3, m, n, dtype=dtype)
    got = layer(gemms(False, False, dtype), x, w, dy)
    wanted = te.linear(x, w, dy, False, False)
    for value, want in zip(got, wanted, strict=True):
        close(value, want, dtype)
    if dtype is np.float32:
        held = random(4, n, k, dtype=np.float32)
        close(got[2] + held, wanted[2] + held, dtype)


LAYERS = [(128, 256), (256, 128)]
LARGE_LAYERS = [(512, 512), (768, 3072), (1024, 4096)]


@pytest.mark.parametrize("square", [False, True], ids=["1d", "2d"])
@pytest.mark.parametrize("hadamard", [False, True], ids=["plain", "rht"])
@pytest.mark.parametrize(
    "features", [*LAYERS, *(pytest.param(f, marks=pytest.mark.slow) for f in LARGE_LAYERS)], ids=str
)
def test_steps_of_a_layer(features, hadamard, square):
    """G2: forward and backward of 32 x 128 tokens; of the smaller ones again, with weights that the gradients give."""
    k, n = features
    w = random(20, n, k) / BFLOAT16(16)
    how = gemms(hadamard, square, BFLOAT16)
    for step in range(3 if k < 768 else 1):
        x, dy = random(21 + step, 32 * 128, k), random(31 + step, 32 * 128, n)
        got = layer(how, x, w, dy)
        for value, want in zip(got, te.linear(x, w, dy, hadamard, square), strict=True):
            close(value, want, BFLOAT16)
        dw = np.asarray(got[2]).astype(np.float32)
        w = (w.astype(np.float32) - 1e-2 * dw / np.abs(dw).max()).astype(BFLOAT16)


def test_delayed_scales_over_three_steps():
    """F1: the state of a NumPy loop; the codes of each step are those of its scale."""
    recipe = jqopt.load_recipe("train/fp8_delayed")
    model = lambda p, x: x @ p["w"]  # noqa: E731
    params = {"w": jnp.asarray(random(40, 64, 48, dtype=np.float32))}
    prepared = jqopt.train.prepare(model, recipe, params, jnp.zeros((32, 64)))
    state = prepared.init_state()
    (key,) = state
    scale, history = np.ones(3, np.float32), np.zeros((3, 1024), np.float32)
    for step in range(3):
        x, dy = random(41 + step, 32, 64, dtype=np.float32), random(51 + step, 32, 48, dtype=np.float32)
        loss = lambda p, s, x=x, dy=dy: jnp.sum(prepared.apply(p, jnp.asarray(x), quant_state=s) * dy)  # noqa: E731
        seen = jax.grad(loss, argnums=1)(params, state)
        y = prepared.apply(params, jnp.asarray(x), quant_state=state)
        w = np.asarray(params["w"])
        codes = [np.clip(v * s, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) / s
                 for v, s in zip((x, w), scale, strict=False)]  # fmt: skip
        wanted = codes[0] @ codes[1]
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
        state = prepared.next_state(state, seen)
        history[:, 0] = [np.abs(v).max() for v in (x, w, dy)]
        scale = (np.asarray([448, 448, 57344], np.float32) / history.max(axis=1)).astype(np.float32)
        history = np.roll(history, -1, axis=1)
        history[:, 0] = 0
        same(state[key]["scale"], scale)
        same(state[key]["history"], np.ascontiguousarray(history.T))
