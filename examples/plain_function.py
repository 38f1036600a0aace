"""No framework: quantize a function of a parameter tree, step by step; every step is a value you can look at."""

import jax
import jax.numpy as jnp

import jqopt


def model(params, x):
    """Layers that a scan runs, then a head."""
    x, _ = jax.lax.scan(lambda x, w: (x + jax.nn.gelu(x @ w), None), x, params["layers"])
    return x @ params["head"]


keys = jax.random.split(jax.random.key(0), 3)
params = {
    "layers": jax.random.normal(keys[0], (6, 256, 256)) / 16,  # six layers, stacked
    "head": jax.random.normal(keys[1], (256, 1000)) / 16,
}
batches = jax.random.normal(keys[2], (4, 32, 256))

graph = jqopt.trace(model, params, batches[0])  # shapes only
plan = jqopt.plan("nvfp4", graph)
stats = jqopt.calibrate(plan, params, batches)
quant = jqopt.quantize(plan, params, stats)
run = jqopt.apply(plan)  # pure: jit, grad, vmap or shard it

print(graph)
print(plan)
print("largest activation of each layer:", stats["layers"]["amax"].amax)
print("the layers, packed:", quant.params["layers"])
y, expected = run(quant, batches[0]), model(params, batches[0])
print(f"relative error of the outputs: {jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected):.1%}")
