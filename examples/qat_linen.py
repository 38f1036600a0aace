"""Flax Linen: train the tiny language model through NVFP4 weights and inputs, its float self as the teacher (QAD)."""

import sys
from pathlib import Path

import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from tinylm import data, evaluate

import jqopt
from jqopt.hf import load_model

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
model, variables = load_model(Path(__file__).parent / "tinylm", scan_layers=True)
tokens = np.concatenate(list(data.calibration_batches(64, 512))).reshape(64, 4, 128).swapaxes(0, 1).reshape(-1, 4, 128)
plan = jqopt.plan("nvfp4", jqopt.trace(model, variables, tokens[0]))
training = jqopt.train.qat(plan, jqopt.calibrate(plan, variables, tokens[:4]))
params, tx = training.init(variables)["params"], optax.adam(optax.linear_schedule(1e-4, 1e-5, steps))
state = TrainState.create(apply_fn=training.apply, params=params, tx=tx)


@jax.jit
def step(state, teacher, ids):
    """One step of the usual loop."""
    expected = model.apply(teacher, ids)
    loss = lambda params: jqopt.train.distill_loss(state.apply_fn({"params": params}, ids), expected)  # noqa: E731
    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


packed = [training.quantize({"params": state.params})]
for i in range(steps):
    state, value = step(state, variables, tokens[i % len(tokens)])
    print(f"step {i}: loss {value:.4f}", flush=True)
packed.append(training.quantize({"params": state.params}))
run, apply, unseen = jqopt.apply(plan), jax.jit(model.apply), data.windows(256)[700:716]
before, after = (evaluate.compare(lambda x: apply(variables, x), lambda x, q=q: run(q, x), unseen).kl for q in packed)
print(f"KL to the float model on unseen text, packed: {before:.4f} before, {after:.4f} after")
