"""Name maps of Flax models that many use: the NNX decoders of Tunix and Bonsai, with layers apart or stacked.

    family, config = jqopt.hf.load_config(folder)
    state = maps.tunix(config).load(nnx.state(model, nnx.Param), folder)
    nnx.update(model, state)

Layouts: `q_proj` [D, N, H], `o_proj` [N, H, D], `mlp/*/kernel` [in, out], `lm_head` [D, V].
"""

from __future__ import annotations

from collections.abc import Callable

from jqopt.hf.config import DecoderConfig
from jqopt.hf.names import NameMap, Rule


def tunix(config: DecoderConfig, *, stacked: bool = False) -> NameMap:
    """Tunix's Llama3 and Qwen3 (0.1.7), dense or with experts; `stacked`: one block whose leaves have a layer axis."""
    return _map(config, "w", "w", "input_embedding", "w", stacked)


def bonsai(config: DecoderConfig, *, stacked: bool = False) -> NameMap:
    """Bonsai's Qwen3: as Tunix's with other names of the leaves; a tied head is there twice, and is no parameter here.

    Leave `lm_head/kernel` of a tied model out of the tree, and set it to the embedding's transpose afterwards.
    """
    return _map(config, "kernel", "scale", "embedding", "kernel", stacked)


def _map(c: DecoderConfig, matrix: str, gain: str, table: str, head: str, stacked: bool) -> NameMap:
    """Dense blocks of attention and gated MLP; query and key norms and experts where the configuration has them."""
    block, theirs = "layers" if stacked else "layers/{layer}", "model.layers.{layer}"
    lead = "layer " if stacked else ""

    def rule(path: str, tensor: str, left: str, right: str) -> Rule:
        return Rule(f"{block}/{path}", f"{theirs}.{tensor}.weight", f"{left} -> {lead}{right}")

    heads = {"q": "n", "k": "kv", "v": "kv"}
    norms = ["input_layernorm", "post_attention_layernorm"]
    rules = [
        Rule(f"embedder/{table}", "model.embed_tokens.weight", "v d -> v d"),
        Rule(f"final_norm/{gain}", "model.norm.weight", "d -> d"),
        *(rule(f"attn/{x}_proj/{matrix}", f"self_attn.{x}_proj", f"({n} h) d", f"d {n} h") for x, n in heads.items()),
        rule(f"attn/o_proj/{matrix}", "self_attn.o_proj", "d (n h)", "n h d"),
        *(rule(f"{n}/{gain}", n, "d", "d") for n in norms),
        *(rule(f"attn/{x}_norm/{gain}", f"self_attn.{x}_norm", "h", "h") for x in ("qk" if c.qk_norm else "")),
        *_inner(c, rule),
    ]
    if not c.tie_word_embeddings:
        rules.append(Rule(f"lm_head/{head}", "lm_head.weight", "v d -> d v"))
    copies = {"lm_head.weight": "model.embed_tokens.weight"} if c.tie_word_embeddings else {}
    sizes = {"n": c.num_attention_heads, "kv": c.num_key_value_heads, "h": c.head_dim, "d": c.hidden_size}
    return NameMap(tuple(rules), sizes, copies)


def _inner(c: DecoderConfig, rule: Callable[[str, str, str, str], Rule]) -> list[Rule]:
    """What stands after attention: a gated MLP, or a router and experts that are stacked in one array each."""
    parts = ("gate_proj", "up_proj", "down_proj")
    if c.experts is None:
        return [rule(f"mlp/{p}/kernel", f"mlp.{p}", "out in", "in out") for p in parts]
    router = rule("mlp/router/kernel", "mlp.gate", "out in", "in out")
    return [router, *(rule(f"mlp/{p}", f"mlp.experts.{{expert}}.{p}", "out in", "expert in out") for p in parts)]
