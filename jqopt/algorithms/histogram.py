"""Histogram of |x|, exact in every count: the statistic behind calibrators that clip (percentile, entropy, mse).

The range is always a power of two, the smallest above the largest value seen. So each edge is exact in float32, bins of
two histograms nest, a wider range merges pairs of bins, and histograms form a commutative monoid under `merge`: the
result of any split of the data into batches or devices is the same to the last count. The largest value lies in the
upper half, so a bin is 1/1024 to 1/2048 of it.

Counts are two int32: high * 2^20 + low with 0 <= low < 2^20. float32 would stop counting at 2^24 values a bin, int32 at
2^31; these hold 2^51 values in all, and their sum over devices stays exact for up to 1024 of them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jqopt._numerics import from_bits, to_bits
from jqopt.errors import UnsupportedError

BINS = 2048
LOG_BINS = 11
LIMB = 20  # bits of the low part of a count
LOWEST, HIGHEST = -100, 128  # exponents of the range: every bin's width and its inverse are normal numbers
LANES = 16  # neighbours count into different arrays: on GPUs a bin that most values fall into isn't one hot address
_MAGNITUDE, _LARGEST = np.uint32(0x7FFFFFFF), np.uint32(0x7F7FFFFF)


class Counts(NamedTuple):
    """Whole numbers high * 2^20 + low, int32 [...] each, 0 <= low < 2^20."""

    high: jax.Array
    low: jax.Array


class Histogram(NamedTuple):
    """How many |x| lie in [j, j + 1) * 2^(exponent - 11), j < 2048; the largest |x|; 1 once any was seen.

    `high`, `low` [2048] int32 (see `Counts`), `exponent` [] int32, `amax` and `seen` [] float32. What isn't finite is
    counted in the last bin of the widest range and stays in `amax`, so that it is reported.
    """

    high: jax.Array
    low: jax.Array
    exponent: jax.Array
    amax: jax.Array
    seen: jax.Array


def init(k: int = 0) -> Histogram:
    """Nothing seen yet; the same for every number of channels."""
    none = jnp.zeros(BINS, jnp.int32)
    return Histogram(none, none, jnp.int32(LOWEST), jnp.float32(0), jnp.float32(0))


def of(x: jax.Array) -> Histogram:
    """The histogram of x of any shape.

    Raises:
        UnsupportedError: x has 2^32 values or more.
    """
    bits = lax.bitwise_and(to_bits(x), _MAGNITUDE).reshape(-1)
    largest = lax.reduce_max(bits, (0,))  # of the bits: NaN ranks highest, and a float maximum might drop it
    exponent = lax.shift_right_logical(lax.min(largest, _LARGEST), np.uint32(23)).astype(jnp.int32) - jnp.int32(126)
    exponent = jnp.maximum(exponent, jnp.int32(LOWEST))
    bins = lax.mul(from_bits(lax.min(bits, _LARGEST)), _power(LOG_BINS - exponent)).astype(jnp.int32)
    high, low = count(bins, BINS)
    return Histogram(high, low, exponent, from_bits(largest), jnp.float32(x.size > 0))


def update(state: Histogram, x: jax.Array) -> Histogram:
    """x [tokens, k]. What depends on x alone is `of(x)`, so XLA counts an activation that several sites read once."""
    return merge(state, of(x))


def merge(a: Histogram, b: Histogram) -> Histogram:
    """The histogram of what both have seen; associative, commutative, exact."""
    exponent = jnp.maximum(a.exponent, b.exponent)
    total = jax.tree.map(jnp.add, widen(a, exponent), widen(b, exponent))
    return Histogram(*carried(total), exponent, jnp.maximum(a.amax, b.amax), jnp.maximum(a.seen, b.seen))


def allreduce(before: Histogram, after: Histogram, axes: tuple[str, ...]) -> Histogram:
    """What each device has added is brought to the widest range of all, and summed."""
    exponent = lax.pmax(after.exponent, axes)
    high, low = summed(widen(before, exponent), widen(after, exponent), axes)
    return Histogram(high, low, exponent, lax.pmax(after.amax, axes), lax.pmax(after.seen, axes))


def widen(state: Histogram, exponent: jax.Array) -> Counts:
    """The counts under a range of 2^exponent, not below the state's own: 2^d bins become one."""
    into = lax.shift_right_logical(lax.iota(jnp.int32, BINS), jnp.minimum(exponent - state.exponent, jnp.int32(31)))

    def merged(counts: jax.Array) -> jax.Array:
        return jnp.zeros_like(counts).at[into].add(counts, indices_are_sorted=True, mode="promise_in_bounds")

    return carried(Counts(merged(state.high), merged(state.low)))


