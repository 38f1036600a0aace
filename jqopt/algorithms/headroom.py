"""Headroom for NVFP4 activations: a tensor scale that leaves room above the blocks seen, from their largest values."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jqopt._numerics import amax_of, from_bits, to_bits
from jqopt.algorithms import histogram, ranges
from jqopt.algorithms.histogram import Counts

BLOCK = 16
BINS, LOG2_MIN, LOG2_MAX = 512, -40.0, 40.0
PER_OCTAVE = BINS / (LOG2_MAX - LOG2_MIN)
FLOOR = 99.99  # per cent of the blocks that the scale must hold, whatever rho
IGNORED = 1e6  # blocks this much smaller than the floor don't set the anchor
RHO, RHO_MAX = 16384.0, 448 / 2**-6  # the ratio of the largest e4m3 to the smallest normal one


class BlockAmax(NamedTuple):
    """Counts of the largest |x| of blocks of 16 along k, by its logarithm; the largest of all; 1 once any was seen.

    `high`, `low` [512] int32 (see `histogram.Counts`): bin j holds 2^(-40 + j / 6.4) up to that of j + 1; smaller and
    larger ones are in the first and last. Blocks of zeros are not counted. `amax`, `seen` [] float32.
    """

    high: jax.Array
    low: jax.Array
    amax: jax.Array
    seen: jax.Array


def init(k: int = 0) -> BlockAmax:
    """Nothing seen yet."""
    none = jnp.zeros(BINS, jnp.int32)
    return BlockAmax(none, none, jnp.float32(0), jnp.float32(0))


def update(state: BlockAmax, x: jax.Array) -> BlockAmax:
    """x [tokens, k]; a short last block is padded with zeros. Any split along the tokens gives the same state."""
    short = -x.shape[-1] % BLOCK
    x = jnp.pad(x, ((0, 0), (0, short))) if short else x
    blocks = amax_of(x.reshape(-1, BLOCK), (-1,))
    # one bin more, for the blocks of zeros
    found = histogram.count(jnp.where(blocks > 0, bin_of(blocks), jnp.int32(BINS)), BINS + 1)
    added = histogram.carried(Counts(state.high + found.high[:-1], state.low + found.low[:-1]))
    return BlockAmax(*added, jnp.maximum(state.amax, amax_of(blocks)), jnp.maximum(state.seen, jnp.float32(x.size > 0)))


def allreduce(before: BlockAmax, after: BlockAmax, axes: tuple[str, ...]) -> BlockAmax:
    """Maxima over the devices; what each has added is summed."""
    high, low = histogram.summed(Counts(before.high, before.low), Counts(after.high, after.low), axes)
    return BlockAmax(high, low, lax.pmax(after.amax, axes), lax.pmax(after.seen, axes))


def amax(state: BlockAmax, rho: float = RHO, anchor: float = 1.0) -> jax.Array:
    """max(rho * P_anchor, P_99.99) of the blocks' largest values, [] float32.

    The anchor is the center of its bin, without the blocks that are 10^6 times smaller than the floor; the floor is the
    right edge of its bin, at most the largest value, so that no more than 0.01 % of the blocks saturate.

    Source: ModelOpt's `nvfp4_act_headroom`, which takes the center of the bin for the floor too.
    """
    counts = Counts(state.high, state.low)
    top = ranges.percentile_bin(counts, FLOOR)
    floor = jnp.minimum(value_at(top.astype(jnp.float32) + 1), state.amax)
    least = bin_of(value_at(top.astype(jnp.float32) + 0.5) / jnp.float32(IGNORED))
    kept = lax.iota(jnp.int32, BINS) >= least
    counts = Counts(*(jnp.where(kept, c, 0) for c in counts))
    low = value_at(ranges.percentile_bin(counts, anchor).astype(jnp.float32) + 0.5)
    found = jnp.maximum(jnp.float32(rho) * low, floor)
    return jnp.where((state.amax > 0) & jnp.isfinite(state.amax), found, state.amax)


def bin_of(x: jax.Array) -> jax.Array:
    """The bin of a positive x. Powers of two have exact logarithms here: the exponent apart, log2 of the mantissa."""
    bits = to_bits(x)
    exponent = lax.shift_right_logical(bits, np.uint32(23)).astype(jnp.int32) - jnp.int32(127)
    mantissa = from_bits(lax.bitwise_or(lax.bitwise_and(bits, np.uint32(0x7FFFFF)), np.uint32(0x3F800000)))
    place = (exponent.astype(jnp.float32) - LOG2_MIN + jnp.log2(mantissa)) * PER_OCTAVE
    return jnp.clip(jnp.floor(place), 0, BINS - 1).astype(jnp.int32)


def value_at(place: jax.Array) -> jax.Array:
    """What lies this many bins above the lowest edge."""
    return jnp.exp2(place / jnp.float32(PER_OCTAVE) + jnp.float32(LOG2_MIN))
