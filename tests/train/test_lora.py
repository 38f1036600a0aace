"""Adapters over packed weights: zero at first, trained alone, the same as merged weights, in every kind of model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt
from jqopt import train
from tests import zoo


def rules(weight, activation=None) -> dict:
    rule = {"match": "*", "weight": weight, **({"input": activation} if activation else {})}
    return {"schema": 1, "name": "test", "rules": [rule]}


def numbers(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def quantized(model, recipe, params, x):
    return jqopt.quantize_model(model, recipe, params=params, batches=[x])


def moved(adapters):
    """The same adapters with a b that isn't zero."""
    return {p: {"a": ab["a"], "b": 0.1 * numbers(i, *ab["b"].shape)} for i, (p, ab) in enumerate(adapters.items())}


def linear(p, x):
    return x @ p["w"]


def test_the_formula():
    """y = qdot(x) + alpha/r (x a^T) b^T, with x as it is, although the packed product quantizes it."""
    params, x = {"w": numbers(0, 32, 16)}, numbers(1, 4, 32)
    qm = quantized(linear, rules("int8", "int8"), params, x)
    lora = train.lora(qm.plan, 4, alpha=6)
    adapters = moved(lora.init(jax.random.key(0)))
    a, b = adapters["w"]["a"], adapters["w"]["b"]
    assert (a.shape, b.shape) == ((4, 32), (16, 4))
    np.testing.assert_allclose(lora.apply(adapters, qm.quant, x), qm(x) + 6 / 4 * (x @ a.T) @ b.T, rtol=1e-5, atol=1e-5)


MODELS = [
    zoo.Dense,
    pytest.param(zoo.RematScan, marks=pytest.mark.slow),
    zoo.Vmapped,
    zoo.MHA,
    zoo.Ragged,
    zoo.MoEBatched,
]


@pytest.mark.parametrize("cls", MODELS, ids=lambda c: c.__name__)
def test_models(cls):
    """A zero b changes nothing; weight-only, adapters give what the merged float weights give."""
    model, variables, x = zoo.build(cls)
    qm = quantized(model, rules("nvfp4"), variables, x)
    lora = train.lora(qm.plan, 2)
    adapters = lora.init(jax.random.key(0))
    np.testing.assert_array_equal(lora.apply(adapters, qm.quant, x), jqopt.apply(qm.plan)(qm.quant, x))
    adapters = moved(adapters)
    got = lora.apply(adapters, qm.quant, x)
    assert float(jnp.abs(got - qm(x)).max()) > 1e-2
    want = model.apply(lora.merge(adapters, qm.quant), x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(want).max())))
    grads = jax.jit(jax.grad(lambda ad: jnp.sum(jnp.square(lora.apply(ad, qm.quant, x)))))(adapters)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))


def test_gradients_go_to_adapters_alone():
    params, x = {"w": numbers(0, 32, 16), "bias": numbers(1, 16)}, numbers(2, 4, 32)
    qm = quantized(lambda p, x: x @ p["w"] + p["bias"], rules("nvfp4"), params, x)
    lora = train.lora(qm.plan, 2)
    adapters = moved(lora.init(jax.random.key(0)))
    loss = lambda quant: jnp.sum(lora.apply(adapters, quant, x))  # noqa: E731
    with pytest.raises(TypeError, match="uint8"):
        jax.grad(loss)(qm.quant)
    grads = jax.grad(loss, allow_int=True)(qm.quant)
    assert not any(np.any(g != 0) for g in jax.tree.leaves(grads) if g.dtype != jax.dtypes.float0)


def test_no_float_copy_of_the_weights():
    """What a step keeps for the backward pass is of the size of activations: no [n, k] float array is an input."""
    params, x = {"w": numbers(0, 64, 512)}, numbers(1, 4, 64)
    qm = quantized(linear, rules("nvfp4"), params, x)
    floats = [leaf for leaf in jax.tree.leaves(qm.quant) if leaf.dtype == jnp.float32]
    assert sum(leaf.size for leaf in floats) == 1  # the global scale
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(qm.quant)) < 0.16 * params["w"].nbytes


def test_fused_projections_that_the_model_cuts_apart():
    """One kernel for q, k and v, sliced inside: b is cut as the packed rows are."""

    def model(p, x):
        q, k, v = jnp.split(p["qkv"], 3, axis=1)
        return (x @ q) * (x @ k) + x @ v

    params, x = {"qkv": numbers(0, 32, 48) / 4}, numbers(1, 4, 32)
    qm = quantized(model, rules("nvfp4"), params, x)
    lora = train.lora(qm.plan, 3)
    adapters = moved(lora.init(jax.random.key(0)))
    want = model(lora.merge(adapters, qm.quant), x)
    np.testing.assert_allclose(lora.apply(adapters, qm.quant, x), want, rtol=1e-4, atol=1e-4)


def test_inside_a_shard_map():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def sharded(p, x):
        body = lambda x, a, b: jax.lax.psum(jax.nn.relu(x @ a) @ b, "x")  # noqa: E731
        run = jax.shard_map(body, mesh=mesh, in_specs=(spec(), spec(None, "x"), spec("x")), out_specs=spec())
        return run(x, p["a"], p["b"])

    params, x = {"a": numbers(0, 32, 64), "b": numbers(1, 64, 16)}, numbers(2, 4, 32)
    qm = quantized(sharded, rules("nvfp4"), params, x)
    lora = train.lora(qm.plan, 2)
    adapters = moved(lora.init(jax.random.key(0)))
    merged = lora.merge(adapters, qm.quant)
    want = jax.nn.relu(x @ merged["a"]) @ merged["b"]
    np.testing.assert_allclose(
        lora.apply(adapters, qm.quant, x), want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max())
    )


def test_which_weights_have_adapters():
    model, variables, tokens = zoo.build(zoo.Tied)
    qm = quantized(model, rules("nvfp4"), variables, tokens)
    assert train.lora(qm.plan, 2).paths == ("Dense_0/kernel",)  # the embedding is looked up too
    with pytest.raises(jqopt.PlanError, match=r"'Embed\*' matches no quantized weight of a product.*: Dense_0/kernel"):
        train.lora(qm.plan, 2, match="Embed*")
    with pytest.raises(jqopt.UnsupportedError, match="rank 0; write a whole number from 1"):
        train.lora(qm.plan, 0)
    lora = train.lora(qm.plan, 2)
    with pytest.raises(jqopt.PlanError, match=r"expected \['Dense_0/kernel'\]"):
        lora.apply({}, qm.quant, tokens)
