"""The model families whose Hugging Face checkpoints are read, one value each.

To add a family: write its Flax module in a file of this folder, then one `Family` here, listed in `FAMILIES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn

from jqopt.errors import UnsupportedError
from jqopt.hf.llama import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Name:
    """One parameter: the checkpoint's tensor and its Flax path, with `{layer}` for the block's number.

    Torch keeps a linear layer's weight as [out, in], Flax its kernel as [in, out]: `transpose` says so.
    """

    tensor: str
    path: str
    transpose: bool = False


@dataclass(frozen=True)
class Place:
    """Where a Flax parameter comes from: one tensor, or one a layer to be stacked along a new first axis."""

    path: str
    tensors: tuple[str, ...]
    transpose: bool
    stacked: bool


@dataclass(frozen=True)
class Family:
    """What is to know about a model family.

    `name` is config.json's `model_type`. `parse` reads that file into a configuration with
    `num_hidden_layers`. `build(config, scan_layers, dtype)` gives the Flax module. `names` lists every
    parameter. `copies` maps tensors that a checkpoint may hold besides, to the ones they must equal;
    `derived` are endings of tensor names that hold no parameter and are left unread.
    """

    name: str
    parse: Callable[[Mapping[str, Any]], Any]
    build: Callable[[Any, bool, Any], nn.Module]
    names: Callable[[Any], tuple[Name, ...]]
    copies: Callable[[Any], Mapping[str, str]] = field(default=lambda config: {})
    derived: tuple[str, ...] = ()

    def places(self, config: Any, scan_layers: bool) -> tuple[Place, ...]:
        """Every Flax parameter of the module that `build` gives, and the tensors it is made of."""
        numbers = range(config.num_hidden_layers)
        found: list[Place] = []
        for name in self.names(config):
            if "{layer}" not in name.tensor:
                found.append(Place(name.path, (name.tensor,), name.transpose, False))
            elif scan_layers:
                tensors = tuple(name.tensor.format(layer=number) for number in numbers)
                found.append(Place(name.path.replace("_{layer}", ""), tensors, name.transpose, True))
            else:
                for number in numbers:
                    tensors = (name.tensor.format(layer=number),)
                    found.append(Place(name.path.format(layer=number), tensors, name.transpose, False))
        return tuple(found)


def _llama_names(config: LlamaConfig) -> tuple[Name, ...]:
    block, path = "model.layers.{layer}", "layers_{layer}"
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    matrices = [*attention, *(f"mlp.{part}_proj" for part in ("gate", "up", "down"))]
    norms = ["input_layernorm", "post_attention_layernorm"]
    head = () if config.tie_word_embeddings else (Name("lm_head.weight", "lm_head/kernel", True),)
    return (
        Name("model.embed_tokens.weight", "embed_tokens/embedding"),
        *(Name(f"{block}.{m}.weight", f"{path}/{m.replace('.', '/')}/kernel", True) for m in matrices),
        *(Name(f"{block}.{n}.weight", f"{path}/{n}/scale") for n in norms),
        Name("model.norm.weight", "norm/scale"),
        *head,
    )


def _llama_copies(config: LlamaConfig) -> Mapping[str, str]:
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}


LLAMA = Family(
    name="llama",
    parse=LlamaConfig.from_hf,
    build=lambda config, scan_layers, dtype: LlamaForCausalLM(config, scan_layers=scan_layers, dtype=dtype),
    names=_llama_names,
    copies=_llama_copies,
    derived=(".rotary_emb.inv_freq",),  # transformers before 4.32 saved this table; it follows from the config
)

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA,)}


def find(config: Mapping[str, Any]) -> Family:
    """The family of a parsed config.json. Raises UnsupportedError where there is none."""
    name = config.get("model_type")
    if name in FAMILIES:
        return FAMILIES[name]
    raise UnsupportedError(
        f"config.json: model_type is {name!r}; known families are {', '.join(FAMILIES)}. To add one, "
        "write its Flax module and one Family value (parse, build, names) in jqopt/hf/families.py"
    )
