"""Second moments of activations: one pass gathers what every solver that minimizes output error needs."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jqopt._numerics import amax_of


class Moments(NamedTuple):
    """sum x x^T [k, k] over the tokens seen, how many, their largest |x|, and 1 once any was seen; float32."""

    amax: jax.Array
    seen: jax.Array
    count: jax.Array
    sum: jax.Array


def init(k: int) -> Moments:
    """Nothing seen yet."""
    zero = jnp.zeros((), jnp.float32)
    return Moments(zero, zero, zero, jnp.zeros((k, k), jnp.float32))


def update(state: Moments, x: jax.Array) -> Moments:
    """x [tokens, k]. Any split of the data gives the same sums up to the order of addition."""
    x = x.astype(jnp.float32)
    more = lax.dot_general(x, x, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
    return Moments(
        jnp.maximum(state.amax, amax_of(x)),
        jnp.maximum(state.seen, jnp.float32(x.size > 0)),
        state.count + jnp.float32(x.shape[0]),
        state.sum + more,
    )


def allreduce(before: Moments, after: Moments, axes: tuple[str, ...]) -> Moments:
    """Maxima over the devices; what each has added is summed."""
    count, total = (b + lax.psum(a - b, axes) for b, a in ((before.count, after.count), (before.sum, after.sum)))
    return Moments(lax.pmax(after.amax, axes), lax.pmax(after.seen, axes), count, total)
