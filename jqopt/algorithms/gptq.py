"""gptq: rounds column after column, and lets the columns that are still to come make up for each error."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from jqopt import _numerics
from jqopt._numerics import Codes
from jqopt.algorithms import _statistics, weight_ranges
from jqopt.algorithms._base import Algorithm, Task
from jqopt.algorithms.max import max
from jqopt.errors import PlanError

BLOCK = 128  # columns between two updates of the whole matrix: speed only, the result is the same
GROWTH, TRIES = 10.0, 8


def gptq(damp: float = 0.01, order: bool = True, scales: str = "mse") -> Algorithm:
    """Minimizes tr((W - Q) H (W - Q)^T), H = sum x x^T over the calibration data, for any format.

    Args:
        damp: added to H's diagonal, as a part of its mean. Where H still isn't positive definite it grows tenfold until
            it is, so no weight is rounded without its data.
        order: columns with the largest activations first. Scales are fixed beforehand, so the stored layout is as ever.
        scales: `mse` (searched per tile), `local_hessian` or `max`; a step before that has chosen scales decides alone.

    Inputs that are always zero get a weight of zero. Source: Frantar et al., GPTQ, arXiv 2210.17323; the order and its
    static groups as in its reference implementation.

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
    solve = functools.partial(_solve, damp=float(damp), order=order, choose=_SCALES[scales])
    return Algorithm("gptq", solve, "rounding", (_statistics.AMAX, _statistics.MOMENTS))


_SCALES = {
    "mse": weight_ranges.mse(),
    "local_hessian": weight_ranges.local_hessian(),
    "max": max(),
}


def _solve(task: Task, *, damp: float, order: bool, choose: Algorithm) -> Task:
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
    rounded = _sweep(
        jnp.concatenate(rows)[:, first], scale[:, first], None if zero is None else zero[:, first], u,
        functools.partial(_numerics.to_grid, format=task.problem.format),
    )  # fmt: skip
    values = _numerics.grid_codes(rounded[:, back], scale, zero, task.problem.format)
    packed = _numerics.pack(values, task.problem.format.element.bits)
    starts = [0]
    for r in rows:
        starts.append(starts[-1] + r.shape[0])
    parts = [packed[a:b] for a, b in itertools.pairwise(starts)]
    done = [c._replace(data=p.reshape(*w.shape[:2], -1)) for c, p, w in zip(codes, parts, task.weights, strict=True)]
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
