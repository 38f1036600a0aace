"""qdot on CPU with packed weights: a tile of the weight's rows is decoded, multiplied and dropped.

XLA on CPU does not fuse decoding into a product, and writing a decoded copy of the weight costs more than the product.
Three things keep the loop's body elementwise and in cache: the left operand is split as the codes are packed (even and
odd k for 4-bit codes) instead of interleaving codes; scales become f32 before the loop; and leaves stay uint8, because
slicing an fp8 array in a loop converts all of it in every step.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import decode
from ._device import platform
from ._gradient import straight_through
from ._operands import block_scale, blocks, both_fit_bf16, dot, finish, fits_bf16, left, per_block, row_scale, unknown
from ._types import Kernel, Operand, Packed, Shapes, as_is

TILE_ROWS = (32, 256)  # rows decoded at a time, at least and at most
TILE_VALUES = 1 << 20  # between the two, as many as make this many values
MOST_ROWS = 64  # with more, decoding once is about as fast, and a model compiles in a third to half of the time
BF16_ROWS = 2  # XLA on CPU has no bfloat16 product for one row: it widens the whole weight


class _Weight(NamedTuple):
    """A weight made ready for tiles; all arrays [n, ...] or [1, ...]."""

    parts: tuple[jax.Array, ...]  # see decode.split
    scale: jax.Array | None  # f32 [n, blocks], for raw codes
    zero: jax.Array | None  # f32 [n, blocks]


# XLA's own gradient would add up tiles in a bfloat16 operand's dtype.
@straight_through
def _tiled(lhs, rhs: Packed, *, lhs_spec, rhs_spec, n, k, out_dtype, epilogue):
    x, left_scale = left(lhs, lhs_spec, k)
    if k == 0:
        return finish(jnp.zeros((x.shape[0], n), jnp.float32), None, None, out_dtype, epilogue)
    weight, width = _ready(rhs, rhs_spec, n, k)
    if x.shape[0] >= BF16_ROWS and both_fit_bf16(lhs, lhs_spec, rhs_spec):
        x = x.astype(jnp.bfloat16)
    planes = decode.plane_count(rhs_spec.element)
    x = jnp.pad(x, ((0, 0), (0, width - k)))
    xs = [x[:, p::planes] for p in range(planes)]
    y = _over_rows(functools.partial(_tile_dot, xs, element=rhs_spec.element), weight, n, _tile_rows(k))
    unit = decode.unit(rhs_spec.element) if weight.scale is None else 1.0  # else it is in the scales
    right_scale = row_scale(rhs, rhs_spec)
    if unit != 1:
        right_scale = jnp.float32(unit) if right_scale is None else right_scale * unit
    return finish(y, left_scale, right_scale, out_dtype, epilogue)


def _tile_rows(k: int) -> int:
    return max(TILE_ROWS[0], min(TILE_ROWS[1], TILE_VALUES // max(k, 1)))


def _ready(rhs: Packed, spec: Operand, n: int, k: int) -> tuple[_Weight, int]:
    """(weight, columns of k that its codes now stand for).

    Where scales vary along k, codes are padded to whole blocks; the left operand will be zero there.
    """
    bits, data, b = decode.CODINGS[spec.element].bits, rhs.data, None
    scale, zero = block_scale(rhs, spec), None
    if scale is not None:
        scale, b = blocks(scale * decode.unit(spec.element), spec, n, k)
    if rhs.zero_point is not None:
        zero, b = blocks(rhs.zero_point.astype(jnp.float32), spec, n, k)
    if b is not None and b < k:
        short = -(-k // b) * b * bits // 8 - data.shape[1]
        data = jnp.pad(data, ((0, 0), (0, max(0, short))))
    return _Weight(decode.split(data, spec.element), scale, zero), data.shape[1] * 8 // bits


def _tile_dot(xs: list[jax.Array], weight: _Weight, element: str) -> jax.Array:
    """sum over planes p of xs[p] [m, c] @ (decoded plane p [rows, c]).T"""
    ws = [
        _each(decode.raw(codes, element), weight.zero, jnp.subtract) for codes in decode.planes(weight.parts, element)
    ]
    if len(ws) > 1 and xs[0].shape[0] == 1:  # one row: sum the planes before they are written, half the memory
        products = functools.reduce(jnp.add, [w * x for w, x in zip(ws, xs, strict=True)])
        return dot(jnp.ones((1, products.shape[1]), jnp.float32), _each(products, weight.scale, jnp.multiply))
    return functools.reduce(
        jnp.add, [dot(x, _each(w, weight.scale, jnp.multiply).astype(x.dtype)) for w, x in zip(ws, xs, strict=True)]
    )


def _each(w: jax.Array, along: jax.Array | None, op) -> jax.Array:
    return w if along is None else per_block(w, along, w.shape[1] // along.shape[1], op)


def _over_rows(f, weight: _Weight, n: int, tile: int) -> jax.Array:
    """f (rows of weight -> [m, rows]) over tiles of rows -> [m, n]. The last tile overlaps where n is ragged."""
    if n <= tile:
        return f(weight)
    count, whole = -(-n // tile), n // tile

    def step(start):
        return f(jax.tree.map(lambda a: a if a.shape[0] == 1 else lax.dynamic_slice_in_dim(a, start, tile), weight))

    ys = lax.map(step, jnp.minimum(jnp.arange(count, dtype=jnp.int32) * tile, n - tile))
    m = ys.shape[1]
    y = jnp.moveaxis(ys[:whole], 0, 1).reshape(m, whole * tile)
    return y if whole == count else jnp.concatenate([y, ys[-1][:, tile - n % tile :]], axis=1)


def _supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if why := unknown(lhs, rhs):
        return why
    block, planes = rhs.block[1] if isinstance(rhs.block, tuple) else rhs.block, decode.plane_count(rhs.element)
    if rhs.granularity == "block" and block and block % planes:
        return f"rhs block {block} is not a multiple of the {planes} codes packed together"
    if shapes.m > MOST_ROWS:
        return f"m={shapes.m}: from {MOST_ROWS + 1} rows on, decoding once costs little beside the product"
    if platform(device) != "cpu":
        return f"a loop over tiles serializes the work on {device}"
    return None


def _bf16_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    for side, spec in (("lhs", lhs), ("rhs", rhs)):
        if spec.element not in decode.CODINGS or not fits_bf16(spec):
            return f"{side} ({spec.element}, scale {spec.scale}, {spec.granularity}) is not exact in bfloat16"
    if shapes.m < BF16_ROWS:
        return f"m={shapes.m}: XLA on CPU has no bfloat16 product for one row"
    return _supports(lhs, rhs, device, shapes)


xla_tiled = Kernel("xla_tiled", "qdot", _supports, as_is, _tiled)
# The same code, where codes of both sides can be multiplied in bfloat16: 1.2 to 2 times as fast, and still exact.
xla_tiled_bf16 = Kernel("xla_tiled_bf16", "qdot", _bf16_supports, as_is, _tiled, low_precision=True)
