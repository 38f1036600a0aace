"""GPT-2: LayerNorms, learned positions, one fused projection of q, k and v, biases everywhere, a head that is tied.

The mathematics is that of transformers' GPT2LMHeadModel. Its linear layers keep weights as Flax does, [in, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqopt.errors import UnsupportedError
from jqopt.hf.attention import attend, projection
from jqopt.hf.config import ACTIVATIONS, activation, size

DTypeLike = Any


@dataclass(frozen=True)
class GPT2Config:
    """The facts of a GPT-2's `config.json` that matter to the computation, under the names of other decoders."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 1024
    layer_norm_epsilon: float = 1e-5
    hidden_act: str = "gelu_new"
    scaled: bool = True
    tie_word_embeddings: bool = True

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> GPT2Config:
        """The parsed `config.json`. Raises UnsupportedError where it asks for something else, or lacks a size."""
        _refuse_unsupported(config)
        given = {"n_positions": 1024, "activation_function": "gelu_new", **config}
        hidden, heads = size(given, "n_embd"), size(given, "n_head")
        if hidden % heads:
            raise UnsupportedError(f"config.json: n_embd {hidden} is no multiple of n_head {heads}")
        return cls(
            vocab_size=size(given, "vocab_size"), hidden_size=hidden, num_attention_heads=heads,
            intermediate_size=4 * hidden if given.get("n_inner") is None else size(given, "n_inner"),
            num_hidden_layers=size(given, "n_layer"), max_position_embeddings=size(given, "n_positions"),
            layer_norm_epsilon=float(given.get("layer_norm_epsilon", 1e-5)),
            hidden_act=activation(given, "activation_function"),
            scaled=bool(given.get("scale_attn_weights", True)),
            tie_word_embeddings=bool(given.get("tie_word_embeddings", True)),
        )  # fmt: skip


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if config.get(name):
            raise UnsupportedError(f"config.json: {name} is true; the GPT-2 decoder (jqopt/hf/gpt2.py) has it not")


class GPT2Attention(nn.Module):
    """Causal self-attention; q, k and v are thirds of one projection."""

    config: GPT2Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, position: jax.Array | None = None) -> jax.Array:
        c = self.config
        parts = jnp.split(projection(3 * c.hidden_size, self.dtype, "c_attn", bias=True)(x), 3, axis=-1)
        q, k, v = (y.reshape(*x.shape[:2], c.num_attention_heads, c.head_dim) for y in parts)
        mixed = attend(self, q, k, v, position, scale=None if c.scaled else 1.0)
        return projection(c.hidden_size, self.dtype, "c_proj", bias=True)(mixed)


class GPT2MLP(nn.Module):
    """c_proj(act(c_fc(x)))."""

    config: GPT2Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        inner = ACTIVATIONS[c.hidden_act](projection(c.intermediate_size, self.dtype, "c_fc", bias=True)(x))
        return projection(c.hidden_size, self.dtype, "c_proj", bias=True)(inner)


class GPT2Layer(nn.Module):
    """One pre-norm block: attention, then the MLP, each added to the residual stream."""

    config: GPT2Config
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, position: jax.Array | None = None) -> jax.Array:
        c = self.config
        x = x + GPT2Attention(c, self.dtype, name="attn")(_norm(c, self.dtype, "ln_1")(x), position)
        return x + GPT2MLP(c, self.dtype, name="mlp")(_norm(c, self.dtype, "ln_2")(x))


def _norm(config: GPT2Config, dtype: DTypeLike, name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=config.layer_norm_epsilon, dtype=dtype, use_fast_variance=False, name=name)


class GPT2(nn.Module):
    """Token ids [batch, tokens] to float32 logits [batch, tokens, vocab_size]; the options are Decoder's."""

    config: GPT2Config
    scan_layers: bool = False
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    attention_path: ClassVar[str] = "h_{layer}/attn"

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        self.wte = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, embedding_init=init)
        self.wpe = nn.Embed(c.max_position_embeddings, c.hidden_size, dtype=self.dtype, embedding_init=init)
        layers = [GPT2Layer(c, self.dtype) for _ in range(1 if self.scan_layers else c.num_hidden_layers)]
        self.h: Any = layers[0] if self.scan_layers else layers
        self.ln_f = _norm(c, self.dtype)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Dense(c.vocab_size, use_bias=False, dtype=self.dtype, kernel_init=init)

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        return self._logits(self.hidden(input_ids))

    def hidden(self, input_ids: jax.Array) -> jax.Array:
        """The normalised last hidden state, [batch, tokens, hidden_size] in the compute dtype.

        Raises UnsupportedError for more tokens than there are learned positions.
        """
        self._check(input_ids.shape[1])
        return self.ln_f(self._blocks(self.wte(input_ids) + self.wpe(jnp.arange(input_ids.shape[1]))))

    def decode(self, input_ids: jax.Array, position: jax.Array, length: int, last: Any = None) -> jax.Array:
        """Logits of the tokens from `position` on, as `Decoder.decode`."""
        self._check(length)
        places = position[..., None] + jnp.arange(input_ids.shape[1], dtype=jnp.int32)
        x = self.ln_f(self._blocks(self.wte(input_ids) + self.wpe(places), position))
        return self._logits(x if last is None else jnp.take_along_axis(x, last[:, None, None], axis=1))

    def _check(self, length: int) -> None:
        if length > self.config.max_position_embeddings:
            raise UnsupportedError(
                f"{length} tokens: this GPT-2 has learned {self.config.max_position_embeddings} positions and has none "
                "for later ones"
            )

    def _logits(self, x: jax.Array) -> jax.Array:
        logits = self.wte.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)
        return logits.astype(jnp.float32)

    def _blocks(self, x: jax.Array, position: jax.Array | None = None) -> jax.Array:
        def run(layer: GPT2Layer, x: jax.Array) -> jax.Array:
            return layer(x, position)

        run = nn.remat(run, prevent_cse=not self.scan_layers) if self.remat else run
        if not self.scan_layers:
            for layer in self.h:
                x = run(layer, x)
            return x
        scanned = nn.scan(
            lambda layer, x, _: (run(layer, x), None),
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            length=self.config.num_hidden_layers,
        )
        return scanned(self.h, x, None)[0]
