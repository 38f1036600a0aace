"""hqq: weight scales for which few values are far off, found without data."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import Array, lax

from jqopt import _numerics
from jqopt._numerics import amax_of
from jqopt.algorithms._base import Algorithm, Task, qdq
from jqopt.errors import PlanError


def hqq(norm: float = 0.7, rounds: int = 20) -> Algorithm:
    """Scales that minimize sum |w - q|^norm in each tile: norms below 1 let a few values be far off for the rest's sake.

    Half-quadratic splitting: values e shrink |w - q|, a least-squares step fits the scale to w - e; the penalty between
    the two grows from round to round. The scales of least error of all rounds, `max`'s among them, are kept. Formats
    with zero points and tensor-level scales keep those of `max`. It needs no data.

    Source: Badri and Shaji, Half-Quadratic Quantization, 2023, which moves zero points; here it is the scale.

    Raises:
        PlanError: an option has no such value.
    """
    if isinstance(norm, bool) or not isinstance(norm, int | float) or not 0 < norm <= 1:
        raise PlanError(f"hqq: norm is {norm!r}; write a number above 0 and up to 1, such as 0.7")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise PlanError(f"hqq: rounds is {rounds!r}; write a number such as 20")
    return Algorithm("hqq", functools.partial(_solve, norm=float(norm), rounds=rounds), "range")


def _solve(task: Task, *, norm: float, rounds: int) -> Task:
    p = task.problem
    if p.format.zero_point or (p.granularity == "tensor" and not p.format.global_scale):
        return task
    return task.replace(tiles=tuple(_fitted(task, i, norm, rounds) for i in range(len(task.weights))))


def _fitted(task: Task, i: int, norm: float, rounds: int) -> Array:
    """The amax [e, rows, cols] that each tile of weight i is scaled by."""
    w = task.weights[i]
    n, k = w.shape[-2:]
    tile = task.problem.format.tile_for(n, k, task.problem.granularity)
    tiles = _numerics.to_tiles(w, tile)
    own = amax_of(tiles, (-3, -1))
    size = jnp.maximum(_numerics.spread(own), jnp.float32(_numerics.TINY))

    def step(state: tuple[Array, Array, Array], penalty: Array) -> tuple[tuple[Array, Array, Array], None]:
        amax, best, least = state
        q = _numerics.to_tiles(qdq(task, i, tile=amax), tile)
        off = (tiles - q) / size  # relative to the tile, so that one penalty suits all
        error = jnp.sum(jnp.where(off == 0, 0, jnp.abs(off) ** norm), axis=(-3, -1))
        better = error < least
        shrunk = jnp.abs(off) - jnp.where(off == 0, 0, jnp.abs(off) ** (norm - 1)) / penalty
        e = jnp.sign(off) * jnp.maximum(shrunk, 0) * size
        power = jnp.sum(q * q, axis=(-3, -1))
        fit = jnp.where(power > 0, jnp.sum(q * (tiles - e), axis=(-3, -1)) / jnp.where(power > 0, power, 1), 1)
        moved = amax * jnp.clip(fit, 0.5, 2.0)
        return (moved, jnp.where(better, amax, best), jnp.where(better, error, least)), None

    penalties = 10.0 * 1.1 ** jnp.arange(rounds, dtype=jnp.float32)
    (_, best, _), _ = lax.scan(step, (own, own, jnp.full_like(own, jnp.inf)), penalties)
    return best
