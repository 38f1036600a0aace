"""Feedback: activations rounded channel after channel, the channels to come making up for each error.

Of y = x W^T an error e of the activation makes e W^T, so what counts is e G e^T with G = W^T W: where columns of the
weights are alike, an error in one channel can be taken back in another. It is GPTQ's sweep with weight and activation
exchanged: what W does to x is known before, so the factors are made once, when the weights are packed, and each token
is rounded with them at run time. Scales are those of plain rounding, so codes mean what they always mean.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jqopt import _compat, _numerics
from jqopt._numerics import Codes
from jqopt.formats import Format

DAMP = 0.01  # added to G's diagonal, as a part of its mean
STEP = 16  # channels between two updates of a whole block: speed only, the result is the same up to float32's rounding


@functools.partial(jax.jit, static_argnums=1)
def factors(weights: Sequence[jax.Array], block: int) -> jax.Array:
    """How errors move later channels: bfloat16 [*stack, k / block (rounded up), block, block], strictly upper.

    C[i, j] is what channel j of a block gets for each unit of channel i's error, i < j. With U upper triangular and
    U^T U the inverse of the block's G, C[i, j] = -U[i, j] / U[i, i] (Frantar et al., arXiv 2210.17323, equation 3).

    Args:
        weights: float32 [*stack, n, k], all that read the activation, as it meets them.
        block: channels that are rounded together; the last block is filled up with channels of zero.
    """
    k = weights[0].shape[-1]
    short = -k % block

    def gram(w: jax.Array) -> jax.Array:
        w = jnp.pad(w.astype(jnp.float32), [(0, 0)] * (w.ndim - 1) + [(0, short)])
        w = w.reshape(*w.shape[:-1], -1, block)
        return jnp.einsum("...nbi,...nbj->...bij", w, w, precision=lax.Precision.HIGHEST)

    g = sum(gram(w) for w in weights)
    mean = jnp.mean(jnp.diagonal(g, axis1=-2, axis2=-1), axis=-1)[..., None, None]
    eye = jnp.eye(block, dtype=jnp.float32)
    g = g + eye * jnp.where(mean > 0, DAMP * mean, jnp.float32(1))
    # Read backwards, g is L L^T; read forwards again L is an upper R with g = R R^T, so U = R^-1: no inverse is formed.
    r = lax.linalg.cholesky(g[..., ::-1, ::-1])[..., ::-1, ::-1]
    u = lax.linalg.triangular_solve(r, jnp.broadcast_to(eye, r.shape), left_side=True, lower=False)
    c = -u / jnp.diagonal(u, axis1=-2, axis2=-1)[..., None]
    return jnp.where(jnp.arange(block)[:, None] < jnp.arange(block), c, jnp.float32(0)).astype(jnp.bfloat16)


def rounded(x: jax.Array, codes: Codes, format: Format, factor: jax.Array) -> jax.Array:
    """float32 [*stack, m, k]: values of `format` under the scales in `codes`, near x where it counts.

    Args:
        x: float32 [*stack, m, k].
        codes: of x rounded to nearest; only its scales are used.
        factor: as `factors` gives them.

    NaN stays NaN, and makes the channels after it in its block NaN too.
    """
    *stack, m, k = x.shape
    block = factor.shape[-1]
    count, step = -(-k // block), min(STEP, block)
    while block % step:
        step -= 1
    scale, zero = _numerics.element_scales(codes, format, m, k)
    assert zero is None, format.name  # inputs have no zero points

    def blocked(a: jax.Array, fill: float) -> jax.Array:
        """[*stack, m, k] as [block / step, *stack, count, step, m]."""
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, count * block - k)], constant_values=fill)
        a = jnp.moveaxis(a.reshape(*stack, m, count, block // step, step), -4, -1)
        return jnp.moveaxis(a, -3, 0)

    # [block / step, *stack, count, step, block]: what each channel of a step takes from every channel of its block
    takes = jnp.swapaxes(factor.astype(jnp.float32), -1, -2).reshape(*stack, count, block // step, step, block)
    takes = jnp.moveaxis(takes, -3, 0)

    def part(errors: jax.Array, now: tuple) -> tuple[jax.Array, jax.Array]:
        """One step: `errors` [*stack, count, block, m] of the channels before it, zero from there on."""
        number, x, scale, take = now
        moved = x + jnp.matmul(take, errors, precision=lax.Precision.HIGHEST)
        own = lax.dynamic_slice_in_dim(take, number * step, step, take.ndim - 1)

        def channel(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            values, lost = state
            at = functools.partial(lax.dynamic_index_in_dim, index=i, axis=-2 % x.ndim, keepdims=False)
            row = lax.dynamic_index_in_dim(own, i, own.ndim - 2, keepdims=False)
            want = at(moved) + jnp.sum(row[..., None] * lost, axis=-2)
            value = _numerics.to_grid(want, at(scale), None, format=format)
            put = lambda a, v: lax.dynamic_update_index_in_dim(a, v, i, a.ndim - 2)  # noqa: E731
            return put(values, value), put(lost, want - value)

        none = _compat.vary(jnp.zeros_like(x), axes)
        values, lost = lax.fori_loop(0, step, channel, (none, none))
        return lax.dynamic_update_slice_in_dim(errors, lost, number * step, errors.ndim - 2), values

    axes = frozenset().union(*map(_compat.varying, (x, scale, factor)))  # of a shard_map, all in what is carried
    numbers = jnp.arange(block // step)
    start = _compat.vary(jnp.zeros((*stack, count, block, m), jnp.float32), axes)
    _, values = lax.scan(part, start, (numbers, blocked(x.astype(jnp.float32), 0), blocked(scale, 1), takes))
    values = jnp.moveaxis(jnp.moveaxis(values, 0, -3), -1, -4)  # [*stack, m, count, block / step, step]
    return values.reshape(*stack, m, count * block)[..., :k]
