"""A key-value cache that holds packed bytes: `init`, `append`, `read` and `attend`, pure functions for any decode loop.

With the spec None it holds keys and values as they are.

A token's key is stored as `quantize` of an attention's k stores it in simulation: what `read` gives is bit for bit what
a model with `kv_cache: ...` in its recipe computes with, given the same scales.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jqopt import _hadamard, _numerics, _ops
from jqopt._numerics import Codes
from jqopt._recipe import OperandSpec
from jqopt.errors import UnsupportedError
from jqopt.formats import Format

__all__ = ["KVCache", "Packed", "append", "attend", "init", "read"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "scale", "tensor_scale", "bias"],
    meta_fields=["format", "granularity", "width"],
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """Keys or values [batch, length, heads, width], packed along the last axis.

    Attributes:
        data: uint8 or int8 [batch, length, heads, bytes]: fp8 bits, or two 4-bit codes a byte, low nibble first. Where
            format is None: the values themselves, [batch, length, heads, width].
        scale: of blocks (uint8 bits) or tokens (float32), [batch, length, heads, scales]; None: one for the tensor.
        tensor_scale: float32 []; None where scales are found from each token.
        bias: float32 [heads, width], subtracted before and added after; or None.
    """

    data: jax.Array
    scale: jax.Array | None
    tensor_scale: jax.Array | None
    bias: jax.Array | None
    format: Format | None
    granularity: str
    width: int


@functools.partial(jax.tree_util.register_dataclass, data_fields=["k", "v"], meta_fields=["rotated", "dtype"])
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The keys and values of one layer's attention. A pytree: carry it through jit, scan and while loops.

    `rotated`: keys are stored turned by a Hadamard matrix. `dtype`: in which keys and values are read.
    """

    k: Packed
    v: Packed
    rotated: bool
    dtype: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[batch, length, heads, head width] of the keys."""
        batch, length, heads, _ = self.k.data.shape
        return batch, length, heads, self.k.width

    @property
    def nbytes(self) -> int:
        """Bytes that it holds, scales and biases included."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))


def init(
    shape: tuple[int, int, int, int],
    spec: str | Mapping[str, Any] | OperandSpec | None = "fp8",
    *,
    scales: Mapping[str, jax.Array] | None = None,
    value_width: int | None = None,
    dtype: Any = jnp.bfloat16,
) -> KVCache:
    """An empty cache: every position reads as zero (with a bias: as the bias) until it is appended.

    Args:
        shape: [batch, length, kv heads, head width]; `value_width`: the width of values, where it differs.
        spec: as `kv_cache` in a recipe: "fp8", {"format": "nvfp4", "scaling": "cast"}, or `recipe.operands["k"]`. None:
            not packed, in `dtype`.
        scales: of this attention, as a quantized model holds them: `qm.quant.attention["layers_0/attn"]`. Of layers in
            a scan take one layer's: `jax.tree.map(lambda x: x[i], ...)`.
        dtype: in which keys and values are read.

    Raises:
        UnsupportedError: the spec needs scales (or a scale from values that aren't there yet).
        RecipeError: an unknown key or value in `spec`.
    """
    if spec is None:
        plain = functools.partial(_plain, shape[:3], jnp.dtype(dtype))
        return KVCache(plain(shape[3]), plain(value_width or shape[3]), False, jnp.dtype(dtype).name)
    one = OperandSpec.from_dict(spec.to_dict() if isinstance(spec, OperandSpec) else spec)
    batch, length, heads, width = shape
    make = functools.partial(_empty, one, dict(scales or {}), (batch, length, heads))
    return KVCache(make("k", width), make("v", value_width or width), one.rotate, jnp.dtype(dtype).name)


def _plain(lead: tuple[int, int, int], dtype: Any, width: int) -> Packed:
    return Packed(jnp.zeros((*lead, width), dtype), None, None, None, None, "", width)


def _empty(
    spec: OperandSpec, scales: Mapping[str, jax.Array], lead: tuple[int, int, int], role: str, width: int
) -> Packed:
    format, granularity = spec.element_format(), spec.granularity or "tensor"
    tensor_scale = _tensor_scale(spec, scales, role)
    bias = scales.get(f"{role}_bias") if spec.affine else None
    if spec.affine and (bias is None or bias.shape != (lead[2], width)):
        raise UnsupportedError(
            f"affine takes {role}_bias of shape [{lead[2]}, {width}], found {None if bias is None else bias.shape}; "
            "pass scales=qm.quant.attention[...] of a model that was calibrated with `affine: true`"
        )
    packed = Packed(jnp.zeros(0), None, tensor_scale, bias, format, granularity, width)
    codes = jax.eval_shape(lambda x: _encode(packed, x), jax.ShapeDtypeStruct((*lead, width), jnp.float32))
    data, scale = (None if x is None else jnp.zeros(x.shape, x.dtype) for x in codes)
    assert data is not None, role
    return dataclasses.replace(packed, data=data, scale=scale)


