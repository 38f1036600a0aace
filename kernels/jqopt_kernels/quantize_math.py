"""From values to codes and scales by bit operations, in the few operations that XLA and Triton both have.

Written for one tile of a matrix, which may be the whole of it: the XLA form and the Pallas kernels are these functions
on different tiles. Rounding is done as `jqopt._numerics` does it: a float32's exponent bits give the step, one product
with a power of two the number of steps; rounding to nearest even is an addition of 2^23. Nothing depends on how a
compiler orders or contracts operations, so the same bits come out everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._types import Operand
from .decode import CODINGS
from .quantize_way import F32_MAX, LARGEST, NAN, SIXTH, TINY, UNSIGNED_ZERO, Way

Divide = Callable[[jax.Array, jax.Array], jax.Array]
"""x / y of one shape, correctly rounded."""

Product = Callable[[jax.Array, np.uint32], tuple[jax.Array, jax.Array]]
"""The upper and the lower 32 bits of uint32 numbers times one."""

Words = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

_MAGNITUDE, _SIGN, _EXPONENT, _SMALLEST_NORMAL = (
    np.uint32(0x7FFFFFFF), np.uint32(0x80000000), np.uint32(0x7F800000), np.uint32(0x00800000))  # fmt: skip
_FACTORS = (np.uint32(0xD2511F53), np.uint32(0xCD9E8D57))
_KEY_STEPS = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))  # from one round's key to the next one's


def divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y under XLA, which turns a division by a broadcast value into a product with its reciprocal.

    A divisor that depends on x (only formally: x != x is false unless the quotient is NaN) keeps the division.
    """
    return lax.div(x, jnp.where(x != x, jnp.float32(1), y))


def bits_of(x: jax.Array) -> jax.Array:
    """float32 -> its bits, uint32."""
    return lax.bitcast_convert_type(x, jnp.uint32)


def of_bits(bits: jax.Array) -> jax.Array:
    """Bits, uint32 -> float32."""
    return lax.bitcast_convert_type(bits, jnp.float32)


def _word(x: float) -> np.uint32:
    return np.float32(x).view(np.uint32)


def _signed(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.int32)


# Elements -----------------------------------------------------------------------------------------------------------


