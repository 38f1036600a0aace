"""Codes and scale bits -> f32 by integer operations alone, in forms that XLA vectorizes.

Float elements are placed in the bits of a float16, whose subnormals survive where a float32 or bfloat16 of the same
bits would be flushed to zero (XLA flushes those on CPU): the value is then exact up to a power of two, `unit`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .reference import NF4


class Coding(NamedTuple):
    """How an element's code is read: bits in all, bits of mantissa and exponent bias (floats only)."""

    bits: int
    mantissa: int | None = None
    bias: int | None = None


CODINGS = {
    "int8": Coding(8),
    "int4": Coding(4),
    "uint4": Coding(4),
    "nf4": Coding(4),
    "e2m1": Coding(4, 1, 1),
    "e2m3": Coding(6, 3, 1),
    "e3m2": Coding(6, 2, 3),
    "e4m3": Coding(8, 3, 7),
    "e5m2": Coding(8, 2, 15),
}


# XLA converts these types itself, with one operation to compile instead of ten; as fast as the steps below for a whole
# matrix on its own, and up to five times slower in a loop over tiles.
NATIVE = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


def unit(element: str) -> float:
    """The power of two that `raw` leaves out: value = raw * unit."""
    bias = CODINGS[element].bias
    return 1.0 if bias is None else 2.0 ** (15 - bias)


def raw(codes: jax.Array, element: str) -> jax.Array:
    """Codes, one a byte, any shape -> f32 values divided by `unit(element)`; NaN where the format has NaN."""
    bits, mantissa, _ = CODINGS[element]
    if element == "nf4":
        return _nf4(codes)
    if element == "uint4":
        return codes.astype(jnp.float32)
    if mantissa is None:
        return _signed(codes, bits).astype(jnp.float32)
    # The code at the top of 16 bits, its exponent then shifted down to where the last bits of a float16's exponent
    # are; the copies of the sign that the shift leaves behind it are masked out.
    # Written in lax: every weight's decoding is traced, and an operator of jnp takes three times as long.
    top = lax.shift_left(lax.convert_element_type(codes, np.uint16), np.uint16(16 - bits))
    out = _from_top(lax.bitcast_convert_type(top, np.int16), element)
    if element != "e4m3":
        return out
    nan = lax.eq(lax.bitwise_and(codes, np.uint8(0x7F)), np.uint8(0x7F))
    return lax.select_n(nan, out, lax.full_like(out, np.nan))


def _from_top(top: jax.Array, element: str) -> jax.Array:
    """int16 with a code in its highest bits, whatever is below it -> f32 values divided by `unit(element)`."""
    bits, mantissa, _ = CODINGS[element]
    assert mantissa is not None, element
    shift, kept = 6 + mantissa - bits, (1 << (bits - 1)) - 1 << (10 - mantissa)
    half = lax.bitwise_and(lax.shift_right_arithmetic(top, np.int16(shift)), np.int16(kept - (1 << 15)))
    return lax.convert_element_type(lax.bitcast_convert_type(half, np.float16), np.float32)


def whole(data: jax.Array, element: str, k: int) -> tuple[jax.Array, float]:
    """Packed codes [rows, k_packed] -> f32 values of all k columns [rows, k], divided by the number beside them."""
    if element in NATIVE:
        return lax.convert_element_type(lax.bitcast_convert_type(data[:, :k], NATIVE[element]), np.float32), 1.0
    if element != "e2m1":
        return raw(unpack(data, element, k), element), unit(element)
    # Each byte becomes two int16, its low and its high nibble on top: half the steps of unpacking first.
    pair = lax.mul(lax.convert_element_type(data, np.uint32), np.uint32((1 << 12) + (1 << 24)))
    top = lax.bitcast_convert_type(pair, np.int16).reshape(data.shape[0], -1)
    return _from_top(top if top.shape[1] == k else top[:, :k], element), unit(element)


def values(codes: jax.Array, element: str) -> jax.Array:
    """Codes, one a byte -> exact f32 values."""
    return raw(codes, element) if unit(element) == 1.0 else lax.mul(raw(codes, element), np.float32(unit(element)))


