"""Inside a Pallas kernel: a tile of a packed weight, read under a mask and decoded in registers.

4-bit codes are never interleaved: a tile has two planes, the even and the odd positions of k, and the left operand
is read in the same two halves. Every step is then elementwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import decode
from ._operands import row_scale
from ._pallas import load, span
from ._types import Operand, Packed

ELEMENTS = ("e2m1", "int4", "uint4", "int8", "e4m3", "e5m2")  # 6-bit codes lie across bytes, nf4 is a table


class Weight(NamedTuple):
    """Static facts of a weight [n, k]. `lead` axes (experts) come first in its arrays, by an index of the kernel's."""

    spec: Operand
    n: int
    k: int

    @property
    def planes(self) -> int:
        """How many codes a byte holds."""
        return decode.plane_count(self.spec.element)

    @property
    def block(self) -> tuple[int, int]:
        """(rows, columns) that share a scale or zero point."""
        block = self.spec.block
        if self.spec.granularity == "block" and block is not None:
            return block if isinstance(block, tuple) else (1, block)
        return (1 if self.spec.granularity == "channel" else self.n), self.k

    @property
    def in_blocks(self) -> bool:
        return self.spec.granularity == "block" and self.spec.block is not None


class Arrays(NamedTuple):
    """What a kernel reads of a weight, arrays outside of it and refs inside; None where there is nothing to read."""

    data: Any
    scale: Any  # only where it varies along k
    zero: Any


def arrays(rhs: Packed, weight: Weight) -> Arrays:
    """What varies along k, and zero points; scales of rows stay outside: they multiply the result (`outside`)."""
    return Arrays(rhs.data, rhs.scale if weight.in_blocks else None, rhs.zero_point)


def outside(rhs: Packed, spec: Operand) -> jax.Array | None:
    """[] or [rows, 1] f32: scales that are constant along k, also where there are zero points."""
    return row_scale(rhs, spec._replace(zero_point=False))


def codes(refs: Arrays, weight: Weight, rows: jax.Array, step: Any, bk: int, lead: tuple = ()) -> list[jax.Array]:
    """Planes of codes [bn, bk / planes]: the weight's rows `rows`, k from step * bk on.

    Positions are products of the step, never quotients: Triton sees how those are aligned, and loads 16 bytes.
    """
    width = bk // weight.planes
    columns = span(step * width, width)
    mask = (rows < weight.n)[:, None] & (columns < -(-weight.k // weight.planes))[None, :]
    return decode.planes((load(refs.data, (*lead, rows[:, None], columns[None, :]), mask),), weight.spec.element)


def along(ref: Any, weight: Weight, rows: jax.Array, step: Any, bk: int, lead: tuple = ()) -> jax.Array:
    """Stored scales or zero points of a tile: [bn, blocks in it]."""
    height, width = weight.block
    count = max(1, bk // width)
    first = step * count if bk >= width else lax.div(step, np.int32(-(-width // bk)))
    columns, row = span(first, count), lax.div(rows, np.int32(height)) if height > 1 else rows
    mask = (rows < weight.n)[:, None] & (columns < -(-weight.k // width))[None, :]
    return load(ref, (*lead, row[:, None], columns[None, :]), mask)


def scales(refs: Arrays, weight: Weight, rows: jax.Array, step: Any, bk: int, lead: tuple = ()) -> jax.Array:
    """f32 scales of a tile, [bn, blocks in it]."""
    return decode.scales_by_bits(along(refs.scale, weight, rows, step, bk, lead), weight.spec.scale)


def numbers(refs: Arrays, weight: Weight, rows: jax.Array, step: Any, bk: int, lead: tuple = ()) -> list[jax.Array]:
    """Planes [bn, bk / planes] f32: codes as numbers, less their zero points, divided by `decode.unit`."""
    planes = [decode.raw(c, weight.spec.element) for c in codes(refs, weight, rows, step, bk, lead)]
    if refs.zero is None:
        return planes
    zero = along(refs.zero, weight, rows, step, bk, lead).astype(jnp.float32)
    return [w - spread(zero, w.shape[1]) for w in planes]


def scaled(refs: Arrays, weight: Weight, rows: jax.Array, step: Any, bk: int, lead: tuple = ()) -> list[jax.Array]:
    """Planes [bn, bk / planes] f32: codes times their scales, `decode.unit` included."""
    planes, unit = numbers(refs, weight, rows, step, bk, lead), np.float32(decode.unit(weight.spec.element))
    scale = scales(refs, weight, rows, step, bk, lead)
    if weight.spec.scale == "e4m3":
        scale = scale * unit
    elif unit != 1:  # the other kinds could overflow when multiplied by it
        planes = [w * unit for w in planes]
    return [w * spread(scale, w.shape[1]) for w in planes]


def spread(blocks: jax.Array, columns: int) -> jax.Array:
    """[rows, blocks] -> [rows, columns], each block's value for its columns."""
    rows, count = blocks.shape
    if count == 1:
        return jnp.broadcast_to(blocks, (rows, columns))
    return jnp.broadcast_to(blocks[:, :, None], (rows, count, columns // count)).reshape(rows, columns)


def unreadable(spec: Operand) -> str | None:
    """Why a kernel cannot read a weight so described."""
    if spec.element not in ELEMENTS:
        return f"rhs element {spec.element!r} is not written for Pallas; those are {', '.join(ELEMENTS)}"
    width = spec.block[1] if isinstance(spec.block, tuple) else spec.block
    planes = decode.plane_count(spec.element)
    if spec.granularity == "block" and width and (width & (width - 1) or width < planes):
        return f"rhs block {width} is not a power of two of at least {planes}"
    return None
