"""Coordinate descent over codes and scales: each in turn takes the value that is best while all the others stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

LEAST = 128  # columns between two updates of the whole matrix, if a tile isn't wider: speed only


class Grid(NamedTuple):
    """What rounded values may be. scale, zero: of each element [n, k].

    nearest(x, scale, zero): the value nearest to x that a code can stand for, elementwise.
    storable(scale): the nearest scale that can be stored, elementwise; None where scales must stay as they are.
    tile: columns that share a scale in a row.
    """

    scale: Array
    zero: Array | None
    nearest: Callable[[Array, Array, Array | None], Array]
    storable: Callable[[Array], Array] | None
    tile: int


def put(x: Array, part: Array, start: Array) -> Array:
    """x with the columns from start on replaced."""
    return lax.dynamic_update_slice_in_dim(x, part, start, 1)


def descend(q: Array, w: Array, h: Array, grid: Grid, passes: int) -> tuple[Array, Array]:
    """(q [n, k], its scales [n, k]), moved along column after column, tile after tile, so that
    tr((q - w) h (q - w)^T) falls.

    With all other columns fixed, column j's best real value is q_j - ((q - w) h)_j / h_jj; the error is a parabola
    around it, so its nearest grid value is the best code. With all codes fixed, a tile's best scale is found likewise
    along q_t: (1 - (q - w) h q_t^T / (q_t h q_t^T)) times what it was. No move makes the error larger, and rows don't
    meet.

    Args:
        q, w: rounded weights, and those that are to be reached.
        h: [k, k], symmetric, with a positive diagonal.
        passes: how often each column and tile has its turn.

    Source: Behdin et al., QuantEase, arXiv 2309.01885; Nair and Suggala, CDQuant, arXiv 2406.17542 (codes alone).
    """
    k, tile = q.shape[1], grid.tile
    size = tile * max(LEAST // tile, 1)
    short = -k % size
    wide = ((0, 0), (0, short))
    q, w, scale = jnp.pad(q, wide), jnp.pad(w, wide), jnp.pad(grid.scale, wide, constant_values=1)
    zero = None if grid.zero is None else jnp.pad(grid.zero, wide)
    h = jnp.pad(h, ((0, short), (0, short))) + jnp.diag(jnp.pad(jnp.zeros(k, h.dtype), (0, short), constant_values=1))
    blocks = (k + short) // size

    def block(b: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        q, scale, slope = state
        start = (b % blocks) * size
        part, s, near = (lax.dynamic_slice_in_dim(a, start, size, 1) for a in (q, scale, slope))
        z = None if zero is None else lax.dynamic_slice_in_dim(zero, start, size, 1)
        rows = lax.dynamic_slice_in_dim(h, start, size, 0)
        corner = lax.dynamic_slice_in_dim(rows, start, size, 1)

        def column(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            part, near = state
            old = part[:, i]
            new = grid.nearest(old - near[:, i] / corner[i, i], s[:, i], None if z is None else z[:, i])
            return part.at[:, i].set(new), near + jnp.outer(new - old, corner[i])

        moved, near = lax.fori_loop(0, size, column, (part, near))
        if grid.storable is not None:
            moved, s = _rescaled(moved, s, z, near, corner, grid)
        slope = slope + jnp.matmul(moved - part, rows, precision=lax.Precision.HIGHEST)
        return put(q, moved, start), put(scale, s, start), slope

    slope = jnp.matmul(q - w, h, precision=lax.Precision.HIGHEST)
    q, scale, _ = lax.fori_loop(0, passes * blocks, block, (q, scale, slope))
    return q[:, :k], scale[:, :k]


def _rescaled(q: Array, s: Array, z: Array | None, near: Array, corner: Array, grid: Grid) -> tuple[Array, Array]:
    """(q, s) [n, size] with the best scale of each tile in turn. near: (q - w) h at these columns; corner: h there."""
    assert grid.storable is not None
    storable, tile = grid.storable, grid.tile

    def each(t: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        q, s, near = state
        start = t * tile
        part, scale, slope = (lax.dynamic_slice_in_dim(a, start, tile, 1) for a in (q, s, near))
        rows = lax.dynamic_slice_in_dim(corner, start, tile, 0)
        own = jnp.matmul(part, lax.dynamic_slice_in_dim(rows, start, tile, 1), precision=lax.Precision.HIGHEST)
        curve = jnp.sum(own * part, axis=1, keepdims=True)
        step = -jnp.sum(slope * part, axis=1, keepdims=True) / jnp.where(curve > 0, curve, jnp.float32(1))
        # a scale keeps its sign, and no step is taken that a tile of zeros or a flat h can't justify
        step = jnp.where(curve > 0, jnp.clip(step, -0.5, 1.0), jnp.float32(0))
        wider = storable(scale * (1 + step))
        shift = None if z is None else lax.dynamic_slice_in_dim(z, start, tile, 1)
        new = grid.nearest(part / scale * wider, wider, shift)
        near = near + jnp.matmul(new - part, rows, precision=lax.Precision.HIGHEST)
        return put(q, new, start), put(s, wider, start), near

    q, s, _ = lax.fori_loop(0, q.shape[1] // tile, each, (q, s, near))
    return q, s
