"""Where to clip: the amax [] of a tensor from the histogram of its values, by percentile, entropy or squared error.

Every function maps one `Histogram` to one number, under jit and vmap. A histogram that holds NaN or inf gives it back,
one of zeros gives 0, and no rule gives more than the largest value seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jqopt import _numerics
from jqopt.algorithms import histogram
from jqopt.algorithms.histogram import Counts, Histogram
from jqopt.formats import Format

START = 128  # the fewest bins that entropy keeps
SLACK = 1e-6  # of the smaller share, for the rounding of a percentile in float32
OCTAVES, STEPS = 8, 64  # mse tries the amax times 2^(-i / 64), down to 1/256
FRACTIONS = np.exp2(-np.arange(OCTAVES * STEPS + 1) / STEPS).astype(np.float32)


def percentile(state: Histogram, p: float) -> jax.Array:
    """The right edge of the bin where p per cent (0 < p <= 100) of the |x|, zeros included, are reached; at most amax.

    So no more than asked is clipped; 100 gives the amax. Monotone in p.
    """
    found = percentile_bin(histogram.counts_of(state), p)
    return _known(state, (found + 1).astype(jnp.float32) * histogram.width(state))


def percentile_bin(counts: Counts, p: float) -> jax.Array:
    """The first bin with which the cumulative count of counts [bins] reaches p per cent of all, [] int32.

    Compared is the smaller share: what may lie above it if p >= 50, else what must lie at or below it. A tail of few
    values is thus exact, while the bulk may have more than float32 can tell apart.
    """
    below = histogram.cumulative(counts)
    total = jax.tree.map(lambda c: c[-1:], below)
    up_to = jax.tree.map(lambda c: c[1:], below)
    if p >= 50:
        reached = histogram.minus(total, up_to) <= histogram.as_float(total) * np.float32((100 - p) / 100 * (1 + SLACK))
    else:
        reached = histogram.as_float(up_to) >= histogram.as_float(total) * np.float32(p / 100 * (1 - SLACK))
    return jnp.argmax(reached).astype(jnp.int32)  # the first of them


def entropy(state: Histogram, bits: int = 8, unsigned: bool = False) -> jax.Array:
    """The clip that loses least information when 2^(bits - 1) evenly spaced levels (unsigned: 2^bits) stand for |x|.

    For each number of bins kept, from 128 to those that hold data: the Kullback-Leibler divergence of the histogram,
    its tail moved into the last bin kept, from itself averaged over each level's bins that aren't empty. The last of
    equally good ones wins. The first bin counts as the second one does, since zeros cost nothing.

    Source: S. Migacz, 8-bit Inference with TensorRT (GTC 2017), as ModelOpt's calibrator computes it.
    """
    counts = histogram.counts_of(state)
    occupied = (counts.high > 0) | (counts.low > 0)
    held = histogram.BINS - jnp.argmax(occupied[::-1]).astype(jnp.int32)
    best = entropy_bins(counts, 2 ** (bits - (0 if unsigned else 1)), held)
    return _known(state, best.astype(jnp.float32) * histogram.width(state))


def entropy_bins(counts: Counts, levels: int, held: jax.Array | int) -> jax.Array:
    """How many of the first `held` bins of counts [bins] to keep, [] int32: at least 128, unless held is less."""
    found = divergences(counts, levels)
    kept = START + jnp.arange(found.size, dtype=jnp.int32)
    found = jnp.where(kept <= held, found, jnp.float32(jnp.inf))
    best = kept[-1] - jnp.argmin(found[::-1]).astype(jnp.int32)
    return jnp.minimum(jnp.where(jnp.any(kept <= held), best, START), jnp.asarray(held, jnp.int32))


def divergences(counts: Counts, levels: int) -> jax.Array:
    """The divergence, in nats, when the first 128, 129, ... bins of counts [bins] are kept: float32 [bins - 127].

    inf where the last bin kept is empty and values beyond it are moved there: no level stands for them.
    """
    counts = Counts(*(c.at[0].set(c[1]) for c in counts))
    c = histogram.as_float(counts)
    size = c.size
    below = histogram.cumulative(counts)
    filled = jnp.pad(jnp.cumsum((c > 0).astype(jnp.int32)), (1, 0))
    total = jax.tree.map(lambda x: x[-1], below)
    every = jnp.maximum(histogram.as_float(total), jnp.float32(1))
    kept = START + jnp.arange(max(size - START + 1, 0), dtype=jnp.int32)
    # [kept, levels + 1]: a level begins at the first bin b with b * levels / kept >= it
    first = lax.div(jnp.arange(levels + 1, dtype=jnp.int32) * kept[:, None] + (levels - 1), jnp.int32(levels))
    starts = jax.tree.map(lambda x: x[first], below)
    of_level = histogram.minus(*(jax.tree.map(lambda x, part=part: x[:, part], starts) for part in (_UPPER, _LOWER)))
    mean = of_level / jnp.maximum(jnp.diff(filled[first]), 1).astype(jnp.float32)

    def add(i: jax.Array, inside: jax.Array) -> jax.Array:
        """The i-th bin of every level: looking up 16 counts is ten times as fast as one mean for each of 2048 bins."""
        bin = first[:, :-1] + i
        p = c.at[bin].get(mode="clip")
        there = (bin < first[:, 1:]) & (p > 0)
        return inside + jnp.where(there, _relative_entropy(p, mean), jnp.float32(0))

    inside = jnp.sum(lax.fori_loop(0, -(-size // levels), add, jnp.zeros_like(mean)), axis=1)
    tail = histogram.minus(total, jax.tree.map(lambda x: x[kept], below))
    last, of_last = c[kept - 1], jnp.take_along_axis(mean, ((kept - 1) * levels // kept)[:, None], axis=1)[:, 0]
    moved = jnp.where(
        last > 0, (last + tail) * _log(last + tail, of_last) - last * _log(last, of_last), jnp.float32(jnp.inf)
    )
    inside = inside + jnp.where(tail > 0, moved, jnp.float32(0))
    return inside / every + jnp.log1p(-tail / every)


_UPPER, _LOWER = slice(1, None), slice(None, -1)


def _log(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.log(jnp.where(x > 0, x / jnp.where(y > 0, y, jnp.float32(1)), jnp.float32(1)))


def _relative_entropy(p: jax.Array, q: jax.Array) -> jax.Array:
    """p log(p / q) - p + q, not negative, for positive p and q.

    The two terms that sum to nothing are kept, and near p = q it is a series: a sum of terms of both signs would leave
    the differences between neighbouring candidates to the rounding of float32.
    """
    d = (p - q) / jnp.where(q > 0, q, jnp.float32(1))
    small = d * d * (0.5 - d * (1 / 6 - d * (1 / 12 - d * (1 / 20 - d * (1 / 30)))))
    return q * jnp.where(jnp.abs(d) < 0.03, small, (1 + d) * jnp.log1p(jnp.maximum(d, jnp.float32(-0.999999))) - d)


def mse(state: Histogram, round: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """The clip whose squared error, over the centers of the bins, is the smallest.

    `round(x [n], amax []) -> [n]` quantizes and dequantizes. Candidates are the amax times 2^(-i / 64), down to 1/256;
    the amax itself is first, so no result is worse than that of `max`, and a tie keeps the wider range.
    """
    w = histogram.width(state)
    centers = (jnp.arange(histogram.BINS, dtype=jnp.float32) + 0.5) * w
    c = histogram.as_float(histogram.counts_of(state))
    share = c / jnp.maximum(jnp.sum(c), jnp.float32(1))

    def error(fraction: jax.Array) -> jax.Array:
        return jnp.sum(share * jnp.square((round(centers, state.amax * fraction) - centers) / w / histogram.BINS))

    fractions = jnp.asarray(FRACTIONS)
    return _known(state, state.amax * fractions[jnp.argmin(lax.map(error, fractions))])


def rounder(format: Format) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """What `mse` rounds by: the format with one scale for the tensor.

    Raises:
        UnsupportedError: when called, for formats with scales of blocks only.
    """
    return functools.partial(_rounded, format=format)


def _rounded(x: jax.Array, amax: jax.Array, *, format: Format) -> jax.Array:
    return _numerics.qdq_matrix(x[None], format, granularity="tensor", tensor_amax=amax)[0]


def _known(state: Histogram, found: jax.Array) -> jax.Array:
    """At most the amax; the amax itself where it is 0 or not finite."""
    plain = jnp.logical_not(jnp.isfinite(state.amax)) | (state.amax == 0)
    return jnp.where(plain, state.amax, jnp.minimum(found, state.amax))
