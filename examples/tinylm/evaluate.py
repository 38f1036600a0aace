"""How good a language model is, and how far a quantized one is from the model it came from: see jqopt/_evaluate.py."""

from jqopt._evaluate import Comparison, Logits, compare, compare_all, perplexity

__all__ = ["Comparison", "Logits", "compare", "compare_all", "perplexity"]
