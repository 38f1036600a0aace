"""Tiny models of every family and setting that `jqopt.hf` computes, as transformers' configurations; data only."""

from typing import Any

TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = TINY | {"head_dim": 8}  # not hidden_size / num_attention_heads: the projections are not square
GPT2 = {
    "vocab_size": 40,
    "n_positions": 32,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 2.0, 4.0]}
MIX = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}


def rope(theta: float = 100.0, **more: Any) -> dict[str, Any]:
    """Rotary settings with a theta small enough that all channels turn within a few tokens."""
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default", **more}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # one model of each family, committed with its logits (golden/)
    "llama": ("Llama", WIDE | rope(**LLAMA3, original_max_position_embeddings=8)),
    "mistral": ("Mistral", WIDE | rope() | {"sliding_window": 5}),
    "qwen2": ("Qwen2", TINY | rope() | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", WIDE | rope() | {"tie_word_embeddings": True}),
    "gemma": ("Gemma", WIDE | rope() | {"num_key_value_heads": 1}),
    "gemma2": ("Gemma2", WIDE | rope() | {"sliding_window": 4, "query_pre_attn_scalar": 6,
                                          "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3_text": ("Gemma3Text", WIDE | {"sliding_window": 4, "query_pre_attn_scalar": 6, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}},
        "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("Phi3", TINY | rope() | {"sliding_window": 6}),
    "mixtral": ("Mixtral", TINY | rope() | {"num_local_experts": 4, "intermediate_size": 20}),
    "qwen3_moe": ("Qwen3Moe", WIDE | rope() | MIX | {"norm_topk_prob": True}),
    "gpt2": ("GPT2", GPT2),
    # further settings, compared with transformers itself
    "llama_linear_bias": ("Llama", TINY | rope(rope_type="linear", factor=3.0) | {"attention_bias": True,
                                                                                   "mlp_bias": True}),
    "llama_yarn": ("Llama", WIDE | rope(**YARN)),
    "llama_yarn_betas": ("Llama", WIDE | rope(**YARN, beta_fast=4.0, beta_slow=0.5, truncate=False, mscale=1.2,
                                              mscale_all_dim=0.7)),
    "llama_act_mqa": ("Llama", TINY | rope() | {"hidden_act": "gelu", "num_key_value_heads": 1,
                                                "tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "mistral_full": ("Mistral", TINY | rope() | {"sliding_window": None, "num_key_value_heads": 4}),
    "qwen2_yarn": ("Qwen2", TINY | rope(**YARN, attention_factor=1.3)),
    "qwen3_bias": ("Qwen3", WIDE | rope() | {"attention_bias": True, "use_sliding_window": True, "sliding_window": 3,
                                             "max_window_layers": 0}),
    "gemma_bias": ("Gemma", WIDE | rope() | {"attention_bias": True, "hidden_act": "gelu"}),
    "gemma2_no_caps": ("Gemma2", WIDE | rope() | {"num_hidden_layers": 3, "sliding_window": 3,
                                                  "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3_pattern": ("Gemma3Text", WIDE | {"num_hidden_layers": 7, "sliding_window": 3}),
    "phi3_long": ("Phi3", TINY | rope(**LONGROPE) | {"original_max_position_embeddings": 8}),
    "phi3_short": ("Phi3", TINY | rope(**LONGROPE) | {"original_max_position_embeddings": 32}),
    "phi3_partial": ("Phi3", WIDE | {"hidden_size": 32} | rope(partial_rotary_factor=0.5)),
    "mixtral_window": ("Mixtral", TINY | rope() | {"num_local_experts": 3, "num_experts_per_tok": 1,
                                                   "intermediate_size": 20, "sliding_window": 4}),
    "qwen3_moe_mixed": ("Qwen3Moe", WIDE | rope() | MIX | {"num_hidden_layers": 4, "decoder_sparse_step": 2,
                                                           "mlp_only_layers": [3], "attention_bias": True}),
    "gpt2_act": ("GPT2", GPT2 | {"n_inner": 30, "activation_function": "relu", "scale_attn_weights": False,
                                 "tie_word_embeddings": False}),
}  # fmt: skip
"""{name: (transformers' class without `Config` or `ForCausalLM`, its configuration)}."""

GOLDEN = tuple(CASES)[:11]
"""The cases whose checkpoint and logits are committed."""

UNEVEN = ("qwen3_moe_mixed",)
"""Layers of which cannot be stacked for a scan."""
