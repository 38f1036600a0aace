"""Flax NNX: train a module through INT4 weights and INT8 inputs with learned scales (LSQ), then pack it."""

import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jqopt

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
model = nnx.Sequential(nnx.Linear(64, 128, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(128, 16, rngs=nnx.Rngs(1)))
hidden = jax.random.normal(jax.random.key(0), (8, 64))  # data of 64 features that vary in 8 directions
x, unseen, *batches = jax.random.normal(jax.random.key(1), (steps + 2, 512, 8)) @ hidden
weight = {"format": "int4", "granularity": "channel"}
recipe = {"schema": 1, "name": "w4a8", "rules": [{"match": "*", "weight": weight, "input": "int8"}]}
plan = jqopt.plan(recipe, jqopt.trace(model, x))
training = jqopt.train.qat(plan, jqopt.calibrate(plan, model, [x]), learn_scales="both")
module = jqopt.train.QuantizedTraining(model, training)
optimizer = nnx.Optimizer(module, optax.adam(1e-3), wrt=nnx.Param)


@nnx.jit
def step(module, optimizer, x, y):
    """One step of the usual loop."""
    value, grads = nnx.value_and_grad(lambda module: jnp.mean(jnp.square(module(x) - y)))(module)
    optimizer.update(module, grads)
    return value


before = jnp.mean(jnp.square(module.convert(model)(unseen) - model(unseen)))
for i, x in enumerate(batches):
    value = step(module, optimizer, x, model(x))
    print(f"step {i}: loss {value:.5f}", flush=True)
after = jnp.mean(jnp.square(module.convert(model)(unseen) - model(unseen)))
print(f"error on unseen inputs, packed: {before:.5f} before, {after:.5f} after")
