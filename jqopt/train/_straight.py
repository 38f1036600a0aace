"""Straight-through quantizers: values as `_numerics` gives them, with the gradients that training wants."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jqopt import _numerics, _ops
from jqopt._ops import InputFormat
from jqopt.formats import E4M3, Format


class Quantizer(NamedTuple):
    """Static facts of a weight's quantizer."""

    format: Format
    granularity: str


@jax.custom_vjp
def straight_through(x: jax.Array, values: jax.Array, keep: jax.Array | None = None) -> jax.Array:
    """`values` (float32, of x's shape) with the gradient of x; zero where `keep`, if given, is false."""
    return values


def _straight_fwd(x, values, keep):
    return values, (jnp.zeros((0,), x.dtype), keep)


def _straight_bwd(kept, g):
    like, keep = kept
    return (g if keep is None else jnp.where(keep, g, jnp.zeros_like(g))).astype(like.dtype), None, None


straight_through.defvjp(_straight_fwd, _straight_bwd)


# Learned scales of weights -------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def learned(
    w: jax.Array, pre: jax.Array, post: jax.Array | None, tensor_amax: jax.Array | None, how: Quantizer
) -> jax.Array:
    """Weights [..., n, k], divided by the scale of amax `pre`, rounded, and multiplied by that of amax `post`.

    `pre` and `post` are [..., rows, cols], one amax a tile; `post` None is `pre` again: LSQ. Two are dual LSQ. With
    s = amax / Q (Q the largest element) as the format stores it, c = round(clip(w / s_pre)) and y = c s_post, the
    gradients are those of LSQ (Esser et al. 2020, equations 3 and 5), each of its two uses of s on its own; at or
    beyond the ends of the range c is constant:

        dy/dw = s_post / s_pre inside, 0 outside
        dy/ds_pre = -(w / s_pre) s_post / s_pre inside, 0 outside;  dy/ds_post = c

    So for one s: dy/dw = 1 inside, dy/ds = round(w/s) - w/s inside and c outside. The rounding of s to e4m3 or a power
    of two is passed straight through. The gradient of an amax is g Q dL/ds with g = 1 / sqrt(N Q), N the values of a
    tile: a step of gradient descent on amax = Q s is then LSQ's step on s, with its factor g.
    """
    return stored(w, pre, post, tensor_amax, how)[1]


def stored(
    w: jax.Array, pre: jax.Array, post: jax.Array | None, tensor_amax: jax.Array | None, how: Quantizer
) -> tuple[_numerics.Codes, jax.Array]:
    """(codes made with `pre` beside the scales of `post`, the float32 values they stand for)."""

    def made(amax: jax.Array) -> _numerics.Codes:
        return _numerics.quantize_matrix(
            w, how.format, granularity=how.granularity, tensor_amax=tensor_amax, tile_amax=amax
        )

    codes = made(pre)
    codes = codes if post is None else codes._replace(scale=made(post).scale)
    return codes, _numerics.dequantize_matrix(*codes, how.format, w.shape[-1])


def tile_scales(codes: _numerics.Codes, format: Format) -> jax.Array:
    """What the codes of each tile are multiplied by, float32 [..., rows, cols]; 1 where that is zero."""
    scale = _numerics.decode_scale(codes.scale, format)
    if codes.global_scale is not None:
        scale = scale * codes.global_scale[..., None, None]
    return jnp.where(scale == 0, jnp.ones_like(scale), scale)


def _learned_fwd(w, pre, post, tensor_amax, how):
    return learned(w, pre, post, tensor_amax, how), (w, pre, post, tensor_amax)


def _learned_bwd(how, kept, g):
    w, pre, post, tensor_amax = kept
    n, k = w.shape[-2:]
    element, tile = how.format.element, how.format.tile_for(n, k, how.granularity)

    def scale(amax: jax.Array) -> jax.Array:
        codes, _ = stored(w, amax, None, tensor_amax, how)
        return _numerics.spread(tile_scales(codes, how.format))

    s_pre = scale(pre)
    s_post = s_pre if post is None else scale(post)
    g = _numerics.to_tiles(g.astype(jnp.float32), tile)
    scaled = _numerics.divide(_numerics.to_tiles(w.astype(jnp.float32), tile), s_pre)
    level = _numerics.round_to(scaled, element)
    inside = (scaled > element.min) & (scaled < element.max)
    slope = jnp.where(inside, s_post / s_pre, jnp.zeros_like(scaled))
    step = math.sqrt(element.max / (min(tile[0], n) * min(tile[1], k)))  # Q g
    d_pre = step * jnp.sum(-g * scaled * slope, axis=(-3, -1))
    d_post = step * jnp.sum(g * level, axis=(-3, -1))
    d_amax = (d_pre + d_post, None) if post is None else (d_pre, d_post)
    return _numerics.from_tiles(g * slope, n, k).astype(w.dtype), *d_amax, None


learned.defvjp(_learned_fwd, _learned_bwd)


# Inputs with a static scale ------------------------------------------------------------------------------------------


def static_input(x: jax.Array, scale: jax.Array, spec: InputFormat, learn: bool) -> jax.Array:
    """Activations [..., m, k] quantized with a static scale [...]; the gradient is zero beyond the range.

    `learn`: the scale's gradient is LSQ's, times Q^2, so that the amax it is made from (amax = Q s) takes LSQ's
    steps, as weights do; N is k, the features of the activation.
    """
    return _static_input(x, jnp.broadcast_to(scale, x.shape[:-2]), spec, learn)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _static_input(x: jax.Array, scale: jax.Array, spec: InputFormat, learn: bool) -> jax.Array:
    return _ops.quantize_input(x, spec, scale)


def _static_fwd(x, scale, spec, learn):
    return _static_input(x, scale, spec, learn), (x, scale)


def _static_bwd(spec, learn, kept, g):
    x, scale = kept
    element = spec.format.element
    scaled = _numerics.divide(x.astype(jnp.float32), scale[..., None, None])
    if not learn:
        most = element.max * (E4M3.max if spec.format.global_scale else 1.0)
        dx = jnp.where(jnp.abs(scaled) > most, jnp.zeros_like(g), g)
        return dx.astype(x.dtype), jnp.zeros_like(scale)
    inside = (scaled > element.min) & (scaled < element.max)
    level = _numerics.round_to(scaled, element)
    slope = level - jnp.where(inside, scaled, jnp.zeros_like(scaled))
    factor = element.max**2 / math.sqrt(x.shape[-1] * element.max)
    d_scale = factor * jnp.sum(g.astype(jnp.float32) * slope, axis=(-2, -1))
    return jnp.where(inside, g, jnp.zeros_like(g)).astype(x.dtype), d_scale


_static_input.defvjp(_static_fwd, _static_bwd)
