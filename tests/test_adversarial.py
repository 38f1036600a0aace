"""Small hostile programs: each gives the right result, or an error that names the site and teaches.

The oracle for weights alone is exact: the float function on the dequantized tree must equal the packed run, up to the
order of accumulation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jqopt
from tests import arrays


def recipe(weight: str, input: str | None = None) -> dict[str, Any]:
    rule = {"match": "*", "weight": weight} | ({"input": input} if input else {})
    return {"schema": 1, "name": "adversarial", "rules": [rule]}


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return arrays.normal(seed, shape) / 4


def floats(quant: Any) -> Any:
    """The tree with each QTensor decoded."""
    is_q = lambda leaf: isinstance(leaf, jqopt.QTensor)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_q(leaf) else leaf, quant.params, is_leaf=is_q)


def layer(c: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
    return jnp.tanh(c @ w), None


class Program(NamedTuple):
    fn: Any
    params: Any
    input: jax.Array


CHANNELS = ("NWC", "WIO", "NWC")
QKV = normal(32, 48)
STACK = {"w": normal(3, 16, 16)}


def sliced_heads(P, x):
    q, k = P["w"][:, :32].reshape(32, 4, 8), P["w"][:, 32:40].reshape(32, 1, 8)
    return jnp.einsum("bd,dhe->bhe", x, q), jnp.einsum("bd,dhe->bhe", x, k)


def scan_in_scan(P, x):
    return lax.scan(lambda c, w: (lax.scan(layer, c, w)[0], None), x, P["w"])[0]


def scanned_then_closed_over(P, x):
    """An inner scan over time closes over the weight that the outer scan slices."""
    inner = lambda c, w: (lax.scan(lambda h, _: layer(h, w), c, None, length=2)[0], None)  # noqa: E731
    return lax.scan(inner, x, P["w"])[0]


def carried(P, x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[2]), c[2]), (0, x, P["w"]))[1]


PROGRAMS = {
    "one by one": Program(lambda P, x: x @ P["w"], {"w": normal(1, 1)}, normal(1, 1)),
    "prime sizes": Program(lambda P, x: x @ P["w"], {"w": normal(131, 17)}, normal(5, 131)),
    "axes of one": Program(
        lambda P, x: jnp.einsum("abd,dcef->abcef", x, P["w"]), {"w": normal(16, 1, 3, 1)}, normal(1, 2, 16)
    ),
    "vector weight": Program(lambda P, x: x @ P["w"], {"w": normal(16)}, normal(4, 16)),
    "both layouts": Program(lambda P, x: (x @ P["w"]) @ P["w"].T, {"w": QKV}, normal(4, 32)),
    "unequal split": Program(
        lambda P, x: [x @ w for w in jnp.split(P["w"], [32, 40], 1)], {"w": QKV}, normal(4, 32)
    ),
    "heads of a slice": Program(sliced_heads, {"w": QKV}, normal(4, 32)),
    "slices of k": Program(lambda P, x: x[:, :16] @ P["w"][:16] + x[:, 16:] @ P["w"][16:], {"w": QKV}, normal(4, 32)),
    "batch axis in the middle": Program(
        lambda P, x: jnp.einsum("bthd,dhe->bthe", x, P["w"]), {"w": normal(8, 3, 6)}, normal(2, 4, 3, 8)
    ),
    "two batch axes, swapped, weight first": Program(
        lambda P, x: lax.dot_general(P["w"], x, (((0,), (3,)), ((2, 1), (0, 2)))), {"w": normal(8, 3, 2, 6)},
        normal(2, 4, 3, 8),
    ),
    "reshapes that don't nest": Program(
        lambda P, x: (jnp.einsum("bd,dhe->bhe", x, P["w"].reshape(32, 2, 3)), x @ P["w"].reshape(32, 3, 2)[:, 1]),
        {"w": normal(32, 6)}, normal(4, 32),
    ),
    "concatenated with a constant": Program(
        lambda P, x: x @ jnp.concatenate([P["w"], jnp.ones((32, 8))], 1), {"w": QKV}, normal(4, 32)
    ),
    "scan, reversed": Program(lambda P, x: lax.scan(layer, x, P["w"], reverse=True)[0], STACK, normal(2, 16)),
    "scan, unrolled": Program(lambda P, x: lax.scan(layer, x, P["w"], unroll=2)[0], STACK, normal(2, 16)),
    "scan of one": Program(lambda P, x: lax.scan(layer, x, P["w"])[0], {"w": normal(1, 16, 16)}, normal(2, 16)),
    "scan in scan": Program(scan_in_scan, {"w": normal(2, 3, 16, 16)}, normal(2, 16)),
    "scan and a layer by number": Program(
        lambda P, x: lax.scan(layer, x, P["w"])[0] @ P["w"][1], STACK, normal(2, 16)
    ),
    "scan over a middle axis": Program(
        lambda P, x: lax.scan(layer, x, P["w"].transpose(1, 0, 2))[0], {"w": normal(16, 3, 16)}, normal(2, 16)
    ),
    "scanned, then closed over": Program(scanned_then_closed_over, STACK, normal(2, 16)),
    "carried unchanged": Program(carried, {"w": normal(16, 16)}, normal(2, 16)),
    "also an output": Program(lambda P, x: (x @ P["w"], P["w"].T), {"w": QKV}, normal(4, 32)),
    "also summed": Program(lambda P, x: x @ P["w"] + jnp.sum(P["w"] ** 2), {"w": QKV}, normal(4, 32)),
    "gradient inside": Program(
        lambda P, x: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ P["w"])))(x), {"w": QKV}, normal(4, 32)
    ),
    "gradient of a parameter inside": Program(
        lambda P, x: jax.grad(lambda P: jnp.sum(jnp.tanh(x @ P["w"])))(P), {"w": QKV}, normal(4, 32)
    ),
    "forward mode inside": Program(
        lambda P, x: jax.jvp(lambda x: jnp.tanh(x @ P["w"]), (x,), (x,)), {"w": QKV}, normal(4, 32)
    ),
    "grouped conv": Program(
        lambda P, x: lax.conv_general_dilated(
            x, P["w"], (1,), "SAME", dimension_numbers=CHANNELS, feature_group_count=4
        ),
        {"w": normal(3, 4, 8)}, normal(2, 6, 16),
    ),
    "dilated conv, odd layout": Program(
        lambda P, x: lax.conv_general_dilated(
            x, P["w"], (1, 1), "VALID", rhs_dilation=(1, 2), dimension_numbers=("CHNW", "WIHO", "NWHC")
        ),
        {"w": normal(2, 16, 2, 8)}, normal(16, 6, 2, 5),
    ),
    "numpy parameters": Program(lambda P, x: x @ P["w"], {"w": np.asarray(QKV)}, normal(4, 32)),
    "names that look like keys": Program(
        lambda P, x: x @ P["w"] + x @ P["w#2"] + 2 * x @ P["w"], {"w": QKV, "w#2": 2 * QKV}, normal(4, 32)
    ),
    "empty batch": Program(lambda P, x: x @ P["w"], {"w": QKV}, normal(0, 32)),
}  # fmt: skip


@pytest.mark.parametrize("weight", ["int4", "nvfp4", "fp8_block"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_weights_alone_are_exact(name: str, weight: str):
    fn, params, x = PROGRAMS[name]
    qm = jqopt.quantize_model(fn, recipe(weight), params=params, inputs=x)
    assert qm.plan.quantized
    got, want = qm(x), fn(floats(qm.quant), x)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, float(jnp.max(jnp.abs(b), initial=0))))


# --------------------------------------------------------------------------------------- transformations


def mlp(P, x):
    return jnp.tanh(x @ P["a"] + P["c"]) @ P["b"]


MLP = {"a": normal(16, 32), "b": normal(32, 8, seed=3), "c": jnp.zeros(32)}
X = normal(12, 16, seed=5)


@pytest.fixture(params=["int8", "nvfp4"])
def quantized(request: pytest.FixtureRequest) -> Any:
    return jqopt.quantize_model(mlp, recipe(request.param, request.param), params=MLP, batches=[X])


def test_vmap_equals_a_loop(quantized):
    xs = jnp.stack([X, 2 * X])
    np.testing.assert_allclose(jax.vmap(quantized)(xs), jnp.stack([quantized(x) for x in xs]), atol=1e-6)


@pytest.mark.parametrize("simulate", [False, True])
def test_gradient_goes_straight_through(quantized, simulate):
    run = jqopt.apply(quantized.plan, simulate=simulate)
    got = jax.grad(lambda x: run(quantized.quant, x).sum())(X)
    want = jax.grad(lambda x: mlp(floats(quantized.quant), x).sum())(X)
    assert jnp.linalg.norm(got - want) < 0.1 * jnp.linalg.norm(want)


def test_gradient_through_a_quantized_convolution():
    fn, params, x = PROGRAMS["grouped conv"]
    qm = jqopt.quantize_model(fn, recipe("int8", "int8"), params=params, batches=[x])
    got, want = jax.grad(lambda x: qm(x).sum())(x), jax.grad(lambda x: fn(floats(qm.quant), x).sum())(x)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_nan_is_not_swallowed(quantized):
    """A diverged model must not look healthy once it is quantized."""
    assert jnp.isnan(quantized(X.at[0, 0].set(jnp.nan))[0]).all()


# ------------------------------------------------------------------------------ calibration and quantizing


def test_statistics_are_the_callers():
    """Going on from statistics leaves them usable."""
    plan = jqopt.plan(recipe("int8", "int8"), jqopt.trace(mlp, MLP, X))
    first = jqopt.calibrate(plan, MLP, [X[:5]])
    once = jqopt.calibrate(plan, MLP, [X[5:]], stats=first)
    again = jqopt.calibrate(plan, MLP, [X[5:]], stats=first)
    whole = jqopt.calibrate(plan, MLP, [X])
    for tree in (once, again):
        assert jax.tree.all(jax.tree.map(np.array_equal, tree, whole))


def test_donating_an_array_that_stands_at_two_paths():
    def fn(P, x):
        return x @ P["a"] + x @ P["b"]

    w = normal(16, 8)
    wanted = fn({"a": w, "b": w}, X)
    qm = jqopt.quantize_model(fn, recipe("int8", "int8"), params={"a": w, "b": w}, batches=[X], donate=True)
    assert jnp.linalg.norm(qm(X) - wanted) < 0.05 * jnp.linalg.norm(wanted)


def test_donating_keeps_an_array_that_a_kept_parameter_shares():
    def fn(P, x):
        return x @ P["a"] + x @ P["b"]

    w = normal(16, 8)
    rules = [{"match": "b", "keep": True}, {"match": "*", "weight": "int8"}]
    qm = jqopt.quantize_model(
        fn, {"schema": 1, "name": "t", "rules": rules}, params={"a": w, "b": w}, inputs=X, donate=True
    )
    assert qm(X).shape == (12, 8)


def test_a_site_in_a_loops_condition_is_refused_with_a_reason():
    def fn(P, x):
        return lax.while_loop(
            lambda c: (c[0] < 2) & (jnp.sum(c[1] @ P["u"]) < 1e9), lambda c: (c[0] + 1, jnp.tanh(c[1])), (0, x)
        )[1]

    with pytest.raises(jqopt.PlanError, match=r"u \(dot_general\): it stands in the condition of a while loop"):
        jqopt.quantize_model(fn, recipe("int8", "int8"), params={"u": normal(16, 1)}, batches=[X])


@pytest.mark.parametrize("leaf", [2.0, jax.random.key(0)], ids=["python float", "random key"])
def test_leaves_that_are_no_arrays_of_numbers(leaf):
    def fn(P, x):
        return x @ P["w"] + jnp.float32(0 if isinstance(P["s"], jax.Array) else P["s"])

    qm = jqopt.quantize_model(fn, recipe("int4"), params={"w": normal(16, 8), "s": leaf}, inputs=X)
    assert qm(X).shape == (12, 8)


def test_zero_has_a_sign():
    """Python numbers are static; -0.0 == 0.0, but they aren't the same argument."""

    def fn(P, x, s):
        return jnp.copysign(jnp.float32(1), jnp.float32(s)) + 0 * jnp.sum(x @ P["a"])

    qm = jqopt.quantize_model(fn, recipe("int4"), params={"a": MLP["a"]}, inputs=(X, 0.0))
    assert [float(qm(X, s)) for s in (0.0, -0.0)] == [1.0, -1.0]


