"""Decoding token by token over key-value caches: the caches of a decoder, and the loop that all generation runs.

A decoder here is a module of `jqopt.hf` (or one like them): it has `config`, `dtype`, `scan_layers`,
`attention_path`, and a method `decode(ids, position, length, last)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jqopt import kv_cache
from jqopt.errors import UnsupportedError
from jqopt.kv_cache import KVCache

Caches = dict[str, dict[str, dict[str, KVCache]]]
"""Flax's collection `cache`: {"layers_0": {"self_attn": {"kv": KVCache}}, ...}; scanned: "layers", stacked."""

Step = Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""step(cache, ids [batch, n], position [] or [batch], last [batch]) -> (logits float32 [batch, vocab_size] of the
tokens `last`, the cache with all n tokens in it)."""


def init_cache(
    model: Any,
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
    numbers = range(c.num_hidden_layers)
    if not model.scan_layers:
        paths = [model.attention_path.format(layer=i) for i in numbers]
        return {p.split("/")[0]: {p.split("/")[1]: {"kv": make(scales=found.get(p))}} for p in paths}
    path = model.attention_path.replace("_{layer}", "")
    each = [make(scales=jax.tree.map(lambda x, i=i: x[i], dict(found.get(path, {})))) for i in numbers]
    block, attention = path.split("/")
    return {block: {attention: {"kv": jax.tree.map(lambda *x: jnp.stack(x), *each)}}}


class Drawn(NamedTuple):
    """`tokens` int32 [batch, steps], padded after a row's end; `lengths` [batch]: how many count; the cache."""

    tokens: jax.Array
    lengths: jax.Array
    cache: Any


def loop(
    step: Step,
    cache: Any,
    ids: jax.Array,
    lengths: jax.Array | None,
    steps: int,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
    ends: tuple[int, ...] = (),
    pad: int = 0,
) -> Drawn:
    """Prefill, then a token at a time until all rows have ended or `steps` are made. Traced: call it under jit.

    A row shorter than the prompt's width is padded on its right: what its padding has put into the cache is written
    over before any token of the row can see it.

    Args:
        ids: int32 [batch, n]; `lengths` [batch]: tokens of each row, or None: all n.
        choose: (logits [batch, vocab_size], step number []) -> tokens [batch].
        ends: tokens after which a row has ended; `pad` stands after them.
    """
    batch, width = ids.shape
    last = jnp.full(batch, width - 1, jnp.int32) if lengths is None else lengths - 1
    logits, cache = step(cache, ids, jnp.int32(0), last)
    first = choose(logits, jnp.int32(0)).astype(ids.dtype)
    start = jnp.int32(width) if lengths is None else lengths
    tokens = jnp.full((batch, steps), pad, ids.dtype).at[:, 0].set(first)

    def ended(token: jax.Array) -> jax.Array:
        return jnp.isin(token, jnp.asarray(ends, token.dtype)) if ends else jnp.zeros(batch, bool)

    def more(carry: tuple) -> jax.Array:
        number, _, _, done, _, _ = carry
        return (number < steps) & ~jnp.all(done)

    def body(carry: tuple) -> tuple:
        number, token, cache, done, tokens, counts = carry
        logits, cache = step(cache, token[:, None], start + number - 1, jnp.zeros(batch, jnp.int32))
        drawn = choose(logits, number).astype(ids.dtype)
        token = jnp.where(done, jnp.asarray(pad, ids.dtype), drawn)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], number, axis=1)
        return number + 1, token, cache, done | ended(token), tokens, counts + (~done).astype(jnp.int32)

    carry = (jnp.int32(1), first, cache, ended(first), tokens, jnp.ones(batch, jnp.int32))
    _, _, cache, _, tokens, counts = jax.lax.while_loop(more, body, carry)
    return Drawn(tokens, counts, cache)


def greedy(logits: jax.Array, number: jax.Array) -> jax.Array:
    """The likeliest token of each row."""
    return jnp.argmax(logits, axis=-1)


def step_of(module: Any, variables: Mapping[str, Any], length: int) -> Step:
    """The decode step of a float decoder, in a sequence of `length` tokens."""

    def step(cache: Any, ids: jax.Array, position: jax.Array, last: jax.Array) -> tuple[jax.Array, Any]:
        given = {**variables, "cache": cache}
        logits, after = module.apply(given, ids, position, length, last, method="decode", mutable="cache")
        return logits[:, 0], after["cache"]

    return step


def check_length(cache: Caches, tokens: int, steps: int) -> None:
    """Raises UnsupportedError where a cache is too short for `tokens` of a prompt and `steps` more."""
    first = jax.tree.leaves(cache, is_leaf=lambda x: isinstance(x, KVCache))[0]
    length = first.k.data.shape[-3]
    if tokens + steps - 1 > length:
        raise UnsupportedError(
            f"{tokens} tokens of a prompt and {steps} steps need a cache of {tokens + steps - 1} positions; this one "
            f"has {length}"
        )


def generate(model: Any, variables: Any, prompt: jax.Array, steps: int, cache: Caches) -> tuple[jax.Array, Caches]:
    """The likeliest next tokens, one after another: ids [batch, prompt + steps], and the cache that has been filled.

    `jqopt.hf.generate` does the same without a cache at hand, also samples, and takes quantized models.

    Args:
        prompt: int32 [batch, tokens].
        cache: from `init_cache`, at least prompt + steps - 1 long.

    Raises:
        UnsupportedError: the cache is too short.
    """
    check_length(cache, prompt.shape[1], steps)
    drawn = _greedy(model, variables, prompt, steps, cache)
    return jnp.concatenate([prompt, drawn.tokens], axis=1), drawn.cache


@functools.partial(jax.jit, static_argnums=(0, 3))
def _greedy(model: Any, variables: Any, prompt: jax.Array, steps: int, cache: Any) -> Drawn:
    step = step_of(model, variables, prompt.shape[1] + steps)
    return loop(step, cache, prompt, None, steps, greedy)
