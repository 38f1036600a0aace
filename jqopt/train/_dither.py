"""Random numbers for stochastic rounding that depend on a key and a global position only, not on devices or shapes.

Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the counter is the
value's row and its column over 4, the two words of the result are 16 bits for each of 4 neighbours. A device that holds
a part of a tensor counts from the part's first row and column.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jqopt import _compat

_TURNS = np.asarray([[13, 15, 26, 6], [17, 29, 16, 24]], np.uint32)
_PARITY = np.uint32(0x1BD11BDA)


def threefry(key: tuple[Array, Array], counter: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two random words for each pair of counters (of one shape), elementwise; all uint32. Keys broadcast.

    The rounds are a loop, so that the words are computed once and written: XLA would fuse them into whatever reads
    them, and compute each word once for each number in it. One round at a time: of several, XLA makes a kernel for
    each word that computes all of both.
    """
    axes = frozenset[str]().union(*map(_compat.varying, (*key, *counter)))
    key = (_compat.vary(key[0], axes), _compat.vary(key[1], axes))
    keys = (*key, key[0] ^ key[1] ^ _PARITY)
    turns = tuple(jnp.asarray(each) for each in _TURNS)
    start = (_compat.vary(counter[0], axes) + keys[0], _compat.vary(counter[1], axes) + keys[1])

    def rounds(i: Any, carry: tuple) -> tuple:
        (a, b), (first, second, third), (now, then) = carry
        for n in range(4):
            a = a + b
            turned = lax.shift_left(b, jnp.broadcast_to(now[n], b.shape)) | lax.shift_right_logical(
                b, jnp.broadcast_to(np.uint32(32) - now[n], b.shape)
            )
            b = a ^ turned
        words = (a + second, b + third + i.astype(jnp.uint32))
        return words, (second, third, first), (then, now)

    return lax.fori_loop(1, 6, rounds, (start, keys, turns))[0]


@functools.partial(jax.jit, static_argnums=1)
def uniform(key: Array, shape: tuple[int, ...], row: Array | int = 0, column: Array | int = 0) -> Array:
    """float32 numbers (n + 1/2) / 2^16, n of 16 random bits, for values [..., r, c]; leading axes count as rows.

    Centred, they have the mean of a uniform number exactly. `column` is a multiple of 4. (Hardware takes 8 bits, whose
    coarseness can be seen in the mean of some thousand draws.)

    Args:
        key: uint32 [*keys, 2]; each key draws its own numbers, [*keys, *shape].
    """
    *lead, r, c = shape
    words = -(-c // 4)
    rows = jnp.asarray(row, jnp.uint32) + lax.broadcasted_iota(jnp.uint32, (int(np.prod(lead)) * r, words), 0)
    columns = jnp.asarray(column, jnp.uint32) // jnp.uint32(4) + lax.broadcasted_iota(jnp.uint32, rows.shape, 1)
    pair = jnp.stack(threefry((key[..., 0, None, None], key[..., 1, None, None]), (rows, columns)), axis=-1)
    half = lax.bitcast_convert_type(pair, jnp.uint16).reshape(*key.shape[:-1], *lead, r, words * 4)[..., :c]
    return (half.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-16)