def test_an_unhashable_static_argument_is_told_apart_by_its_identity():
    def fn(P, x, s):
        return x @ P["a"] * float(len(s))

    one, two = {1}, {1, 2}
    qm = jqopt.quantize_model(fn, recipe("int4"), params=MLP, inputs=(X, one))
    np.testing.assert_array_equal(2 * qm(X, one), qm(X, two))


# -------------------------------------------------------------------------- what can't be quantized is named


def swapped(P, x):
    return lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[2], c[1]), None), (x, P["w"], P["v"]), length=3)[0][0]


MIXED = {
    "selected by data": lambda P, x: x @ jnp.where(x.sum() > 0, P["w"], P["v"]),
    "carried and swapped": swapped,
    "a branch under vmap": lambda P, x: jax.vmap(
        lambda r: lax.cond(r.sum() > 0, lambda r: r @ P["w"], lambda r: r @ P["v"], r)
    )(x),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_weight_mixed_with_activations_is_named(name):
    """Such a weight stays in full precision, and the plan says which and why."""

    def fn(P, x):
        return MIXED[name](P, x) @ P["out"]

    params = {"w": normal(16, 16), "v": normal(16, 16, seed=2), "out": normal(16, 8)}
    plan = jqopt.plan(recipe("int4"), jqopt.trace(fn, params, X))
    assert set(plan.quantized) == {"out"}
    assert "w" in {d.path for d in plan.decisions if d.reason} or "w" in " ".join(plan.opaque)


def test_a_layer_picked_at_run_time_is_named():
    def fn(P, x):
        return lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ P["w"][i]), x)

    with pytest.raises(jqopt.PlanError, match=r"w .*positions known only at run time"):
        jqopt.plan(recipe("int4"), jqopt.trace(fn, STACK, normal(2, 16)))


def test_a_parameter_inside_a_linear_solve_is_named():
    def fn(P, x):
        solve = lambda mv, b: b - mv(b)  # noqa: E731
        return lax.custom_linear_solve(lambda v: v + P["w"] @ v, x, solve, symmetric=True) + x @ P["v"]

    graph = jqopt.trace(fn, {"w": normal(16, 16), "v": normal(16, 16)}, normal(16))
    assert any("w" in o.params for o in graph.opaque) or any(s.path == "w" for s in graph.sites)
