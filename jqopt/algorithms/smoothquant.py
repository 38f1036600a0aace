"""smoothquant: moves the difficulty of large input channels into the weights, by a scale for each channel."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jqopt.algorithms import _statistics
from jqopt.algorithms._base import Algorithm, Task, input_qdq, qdq, scaled, tied
from jqopt.algorithms._statistics import PART, channel_amax, sample
from jqopt.algorithms.weight_ranges import tried
from jqopt.errors import PlanError

LEAST, MOST = 1e-4, 1e4  # of a scale
DEAD = 2.0**-31  # channels that are never larger have no scale


def smoothquant(alpha: float | str = "search", alpha_grid: int = 10) -> Algorithm:
    """Divides input channel j by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) and multiplies the weights by it.

    One scale serves all weights that read the activation.

    Args:
        alpha: from 0 (flat weights) to 1 (flat activations), or `search`: for each group the one of the grid, or no
            scale at all, that minimizes the squared output error, with weights and activations rounded as they will be,
            on a sample of the tokens: one of 128, but at least 128 and at most 2048.
        alpha_grid: steps of the grid.

    Source: Xiao et al., SmoothQuant, arXiv 2211.10438, equation 4.

    Raises:
        PlanError: an option has no such value.
    """
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not (alpha == "search" or (number and 0 <= float(alpha) <= 1)):
        raise PlanError(f"smoothquant: alpha is {alpha!r}; write search, or a number from 0 to 1")
    check_grid("smoothquant", alpha_grid)
    alphas = np.linspace(0, 1, alpha_grid + 1) if alpha == "search" else [float(alpha)]

    def solve(task: Task) -> Task:
        largest, weight = channel_amax(task), weight_amax(task)
        dead = largest <= DEAD
        candidates = [_scale(task, largest, weight, dead, np.float32(a)) for a in alphas]
        if alpha != "search":
            return scaled(task, candidates[0])
        return scaled(task, best_scale(task, jnp.stack([jnp.ones_like(largest), *candidates])))

    rows = (_statistics.ROWS,) if alpha == "search" else ()
    return Algorithm("smoothquant", solve, "scale", (_statistics.AMAX, _statistics.CHANNELS, *rows), scales_input=True)


def check_grid(name: str, steps: int) -> None:
    """Raises PlanError unless it is a number of steps."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 < steps <= 1000:
        raise PlanError(f"{name}: alpha_grid is {steps!r}; write the number of steps from 0 to 1, such as 10")


def weight_amax(task: Task) -> Array:
    """Largest |w| of each input channel [k], over all weights of the group."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(w), axis=(0, 1)) for w in task.weights]), axis=0)


def _scale(task: Task, largest: Array, weight: Array, dead: Array, alpha: np.float32) -> Array:
    """What the input is multiplied with: w^(1 - alpha) / a^alpha."""
    tiny = jnp.float32(DEAD)
    found = jnp.maximum(weight, tiny) ** (1 - alpha) / jnp.maximum(largest, tiny) ** alpha
    return tied(task, jnp.where(dead, jnp.float32(1), jnp.clip(found, LEAST, MOST)))


def best_scale(task: Task, candidates: Array) -> Array:
    """The candidate [c, k] whose rounded products are nearest to the float ones, on a sample of tokens."""
    x, there, parts = sample(task)
    largest = channel_amax(task)

    def part(i: Array, a: Array) -> Array:
        return lax.dynamic_slice_in_dim(a, i * PART, PART)

    def each(i: Array, wanted: list[Array]) -> list[Array]:
        found = [jnp.einsum("tk,enk->ten", part(i, x), w) for w in task.weights]
        return [lax.dynamic_update_slice_in_dim(a, f, i * PART, 0) for a, f in zip(wanted, found, strict=True)]

    empty = [jnp.zeros((len(x), *w.shape[:2]), jnp.float32) for w in task.weights]
    wanted = lax.fori_loop(0, parts, each, empty)

    def error(scale: Array) -> Array:
        trial = tried(scaled(task, scale))
        rounded = [qdq(trial, i) for i in range(len(task.weights))]

        def more(i: Array, total: Array) -> Array:
            seen = input_qdq(task, part(i, x) * scale, jnp.max(largest * scale))
            got = [jnp.einsum("tk,enk->ten", seen, w) - part(i, y) for w, y in zip(rounded, wanted, strict=True)]
            return total + sum((jnp.sum(jnp.square(g) * part(i, there)[..., None]) for g in got), jnp.float32(0))

        return lax.fori_loop(0, parts, more, jnp.float32(0))

    return candidates[jnp.argmin(lax.map(error, candidates))]
