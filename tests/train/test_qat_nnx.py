"""Training an NNX module through its quantizers: nnx.Optimizer, nnx.value_and_grad, state, modes, packing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jqopt
from jqopt import train

pytestmark = pytest.mark.slow


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(32, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.last = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


def data():
    x = jax.random.normal(jax.random.key(0), (64, 32))
    return x, jnp.tanh(x[:, :4] * 2)


@pytest.mark.parametrize("recipe", ["int8", "nvfp4"])
def test_the_users_loop(recipe):
    model, (x, y) = Network(nnx.Rngs(0)), data()
    kinds = nnx.Any(nnx.Param, nnx.BatchStat)
    before = jax.tree.map(jnp.copy, nnx.state(model, kinds))
    plan = jqopt.plan(recipe, jqopt.trace(model, x))
    stats = jqopt.calibrate(plan, model, [x])
    training = train.qat(plan, stats, learn_scales="both" if recipe == "int8" else "weights")
    module = train.QuantizedTraining(model, training)

    @nnx.jit
    def step(module, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(jnp.square(m(x) - y)))(module)
        optimizer.update(module, grads)
        return loss

    with jax.numpy_dtype_promotion("standard"):  # optax.adam wants it
        optimizer = nnx.Optimizer(module, optax.adam(3e-3), wrt=nnx.Param)
        losses = [float(step(module, optimizer)) for _ in range(25)]
    assert losses[-1] < 0.7 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model, kinds))  # the caller's module is as it was
    assert float(jnp.abs(module.model.norm.mean[...]).max()) > 0  # batch statistics are kept
    assert int(module.model.drop.rngs.count[...]) == 25
    first, moved = training.first_scales(plan.function.tree(model)), nnx.state(module, nnx.Param)["scales"]
    assert len(jax.tree.leaves(first)) == len(jax.tree.leaves(moved)) == (4 if recipe == "int8" else 2)

    module.eval()
    qm = module.convert(model)
    want = module(x)
    np.testing.assert_allclose(qm(x), want, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(module(x), want)  # no dropout any more
    quantized = jqopt.nnx.quantize(module.model, qm)
    np.testing.assert_allclose(quantized(x), want, rtol=0, atol=1e-4)


def test_functional_twin():
    model, (x, _) = nnx.Linear(32, 16, rngs=nnx.Rngs(0)), data()
    plan = jqopt.plan("nvfp4_weight_only", jqopt.trace(model, x))
    training = train.qat(plan, learn_scales="weights")
    params = training.init(model)
    assert set(params) == {"params", "state", "quantizers"}
    want = jqopt.apply(plan, simulate=True)(jqopt.quantize(plan, model), x)
    np.testing.assert_array_equal(training.apply(params, x), want)
    np.testing.assert_array_equal(train.QuantizedTraining(model, training)(x), want)
    np.testing.assert_allclose(training.convert(model, params)(x), want, rtol=0, atol=1e-4)


def test_refusals():
    x = jnp.ones((2, 16))
    params = {"w": jnp.ones((16, 16))}
    plan = jqopt.plan("nvfp4_weight_only", jqopt.trace(lambda p, x: x @ p["w"], params, x))
    with pytest.raises(jqopt.UnsupportedError, match="is no NNX module.*use training.apply"):
        train.QuantizedTraining(nnx.Linear(16, 16, rngs=nnx.Rngs(0)), train.qat(plan))

    class Maker(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(16, 16, rngs=nnx.Rngs(0))

        def __call__(self, x):
            y = self.layer(x)
            self.seen = nnx.Variable(y)
            return y

    plan = jqopt.plan("nvfp4_weight_only", jqopt.trace(Maker(), x))
    with pytest.raises(jqopt.UnsupportedError, match="makes new state in this call"):
        train.QuantizedTraining(Maker(), train.qat(plan))(x)
