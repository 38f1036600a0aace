"""The bits: encode, decode and pack codes, and find the scales of a matrix [..., n, k] (k contracted, last).

Every function is elementwise or a reduction, so XLA fuses it, and gives the same bits eagerly, under jit, vmap and
scan, and on every device (but for divisions on CUDA, which XLA makes wrong by up to two units). Three rules keep it
so: no division by a constant or a broadcast value except through `divide`; powers of two are made from their exponent
bits; a number below `TINY` counts as zero (XLA's CPU backend flushes subnormals, so they are never relied upon).

What runs at every activation is written in `lax`, and in as few operations as it takes: a model compiles it once for
each site, and an operator of `jnp` takes three times as long to trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jqopt.errors import UnsupportedError
from jqopt.formats import E4M3, Element, Format, ceil_div

# Scales below this are taken for zero: 2^-117 * 2^-9 (the smallest e4m3) is the smallest normal float32.
TINY = 2.0**-117
_SIGN, _MAGNITUDE, _SMALLEST_NORMAL, _INFINITY = 0x80000000, 0x7FFFFFFF, 0x00800000, 0x7F800000
_E8M0_NAN = 255


class Codes(NamedTuple):
    """A quantized matrix: packed codes [..., n, bytes], scales [..., rows, cols], and what else the format has."""

    data: Array
    scale: Array
    global_scale: Array | None = None
    zero_point: Array | None = None


def divide(x: Array | float, y: Array | float) -> Array:
    """x / y in float32, correctly rounded (IEEE 754).

    XLA turns `x / constant` and `x / broadcast(s)` into a product with the reciprocal, which differs in a third of all
    results; a divisor that depends on x (only formally: x != x is false) keeps the division.
    """
    if not isinstance(x, Array):
        return x / jnp.asarray(y)
    if np.ndim(y) == 0 and not isinstance(y, Array):
        return _over(x, np.asarray(y, x.dtype))
    y = jnp.asarray(y)
    x, y = jnp.broadcast_arrays(x, y) if x.shape != y.shape else (x, y)
    return lax.div(x, lax.select_n(lax.ne(x, x), y, x))


def _over(x: Array, y: Array | np.ndarray | np.floating) -> Array:
    """`divide` in half the steps, where nobody asks for the gradient of y: a clamp to [y, y] depends on x formally."""
    return lax.div(x, lax.clamp(y, x, y))


def written(x: Array) -> Array:
    """x in float32, computed once and written, where XLA would compute it again in each kernel that reads it.

    A division is too costly for XLA to repeat; an optimization barrier is gone before it fuses on CPUs. So the kernels
    of a quantizer hold nothing but the quantizer, and are compiled once for all sites of a shape.
    """
    return _over(x.astype(jnp.float32), np.float32(1))


def replaced(x: Array, where: Array, by: float) -> Array:
    """x with a constant in place of the values, none of them NaN, where a condition holds.

    The constant is made from x. An array of equal numbers that depends on nothing JAX takes out of a scan that is
    differentiated; XLA then keeps it in memory, and compiles a kernel that fills it.
    """
    constant = np.asarray(by, x.dtype)
    if by != by:
        return lax.select_n(where, x, from_bits(lax.bitwise_or(to_bits(x), _word(by))))
    return lax.select_n(where, x, lax.clamp(constant, x, constant))


# Elements: one code for one value -----------------------------------------------------------------------------------


def encode(x: Array, element: Element, dither: Array | None = None) -> Array:
    """Codes of x, rounded to nearest, ties to even, saturating: uint8, or int8 for signed integers; not packed.

    Not finite: inf saturates; NaN has no code (floats give the largest, integers are undefined).

    Args:
        dither: of floats, of x's shape, in [0, 1): rounds up in magnitude where the part of the step that x lies above
            the value below it, plus this, reaches 1. Uniform random numbers round stochastically.
    """
    if element.kind == "int":
        codes = jnp.clip(jnp.round(x), element.min, element.max)
        return codes.astype(jnp.int8 if element.min < 0 else jnp.uint8)
    if element.kind == "table":
        return _count_above(x, element)
    return _encode_float(x, element, dither)


def decode(codes: Array, element: Element) -> Array:
    """float32 values of codes (exact): the inverse of `encode`; a nibble as `unpack` gives it is sign-extended."""
    if element.kind == "int":
        if element.min < 0 and element.bits < 8:
            half = 1 << (element.bits - 1)
            codes = ((codes.astype(jnp.int32) & (2 * half - 1)) ^ half) - half
        return codes.astype(jnp.float32)
    if element.kind == "table":
        return _select(codes, element.table)
    return _decode_float(codes, element)


def round_to(x: Array, element: Element, dither: Array | None = None, exact: bool = True) -> Array:
    """decode(encode(x, dither)), bit for bit, without going through the codes; but NaN stays NaN.

    `exact=False`: a zero has the sign of x, in every element.
    """
    if element.kind == "int":
        return jnp.clip(jnp.round(x), element.min, element.max).astype(jnp.int32).astype(jnp.float32)
    if element.kind == "table":
        return _select(_count_above(x, element), element.table)
    if dither is not None:
        bits = to_bits(x)
        rounded = _round_magnitude(_magnitude(bits, element), element, dither)
        values = from_bits(lax.bitwise_or(to_bits(rounded), _sign(bits, element)))
        return lax.select_n(lax.ne(x, x), values, x)
    most = np.float32(element.max)
    x = lax.clamp(-most, x if x.dtype == jnp.float32 else x.astype(jnp.float32), most)
    return _round_float(x, element, signed_zero=element.signed_zero or not exact)


def round_scale(x: Array) -> Array:
    """float32 that isn't negative, rounded to the values of e4m3; NaN stays NaN."""
    x = lax.clamp(np.float32(0), x, np.float32(E4M3.max))
    return _round_float(x, E4M3, signed_zero=True, magnitude=x)


