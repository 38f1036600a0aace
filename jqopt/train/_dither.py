"""Random bytes for stochastic rounding that depend on a key and a global position only, not on devices or shapes.

Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the counter is the
value's row and its column over 8, the two words of the result are the bytes of 8 neighbours. A device that holds a part
of a tensor counts from the part's first row and column.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def threefry(key: tuple[Array, Array], counter: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two random words for each pair of counters, elementwise; all uint32."""
    keys = (*key, key[0] ^ key[1] ^ _PARITY)
    a, b = counter[0] + keys[0], counter[1] + keys[1]
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            a = a + b
            b = a ^ (lax.shift_left(b, jnp.uint32(r)) | lax.shift_right_logical(b, jnp.uint32(32 - r)))
        a, b = a + keys[(i + 1) % 3], b + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return a, b


def folded(key: Array, number: Array | int) -> Array:
    """A new key, uint32 [2], from a key and a number; as `jax.random.fold_in` of a threefry key."""
    a, b = threefry((key[0], key[1]), (jnp.zeros((), jnp.uint32), jnp.asarray(number, jnp.uint32)))
    return jnp.stack([a, b])


def uniform(key: Array, shape: tuple[int, ...], row: Array | int = 0, column: Array | int = 0) -> Array:
    """float32 numbers (byte + 1/2) / 256 for values [..., r, c]; leading axes count as rows.

    Centred, a byte has the mean of a uniform number exactly; `column` is a multiple of 8.
    """
    *lead, r, c = shape
    words = -(-c // 8)
    rows = jnp.asarray(row, jnp.uint32) + lax.broadcasted_iota(jnp.uint32, (int(np.prod(lead)) * r, words), 0)
    columns = jnp.asarray(column, jnp.uint32) // jnp.uint32(8) + lax.broadcasted_iota(jnp.uint32, rows.shape, 1)
    pair = jnp.stack(threefry((key[0], key[1]), (rows, columns)), axis=-1)
    byte = lax.bitcast_convert_type(pair, jnp.uint8).reshape(*lead, r, words * 8)[..., :c]
    return (byte.astype(jnp.float32) + 0.5) * jnp.float32(1 / 256)
