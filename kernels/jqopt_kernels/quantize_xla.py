"""The quantizer ops as plain XLA: `quantize_math` on the whole matrix as one tile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import quantize_math as qm
from ._types import Kernel, Operand, Packed, Shapes, as_is
from .decode import CODINGS
from .quantize_way import NEAREST, Random, Way, check, no_scales, packed_of, scale_shape, tile, unknown

ARRAYS = ("scale", "column_scale", "random", "column_random")


def no_gradient(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, whose array arguments refuse to be differentiated, with the reason; constants pass."""

    @functools.wraps(run)
    def guarded(*arrays: jax.Array, **options: Any) -> Any:
        given = {name: value for name, value in options.items() if name in ARRAYS and value is not None}
        static = {name: value for name, value in options.items() if name not in ARRAYS}
        inner = jax.custom_jvp(lambda arrays, given: run(*arrays, **given, **static))

        @inner.defjvp
        def refuse(primals, tangents):
            raise TypeError(
                f"{run.__name__.strip('_')}: rounding has no derivative. Pass lax.stop_gradient(x) and let the "
                "gradient go around it (straight through), as jqopt's products do"
            )

        return inner(arrays, given)

    return guarded


def whole_scale(scale: jax.Array | None, way: Way) -> jax.Array | None:
    """The scale of decoding the whole, from the one that was given."""
    if scale is None:
        return None
    scale = scale.astype(jnp.float32).reshape(())
    return qm.divide(jnp.ones_like(scale), scale) if way.encode else scale


def pack4(codes: jax.Array) -> jax.Array:
    """4-bit codes [r, k] -> bytes [r, ceil(k / 2)], low nibble first."""
    pair = _padded(codes, 1, 2).reshape(codes.shape[0], -(-codes.shape[1] // 2), 2)
    word = lax.bitcast_convert_type(pair, jnp.uint16)  # slices of `pair` would compute it twice
    return (word | word >> np.uint16(4)).astype(jnp.uint8)


def pack6(codes: jax.Array) -> jax.Array:
    """6-bit codes [r, k], one a byte -> bytes [r, ceil(6 k / 8)], four codes in three bytes, little-endian."""
    r, k = codes.shape
    quad = _padded(codes, 1, 4).astype(jnp.uint32).reshape(r, -(-k // 4), 4)
    word = quad[..., 0] | quad[..., 1] << 6 | quad[..., 2] << 12 | quad[..., 3] << 18
    parts = jnp.stack([word & 255, (word >> 8) & 255, word >> 16], axis=-1).astype(jnp.uint8)
    return parts.reshape(r, 3 * quad.shape[1])[:, : -(-k * 6 // 8)]


def packed_codes(codes: jax.Array, spec: Operand, packed: bool) -> jax.Array:
    """uint32 codes [r, k] as they are stored."""
    bits, mantissa, _ = CODINGS[spec.element]
    data = codes.astype(jnp.uint8)
    if mantissa is None:
        return lax.bitcast_convert_type(data, jnp.int8)
    return {4: pack4, 6: pack6, 8: lambda x: x}[bits](data) if packed else data


def _padded(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    short = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, short if i == axis else 0) for i in range(x.ndim)]) if short else x


def hadamard(x: jax.Array, signs: tuple[int, ...]) -> jax.Array:
    """`quantize_math.hadamard` in a form that XLA keeps as one loop: nothing is concatenated."""
    m, k = x.shape
    y = x.reshape(m, k // 16, 16) * jnp.asarray(signs, jnp.float32)
    sign = jnp.asarray([1, -1], jnp.float32)[:, None]
    for half in (8, 4, 2, 1):
        pair = y.reshape(m, -1, 2, half)
        y = pair[..., :1, :] + sign * pair[..., 1:, :]
    return qm.bfloat16(y.reshape(m, k) * jnp.float32(0.25))


def codes_and_scales(
    x: jax.Array, spec: Operand, way: Way, scale: jax.Array | None, dither: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """uint32 codes [m, k] of float32 x, and the scales found from it as they are stored."""
    m, k = x.shape
    if 0 in (m, k):
        return jnp.zeros((m, k), jnp.uint32), no_scales(spec, m, k)
    x = x if way.hadamard is None else hadamard(x, way.hadamard)
    shared = tile(spec, k)
    wide = _padded(_padded(x, 0, shared[0]), 1, shared[1]) if shared is not None else x
    if dither is not None:
        dither = jnp.pad(dither, ((0, wide.shape[0] - m), (0, wide.shape[1] - k)))
    codes, stored = qm.quantize_tile(wide, scale, spec, way, shared, dither, qm.divide)
    if stored is not None:
        stored = stored if stored.dtype == jnp.float32 else stored.astype(jnp.uint8)
        stored = stored.reshape(scale_shape(spec, m, k))
    return codes[:m, :k], stored


def dither_of(random: Random, r: int, c: int) -> jax.Array:
    """The random numbers of a matrix [r, c]."""
    start = jnp.zeros(2, jnp.uint32) if random.start is None else random.start.astype(jnp.uint32)
    key = random.key.astype(jnp.uint32)
    return qm.uniform((key[0], key[1]), start[0], start[1], r, -(-c // 8) * 8)[:, :c]


def _quantize_whole(x, *, spec, way=NEAREST, scale=None, random=None, packed=False) -> Packed:
    check(spec, way, x.shape[1], scale, random)
    dither = None if random is None else dither_of(random, *x.shape)
    codes, stored = codes_and_scales(x.astype(jnp.float32), spec, way, scale, dither)
    return packed_of(packed_codes(codes, spec, packed), stored, whole_scale(scale, way), spec)


@no_gradient
def quantize(x, **options) -> Packed:
    """x [m, k] -> Packed; see `reference_quantize.quantize`."""
    return _quantize_whole(x, **options)


def rounded(y: jax.Array, dtype: Any) -> jax.Array:
    """float32 y, surely rounded to this dtype: XLA may drop a cast and its inverse."""
    info = jnp.finfo(dtype)
    return y if dtype == jnp.float32 else lax.reduce_precision(y, info.nexp, info.nmant)


@no_gradient
def swiglu_quantize(gate, up, **options) -> Packed:
    """quantize(silu(gate) * up)"""
    g = gate.astype(jnp.float32)
    y = g / (jnp.float32(1) + jnp.exp(-g)) * up.astype(jnp.float32)
    return _quantize_whole(rounded(y, gate.dtype), **options)


@no_gradient
def norm_quantize(x, weight, *, eps=1e-6, **options) -> Packed:
    """quantize(x / sqrt(mean(x^2) + eps) * weight)"""
    y = x.astype(jnp.float32)
    mean = jnp.sum(y * y, axis=1, keepdims=True) * jnp.float32(1 / max(x.shape[1], 1))
    y = y * (lax.rsqrt(mean + jnp.float32(eps)) * weight.astype(jnp.float32))
    return _quantize_whole(rounded(y, x.dtype), **options)


def supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    """Every known format, everywhere."""
    return f"lhs is {lhs.element}; what is quantized is float" if lhs.element != "float" else unknown(rhs)


xla_quantize = Kernel("xla_quantize", "quantize", supports, as_is, quantize)
xla_swiglu_quantize = Kernel("xla_swiglu_quantize", "swiglu_quantize", supports, as_is, swiglu_quantize)
xla_norm_quantize = Kernel("xla_norm_quantize", "norm_quantize", supports, as_is, norm_quantize)
