"""The bits: against ml_dtypes, against an independent numpy implementation, and by their properties."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from jqopt import _numerics as num
from jqopt import formats
from jqopt.errors import UnsupportedError

F32 = np.float32
DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
FLOATS = {e.name: e for e in (formats.E2M1, formats.E3M2, formats.E2M3, formats.E4M3, formats.E5M2)}
ALL = formats.names()
SYMMETRIC = [name for name in ALL if name not in ("uint4", "nf4")]
# Every kind of tile: the formats as they are, and other blocks and granularities.
CASES = [
    *((name, None, None) for name in ALL),
    ("int8", None, "tensor"),
    ("int4", None, "channel"),
    ("fp8", None, "channel"),
    ("fp8", 128, None),
    ("int8", (16, 8), None),
    ("nvfp4", (16, 16), None),
    ("uint4", 32, None),
]


def case(name, block=None):
    fmt = formats.get(name)
    return fmt if block is None else fmt.with_block(block)


def bits(x):
    x = np.asarray(x)
    return x.view(np.uint32) if x.dtype == F32 else x


def assert_bits(a, b):
    np.testing.assert_array_equal(bits(a), bits(b))


def samples(seed, n, k):
    """Rows of every magnitude from 2^-20 to 2^14, outliers, a zero row, zero blocks, -0."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, k)).astype(F32) * np.exp2(rng.integers(-20, 12, (n, 1))).astype(F32)
    x[n // 2] *= np.where(rng.random(k) < 0.1, F32(30), F32(1))
    x[0] = 0
    x[1, : k // 2] = -0.0
    return x


# Elements -----------------------------------------------------------------------------------------------------------


@functools.cache
def million():
    """A million floats: any bit pattern that is a finite number, and as many of ordinary size."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 500_000, dtype=np.uint32).view(F32)
    x = np.concatenate([np.where(np.isfinite(x), x, F32(1)), rng.standard_normal(500_000).astype(F32) * 8])
    return np.concatenate([x, F32([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 464, 465, -464])])


@pytest.mark.parametrize("name", FLOATS)
def test_encode_equals_ml_dtypes(name):
    element, x = FLOATS[name], million()
    expected = np.clip(x, element.min, element.max).astype(DTYPES[name]).view(np.uint8)
    if not element.signed_zero:  # -0, and what XLA flushes to it, is +0
        expected = np.where(np.abs(x) < 2.0**-126, 0, expected)
    codes = jax.jit(num.encode, static_argnums=1)(x, element)
    assert codes.dtype == jnp.uint8
    assert_bits(codes, expected)
    assert_bits(num.encode(x[::97], element), expected[::97])


@pytest.mark.parametrize("name", FLOATS)
def test_encode_equals_ml_dtypes_at_every_tie(name):
    element = FLOATS[name]
    grid = np.arange(2 ** (element.bits - 1), dtype=np.uint8).view(DTYPES[name]).astype(F32)
    grid = grid[np.isfinite(grid)]
    ties = (grid[1:] + grid[:-1]) / 2
    x = np.concatenate([grid, ties, np.nextafter(ties, F32(0)), np.nextafter(ties, F32(1e9))])
    x = np.concatenate([x, -x[1:]])
    expected = x.astype(DTYPES[name]).view(np.uint8)
    assert_bits(num.encode(x, element)[x != 0], expected[x != 0])


@pytest.mark.parametrize("name", FLOATS)
def test_decode_equals_ml_dtypes(name):
    codes = np.arange(2 ** FLOATS[name].bits, dtype=np.uint8)
    expected = codes.view(DTYPES[name]).astype(F32)
    for decode in (num.decode, jax.jit(num.decode, static_argnums=1)):
        values = np.asarray(decode(codes, FLOATS[name]))
        np.testing.assert_array_equal(values, expected)  # NaN equal to NaN
        assert_bits(values[~np.isnan(values)], expected[~np.isnan(expected)])


@pytest.mark.parametrize("element", [formats.INT8, formats.INT8_SYMMETRIC, formats.INT4, formats.UINT4])
def test_integers_round_half_to_even_and_saturate(element):
    x = F32([-1000, -128.5, -8.5, -2.5, -1.5, -0.5, -0.0, 0.5, 1.5, 2.5, 7.5, 14.5, 126.5, 127.5, 1000])
    expected = np.clip([-1000, -128, -8, -2, -2, 0, 0, 0, 2, 2, 8, 14, 126, 128, 1000], element.min, element.max)
    codes = num.encode(x, element)
    assert codes.dtype == (jnp.uint8 if element.min == 0 else jnp.int8)
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(num.decode(codes, element), expected)
    stored = num.unpack(num.pack(codes, element.bits), element.bits, len(x))
    np.testing.assert_array_equal(num.decode(stored, element), expected)


def test_nf4_takes_the_nearest_entry():
    table = F32(formats.NF4.table)
    x = np.linspace(-1.2, 1.2, 10_001, dtype=F32)
    nearest = np.abs(x[:, None] - table).min(1)
    values = np.asarray(num.decode(num.encode(x, formats.NF4), formats.NF4))
    np.testing.assert_allclose(np.abs(x - values), nearest, atol=2e-7)
    assert_bits(num.decode(num.encode(table, formats.NF4), formats.NF4), table)


@pytest.mark.parametrize("element", [*FLOATS.values(), formats.INT8, formats.INT4, formats.UINT4, formats.NF4])
def test_round_to_is_decode_of_encode(element):
    x = million()[::37]
    assert_bits(jax.jit(num.round_to, static_argnums=1)(x, element), num.decode(num.encode(x, element), element))


def test_what_is_not_finite():
    x = F32([np.inf, -np.inf])
    np.testing.assert_array_equal(num.round_to(x, formats.E4M3), [448, -448])
    np.testing.assert_array_equal(num.round_to(x, formats.E2M1), [6, -6])


# Division -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divisor", [6.0, 7.0, 15.0, 127.0, 448.0, 2688.0, 57344.0, "scalar", "row"])
def test_divide_is_ieee(divisor):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, 500)).astype(F32)
    row = rng.uniform(0.5, 2, (64, 1)).astype(F32)
    y = {"scalar": row[0, 0], "row": row}.get(divisor, divisor)
    expected = x / (F32(y) if np.ndim(y) == 0 else y)
    traced = isinstance(divisor, str)
    forms = {
        "eager": lambda: num.divide(jnp.asarray(x), y),
        "jit": lambda: jax.jit(num.divide)(x, y) if traced else jax.jit(lambda x: num.divide(x, y))(x),
        "vmap": lambda: jax.jit(jax.vmap(num.divide, (0, 0 if divisor == "row" else None)))(x, y),
        "scan": lambda: lax.scan(lambda c, a: (c, num.divide(a, y)), 0, x.reshape(4, 16, 500))[1].reshape(64, 500),
    }
    if divisor == "row":
        forms.pop("scan")
    for name, form in forms.items():
        assert_bits(form(), expected), name


# Packing ------------------------------------------------------------------------------------------------------------


def test_pack_layout():
    assert num.pack(jnp.uint8([1, 2, 3]), 4).tolist() == [0x21, 0x03]  # low nibble first, tail 0
    assert num.pack(jnp.int8([-1, -8]), 4).tolist() == [0x8F]
    # 1 | 2<<6 | 3<<12 | 4<<18 = 0x103081, low byte first
    assert num.pack(jnp.uint8([1, 2, 3, 4]), 6).tolist() == [0x81, 0x30, 0x10]
    assert num.pack(jnp.uint8([1, 2]), 6).tolist() == [0x81, 0x00]


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 5, 7, 8, 31])
def test_unpack_inverts_pack(bits, k):
    codes = np.random.default_rng(k).integers(0, 2**bits, (2, 3, k)).astype(np.uint8)
    packed = num.pack(codes, bits)
    assert packed.shape == (2, 3, -(-k * bits // 8))
    np.testing.assert_array_equal(num.unpack(packed, bits, k), codes)


# Matrices, against plain numpy --------------------------------------------------------------------------------------


def numpy_tiles(x, tile):
    n, k = x.shape
    x = np.pad(x, ((0, -n % tile[0]), (0, -k % tile[1])))
    return x.reshape(x.shape[0] // tile[0], tile[0], x.shape[1] // tile[1], tile[1])


def numpy_values(scaled, fmt):
    """Values of the element nearest to `scaled`, by ml_dtypes, numpy's rint, or the table."""
    element = fmt.element
    if element.kind == "table":
        table = F32(element.table)
        return table[np.searchsorted((table[1:] + table[:-1]) / F32(2), scaled)]
    clipped = np.clip(scaled, element.min, element.max)
    if element.kind == "int":
        return np.rint(clipped) + F32(0)
    values = clipped.astype(DTYPES[element.name]).astype(F32)
    return values if element.signed_zero else np.where(scaled == 0, F32(0), values)


def numpy_qdq(x, fmt, granularity):
    """Quantize and dequantize with none of jqopt's code: the formulas of docs/numerics.md in numpy."""
    n, k = x.shape
    tile = {"channel": (1, k), "tensor": (n, k), "block": (1, fmt.block)}[granularity]
    tile = fmt.block if isinstance(tile[1], tuple) else tile
    tiles = numpy_tiles(x, tile)
    amax = np.abs(tiles).max((1, 3), keepdims=True)
    if fmt.zero_point:
        low, high = (f(tiles, 0).max((1, 3), keepdims=True) for f in (lambda t, z: -np.minimum(t, z), np.maximum))
        scale = safe((high + low) / F32(15))
        zero = np.clip(np.rint(low / scale), 0, 15)
        y = (np.clip(np.rint(tiles / scale) + zero, 0, 15) - zero) * scale
    elif fmt.scale.name == "e8m0":
        mantissa, exponent = np.frexp(amax / F32(fmt.element.max))
        exponent = np.where(amax == 0, -127, exponent - (mantissa == 0.5)).astype(np.int32)
        y = np.ldexp(numpy_values(np.ldexp(tiles, -exponent), fmt), exponent)
    elif fmt.name == "int4_fp8":
        scale, whole = safe(amax / F32(7)), safe(amax.max() / F32(448))
        y = (numpy_values(tiles / scale, fmt) * scale / whole).astype(DTYPES["e4m3"]).astype(F32) * whole
    elif len(fmt.ranges) > 1:
        each = [numpy_nvfp4(tiles, amax, fmt, F32(6 * 256), F32(factor)) for factor in fmt.ranges]
        errors = np.stack([np.square(y - tiles).sum((1, 3), keepdims=True) for y in each])
        y = np.take_along_axis(np.stack(each), errors.argmin(0)[None], 0)[0]
    elif fmt.global_scale:
        y = numpy_nvfp4(tiles, amax, fmt, F32(6 * 448), F32(1))
    else:
        scale = safe(amax / F32(fmt.element.max))
        y = numpy_values(tiles / scale, fmt) * scale
    assert y.dtype == F32
    return y.reshape(y.shape[0] * tile[0], -1)[:n, :k]


def numpy_nvfp4(tiles, amax, fmt, most, factor):
    whole = safe(amax.max() / most)
    scale = amax * factor / (F32(6) * whole)
    scale = np.where(scale == 0, F32(1), np.clip(scale, F32(2**-9), F32(448))).astype(DTYPES["e4m3"]).astype(F32)
    return numpy_values(tiles / (scale * whole), fmt) * (scale * whole)


def safe(scale):
    return np.where(scale < 2.0**-117, F32(1), scale)


def eager_qdq(x, fmt, granularity=None):
    codes = num.quantize_matrix(x, fmt, granularity=granularity)
    return codes, num.dequantize_matrix(*codes, fmt, x.shape[-1])


jax_qdq = jax.jit(eager_qdq, static_argnums=(1, 2))
qdq = jax.jit(num.qdq_matrix, static_argnums=1, static_argnames="granularity")


# One of each kind of element, scale and tile: eager operations compile one by one, which takes seconds a format.
EAGER = ["int8", "int4", "uint4", "fp8", "fp8_block", "nvfp4", "mxfp6", "nf4"]


@pytest.mark.parametrize("name", EAGER)
def test_eager_jit_and_numpy_agree(name):
    fmt, x = case(name), samples(2, 5, 70)
    expected = numpy_qdq(x, fmt, fmt.granularity)
    codes, y = eager_qdq(jnp.asarray(x), fmt)
    assert_bits(y, expected)
    jit_codes, jit_y = jax_qdq(x, fmt, None)
    assert_bits(jit_y, expected)
    jax.tree.map(assert_bits, codes, jit_codes)
    assert_bits(num.qdq_matrix(jnp.asarray(x), fmt), expected)


@pytest.mark.parametrize(("name", "block", "granularity"), CASES)
def test_whole_blocks_agree_with_numpy(name, block, granularity):
    fmt, x = case(name, block), samples(12, 48, 256)
    expected = numpy_qdq(x, fmt, granularity or fmt.granularity)
    assert_bits(qdq(x, fmt, granularity=granularity), expected)
    assert_bits(jax_qdq(x, fmt, granularity)[1], expected)


@pytest.mark.parametrize("name", ALL)
def test_vmap_and_scan_agree(name):
    fmt = case(name)
    x = np.stack([samples(seed, 6, 70) for seed in range(3)])
    expected = np.stack([numpy_qdq(m, fmt, fmt.granularity) for m in x])
    batched, y = jax_qdq(jnp.asarray(x), fmt, None)
    assert_bits(y, expected)
    mapped, y = jax.jit(jax.vmap(lambda m: eager_qdq(m, fmt)))(x)
    assert_bits(y, expected)
    jax.tree.map(assert_bits, batched, mapped)
    _, (scanned, y) = lax.scan(lambda c, m: (c, eager_qdq(m, fmt)), 0, jnp.asarray(x))
    assert_bits(y, expected)
    jax.tree.map(assert_bits, batched, scanned)


@pytest.mark.parametrize("name", ALL)
def test_stored_layout(name):
    fmt = case(name)
    codes, _ = jax_qdq(jnp.ones((3, 5, 70)), fmt, None)
    assert codes.data.shape == (3, 5, -(-70 * fmt.element.bits // 8))
    assert codes.scale.shape == (3, *fmt.scale_shape(5, 70))
    assert codes.scale.dtype == (jnp.float32 if fmt.scale.name == "float32" else jnp.uint8)
    assert (codes.global_scale is not None) == fmt.global_scale
    if fmt.global_scale:
        assert codes.global_scale.shape == (3,)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(codes))
    assert 8 * stored == pytest.approx(3 * 5 * 70 * fmt.bits_per_value(5, 70))


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (1, 3), (2, 17)])
@pytest.mark.parametrize("name", ALL)
def test_any_shape(name, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(F32)
    _codes, y = jax_qdq(jnp.asarray(x), case(name), None)
    assert y.shape == x.shape
    np.testing.assert_allclose(y, x, atol=0.5)


# Properties ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "block", "granularity"), CASES)
def test_rounds_to_the_nearest_code(name, block, granularity):
    """No other code of the same tile would have been nearer: the error is at most half a step, or a saturation."""
    fmt, x = case(name, block), samples(3, 5, 96)
    codes, y = jax_qdq(jnp.asarray(x), fmt, granularity)
    every = np.arange(2**fmt.element.bits).astype(np.uint8)
    values = num.decode(every.view(np.int8) if fmt.element.name.startswith("int8") else every, fmt.element)
    values = np.asarray(values)[np.isfinite(values)]
    values = np.clip(values, fmt.element.min, fmt.element.max)
    tile = fmt.tile_for(5, 96, granularity)
    factor = np.asarray(num.decode_scale(codes.scale, fmt))
    if fmt.global_scale and fmt.then is None:
        factor = factor * np.asarray(codes.global_scale)
    zero = 0 if codes.zero_point is None else np.asarray(codes.zero_point).astype(F32)[:, None, :, None, None]
    candidates = (values - zero) * factor[:, None, :, None, None]
    nearest = np.abs(candidates - numpy_tiles(x, tile)[..., None]).min(-1)
    error = np.abs(numpy_tiles(np.asarray(y), tile) - numpy_tiles(x, tile))
    again = 0.0  # rounded once more, to 3 bits of mantissa and steps of 2^-9
    if fmt.then is not None:
        again = np.abs(numpy_tiles(np.asarray(y), tile)) / 15 + 2.0**-10 * float(codes.global_scale)
    assert (error <= nearest + again + 1e-6 * np.abs(numpy_tiles(x, tile))).all()


@pytest.mark.parametrize("name", SYMMETRIC)
def test_odd_symmetry(name):
    x = jnp.asarray(samples(4, 6, 80))
    np.testing.assert_array_equal(qdq(-x, case(name)), -qdq(x, case(name)))


@pytest.mark.parametrize("name", [name for name in ALL if formats.get(name).scale.name == "e8m0"])
def test_powers_of_two_scale_exactly(name):
    x = jnp.asarray(samples(5, 6, 80))
    np.testing.assert_array_equal(qdq(x * 8, case(name)), 8 * qdq(x, case(name)))


@pytest.mark.parametrize("name", ALL)
@given(k=st.integers(1, 40), seed=st.integers(0, 99))
def test_padding_changes_nothing(name, k, seed):
    fmt = case(name)
    x = samples(seed, 3, k)
    padded = np.pad(x, ((0, 0), (0, 48 - k)))
    y = numpy_qdq(padded, fmt, fmt.granularity)  # equal to jqopt's, and quick for many shapes
    assert_bits(y[:, :k], numpy_qdq(x, fmt, fmt.granularity))
    assert (y[:, k:] == 0).all()


@pytest.mark.parametrize("name", [name for name in ALL if formats.get(name).block is not None])
def test_a_block_does_not_see_its_neighbours(name):
    fmt = formats.get(name).with_block(16) if name != "fp8_block" else formats.get(name).with_block((2, 16))
    x = samples(6, 4, 70)
    changed = x.copy()
    changed[:, 64:] = np.abs(x).max() * F32(0.5)  # the tensor's amax stays (nvfp4's global scale)
    x[3, 0] = changed[3, 0] = np.abs(x).max()
    a, b = (np.asarray(qdq(m, fmt)) for m in (x, changed))
    assert_bits(a[:, :64], b[:, :64])


@pytest.mark.parametrize("name", ALL)
def test_zeros_give_zeros(name):
    for zeros in (jnp.zeros((4, 70)), -jnp.zeros((4, 70)), jnp.full((4, 70), 1e-42)):
        codes, y = jax_qdq(zeros, case(name), None)
        assert (y == 0).all()
        assert not np.isnan(codes.scale.astype(jnp.float32)).any()
    x = jnp.asarray(samples(7, 4, 70)).at[:, :32].set(0)
    assert (jax_qdq(x, case(name), None)[1][:, :32] == 0).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("exponent", [-20, -10, 0, 14])
def test_ranges_survive(name, exponent):
    """A tensor of any magnitude from 2^-20 to 2^14 keeps its relative error (not so where a block scale underflows)."""
    x = np.random.default_rng(8).standard_normal((16, 128)).astype(F32)
    y = np.asarray(qdq(x * F32(2.0**exponent), case(name))) / F32(2.0**exponent)
    assert np.isfinite(y).all()
    error = np.sqrt(np.mean((x - y) ** 2) / np.mean(x**2))
    limits = {"int8": 0.01, "mxint8": 0.012, "mxfp6": 0.06, "fp8_e5m2": 0.06, "mxfp6_e2m3": 0.04, "mxfp4": 0.14}
    assert error < limits.get(name, 0.04 if formats.get(name).element.bits == 8 else 0.13)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp6", "mxfp4", "mxint8"])
@pytest.mark.parametrize("exponent", [-126, -117, 120])
def test_powers_of_two_at_the_ends_of_e8m0(name, exponent):
    """2^e alone in a block is 2^(e - s) under a scale 2^s: exact, since the element holds that power of two."""
    x = np.zeros((2, 32), np.float32)
    x[:, 5] = np.ldexp(1.0, exponent), -np.ldexp(1.0, exponent)
    format = formats.get(name)

    def stored(x):
        codes = num.quantize_matrix(x, format)
        return num.dequantize_matrix(codes.data, codes.scale, None, None, format, 32)

    for run in (stored, lambda x: num.qdq_matrix(x, format)) if 2.0**exponent >= num.TINY else (stored,):
        np.testing.assert_array_equal(np.asarray(jax.jit(run)(x)), x)
        np.testing.assert_array_equal(np.asarray(run(jnp.asarray(x))), x)


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_finite(name):
    x = jnp.asarray(samples(9, 4, 70))
    grad = jax.jit(jax.grad(lambda x: jnp.sum(num.qdq_matrix(x, case(name)) ** 2)))(x)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("name", ALL)
def test_nan_is_not_hidden(name):
    for x in (jnp.ones((2, 64)), jnp.ones((128, 128))):
        assert np.isnan(qdq(x.at[0, 3].set(jnp.nan), case(name))[0, :16]).all()


@pytest.mark.parametrize("name", ["int8", "fp8", "nvfp4", "mxfp8", "int4"])
def test_the_number_of_rows_may_be_symbolic(name):
    """Exported activations have a symbolic batch."""
    shape = jax.export.symbolic_shape("b, 48")
    granularity = "tensor" if name in ("int8", "fp8") else None
    f = jax.jit(lambda x: num.qdq_matrix(x, case(name), granularity=granularity))
    exported = jax.export.export(f)(jax.ShapeDtypeStruct(shape, jnp.float32))
    x = jnp.asarray(samples(10, 6, 48))
    assert_bits(exported.call(x), f(x))


# Scales found elsewhere ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "divisor"), [("int8", 127), ("int4", 7), ("fp8", 448), ("fp8_e5m2", 57344), ("nvfp4", 2688), ("nf4", 1)]
)
def test_scale_from_amax(name, divisor):
    amax = F32([0.0, 1e-40, 1.0, 3.7, 1e30])
    expected = F32([1, 1, *(amax[2:] / F32(divisor))])
    assert_bits(num.scale_from_amax(jnp.asarray(amax), case(name)), expected)
    assert_bits(jax.jit(lambda a: num.scale_from_amax(a, case(name)))(amax), expected)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "uint4"])
