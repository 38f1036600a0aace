"""A quantized model as a folder that vLLM and transformers load, and such a folder back as a quantized JAX model."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jqopt
from jqopt.hf import load_model

tinylm = Path(__file__).parent / "tinylm"
tokens = jnp.asarray(np.load(tinylm / "calib_tokens.npy").reshape(-1)[: 4 * 128].reshape(4, 128), jnp.int32)

module, variables = load_model(tinylm, scan_layers=True)
qm = jqopt.quantize_model(module, "fp8_kv_fp8", params=variables, batches=[tokens])

with tempfile.TemporaryDirectory() as folder:
    print(jqopt.export(qm, f"{folder}/vllm", source=tinylm))  # config.json, tokenizer and dtype come from the source
    print(jqopt.export(qm, f"{folder}/trt", "modelopt", source=tinylm, engine="tensorrt-llm"))
    for name in ("vllm", "trt"):
        back = jqopt.load_hf(f"{folder}/{name}", scan_layers=True)
        same = jnp.array_equal(jax.jit(lambda x, back=back: back(x))(tokens), jax.jit(lambda x: qm(x))(tokens))
        print(f"{name}: read back, it computes the same: {same}")
