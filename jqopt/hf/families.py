"""The model families whose Hugging Face checkpoints are read, one value each.

To add a family: where `DecoderConfig` can say what it computes, one `Family` here, listed in `FAMILIES`; else its Flax
module in a file of this folder as well.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn

from jqopt.errors import UnsupportedError
from jqopt.hf.config import DecoderConfig, Experts, biases, parse, size, windows
from jqopt.hf.decoder import Decoder
from jqopt.hf.gpt2 import GPT2, GPT2Config


@dataclass(frozen=True)
class Name:
    """One parameter: the checkpoint's tensor and its Flax path, with `{layer}` for the block's number.

    Torch keeps a linear layer's weight as [out, in], Flax its kernel as [in, out]: `transpose` says so. A tensor with
    `{expert}` is one expert's part of a parameter [experts, ...]. `layers`: the blocks that have it; None: all.
    """

    tensor: str
    path: str
    transpose: bool = False
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Place:
    """Where a Flax parameter comes from: one tensor, or one for each index of its leading axes.

    `stack`: sizes of the axes (layers, experts) that tensors are stacked along, () for one tensor; `tensors` are in
    row-major order of it. `transpose`: the last two axes of the parameter are those of the tensor, exchanged.
    """

    path: str
    tensors: tuple[str, ...]
    transpose: bool
    stack: tuple[int, ...] = ()


@dataclass(frozen=True)
class Family:
    """What is to know about a model family.

    `name` is config.json's `model_type`. `parse` reads that file into a configuration with
    `num_hidden_layers`. `build(config, scan_layers, dtype)` gives the Flax module. `names` lists every
    parameter. `copies` maps tensors that a checkpoint may hold besides, to the ones they must equal;
    `derived` are endings of tensor names that hold no parameter and are left unread. `prefix` is a beginning that all
    names of a checkpoint may lack.
    """

    name: str
    parse: Callable[[Mapping[str, Any]], Any]
    build: Callable[[Any, bool, Any], nn.Module]
    names: Callable[[Any], tuple[Name, ...]]
    copies: Callable[[Any], Mapping[str, str]] = field(default=lambda config: {})
    derived: tuple[str, ...] = ()
    prefix: str = ""

    def places(self, config: Any, scan_layers: bool) -> tuple[Place, ...]:
        """Every Flax parameter of the module that `build` gives, and the tensors it is made of."""
        everywhere = tuple(range(config.num_hidden_layers))
        found: list[Place] = []
        for name in self.names(config):
            layers = everywhere if name.layers is None else name.layers
            if "{layer}" not in name.tensor:
                found.append(Place(name.path, (name.tensor,), name.transpose))
            elif scan_layers:
                found.append(_place(name, name.path.replace("_{layer}", ""), config, layers, True))
            else:
                found += [_place(name, name.path.format(layer=n), config, (n,), False) for n in layers]
        return tuple(found)


def _place(name: Name, path: str, config: Any, layers: tuple[int, ...], stacked: bool) -> Place:
    mixed = "{expert}" in name.tensor
    experts = range(config.experts.count if mixed else 1)
    tensors = tuple(name.tensor.format(layer=n, expert=e) for n, e in itertools.product(layers, experts))
    stack = ((len(layers),) if stacked else ()) + ((len(experts),) if mixed else ())
    return Place(path, tensors, name.transpose, stack)


# ------------------------------------------------------------------------------------- names of the decoder


def _linear(tensor: str, path: str, bias: bool, layers: tuple[int, ...] | None = None) -> list[Name]:
    kernel = Name(f"{tensor}.weight", f"{path}/kernel", True, layers)
    return [kernel, Name(f"{tensor}.bias", f"{path}/bias", False, layers)] if bias else [kernel]


_BLOCK, _PATH = "model.layers.{layer}", "layers_{layer}"

_MOE = ("mlp.gate", "mlp.experts.{expert}", ("gate_proj", "up_proj", "down_proj"))
_MIXTRAL = ("block_sparse_moe.gate", "block_sparse_moe.experts.{expert}", ("w1", "w3", "w2"))


def decoder_names(config: DecoderConfig, moe: tuple[str, str, tuple[str, str, str]] = _MOE) -> tuple[Name, ...]:
    """The parameters of a Decoder under the names that Llama gave the tensors; `moe`: those of router and experts."""
    c = config
    attention = ("qkv_proj",) if c.fused else ("q_proj", "k_proj", "v_proj")
    inner = ("gate_up_proj", "down_proj") if c.fused else ("gate_proj", "up_proj", "down_proj")
    dense = tuple(n for n in range(c.num_hidden_layers) if not c.mixes(n))
    mixed = tuple(n for n in range(c.num_hidden_layers) if c.mixes(n))
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if c.sandwich else []
    norms += ["self_attn.q_norm", "self_attn.k_norm"] if c.qk_norm else []
    found = [Name("model.embed_tokens.weight", "embed_tokens/embedding")]
    for m in (*attention, "o_proj"):
        bias = c.o_bias if m == "o_proj" else c.qkv_bias
        found += _linear(f"{_BLOCK}.self_attn.{m}", f"{_PATH}/self_attn/{m}", bias)
    for m in inner if dense else ():
        found += _linear(f"{_BLOCK}.mlp.{m}", f"{_PATH}/mlp/{m}", c.mlp_bias, dense if mixed else None)
    if mixed:
        router, expert, parts = moe
        layers = mixed if dense else None
        found += _linear(f"{_BLOCK}.{router}", f"{_PATH}/mlp/router", False, layers)
        for theirs, ours in zip(parts, _MOE[2], strict=True):
            found += _linear(f"{_BLOCK}.{expert}.{theirs}", f"{_PATH}/mlp/experts/{ours}", False, layers)
    found += [Name(f"{_BLOCK}.{n}.weight", f"{_PATH}/{n.replace('.', '/')}/scale") for n in norms]
    found.append(Name("model.norm.weight", "norm/scale"))
    head = [] if c.tie_word_embeddings else _linear("lm_head", "lm_head", False)
    return (*found, *head)


def _copies(config: DecoderConfig) -> Mapping[str, str]:
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}


def decoder(
    name: str,
    features: Callable[[Mapping[str, Any]], dict[str, Any]],
    defaults: Mapping[str, Any] | None = None,
    names: Callable[[DecoderConfig], tuple[Name, ...]] = decoder_names,
) -> Family:
    """A family that `Decoder` computes: `features` and `defaults` as `jqopt.hf.config.parse` takes them."""
    return Family(
        name=name,
        parse=lambda config: parse(config, features, defaults),
        build=lambda config, scan_layers, dtype: Decoder(config, scan_layers=scan_layers, dtype=dtype),
        names=names,
        copies=_copies,
        derived=(".rotary_emb.inv_freq",),  # transformers before 4.32 saved this table; it follows from the config
    )


# ----------------------------------------------------------------------------------------- the families' facts


def _qwen_windows(config: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen writes a window into every file and means it where `use_sliding_window`, from `max_window_layers` on."""
    if not config.get("use_sliding_window"):
        return {}
    first, layers = config.get("max_window_layers", 28), config["num_hidden_layers"]
    return windows(config, ["full_attention" if n < first else "sliding_attention" for n in range(layers)])


