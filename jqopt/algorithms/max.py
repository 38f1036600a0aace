"""max: scales from the largest absolute value, of the weight and of the activations seen."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jqopt._numerics import Codes, amax_of, quantize_matrix
from jqopt.algorithms._base import Algorithm, Problem


class MaxState(NamedTuple):
    """Running maximum of |x|, and 1 once any value was seen; both [] (stacked for stacked layers)."""

    amax: jax.Array
    seen: jax.Array


def init(k: int) -> MaxState:
    """Nothing seen yet."""
    return MaxState(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


def update(state: MaxState, x: jax.Array) -> MaxState:
    """x [tokens, k]. NaN and inf survive in the state, so that they are reported rather than lost."""
    amax = amax_of(x).astype(jnp.float32)
    return MaxState(jnp.maximum(state.amax, amax), jnp.maximum(state.seen, jnp.float32(x.size > 0)))


def allreduce(before: MaxState, after: MaxState, axes: tuple[str, ...]) -> MaxState:
    """The maximum over the devices."""
    return jax.tree.map(lambda x: jax.lax.pmax(x, axes), after)


def solve(w: jax.Array, state: MaxState | None, problem: Problem) -> Codes:
    """Round to nearest; the scales are the weight's own, or the group's where it shares one."""
    return quantize_matrix(w, problem.format, granularity=problem.granularity, tensor_amax=problem.tensor_amax)


def max() -> Algorithm:
    """Round to nearest with scales from the maximum. Costs one forward pass; exact under any split of the data."""
    return Algorithm("max", init, update, solve, lambda state: state.amax, allreduce)
