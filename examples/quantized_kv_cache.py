"""Generate with a key-value cache that holds packed FP8 and NVFP4: its bytes, and how often the float model agrees."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jqopt
from jqopt.hf import decode, load_model
from jqopt.kv_cache import KVCache

FOLDER = Path(__file__).parent / "tinylm"
PROMPT, STEPS = 64, 64

model, variables = load_model(FOLDER)
text = np.load(FOLDER / "test_tokens.npy")[: 8 * PROMPT].reshape(8, PROMPT).astype(np.int32)
prompt = jnp.asarray(text)  # eight prompts of 64 tokens
batches = [jnp.asarray(np.load(FOLDER / "calib_tokens.npy")[:8, :128].astype(np.int32))]
logits = jax.jit(model.apply)


def show(name, cache):
    """Generates greedily; prints the cache's bytes, and how many tokens are those the float model would have chosen."""
    tokens, cache = decode.generate(model, variables, prompt, STEPS, cache)
    layers = jax.tree.leaves(cache, is_leaf=lambda x: isinstance(x, KVCache))
    packed, bf16 = (sum(f(c) for c in layers) for f in (lambda c: c.nbytes, lambda c: 2 * 2 * np.prod(c.shape)))
    best = jnp.argmax(logits(variables, tokens)[:, PROMPT - 1 : -1], axis=-1)
    share = jnp.mean(best == tokens[:, PROMPT:])
    print(f"{name:12} {packed:>9,} bytes, {packed / bf16:.1%} of bfloat16; the float model agrees on {share:.1%}")


# A plain cast: no calibration, a scale of 1.
show("fp8 cast", decode.init_cache(model, 8, PROMPT + STEPS, {"format": "fp8", "scaling": "cast"}))

# Scales from calibration data, one for each layer's keys and one for its values.
qm = jqopt.quantize_model(model, "defaults/kv_nvfp4", params=variables, batches=batches)
spec, scales = qm.plan.recipe.operands["k"], qm.quant.attention
show("nvfp4 static", decode.init_cache(model, 8, PROMPT + STEPS, spec, scales=scales))
