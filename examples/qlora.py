"""QLoRA: the tiny language model in INT4 learns to read backwards; only low-rank adapters are trained."""

import sys
from pathlib import Path

import jax
import optax
from flax.training.train_state import TrainState
from tinylm import data

import jqopt
from jqopt.hf import load_model

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
model, variables = load_model(Path(__file__).parent / "tinylm", scan_layers=True)
[text], unseen = data.calibration_batches(64, 512, 64), data.windows(128, 8)[:, ::-1]
backwards = text[:, ::-1].reshape(-1, 4, 128)
qm = jqopt.quantize_model(model, "int4_block_weight_only", params=variables, inputs=backwards[0])
lora = jqopt.train.lora(qm.plan, rank=16, alpha=32)
state = TrainState.create(apply_fn=lora.apply, params=lora.init(jax.random.key(0)), tx=optax.adam(3e-3))
print(sum(x.size for x in jax.tree.leaves(state.params)), "values beside", len(lora.paths), "packed weights")


def loss(adapters, quant, ids):
    """Nats for each next token."""
    return optax.softmax_cross_entropy_with_integer_labels(lora.apply(adapters, quant, ids[:, :-1]), ids[:, 1:]).mean()


@jax.jit
def step(state, quant, ids):
    """One step of the usual loop; the packed weights take no gradient."""
    value, grads = jax.value_and_grad(loss)(state.params, quant, ids)
    return state.apply_gradients(grads=grads), value


before = loss(state.params, qm.quant, unseen)
for i in range(steps):
    state, value = step(state, qm.quant, backwards[i % len(backwards)])
    print(f"step {i}: loss {value:.3f}", flush=True)
print(f"loss on unseen text: {before:.3f} before, {loss(state.params, qm.quant, unseen):.3f} after")
