"""Four-bit activations rounded to nearest, and with feedback: channels make up for the errors of those before them."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import jqopt
from jqopt.hf import load_model

ROOT = pathlib.Path(__file__).parent / "tinylm"
model, variables = load_model(ROOT)
windows = np.load(ROOT / "test_tokens.npy").astype(np.int32)[: 8 * 128].reshape(8, 128)
wanted = jax.nn.log_softmax(jax.jit(model.apply)(variables, windows))


def kl(qm) -> float:
    """KL divergence of the model in floats to this one, nats a token."""
    return float(jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - jax.nn.log_softmax(qm(windows))), -1)))


for channels in (None, 16, 64):
    inputs = {"format": "nvfp4", "scaling": "dynamic"} | ({} if channels is None else {"feedback": channels})
    rule = {"match": "*", "weight": "nvfp4", "input": inputs}
    recipe = {"extends": ["defaults/skip_sensitive"], "rules": [rule]}
    qm = jqopt.quantize_model(model, recipe, params=variables, inputs=windows)
    name = "to nearest" if channels is None else f"feedback over {channels} channels"
    print(f"{name:28} KL {1e3 * kl(qm):.1f}e-3")
