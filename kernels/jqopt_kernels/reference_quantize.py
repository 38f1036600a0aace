"""The oracle of the quantizer ops: elements looked up in tables of their values, transforms and packing spelled out.

Independent of `quantize_math`: the nearest value is found among all values of the element, a power of two among all
powers of two, a Hadamard transform is a list of 16 columns, random words are computed by Python loops over rounds.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import reference
from ._types import Kernel, Operand, Packed, Shapes, as_is
from .quantize_math import divide
from .quantize_way import (
    F32_MAX,
    LARGEST,
    NAN,
    NEAREST,
    SIXTH,
    TINY,
    UNSIGNED_ZERO,
    Random,
    Way,
    check,
    no_scales,
    packed_of,
    tile,
)
from .quantize_xla import no_gradient, rounded, supports


@functools.lru_cache
def _positive(element: str) -> np.ndarray:
    """The values of codes 0, 1, ... up to the largest, ascending."""
    table = reference.element_table(element)[: 1 << (reference.BITS[element] - 1)]
    return table[table <= LARGEST[element]]


def nearest(x: jax.Array, element: str) -> jax.Array:
    """Codes [...] int32 of |x|: the nearest value, of two as near the one with the even code; the largest for NaN."""
    values = _positive(element)
    middle = (values[1:] + values[:-1]) / np.float32(2)  # exact: one more bit
    size = jnp.minimum(jnp.where(x != x, jnp.inf, jnp.abs(x)), np.float32(LARGEST[element]))[..., None]
    odd = np.arange(len(middle)) % 2 == 1
    return jnp.sum((size > middle) | ((size == middle) & odd), axis=-1, dtype=jnp.int32)


def stochastic(x: jax.Array, element: str, dither: jax.Array) -> jax.Array:
    """Codes [...] int32 of |x|: the value below, or the one above where its part of the step plus dither reaches 1."""
    values = _positive(element)
    size = jnp.minimum(jnp.where(x != x, jnp.inf, jnp.abs(x)), np.float32(LARGEST[element]))
    below = jnp.sum(size[..., None] >= values[1:], axis=-1, dtype=jnp.int32)
    steps = np.diff(values, append=2 * values[-1] - values[-2])
    step, base = jnp.asarray(steps)[below], jnp.asarray(values)[below]
    count = jnp.floor(size / step + dither) - base / step  # a division by a power of two is exact
    return below + count.astype(jnp.int32)


def encode(x: jax.Array, element: str, dither: jax.Array | None = None) -> jax.Array:
    """float32 -> codes, one a byte: uint8, or int8."""
    if element == "int8":
        return jnp.clip(jnp.round(x), -128, 127).astype(jnp.int8)
    size = nearest(x, element) if dither is None else stochastic(x, element, dither)
    negative = jnp.signbit(x)
    if element in UNSIGNED_ZERO:
        negative = negative & (x != 0)
    code = size + jnp.where(negative, 1 << (reference.BITS[element] - 1), 0)
    return code.astype(jnp.uint8)


def largest(tiles: jax.Array) -> jax.Array:
    """max |x| of tiles [r, rows, c, columns], NaN if there is one."""
    size = jnp.abs(tiles)
    found = jnp.max(jnp.where(jnp.isnan(size), 0, size), axis=(1, 3))
    return jnp.where(jnp.any(jnp.isnan(size), axis=(1, 3)), jnp.nan, found)


def e4m3_value(x: jax.Array) -> jax.Array:
    """x >= 0 rounded to e4m3."""
    return jnp.asarray(_positive("e4m3"))[nearest(x, "e4m3")]


def power_of_two(amax: jax.Array, element: str) -> jax.Array:
    """e8m0 byte of the smallest power of two not below amax / largest; 0, 127 and 255 for 0, inf and NaN."""
    ratio = divide(amax, jnp.full_like(amax, LARGEST[element]))
    powers = reference.scale_table("e8m0")[1:255]  # normal numbers
    byte = jnp.sum(ratio[..., None] > powers, axis=-1) + 1
    byte = jnp.where(ratio < powers[0], 0, jnp.where(jnp.isinf(ratio), 127, byte))
    return jnp.where(jnp.isnan(ratio), 255, byte).astype(jnp.uint8)


def scales(amax: jax.Array, given: Any, spec: Operand, way: Way) -> tuple[jax.Array, jax.Array]:
    """(stored scales, what values are divided by, or with `encode` or e8m0 multiplied by) of tiles with this amax."""
    most = jnp.full_like(amax, LARGEST[spec.element])
    if spec.scale == "e8m0":
        byte = power_of_two(amax, spec.element)
        inverse = reference.scale_table("e8m0")[np.minimum(254 - np.arange(255), 254)]
        # a block with NaN: its scale says so, whatever its codes are
        return byte, jnp.asarray(np.append(inverse, -np.inf).astype(np.float32))[byte.astype(jnp.int32)]
    if spec.scale == "e4m3" and way.encode:
        whole = jnp.broadcast_to(given, amax.shape)
        exact = amax * (whole * np.float32(SIXTH))
        scale = e4m3_value(exact)
        if way.scale_up:
            above = jnp.asarray(np.append(_positive("e4m3")[1:], np.float32(448)))[nearest(exact, "e4m3")]
            scale = jnp.where(scale < exact, above, scale)
        one = jnp.ones_like(scale)
        return encode(scale, "e4m3"), jnp.minimum(divide(one, scale * divide(one, whole)), np.float32(F32_MAX))
    if spec.scale == "e4m3":
        whole = jnp.broadcast_to(given, amax.shape)
        exact = divide(amax, whole * np.float32(LARGEST[spec.element]))
        scale = jnp.where(jnp.isnan(exact), 448, e4m3_value(jnp.clip(exact, 2.0**-9, 448)))
        return encode(jnp.where(exact == 0, 1, scale), "e4m3"), scale * whole
    if not way.encode:
        scale = divide(amax, most)
        scale = jnp.where(scale < TINY, 1, scale)
        return scale, scale
    scale = jnp.minimum(divide(most, amax), np.float32(F32_MAX))
    if way.power_of_two:  # the largest power of two not above it
        scale = jnp.exp2(jnp.asarray(np.arange(-126, 128), jnp.float32))[
            jnp.sum(scale[..., None] >= 2.0 ** np.arange(-125, 128, dtype=np.float32), axis=-1)
        ]
    scale = jnp.where((amax == 0) | (scale == 0), 1, scale)
    return divide(jnp.ones_like(scale), scale), scale


def hadamard(x: jax.Array, signs: tuple[int, ...]) -> jax.Array:
    """Blocks of 16 along k as 16 arrays, four rounds of sums and differences, rounded to bfloat16."""
    m, k = x.shape
    parts = [x.reshape(m, k // 16, 16)[..., i] * np.float32(s) for i, s in enumerate(signs)]
    for half in (8, 4, 2, 1):
        parts = [parts[i] + parts[i + half] if not i & half else parts[i - half] - parts[i] for i in range(16)]
    return lax.reduce_precision(jnp.stack(parts, axis=-1).reshape(m, k) * np.float32(0.25), 8, 7)


def uniform(random: Random, r: int, c: int) -> jax.Array:
    """(n + 1/2) / 2^16 of 16 bits for each value: of Philox-4x32-10 of (row, column / 8, 0, 0), low half of a word
    first."""
    start = jnp.zeros(2, jnp.uint32) if random.start is None else random.start
    rows = jnp.broadcast_to(start[0] + jnp.arange(r, dtype=jnp.uint32)[:, None], (r, c))
    columns = start[1] + jnp.broadcast_to(jnp.arange(c, dtype=jnp.uint32), (r, c))
    counter = [rows, columns // 8, jnp.zeros_like(rows), jnp.zeros_like(rows)]
    key = [random.key[0], random.key[1]]
    for _ in range(10):
        (high, low), (other_high, other_low) = _product(counter[0], 0xD2511F53), _product(counter[2], 0xCD9E8D57)
        counter = [other_high ^ counter[1] ^ key[0], other_low, high ^ counter[3] ^ key[1], low]
        key = [key[0] + np.uint32(0x9E3779B9), key[1] + np.uint32(0xBB67AE85)]
    word = jnp.select([columns % 8 // 2 == i for i in range(4)], counter)
    number = jnp.where(columns % 2 == 0, word & 0xFFFF, word >> 16)
    return (number.astype(jnp.float32) + 0.5) / 2**16


def _product(x: jax.Array, factor: int) -> tuple[jax.Array, jax.Array]:
    """Upper and lower 32 bits of uint32 x times a number, from products of their halves."""
    x_high, x_low, high, low = x >> 16, x & 0xFFFF, np.uint32(factor >> 16), np.uint32(factor & 0xFFFF)
    middle = x_high * low + (x_low * low >> 16)
    across = x_low * high + (middle & 0xFFFF)
    return x_high * high + (middle >> 16) + (across >> 16), x * np.uint32(factor)


def pack(codes: jax.Array, element: str) -> jax.Array:
    """Codes as a little-endian stream of bits, row by row."""
    bits = reference.BITS[element]
    r, k = codes.shape
    if bits == 8:
        return codes
    stream = ((codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1).reshape(r, k * bits)
    stream = jnp.pad(stream, ((0, 0), (0, -k * bits % 8))).reshape(r, -(-k * bits // 8), 8)
    return jnp.sum(stream << np.arange(8, dtype=np.uint8), axis=-1, dtype=jnp.uint8)


def _quantize(x, *, spec, way=NEAREST, scale=None, random=None, packed=False) -> Packed:
    check(spec, way, x.shape[1], scale, random)
    return _quantized(x, spec, way, scale, None if random is None else uniform(random, *x.shape), packed)


def _quantized(x, spec: Operand, way: Way, scale: Any, dither: jax.Array | None, packed: bool) -> Packed:
    x = x.astype(jnp.float32)
    m, k = x.shape
    x = x if way.hadamard is None else hadamard(x, way.hadamard)
    shared, stored = tile(spec, k), None
    if 0 in (m, k):
        stored, factor = no_scales(spec, m, k), jnp.ones_like(x)
    elif shared is None:
        assert scale is not None
        factor = scale
    else:
        rows, columns = shared
        wide = jnp.pad(x, ((0, -m % rows), (0, -k % columns)))
        tiles = wide.reshape(wide.shape[0] // rows, rows, wide.shape[1] // columns, columns)
        stored, factor = scales(largest(tiles), scale, spec, way)
        factor = jnp.repeat(jnp.repeat(factor, rows, axis=0), columns, axis=1)[:m, :k]
    scaled = x * factor if way.encode or spec.scale == "e8m0" else divide(x, jnp.broadcast_to(factor, x.shape))
    codes = encode(scaled, spec.element, dither)
    if way.keep_nan and spec.element in NAN:
        codes = jnp.where(jnp.isnan(x), jnp.uint8(NAN[spec.element]), codes)
    whole = scale if scale is None or not way.encode else divide(jnp.ones_like(scale), scale)
    return packed_of(pack(codes, spec.element) if packed else codes, stored, whole, spec)


@no_gradient
def quantize(x, **options) -> Packed:
    """x [m, k] of any float dtype -> its codes and scales, as `Packed`.

    Args:
        spec: the format, an `Operand`.
        way: a `Way`: how scales are found and values rounded.
        scale: [] float32, the scale of the tensor: of formats with a global scale, or with granularity "tensor". With
            `way.encode` it is what values are multiplied by.
        random: a `Random`, for stochastic rounding.
        packed: codes as a `Packed` weight holds them (4-bit codes by twos), not one a byte.

    Raises:
        ValueError: arguments that contradict each other.
        TypeError: when differentiated: pass lax.stop_gradient(x).
    """
    return _quantize(x, **options)


@no_gradient
def swiglu_quantize(gate, up, **options) -> Packed:
    """quantize(silu(gate) * up), both [m, k]; the product is rounded to their dtype first, as if it were written."""
    y = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return _quantize(rounded(y, gate.dtype), **options)


@no_gradient
def norm_quantize(x, weight, *, eps=1e-6, **options) -> Packed:
    """quantize(RMSNorm(x [m, k]) * weight [k]), rounded to x's dtype first; sums in float32."""
    y = x.astype(jnp.float32)
    y = y / jnp.sqrt(jnp.mean(jnp.square(y), axis=1, keepdims=True) + eps) * weight.astype(jnp.float32)
    return _quantize(rounded(y, x.dtype), **options)


