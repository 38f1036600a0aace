"""Flax Linen: quantize a small network to INT8, look at plan and report, run it in both ways, save and load it."""

import tempfile

import jax
import jax.numpy as jnp
from flax import linen as nn

import jqopt

model = nn.Sequential([nn.Dense(512), nn.relu, nn.Dense(256), nn.relu, nn.Dense(10)])
batches = jax.random.normal(jax.random.key(0), (8, 64, 784))  # eight batches of your data
variables = model.init(jax.random.key(1), batches[0])

qm = jqopt.quantize_model(model, "int8", params=variables, batches=batches)
print(qm.plan)
print(qm.report())

x = batches[0]
y = qm(x)  # jitted
expected = model.apply(variables, x)
print(f"relative error of the outputs: {jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected):.2%}")


@jax.jit
def native(variables, x):
    """Your own model.apply, on packed weights."""
    with jqopt.linen.intercept(qm):
        return model.apply(variables, x)


print("the same through model.apply:", bool((native(qm.variables, x) == y).all()))

with tempfile.TemporaryDirectory() as folder:
    jqopt.save(f"{folder}/quantized", qm)
    again = jqopt.load(f"{folder}/quantized", model)
print("the same after save and load:", bool((again(x) == y).all()))
