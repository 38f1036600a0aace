"""qep: weights that make up for what the quantized layers before them have done to their input."""

from __future__ import annotations

import jax.numpy as jnp

from jqopt.algorithms import _statistics
from jqopt.algorithms._base import Algorithm, Task, tensor_amax
from jqopt.errors import PlanError

CROSS = "cross"
"""The statistic that only the layerwise mode gathers: sum (x - x_q) x_q^T [k, k] of float and quantized inputs."""


def qep(strength: float = 0.5, damp: float = 0.01) -> Algorithm:
    """Before rounding, moves W to W + strength * W C (H + damp)^-1, C = sum (x - x_q) x_q^T, H = sum x_q x_q^T.

    At strength 1 and without damping that is the least-squares solution of x W^T = x_q W'^T: the layer's target is its
    output in the float model, its input what the quantized layers before it give. Needs `layerwise: true`.

    Args:
        strength: 0 to 1; the whole of it follows the calibration data too closely below some 20 tokens a channel.
        damp: as a part of the mean of H's diagonal.

    Source: Arai and Ichikawa, Quantization Error Propagation, NeurIPS 2025, arXiv 2504.09629.

    Raises:
        PlanError: an option has no such value.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise PlanError(f"qep: strength is {strength!r}; write a number from 0 to 1")
    if isinstance(damp, bool) or not isinstance(damp, int | float) or not 0 < damp < 1:
        raise PlanError(f"qep: damp is {damp!r}; write a number between 0 and 1, such as 0.01")

    def solve(task: Task) -> Task:
        h, cross = task.stats["moments"].sum, task.stats[CROSS]
        mean = jnp.maximum(jnp.mean(jnp.diagonal(h)), jnp.float32(2.0**-100))
        damped = h / mean + jnp.float32(damp) * jnp.eye(task.k, dtype=jnp.float32)
        step = jnp.float32(strength) * jnp.linalg.solve(damped, (cross / mean).T).T  # C (H + damp)^-1
        weights = tuple(w + jnp.matmul(w, step) for w in task.weights)
        return task.replace(weights=weights, amax=tensor_amax(weights, task.problem))

    return Algorithm("qep", solve, "target", (_statistics.AMAX, _statistics.MOMENTS), two_streams=True)