def _steps(magnitude: jax.Array, element: str, dither: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Bits of the power of two at or below a value (of the smallest normal one below that); the value in its steps."""
    _, mantissa, bias = CODINGS[element]
    assert mantissa is not None and bias is not None, element
    power = jnp.maximum(magnitude & _EXPONENT, _word(2.0 ** (1 - bias)))
    exact = of_bits(magnitude) * of_bits(np.uint32((254 + mantissa) << 23) - power)
    if dither is not None:
        return power, (exact + dither).astype(jnp.int32).astype(jnp.uint32)  # never negative: towards zero is down
    return power, bits_of(exact + jnp.float32(2.0**23)) - _word(2.0**23)


def codes_of(x: jax.Array, element: str, dither: jax.Array | None = None) -> jax.Array:
    """float32 -> codes in uint32 (int8: the low byte), saturating; to nearest even, or up where part + dither >= 1."""
    bits, mantissa, bias = CODINGS[element]
    if mantissa is None or bias is None:
        near = jnp.minimum(jnp.maximum(x, jnp.float32(-129)), jnp.float32(128)) + jnp.float32(1.5 * 2**23)
        whole = _signed(bits_of(near)) - np.int32(_word(1.5 * 2**23))
        return jnp.minimum(jnp.maximum(whole, np.int32(-128)), np.int32(127)).astype(jnp.uint32) & np.uint32(0xFF)
    word = bits_of(x)
    size = word & _MAGNITUDE
    power, steps = _steps(jnp.minimum(size, _word(LARGEST[element])), element, dither)
    code = ((power - _word(2.0 ** (1 - bias))) >> np.uint32(23 - mantissa)) + steps
    sign = (word & _SIGN) >> np.uint32(32 - bits)
    if element in UNSIGNED_ZERO:
        sign = jnp.where(size < _SMALLEST_NORMAL, np.uint32(0), sign)
    return code | sign


def _rounded_e4m3(x: jax.Array) -> jax.Array:
    """x >= 0 to the nearest value of e4m3, at most 448."""
    power, steps = _steps(jnp.minimum(bits_of(x), _word(448)), "e4m3", None)
    return _signed(steps).astype(jnp.float32) * of_bits(power - np.uint32(3 << 23))


def pairs(codes: jax.Array) -> jax.Array:
    """4-bit codes [r, c] -> bytes [r, c / 2], low nibble first."""
    low, high = halves(codes.reshape(codes.shape[0], -1, 2), 2)
    return (low | high << np.uint32(4)).reshape(codes.shape[0], -1)


def halves(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The two parts, of size 1, of an axis of size 2."""
    a, b = lax.split(x, (1, 1), axis=axis)
    return a, b


def joined(a: jax.Array, b: jax.Array) -> jax.Array:
    """[..., 2] of two arrays."""
    return jnp.concatenate([a[..., None], b[..., None]], axis=-1)


# Scales -------------------------------------------------------------------------------------------------------------


def amax(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Largest |x|, found among the bits, which rank as the values do: NaN, ranking highest, is not lost."""
    return of_bits(jnp.max(bits_of(x) & _MAGNITUDE, axis=axes))


def exponents(largest: jax.Array, element: str, div: Divide) -> jax.Array:
    """e8m0 bits of the smallest power of two not below amax / (the element's largest): 127 for inf, 255 for NaN."""
    ratio = bits_of(div(largest, jnp.full_like(largest, LARGEST[element])))
    exponent = (ratio + np.uint32(0x7FFFFF)) >> np.uint32(23)
    known = jnp.where(ratio == _EXPONENT, np.uint32(127), jnp.minimum(exponent, np.uint32(255)))
    return jnp.where(ratio < _SMALLEST_NORMAL, np.uint32(0), known)


def tile_scales(
    largest: jax.Array, given: jax.Array | None, spec: Operand, way: Way, div: Divide
) -> tuple[jax.Array, jax.Array]:
    """(what is stored: float32, or bits in uint32; what values are divided by, or with `encode` multiplied by)."""
    if spec.scale == "e8m0":
        exponent = exponents(largest, spec.element, div)
        return exponent, of_bits((np.uint32(254) - exponent) << np.uint32(23))
    if spec.scale == "e4m3":
        assert given is not None
        whole = jnp.broadcast_to(given, largest.shape)
        return _e4m3_encode(largest, whole, way, div) if way.encode else _e4m3_decode(largest, whole, spec, div)
    most = jnp.full_like(largest, LARGEST[spec.element])
    if not way.encode:
        scale = div(largest, most)
        scale = jnp.where(scale < TINY, jnp.float32(1), scale)
        return scale, scale
    scale = jnp.minimum(div(most, largest), jnp.float32(F32_MAX))
    if way.power_of_two:
        scale = of_bits(bits_of(scale) & _EXPONENT)
    scale = jnp.where((largest == 0) | (scale == 0), jnp.float32(1), scale)
    return div(jnp.ones_like(scale), scale), scale


def _e4m3_decode(largest, whole, spec: Operand, div: Divide) -> tuple[jax.Array, jax.Array]:
    exact = div(largest, whole * jnp.float32(LARGEST[spec.element]))
    # clamped as bits, so that NaN becomes the largest scale: it must not spread over its block
    kept = of_bits(jnp.minimum(jnp.maximum(bits_of(exact), _word(2.0**-9)), _word(448)))
    stored = jnp.where(exact == 0, np.uint32(0x38), codes_of(kept, "e4m3"))
    return stored, _rounded_e4m3(kept) * whole


def _e4m3_encode(largest, whole, way: Way, div: Divide) -> tuple[jax.Array, jax.Array]:
    exact = largest * (whole * jnp.float32(SIXTH))
    near = _rounded_e4m3(exact)
    if way.scale_up:  # one step of the mantissa of a normal number, of 2^-9 below those
        step = of_bits(jnp.maximum(bits_of(near) & _EXPONENT, np.uint32(121 << 23)) - np.uint32(3 << 23))
        near = jnp.where(near < exact, jnp.minimum(near + step, jnp.float32(448)), near)
    one = jnp.ones_like(near)
    return codes_of(near, "e4m3"), jnp.minimum(div(one, near * div(one, whole)), jnp.float32(F32_MAX))


# A tile -------------------------------------------------------------------------------------------------------------


def quantize_tile(
    x: jax.Array, given: Any, spec: Operand, way: Way, tile: tuple[int, int] | None, dither: Any, div: Divide
) -> tuple[jax.Array, jax.Array | None]:
    """x [r, c] float32, r and c multiples of the tile -> codes in uint32 [r, c], stored scales [r / rows, c / columns].

    tile: (rows, columns) that share a scale; None: `given` [] is the scale of all.
    """
    if tile is None:
        factor, stored = jnp.broadcast_to(given, x.shape), None
    else:
        (r, c), (rows, columns) = x.shape, tile
        tiles = x.reshape(r // rows, rows, c // columns, columns)
        largest = amax(amax(tiles, (3,)), (1,))
        stored, factor = tile_scales(largest, given, spec, way, div)
        factor = jnp.broadcast_to(factor[:, None, :, None], tiles.shape).reshape(x.shape)
    scaled = x * factor if way.encode or spec.scale == "e8m0" else div(x, factor)
    codes = codes_of(scaled, spec.element, dither)
    if way.keep_nan and spec.element in NAN:
        codes = jnp.where((bits_of(x) & _MAGNITUDE) > _EXPONENT, np.uint32(NAN[spec.element]), codes)
    return codes, stored


def hadamard(x: jax.Array, signs: jax.Array) -> jax.Array:
    """Each 16 consecutive values of x [r, c], times (1/4) diag(signs) H16, rounded to bfloat16 and kept float32.

    A butterfly on the highest bit of the place in its 16, which becomes the lowest: after four the order is back.
    """
    r, c = x.shape
    y = (x * signs).reshape(-1, 16)
    for _ in range(4):
        a, b = (part.reshape(-1, 8) for part in halves(y.reshape(-1, 2, 8), 1))
        y = joined(a + b, a - b).reshape(-1, 16)
    return bfloat16(y.reshape(r, c) * jnp.float32(0.25))


def bfloat16(x: jax.Array) -> jax.Array:
    """x rounded to bfloat16, in a way that no compiler drops."""
    bits = bits_of(x)
    near = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return of_bits(jnp.where((bits & _MAGNITUDE) > _EXPONENT, bits, near))


# Random numbers -----------------------------------------------------------------------------------------------------


def product(x: jax.Array, factor: np.uint32) -> tuple[jax.Array, jax.Array]:
    """Upper and lower 32 bits of x * factor, from products of halves: XLA can't partition `lax.mulhi` (JAX 0.10)."""
    low = np.uint32(0xFFFF)
    x_high, x_low, f_high, f_low = x >> np.uint32(16), x & low, factor >> np.uint32(16), factor & low
    middle = x_high * f_low + ((x_low * f_low) >> np.uint32(16))
    upper = x_high * f_high + (middle >> np.uint32(16)) + ((x_low * f_high + (middle & low)) >> np.uint32(16))
    return upper, x * factor


def philox(key: tuple[Any, Any], counter: Words, times: Product = product) -> Words:
    """Philox-4x32 with 10 rounds (Salmon et al. 2011): four random words for each four counters."""
    a, b, c, d = counter
    for i in range(10):
        first, second = (key[n] + np.uint32(i * int(_KEY_STEPS[n]) & 0xFFFFFFFF) for n in (0, 1))
        (high, low), (other_high, other_low) = times(a, _FACTORS[0]), times(c, _FACTORS[1])
        a, b, c, d = other_high ^ b ^ first, other_low, high ^ d ^ second, low
    return a, b, c, d


def uniform(key: tuple[Any, Any], row: Any, column: Any, r: int, c: int, times: Product = product) -> jax.Array:
    """float32 [r, c]: (n + 1/2) / 2^16 for the values from this global row and column on (c and it multiples of 8).

    The counter is a value's row and its column over 8; four words are the 16 bits of eight neighbours.
    """
    rows = row + lax.broadcasted_iota(jnp.uint32, (r, c // 8), 0)
    columns = (column >> np.uint32(3)) + lax.broadcasted_iota(jnp.uint32, (r, c // 8), 1)
    nought = jnp.zeros_like(rows)
    words = philox(key, (rows, columns, nought, nought), times)
    half = joined(_in_order([w & np.uint32(0xFFFF) for w in words]), _in_order([w >> np.uint32(16) for w in words]))
    return (_signed(half.reshape(r, c)).astype(jnp.float32) + jnp.float32(0.5)) * jnp.float32(2.0**-16)


def _in_order(four: list[jax.Array]) -> jax.Array:
    """Four arrays -> [..., 2, 2], the first two in the first row."""
    a, b, c, d = four
    return joined(joined(a, c), joined(b, d))