def scale_codes(scale: Array) -> Array:
    """Codes in e4m3, uint8, of float32 that are values of it and not negative (or NaN): `_decode_float` in reverse."""
    half = lax.convert_element_type(lax.mul(scale, np.float32(2.0 ** (E4M3.bias - 15))), np.float16)
    code = lax.shift_right_logical(lax.bitcast_convert_type(half, np.uint16), np.uint16(10 - E4M3.mantissa_bits))
    return lax.convert_element_type(lax.min(code, np.uint16(0x7F)), np.uint8)


def _round_float(x: Array, element: Element, signed_zero: bool, magnitude: Array | None = None) -> Array:
    """float32 within the element's range, rounded to its values: by mantissa, below the normal ones by their step."""
    normal, bits = 2.0 ** (1 - element.bias), element.mantissa_bits
    steps = lax.mul(x, np.float32(2**bits / normal))
    small = lax.mul(lax.round(steps, lax.RoundingMethod.TO_NEAREST_EVEN), np.float32(normal / 2**bits))
    magnitude = lax.abs(x) if magnitude is None else magnitude
    if not signed_zero:
        small = lax.select_n(lax.lt(magnitude, np.float32(2.0**-126)), small, lax.abs(small))
    return lax.select_n(lax.lt(magnitude, np.float32(normal)), lax.reduce_precision(x, 8, bits), small)


def to_bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x if x.dtype == jnp.float32 else x.astype(jnp.float32), np.uint32)


def from_bits(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, np.float32)


def _word(x: float) -> np.uint32:
    """The bits of a float32 constant."""
    return np.float32(x).view(np.uint32)


def _magnitude(bits: Array, element: Element) -> Array:
    """The bits of |x|, at most those of the element's largest value (NaN too)."""
    return lax.min(lax.bitwise_and(bits, np.uint32(_MAGNITUDE)), _word(element.max))


def _sign(bits: Array, element: Element) -> Array:
    """The sign bit; none of a zero, unless the element has signed zeros."""
    sign = lax.bitwise_and(bits, np.uint32(_SIGN))
    if element.signed_zero:
        return sign
    zero = lax.lt(lax.bitwise_and(bits, np.uint32(_MAGNITUDE)), np.uint32(_SMALLEST_NORMAL))
    return replaced(sign, zero, 0)


def _steps(magnitude: Array, element: Element, dither: Array | None) -> tuple[Array, Array]:
    """Bits of the power of two at or below the value (of the smallest normal one below it); the value in its steps.

    A power of two is its exponent bits alone: one `and` finds it, and subtractions of bits divide by it. The product
    with its inverse is exact, so that a compiler may contract it with the sum of the dither.
    """
    power = lax.max(lax.bitwise_and(magnitude, np.uint32(_INFINITY)), _word(2.0 ** (1 - element.bias)))
    inv_step = from_bits(lax.sub(np.uint32((254 + element.mantissa_bits) << 23), power))
    exact = lax.mul(from_bits(magnitude), inv_step)
    if dither is not None:
        return power, lax.floor(lax.add(dither, exact))
    return power, lax.round(exact, lax.RoundingMethod.TO_NEAREST_EVEN)


