"""A Flax Linen decoder of the Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

The mathematics is that of `transformers`' LlamaForCausalLM (rotary halves, not interleaved pairs). Module
names are the Hugging Face ones, so a parameter path reads like the tensor's name:
`layers_0/self_attn/q_proj/kernel` unrolled, `layers/self_attn/q_proj/kernel` with a leading layer axis when
scanned.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jqopt.errors import UnsupportedError

DTypeLike = Any


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained length: `linear`, or Llama 3.1's `llama3`."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: float = 8192.0


@dataclass(frozen=True)
class LlamaConfig:
    """The facts of `config.json` that matter to the computation, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """The parsed `config.json` as a LlamaConfig.

        Raises UnsupportedError where the file asks for something this decoder does not compute (biases,
        another activation, another rotary scaling), or lacks a size.
        """
        _refuse_unsupported(config)
        heads, hidden = _required(config, "num_attention_heads"), _required(config, "hidden_size")
        rope, kv_heads = _rope_table(config), config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise UnsupportedError(
                f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
            )
        optional = {name: config[name] for name in _OPTIONAL if config.get(name) is not None}
        return cls(
            vocab_size=_required(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_required(config, "intermediate_size"),
            num_hidden_layers=_required(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=config.get("head_dim") or hidden // heads,
            rope_theta=float(rope.get("rope_theta", 10000.0)),
            rope_scaling=_rope_scaling(rope),
            **optional,
        )


_OPTIONAL = ("rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")


def _required(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise UnsupportedError(f"config.json: {name} is {value!r}; expected a positive whole number")
    return value


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedError(f"config.json: hidden_act is {activation!r}; the llama decoder computes 'silu'")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise UnsupportedError(f"config.json: {name} is true; the llama decoder has no biases")


def _rope_table(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings in one table: transformers 5 writes `rope_parameters`, earlier versions two keys."""
    table = dict(config.get("rope_scaling") or {})
    table.update(config.get("rope_parameters") or {})
    if config.get("rope_theta") is not None:
        table.setdefault("rope_theta", config["rope_theta"])
    return table


_SCALING_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _rope_scaling(table: Mapping[str, Any]) -> RopeScaling | None:
    kind = table.get("rope_type", table.get("type", "default"))
    if kind == "default":
        return None
    if kind not in _SCALING_KEYS:
        known = ", ".join(["default", *_SCALING_KEYS])
        raise UnsupportedError(f"config.json: rotary scaling {kind!r}; the llama decoder knows {known}")
    missing = [key for key in _SCALING_KEYS[kind] if key not in table]
    if missing:
        raise UnsupportedError(f"config.json: rotary scaling {kind!r} lacks {', '.join(missing)}")
    return RopeScaling(kind, *(float(table[key]) for key in _SCALING_KEYS[kind]))


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Rotary angle per position, float32 [head_dim / 2], in radians.

    `llama3` keeps short wavelengths, divides long ones by `factor` and blends between (transformers'
    `_compute_llama3_parameters`).
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1.0) / np.float32(config.rope_theta) ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    slow = frequencies / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return slow
    turns = np.float32(scaling.original_length / (2 * math.pi)) * frequencies
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0).astype(np.float32)
    return (1 - blend) * slow + blend * frequencies


def rotate(x: jax.Array, frequencies: np.ndarray, start: jax.Array | None = None) -> jax.Array:
    """Rotary positions 0, 1, ... applied to x [batch, tokens, heads, head_dim]; the same dtype comes out.

    `start`, int []: the first token's position, where it isn't 0.
    """
    positions: Any = np.arange(x.shape[1], dtype=np.float32)
    positions = positions if start is None else positions + start.astype(jnp.float32)
    angles = jnp.asarray(positions[:, None] * frequencies)[None, :, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal softmax attention with grouped queries; scores and softmax in float32.

    q [batch, tokens, heads, d]; k, v [batch, tokens, kv_heads, d], query head j reads kv head j // (heads
    // kv_heads). Returns [batch, tokens, heads * d] in q's dtype.
    """
    batch, tokens, heads, width = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, tokens, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    visible = np.tril(np.ones((tokens, tokens), bool))
    scores = jnp.where(visible, scores * jnp.float32(width**-0.5), jnp.float32(-jnp.inf))
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights, v)
    return mixed.reshape(batch, tokens, heads * width)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, computed in float32 and returned in x's dtype."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        inv_rms = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + jnp.float32(self.epsilon))
        return (wide * inv_rms * scale.astype(jnp.float32)).astype(x.dtype)


def _projection(features: int, dtype: DTypeLike, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=nn.initializers.normal(0.02), name=name)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    config: LlamaConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, frequencies = self.config, rope_frequencies(self.config)
        batch, tokens, _ = x.shape

        def heads(name: str, count: int) -> jax.Array:
            y = _projection(count * c.head_dim, self.dtype, name)(x)
            return y.reshape(batch, tokens, count, c.head_dim)

        q = rotate(heads("q_proj", c.num_attention_heads), frequencies)
        k = rotate(heads("k_proj", c.num_key_value_heads), frequencies)
        mixed = causal_attention(q, k, heads("v_proj", c.num_key_value_heads))
        return _projection(c.hidden_size, self.dtype, "o_proj")(mixed)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: LlamaConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = self.config.intermediate_size
        gate = _projection(inner, self.dtype, "gate_proj")(x)
        up = _projection(inner, self.dtype, "up_proj")(x)
        return _projection(self.config.hidden_size, self.dtype, "down_proj")(jax.nn.silu(gate) * up)


class DecoderLayer(nn.Module):
    """One pre-norm block: attention, then the MLP, each added to the residual stream."""

    config: LlamaConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x = x + Attention(c, self.dtype, name="self_attn")(RMSNorm(c.rms_norm_eps, name="input_layernorm")(x))
        return x + MLP(c, self.dtype, name="mlp")(RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x))


class LlamaForCausalLM(nn.Module):
    """Token ids [batch, tokens] to float32 logits [batch, tokens, vocab_size].

    `scan_layers` runs the blocks as one `nn.scan` over parameters with a leading layer axis; `remat`
    recomputes each block in the backward pass. Neither changes the numbers. `dtype` is the compute dtype;
    parameters are created in float32 and used in whatever dtype they are given.
    """

    config: LlamaConfig
    scan_layers: bool = False
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, embedding_init=init)
        layers = [DecoderLayer(c, self.dtype) for _ in range(1 if self.scan_layers else c.num_hidden_layers)]
        self.layers: Any = layers[0] if self.scan_layers else layers
        self.norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Dense(c.vocab_size, use_bias=False, dtype=self.dtype, kernel_init=init)

    def hidden(self, input_ids: jax.Array) -> jax.Array:
        """The normalised last hidden state, [batch, tokens, hidden_size] in the compute dtype."""
        return self.norm(self._blocks(self.embed_tokens(input_ids)))

    def _blocks(self, x: jax.Array) -> jax.Array:
        def run(layer: DecoderLayer, x: jax.Array) -> jax.Array:
            return layer(x)

        # Inside a scan nothing can be merged across the remat boundary, so the barriers would only cost time.
        run = nn.remat(run, prevent_cse=not self.scan_layers) if self.remat else run
        if not self.scan_layers:
            for layer in self.layers:
                x = run(layer, x)
            return x
        scanned = nn.scan(
            lambda layer, x, _: (run(layer, x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.config.num_hidden_layers,
        )
        return scanned(self.layers, x, None)[0]

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        x = self.hidden(input_ids)
        logits = self.embed_tokens.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)
        return logits.astype(jnp.float32)


def untie(config: LlamaConfig, variables: Mapping[str, Any]) -> tuple[LlamaConfig, dict[str, Any]]:
    """The same model with a head of its own: a copy of the embedding's table, transposed.

    Needed before the last norm's gain can be folded into the head (`transforms.fold_norms`), hence before a rotation.
    """
    if not config.tie_word_embeddings:
        return config, dict(variables)
    params = dict(variables["params"])
    params["lm_head"] = {"kernel": params["embed_tokens"]["embedding"].T}
    return replace(config, tie_word_embeddings=False), {**variables, "params": params}
