"""Statistics of activations: what one pass over the data gathers for every algorithm that asks for it."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jqopt._numerics import amax_of
from jqopt.algorithms._base import Statistic, Task

SAMPLE = 2048  # tokens kept to try out quantized inputs on
PART, SHARE = (
    128,
    128,
)  # tried on is one token of SHARE, in whole parts of the sample: a search costs a share of running
# the model, however little data there is


# ---------------------------------------------------------------------------------------------------- amax


class Amax(NamedTuple):
    """Running maximum of |x|, and 1 once any value was seen; both [] float32."""

    amax: Array
    seen: Array


def _amax(state: Amax, x: Array) -> Amax:
    """NaN and inf survive in the state, so that they are reported rather than lost."""
    return Amax(jnp.maximum(state.amax, amax_of(x)), jnp.maximum(state.seen, jnp.float32(x.size > 0)))


def _amax_init(k: int) -> Amax:
    return Amax(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


def _maximum(before: tuple, after: tuple, axes: tuple[str, ...]) -> tuple:
    return type(after)(*(lax.pmax(x, axes) for x in after))


AMAX = Statistic("amax", _amax_init, _amax, _maximum)


# ------------------------------------------------------------------------------------------------ channels


class Channels(NamedTuple):
    """Largest |x| of each channel [k], sum of |x| [k], and the number of tokens []; float32."""

    amax: Array
    total: Array
    count: Array


def _channels_init(k: int) -> Channels:
    zeros = jnp.zeros((k,), jnp.float32)
    return Channels(zeros, zeros, jnp.zeros((), jnp.float32))


def _channels(state: Channels, x: Array) -> Channels:
    x = x.astype(jnp.float32)
    return Channels(
        jnp.maximum(state.amax, amax_of(x, (0,))),
        state.total + jnp.sum(jnp.abs(x), axis=0),
        state.count + jnp.float32(x.shape[0]),
    )


def _channels_reduce(before: Channels, after: Channels, axes: tuple[str, ...]) -> Channels:
    added = lambda b, a: b + lax.psum(a - b, axes)  # noqa: E731
    return Channels(lax.pmax(after.amax, axes), added(before.total, after.total), added(before.count, after.count))


CHANNELS = Statistic("channels", _channels_init, _channels, _channels_reduce)


# ------------------------------------------------------------------------------------------------- moments


class Moments(NamedTuple):
    """sum x x^T [k, k] over the tokens seen, and how many; float32."""

    count: Array
    sum: Array


def _moments_init(k: int) -> Moments:
    return Moments(jnp.zeros((), jnp.float32), jnp.zeros((k, k), jnp.float32))


def _moments(state: Moments, x: Array) -> Moments:
    x = x.astype(jnp.float32)
    more = lax.dot_general(x, x, (((0,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
    return Moments(state.count + jnp.float32(x.shape[0]), state.sum + more)


def _moments_reduce(before: Moments, after: Moments, axes: tuple[str, ...]) -> Moments:
    return Moments(*(b + lax.psum(a - b, axes) for b, a in zip(before, after, strict=True)))


MOMENTS = Statistic("moments", _moments_init, _moments, _moments_reduce)


# ---------------------------------------------------------------------------------------------------- rows


class Rows(NamedTuple):
    """A sample of tokens [SAMPLE, k], the rank [SAMPLE] of each (uint32; from EMPTY on: an empty place), and the number
    of tokens seen [] uint32.

    A token's rank is a hash of its number, so that any split of the data keeps the same ones.
    """

    x: Array
    rank: Array
    count: Array


EMPTY = np.uint32(2**32 - SAMPLE)


def _rows_init(k: int) -> Rows:
    rank = EMPTY + jnp.arange(SAMPLE, dtype=jnp.uint32)
    return Rows(jnp.zeros((SAMPLE, k), jnp.float32), rank, jnp.zeros((), jnp.uint32))


def _hash(x: Array) -> Array:
    """A permutation of uint32 that looks random (the finalizer of MurmurHash3)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> 16)


def _rows(state: Rows, x: Array) -> Rows:
    """Tokens whose rank is low enough take the places of those that fall out; the rest stays where it is."""
    number = state.count + jnp.arange(x.shape[0], dtype=jnp.uint32)
    rank = jnp.concatenate([state.rank, jnp.minimum(_hash(number), EMPTY - 1)])
    kept = rank <= _smallest(rank, SAMPLE)
    places = jnp.nonzero(~kept[:SAMPLE], size=x.shape[0], fill_value=SAMPLE)[0]  # nowhere, if there are more ranks
    which = jnp.nonzero(kept[SAMPLE:], size=x.shape[0], fill_value=0)[0]
    picked = state.x.at[places].set(x.astype(jnp.float32)[which], mode="drop")
    ranks = state.rank.at[places].set(rank[SAMPLE:][which], mode="drop")
    return Rows(picked, ranks, state.count + jnp.uint32(x.shape[0]))


def _smallest(x: Array, n: int) -> Array:
    """The n-th smallest [] of x [m] uint32, from its highest bit to its lowest: a tenth of what sorting takes."""

    def bit(i: Array, found: Array) -> Array:
        more = found | lax.shift_left(jnp.uint32(1), jnp.uint32(31) - i.astype(jnp.uint32))
        return jnp.where(jnp.sum((x < more).astype(jnp.int32)) < n, more, found)

    return lax.fori_loop(0, 32, bit, jnp.uint32(0))


def _rows_reduce(before: Rows, after: Rows, axes: tuple[str, ...]) -> Rows:
    """The lowest ranks of all devices. Tokens of one number on several devices have one rank: a sample all the same."""
    x, rank = (lax.all_gather(v, axes, tiled=True) for v in (after.x, after.rank))
    kept = jnp.argsort(rank)[:SAMPLE]
    count = before.count + lax.psum(after.count - before.count, axes)
    return Rows(x[kept], rank[kept], count)


ROWS = Statistic("rows", _rows_init, _rows, _rows_reduce)


# ------------------------------------------------------------------------- statistics as a task's steps see them


def moments(task: Task) -> Array:
    """H = sum x x^T [k, k] of the scaled input, divided by the mean of its diagonal."""
    h = task.stats["moments"].sum
    if task.pre_scale is not None:
        h = h * task.pre_scale[:, None] * task.pre_scale[None, :]
    return h / jnp.maximum(jnp.mean(jnp.diagonal(h)), jnp.float32(2.0**-100))


def channel_amax(task: Task) -> Array:
    """Largest |x| of each channel [k] of the scaled input."""
    amax = task.stats["channels"].amax
    return amax if task.pre_scale is None else amax * task.pre_scale


def channel_mean(task: Task) -> Array:
    """Mean |x| of each channel [k] of the scaled input."""
    channels = task.stats["channels"]
    mean = channels.total / jnp.maximum(channels.count, jnp.float32(1))
    return mean if task.pre_scale is None else mean * task.pre_scale


def sample(task: Task) -> tuple[Array, Array, Array]:
    """(tokens [SAMPLE, k] of the scaled input, 1 or 0 [SAMPLE, 1]: is it a token or an empty place, and how many parts
    of PART tokens, from the first, to try things out on [] int32)"""
    rows = task.stats["rows"]
    order = jnp.argsort(rows.rank)
    x = rows.x[order]
    x = x if task.pre_scale is None else x * task.pre_scale
    parts = jnp.clip(lax.div(rows.count, np.uint32(SHARE * PART)).astype(jnp.int32), 1, SAMPLE // PART)
    return x, (rows.rank[order] < EMPTY)[:, None].astype(jnp.float32), parts
