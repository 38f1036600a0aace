"""What a decoder computes, as data: `config.json` read into a DecoderConfig, one set of facts for all families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from jqopt.errors import UnsupportedError
from jqopt.hf.rope import Rope, RopeScaling, parse_scaling


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(np.float32(1.702).astype(x.dtype) * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jax.numpy.square(jax.nn.relu(x)),
}
"""Activations by Hugging Face's names."""

UNBOUNDED = 2**30
"""A sliding window that hides nothing, where layers with a window and without share one program."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP: each token goes to `per_token` of `count`, weighed by the router.

    `normalize`: weights of the chosen ones are made to sum to 1. `layers`: which blocks have it; None: all.
    """

    count: int
    per_token: int
    width: int
    normalize: bool = True
    layers: tuple[bool, ...] | None = None


class LayerKind(NamedTuple):
    """What may differ from layer to layer without any parameter: a pytree, so that a scan can carry it.

    `window`: how many tokens back (itself included) a token sees; None: all. `frequencies`: [rotary width / 2] radians
    a position. `factor`: of cosines and sines.
    """

    window: Any
    frequencies: Any
    factor: Any


@dataclass(frozen=True)
class DecoderConfig:
    """The facts of `config.json` that matter to the computation, under Hugging Face's names where it has one.

    Attributes:
        rms_norm_eps: added to the mean square. `norm_offset`: norms multiply by `norm_offset + weight` (Gemma: 1).
        local_rope_theta: of layers with a sliding window, where it is another one (Gemma 3).
        partial_rotary_factor: the share of a head's channels that is turned.
        hidden_act: a key of `ACTIVATIONS`.
        qkv_bias, o_bias, mlp_bias: do these projections add a bias?
        qk_norm: RMSNorm over each head's query and key before they are turned.
        fused: q, k, v are one projection, gate and up another (Phi-3).
        sandwich: norms stand after attention and MLP too, before they are added (Gemma 2).
        embed_scale: what embeddings are multiplied by. `query_scale`: what scores are; None: 1 / sqrt(head_dim).
        attention_softcap, logit_softcap: scores and logits are cap * tanh(x / cap).
        sliding_window: how many tokens back a token sees in `sliding_layers` (None: in all).
    """

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
    local_rope_theta: float | None = None
    partial_rotary_factor: float = 1.0
    hidden_act: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused: bool = False
    sandwich: bool = False
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] | None = None
    experts: Experts | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """A `config.json` of the Llama family; other families: `jqopt.hf.families.find(config).parse(config)`.

        Raises UnsupportedError as `parse` does.
        """
        return parse(config, biases)

    @property
    def score_scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    def rope(self, sliding: bool = False) -> Rope:
        """The rotary positions of layers with a sliding window or without."""
        width = int(self.head_dim * self.partial_rotary_factor)
        if sliding and self.local_rope_theta is not None:
            return Rope(width, self.local_rope_theta)
        return Rope(width, self.rope_theta, self.rope_scaling)

    def slides(self, layer: int) -> bool:
        """Has this layer the sliding window?"""
        return self.sliding_window is not None and (self.sliding_layers is None or self.sliding_layers[layer])

    def mixes(self, layer: int) -> bool:
        """Has this layer experts?"""
        return self.experts is not None and (self.experts.layers is None or self.experts.layers[layer])

    def kinds(self, length: int) -> tuple[LayerKind, ...]:
        """What each layer does, in a sequence of `length` tokens. Layers that do the same share one object."""
        both = {s: self._kind(s, length) for s in (False, True)}
        return tuple(both[self.slides(layer)] for layer in range(self.num_hidden_layers))

    def _kind(self, slides: bool, length: int) -> LayerKind:
        rope, window = self.rope(slides), self.sliding_window if slides else None
        if not window or (isinstance(length, int) and window >= length):  # it may reach back as far as there is
            window = None
        return LayerKind(window, rope.frequencies(length), rope.attention_factor)


def stacked(kinds: tuple[LayerKind, ...]) -> LayerKind | None:
    """The kinds of layers as arrays with a leading layer axis, for a scan; None where all do the same."""
    if all(kind is kinds[0] for kind in kinds):
        return None
    windows = np.asarray([UNBOUNDED if k.window is None else k.window for k in kinds], np.int32)
    factors = np.asarray([k.factor for k in kinds], np.float32)
    return LayerKind(windows, np.stack([k.frequencies for k in kinds]), factors)


# -------------------------------------------------------------------------------------------------- reading


