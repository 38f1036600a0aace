"""The decoder of every family that is built as Llama is: embedding, blocks of attention and MLP, norm, head.

Module names are the Hugging Face ones, so a parameter path reads like the tensor's name:
`layers_0/self_attn/q_proj/kernel` unrolled, `layers/self_attn/q_proj/kernel` with a leading layer axis when
scanned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jqopt.errors import UnsupportedError
from jqopt.hf.attention import Attention
from jqopt.hf.config import DecoderConfig, LayerKind, stacked
from jqopt.hf.mlp import MLP, MixtureOfExperts
from jqopt.hf.norm import RMSNorm

DTypeLike = Any


class DecoderLayer(nn.Module):
    """One pre-norm block: attention, then the MLP, each added to the residual stream."""

    config: DecoderConfig
    dtype: DTypeLike
    mixes: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, kind: LayerKind, position: jax.Array | None = None) -> jax.Array:
        c = self.config

        def norm(name: str, y: jax.Array) -> jax.Array:
            return RMSNorm(c.rms_norm_eps, c.norm_offset, name=name)(y)

        mixed = Attention(c, self.dtype, name="self_attn")(norm("input_layernorm", x), kind, position)
        if c.sandwich:
            x = x + norm("post_attention_layernorm", mixed)
            return x + norm("post_feedforward_layernorm", self._mlp()(norm("pre_feedforward_layernorm", x)))
        x = x + mixed
        return x + self._mlp()(norm("post_attention_layernorm", x))

    def _mlp(self) -> nn.Module:
        return (MixtureOfExperts if self.mixes else MLP)(self.config, self.dtype, name="mlp")


class Decoder(nn.Module):
    """Token ids [batch, tokens] to float32 logits [batch, tokens, vocab_size].

    `scan_layers` runs the blocks as one `nn.scan` over parameters with a leading layer axis; `remat`
    recomputes each block in the backward pass. Neither changes the numbers. `dtype` is the compute dtype;
    parameters are created in float32 and used in whatever dtype they are given.
    """

    config: DecoderConfig
    scan_layers: bool = False
    remat: bool = False
    dtype: DTypeLike = jnp.float32

    attention_path: ClassVar[str] = "layers_{layer}/self_attn"

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size, dtype=self.dtype, embedding_init=init)
        mixes = [c.mixes(layer) for layer in range(c.num_hidden_layers)]
        if self.scan_layers and len(set(mixes)) > 1:
            raise UnsupportedError(
                "some layers of this model have experts and others an MLP, so that their parameters cannot be stacked "
                "for one scan: write scan_layers=False"
            )
        layers = [DecoderLayer(c, self.dtype, m) for m in (mixes[:1] if self.scan_layers else mixes)]
        self.layers: Any = layers[0] if self.scan_layers else layers
        self.norm = RMSNorm(c.rms_norm_eps, c.norm_offset)
        if not c.tie_word_embeddings:
            self.lm_head = nn.Dense(c.vocab_size, use_bias=False, dtype=self.dtype, kernel_init=init)

    def __call__(self, input_ids: jax.Array) -> jax.Array:
        return self._logits(self.hidden(input_ids))

    def hidden(self, input_ids: jax.Array) -> jax.Array:
        """The normalised last hidden state, [batch, tokens, hidden_size] in the compute dtype."""
        return self.norm(self._blocks(self._embed(input_ids), input_ids.shape[1]))

    def decode(self, input_ids: jax.Array, position: jax.Array, length: int, last: Any = None) -> jax.Array:
        """Logits of the tokens from `position` on; keys and values of earlier ones are in the collection `cache`.

        Args:
            position: int [] or [batch].
            length: of the whole sequence when it is done, on which longrope's frequencies depend.
            last: int [batch]: only the logits of this token of each row, [batch, 1, vocab_size].
        """
        x = self.norm(self._blocks(self._embed(input_ids), length, position))
        return self._logits(x if last is None else jnp.take_along_axis(x, last[:, None, None], axis=1))

    def _embed(self, input_ids: jax.Array) -> jax.Array:
        x, scale = self.embed_tokens(input_ids), self.config.embed_scale
        return x if scale == 1 else x * jnp.asarray(scale, x.dtype)

    def _logits(self, x: jax.Array) -> jax.Array:
        logits = self.embed_tokens.attend(x) if self.config.tie_word_embeddings else self.lm_head(x)
        logits, cap = logits.astype(jnp.float32), self.config.logit_softcap
        return logits if cap is None else jnp.tanh(logits / jnp.float32(cap)) * jnp.float32(cap)

    def _blocks(self, x: jax.Array, length: int, position: jax.Array | None = None) -> jax.Array:
        kinds = self.config.kinds(length)

        def run(layer: DecoderLayer, x: jax.Array, kind: LayerKind) -> jax.Array:
            def block(layer: DecoderLayer, x: jax.Array) -> jax.Array:
                return layer(x, kind, position)

            # Inside a scan nothing can be merged across the remat boundary, so the barriers would only cost time.
            return (nn.remat(block, prevent_cse=not self.scan_layers) if self.remat else block)(layer, x)

        if not self.scan_layers:
            for layer, kind in zip(self.layers, kinds, strict=True):
                x = run(layer, x, kind)
            return x
        each = stacked(kinds)
        scanned = nn.scan(
            lambda layer, x, kind: (run(layer, x, kinds[0] if kind is None else kind), None),
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            length=len(kinds),
        )
        return scanned(self.layers, x, each)[0]


def untie(config: DecoderConfig, variables: Mapping[str, Any]) -> tuple[DecoderConfig, dict[str, Any]]:
    """The same model with a head of its own: a copy of the embedding's table, transposed.

    Needed before the last norm's gain can be folded into the head (`transforms.fold_norms`), hence before a rotation.
    """
    if not config.tie_word_embeddings:
        return config, dict(variables)
    params = dict(variables["params"])
    params["lm_head"] = {"kernel": params["embed_tokens"]["embedding"].T}
    return replace(config, tie_word_embeddings=False), {**variables, "params": params}
