"""Random numbers for stochastic rounding that depend on a key and a global position only, not on devices or shapes.

Philox-4x32 with 10 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the counter is the
value's row and its column over 8, the four words of the result are 16 bits for each of 8 neighbours. A device that
holds a part of a tensor counts from the part's first row and column. `jqopt_kernels` draws the same bits.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jqopt import _compat

WORDS = 4
SHARE = 2 * WORDS  # values that share a counter
_FACTORS = (np.uint32(0xD2511F53), np.uint32(0xCD9E8D57))
_LOW = np.uint32(0xFFFF)
_STEPS = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))  # from one round's key to the next one's

Words = tuple[Array, Array, Array, Array]


def philox(key: tuple[Array, Array], counter: Words) -> Words:
    """Four random words for each four counters (of one shape), elementwise; all uint32. Keys broadcast.

    The rounds are a loop, so that the words are computed once and written: XLA would fuse them into whatever reads
    them, and compute each word once for each number in it.
    """
    axes = frozenset[str]().union(*map(_compat.varying, (*key, *counter)))
    keys = (_compat.vary(key[0], axes), _compat.vary(key[1], axes))
    shape = jnp.broadcast_shapes(*(each.shape for each in (*key, *counter)))
    a, b, c, d = (_compat.vary(jnp.broadcast_to(each, shape), axes) for each in counter)

    def five(_: object, carry: tuple[Words, tuple[Array, Array]]) -> tuple[Words, tuple[Array, Array]]:
        words, keys = carry
        for _round in range(5):
            words = _turned(words, keys)
            keys = (keys[0] + _STEPS[0], keys[1] + _STEPS[1])
        return words, keys

    return lax.fori_loop(0, 2, five, ((a, b, c, d), keys))[0]


def _turned(words: Words, keys: tuple[Array, Array]) -> Words:
    """One round."""
    a, b, c, d = words
    return _high(c, _FACTORS[1]) ^ b ^ keys[0], c * _FACTORS[1], _high(a, _FACTORS[0]) ^ d ^ keys[1], a * _FACTORS[0]


def _high(x: Array, factor: np.uint32) -> Array:
    """The upper 32 bits of x * factor, from products of their halves: XLA can't partition `lax.mulhi` (JAX 0.10)."""
    high, low = factor >> np.uint32(16), factor & _LOW
    x_high, x_low = x >> np.uint32(16), x & _LOW
    middle = x_high * low + (x_low * low >> np.uint32(16))
    return x_high * high + (middle >> np.uint32(16)) + (x_low * high + (middle & _LOW) >> np.uint32(16))


def uniform(key: Array, shape: tuple[int, ...], row: Array | int = 0, column: Array | int = 0) -> Array:
    """float32 numbers (n + 1/2) / 2^16, n of 16 random bits, for values [..., r, c]; leading axes count as rows.

    Centred, they have the mean of a uniform number exactly. (Hardware takes 8 bits, whose coarseness can be seen in the
    mean of some thousand draws.)

    Args:
        key: uint32 [*keys, 2]; each key draws its own numbers, [*keys, *shape].
        row, column: the place of the first value in the whole tensor.
    """
    return _uniform(key, shape, isinstance(column, int) and column % SHARE == 0, row, column)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _uniform(key: Array, shape: tuple[int, ...], aligned: bool, row: Array, column: Array) -> Array:
    """aligned: the first value is the first of those that share its counter."""
    *lead, r, c = shape
    words = -(-c // SHARE) + (not aligned)
    first = jnp.asarray(column, jnp.uint32)
    rows = jnp.asarray(row, jnp.uint32) + lax.broadcasted_iota(jnp.uint32, (int(np.prod(lead)) * r, words), 0)
    columns = first // jnp.uint32(SHARE) + lax.broadcasted_iota(jnp.uint32, rows.shape, 1)
    nought = jnp.zeros_like(rows)
    drawn = jnp.stack(philox((key[..., 0, None, None], key[..., 1, None, None]), (rows, columns, nought, nought)), -1)
    half = lax.bitcast_convert_type(drawn, jnp.uint16).reshape(*key.shape[:-1], *lead, r, words * SHARE)
    half = half[..., :c] if aligned else lax.dynamic_slice_in_dim(half, first % jnp.uint32(SHARE), c, half.ndim - 1)
    return (half.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-16)
