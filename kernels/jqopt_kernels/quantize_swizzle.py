"""Block scales in tiles of 128x4, each with row r + 32 q at 16 r + 4 q, as Blackwell's GEMMs read them; and back.

Layout: cuBLAS documentation, "1D block scaling factors layout". Scales [rows, columns] in uint8 are padded with zeros.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.dtypes import float0

from ._types import Kernel, Operand, Shapes, as_is
from .quantize_pallas import MOST, no_chip, pow2
from .quantize_pallas_call import call, load, program, store

ACROSS = 16  # tiles of 128x4 that one program moves, at most


def _sizes(rows: int, columns: int) -> tuple[int, int]:
    """Tiles down and across."""
    return -(-rows // 128), -(-columns // 4)


def xla_swizzle(scale: jax.Array) -> jax.Array:
    """[rows, columns] -> [rows to a multiple of 128, columns to a multiple of 4], the bytes in the order of tiles."""
    down, across = _sizes(*scale.shape)
    padded = jnp.pad(scale, ((0, down * 128 - scale.shape[0]), (0, across * 4 - scale.shape[1])))
    return padded.reshape(down, 4, 32, across, 4).transpose(0, 3, 2, 1, 4).reshape(padded.shape)


def xla_unswizzle(swizzled: jax.Array, rows: int, columns: int) -> jax.Array:
    """The inverse of `xla_swizzle` for scales [rows, columns]."""
    down, across = _sizes(rows, columns)
    tiles = swizzled.reshape(down, across, 32, 4, 4).transpose(0, 3, 2, 1, 4)
    return tiles.reshape(down * 128, across * 4)[:rows, :columns]


def _into(tiles: int, full: tuple[int, int], interpret: bool, plain: Any, swizzled: Any) -> None:
    i, j = program(0), program(1)
    x = load(plain, (i * 128, j * tiles * 4), (128, tiles * 4), full)
    x = x.reshape(4, 32, tiles, 4).transpose(2, 1, 0, 3).reshape(1, tiles * 512)
    store(swizzled, x, (i, j * tiles * 512), (-(-full[0] // 128), -(-full[1] // 4) * 512))


def _back(tiles: int, full: tuple[int, int], interpret: bool, swizzled: Any, plain: Any) -> None:
    i, j = program(0), program(1)
    x = load(swizzled, (i, j * tiles * 512), (1, tiles * 512), (-(-full[0] // 128), -(-full[1] // 4) * 512))
    x = x.reshape(tiles, 32, 4, 4).transpose(2, 1, 0, 3).reshape(128, tiles * 4)
    store(plain, x, (i * 128, j * tiles * 4), full)


def _grid(rows: int, columns: int) -> tuple[int, tuple[int, int]]:
    down, across = _sizes(rows, columns)
    tiles = min(ACROSS, pow2(across))
    return tiles, (down, -(-across // tiles))


def _swizzled(scale: jax.Array) -> jax.Array:
    """As `xla_swizzle`."""
    rows, columns = scale.shape
    down, across = _sizes(rows, columns)
    if not scale.size:
        return jnp.zeros((down * 128, across * 4), scale.dtype)
    tiles, grid = _grid(rows, columns)
    kernel = functools.partial(_into, tiles, (rows, columns))
    (found,) = call(kernel, [scale], [((down, across * 512), scale.dtype)], grid, 4)
    return found.reshape(down * 128, across * 4)


def _unswizzled(swizzled: jax.Array, rows: int, columns: int) -> jax.Array:
    """As `xla_unswizzle`."""
    if 0 in (rows, columns):
        return jnp.zeros((rows, columns), swizzled.dtype)
    down, across = _sizes(rows, columns)
    tiles, grid = _grid(rows, columns)
    kernel = functools.partial(_back, tiles, (rows, columns))
    flat = swizzled.reshape(down, across * 512)
    return call(kernel, [flat], [((rows, columns), swizzled.dtype)], grid, 4)[0]


pallas_swizzle: Any = jax.custom_vjp(_swizzled)
pallas_unswizzle: Any = jax.custom_vjp(_unswizzled, nondiff_argnums=(1, 2))
# Scales only change places: the gradient of each is the other. Those in bits, uint8, have none.
pallas_swizzle.defvjp(
    lambda scale: (pallas_swizzle(scale), jnp.zeros((*scale.shape, 0))),
    lambda like, g: (None if g.dtype == float0 else xla_unswizzle(g, *like.shape[:2]),),
)
pallas_unswizzle.defvjp(
    lambda swizzled, rows, columns: (pallas_unswizzle(swizzled, rows, columns), None),
    lambda rows, columns, _, g: (None if g.dtype == float0 else xla_swizzle(g),),
)


def _anywhere(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    return None


def _cuda(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if (why := no_chip(device)) is not None:
        return why
    size = shapes.m * shapes.k
    return f"m * k is {size}, offsets are 32-bit" if size >= MOST else None


swizzles = (
    # XLA first: one transposing copy, which it does as well
    Kernel("xla_swizzle", "swizzle", _anywhere, as_is, xla_swizzle),
    Kernel("pallas_swizzle", "swizzle", _cuda, as_is, pallas_swizzle, backend="pallas"),
    Kernel("xla_unswizzle", "unswizzle", _anywhere, as_is, xla_unswizzle),
    Kernel("pallas_unswizzle", "unswizzle", _cuda, as_is, pallas_unswizzle, backend="pallas"),
)
