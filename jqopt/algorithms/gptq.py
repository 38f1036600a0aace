"""gptq: rounds column after column, and lets the columns that are still to come make up for each error."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular

from jqopt import _numerics
from jqopt._numerics import Codes
from jqopt.algorithms import _descent, _statistics, weight_ranges
from jqopt.algorithms._base import Algorithm, Task
from jqopt.algorithms.max import max
from jqopt.errors import PlanError
from jqopt.formats import E4M3

BLOCK = 128  # columns between two updates of the whole matrix: speed only, the result is the same
GROWTH, TRIES = 10.0, 8
MOST_PASSES = 100
LEAST_E4M3 = np.float32(2.0**-9)


def gptq(damp: float = 0.01, order: bool = True, scales: str = "mse", passes: int = 0) -> Algorithm:
    """Minimizes tr((W - Q) H (W - Q)^T), H = sum x x^T over the calibration data, for any format.

    Args:
        damp: added to H's diagonal, as a part of its mean. Where H still isn't positive definite it grows tenfold until
            it is, so no weight is rounded without its data.
        order: columns with the largest activations first. Scales are fixed beforehand, so the stored layout is as ever.
        scales: `mse` (searched per tile), `local_hessian` or `max`; a step before that has chosen scales decides alone.
        passes: of coordinate descent afterwards, at most 100: each column in turn takes the code that is best as all
            others now are, and each scale its best value (powers of two, and those of several rows, stay). One costs
            about as much as the rounding itself; what is minimized never gets larger.

    Inputs that are always zero get a weight of zero. Source: Frantar et al., GPTQ, arXiv 2210.17323; the order and its
    static groups as in its reference implementation. Passes: Behdin et al., QuantEase, arXiv 2309.01885.

    Raises:
        PlanError: an option has no such value.
    """
    if scales not in _SCALES:
        raise PlanError(f"gptq: scales is {scales!r}; write {' or '.join(_SCALES)}")
    if isinstance(damp, bool) or not isinstance(damp, int | float) or not 0 < damp < 1:
        raise PlanError(
            f"gptq: damp is {damp!r}; write a part of the mean of H's diagonal between 0 and 1, such as 0.01"
        )
    if not isinstance(order, bool):
        raise PlanError(f"gptq: order is {order!r}; write true or false")
    if isinstance(passes, bool) or not isinstance(passes, int) or not 0 <= passes <= MOST_PASSES:
        raise PlanError(f"gptq: passes is {passes!r}; write a whole number from 0 to {MOST_PASSES}")
    solve = functools.partial(_solve, damp=float(damp), order=order, choose=_SCALES[scales], passes=passes)
    return Algorithm("gptq", solve, "rounding", (_statistics.AMAX, _statistics.MOMENTS))


_SCALES = {
    "mse": weight_ranges.mse(),
    "local_hessian": weight_ranges.local_hessian(),
    "max": max(),
}


def _solve(task: Task, *, damp: float, order: bool, choose: Algorithm, passes: int) -> Task:
    """All weights of the task share one factor of H; their rows are rounded side by side."""
    h = _statistics.moments(task)
    dead = jnp.diagonal(h) <= 0
    task = task.replace(weights=tuple(jnp.where(dead, jnp.float32(0), w) for w in task.weights))
    if all(tile is None for tile in task.tiles):
        task = choose.solve(task)
    h = h + jnp.diag(dead.astype(jnp.float32))
    first = jnp.argsort(-jnp.diagonal(h)) if order else jnp.arange(task.k)
    back = jnp.argsort(first)
    u = _upper(h[first][:, first], damp)
    codes = [_coded(task, i) for i in range(len(task.weights))]
    grids = [_grid(task, c, w) for c, w in zip(codes, task.weights, strict=True)]
    rows = [w.reshape(-1, task.k) for w in task.weights]
    scale = jnp.concatenate([s for s, _ in grids])
    zero = None if grids[0][1] is None else jnp.concatenate([z for _, z in grids if z is not None])
    format = task.problem.format
    target, at, shift = jnp.concatenate(rows), scale[:, first], None if zero is None else zero[:, first]
    rounded = _sweep(target[:, first], at, shift, u, functools.partial(_numerics.to_grid, format=format))[:, back]
    if passes:
        damped = h + jnp.float32(damp) * jnp.eye(task.k, dtype=h.dtype)
        rounded, scale = _descent.descend(rounded, target, damped, _steps(task, codes, scale, zero), passes)
    packed = _numerics.pack(_numerics.grid_codes(rounded, scale, zero, format), format.element.bits)
    starts = [0]
    for r in rows:
        starts.append(starts[-1] + r.shape[0])
    done = []
    for c, w, (a, b) in zip(codes, task.weights, itertools.pairwise(starts), strict=True):
        kept = _stored(task, c, scale[a:b].reshape(w.shape)) if passes else c
        done.append(kept._replace(data=packed[a:b].reshape(*w.shape[:2], -1)))
    return task.replace(codes=tuple(done))


def _coded(task: Task, i: int) -> Codes:
    """Codes rounded to nearest, of which only the scales are used."""
    p = task.problem
    return _numerics.quantize_matrix(
        task.weights[i], p.format, granularity=p.granularity, tensor_amax=task.amax[i], tile_amax=task.tiles[i],
        packed=False,
    )  # fmt: skip


def _grid(task: Task, codes: Codes, w: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """(scale, zero point or None) of each element, [e * n, k]."""
    n, k = w.shape[-2:]
    scales = codes._replace(data=None)  # type: ignore[arg-type]
    each = jax.vmap(lambda c: _numerics.element_scales(c, task.problem.format, n, k))
    scale, zero = each(scales)
    return scale.reshape(-1, k), None if zero is None else zero.reshape(-1, k)


def _movable(task: Task) -> bool:
    """May scales be chosen anew for given codes: do they have digits, and does each belong to one row alone?"""
    format, (n, k) = task.problem.format, task.weights[0].shape[-2:]
    rows, _ = format.tile_for(n, k, task.problem.granularity)
    return rows == 1 and task.problem.granularity != "tensor" and format.then is None and format.scale.name != "e8m0"


def _steps(task: Task, codes: list[Codes], scale: jax.Array, zero: jax.Array | None) -> _descent.Grid:
    """What all rows' values and scales [e * n, k] may be."""
    format, (n, k) = task.problem.format, task.weights[0].shape[-2:]
    storable = None
    if _movable(task):
        wholes = [_whole(c, w.shape[1]) for c, w in zip(codes, task.weights, strict=True)]
        whole = None if wholes[0] is None else jnp.concatenate([g for g in wholes if g is not None])
        storable = functools.partial(_storable, whole=whole)
    to_grid = functools.partial(_numerics.to_grid, format=format)
    return _descent.Grid(scale, zero, to_grid, storable, format.tile_for(n, k, task.problem.granularity)[1])