@no_gradient
def quantize_both(x, *, spec, way=NEAREST, column_way=NEAREST, scale=None, column_scale=None, random=None,
                  column_random=None, packed=False) -> tuple[Packed, Packed]:  # fmt: skip
    """(quantize(x [m, k]), quantize(x.T)), where the second has a way, a scale and a key of its own.

    The random number of a value belongs to its place in x, in both copies.
    """
    rows = _quantize(x, spec=spec, way=way, scale=scale, random=random, packed=packed)
    check(spec, column_way, x.shape[0], column_scale, column_random)
    turned = None if column_random is None else uniform(column_random, *x.shape).T
    return rows, _quantized(x.T, spec, column_way, column_scale, turned, packed)


@no_gradient
def amax(x, *, spec, way=NEAREST) -> jax.Array:
    """The largest |x| of x [m, k]: [] float32; [m, 1] for formats whose rows have a scale each."""
    y = x.astype(jnp.float32)
    y = y if way.hadamard is None else hadamard(y, way.hadamard)
    if 0 in y.shape:
        return jnp.zeros((y.shape[0], 1) if spec.granularity == "channel" else (), jnp.float32)
    return largest(y[:, None, None, :]) if spec.granularity == "channel" else largest(y[None, :, None, :])[0, 0]


def swizzle(scale: jax.Array) -> jax.Array:
    """Scales [rows, columns] in tiles of 128x4, padded with zeros: row 32 q + r of a tile at bytes 16 r + 4 q."""
    rows, columns = -(-scale.shape[0] // 128) * 128, -(-scale.shape[1] // 4) * 4
    padded = jnp.pad(scale, ((0, rows - scale.shape[0]), (0, columns - scale.shape[1])))
    return padded[_places(rows, columns)].reshape(rows, columns)


def unswizzle(swizzled: jax.Array, rows: int, columns: int) -> jax.Array:
    """The inverse of `swizzle` for scales [rows, columns]."""
    whole = jnp.zeros(swizzled.shape, swizzled.dtype)
    return whole.at[_places(*swizzled.shape)].set(swizzled.reshape(-1))[:rows, :columns]


def _places(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column that each byte of swizzled scales comes from."""
    tile, byte = np.divmod(np.arange(rows * columns), 512)
    r, rest = np.divmod(byte, 16)
    q, c = np.divmod(rest, 4)
    return tile // (columns // 4) * 128 + 32 * q + r, tile % (columns // 4) * 4 + c


def _kernel(op: str, run: Any, supports: Any = supports) -> Kernel:
    return Kernel(f"reference_{op}", op, supports, as_is, run, backend="reference")


def _anything(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    return None


def _not_rows(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    return "scales of rows belong to one copy" if rhs.granularity == "channel" else supports(lhs, rhs, device, shapes)


reference_quantize = _kernel("quantize", quantize)
reference_swiglu_quantize = _kernel("swiglu_quantize", swiglu_quantize)
reference_norm_quantize = _kernel("norm_quantize", norm_quantize)
reference_quantize_both = _kernel("quantize_both", quantize_both, _not_rows)
reference_amax = _kernel("amax", amax, _anything)
reference_swizzles = (_kernel("swizzle", swizzle, _anything), _kernel("unswizzle", unswizzle, _anything))