def _tensor_scale(spec: OperandSpec, scales: Mapping[str, jax.Array], role: str) -> jax.Array | None:
    """The scale that is known before any token: calibrated, or 1; None where each token brings its own."""
    if spec.scaling == "cast":
        return jnp.float32(1)
    if spec.scaling == "dynamic":
        if spec.granularity == "tensor" or spec.element_format().global_scale:
            raise UnsupportedError(
                f"a cache can't take the scale of a whole tensor from values that aren't there yet ({spec.format}, "
                "dynamic); write 'scaling: cast', calibrate one ('scaling: static'), or 'granularity: token'"
            )
        return None
    found = scales.get(f"{role}_scale")
    if found is None or found.shape != ():
        what = "no scales" if found is None else f"{role}_scale of shape {found.shape}"
        raise UnsupportedError(
            f"{spec.format} with 'scaling: static' takes one calibrated {role}_scale, found {what}; pass "
            "scales=qm.quant.attention[...] (one layer's), or write {format: " + spec.format + ", scaling: cast}"
        )
    return found


def append(cache: KVCache, k: jax.Array, v: jax.Array, position: Any) -> KVCache:
    """The cache with tokens packed into it from `position` on.

    Args:
        k, v: [batch, tokens, heads, width], any float dtype.
        position: whole number or int array [], or [batch] where sequences are at different positions. As
            `lax.dynamic_update_slice` does, a position known only at run time is moved back where tokens would not fit.

    Raises:
        UnsupportedError: shapes that aren't the cache's, or a position (known when tracing) at which they don't fit.
    """
    length = cache.shape[1]
    for name, x, packed in (("k", k, cache.k), ("v", v, cache.v)):
        batch, _, heads, _ = packed.data.shape
        if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (batch, heads, packed.width) or x.shape[1] > length:
            raise UnsupportedError(
                f"{name} has shape {list(x.shape)}; this cache takes [{batch}, at most {length}, {heads}, "
                f"{packed.width}]"
            )
    if isinstance(position, int) and not 0 <= position <= length - k.shape[1]:
        raise UnsupportedError(f"{k.shape[1]} tokens at position {position} don't fit into a cache of {length}")
    k = _hadamard.rotate(k) if cache.rotated else k
    at = jnp.asarray(position, jnp.int32)
    return dataclasses.replace(cache, k=_written(cache.k, k, at), v=_written(cache.v, v, at))


def _written(packed: Packed, x: jax.Array, position: jax.Array) -> Packed:
    data, scale = _encode(packed, x)

    def write(whole: jax.Array, part: jax.Array) -> jax.Array:
        if position.ndim == 0:
            return lax.dynamic_update_slice_in_dim(whole, part, position, axis=1)
        return jax.vmap(lambda w, p, i: lax.dynamic_update_slice_in_dim(w, p, i, axis=0))(whole, part, position)

    new_scale = None if packed.scale is None or scale is None else write(packed.scale, scale)
    return dataclasses.replace(packed, data=write(packed.data, data), scale=new_scale)


