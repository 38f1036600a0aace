"""distill: gains and scales move, codes and bits stay, and the outputs come nearer to the float model's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jqopt
from jqopt import _distill, algorithms
from tests import arrays

pytestmark = pytest.mark.quick


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.RMSNorm(name="norm")(x)
        return x + nn.Dense(32, use_bias=False, name="down")(nn.silu(nn.Dense(48, use_bias=False, name="up")(h)))


X = arrays.normal(0, (96, 32)).at[:, 3].multiply(4.0)
BATCHES = [X[:48], X[48:]]
NET = Net()
STEPS = {"name": "distill", "steps": 30, "rate": 0.01, "loss": "mse"}


@pytest.fixture(scope="module")
def variables():
    return NET.init(jax.random.key(0), X)


def quantized(variables, steps, weight="int4", **rule):
    rules = [{"match": "*", "weight": {"format": weight, "block": 16}, **rule}]
    return jqopt.quantize_model(NET, {"rules": rules, "algorithm": steps}, params=variables, batches=BATCHES)


def error(qm, variables) -> float:
    """The mean over the batches of the squared output error, relative to the output."""
    parts = [(np.asarray(qm(b)), np.asarray(NET.apply(variables, b))) for b in BATCHES]
    return float(np.mean([np.mean((got - want) ** 2) / np.mean(want**2) for got, want in parts]))


@pytest.mark.parametrize(
    ("weight", "rule"),
    [("uint4", {}), pytest.param("nvfp4", {"input": "nvfp4"}, marks=pytest.mark.slow)],
    ids=["uint4", "nvfp4"],
)
def test_outputs_come_nearer_while_codes_and_bits_stay(variables, weight, rule):
    before = quantized(variables, "gptq", weight, **rule)
    after = quantized(variables, ["gptq", STEPS], weight, **rule)
    assert error(after, variables) < 0.97 * error(before, variables)
    old, new = before.params["params"], after.params["params"]
    for name in ("up", "down"):
        a, b = old[name]["kernel"], new[name]["kernel"]
        np.testing.assert_array_equal(a.data, b.data)
        assert a.nbytes == b.nbytes and a.scale.dtype == b.scale.dtype and np.any(a.scale != b.scale)
    assert np.any(old["norm"]["scale"] != new["norm"]["scale"])


def test_the_gradient_is_that_of_the_packed_model(variables):
    """By differences along it: the packed model's own loss, with all scales and gains multiplied by e^h and e^-h."""
    qm = quantized(variables, ["max", STEPS])
    logs = _distill.trainable(qm.plan, qm.quant, _distill.training_of(qm.plan))
    assert sorted(logs) == ["down/kernel", "norm/scale", "up/kernel"]

    def trained(logs):
        tree = _distill.simulated(qm.plan, qm.quant.params, logs)
        rule = lambda sites: _distill.Differentiable(sites, True, None)  # noqa: E731
        found = [_distill._apply.run(qm.plan, rule, tree, (b,), {}) for b in BATCHES]
        wanted = [jnp.asarray(NET.apply(variables, b)) for b in BATCHES]
        return sum(map(_distill._mse, wanted, found), jnp.float32(0)) / len(BATCHES)

    value, g = jax.jit(jax.value_and_grad(trained))(logs)
    length = float(jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(g))))

    def loss(h: float) -> float:
        moved = _distill.changed(qm.plan, qm.quant, jax.tree.map(lambda x: jnp.float32(h / length) * x, g))
        return error(lambda b: jqopt.apply(qm.plan)(moved, b), variables)

    assert float(value) == pytest.approx(loss(0.0), rel=1e-3)
    assert length == pytest.approx((loss(0.02) - loss(-0.02)) / 0.04, rel=0.03)


def test_what_does_not_help_is_left_as_it_was(variables):
    before = quantized(variables, "max")
    for options in ({"steps": 0}, {"rate": 0.9, "steps": 3}, {"gains": False, "scales": False}):
        after = quantized(variables, ["max", {**STEPS, **options}])
        assert all(map(np.array_equal, jax.tree.leaves(before.quant), jax.tree.leaves(after.quant)))


def test_a_norm_that_adds_one_to_its_parameter_keeps_its_sign_of_zero():
    """A gain of 1 + g: what is trained multiplies the whole of it, also where g is zero."""

    def fn(p, x):
        y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * (1.0 + p["g"])
        return y @ p["w"]

    p = {"g": jnp.zeros(32), "w": arrays.normal(1, (32, 8)) / 6}
    recipe = {"rules": [{"match": "*", "weight": "int4"}], "algorithm": ["max", {**STEPS, "scales": False}]}
    qm = jqopt.quantize_model(fn, recipe, params=p, batches=BATCHES)
    assert 0.001 < float(jnp.max(jnp.abs(qm.params["g"]))) < 0.2
    want = fn(p, X)
    plain = jqopt.quantize_model(fn, {**recipe, "algorithm": "max"}, params=p, inputs=X)
    assert float(jnp.linalg.norm(qm(X) - want)) < float(jnp.linalg.norm(plain(X) - want))


def test_asking_wrongly_teaches(variables):
    with pytest.raises(jqopt.PlanError, match=r"write \[gptq, distill\]"):
        quantized(variables, [STEPS, "gptq"])
    wrong = [
        ({"steps": -1}, "such as 64"), ({"rate": 2}, "between 0 and 1"), ({"loss": "l1"}, "kl or mse"),
        ({"gains": 1}, "true or false"),
    ]  # fmt: skip
    for options, said in wrong:
        with pytest.raises(jqopt.PlanError, match=said):
            algorithms.get("distill", **options)
    plan = jqopt.plan({"rules": [{"match": "*", "weight": "int4"}], "algorithm": STEPS}, jqopt.trace(NET, variables, X))
    with pytest.raises(jqopt.CalibrationError, match=r"batches=batches"):
        jqopt.quantize(plan, variables, jqopt.calibrate(plan, variables, BATCHES))
