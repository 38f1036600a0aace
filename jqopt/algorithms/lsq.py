"""lsq: weight scales learned by gradient descent on the layer's output error."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jqopt import _numerics
from jqopt._numerics import Codes, amax_of
from jqopt.algorithms import _statistics
from jqopt.algorithms._base import Algorithm, Task, qdq
from jqopt.algorithms.weight_ranges import mse
from jqopt.errors import PlanError

LEAST = 1e-3  # of a tile's largest value: the smallest range


def lsq(steps: int = 100, rate: float = 0.01, dual: bool = False) -> Algorithm:
    """Learns each tile's scale so that tr((W - Q) H (W - Q)^T) falls, H = sum x x^T over the calibration data.

    The gradient goes straight through the rounding: dq / ds = q/s - w/s inside the range, the largest code outside.
    Adam on the logarithms of the scales, from those of `mse`; of all steps the one of least error is kept, for each row
    of tiles apart, so the result is never worse than the start.

    Args:
        steps: of descent; 0 keeps the scales of `mse`.
        rate: the first step's change of a logarithm.
        dual: learn two scales a tile, one that codes are made with and one that they are multiplied by.

    Sources: Esser et al., Learned Step Size Quantization, arXiv 1902.08153; the dual form as in ModelOpt's `dual_lsq`.

    Raises:
        PlanError: an option has no such value.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise PlanError(f"lsq: steps is {steps!r}; write a number such as 100")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 1:
        raise PlanError(f"lsq: rate is {rate!r}; write a number between 0 and 1, such as 0.01")
    if not isinstance(dual, bool):
        raise PlanError(f"lsq: dual is {dual!r}; write true or false")
    solve = functools.partial(_solve, steps=steps, rate=float(rate), dual=dual)
    return Algorithm("lsq", solve, "rounding" if dual else "range", (_statistics.AMAX, _statistics.MOMENTS))


def _solve(task: Task, *, steps: int, rate: float, dual: bool) -> Task:
    p = task.problem
    if p.format.zero_point or (p.granularity == "tensor" and not p.format.global_scale):
        return task
    start = task if any(t is not None for t in task.tiles) else mse().solve(task)
    h = _statistics.moments(task)
    learned = [_learned(start, i, h, steps, rate, dual) for i in range(len(task.weights))]
    done = task.replace(tiles=tuple(pre for pre, _ in learned))
    return done.replace(codes=tuple(_dual(done, i, post) for i, (_, post) in enumerate(learned))) if dual else done


def _dual(task: Task, i: int, post: Array) -> Codes:
    """Codes made with the tile's first range, stored with the scale of the second."""
    p = task.problem
    codes = [
        _numerics.quantize_matrix(
            task.weights[i], p.format, granularity=p.granularity, tensor_amax=task.amax[i], tile_amax=tile
        )
        for tile in (task.tiles[i], post)
    ]
    return codes[1]._replace(data=codes[0].data)


def _stored(task: Task, i: int, tile: Array) -> Array:
    """The scale of each tile as it is stored [e, rows, cols], without the global one."""
    p = task.problem
    codes = _numerics.quantize_matrix(
        task.weights[i], p.format, granularity=p.granularity, tensor_amax=task.amax[i], tile_amax=tile
    )
    return _numerics.decode_scale(codes.scale, p.format)


def _learned(task: Task, i: int, h: Array, steps: int, rate: float, dual: bool) -> tuple[Array, Array]:
    """(the amax [e, rows, cols] that codes are made with, the one that they are multiplied by)"""
    w = task.weights[i]
    n, k = w.shape[-2:]
    tile = task.problem.format.tile_for(n, k, task.problem.granularity)
    split = lambda x: _numerics.to_tiles(x, tile)  # noqa: E731
    own = jnp.maximum(amax_of(split(w), (-3, -1)), jnp.float32(_numerics.TINY))
    start = task.tiles[i]
    assert start is not None

    def forward(logs: Array) -> tuple[Array, Array, Array]:
        """(rounded weight, its change with the logarithm of the first range, with that of the second)"""
        pre, post = jnp.exp(logs[0]), jnp.exp(logs[-1])
        q = qdq(task, i, tile=pre)
        times = _stored(task, i, post) / jnp.maximum(_stored(task, i, pre), jnp.float32(_numerics.TINY))
        ratio = _numerics.from_tiles(jnp.broadcast_to(_numerics.spread(times), split(w).shape), n, k) if dual else 1.0
        inside = _numerics.from_tiles(split(jnp.abs(w)) <= _numerics.spread(pre), n, k)
        return q * ratio, -jnp.where(inside, w, 0) * ratio, q * ratio

    def step(state: tuple, t: Array) -> tuple[tuple, None]:
        logs, first, second, best, least = state
        q, by_pre, by_post = forward(logs)
        d = q - w
        dh = jnp.matmul(d, h)
        rows = jnp.sum(dh * d, axis=-1)  # [e, n]
        tall = split(rows[..., None] * jnp.ones((k,), jnp.float32) / np.float32(k)).sum((-3, -1)).sum(-1)
        better = (tall < least)[None, ..., None]
        best, least = jnp.where(better, logs, best), jnp.minimum(tall, least)
        parts = (by_pre + by_post,) if not dual else (by_pre, by_post)
        g = jnp.stack([split(2 * dh * part).sum((-3, -1)) for part in parts])
        first, second = 0.9 * first + 0.1 * g, 0.99 * second + 0.01 * g * g
        mean, spread = first / (1 - 0.9**t), second / (1 - 0.99**t)
        fade = np.float32(rate) * (1 - (t - 1) / np.float32(max(steps, 1)))
        moved = logs - fade * mean / (jnp.sqrt(spread) + jnp.float32(1e-20))
        low = jnp.log(own * LEAST)
        return (jnp.clip(moved, low, low + jnp.float32(np.log(4 / LEAST))), first, second, best, least), None

    logs = jnp.stack([jnp.log(jnp.maximum(start, own * LEAST))] * (2 if dual else 1))
    zero = jnp.zeros_like(logs)
    least = jnp.full(logs.shape[1:-1], jnp.inf, jnp.float32)
    (_, _, _, best, _), _ = lax.scan(step, (logs, zero, zero, logs, least), jnp.arange(1, steps + 2, dtype=jnp.float32))
    return jnp.exp(best[0]), jnp.exp(best[-1])
