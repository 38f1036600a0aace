"""Flax NNX: quantize a module with a recipe written in Python, and put quantized layers into the module."""

import jax
import jax.numpy as jnp
from flax import nnx

import jqopt

model = nnx.Sequential(nnx.Linear(784, 512, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(512, 10, rngs=nnx.Rngs(1)))
x = jax.random.normal(jax.random.key(0), (64, 784))

recipe = {
    "schema": 1,
    "name": "int8_then_fp8",
    "rules": [  # the first rule that matches decides
        {"match": "layers/0/*", "weight": "int8", "input": {"format": "int8", "granularity": "token"}},
        {"match": "*", "weight": "fp8", "input": {"format": "fp8", "scaling": "dynamic"}},
    ],
}
qm = jqopt.quantize_model(model, recipe, inputs=x)  # live scales need no calibration data, only shapes
print(qm.plan)
print(qm.report())

y = qm(x)
print(f"relative error of the outputs: {jnp.linalg.norm(y - model(x)) / jnp.linalg.norm(model(x)):.2%}")

quantized = jqopt.nnx.quantize(model, qm)  # an NNX module again
print("the same as a module:", bool(jnp.allclose(nnx.jit(lambda m, x: m(x))(quantized, x), y, atol=1e-5)))
