"""Sites that read one array share its quantized copies: the same bits, kept once; where they can't, none is shared."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jqopt
from jqopt import train
from jqopt.train import _low_ops

KEY = jax.random.key(3)
LAYERS, ROWS, WIDTH, OUT = 3, 32, 64, 48


def numbers(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


PARAMS = {
    "first": numbers(0, LAYERS, WIDTH, WIDTH) / 8,
    "second": numbers(1, LAYERS, WIDTH, WIDTH) / 8,
    "turned": numbers(2, LAYERS, ROWS, WIDTH) / 8,
}
X = numbers(3, ROWS, WIDTH)


def recipe(name: str, **more) -> dict:
    shipped = jqopt.load_recipe(f"train/{name}").train
    assert shipped is not None
    section = {**shipped.to_dict(), **more}
    if "backward" in more:  # gradients stay in high precision
        del section["grad"]
    return {"name": "mine", "rules": [{"match": "*", "weight": "nvfp4"}], "train": section}


def model(apart: bool, remat: bool = False):
    """Layers that read x twice as it lies, and once along its other axis; `apart`: each of them its own copy of x."""
    own = jax.lax.optimization_barrier if apart else lambda x: x

    def body(x, w):
        first, second = own(x) @ w["first"], own(x) @ w["second"]
        turned = jax.lax.dot_general(own(x), w["turned"], (((0,), (0,)), ((), ())))  # x^T w
        return jnp.tanh(first * second + x @ turned), None

    if remat:
        body = jax.checkpoint(body, prevent_cse=False, policy=train.remat_policy)
    return lambda p, x: jax.lax.scan(body, x, p)[0]


def gradient(its, how, params=PARAMS, x=X):
    prepared = train.prepare(its, how, params, x)
    state = prepared.init_state()
    loss = lambda p, x, s: jnp.mean(jnp.square(prepared.apply(p, x, quant_key=KEY, quant_state=s)))  # noqa: E731
    return jax.grad(loss, argnums=(0, 1, 2)), (params, x, state)


def found(its, how):
    grad, given = gradient(its, how)
    return jax.jit(grad)(*given)


def equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def made(monkeypatch) -> list:
    """How x was made of what it reads, for each time that copies were made to be shared."""
    seen = []
    right = _low_ops.copies
    monkeypatch.setattr(_low_ops, "copies", lambda how, x: seen.append(x.shape) or right(how, x))
    return seen


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("nvfp4", {}),
        ("mxfp8", {}),
        ("fp8_block", {}),
        ("fp8_current", {}),
        ("mxfp8", {"backward": "dequantized"}),
        ("nvfp4_no_rht", {"backward": "high_precision"}),
        ("nvfp4_no_rht", {"input": {"format": "nvfp4", "columnwise": "keep"}}),
    ],
)
def test_shared_copies_change_no_bit(made, name, more):
    shared = found(model(False), recipe(name, **more))
    # [rows, width] once for two sites; transposed, and for the last product of x, which isn't of a parameter, none
    assert set(made) == {(ROWS, WIDTH), (WIDTH, ROWS)}
    made.clear()
    equal(shared, found(model(True), recipe(name, **more)))
    assert not made


def test_an_operand_in_high_precision_is_not_copied(made):
    how = recipe("fp8_block")
    del how["train"]["input"]
    equal(found(model(False), how), found(model(True), how))
    assert not made


def test_delayed_scales_are_each_sites_own(made):
    equal(found(model(False), recipe("fp8_delayed")), found(model(True), recipe("fp8_delayed")))
    assert not made


def scans(jaxpr) -> list:
    """The scans of a program, in order, also those in its calls."""
    out = []
    for e in jaxpr.eqns:
        inner = e.params.get("jaxpr") if e.primitive.name in ("pjit", "jit") else None
        out += [e] if e.primitive.name == "scan" else scans(inner.jaxpr) if inner is not None else []
    return out


def kept(its, how) -> list[tuple[int, ...]]:
    """Shapes of the packed codes that the forward scan keeps for the backward scan."""
    grad, given = gradient(its, how)
    forward, _ = scans(jax.make_jaxpr(grad)(*given).jaxpr)
    return sorted(v.aval.shape for v in forward.outvars if v.aval.dtype == jnp.uint8)


@pytest.mark.parametrize("remat", [False, True])
def test_shared_copies_are_kept_once(remat):
    """Of FP8: a byte a value; of each weight one copy, of x one for two sites."""
    weights = [(LAYERS, WIDTH, WIDTH), (LAYERS, WIDTH, WIDTH), (LAYERS, WIDTH, ROWS)]
    together = [*weights, (LAYERS, ROWS, WIDTH), (LAYERS, WIDTH, ROWS)]
    assert kept(model(False, remat), recipe("fp8_current")) == sorted(together)
    assert kept(model(True, remat), recipe("fp8_current")) == sorted([*together, (LAYERS, ROWS, WIDTH)])


def test_no_copy_outlives_its_trace():
    grad, given = gradient(model(False, True), recipe("nvfp4"))
    with jax.checking_leaks():
        jax.jit(grad)(*given)


def test_other_uses_of_a_layer_share_anew():
    """A body that runs again, on another x, has copies of that: against products apart."""

    def twice(apart):
        layer = model(apart)
        return lambda p, x: layer(p, layer(p, x))

    equal(found(twice(False), recipe("mxfp8")), found(twice(True), recipe("mxfp8")))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(OUT, name=name)(x) for name in "qkv")
        return jnp.tanh(q * k) + v


def test_flax_layers_that_read_one_array_share(made):
    module = Attention()
    variables = module.init(jax.random.key(0), X)
    prepared = train.prepare(module, "train/nvfp4", variables, X)
    grad = jax.grad(lambda v: prepared.apply(v, X, quant_key=KEY).sum())(variables)
    assert made == [(ROWS, WIDTH)] and np.isfinite(jax.tree.leaves(grad)[0]).all()
