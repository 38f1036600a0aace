"""Small NNX decoders in the layouts that Tunix and Bonsai chose: einsum weights [D, N, H], layers apart or stacked."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jqopt.hf.attention import causal_attention
from jqopt.hf.config import DecoderConfig
from jqopt.hf.rope import rotate


class Einsum(nnx.Module):
    """One weight and the equation it is used in."""

    def __init__(self, equation: str, shape: tuple[int, ...], leaf: str = "w"):
        self.equation, self.leaf = equation, leaf
        setattr(self, leaf, nnx.Param(jnp.zeros(shape)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.einsum(self.equation, x, getattr(self, self.leaf)[...])


class Norm(nnx.Module):
    """RMSNorm over the last axis."""

    def __init__(self, width: int, epsilon: float, leaf: str = "w"):
        self.epsilon, self.leaf = epsilon, leaf
        setattr(self, leaf, nnx.Param(jnp.zeros(width)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.epsilon) * getattr(self, self.leaf)[...]


class Attention(nnx.Module):
    def __init__(self, c: DecoderConfig, leaves: tuple[str, str]):
        matrix, gain = leaves
        d, h = c.hidden_size, c.head_dim
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads, "v_proj": c.num_key_value_heads}
        for name, n in heads.items():
            setattr(self, name, Einsum("btd,dnh->btnh", (d, n, h), matrix))
        self.o_proj = Einsum("btnh,nhd->btd", (c.num_attention_heads, h, d), matrix)
        self.normed = c.qk_norm
        if c.qk_norm:
            self.q_norm, self.k_norm = Norm(h, c.rms_norm_eps, gain), Norm(h, c.rms_norm_eps, gain)
        self.config = c

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k = (self.q_norm(q), self.k_norm(k)) if self.normed else (q, k)
        q, k = (rotate(y, self.config.rope().frequencies()) for y in (q, k))
        return self.o_proj(causal_attention(q, k, v).reshape(q.shape))


class MLP(nnx.Module):
    def __init__(self, c: DecoderConfig):
        make = lambda n, k: nnx.Linear(n, k, use_bias=False, rngs=nnx.Rngs(0))  # noqa: E731
        self.gate_proj, self.up_proj = (make(c.hidden_size, c.intermediate_size) for _ in range(2))
        self.down_proj = make(c.intermediate_size, c.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    def __init__(self, c: DecoderConfig, leaves: tuple[str, str]):
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps, leaves[1])
        self.attn = Attention(c, leaves)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps, leaves[1])
        self.mlp = MLP(c)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Embedder(nnx.Module):
    def __init__(self, c: DecoderConfig, leaf: str):
        self.leaf = leaf
        setattr(self, leaf, nnx.Param(jnp.zeros((c.vocab_size, c.hidden_size))))

    @property
    def table(self) -> jax.Array:
        return getattr(self, self.leaf)[...]


class Model(nnx.Module):
    """Token ids to logits. `leaves`: names of matrices, gains and embedding; `stacked`: one block with a layer axis."""

    def __init__(self, c: DecoderConfig, leaves: tuple[str, str, str], stacked: bool = False):
        self.embedder, self.stacked = Embedder(c, leaves[2]), stacked
        if stacked:
            self.layers: Any = nnx.vmap(lambda _: Layer(c, leaves[:2]))(jnp.arange(c.num_hidden_layers))
        else:
            self.layers = nnx.List([Layer(c, leaves[:2]) for _ in range(c.num_hidden_layers)])
        self.final_norm = Norm(c.hidden_size, c.rms_norm_eps, leaves[1])
        self.tied = c.tie_word_embeddings
        if not self.tied:
            self.lm_head = Einsum("btd,dv->btv", (c.hidden_size, c.vocab_size), leaves[0])

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embedder.table[ids]
        if self.stacked:
            x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        else:
            for layer in self.layers:
                x = layer(x)
        x = self.final_norm(x)
        return x @ self.embedder.table.T if self.tied else self.lm_head(x)


TUNIX, BONSAI = ("w", "w", "input_embedding"), ("kernel", "scale", "embedding")