def scales(scale: jax.Array, kind: str | None) -> jax.Array:
    """Stored scales -> f32: float32 as it is, uint8 bits of e4m3, or e8m0 = 2^(byte - 127).

    XLA on CPU flushes the one subnormal scale (e8m0 byte 0) to zero when it multiplies.
    """
    if scale.dtype != jnp.uint8:
        return scale.astype(jnp.float32)
    native = jnp.float8_e4m3fn if kind == "e4m3" else jnp.float8_e8m0fnu
    return lax.convert_element_type(lax.bitcast_convert_type(scale, native), np.float32)


def scales_by_bits(stored: jax.Array, kind: str | None) -> jax.Array:
    """As `scales`, in integer operations: those that Triton has, and that XLA on CPU turns into vectors."""
    if stored.dtype != jnp.uint8:
        return stored.astype(jnp.float32)
    if kind == "e4m3":
        return values(stored, "e4m3")
    byte = lax.convert_element_type(stored, np.int32)
    bits = lax.select(byte == 0, jnp.full_like(byte, 1 << 22), lax.shift_left(byte, jnp.full_like(byte, 23)))
    value = lax.bitcast_convert_type(bits, jnp.float32)  # 2^(byte - 127): the exponent's field; 2^-127 is subnormal
    return lax.select(byte == 255, jnp.full_like(value, np.nan), value)


def plane_count(element: str) -> int:
    """How many planes `planes` gives: 1, 2 (4-bit) or 4 (6-bit)."""
    return {8: 1, 4: 2, 6: 4}[CODINGS[element].bits]


def split(data: jax.Array, element: str) -> tuple[jax.Array, ...]:
    """Packed codes [rows, k_packed] -> arrays of which `planes` reads the same column of each.

    Three arrays for 6-bit codes (first, second and third bytes), else the data itself. It is a step of its own because
    it is the only one with strides: done before a loop over rows, it keeps the loop's body elementwise.
    """
    return tuple(data[:, i::3] for i in range(3)) if CODINGS[element].bits == 6 else (data,)


def planes(parts: tuple[jax.Array, ...], element: str) -> list[jax.Array]:
    """What `split` gives, [rows, c] each -> P arrays of codes [rows, c]; array p holds columns p, p + P ... of k.

    Splitting instead of interleaving leaves every step elementwise; the other operand is split the same way.
    """
    bits = CODINGS[element].bits
    if bits == 4:
        return [parts[0] & 15, parts[0] >> 4]
    if bits == 6:
        b0, b1, b2 = parts
        return [b0 & 63, (b0 >> 6) | ((b1 & 15) << 2), (b1 >> 4) | ((b2 & 3) << 4), b2 >> 2]
    return [parts[0]]


def raw_planes(data: jax.Array, element: str) -> list[jax.Array]:
    """`raw` of the `planes` of packed codes [rows, c] (not 6-bit ones), in fewer steps where there is a shorter way."""
    if element not in ("e2m1", "int4"):
        return [raw(codes, element) for codes in planes((data,), element)]
    # widened once for both nibbles, each of which is then shifted to the top
    wide = lax.convert_element_type(lax.bitcast_convert_type(data, np.uint8), np.uint16)
    tops = [lax.bitcast_convert_type(lax.shift_left(wide, np.uint16(shift)), np.int16) for shift in (12, 8)]
    if element == "e2m1":
        return [_from_top(top, element) for top in tops]
    return [lax.convert_element_type(lax.shift_right_arithmetic(top, np.int16(12)), np.float32) for top in tops]


def unpack(data: jax.Array, element: str, k: int) -> jax.Array:
    """Packed codes [rows, k_packed] -> one code a byte [rows, k]."""
    codes = planes(split(data, element), element)
    if len(codes) == 1:
        return data[:, :k]
    return jnp.stack(codes, axis=-1).reshape(data.shape[0], -1)[:, :k]


def _signed(codes: jax.Array, bits: int) -> jax.Array:
    """Two's complement of `bits` bits -> int8. For 4 bits both nibbles and sign-extended bytes are read."""
    if bits == 8:
        return codes if codes.dtype == jnp.int8 else lax.bitcast_convert_type(codes, jnp.int8)
    return ((codes.astype(jnp.int8) & 15) ^ 8) - 8


def _nf4(codes: jax.Array) -> jax.Array:
    """Binary tree of selects: a gather would be one scalar load an element."""
    level = [jnp.float32(v) for v in np.array(NF4, np.float32)]
    for bit in range(4):
        chosen = (codes & (1 << bit)) != 0
        level = [jnp.where(chosen, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
    return level[0]
