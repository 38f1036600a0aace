"""What a planned site computes in training: its operands as matrices, and `linear` on them, on one device or many."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jqopt import _compat, _jaxpr
from jqopt._trace import Site
from jqopt.train import _conv, _gather
from jqopt.train._linear import Copies, Gemms, copies, linear

Varying = tuple[frozenset[str], frozenset[str]]
"""Axes of a shard_map over which x differs, and w."""


Shared = dict[Any, Copies]
"""The quantized copies of one array, by how it is read, for the products that all read it."""


def _dot(eqn: Any, site: Site, how: Gemms, differ: Varying, shared: Shared | None, *values: Any) -> Array:
    """A dot_general as x [*batch, m, k] times w [*batch, n, k]."""
    *operands, scale, key = values
    side = site.operand
    dims = [[tuple(map(int, d)) for d in kind] for kind in eqn.params["dimension_numbers"]]
    order = [dims[0][side].index(i) for i in _gather.matrices(site, eqn)[-1]]
    axes = tuple(dims[0][1 - side][i] for i in order), dims[1][1 - side]
    x, x_free = _matrix(operands[1 - side], *axes)
    w, w_free = _matrix(operands[side], [dims[0][side][i] for i in order], dims[1][side])
    y = _sharded(how, differ, x, w, scale, key, read=None if shared is None else (shared, axes))
    y = y if side == 1 else y.mT
    free = [x_free, w_free] if side == 1 else [w_free, x_free]
    return y.reshape(*x.shape[:-2], *free[0], *free[1])


def _matrix(x: Array, contract: Sequence[int], batch: Sequence[int]) -> tuple[Array, list[int]]:
    """([*batch, free, contracted], the sizes of the free axes)."""
    free = [i for i in range(x.ndim) if i not in (*contract, *batch)]
    sizes = [x.shape[i] for i in free]
    turned = x.transpose([*batch, *free, *contract])
    lead = [x.shape[i] for i in batch]
    return turned.reshape(*lead, math.prod(sizes), math.prod(x.shape[i] for i in contract)), sizes


def _ragged(eqn: Any, site: Site, how: Gemms, differ: Varying, shared: Shared | None, *values: Any) -> Array:
    x, w, groups, scale, key = values
    read = None if shared is None else (shared, "ragged")
    return _sharded(how, differ, x, w.swapaxes(1, 2), scale, key, groups, read)


def _convolved(eqn: Any, site: Site, how: Gemms, differ: Varying, shared: Shared | None, *values: Any) -> Array:
    x, w, scale, key = values
    if 0 in (*eqn.outvars[0].aval.shape, *w.shape):  # no product to quantize
        return _jaxpr.bind(eqn, [x, w])[0]
    how = dataclasses.replace(how, windows=_conv.windows(eqn))
    read = None if shared is None else (shared, how.windows)
    return _conv.image(eqn, _sharded(how, differ, x, _conv.matrix(eqn, w), scale, key, read=read))


OPS = {"dot_general": _dot, "ragged_dot": _ragged, "conv": _convolved}
"""The sites that are trained in low precision."""


def _sharded(
    how: Gemms,
    differ: Varying,
    x: Array,
    w: Array,
    scale: Any,
    key: Any,
    groups: Any = None,
    read: tuple[Shared, Any] | None = None,
) -> Array:
    """`linear`; inside a shard_map with the axes over which x and w differ, and this device's place in them.

    Args:
        read: where the copies of the array are that x was made from, and how x was made from it.
    """
    mine, its = differ
    axes = tuple(a for a in jax.sharding.get_abstract_mesh().axis_names if a in (mine | its))
    place, given = None, None
    if not axes and read is not None and how.shares:
        shared, way = read
        of = (way, how.input[0], how.kept[0])
        given = shared[of] = shared[of] if of in shared else copies(how, x)
    if axes:
        rows = tuple(a for a in axes if a in mine - its)
        columns = tuple(a for a in axes if a in its - mine)
        count = math.prod(x.shape[:-1]) if how.windows is None else how.windows.count
        place = jnp.stack([_place(rows, count), _place(columns, w.shape[-2])])
        shared = axes if how.scope == "global" else ()
        how = dataclasses.replace(how, amax_axes=shared, spread=math.prod(lax.axis_size(a) for a in axes))
        x, w = _compat.vary(x, axes), _compat.vary(w, axes)
        scale = None if scale is None else _compat.vary(scale, axes)
    return linear(how, x, w, scale, key, groups, place, given)


def _place(axes: tuple[str, ...], length: int) -> Array:
    """The number of the first of this device's `length` rows (or columns), of all that these axes cut."""
    if not axes:
        return jnp.zeros((), jnp.uint32)
    return lax.axis_index(axes).astype(jnp.uint32) * jnp.uint32(length)
