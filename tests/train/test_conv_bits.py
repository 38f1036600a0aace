"""Bits of convolutions trained in low precision: of a dense layer, under scan and remat, on eight devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jqopt import train
from tests.arrays import normal
from tests.train.images import KEY, conv, gradients, recipe


@pytest.mark.slow
def test_one_tap_is_a_dense_layer():
    """y, dw and dx of a 1x1 convolution have the bits of x @ w, with the Hadamard transform and random numbers."""
    x, w, dy = normal(0, (2, 4, 4, 32)), normal(1, (32, 48)), normal(2, (2, 4, 4, 48))
    found = []
    for model in (lambda p, x: conv()({"w": p["w"][None, None]}, x), lambda p, x: x @ p["w"]):
        prepared = train.prepare(model, recipe("nvfp4"), {"w": w}, x)
        found.append(jax.jit(functools.partial(gradients, prepared))({"w": w}, x, dy))
    jax.tree.map(np.testing.assert_array_equal, *found)


def stacked(policy=None, remat=False):
    """Three layers in a scan."""

    def body(h, w):
        return jnp.tanh(conv()({"w": w}, h)), None

    step = jax.checkpoint(body, policy=policy, prevent_cse=False) if remat else body
    return lambda p, x: lax.scan(step, x, p["w"])[0]


@pytest.fixture(scope="module")
def layers():
    return {"w": normal(0, (3, 3, 1, 16, 16), jnp.bfloat16) / 8}, normal(1, (2, 6, 4, 16), jnp.bfloat16)


def step(prepared, x):
    return jax.jit(jax.grad(lambda p, k: jnp.mean(jnp.square(prepared.apply(p, x, quant_key=k)).astype(jnp.float32))))


@pytest.mark.slow
def test_keys_scan_and_remat(layers):
    """Same key, same bits, also under remat; another key, others. With the policy nothing is quantized twice."""
    params, x = layers
    grads, rounds = {}, {}
    for name, policy in (("none", None), ("policy", train.remat_policy), ("plain", None)):
        prepared = train.prepare(stacked(policy, name != "none"), recipe("nvfp4"), params, x)
        compiled = step(prepared, x).lower(params, KEY).compile()
        rounds[name] = compiled.as_text().count(" round-nearest-even(")
        grads[name] = compiled(params, KEY)["w"]
        if name == "none":
            np.testing.assert_array_equal(compiled(params, KEY)["w"], grads[name])
            assert bool((compiled(params, jax.random.key(8))["w"] != grads[name]).any())
    assert rounds["none"] == rounds["policy"] < rounds["plain"]
    np.testing.assert_array_equal(grads["none"], grads["policy"])
    np.testing.assert_array_equal(grads["none"], grads["plain"])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["auto", "explicit", "shard_map"])
def test_eight_devices_give_the_numbers_of_one(way):
    """The batch cut in eight: the same codes and random numbers, hence y to the bit; sums of dw in another order."""
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    scale = jnp.exp2(jnp.arange(8.0))[:, None, None, None]  # a device's largest value is not the whole's
    x, w, dy = normal(0, (8, 4, 4, 16)) * scale, normal(1, (3, 3, 16, 16)), normal(2, (8, 4, 4, 16)) / scale
    one = train.prepare(conv(), recipe("nvfp4"), {"w": w}, x)
    want = jax.jit(functools.partial(gradients, one))({"w": w}, x, dy)
    model, cut = conv(), NamedSharding(mesh, P("data"))
    if way == "shard_map":
        inside = jax.shard_map(lambda w, x: conv()({"w": w}, x), mesh=mesh, in_specs=(P(), P("data")),
                               out_specs=P("data"))  # fmt: skip
        model = lambda p, x: inside(p["w"], x)  # noqa: E731
    placed = {"w": jax.device_put(w, NamedSharding(mesh, P()))}, jax.device_put(x, cut), jax.device_put(dy, cut)
    with jax.set_mesh(mesh):
        got = jax.jit(functools.partial(gradients, train.prepare(model, recipe("nvfp4"), *placed[:2])))(*placed)
    assert got[0].sharding.spec[0] == "data"
    np.testing.assert_array_equal(got[0], want[0])
    for a, b in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * float(jnp.abs(b).max()))