def _whole(codes: Codes, n: int) -> jax.Array | None:
    """The global scale of each row [e * n, 1], where there is one."""
    return None if codes.global_scale is None else jnp.repeat(codes.global_scale.reshape(-1), n)[:, None]


def _storable(scale: jax.Array, whole: jax.Array | None) -> jax.Array:
    """The nearest scale that can be stored: any float32, or an e4m3 above zero times the global scale."""
    if whole is None:
        return scale
    return _numerics.round_to(jnp.maximum(_numerics.divide(scale, whole), LEAST_E4M3), E4M3) * whole


def _stored(task: Task, codes: Codes, scale: jax.Array) -> Codes:
    """The codes with scales [e, n, k] in place of their own."""
    if not _movable(task):
        return codes
    n, k = scale.shape[-2:]
    _, columns = task.problem.format.tile_for(n, k, task.problem.granularity)
    per_tile = scale[..., ::columns]
    if codes.global_scale is None:
        return codes._replace(scale=per_tile)
    return codes._replace(scale=_numerics.encode(_numerics.divide(per_tile, codes.global_scale[..., None, None]), E4M3))


def _upper(h: jax.Array, damp: float) -> jax.Array:
    """U, upper triangular, with U^T U the inverse of the damped h: row i says how column i's error moves the others.

    Read backwards, h is L L^T; read forwards again L is an upper R with h = R R^T, so U = R^-1: no inverse is formed.
    """
    k = h.shape[0]
    eye = jnp.eye(k, dtype=h.dtype)

    def attempt(damp: jax.Array) -> jax.Array:
        r = lax.linalg.cholesky((h + damp * eye)[::-1, ::-1])[::-1, ::-1]
        return solve_triangular(r, eye, lower=False)

    def failed(state: tuple) -> jax.Array:
        _, tries, u = state
        return jnp.logical_and(tries < TRIES, jnp.logical_not(jnp.all(jnp.isfinite(u))))

    def again(state: tuple) -> tuple:
        damp, tries, _ = state
        return damp * GROWTH, tries + 1, attempt(damp * GROWTH)

    start = jnp.float32(damp)
    return lax.while_loop(failed, again, (start, jnp.int32(0), attempt(start)))[2]


def _sweep(
    w: jax.Array, scale: jax.Array, zero: jax.Array | None, u: jax.Array, to_grid: Callable[..., jax.Array]
) -> jax.Array:
    """w [n, k] rounded column by column; u [k, k] upper."""
    n, k = w.shape
    size = min(BLOCK, k)
    short = -k % size
    w, scale = jnp.pad(w, ((0, 0), (0, short))), jnp.pad(scale, ((0, 0), (0, short)), constant_values=1)
    zero = None if zero is None else jnp.pad(zero, ((0, 0), (0, short)))
    u = jnp.pad(u, ((0, short), (0, short))) + jnp.diag(jnp.pad(jnp.zeros(k, u.dtype), (0, short), constant_values=1))
    inside, whole = jnp.arange(size), jnp.arange(k + short)

    def block(b: jax.Array, w: jax.Array) -> jax.Array:
        start = b * size
        part, s = (lax.dynamic_slice_in_dim(a, start, size, 1) for a in (w, scale))
        z = None if zero is None else lax.dynamic_slice_in_dim(zero, start, size, 1)
        rows = lax.dynamic_slice_in_dim(u, start, size, 0)
        corner = lax.dynamic_slice_in_dim(rows, start, size, 1)

        def column(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            part, errors = state
            value = part[:, i]
            rounded = to_grid(value, s[:, i], None if z is None else z[:, i])
            error = (value - rounded) / corner[i, i]
            part = part - jnp.outer(error, jnp.where(inside > i, corner[i], jnp.float32(0)))
            return part.at[:, i].set(rounded), errors.at[:, i].set(error)

        part, errors = lax.fori_loop(0, size, column, (part, jnp.zeros((n, size), jnp.float32)))
        later = jnp.where(whole >= start + size, rows, jnp.float32(0))
        w = w - jnp.matmul(errors, later, precision=lax.Precision.HIGHEST)
        return lax.dynamic_update_slice_in_dim(w, part, start, 1)

    return lax.fori_loop(0, (k + short) // size, block, w)[:, :k]
