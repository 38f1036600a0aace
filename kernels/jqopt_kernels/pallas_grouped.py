"""Grouped products over packed experts on CUDA through Pallas: one launch for all experts that have rows.

A program multiplies one tile of rows, which never crosses a group, with one tile of its expert's weight, decoded as
`pallas_dot` does. Programs without rows end at once: how many there are is known only at run time.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _pallas_weight as tiles
from . import decode
from ._gradient import straight_through_groups
from ._groups import group_of_row, only_float, tiled
from ._operands import unknown
from ._pallas import launch, no_place, power, program_id, span, steps, store
from ._pallas_weight import Arrays, Weight
from ._types import Kernel, Operand, Packed, Shapes, as_is
from .pallas_dot import SKINNY, Plan, accumulate, prepared, tile_for

FLOAT = Operand("float")
MOST_ROWS = 128  # of a tile


def _kernel(*refs: Any, plan: Plan, present: tuple[bool, ...]) -> None:
    given = iter(refs)
    group, first, end, x, data, scale, zero, out = (next(given) if here else None for here in (*present, True))
    assert group is not None and first is not None and end is not None
    tile = program_id(1)
    rows, x_rows = span(program_id(0) * plan.tile.bn, plan.tile.bn), span(first[tile], plan.tile.bm)
    limit = end[tile]
    count = jnp.where(limit > first[tile], np.int32(steps(plan.weight.k, plan.tile.bk)), np.int32(0))
    weight = Arrays(data, scale, zero)
    acc = accumulate(x, weight, None, plan, (x_rows, limit), rows, (np.int32(0), count), (group[tile],))
    keep = (x_rows < limit)[:, None] & (rows < plan.weight.n)[None, :]
    store(out, (x_rows[:, None], rows[None, :]), acc, keep)


def _ragged(lhs: jax.Array, rhs: Packed, sizes: jax.Array, *, rhs_spec: Operand, n: int, k: int, out_dtype):
    m, weight = lhs.shape[0], Weight(rhs_spec, n, k)
    if 0 in (m, n, k):
        return jnp.zeros((m, n), out_dtype)
    x, after = prepared(lhs, FLOAT, rhs, weight)
    rows = min(MOST_ROWS, max(16, power(steps(m, sizes.shape[0]))))
    tile = tile_for(SKINNY, x, weight, after, rows)
    plan = Plan(m, weight, tile, 1, after, None, False)
    laid = tiled(sizes, m, tile.bm)
    operands = (laid.group, laid.first, laid.end, x.x, *tiles.arrays(rhs, weight))
    given = [a for a in operands if a is not None]
    kernel = functools.partial(_kernel, plan=plan, present=tuple(a is not None for a in operands))
    grid = (steps(n, tile.bn), laid.group.shape[0])
    out = jax.ShapeDtypeStruct((m, n), jnp.float32)
    y = launch(kernel, grid, out, given, warps=tile.warps, stages=tile.stages, name="pallas_ragged")
    if not weight.in_blocks:
        y = y * np.float32(decode.unit(rhs_spec.element))
    group, has_one = group_of_row(sizes, m)
    scale = jax.vmap(lambda packed: tiles.outside(packed, rhs_spec))(rhs)
    if scale is not None:
        scale = lax.stop_gradient(scale).reshape(sizes.shape[0], -1)  # [e, n or 1]
        y = y * scale[group]
    return jnp.where(has_one[:, None], y, 0).astype(out_dtype)  # rows without a group were never written


def _supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if why := only_float(lhs) or unknown(lhs, rhs) or tiles.unreadable(rhs):
        return why
    return no_place(device, shapes.groups * shapes.n * steps(shapes.k, decode.plane_count(rhs.element)))


pallas_ragged = Kernel("pallas_ragged", "ragged", _supports, as_is, straight_through_groups(_ragged), backend="pallas")
