"""The Llama family's names for the decoder: `LlamaConfig`, `LlamaForCausalLM` and what they are made of."""

from jqopt.hf.attention import causal_attention
from jqopt.hf.config import DecoderConfig as LlamaConfig
from jqopt.hf.decoder import Decoder as LlamaForCausalLM
from jqopt.hf.decoder import untie
from jqopt.hf.rope import RopeScaling, rope_frequencies, rotate

__all__ = ["LlamaConfig", "LlamaForCausalLM", "RopeScaling", "causal_attention", "rope_frequencies", "rotate", "untie"]