def _encode(packed: Packed, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """(data, scale) of x [batch, tokens, heads, width]."""
    if packed.format is None:
        return x.astype(packed.data.dtype), None
    lead, width = x.shape[:-1], x.shape[-1]
    centered = x if packed.bias is None else x.astype(jnp.float32) - packed.bias
    rows = centered.reshape(-1, width)
    codes = _numerics.quantize_matrix(
        rows, packed.format, granularity=_rows(packed.granularity), tensor_scale=packed.tensor_scale
    )
    own = packed.granularity != "tensor"
    return codes.data.reshape(*lead, -1), codes.scale.reshape(*lead, -1) if own else None


def _rows(granularity: str) -> str:
    """In a matrix's words: a token's head is a row, as an output channel is."""
    return "channel" if granularity == "token" else granularity


def read(cache: KVCache) -> tuple[jax.Array, jax.Array]:
    """(k, v), dequantized: [batch, length, heads, width] in the cache's dtype; keys as they were before rotation."""
    k, v = _decode(cache.k), _decode(cache.v)
    k = _hadamard.rotate(k) if cache.rotated else k
    return k.astype(cache.dtype), v.astype(cache.dtype)


def _decode(packed: Packed) -> jax.Array:
    if packed.format is None:
        return packed.data
    lead = packed.data.shape[:-1]
    flat = packed.data.reshape(-1, packed.data.shape[-1])
    scale, whole = packed.scale, packed.tensor_scale
    if scale is None:
        assert whole is not None, "a cache without scales of its own has one for the tensor"
        codes = Codes(flat, whole[None, None])
    else:
        codes = Codes(flat, scale.reshape(flat.shape[0], -1), whole if packed.format.global_scale else None)
    values = _numerics.dequantize_matrix(*codes, packed.format, packed.width).reshape(*lead, packed.width)
    return values if packed.bias is None else values + packed.bias


def attend(
    cache: KVCache,
    q: jax.Array,
    position: Any,
    *,
    scale: float | None = None,
    window: Any = None,
    softcap: float | None = None,
    backend: str | None = None,
    device: str | None = None,
) -> jax.Array:
    """Causal softmax attention of queries over the cache; scores and softmax in float32, grouped queries.

    Args:
        q: [batch, tokens, heads, width] at positions `position`, `position + 1`, ...; query head j reads key head
            j // (heads // kv heads).
        position: of the first query: a whole number, int array [] or [batch].
        scale: of the scores; default 1 / sqrt(width). `softcap`: they are softcap * tanh(score / softcap).
        window: how many positions back a query sees, its own included: a number or int []; None: all.
        backend: name of one kernel or family of `jqopt_kernels`, instead of the best for the device; `device`: what to
            choose it for ("cpu", "cuda:90"), default this process's. One query token over a packed cache without a bias
            has kernels on CUDA that decode while they read; all else decodes first.

    Returns:
        [batch, tokens, heads, value width] in q's dtype.

    Raises:
        UnsupportedError: the number of query heads is no multiple of the cache's.
    """
    batch, length, kv_heads, width = cache.shape
    if q.ndim != 4 or q.shape[0] != batch or q.shape[3] != width or q.shape[2] % kv_heads:
        raise UnsupportedError(
            f"q has shape {list(q.shape)}; this cache takes [{batch}, tokens, a multiple of {kv_heads}, {width}]"
        )
    q_turned = _hadamard.rotate(q) if cache.rotated else q
    by_kernel = _one_token(cache, q_turned, position, scale, window, softcap, backend, device)
    if by_kernel is not None:
        return by_kernel.astype(q.dtype)
    k, v = _decode(cache.k).astype(cache.dtype), _decode(cache.v).astype(cache.dtype)
    grouped = q_turned.astype(cache.dtype).reshape(batch, q.shape[1], kv_heads, -1, width)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    last = jnp.asarray(position, jnp.int32).reshape(-1, 1) + jnp.arange(q.shape[1], dtype=jnp.int32)
    back = last[:, None, None, :, None] - jnp.arange(length, dtype=jnp.int32)
    visible = back >= 0 if window is None else (back >= 0) & (back < window)
    scores = capped(scores * jnp.float32(width**-0.5 if scale is None else scale), softcap)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(cache.dtype)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights, v)
    return mixed.reshape(*q.shape[:3], -1).astype(q.dtype)


def _one_token(
    cache: KVCache,
    q: jax.Array,
    position: Any,
    scale: float | None,
    window: Any,
    softcap: float | None,
    backend: str | None,
    device: str | None,
) -> jax.Array | None:
    """`attend` by a kernel that decodes while it reads; None where there is none."""
    k, v = _cached(cache.k), _cached(cache.v)
    if q.shape[1] != 1 or k is None or v is None:
        return None
    end = jnp.broadcast_to(jnp.asarray(position, jnp.int32).reshape(-1) + 1, q.shape[:1])
    first = jnp.zeros_like(end) if window is None else jnp.maximum(end - jnp.asarray(window, jnp.int32), 0)
    by = float(q.shape[3] ** -0.5) if scale is None else scale
    y = _ops.attend(q[:, 0], k, v, first, end, scale=by, softcap=softcap, backend=backend, device=device)
    return None if y is None else y[:, None]


def _cached(packed: Packed) -> _ops.Cached | None:
    """Keys or values as kernels take them; None where they can't: not packed, in two formats, or with a bias."""
    format = packed.format
    if format is None or format.then is not None or packed.bias is not None:
        return None
    return _ops.Cached(packed.data, packed.scale, packed.tensor_scale, format, packed.granularity, packed.width)


def capped(scores: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(scores / cap), float32; without a cap the scores as they are."""
    return scores if cap is None else jnp.tanh(scores / jnp.float32(cap)) * jnp.float32(cap)
