"""Layer by layer, and in several passes: statistics of what quantized layers give, in the memory that is allowed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jqopt
from jqopt import _calibrate, _layerwise, _quantize
from tests import arrays

pytestmark = pytest.mark.quick


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.RMSNorm(name="norm")(x)
        gate, up = (nn.Dense(48, use_bias=False, name=n)(h) for n in ("gate", "up"))
        return x + nn.Dense(32, use_bias=False, name="down")(nn.silu(gate) * up)


class Net(nn.Module):
    layers: int = 2
    scanned: bool = False

    @nn.compact
    def __call__(self, x):
        if self.scanned:
            stacked = nn.scan(
                lambda m, c, _: (m(c), None), variable_axes={"params": 0}, split_rngs={"params": True},
                length=self.layers,
            )  # fmt: skip
            return stacked(Block(name="layers"), x, None)[0]
        for i in range(self.layers):
            x = Block(name=f"layers_{i}")(x)
        return x


X = arrays.normal(0, (192, 32)).at[:, 3].multiply(8.0)
BATCHES = [X[:64], X[64:128], X[128:]]


def recipe(algorithm, weight="nvfp4", input=None, layerwise=True) -> dict:
    rule = {"match": "*", "weight": weight, **({} if input is None else {"input": input})}
    return {"rules": [rule], "algorithm": algorithm, "layerwise": layerwise}


def variables(net: Net) -> dict:
    return net.init(jax.random.key(1), X)


def stacked(params: dict, layers: int) -> dict:
    each = [params["params"][f"layers_{i}"] for i in range(layers)]
    return {"params": {"layers": jax.tree.map(lambda *x: jnp.stack(x), *each)}}


def dequantized(params):
    return jax.tree.map(
        lambda q: q.dequantize() if isinstance(q, jqopt.QTensor) else q, params,
        is_leaf=lambda q: isinstance(q, jqopt.QTensor),
    )  # fmt: skip


def error(qm, net, v) -> float:
    want = net.apply(v, X)
    return float(jnp.linalg.norm(qm(X) - want) / jnp.linalg.norm(want))


@pytest.mark.slow
def test_a_layer_sees_what_the_quantized_layers_before_it_give(monkeypatch):
    """Second moments at each site, by hand: the model with the weights before it decoded and activations rounded."""
    net, seen = Net(), {}
    v = variables(net)
    gather = _layerwise._gather

    def spy(plan, unit, *rest):
        seen[unit.name] = gather(plan, unit, *rest)
        return seen[unit.name]

    monkeypatch.setattr(_layerwise, "_gather", spy)
    qm = jqopt.quantize_model(net, recipe("gptq", input="nvfp4"), params=v, batches=BATCHES)
    p = dequantized(qm.params)["params"]

    def rounded(x, tensor):
        amax = tensor.input_scale * 6 * 448
        codes = jqopt.QTensor.quantize(x, "nvfp4", tensor_amax=amax)
        return codes.dequantize()

    x = X
    for i in range(2):
        layer, packed = p[f"layers_{i}"], qm.params["params"][f"layers_{i}"]
        h = nn.RMSNorm().apply({"params": layer["norm"]}, x)
        h = rounded(h, packed["gate"]["kernel"])
        got = seen[f"params/layers_{i}/gate/kernel".removeprefix("params/")]
        np.testing.assert_allclose(got["moments"].sum, h.T @ h, rtol=2e-4, atol=2e-3 * float(jnp.max(h.T @ h)) / 100)
        inner = nn.silu(h @ layer["gate"]["kernel"]) * (h @ layer["up"]["kernel"])
        inner = rounded(inner, packed["down"]["kernel"])
        got = seen[f"layers_{i}/down/kernel"]["moments"].sum
        assert float(jnp.linalg.norm(got - inner.T @ inner)) < 1e-2 * float(jnp.linalg.norm(got))
        x = x + inner @ layer["down"]["kernel"]


@pytest.mark.parametrize(
    "algorithm",
    ["gptq", *(pytest.param(a, marks=pytest.mark.slow)
               for a in (["qep", "gptq"], ["smoothquant", "qep", {"name": "svdquant", "rank": 2}, "gptq"]))],
    ids=str,
)  # fmt: skip
def test_stacked_layers_are_solved_as_unrolled_ones(algorithm):
    net, scanned = Net(), Net(scanned=True)
    v = variables(net)
    plain = jqopt.quantize_model(net, recipe(algorithm, input="nvfp4"), params=v, batches=BATCHES)
    both = jqopt.quantize_model(scanned, recipe(algorithm, input="nvfp4"), params=stacked(v, 2), batches=BATCHES)
    assert both.params["params"]["layers"]["up"]["kernel"].data.shape[0] == 2
    a, b = (np.asarray(m(X)) for m in (plain, both))
    # the last bit of a product may decide a tie, and what follows it
    assert np.linalg.norm(a - b) < 0.2 * np.linalg.norm(a - np.asarray(net.apply(v, X)))


def test_error_propagation_helps():
    net = Net(layers=3)
    v = variables(net)
    errors = {
        str(a): error(jqopt.quantize_model(net, recipe(a, "int4", layerwise=True), params=v, batches=BATCHES), net, v)
        for a in ("gptq", ["qep", "gptq"])
    }
    assert errors["['qep', 'gptq']"] < errors["gptq"]


def test_equal_layers_are_compiled_once():
    counts = []
    for layers in (3, 6):
        net = Net(layers=layers)
        _layerwise._run_piece.clear_cache()
        _quantize._solve_layer.clear_cache()
        jqopt.quantize_model(net, recipe("gptq"), params=variables(net), batches=BATCHES)
        counts.append((_layerwise._run_piece._cache_size(), _quantize._solve_layer._cache_size()))
    assert counts[0] == counts[1]


def test_batches_of_several_shapes_and_generators():
    net = Net()
    v = variables(net)
    qm = jqopt.quantize_model(net, recipe("gptq"), params=v, batches=(x for x in (X[:128], X[128:])))
    same = jqopt.quantize_model(net, recipe("gptq"), params=v, batches=BATCHES)
    assert error(qm, net, v) == pytest.approx(error(same, net, v), rel=0.05)


def test_what_stands_in_no_layer_is_solved_from_the_float_model():
    """A weight that is read twice has two activations; a while loop isn't opened."""
    p = {"a": arrays.normal(0, (16, 16)) / 4, "b": arrays.normal(2, (16, 4))}

    def fn(p, x):
        x = jax.nn.relu(x @ p["a"])
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    x = arrays.normal(1, (64, 16))
    qm = jqopt.quantize_model(fn, recipe("gptq", "int8"), params=p, batches=[x])
    want = fn(p, x)
    assert float(jnp.linalg.norm(qm(x) - want)) < 0.02 * float(jnp.linalg.norm(want))


