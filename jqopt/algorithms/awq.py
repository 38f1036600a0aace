"""awq: scales up the input channels of the weights that matter, so that rounding harms them less."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jqopt import _numerics
from jqopt.algorithms import _statistics
from jqopt.algorithms._base import Algorithm, Task, chain, qdq, scaled, tied
from jqopt.algorithms._statistics import channel_mean, moments
from jqopt.algorithms.smoothquant import LEAST, MOST, best_scale, check_grid
from jqopt.algorithms.weight_ranges import awq_clip, tried
from jqopt.errors import PlanError

OBJECTIVES = ("weights", "outputs")


def awq(alpha_grid: int = 10, objective: str | None = None) -> Algorithm:
    """Multiplies channel j of the weights by s_j = mean|X_j|^alpha / w_j^(1 - alpha), and divides the input by it.

    w_j is the mean over rows of |W_j| relative to the largest value of its tile; s is divided by sqrt(max s * min s).
    For each group of weights that read one activation, alpha is searched over the grid, with no scale at all among the
    candidates: the result is never worse than rounding to nearest on what is minimized.

    Args:
        alpha_grid: steps from 0 to 1.
        objective: `weights`: the squared output error of rounded weights over all tokens seen, which their second
            moments give for any number of candidates; `outputs`: of rounded weights and activations, on a sample as
            `smoothquant`'s. By default the one that fits: outputs where activations are quantized.

    Source: Lin et al., AWQ, arXiv 2306.00978; the formula of s as in ModelOpt's awq_lite.

    Raises:
        PlanError: an option has no such value.
    """
    check_grid("awq", alpha_grid)
    if objective not in (None, *OBJECTIVES):
        raise PlanError(f"awq: objective is {objective!r}; write {' or '.join(OBJECTIVES)}")
    alphas = np.linspace(0, 1, alpha_grid + 1).astype(np.float32)

    def solve(task: Task) -> Task:
        mean, weight = channel_mean(task), weight_mean(task)
        candidates = jnp.stack([jnp.ones_like(mean), *(tied(task, scale(mean, weight, a)) for a in alphas)])
        chosen = objective or ("weights" if task.problem.input is None else "outputs")
        if chosen == "outputs":
            return scaled(task, best_scale(task, candidates))
        losses = weight_losses(task, candidates)
        return scaled(task, candidates[jnp.argmin(losses)])

    needs = {None: (_statistics.MOMENTS, _statistics.ROWS), "weights": (_statistics.MOMENTS,)}
    more = needs.get(objective, (_statistics.ROWS,))
    return Algorithm("awq", solve, "scale", (_statistics.AMAX, _statistics.CHANNELS, *more), scales_input=True)


def awq_full(alpha_grid: int = 10) -> Algorithm:
    """awq, then awq_clip on the scaled weights."""
    return chain(awq(alpha_grid), awq_clip())._replace(name="awq_full")


def scale(mean: Array, weight: Array, alpha: np.float32) -> Array:
    """What the input is multiplied with [k]: 1 / s; 1 for channels that no data reached."""
    tiny = jnp.float32(1e-8)
    s = jnp.clip(mean**alpha / (weight ** (1 - alpha) + tiny), LEAST, MOST)
    s = jnp.where(mean > 0, s, jnp.float32(1))
    return jnp.sqrt(jnp.max(s) * jnp.min(s)) / s


def weight_mean(task: Task) -> Array:
    """Mean over the rows of all weights of |w| / (largest |w| of its tile) [k]."""
    total, rows = jnp.zeros((task.k,), jnp.float32), 0
    for w in task.weights:
        n, k = w.shape[-2:]
        tile = task.problem.format.tile_for(n, k, task.problem.granularity)
        tiles = jnp.abs(_numerics.to_tiles(w, tile))
        most = jnp.max(tiles, axis=(-3, -1), keepdims=True)
        relative = _numerics.from_tiles(tiles / (most + jnp.float32(1e-12)), *w.shape[-2:])
        total = total + jnp.sum(relative, axis=(0, 1))
        rows += w.shape[0] * w.shape[1]
    return total / np.float32(rows)


def weight_losses(task: Task, candidates: Array) -> Array:
    """For each candidate [c, k]: the squared output error of rounded weights over all tokens, relative to H's mean."""
    h = moments(task)

    def loss(pre: Array) -> Array:
        trial = tried(scaled(task, pre))
        total = jnp.float32(0)
        for i, w in enumerate(task.weights):
            d = qdq(trial, i) * pre - w
            total = total + jnp.sum(jnp.matmul(d, h) * d)
        return total

    return lax.map(loss, candidates)