def _round_magnitude(magnitude: Array, element: Element, dither: Array | None) -> Array:
    """The float32 with these bits (not negative, at most the largest value), rounded to the element's values."""
    power, steps = _steps(magnitude, element, dither)
    return lax.mul(steps, from_bits(lax.sub(power, np.uint32(element.mantissa_bits << 23))))


def _encode_float(x: Array, element: Element, dither: Array | None) -> Array:
    bits = to_bits(x)
    power, steps = _steps(_magnitude(bits, element), element, dither)
    binade = lax.shift_right_logical(
        lax.sub(power, _word(2.0 ** (1 - element.bias))), np.uint32(23 - element.mantissa_bits)
    )
    steps = lax.convert_element_type(lax.convert_element_type(steps, np.int32), np.uint32)  # CPUs convert to signed
    code = lax.add(binade, steps)
    sign = lax.shift_right_logical(_sign(bits, element), np.uint32(32 - element.bits))
    return lax.convert_element_type(lax.bitwise_or(code, sign), np.uint8)


def _decode_float(codes: Array, element: Element) -> Array:
    # A code laid into a float16 has the right mantissa, and an exponent that is off by a constant (exact, even for
    # subnormal codes; the same in bfloat16 or float32 would rely on subnormals that XLA flushes on CPUs).
    code = codes.astype(jnp.uint16)
    magnitude = code & (2 ** (element.bits - 1) - 1)
    sign = (code >> (element.bits - 1)) << 15
    half = lax.bitcast_convert_type(sign | magnitude << (10 - element.mantissa_bits), jnp.float16)
    value = half.astype(jnp.float32) * 2.0 ** (15 - element.bias)
    if element == E4M3:  # the one float of ours whose NaN looks like a number in float16
        return replaced(value, magnitude == 0x7F, jnp.nan)
    return value


def _count_above(x: Array, element: Element) -> Array:
    """Index of the nearest table entry; a value at the midpoint takes the lower one."""
    middles = [(a + b) / 2 for a, b in zip(element.table, element.table[1:], strict=False)]
    return sum((x > np.float32(m)).astype(jnp.uint8) for m in middles)  # type: ignore[return-value]


def _select(codes: Array, table: tuple[float, ...]) -> Array:
    """table[codes] as a tree of selects, which fuses where a gather would not."""
    level: list = [np.float32(v) for v in table]
    bit = 0
    while len(level) > 1:
        odd = (codes >> bit) & 1 == 1
        level = [jnp.where(odd, b, a) for a, b in zip(level[::2], level[1::2], strict=True)]
        bit += 1
    return level[0]


# Packing ------------------------------------------------------------------------------------------------------------


