"""gptq: the properties its derivation promises, on every format; the published loop in double precision agrees."""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jqopt
from jqopt import _numerics, algorithms, formats
from jqopt.algorithms import Problem, gptq

module = importlib.import_module("jqopt.algorithms.gptq")  # the package's name is that of the function in it
FORMATS = ("int8", "int4", "uint4", "fp8", "nvfp4", "mxfp4", "mxfp8", "mxint8", "nf4")
N, K, TOKENS = 24, 256, 1024


def problem(name: str) -> Problem:
    format = formats.get(name)
    return Problem(format, format.granularity)


def correlated(seed: int = 0, k: int = K) -> np.ndarray:
    """Activations with decaying principal components: columns predict each other."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(TOKENS, k)) * np.geomspace(1, 0.02, k)) @ rng.normal(size=(k, k)).astype(np.float32) / 8


def weight(seed: int = 1, n: int = N, k: int = K) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, k)).astype(np.float32)


def moments(x: np.ndarray):
    algorithm = gptq()
    return algorithm.update(algorithm.init(x.shape[1]), jnp.asarray(x, jnp.float32))


def with_sum(state, total):
    return {**state, "moments": state["moments"]._replace(sum=total)}


@functools.cache
def _solver(name: str, options: tuple) -> object:
    return jax.jit(lambda w, state: codes_of(algorithms.get("gptq", **dict(options)), w, state, name))


def codes_of(algorithm: algorithms.Algorithm, w, state, name: str):
    done = algorithm.solve(algorithms.task([w], problem(name), state))
    return jax.tree.map(lambda x: x[0], done.codes[0])


def solved(name: str, w, state, **options) -> np.ndarray:
    codes = _solver(name, tuple(options.items()))(jnp.asarray(w), state)
    return np.asarray(_numerics.dequantize_matrix(*codes, formats.get(name), w.shape[1]))


def nearest(name: str, w) -> np.ndarray:
    p = problem(name)
    return np.asarray(_numerics.qdq_matrix(jnp.asarray(w), p.format, granularity=p.granularity))


def error(w, got, x) -> float:
    return float(np.sum(np.square((w - got).astype(np.float64) @ x.T.astype(np.float64))))


@pytest.mark.parametrize("name", FORMATS)
def test_it_beats_rounding_to_nearest_on_correlated_inputs(name):
    w, x = weight(), correlated()
    assert error(w, solved(name, w, moments(x), scales="max"), x) < 0.8 * error(w, nearest(name, w), x)


@pytest.mark.parametrize("name", ["int4", "uint4", "fp8", "nvfp4"])
def test_without_correlation_it_is_rounding_to_nearest(name):
    w = weight()
    state = with_sum(moments(correlated()), jnp.diag(jnp.linspace(0.5, 4.0, K, dtype=jnp.float32)))
    np.testing.assert_array_equal(solved(name, w, state, scales="max"), nearest(name, w))


@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "mxfp4", "mxint8"])
def test_weights_on_the_grid_stay(name):
    w = nearest(name, weight())
    np.testing.assert_array_equal(solved(name, w, moments(correlated()), scales="max"), nearest(name, w))


def reference(w: np.ndarray, x: np.ndarray, scale: np.ndarray, most: int, damp: float) -> np.ndarray:
    """The published loop (Frantar et al., algorithm 1, with activation order) in float64, one column at a time."""
    h = x.T.astype(np.float64) @ x
    h[np.diag_indices(K)] += damp * np.diag(h).mean()
    order = np.argsort(-np.diag(h), kind="stable")
    w, s, h = w.astype(np.float64)[:, order], scale.astype(np.float64)[:, order], h[np.ix_(order, order)]
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    out = np.zeros_like(w)
    for i in range(K):
        out[:, i] = np.clip(np.round(w[:, i] / s[:, i]), -most, most) * s[:, i]
        w[:, i:] -= np.outer((w[:, i] - out[:, i]) / u[i, i], u[i, i:])
    back = np.empty_like(out)
    back[:, order] = out
    return back


@pytest.mark.parametrize(("name", "most", "block"), [("int4", 7, 128), ("int8", 127, K)])
def test_it_is_the_published_loop(name, most, block):
    w, x = weight(), correlated().astype(np.float32)
    scale = np.repeat(np.abs(w.reshape(N, -1, block)).max(-1) / most, block, axis=1)
    want = reference(w, x, scale, most, 0.01)
    got = solved(name, w, moments(x), scales="max")
    # single precision may round a tie, and what follows it, the other way
    assert np.mean(np.abs(got - want) > 0.5 * scale) < 0.02
    assert error(w, got, x) == pytest.approx(error(w, want, x), rel=0.02)


def test_the_size_of_the_blocks_changes_nothing(monkeypatch):
    w, state = weight(), moments(correlated())
    solve = lambda: codes_of(gptq(scales="max"), jnp.asarray(w), state, "int4")  # noqa: E731
    want = np.asarray(solve().data)
    monkeypatch.setattr(module, "BLOCK", 48)
    assert np.mean(np.asarray(solve().data) != want) < 5e-3


def test_rows_are_independent():
    w, state = weight(), moments(correlated())
    part = solved("int8", w[4:12], state, scales="max")
    assert np.mean(part != solved("int8", w, state, scales="max")[4:12]) < 5e-3


def test_a_scale_of_the_data_changes_nothing():
    w, state = weight(), moments(correlated())
    larger = with_sum(state, state["moments"].sum * 2.0**20)
    np.testing.assert_array_equal(solved("int4", w, larger), solved("int4", w, state))


def test_inputs_that_are_always_zero():
    w, x = weight(), correlated()
    x[:, [3, 200]] = 0
    got = solved("int8", w, moments(x))
    assert np.all(got[:, [3, 200]] == 0) and np.all(np.isfinite(got))
    assert error(w, got, x) < error(w, nearest("int8", w), x)


@pytest.mark.parametrize("tokens", [1, 7])
def test_fewer_tokens_than_channels_are_damped_until_they_solve(tokens):
    w, x = weight(), correlated()[:tokens]
    got = solved("int4", w, moments(x), damp=1e-7)
    assert np.all(np.isfinite(got))
    assert error(w, got, x) <= error(w, nearest("int4", w), x) * 1.001


def test_searched_scales_help():
    w, x = weight(), correlated()
    assert error(w, solved("nvfp4", w, moments(x)), x) < error(w, solved("nvfp4", w, moments(x), scales="max"), x)


def test_any_split_of_the_data_gives_the_same_moments():
    algorithm, x = gptq(), jnp.asarray(correlated(), jnp.float32)
    whole = moments(x)
    parts = functools.reduce(algorithm.update, jnp.split(x, [1, 400]), algorithm.init(K))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5 * float(jnp.abs(a).max()))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"damp": 0}, "damp is 0"), ({"scales": "best"}, "write mse or local_hessian or max"),
     ({"order": 1}, "write true or false"), ({"block": 3}, "has no option 'block'")],
)  # fmt: skip
def test_wrong_options_are_refused(options, said):
    with pytest.raises(jqopt.PlanError, match=said):
        algorithms.get("gptq", **options)


# ------------------------------------------------------------------------------------------------ in a model


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3,), name="conv")(x))
        return nn.Dense(16, name="dense")(x.reshape(x.shape[0], -1))


def test_a_model_is_solved_where_it_can_be_and_the_plan_says_where_not():
    x = jax.random.normal(jax.random.key(0), (64, 12, 4))
    variables = Net().init(jax.random.key(1), x)
    recipe = {"rules": [{"match": "*", "weight": "int8"}], "algorithm": "gptq"}
    qm = jqopt.quantize_model(Net(), recipe, params=variables, batches=[x[:32], x[32:]])
    conv, dense = qm.plan["conv/kernel"], qm.plan["dense/kernel"]
    assert [a.name for a in conv.algorithm] == ["max"] and conv.note == (
        "max in place of gptq, which can't solve a convolution"
    )
    assert [a.name for a in dense.algorithm] == ["gptq"] and qm.plan.needs_data == ("dense/kernel",)
    features = np.asarray(nn.relu(nn.Conv(8, (3,)).apply({"params": variables["params"]["conv"]}, x))).reshape(64, -1)
    w = np.asarray(variables["params"]["dense"]["kernel"])
    got = np.asarray(qm.params["params"]["dense"]["kernel"].dequantize())
    assert error(w.T, got.T, features) < error(w.T, nearest("int8", w.T), features)


def test_a_weight_only_recipe_that_uses_data_asks_for_it():
    x = jnp.ones((4, 12, 4))
    variables = Net().init(jax.random.key(1), x)
    plan = jqopt.plan(
        {"rules": [{"match": "*", "weight": "int8"}], "algorithm": "gptq"}, jqopt.trace(Net(), variables, x)
    )
    with pytest.raises(jqopt.CalibrationError, match="need statistics"):
        jqopt.quantize(plan, variables)