def test_calling_for_it_wrongly_teaches():
    net = Net()
    v = variables(net)
    graph = jqopt.trace(net, v, X)
    with pytest.raises(jqopt.PlanError, match="layerwise: true"):
        jqopt.plan(recipe(["qep", "gptq"], layerwise=False), graph)
    with pytest.raises(jqopt.CalibrationError, match=r"quantize\(plan, params, batches=batches\)"):
        jqopt.quantize(jqopt.plan(recipe("gptq"), graph), v, {})
    with pytest.raises(jqopt.CalibrationError, match="no batches"):
        jqopt.quantize(jqopt.plan(recipe("gptq"), graph), v, batches=[])


# ------------------------------------------------------------------------------------------ several passes


def test_statistics_are_gathered_in_the_memory_that_is_allowed():
    net = Net()
    v = variables(net)
    plan = jqopt.plan(recipe("gptq", layerwise=False), jqopt.trace(net, v, X))
    whole = sum(_calibrate.nbytes(u) for u in plan.units)
    most = max(_calibrate.nbytes(u) for u in plan.units)
    assert most >= 48 * 48 * 4
    assert [len(p) for p in _calibrate.passes(plan)] == [4] and len(_calibrate.passes(plan, whole - 1)) == 2
    parts = _calibrate.passes(plan, most)
    assert len(parts) >= 2 and all(sum(map(_calibrate.nbytes, p)) <= most for p in parts)
    one, many = (jqopt.quantize(plan, v, batches=(b for b in BATCHES), memory=m) for m in (None, most))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(jqopt.CalibrationError, match="alone take"):
        jqopt.quantize(plan, v, batches=BATCHES, memory=100)


def test_a_users_own_algorithm_is_a_value():
    """One that rounds every weight to zero, by its own statistic: what it gives is what runs."""
    count = jqopt.algorithms.Statistic(
        "tokens", lambda k: jnp.zeros(()), lambda s, x: s + jnp.float32(x.shape[0]), lambda b, a, axes: a
    )
    seen = []

    def shrink(factor: float = 1.0) -> jqopt.algorithms.Algorithm:
        def solve(task):
            seen.append(task.stats["tokens"])
            return task.replace(tiles=tuple(
                jnp.abs(w).reshape(*w.shape[:2], -1, 16).max(-1) * jnp.float32(factor) for w in task.weights
            ))  # fmt: skip

        return jqopt.algorithms.Algorithm("shrink", solve, "range", (count,))

    net = Net(layers=1)
    v = variables(net)
    asked = recipe({"name": "shrink", "factor": 0.5}, layerwise=False)
    qm = jqopt.quantize_model(net, asked, params=v, batches=BATCHES, algorithms={"shrink": shrink})
    kernel, got = (t["params"]["layers_0"]["up"]["kernel"] for t in (v, dequantized(qm.params)))
    assert float(jnp.abs(got).max()) == pytest.approx(float(jnp.abs(kernel).max()) / 2, rel=0.07)
    assert seen
    with pytest.raises(jqopt.PlanError, match="no option 'factr'"):
        jqopt.plan(
            recipe({"name": "shrink", "factr": 1}, layerwise=False), jqopt.trace(net, v, X),
            algorithms={"shrink": shrink},
        )  # fmt: skip
