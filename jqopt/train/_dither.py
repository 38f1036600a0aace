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

_ROTATIONS = np.asarray([[13, 15, 26, 6], [17, 29, 16, 24]], np.uint32)
_PARITY = np.uint32(0x1BD11BDA)


def threefry(key: tuple[Array, Array], counter: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two random words for each pair of counters, elementwise; all uint32.

    The rounds are a loop, so that the words are computed once and written: XLA would fuse them into whatever reads
    them, and compute each word once for each number in it.
    """
    same = counter[0] ^ counter[0] ^ counter[1] ^ counter[1] ^ key[0] ^ key[0]  # zeros that vary as all operands do
    keys = jnp.stack([key[0], key[1], key[0] ^ key[1] ^ _PARITY])
    start = (counter[0] + keys[0] + same, counter[1] + keys[1] + same)

    def rounds(i: Any, words: tuple[Array, Array]) -> tuple[Array, Array]:
        a, b = words
        turns = jnp.asarray(_ROTATIONS)[i % 2]
        for n in range(4):
            a = a + b
            b = a ^ (lax.shift_left(b, jnp.broadcast_to(turns[n], b.shape))
                     | lax.shift_right_logical(b, jnp.broadcast_to(np.uint32(32) - turns[n], b.shape)))  # fmt: skip
        return a + keys[(i + 1) % 3], b + keys[(i + 2) % 3] + (i + 1).astype(jnp.uint32)

    return lax.fori_loop(0, 5, rounds, start)


@jax.jit
def folded(key: Array, number: Array | np.uint32 | int) -> Array:
    """A new key, uint32 [2], from a key and a number; as `jax.random.fold_in` of a threefry key."""
    a, b = threefry((key[0], key[1]), (jnp.zeros((), jnp.uint32), jnp.asarray(number, jnp.uint32)))
    return jnp.stack([a, b])


@functools.partial(jax.jit, static_argnums=1)
def uniform(key: Array, shape: tuple[int, ...], row: Array | int = 0, column: Array | int = 0) -> Array:
    """float32 numbers (n + 1/2) / 2^16, n of 16 random bits, for values [..., r, c]; leading axes count as rows.

    Centred, they have the mean of a uniform number exactly. `column` is a multiple of 4. (Hardware takes 8 bits, whose
    coarseness can be seen in the mean of some thousand draws.)
    """
    *lead, r, c = shape
    words = -(-c // 4)
    rows = jnp.asarray(row, jnp.uint32) + lax.broadcasted_iota(jnp.uint32, (int(np.prod(lead)) * r, words), 0)
    columns = jnp.asarray(column, jnp.uint32) // jnp.uint32(4) + lax.broadcasted_iota(jnp.uint32, rows.shape, 1)
    pair = jnp.stack(threefry((key[0], key[1]), (rows, columns)), axis=-1)
    half = lax.bitcast_convert_type(pair, jnp.uint16).reshape(*lead, r, words * 4)[..., :c]
    return (half.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-16)