def parse(
    config: Mapping[str, Any],
    features: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {},
    defaults: Mapping[str, Any] | None = None,
) -> DecoderConfig:
    """A parsed `config.json` as a DecoderConfig.

    Args:
        features: what the family adds: fields of DecoderConfig, read from the file.
        defaults: the family's values of keys that the file may lack, where they are not those of DecoderConfig.

    Raises:
        UnsupportedError: the file asks for something this decoder does not compute, or lacks a size.
    """
    # A null in the file says "none"; a family's default stands for a key that is not there.
    known = {k: v for k, v in ({"hidden_act": "silu", **(defaults or {})} | dict(config)).items() if v is not None}
    heads, hidden = (size(known, name) for name in ("num_attention_heads", "hidden_size"))
    kv_heads, head_dim = known.get("num_key_value_heads", heads), known.get("head_dim", hidden // heads)
    if heads % kv_heads:
        raise UnsupportedError(
            f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    sizes = {name: size(known, name) for name in ("vocab_size", "intermediate_size", "num_hidden_layers")}
    optional = {name: known[name] for name in _OPTIONAL if name in known}
    facts = {"hidden_act": known.get("hidden_act"), **sizes, **optional, **_rotary(known, head_dim), **features(known)}
    facts["hidden_act"] = activation(facts, "hidden_act")
    return DecoderConfig(
        hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, **facts
    )


_OPTIONAL = ("rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")


def size(config: Mapping[str, Any], name: str) -> int:
    """A positive whole number. Raises UnsupportedError where it is none."""
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise UnsupportedError(f"config.json: {name} is {value!r}; expected a positive whole number")
    return value


def activation(config: Mapping[str, Any], name: str) -> str:
    """The name of an activation. Raises UnsupportedError where it is not known."""
    value = config.get(name)
    if value not in ACTIVATIONS:
        raise UnsupportedError(
            f"config.json: {name} is {value!r}; known are {', '.join(ACTIVATIONS)}. To add one, write one line in "
            "ACTIVATIONS of jqopt/hf/config.py"
        )
    return value


def biases(config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama's: `attention_bias` on all four projections of attention, `mlp_bias`."""
    attention = bool(config.get("attention_bias"))
    return {"qkv_bias": attention, "o_bias": attention, "mlp_bias": bool(config.get("mlp_bias"))}


def windows(config: Mapping[str, Any], types: list[str] | None = None) -> dict[str, Any]:
    """`sliding_window`, and which layers have it: `layer_types`, else `types`, else all.

    Raises UnsupportedError for other types than full and sliding.
    """
    if config.get("sliding_window") is None:
        return {}
    window, found = size(config, "sliding_window"), config.get("layer_types") or types
    for kind in found or []:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedError(
                f"config.json: layer_types has {kind!r}; known are full_attention and sliding_attention"
            )
    layers = None if found is None else tuple(kind == "sliding_attention" for kind in found)
    if layers is not None and len(layers) != config["num_hidden_layers"]:
        raise UnsupportedError(
            f"config.json: layer_types has {len(layers)} entries for {config['num_hidden_layers']} layers"
        )
    return {"sliding_window": window, "sliding_layers": layers}


def _rotary(config: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Rotary settings: transformers 5 writes one table `rope_parameters`, earlier versions several keys."""
    table = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if "full_attention" in table or "sliding_attention" in table:  # a table for each type of layer
        _check_local(table.get("sliding_attention") or {})
        table = {**(config.get("rope_scaling") or {}), **(table.get("full_attention") or {})}
    for name in ("rope_theta", "partial_rotary_factor", "max_position_embeddings"):
        if name in config:
            table.setdefault(name, config[name])
    original = config.get("original_max_position_embeddings")
    if original is not None:
        table["original_max_position_embeddings"] = original
    kind = table.get("rope_type", table.get("type"))
    if kind in ("yarn", "longrope") and "max_position_embeddings" in table:
        table.setdefault("original_max_position_embeddings", table["max_position_embeddings"])
    share = float(table.get("partial_rotary_factor", 1.0))
    if int(head_dim * share) % 2:
        raise UnsupportedError(
            f"config.json: head_dim {head_dim} and partial_rotary_factor {share} turn {int(head_dim * share)} channels "
            "of a head; expected an even number"
        )
    return {
        "rope_theta": float(table.get("rope_theta", 10000.0)),
        "rope_scaling": parse_scaling(table, int(head_dim * share)),
        "partial_rotary_factor": share,
    }


def _check_local(table: Mapping[str, Any]) -> None:
    kind = table.get("rope_type", "default")
    if kind != "default":
        raise UnsupportedError(
            f"config.json: rope_parameters.sliding_attention has rotary scaling {kind!r}; only full_attention may "
            "have one"
        )
