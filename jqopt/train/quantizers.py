"""Training quantizers: NVFP4 and FP8 with the arithmetic of TransformerEngine, as pure functions of matrices.

They differ from the formats in `jqopt.formats` in how scales round (they multiply by an encode scale where ModelOpt's
export divides by the decode scale), so that training here equals training there. Each takes x [..., m, k] and
quantizes along k, the contracted axis; for the operands of a backward GEMM give it the transpose. The formulas stand in
docs/numerics.md; their source is TransformerEngine's reference quantizers at commit d0067d0d.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jqopt import formats
from jqopt._numerics import (
    along_rows,
    amax_of,
    decode,
    divide,
    encode,
    from_bits,
    from_tiles,
    pack,
    quantize_matrix,
    replaced,
    round_scale,
    round_to,
    spread,
    to_bits,
    to_tiles,
    unpack,
)
from jqopt.errors import UnsupportedError
from jqopt.formats import E2M1, E4M3, Element

# Signs of the random Hadamard transform: drawn once, the same in every layer and step (TransformerEngine's own).
RHT_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
F32_MAX = float(np.finfo(np.float32).max)
SIXTH = float(np.float32(1) / np.float32(6))
# An encode scale above 2^120 (amax below 2e-33) has a reciprocal that backends without subnormals flush to zero.
_LARGEST_ENCODE = 2.0**120


class Nvfp4(NamedTuple):
    """codes [..., m, k/2] packed; scale [..., m, k/16] e4m3 bits; global_scale and amax [...], row scaled [..., m]."""

    data: Array
    scale: Array
    global_scale: Array
    amax: Array


class Fp8(NamedTuple):
    """codes [..., m, k] as bits in uint8; scale: float32, one for each tile [..., rows, cols]; e8m0 bits for mxfp8."""

    data: Array
    scale: Array


# NVFP4 --------------------------------------------------------------------------------------------------------------


def nvfp4(
    x: Array,
    *,
    tile: tuple[int, int] = (1, 16),
    amax: Array | None = None,
    row_scaled: bool = False,
    four_over_six: str | None = None,
    e4m3_max: float = 448.0,
) -> Nvfp4:
    """NVFP4 with a global scale from amax, e4m3 scales for tiles of 1x16 or 16x16, round to nearest even.

    Args:
        tile: (16, 16) gives the same numbers for x and its transpose (weights).
        amax: [...] (row scaled: [..., m]) float32, found elsewhere, e.g. over all devices; from x unless given.
        row_scaled: one global scale for each row.
        four_over_six: "mae" or "mse": for each tile also try a scale 1.5 times larger (its maximum falls on 4) and keep
            it if the mean error is smaller. Its global scale maps amax to 6 * `e4m3_max`, 448 or 256.

    Raises:
        UnsupportedError: a shape that is not a multiple of the tile, or an unknown option.
    """
    _check(x, tile, row_scaled, four_over_six, e4m3_max)
    tiles = to_tiles(x.astype(jnp.float32), tile)
    if amax is None:
        amax = amax_of(x, (-1,) if row_scaled else (-2, -1))
    amax = amax.astype(jnp.float32)
    whole_scale = encode_scale(amax, 6 * e4m3_max)
    whole = whole_scale[..., None] if row_scaled else whole_scale[..., None, None]
    block_amax = amax_of(tiles, (-3, -1))
    if four_over_six is None:
        codes, scale = _codes(tiles, block_scale(block_amax, whole), whole)
    else:
        codes, scale = four_over_six_codes(tiles, block_amax, whole, amax, row_scaled, four_over_six, e4m3_max)
    data = pack(from_tiles(codes, *x.shape[-2:]), E2M1.bits)
    return Nvfp4(data, jnp.repeat(scale, tile[0], axis=-2), divide(1.0, whole_scale), amax)


def nvfp4_values(q: Nvfp4) -> Array:
    """codes * block scale, float32 [..., m, k], exact in bfloat16 too; the global scale is left to the GEMM."""
    codes = unpack(q.data, E2M1.bits, 2 * q.data.shape[-1])
    tiles = decode(to_tiles(codes, (1, 16)), E2M1) * spread(decode(q.scale, E4M3))
    return from_tiles(tiles, *codes.shape[-2:])


def _check(x: Array, tile: tuple[int, int], row_scaled: bool, four_over_six: str | None, e4m3_max: float) -> None:
    if tile not in ((1, 16), (16, 16)) or (row_scaled and tile != (1, 16)):
        raise UnsupportedError(
            f"nvfp4: tile {tile!r} with row_scaled={row_scaled}; expected (1, 16), or (16, 16) without row_scaled"
        )
    if x.shape[-1] % tile[1] or x.shape[-2] % tile[0]:
        raise UnsupportedError(
            f"nvfp4: a matrix of shape {x.shape} cannot be cut into tiles of {tile[0]}x{tile[1]}; "
            "pad it with zeros (zeros change no scale)"
        )
    if four_over_six not in (None, "mae", "mse") or e4m3_max not in (448.0, 256.0):
        raise UnsupportedError(
            f"nvfp4: four_over_six {four_over_six!r} with e4m3_max {e4m3_max!r}; expected None, 'mae' or 'mse', "
            "with 448 or 256"
        )


def encode_scale(amax: Array, largest: float) -> Array:
    """What the whole is multiplied by, so that its amax becomes `largest`; 1 of zeros."""
    scale = jnp.minimum(divide(largest, amax), _LARGEST_ENCODE)
    return replaced(scale, (amax == 0) | (scale == 0), 1)


def block_scale(amax: Array, whole: Array, up: bool = False) -> Array:
    """The block scales of these amax under a global encode scale, float32 values of e4m3.

    `up`: never below the exact scale. Rounded to nearest, half of all blocks get a scale that is too small, and their
    largest values saturate. That biases stochastic rounding; a scale rounded up doesn't.
    """
    exact = amax * (whole * SIXTH)
    near = round_scale(exact)
    if not up:
        return near
    # The next value: one step of the mantissa of a normal number, of 2^-9 below those.
    step = from_bits(jnp.maximum(to_bits(near) & np.uint32(0x7F800000), np.uint32(121 << 23)) - np.uint32(3 << 23))
    return jnp.where(near < exact, jnp.minimum(near + step, E4M3.max), near)


def block_encode_scale(scale: Array, whole: Array) -> Array:
    """What values of a block with this scale (the value of an e4m3) are multiplied by."""
    return along_rows(lambda s, w: jnp.minimum(divide(1.0, s * divide(1.0, w)), F32_MAX), scale, whole)


def _codes(tiles: Array, scale: Array, whole: Array) -> tuple[Array, Array]:
    """Codes under block scales (values of e4m3) and a global encode scale, and the scales as bits."""
    return encode(tiles * spread(block_encode_scale(scale, whole)), E2M1), encode(scale, E4M3)


def four_over_six_codes(tiles, block_amax, whole, amax, row_scaled, measure, e4m3_max) -> tuple[Array, Array]:
    """(codes in tiles, block scales as e4m3 bits): of two scales a block the one with the smaller error."""
    base = divide(block_amax, 6.0) * whole
    six, four = (_codes(tiles, round_to(base * factor, E4M3), whole) for factor in (1.0, 1.5))
    amax = amax[..., None, None, None] if not row_scaled else amax[..., None, None]
    errors = [_error(tiles, *choice, amax, measure, e4m3_max) for choice in (six, four)]
    better = errors[1] < errors[0]
    return jnp.where(spread(better), four[0], six[0]), jnp.where(better, four[1], six[1])


def _error(tiles, codes, scale, amax, measure, e4m3_max) -> Array:
    """Error of each tile, summed in a fixed order: along k, then a tree over the rows of a 16x16 tile."""
    values = decode(codes, E2M1) * spread(decode(scale, E4M3)) * amax[..., None]
    difference = divide(values, 6 * e4m3_max) - tiles
    # The bound changes nothing but keeps the compiler from contracting `sum + d * d` into one rounding.
    error = jnp.abs(difference) if measure == "mae" else jnp.minimum(difference * difference, F32_MAX)
    total = jnp.zeros(error.shape[:-1], jnp.float32)
    for i in range(error.shape[-1]):
        total = total + error[..., i]
    rows = total.shape[-2]
    while rows > 1:
        rows //= 2
        total = total[..., :rows, :] + total[..., rows:, :]
    return total[..., 0, :]


def hadamard16(x: Array, signs: tuple[int, ...] = RHT_SIGNS, axis: int = -1) -> Array:
    """The random Hadamard transform of each 16 consecutive values of an axis, rounded to bfloat16 (kept float32).

    (1/4) * diag(signs) @ H16: orthogonal, so two operands transformed alike along their contraction give the same
    product. Sums run as a butterfly: the same order, hence the same bits, on every device and in every transformation.

    Args:
        axis: -1, or -2: down the rows.

    Raises:
        UnsupportedError: the axis is not a multiple of 16.
    """
    if x.shape[axis] % 16:
        raise UnsupportedError(f"hadamard16: axis {axis} of {x.shape} is not a multiple of 16; pad it with zeros")
    lead, last = x.shape[: axis % x.ndim], x.shape[-1:] if axis == -2 else (1,)
    # a + b, a - b, written so that nothing is concatenated, the signs in the first of four steps: it stays one loop
    # (constants of full rank: JAX would take the reshaping of others out of a scan, and make each an array of its own;
    # and first in each operation: XLA orders what a loop reads by it, and compiles loops of different orders apart)
    ones = (1,) * (len(lead) + 1)
    turn = np.asarray([1, -1], np.float32).reshape(*ones, 2, 1, 1)
    signed = np.asarray(signs, np.float32).reshape(*ones, 2, 8, 1)
    pairs = x.astype(jnp.float32).reshape(*lead, -1, 2, 8, *last)
    y = (turn * signed[..., 1:, :, :]) * pairs[..., 1:, :, :] + signed[..., :1, :, :] * pairs[..., :1, :, :]
    for half in (4, 2, 1):
        pairs = y.reshape(*lead, -1, 2, half, *last)
        y = turn * pairs[..., 1:, :, :] + pairs[..., :1, :, :]
    # reduce_precision, not astype: XLA may drop a cast to bfloat16 and back.
    return lax.reduce_precision(y.reshape(x.shape) * 0.25, 8, 7)


# FP8 ----------------------------------------------------------------------------------------------------------------


def fp8_current(x: Array, element: Element = E4M3, *, power_of_two: bool = False, amax: Array | None = None) -> Fp8:
    """FP8 with one scale for each matrix, from its own amax ("current scaling"); scale [..., 1, 1]."""
    return _fp8(x, (x.shape[-2], x.shape[-1]), element, power_of_two, amax)


def fp8_block(x: Array, tile: tuple[int, int] = (1, 128), element: Element = E4M3, *, power_of_two: bool = True) -> Fp8:
    """FP8 with one float32 scale for each 1x128 (activations, gradients) or 128x128 (weights) tile."""
    return _fp8(x, tile, element, power_of_two, None)


def mxfp8(x: Array, element: Element = E4M3) -> Fp8:
    """MXFP8: 1x32 blocks under a power of two, rounded up; the same numbers as the format "mxfp8"."""
    format = formats.Format("mxfp8", element, 32, formats.E8M0)
    return Fp8(*quantize_matrix(x, format)[:2])


def fp8_scale(amax: Array, element: Element, power_of_two: bool = False) -> Array:
    """What values with these largest ones are multiplied by; 1 where that is 0 or infinite."""
    scale = jnp.minimum(divide(element.max, amax), F32_MAX)
    if power_of_two:  # rounded down: the exponent bits alone
        scale = from_bits(to_bits(scale) & 0x7F800000)
    return replaced(scale, (amax == 0) | (scale == 0), 1)


def _fp8(x: Array, tile: tuple, element: Element, power_of_two: bool, amax: Array | None) -> Fp8:
    tiles = to_tiles(x.astype(jnp.float32), tile)
    amax = amax_of(tiles, (-3, -1)) if amax is None else amax.astype(jnp.float32)[..., None, None]
    scale = fp8_scale(amax, element, power_of_two)
    codes = encode(tiles * spread(scale), element)
    return Fp8(from_tiles(codes, *x.shape[-2:]), divide(1.0, scale))


# The layout of block scales that cuBLAS and cuDNN read ----------------------------------------------------------------


def swizzle(scale: Array) -> Array:
    """Block scales [rows, cols] (any bytes) in tiles of 128x4, as Blackwell's GEMMs read them, padded with zeros."""
    rows, cols = scale.shape
    padded = jnp.pad(scale, ((0, -rows % 128), (0, -cols % 4)))
    tiles = padded.reshape(-(-rows // 128), 4, 32, -(-cols // 4), 4)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(padded.shape)


def unswizzle(swizzled: Array, rows: int, cols: int) -> Array:
    """The inverse of `swizzle` for scales [rows, cols]."""
    tiles = swizzled.reshape(-(-rows // 128), -(-cols // 4), 32, 4, 4)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(swizzled.shape)[:rows, :cols]
