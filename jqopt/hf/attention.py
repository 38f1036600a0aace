"""Causal self-attention with grouped queries, over a whole sequence or over a cache of earlier keys and values."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jqopt import kv_cache
from jqopt.errors import UnsupportedError
from jqopt.hf.config import DecoderConfig, LayerKind
from jqopt.hf.norm import RMSNorm
from jqopt.hf.rope import rotate
from jqopt.kv_cache import KVCache

DTypeLike = Any


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Causal softmax attention with grouped queries; scores and softmax in float32.

    q [batch, tokens, heads, d]; k, v [batch, tokens, kv_heads, d], query head j reads kv head j // (heads
    // kv_heads). Returns [batch, tokens, heads * d] in q's dtype.

    Args:
        window: how many tokens back a token sees, itself included: a number or int []; None: all.
        scale: of the scores; default 1 / sqrt(d). `softcap`: scores are softcap * tanh(score / softcap).
    """
    batch, tokens, heads, width = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, tokens, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = kv_cache.capped(scores * jnp.float32(width**-0.5 if scale is None else scale), softcap)
    at = np.arange(tokens) if isinstance(tokens, int) else jnp.arange(tokens, dtype=jnp.int32)  # symbolic: computed
    back = at[:, None] - at
    visible = back >= 0 if window is None else (back >= 0) & (back < window)
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.float32(-jnp.inf)), axis=-1).astype(q.dtype)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights, v)
    return mixed.reshape(batch, tokens, heads * width)


def attend(
    module: nn.Module,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array | None,
    *,
    window: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Attention of a module, [batch, tokens, heads * d]: with `position`, over its variable `kv` of collection `cache`.

    Args:
        position: int [] or [batch], of the first token; None: the tokens are the whole sequence.

    Raises:
        UnsupportedError: there is a position and no cache.
    """
    if position is None:
        return causal_attention(q, k, v, window=window, scale=scale, softcap=softcap)
    cache: Any = module.variable("cache", "kv", _missing)
    cache.value = kv_cache.append(cache.value, k, v, position)
    mixed = kv_cache.attend(cache.value, q, position, scale=scale, window=window, softcap=softcap)
    return mixed.reshape(*q.shape[:2], -1)


def _missing() -> KVCache:
    raise UnsupportedError("decoding takes a cache: pass {'params': ..., 'cache': jqopt.hf.init_cache(...)}")


def projection(features: int, dtype: DTypeLike, name: str, bias: bool = False) -> nn.Dense:
    """A linear layer of a decoder."""
    return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=nn.initializers.normal(0.02), name=name)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    config: DecoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, kind: LayerKind, position: jax.Array | None = None) -> jax.Array:
        c = self.config
        q, k, v = self._heads(x)
        if c.qk_norm:
            q, k = (RMSNorm(c.rms_norm_eps, c.norm_offset, name=n)(y) for n, y in (("q_norm", q), ("k_norm", k)))
        q, k = (rotate(y, kind.frequencies, position, factor=kind.factor) for y in (q, k))
        mixed = attend(
            self, q, k, v, position, window=kind.window, scale=c.score_scale, softcap=c.attention_softcap
        )  # fmt: skip
        return projection(c.hidden_size, self.dtype, "o_proj", c.o_bias)(mixed)

    def _heads(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """q, k and v, each [batch, tokens, heads, head_dim]."""
        c = self.config
        counts = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
        if c.fused:
            width = sum(counts) * c.head_dim
            both = projection(width, self.dtype, "qkv_proj", c.qkv_bias)(x)
            edges = np.cumsum(counts)[:-1] * c.head_dim
            parts = jnp.split(both, edges.tolist(), axis=-1)
        else:
            names = ("q_proj", "k_proj", "v_proj")
            sizes = zip(names, counts, strict=True)
            parts = [projection(n * c.head_dim, self.dtype, name, c.qkv_bias)(x) for name, n in sizes]
        return tuple(y.reshape(*x.shape[:2], n, c.head_dim) for y, n in zip(parts, counts, strict=True))