def _qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True, **_qwen_windows(config)}


def _qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"qk_norm": True, **biases({**config, "mlp_bias": False}), **_qwen_windows(config)}


def _every_layer(config: Mapping[str, Any]) -> dict[str, Any]:
    """The window, where one is written, is that of all layers."""
    return windows({**config, "layer_types": None})


def _gemma(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("use_bidirectional_attention"):
        raise UnsupportedError("config.json: use_bidirectional_attention is true; the decoder's attention is causal")
    # The first Gemma files say "gelu" and mean its tanh form, as transformers reads them.
    act = {"gelu": "gelu_pytorch_tanh"}.get(config["hidden_act"], config["hidden_act"])
    scale = config["hidden_size"] ** 0.5
    return {"norm_offset": 1.0, "embed_scale": scale, "hidden_act": act, **biases({**config, "mlp_bias": False})}


def _gemma2(config: Mapping[str, Any]) -> dict[str, Any]:
    every_other = ["full_attention" if n % 2 else "sliding_attention" for n in range(config["num_hidden_layers"])]
    return _later_gemma(config, every_other)


def _gemma3(config: Mapping[str, Any]) -> dict[str, Any]:
    every = config.get("sliding_window_pattern", 6)
    kinds = ["sliding_attention" if (n + 1) % every else "full_attention" for n in range(config["num_hidden_layers"])]
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    theta = local.get("rope_theta") or config.get("rope_local_base_freq") or 10000.0
    return {"qk_norm": True, "local_rope_theta": float(theta), **_later_gemma(config, kinds)}


def _later_gemma(config: Mapping[str, Any], kinds: list[str]) -> dict[str, Any]:
    caps = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
    return {
        **_gemma({**config, "hidden_act": config.get("hidden_activation")}),
        **{ours: float(config[theirs]) for ours, theirs in caps.items() if config.get(theirs) is not None},
        **windows(config, kinds),
        "sandwich": True,
        "query_scale": float(config["query_pre_attn_scalar"]) ** -0.5,
    }


def _mixtral(config: Mapping[str, Any]) -> dict[str, Any]:
    experts = Experts(_experts(config), size(config, "num_experts_per_tok"), size(config, "intermediate_size"))
    return {"experts": experts, **_every_layer(config)}


def _qwen3_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
    mixed = tuple(n not in dense and (n + 1) % step == 0 for n in range(config["num_hidden_layers"]))
    experts = Experts(
        _experts(config), size(config, "num_experts_per_tok"), size(config, "moe_intermediate_size"),
        bool(config.get("norm_topk_prob")), None if all(mixed) else mixed,
    )  # fmt: skip
    window = _every_layer(config) if config.get("use_sliding_window") else {}
    return {"qk_norm": True, "experts": experts, **biases({**config, "mlp_bias": False}), **window}


def _experts(config: Mapping[str, Any]) -> int:
    return size(config, "num_local_experts" if "num_local_experts" in config else "num_experts")


_GEMMA = {"head_dim": 256, "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}
_GEMMA2 = {**_GEMMA, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096}

LLAMA = decoder("llama", biases)
MISTRAL = decoder("mistral", _every_layer, {"sliding_window": 4096})
QWEN2 = decoder("qwen2", _qwen2)
QWEN3 = decoder("qwen3", _qwen3, {"head_dim": 128})
GEMMA = decoder("gemma", _gemma, _GEMMA)
GEMMA2 = decoder(
    "gemma2", _gemma2, {**_GEMMA2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
)  # fmt: skip
GEMMA3 = decoder("gemma3_text", _gemma3, {**_GEMMA2, "rope_theta": 1e6})
PHI3 = decoder("phi3", lambda config: {"fused": True, **_every_layer(config)}, {"rms_norm_eps": 1e-5})
MIXTRAL = decoder(
    "mixtral", _mixtral, {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts_per_tok": 2},
    lambda config: decoder_names(config, _MIXTRAL),
)  # fmt: skip
QWEN3_MOE = decoder("qwen3_moe", _qwen3_moe, {"num_experts_per_tok": 8, "moe_intermediate_size": 768})


def _gpt2_names(config: GPT2Config) -> tuple[Name, ...]:
    block, path = "transformer.h.{layer}", "h_{layer}"
    found = [Name("transformer.wte.weight", "wte/embedding"), Name("transformer.wpe.weight", "wpe/embedding")]
    for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        found += [Name(f"{block}.{m}.weight", f"{path}/{m.replace('.', '/')}/kernel")]
        found += [Name(f"{block}.{m}.bias", f"{path}/{m.replace('.', '/')}/bias")]
    for theirs, ours in (
        (f"{block}.ln_1", f"{path}/ln_1"),
        (f"{block}.ln_2", f"{path}/ln_2"),
        ("transformer.ln_f", "ln_f"),
    ):
        found += [Name(f"{theirs}.weight", f"{ours}/scale"), Name(f"{theirs}.bias", f"{ours}/bias")]
    return (*found, *([] if config.tie_word_embeddings else _linear("lm_head", "lm_head", False)))


GPT2_FAMILY = Family(
    name="gpt2",
    parse=GPT2Config.from_hf,
    build=lambda config, scan_layers, dtype: GPT2(config, scan_layers=scan_layers, dtype=dtype),
    names=_gpt2_names,
    copies=lambda config: {"lm_head.weight": "transformer.wte.weight"} if config.tie_word_embeddings else {},
    derived=(".attn.bias", ".attn.masked_bias"),  # causal masks that old versions saved
    prefix="transformer.",
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3, MIXTRAL, QWEN3_MOE, GPT2_FAMILY
    )
}  # fmt: skip


def find(config: Mapping[str, Any]) -> Family:
    """The family of a parsed config.json. Raises UnsupportedError where there is none."""
    name = config.get("model_type")
    if name in FAMILIES:
        return FAMILIES[name]
    near = difflib.get_close_matches(str(name), FAMILIES, 1)
    raise UnsupportedError(
        f"config.json: model_type is {name!r}; known families are {', '.join(FAMILIES)}"
        + (f" (the nearest is {near[0]})" if near else "")
        + ". To add one, write one Family value in jqopt/hf/families.py: `decoder(name, features, defaults)` where "
        "DecoderConfig can say what it computes, else a Flax module of its own (as jqopt/hf/gpt2.py) with parse, build "
        "and names"
    )
