"""Decoding with a Llama-family model token by token, with a key-value cache that holds packed bytes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqopt import kv_cache
from jqopt.errors import UnsupportedError
from jqopt.hf.llama import MLP, LlamaConfig, LlamaForCausalLM, RMSNorm, _projection, rope_frequencies, rotate
from jqopt.kv_cache import KVCache

Caches = dict[str, dict[str, dict[str, KVCache]]]
"""Flax's collection `cache`: {"layers_0": {"self_attn": {"kv": KVCache}}, ...}."""


class CachedAttention(nn.Module):
    """Attention over a cache: the parameters are those of `llama.Attention`."""

    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, position: jax.Array) -> jax.Array:
        c, frequencies = self.config, rope_frequencies(self.config)
        batch, tokens, _ = x.shape

        def heads(name: str, count: int) -> jax.Array:
            y = _projection(count * c.head_dim, self.dtype, name)(x)
            return y.reshape(batch, tokens, count, c.head_dim)

        q = rotate(heads("q_proj", c.num_attention_heads), frequencies, position)
        k = rotate(heads("k_proj", c.num_key_value_heads), frequencies, position)
        cache = self.variable("cache", "kv", _missing)
        cache.value = kv_cache.append(cache.value, k, heads("v_proj", c.num_key_value_heads), position)
        mixed = kv_cache.attend(cache.value, q, position).reshape(batch, tokens, -1)
        return _projection(c.hidden_size, self.dtype, "o_proj")(mixed)


def _missing() -> KVCache:
    raise UnsupportedError("decoding takes a cache: pass {'params': ..., 'cache': decode.init_cache(...)}")


class CachedLayer(nn.Module):
    """One block of `llama.DecoderLayer`, over a cache."""

    config: LlamaConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, position: jax.Array) -> jax.Array:
        c = self.config
        inside = RMSNorm(c.rms_norm_eps, name="input_layernorm")(x)
        x = x + CachedAttention(c, self.dtype, name="self_attn")(inside, position)
        return x + MLP(c, self.dtype, name="mlp")(RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x))


class CachedLlama(nn.Module):
    """`LlamaForCausalLM` (layers unrolled) over the tokens from `position` on; earlier ones are in its caches."""

    config: LlamaConfig
    dtype: Any

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype)
        self.layers = [CachedLayer(c, self.dtype) for _ in range(c.num_hidden_layers)]
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Dense(c.vocab_size, use_bias=False, dtype=self.dtype)

    def __call__(self, input_ids: jax.Array, position: jax.Array) -> jax.Array:
        """Logits, float32 [batch, tokens, vocab_size], of ids [batch, tokens]."""
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, position)
        x = self.norm(x)
        logits = self.embed_tokens.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)
        return logits.astype(jnp.float32)


def init_cache(
    model: LlamaForCausalLM,
    batch: int,
    length: int,
    spec: Any = "fp8",
    *,
    scales: Mapping[str, Mapping[str, jax.Array]] | None = None,
) -> Caches:
    """An empty cache for each layer; `spec` and `scales` (`qm.quant.attention`) as `jqopt.kv_cache.init` takes them."""
    c, found = model.config, scales or {}
    shape = (batch, length, c.num_key_value_heads, c.head_dim)
    make = functools.partial(kv_cache.init, shape, spec, dtype=model.dtype)
    names = [f"layers_{i}" for i in range(c.num_hidden_layers)]
    return {name: {"self_attn": {"kv": make(scales=found.get(f"{name}/self_attn"))}} for name in names}


def generate(
    model: LlamaForCausalLM, variables: Any, prompt: jax.Array, steps: int, cache: Caches
) -> tuple[jax.Array, Caches]:
    """The likeliest next tokens, one after another: ids [batch, prompt + steps], and the cache that has been filled.

    Args:
        prompt: int32 [batch, tokens].
        cache: from `init_cache`, at least prompt + steps - 1 long.

    Raises:
        UnsupportedError: the cache is too short, or the model's layers are in a scan.
    """
    if model.scan_layers:
        raise UnsupportedError("decoding takes unrolled layers: load the model with scan_layers=False")
    length = cache["layers_0"]["self_attn"]["kv"].shape[1]
    if prompt.shape[1] + steps - 1 > length:
        raise UnsupportedError(
            f"{prompt.shape[1]} tokens of a prompt and {steps} steps need a cache of {prompt.shape[1] + steps - 1} "
            f"positions; this one has {length}"
        )
    return _generate(CachedLlama(model.config, model.dtype), variables["params"], prompt, steps, cache)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _generate(model: CachedLlama, params: Any, prompt: jax.Array, steps: int, cache: Caches) -> tuple[Any, Any]:
    def run(cache: Any, ids: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        logits, after = model.apply({"params": params, "cache": cache}, ids, position, mutable="cache")
        return jnp.argmax(logits[:, -1:], axis=-1).astype(ids.dtype), after["cache"]

    def step(carry: Sequence[Any], position: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        cache, ids = carry
        following, cache = run(cache, ids, position)
        return (cache, following), ids[:, 0]

    first, cache = run(cache, prompt, jnp.int32(0))
    positions = prompt.shape[1] + jnp.arange(steps - 1, dtype=jnp.int32)
    (cache, last), tokens = jax.lax.scan(step, (cache, first), positions)
    return jnp.concatenate([prompt, tokens.T.reshape(prompt.shape[0], -1), last], axis=1), cache
