"""Grouped products over packed experts with XLA: a loop over tiles of rows, each times its own expert.

`lax.ragged_dot` has no packed weights, so that every expert would be decoded first, and on CPU it multiplies all rows
by all experts. Here only experts that have rows are decoded, tile by tile (`xla_tiled`), and the loop ends with them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ._gradient import straight_through_groups
from ._groups import expert, only_float, tiled
from ._operands import unknown
from ._types import Kernel, Operand, Packed, Shapes, as_is
from .xla_dot import xla_decode
from .xla_tiled import MOST_ROWS, xla_tiled

FLOAT = Operand("float")


def _ragged(lhs: jax.Array, rhs: Packed, sizes: jax.Array, *, rhs_spec: Operand, n: int, k: int, out_dtype):
    m = lhs.shape[0]
    if 0 in (m, n, k):
        return jnp.zeros((m, n), out_dtype)
    rows = min(MOST_ROWS, m)
    reason = xla_tiled.supports(FLOAT, rhs_spec, "cpu", Shapes(rows, n, k))
    kernel = xla_tiled if reason is None else xla_decode
    tiles = tiled(sizes, m, rows)
    padded = jnp.pad(lhs, ((0, rows), (0, 0)))

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        first, end = tiles.first[i], tiles.end[i]
        x = lax.dynamic_slice_in_dim(padded, first, rows)
        part = kernel.run(x, expert(rhs, tiles.group[i]), lhs_spec=FLOAT, rhs_spec=rhs_spec, n=n, k=k)
        mine = first + jnp.arange(rows, dtype=jnp.int32) < end
        was = lax.dynamic_slice_in_dim(y, first, rows)
        return lax.dynamic_update_slice_in_dim(y, jnp.where(mine[:, None], part, was), first, 0)

    y = lax.fori_loop(0, tiles.count, step, jnp.zeros((m + rows, n), jnp.float32))
    return y[:m].astype(out_dtype)


def _supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    return only_float(lhs) or unknown(lhs, rhs)


xla_ragged = Kernel("xla_ragged", "ragged", _supports, as_is, straight_through_groups(_ragged))