def pack(codes: Array, bits: int) -> Array:
    """Codes [..., k] as bytes [..., ceil(k * bits / 8)]; the first code in the lowest bits; the tail padded with 0.

    8 bits: unchanged. 4 bits: two codes a byte. 6 bits: four codes in three bytes.
    """
    if bits == 8:
        return codes
    k = codes.shape[-1]
    if bits == 4:
        pair = _pad_last(codes.astype(jnp.uint8) & 15, 2).reshape(*codes.shape[:-1], -(-k // 2), 2)
        # Two bytes as one word, low byte first: slices of `pair` would compute it twice (10x slower on CPUs).
        word = lax.bitcast_convert_type(pair, jnp.uint16)
        return (word | word >> 4).astype(jnp.uint8)
    quad = _pad_last(codes.astype(jnp.uint32) & 63, 4).reshape(*codes.shape[:-1], -(-k // 4), 4)
    word = quad[..., 0] | quad[..., 1] << 6 | quad[..., 2] << 12 | quad[..., 3] << 18
    parts = jnp.stack([word & 255, (word >> 8) & 255, word >> 16], axis=-1).astype(jnp.uint8)
    return parts.reshape(*codes.shape[:-1], -(-k // 4) * 3)[..., : -(-k * 6 // 8)]


def unpack(data: Array, bits: int, k: int) -> Array:
    """The k codes of packed bytes [..., ceil(k * bits / 8)]; sub-byte codes as uint8 (not sign-extended)."""
    if bits == 8:
        return data
    lead = data.shape[:-1]
    if bits == 4:
        word = data.astype(jnp.uint16)
        codes = lax.bitcast_convert_type((word | word << 4) & 0x0F0F, jnp.uint8)  # [..., 2], low nibble first
        return codes.reshape(*lead, 2 * data.shape[-1])[..., :k]
    triple = _pad_last(data, 3).reshape(*lead, -(-data.shape[-1] // 3), 3).astype(jnp.uint32)
    word = triple[..., 0] | triple[..., 1] << 8 | triple[..., 2] << 16
    codes = jnp.stack([(word >> shift) & 63 for shift in (0, 6, 12, 18)], axis=-1).astype(jnp.uint8)
    return codes.reshape(*lead, 4 * word.shape[-1])[..., :k]


def _pad_last(x: Array, multiple: int) -> Array:
    short = -x.shape[-1] % multiple
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)]) if short else x


# Tiles: the values that share a scale -------------------------------------------------------------------------------


def to_tiles(x: Array, tile: tuple) -> Array:
    """[..., n, k] -> [..., ceil(n/rows), rows, ceil(k/cols), cols], padded with zeros where the last tile is short."""
    (*lead, n, k), (rows, cols) = x.shape, tile
    if _one_tile(n, rows) and _one_tile(k, cols):
        return x.reshape(*lead, 1, n, 1, k)
    short = [0 if rows == 1 or _one_tile(n, rows) else -n % rows, 0 if _one_tile(k, cols) else -k % cols]
    if any(short):
        x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, short[0]), (0, short[1])])
    n_rows = (n, 1) if rows == 1 else (1, n) if _one_tile(n, rows) else (x.shape[-2] // rows, rows)
    k_cols = (1, k) if _one_tile(k, cols) else (x.shape[-1] // cols, cols)
    return x.reshape(*lead, *n_rows, *k_cols)


def _one_tile(size, tile) -> bool:
    return tile is size or tile == size


def from_tiles(tiles: Array, n: int, k: int) -> Array:
    *lead, a, rows, b, cols = tiles.shape
    return tiles.reshape(*lead, a * rows, b * cols)[..., :n, :k]


def spread(per_tile: Array) -> Array:
    """[..., rows, cols] -> [..., rows, 1, cols, 1], to meet tiles."""
    return per_tile[..., :, None, :, None]


def _tile_of(scale_shape: tuple, n: int, k: int, format: Format) -> tuple:
    """The tile that a stored scale [..., rows, cols] of a matrix [n, k] belongs to."""
    found = tuple(scale_shape[-2:])
    for tile in (format.tile, (1, k), (n, k)):
        if tile is not None and found == (ceil_div(n, tile[0]), ceil_div(k, tile[1])):
            return tile
    raise UnsupportedError(
        f"scale of shape {tuple(scale_shape)} does not fit a matrix [{n}, {k}] in format {format.name!r} "
        f"(block {format.block}); expected the last two axes to be ceil(n / rows), ceil(k / columns) of a block, "
        "[n, 1] or [1, 1]"
    )


# Scales -------------------------------------------------------------------------------------------------------------


def amax_of(x: Array, axis: tuple[int, ...] | None = None) -> Array:
    """Largest absolute value over `axis` (all axes unless given), float32; 0 of nothing; NaN if there is one.

    The maximum is taken over the bits: these rank as the values do and NaN ranks highest, while a float maximum drops
    NaN on XLA's CPU backend. Its gradient is zero.
    """
    axes = tuple(range(x.ndim)) if axis is None else tuple(a % x.ndim for a in axis)
    return from_bits(lax.reduce_max(lax.bitwise_and(to_bits(x), np.uint32(_MAGNITUDE)), axes))


def _passing_amax(tiles: Array) -> Array:
    """As `_tile_amax`, but a NaN may be passed over: XLA on CPU has a routine for maxima of floats, which costs nothing
    to compile; for maxima of bits LLVM must make one."""
    return lax.reduce_max(lax.abs(tiles), (tiles.ndim - 3, tiles.ndim - 1))


_LANES = 8


def _tile_amax(tiles: Array) -> Array:
    """Largest absolute value of each tile [..., rows, R, cols, C] -> [..., rows, cols], as `amax_of`.

    First over columns `_LANES` apart, then over lanes: of one reduction over a small C, XLA on CPU makes a loop over
    many tiles at once, which is no faster and takes LLVM twice as long to compile.
    """
    c = tiles.shape[-1]
    if c % _LANES or not _LANES < c <= 128:
        return amax_of(tiles, (-3, -1))
    bits = lax.bitwise_and(to_bits(tiles), np.uint32(_MAGNITUDE)).reshape(*tiles.shape[:-1], c // _LANES, _LANES)
    n = bits.ndim
    return from_bits(lax.reduce_max(lax.reduce_max(bits, (n - 4, n - 2)), (n - 3,)))


def scale_from_amax(amax: Array, format: Format) -> Array:
    """What the largest absolute value becomes a scale by: amax / element.max, and amax / (6 * 448) for nvfp4.

    A zero (or smaller than 2^-117) scale becomes 1, so that zeros divide to zeros. For formats with float32 scales, and
    for the global scale of nvfp4.

    Raises:
        UnsupportedError: the format has power-of-two block scales only (mx*), or a zero point.
    """
    if format.zero_point or (format.scale.name != "float32" and not format.global_scale):
        raise UnsupportedError(
            f"format {format.name!r} has no per-tensor scale to compute from an amax; "
            "use dynamic scaling, which finds its block scales from the data"
        )
    most = format.element.max * _scale_max(format) if format.then is None else format.then.max
    return _safe(divide(amax.astype(jnp.float32), most))


def _scale_max(format: Format) -> float:
    return format.scale_max if format.global_scale else 1.0


def _safe(scale: Array) -> Array:
    return replaced(scale, lax.lt(scale, np.float32(TINY)), 1)


def exponent_from_amax(amax: Array, largest: float, exact: bool = True) -> Array:
    """e8m0 bits (e + 127) of the smallest power of two not below amax / largest; 0 for 0, 127 for inf, 255 for NaN.

    As uint32. This rounds the exponent up (as ModelOpt and TransformerEngine do), so that no element saturates; the
    OCP text rounds it down. A quotient that isn't a normal number counts as 0.

    `largest` = m * 2^p with 1 <= m < 2: the quotient's exponent is amax's less p, and one more where amax's mantissa is
    above m, which adding what m lacks to 2 carries into the exponent. Without `exact`, NaN gives anything.
    """
    mantissa, power = np.frexp(np.float32(largest))  # mantissa * 2^power, mantissa in [1/2, 1)
    up = _word(2.0) - _word(2 * mantissa) - np.uint32(1)
    bits = to_bits(amax)
    exponent = lax.sub(lax.shift_right_logical(lax.add(bits, up), np.uint32(23)), np.uint32(power - 1))
    exponent = replaced(exponent, lax.lt(bits, _word(largest * 2.0**-126)), 0)
    exponent = replaced(exponent, lax.eq(bits, np.uint32(_INFINITY)), 127)
    if not exact:
        return exponent
    return replaced(exponent, lax.gt(bits, np.uint32(_INFINITY)), _E8M0_NAN)


def decode_scale(scale: Array, format: Format) -> Array:
    """Stored scales as float32 (the global scale is not included); an e8m0 of 2^-127 reads as 0."""
    if format.scale.name == "e4m3":
        return decode(scale, E4M3)
    if format.scale.name == "e8m0":
        return replaced(from_bits(scale.astype(jnp.uint32) << 23), scale == _E8M0_NAN, jnp.nan)
    return scale


class _Scales(NamedTuple):
    """Per tile, [..., rows, cols]: the scale before it is encoded, the divisor of the values, zero point; the global.

    `raw` is float32, or uint32 bits of an e8m0 (which has no divisor: its codes are made by a product).
    """

    raw: Array
    divisor: Array | None
    global_scale: Array | None = None
    zero_point: Array | None = None


def _find_scales(
    tiles: Array,
    format: Format,
    tensor_amax: Array | None,
    tensor_scale: Array | None,
    tile_amax: Array | None = None,
    exact: bool = True,
) -> _Scales:
    if format.zero_point:
        return _asymmetric_scales(tiles, format, tile_range(tiles) if tile_amax is None else tile_amax)
    given = tensor_amax is not None or tensor_scale is not None
    found = _tile_amax if exact else _passing_amax
    amax = found(tiles) if tile_amax is None else tile_amax
    if format.scale.name == "e8m0":
        return _Scales(exponent_from_amax(amax, format.element.max, exact), None)
    if not (format.global_scale or given):
        scale = scale_from_amax(amax, format)
        return _Scales(scale, scale)
    if tensor_scale is None:
        whole = amax_of(amax, (-2, -1)) if tensor_amax is None else jnp.asarray(tensor_amax)
        tensor_scale = scale_from_amax(whole, format)
    if format.then is not None:
        scale = _safe(divide(amax, format.element.max))
        return _Scales(scale, scale, jnp.broadcast_to(tensor_scale.astype(jnp.float32), amax.shape[:-2]))
    if format.global_scale and len(format.ranges) > 1 and tile_amax is None:
        return _best_range(tiles, amax, tensor_scale, format)
    if format.global_scale:
        return _two_level_scales(amax, tensor_scale, format)
    scale = jnp.broadcast_to(tensor_scale.astype(jnp.float32)[..., None, None], amax.shape)
    return _Scales(scale, scale)


def _two_level_scales(amax: Array, global_scale: Array, format: Format) -> _Scales:
    """Block scales in e4m3 under a float32 global one (ModelOpt's export): e4m3(amax / (6 * global))."""
    whole = jnp.broadcast_to(global_scale.astype(jnp.float32), amax.shape[:-2])
    scale = along_rows(_over, amax, _per_matrix(lax.mul(whole, np.float32(format.element.max)), amax))
    # clamped as bits, so that a NaN becomes the largest scale: it must not spread over its block
    within = from_bits(lax.clamp(_word(2.0**-9), to_bits(scale), _word(E4M3.max)))
    rounded = _round_float(within, E4M3, signed_zero=True, magnitude=within)
    stored = replaced(rounded, lax.eq(scale, np.float32(0)), 1)
    return _Scales(stored, lax.mul(rounded, _per_matrix(whole, scale)), whole)  # a block of zeros: any divisor will do


def along_rows(divided: Callable[..., Array], x: Array, *others: Array) -> Array:
    """An elementwise function of scales [..., rows, cols] that divides, computed along the rows if columns are few.

    A division is a kernel of its own. LLVM unrolls its loop over few columns altogether, and takes 100 ms for it.
    """
    cols = x.shape[-1]
    if not isinstance(cols, int) or cols > 32:
        return divided(x, *others)
    return jnp.matrix_transpose(divided(*(jnp.matrix_transpose(each) for each in (x, *others))))


def _best_range(tiles: Array, amax: Array, global_scale: Array, format: Format) -> _Scales:
    """Of the scales that the format's ranges give, each block's with the least squared error; the first of equals."""

    def tried(factor: Any) -> tuple[Array, Array, Array]:
        found = _two_level_scales(lax.mul(amax, factor), global_scale, format)
        divisor = met(_divisor(found), tiles)
        wrong = lax.sub(lax.mul(round_to(divide(tiles, divisor), format.element), divisor), tiles)
        return jnp.sum(jnp.square(wrong), axis=(-3, -1)), found.raw, _divisor(found)

    def better(best: tuple, factor: Any) -> tuple[tuple, None]:
        new = tried(factor)
        chosen = lax.lt(new[0], best[0])
        return tuple(lax.select_n(chosen, b, n) for b, n in zip(best, new, strict=True)), None

    first, *rest = np.asarray(format.ranges, np.float32)
    best = tried(first)
    if len(rest) > 1:  # a loop: one candidate is compiled, not all
        best, _ = lax.scan(better, best, jnp.asarray(rest))
    else:
        for factor in rest:
            best, _ = better(best, factor)
    whole = jnp.broadcast_to(global_scale.astype(jnp.float32), amax.shape[:-2])
    return _Scales(best[1], best[2], whole)


def _divisor(scales: _Scales) -> Array:
    assert scales.divisor is not None
    return scales.divisor


def _per_matrix(x: Array, tiles: Array) -> Array:
    """[...] repeated for the tiles [..., rows, cols] of each matrix."""
    return lax.broadcast_in_dim(x, tiles.shape, tuple(range(x.ndim)))


def tile_range(tiles: Array) -> Array:
    """The ends of each tile's range [..., rows, cols, 2]; it always holds 0, so that 0 is exact."""
    low, high = jnp.min(tiles, axis=(-3, -1), initial=0), jnp.max(tiles, axis=(-3, -1), initial=0)
    return jnp.stack([low, high], -1)


def _asymmetric_scales(tiles: Array, format: Format, ends: Array) -> _Scales:
    """Scales and zero points of unsigned integers, from the ends of each tile's range [..., rows, cols, 2]."""
    low, high = ends[..., 0], ends[..., 1]
    scale = _safe(divide(high - low, format.element.max))
    scale = replaced(scale, jnp.isnan(amax_of(tiles, (-3, -1))), jnp.nan)
    zero_point = encode(divide(-low, scale), format.element)
    return _Scales(scale, scale, None, zero_point)


# Matrices -----------------------------------------------------------------------------------------------------------


def quantize_matrix(
    x: Array,
    format: Format,
    *,
    granularity: str | None = None,
    tensor_amax: Array | None = None,
    tensor_scale: Array | None = None,
    tile_amax: Array | None = None,
    packed: bool = True,
) -> Codes:
    """Codes and scales of x [..., n, k]; `packed=False` leaves one code a byte, [..., n, k].

    `tensor_amax` or `tensor_scale`, [...] float32: an amax (or the scale made from it by `scale_from_amax`) found
    elsewhere, for one scale a tensor or the global scale of nvfp4; larger values then saturate. `tile_amax`
    [..., rows, cols] takes the place of each tile's own amax; with zero points [..., rows, cols, 2] that of its range.

    Raises:
        UnsupportedError: the format cannot have this granularity, or has no per-tensor scale to give.
    """
    tiles, scales = _prepare(x, format, granularity, tensor_amax, tensor_scale, tile_amax)
    scaled = _scaled(tiles, scales, format)
    if scales.zero_point is not None:
        codes = _shifted(scaled, scales.zero_point, format).astype(jnp.uint8)
    else:
        codes = encode(scaled, format.element)
    data = from_tiles(codes, *x.shape[-2:])
    data = pack(data, format.element.bits) if packed else data
    return Codes(data, encode_scale(scales.raw, format), scales.global_scale, scales.zero_point)


def encode_scale(scale: Array, format: Format) -> Array:
    """Scales as they are stored, the inverse of `decode_scale`; of e8m0 it takes the bits."""
    if format.scale.name == "e8m0":
        return scale.astype(jnp.uint8)
    return encode(scale, E4M3) if format.scale.name == "e4m3" else scale


def dequantize_matrix(
    data: Array, scale: Array, global_scale: Array | None, zero_point: Array | None, format: Format, k: int
) -> Array:
    """float32 [..., n, k] of packed codes [..., n, ceil(k * bits / 8)] and what `quantize_matrix` gave with them."""
    n = data.shape[-2]
    codes = unpack(data, format.element.bits, k)
    tiles = decode(to_tiles(codes, _tile_of(scale.shape, n, k, format)), format.element)
    if zero_point is not None:
        tiles = tiles - spread(zero_point.astype(jnp.float32))
    if format.scale.name == "e8m0":
        return from_tiles(_times_power(tiles, spread(scale)), n, k)
    factor = decode_scale(scale, format)
    if format.then is not None:
        return _then(from_tiles(tiles * spread(factor), n, k), global_scale, format)
    if global_scale is not None:
        factor = factor * global_scale[..., None, None]
    return from_tiles(tiles * spread(factor), n, k)


def _then(values: Array, global_scale: Array | None, format: Format) -> Array:
    """Decoded values [..., n, k], rounded once more."""
    assert format.then is not None and global_scale is not None, format.name
    scale = jnp.broadcast_to(global_scale[..., None, None], values.shape)
    return round_to(divide(values, scale), format.then) * scale


def qdq_matrix(
    x: Array,
    format: Format,
    *,
    granularity: str | None = None,
    tensor_amax: Array | None = None,
    tensor_scale: Array | None = None,
    tile_amax: Array | None = None,
    exact: bool = True,
) -> Array:
    """float32 [..., n, k]: dequantize_matrix(quantize_matrix(x)) without codes; arguments as there.

    Bit for bit, down to blocks whose largest value is 2^-117. `exact=False`, for those who only multiply the values and
    let no NaN be lost: a zero may have a sign, and values beside a NaN the scale that they would have without it.
    """
    tiles, scales = _prepare(x, format, granularity, tensor_amax, tensor_scale, tile_amax, exact)
    scaled = _scaled(tiles, scales, format)
    if scales.zero_point is not None:
        values = _shifted(scaled, scales.zero_point, format) - spread(scales.zero_point.astype(jnp.float32))
    else:
        values = round_to(scaled, format.element, exact=exact)
    if scales.divisor is None:
        return from_tiles(lax.mul(values, met(_power(scales.raw), values)), *x.shape[-2:])
    whole = from_tiles(lax.mul(values, met(scales.divisor, values)), *x.shape[-2:])
    return whole if format.then is None else _then(whole, scales.global_scale, format)


def element_scales(codes: Codes, format: Format, n: int, k: int) -> tuple[Array, Array | None]:
    """(what each code of matrices [..., n, k] is multiplied by, its zero point), float32; never a zero scale."""
    tile = _tile_of(codes.scale.shape, n, k, format)
    factor = decode_scale(codes.scale, format)
    if codes.global_scale is not None and format.then is None:
        factor = factor * codes.global_scale[..., None, None]

    def at_each(per_tile: Array) -> Array:
        tiles = to_tiles(jnp.zeros((*per_tile.shape[:-2], n, k), jnp.float32), tile)
        return from_tiles(jnp.broadcast_to(spread(per_tile.astype(jnp.float32)), tiles.shape), n, k)

    zero = None if codes.zero_point is None else at_each(codes.zero_point)
    return _safe(at_each(factor)), zero


def to_grid(x: Array, scale: Array, zero: Array | None, *, format: Format) -> Array:
    """The nearest value that a code can stand for, elementwise; `scale` and `zero` as `element_scales` gives them."""
    scaled = divide(x, scale)
    if zero is None:
        return round_to(scaled, format.element) * scale
    return (jnp.clip(jnp.round(scaled) + zero, 0, format.element.max) - zero) * scale


def grid_codes(x: Array, scale: Array, zero: Array | None, format: Format) -> Array:
    """The codes, one a byte, of values that `to_grid` gave."""
    scaled = divide(x, scale)
    if zero is None:
        return encode(scaled, format.element)
    return jnp.clip(jnp.round(scaled) + zero, 0, format.element.max).astype(jnp.uint8)


def _prepare(x, format, granularity, tensor_amax, tensor_scale, tile_amax=None, exact=True) -> tuple[Array, _Scales]:
    tile = format.tile_for(*x.shape[-2:], granularity)
    given = tensor_amax is not None or tensor_scale is not None
    whole = format.global_scale or ((granularity or format.granularity) == "tensor" and not format.zero_point)
    if given and not whole:
        raise UnsupportedError(
            f"format {format.name!r} with granularity {granularity or format.granularity!r} takes no tensor_amax or "
            "tensor_scale: its scales are found from the data of smaller parts; write granularity='tensor', "
            "or leave it out"
        )
    tiles = to_tiles(x.astype(jnp.float32), tile)
    return tiles, _find_scales(tiles, format, tensor_amax, tensor_scale, tile_amax, exact)


def _scaled(tiles: Array, scales: _Scales, format: Format) -> Array:
    if scales.divisor is None:  # times 2^-e: exact, and 2^-e is a normal number for every e that occurs
        inverse = from_bits(lax.shift_left(lax.sub(np.uint32(254), scales.raw), np.uint32(23)))
        return lax.mul(tiles, met(inverse, tiles))
    return _over(tiles, met(scales.divisor, tiles))


def met(per_tile: Array, tiles: Array) -> Array:
    """[..., rows, cols] repeated to the shape of the tiles [..., rows, r, cols, c]."""
    lead = range(per_tile.ndim - 2)
    return lax.broadcast_in_dim(per_tile, tiles.shape, (*lead, len(lead), len(lead) + 2))


def _shifted(scaled: Array, zero_point: Array, format: Format) -> Array:
    return jnp.clip(jnp.round(scaled) + spread(zero_point.astype(jnp.float32)), 0, format.element.max)


def _power(e8m0: Array) -> Array:
    """2^(bits - 127) as float32 (NaN for 255) in few operations; CPUs then multiply by zero for 2^-127."""
    power = lax.bitcast_convert_type(lax.convert_element_type(e8m0, np.uint8), jnp.float8_e8m0fnu)
    return lax.convert_element_type(power, np.float32)


def _times_power(x: Array, e8m0: Array) -> Array:
    """x * 2^(bits - 127) in two exact steps: 2^-127 itself is subnormal, the product usually is not."""
    half = e8m0.astype(jnp.uint32) >> 1
    rest = e8m0.astype(jnp.uint32) - half
    first = replaced(from_bits((half + 64) << 23), e8m0 == _E8M0_NAN, jnp.nan)
    return x * first * from_bits((rest + 63) << 23)
