"""qdot on CPU for one row and 4-bit weights: decoding and most of the summing in one elementwise pass.

XLA on CPU fuses elementwise operations and nothing into a product, so decoded values are written before a product adds
them up: for one row that costs more than all else. Here the columns are cut into SEGMENTS, decoded, multiplied and
added to each other: one pass, which LLVM turns into vectors and XLA divides among cores, writes one value for 16 codes,
and a product with ones adds those. With more rows a product has enough to do, and with a byte for each code reading
them out of order costs more than writing (`xla_tiled`).

What keeps the pass fast (jax 0.10): no more than 8 segments (with 16, constants become operands, and shifts are by
variable numbers); scales in float32 and halves of the activation are written before it (`_written`), since XLA would
compute them again in every segment; and no loop around it: LLVM takes slices that a loop moves for what the pass may
overwrite, and gives vectors up.
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
from ._operands import blocks, by_row, dot, finish, left, per_block, row_scale, unknown
from ._types import Kernel, Operand, Packed, Shapes, as_is

SEGMENTS, FEWEST = 8, 4  # pieces of the columns that are added up; with fewer, too much is written
VECTOR = 8  # columns that LLVM takes at a time
LEAST_K = 512  # shorter rows have little to gain, and a model of them compiles faster without
CHUNK_BYTES, MOST_CHUNKS = 16 << 20, 8  # of what is written for the rows of one pass


class _Cut(NamedTuple):
    """How the bytes of a row are cut: `count` segments of `size`, then a rest; `per`: bytes that share a scale."""

    count: int
    size: int
    per: int


def _cut(spec: Operand, k: int) -> _Cut:
    planes, block = decode.plane_count(spec.element), _block(spec) or k
    width, per = -(-k // planes), max(1, block // planes)
    unit = VECTOR if block >= k else per * -(-VECTOR // per)
    size = width // SEGMENTS // unit * unit or unit
    return _Cut(min(SEGMENTS, width // size), size, per)


def _block(spec: Operand) -> int | None:
    """Codes along k that share a scale; None where all of a row do."""
    block = spec.block[1] if isinstance(spec.block, tuple) else spec.block
    return block if spec.granularity == "block" else None


@straight_through
def _row(lhs, rhs: Packed, *, lhs_spec, rhs_spec, n, k, out_dtype, epilogue):
    x, left_scale = left(lhs, lhs_spec, k)
    planes, unit = decode.plane_count(rhs_spec.element), decode.unit(rhs_spec.element)
    in_scale = rhs_spec.granularity == "block" and rhs_spec.scale == "e4m3"  # others may be too large to multiply
    x = jnp.pad(x if in_scale or unit == 1 else x * unit, ((0, 0), (0, -k % planes)))
    xs = [_written(x[:, p::planes]) for p in range(planes)]
    rows = _chunk(rhs_spec, n, k)
    ys = [_rows(xs, rhs, rhs_spec, unit if in_scale else 1.0, range(i, min(i + rows, n)), k) for i in range(0, n, rows)]
    return finish(jnp.concatenate(ys, axis=1), left_scale, row_scale(rhs, rhs_spec), out_dtype, epilogue)


def _chunk(spec: Operand, n: int, k: int) -> int:
    """Rows of one pass: as many as write CHUNK_BYTES, but not so few that there are many passes to compile."""
    values = _cut(spec, k).size + -(-k // (_block(spec) or k))
    return max(CHUNK_BYTES // (4 * values), -(-n // MOST_CHUNKS), 1)


def _rows(xs: list[jax.Array], rhs: Packed, spec: Operand, unit: float, rows: range, k: int) -> jax.Array:
    """[1, rows] f32: the row times these rows of the weight."""
    scale = None if by_row(spec) or rhs.scale is None else _along(rhs.scale, spec, rows, k, unit)
    zero = None if rhs.zero_point is None else _along(rhs.zero_point.astype(jnp.float32), spec, rows, k)
    cut, data = _cut(spec, k), rhs.data[rows.start : rows.stop]

    def products(start: int, stop: int) -> jax.Array:
        def held(along: jax.Array) -> jax.Array:
            return along if along.shape[1] == 1 else along[:, start // cut.per : -(-stop // cut.per)]

        planes = decode.raw_planes(data[:, start:stop], spec.element)
        if zero is not None:
            planes = [per_block(p, held(zero), cut.per, jnp.subtract) for p in planes]
        total = functools.reduce(jnp.add, [p * x[:, start:stop] for p, x in zip(planes, xs, strict=True)])
        return total if scale is None else per_block(total, held(scale), cut.per, jnp.multiply)

    whole = cut.count * cut.size
    parts = [functools.reduce(jnp.add, [products(j, j + cut.size) for j in range(0, whole, cut.size)])]
    if whole < data.shape[1]:
        parts.append(products(whole, data.shape[1]))
    return functools.reduce(jnp.add, [dot(jnp.ones((1, p.shape[1]), jnp.float32), p) for p in parts])


def _along(stored: jax.Array, spec: Operand, rows: range, k: int, unit: float = 1.0) -> jax.Array:
    """Scales (times `unit`) or zero points of these rows in f32, [rows or 1, blocks of k], computed once."""
    if spec.granularity == "tensor":
        return stored.astype(jnp.float32)
    height = spec.block[0] if isinstance(spec.block, tuple) else 1
    first, stop = rows.start // height, -(-rows.stop // height)
    value = decode.scales_by_bits(stored[first:stop], spec.scale)
    tall, _ = blocks(value if unit == 1 else value * unit, spec, (stop - first) * height, k)
    skipped = rows.start - first * height
    return _written(tall[skipped : skipped + len(rows)])


def _written(x: jax.Array) -> jax.Array:
    """x, computed once and written: a division is too costly for XLA to do again wherever its result is read."""
    return lax.div(x, lax.select_n(lax.ne(x, x), lax.full_like(x, 1.0), x))


def _supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if why := unknown(lhs, rhs):
        return why
    if platform(device) != "cpu":
        return f"written for XLA on CPU, not on {device}"
    if shapes.m != 1:
        return f"m={shapes.m} is not one row"
    if decode.CODINGS[rhs.element].bits != 4:
        return f"rhs is {rhs.element}: only of 4-bit codes is reading them out of order faster than writing them"
    if (block := _block(rhs)) and block % 2:
        return f"rhs block {block} is not a multiple of the 2 codes packed together"
    if shapes.k < LEAST_K:
        return f"k={shapes.k}: rows shorter than {LEAST_K} have little to add up before the product"
    if (count := _cut(rhs, shapes.k).count) < FEWEST:
        return f"blocks of {block} cut k={shapes.k} into {count} pieces, too few to add up before the product"
    return None


xla_row = Kernel("xla_row", "qdot", _supports, as_is, _row)
