"""What stands after attention in a block: the gated MLP, and the mixture of experts."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqopt.hf.attention import projection
from jqopt.hf.config import ACTIVATIONS, DecoderConfig, Experts

DTypeLike = Any


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)); with `fused`, gate and up are the halves of one projection."""

    config: DecoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        inner, act = c.intermediate_size, ACTIVATIONS[c.hidden_act]
        if c.fused:
            gate, up = jnp.split(projection(2 * inner, self.dtype, "gate_up_proj", c.mlp_bias)(x), 2, axis=-1)
        else:
            gate, up = (projection(inner, self.dtype, n, c.mlp_bias)(x) for n in ("gate_proj", "up_proj"))
        return projection(c.hidden_size, self.dtype, "down_proj", c.mlp_bias)(act(gate) * up)


class MixtureOfExperts(nn.Module):
    """The sum of the chosen experts' gated MLPs, weighed by the router. Each expert computes its own tokens only."""

    config: DecoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        moe = self.config.experts
        assert moe is not None, "the configuration has experts"
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = route(self._router_logits(rows, moe), moe)
        flat = chosen.reshape(-1)
        order = jnp.argsort(flat, stable=True)  # rows of one expert stand together
        counts = jnp.sum(flat[:, None] == jnp.arange(moe.count), axis=0, dtype=jnp.int32)
        out = ExpertBank(self.config, self.dtype, name="experts")(rows[order // moe.per_token], counts)
        out = out[jnp.argsort(order)].reshape(*chosen.shape, -1).astype(jnp.float32)
        return jnp.sum(out * weights[..., None], axis=1).astype(x.dtype).reshape(x.shape)

    def _router_logits(self, rows: jax.Array, moe: Experts) -> jax.Array:
        """float32 in the highest precision: a rounding here sends a token to another expert."""
        highest, init = jax.lax.Precision.HIGHEST, nn.initializers.normal(0.02)
        dense = nn.Dense(
            moe.count, use_bias=False, dtype=jnp.float32, precision=highest, kernel_init=init, name="router"
        )
        return dense(rows.astype(jnp.float32))


def route(logits: jax.Array, moe: Experts) -> tuple[jax.Array, jax.Array]:
    """(weights float32, experts int32), each [tokens, per_token], of router logits [tokens, experts]."""
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), moe.per_token)
    if moe.normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, chosen


class ExpertBank(nn.Module):
    """Gated MLPs of all experts, over rows that are sorted by expert; `counts` [experts] says how many each has."""

    config: DecoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, rows: jax.Array, counts: jax.Array) -> jax.Array:
        c, moe = self.config, self.config.experts
        assert moe is not None, "the configuration has experts"
        gate = ExpertLinear(moe.count, moe.width, self.dtype, name="gate_proj")(rows, counts)
        up = ExpertLinear(moe.count, moe.width, self.dtype, name="up_proj")(rows, counts)
        inner = ACTIVATIONS[c.hidden_act](gate) * up
        return ExpertLinear(moe.count, c.hidden_size, self.dtype, name="down_proj")(inner, counts)


class ExpertLinear(nn.Module):
    """One matrix an expert, `kernel` [experts, in, out]: `ragged_dot` over rows sorted by expert."""

    count: int
    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, rows: jax.Array, counts: jax.Array) -> jax.Array:
        shape = (self.count, rows.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape, jnp.float32)
        return jax.lax.ragged_dot(rows.astype(self.dtype), kernel.astype(self.dtype), counts)