def test_no_scale_from_amax(name):
    with pytest.raises(UnsupportedError, match="no per-tensor scale"):
        num.scale_from_amax(jnp.ones(()), case(name))
    with pytest.raises(UnsupportedError, match="takes no tensor_amax"):
        num.qdq_matrix(jnp.ones((2, 32)), case(name), tensor_amax=jnp.ones(()))


@pytest.mark.parametrize(("name", "granularity"), [("int8", "tensor"), ("fp8", "tensor"), ("nvfp4", None)])
def test_a_given_scale(name, granularity):
    fmt, x = case(name), jnp.asarray(samples(11, 4, 48))
    amax = jnp.max(jnp.abs(x))
    own = qdq(x, fmt, granularity=granularity)
    given = functools.partial(qdq, x, fmt, granularity=granularity)
    assert_bits(given(tensor_amax=amax), own)
    assert_bits(given(tensor_scale=num.scale_from_amax(amax, fmt)), own)
    half = np.asarray(given(tensor_amax=amax / 2))
    assert np.abs(half).max() == pytest.approx(float(amax) / 2, rel=1 / 127)  # larger values saturate (-128)
    codes = num.quantize_matrix(x, fmt, granularity=granularity, tensor_amax=amax / 2)
    assert_bits(num.dequantize_matrix(*codes, fmt, 48), half)


def test_a_given_scale_for_each_matrix_of_a_stack():
    x = jnp.stack([jnp.asarray(samples(s, 4, 48)) for s in (1, 2)])
    amax = jnp.array([1.0, 100.0])
    y = num.qdq_matrix(x, case("nvfp4"), tensor_amax=amax)
    for i in range(2):
        assert_bits(y[i], num.qdq_matrix(x[i], case("nvfp4"), tensor_amax=amax[i]))


def test_a_scale_for_channels_cannot_be_given():
    with pytest.raises(UnsupportedError, match="granularity='tensor'"):
        num.quantize_matrix(jnp.ones((2, 8)), case("int8"), tensor_scale=jnp.ones(()))


def test_a_scale_that_does_not_fit():
    with pytest.raises(UnsupportedError, match=r"does not fit a matrix \[4, 64\]"):
        num.dequantize_matrix(jnp.zeros((4, 32), jnp.uint8), jnp.ones((4, 3)), None, None, case("int4"), 64)
