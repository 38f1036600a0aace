"""Rotations: outlier channels are spread over all channels, the float model stays as it is, INT8 inputs lose less."""

import jax
import jax.numpy as jnp

import jqopt
from jqopt import transforms


def norm(x, gain):
    """RMSNorm."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True)) * gain


def model(params, tokens):
    """A residual stream: four MLPs in a scan, each after an RMSNorm."""
    mlp = lambda x, p: (x + jax.nn.silu(norm(x, p["gain"]) @ p["up"]) @ p["down"], None)  # noqa: E731
    return norm(jax.lax.scan(mlp, params["table"][tokens], params["mlp"])[0], params["gain"]) @ params["head"]


keys = jax.random.split(jax.random.key(0), 5)
loud = jnp.where(jnp.arange(256) % 100 == 7, 100.0, 1.0)  # three channels of 256 are a hundred times the others
up, down = jax.random.normal(keys[0], (4, 256, 512)) / 16, jax.random.normal(keys[1], (4, 512, 256)) / 22
params = {
    "table": jax.random.normal(keys[2], (1000, 256)) * loud,
    "mlp": {"gain": 11 * jnp.ones((4, 256)), "up": up / loud[:, None], "down": down},
    "gain": 11 * jnp.ones(256),
    "head": jax.random.normal(keys[3], (256, 100)) / 16 / loud[:, None],
}
tokens = jax.random.randint(keys[4], (8, 32), 0, 1000)

graph = jqopt.trace(model, params, tokens)
folded = transforms.fold_norms(graph)(params)  # the gains move into the weights that follow
rotated = transforms.rotate_residual(graph, seed=0)(folded)
expected = model(params, tokens)
for name, p in (("as it was", params), ("rotated", rotated)):
    y = jqopt.quantize_model(model, "int8_per_token", params=p, inputs=tokens)(tokens)
    change = jnp.abs(model(p, tokens) - expected).max() / jnp.abs(expected).max()
    error = jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)
    print(f"{name}: float change {change:.0e}, INT8 error {error:.1%}")