def width(state: Histogram) -> jax.Array:
    """The width of a bin, [] float32: a power of two, so that multiples of it are exact."""
    return _power(state.exponent - LOG_BINS)


def counts_of(state: Histogram) -> Counts:
    """The counts alone, [2048]."""
    return Counts(state.high, state.low)


# Counting -----------------------------------------------------------------------------------------------------------


def count(bins: jax.Array, size: int) -> Counts:
    """How often each of 0 .. size - 1 stands in bins [values], exactly.

    Raises:
        UnsupportedError: there are 2^32 values or more, which one update cannot count.
    """
    if bins.size >= 2**32:
        raise UnsupportedError(
            f"an activation of {bins.size} values is too large to be counted at once; calibrate with smaller batches "
            f"(below {2**32} values at a site)"
        )
    lane = lax.bitwise_and(lax.iota(jnp.int32, bins.size), jnp.int32(LANES - 1))
    found = jnp.zeros(size * LANES, jnp.uint32).at[bins * LANES + lane].add(jnp.uint32(1), mode="promise_in_bounds")
    found = jnp.sum(found.reshape(size, LANES), 1, dtype=jnp.uint32)
    parts = (found >> LIMB, found & jnp.uint32(2**LIMB - 1))
    return Counts(*(part.astype(jnp.int32) for part in parts))


def carried(counts: Counts) -> Counts:
    """The same numbers with 0 <= low < 2^20, where low was any int32."""
    return Counts(counts.high + (counts.low >> LIMB), counts.low & jnp.int32(2**LIMB - 1))


def summed(before: Counts, after: Counts, axes: tuple[str, ...]) -> Counts:
    """before, and what every device along the mesh axes has added to it."""
    added = jax.tree.map(lambda b, a: b + lax.psum(a - b, axes), before, after)
    return carried(Counts(*added))


def as_float(counts: Counts) -> jax.Array:
    """float32, correct to the last bit or two; exact below 2^24."""
    return counts.high.astype(jnp.float32) * jnp.float32(2**LIMB) + counts.low.astype(jnp.float32)


def cumulative(counts: Counts) -> Counts:
    """Counts [bins] -> [bins + 1]: how many lie in the bins below each, exactly; the last is the total. Bins < 4096."""
    high, low = (jnp.pad(jnp.cumsum(c.astype(jnp.uint32)), (1, 0)) for c in counts)
    return Counts(
        (high + (low >> LIMB)).astype(jnp.int32), (low & jnp.uint32(2**LIMB - 1)).astype(jnp.int32)
    )  # unsigned: 4095 lows of almost 2^20 stay below 2^32


def minus(a: Counts, b: Counts) -> jax.Array:
    """a - b as float32; whole numbers below 2^24 are exact however large a and b are."""
    return as_float(Counts(a.high - b.high, a.low - b.low))


def _power(exponent: jax.Array) -> jax.Array:
    """2^exponent from its bits, for normal numbers."""
    return from_bits(lax.shift_left((exponent + jnp.int32(127)).astype(jnp.uint32), jnp.uint32(23)))
