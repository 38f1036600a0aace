"""gptq's passes of coordinate descent: no move makes the error larger, and in the end none makes it smaller."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt
from jqopt import _numerics, algorithms, formats
from jqopt._numerics import Codes
from jqopt.algorithms import Problem, Task, _descent

N, K, TOKENS = 12, 256, 1024
FORMATS = ("int8", "int4", "uint4", "fp8", "nvfp4", "mxfp4", "mxfp8", "mxint8", "nf4")


def activations(kind: str, k: int = K) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(TOKENS, k))
    match kind:
        case "correlated":
            x = (x * np.geomspace(1, 0.02, k)) @ rng.normal(size=(k, k)) / 8
        case "few tokens":
            x = x[:5]
        case "copies":  # columns that are the same: h has no inverse, and only their sum counts
            x[:, 1::2] = x[:, ::2]
        case "outliers":
            x[:, ::50] *= 1e3
        case "zeros":
            x[:, [0, 17, k - 1]] = 0
    return x.astype(np.float32)


def weight(k: int = K) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(N, k)).astype(np.float32)


@functools.cache
def _solver(name: str, granularity: str | None, passes: int, scales: str):
    format = formats.get(name)
    algorithm = algorithms.get("gptq", passes=passes, scales=scales)
    problem = Problem(format, granularity or format.granularity)
    return jax.jit(lambda w, state: algorithm.solve(algorithms.task([w], problem, state)))


def solved(name: str, w, x, passes: int, granularity: str | None = None, scales: str = "mse") -> Task:
    algorithm = algorithms.get("gptq")
    state = algorithm.update(algorithm.init(x.shape[1]), jnp.asarray(x))
    return _solver(name, granularity, passes, scales)(jnp.asarray(w), state)


def coded(task: Task) -> Codes:
    (codes,) = task.codes
    assert codes is not None
    return codes


def values(name: str, task: Task, k: int) -> np.ndarray:
    codes: Codes = jax.tree.map(lambda a: a[0], coded(task))
    return np.asarray(_numerics.dequantize_matrix(*codes, formats.get(name), k), np.float64)


def damped(x, damp: float = 0.01) -> np.ndarray:
    """What is minimized: sum x x^T over the mean of its diagonal, 1 for inputs that are always zero, and damp."""
    h = x.astype(np.float64).T @ x
    h /= np.diag(h).mean()
    h[np.diag_indices_from(h)] += (np.diag(h) <= 0) + damp
    return h


def error(w, q, h) -> float:
    return float(np.sum(((q - w) @ h) * (q - w)))


@pytest.mark.parametrize("kind", ["correlated", "few tokens", "copies", "outliers", "zeros"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_error_never_rises(name, kind):
    x, w = activations(kind), weight()
    h = damped(x)
    w = np.where(np.diag(x.T @ x) > 0, w, np.float32(0))  # weights of inputs that are always zero become zero
    before, after = (error(w, values(name, solved(name, w, x, p), K), h) for p in (0, 2))
    assert after <= before * (1 + 1e-5)
    if kind == "correlated":
        assert after < 0.99 * before


@pytest.mark.parametrize(("name", "k"), [("int4", 256), ("int4", 200), ("uint4", 256), ("mxint8", 40), ("int8", 72)])
def test_no_single_code_can_be_better_in_the_end(name, k):
    """Every code of every row moved up and down by one, in float64; those that would gain could by rounding only."""
    x, w = activations("correlated", k), weight(k)
    h, task = damped(x), solved(name, w, x, 30)
    q, format = values(name, task, k), formats.get(name)
    codes: Codes = jax.tree.map(lambda a: a[0], coded(task))
    of_codes, shift = _numerics.element_scales(codes, format, N, k)
    scale, zero = np.asarray(of_codes), None if shift is None else np.asarray(shift)
    least, most = (0, 15) if zero is not None else (-format.element.max, format.element.max)
    code = np.round(q / scale) + (0 if zero is None else zero)
    slope = (q - w) @ h
    for step in (-1, 1):
        gain = -(2 * step * scale * slope + (step * scale) ** 2 * np.diag(h))
        allowed = (code + step >= least) & (code + step <= most)
        assert np.max(np.where(allowed, gain, -np.inf)) < 1e-4 * error(w, q, h) / N


@pytest.mark.parametrize(("name", "k"), [("int4", 256), ("uint4", 256), ("int8", 256), ("int4", 200), ("fp8", 256)])
def test_no_scale_can_be_better_in_the_end(name, k):
    """A tile's scale has no slope left: (q - w) h q_t^T is zero, of what its terms are."""
    x, w = activations("correlated", k), weight(k)
    granularity = "channel" if name in ("int8", "fp8") else None
    q, h = values(name, solved(name, w, x, 30, granularity), k), damped(x)
    _, columns = formats.get(name).tile_for(N, k, granularity)
    slope = (q - w) @ h
    for start in range(0, k, columns):
        at = slice(start, start + columns)
        step = np.sum(slope[:, at] * q[:, at], 1) / np.sum((q[:, at] @ h[at, at]) * q[:, at], 1)
        assert np.max(np.abs(step)) < 2e-3


def test_without_correlation_codes_stay_and_scales_are_least_squares():
    w = weight()
    x = np.repeat(np.eye(K, dtype=np.float32), 4, axis=0)  # h is the identity
    (q,) = (values("int4", solved("int4", w, x, 1, scales="max"), K),)
    for start in range(0, K, 128):
        part, want = q[:, start : start + 128], w[:, start : start + 128]
        step = np.sum((want - part) * part, 1) / np.sum(part * part, 1)
        assert np.max(np.abs(step)) < 1e-5
    scale = np.abs(w.reshape(N, 2, 128)).max(-1, keepdims=True) / 7
    nearest = np.round(w.reshape(N, 2, 128) / scale)
    codes = q.reshape(N, 2, 128) / np.abs(q.reshape(N, 2, 128)).max(-1, keepdims=True) * 7
    np.testing.assert_allclose(codes, nearest, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "granularity"), [("mxfp4", None), ("mxfp8", None), ("int8", "tensor"), ("fp8_block", None)]
)
def test_powers_of_two_and_scales_of_several_rows_stay(name, granularity):
    x, w = activations("correlated"), weight()
    with_passes, without = (coded(solved(name, w, x, p, granularity)) for p in (2, 0))
    np.testing.assert_array_equal(with_passes.scale, without.scale)
    assert np.any(np.asarray(with_passes.data) != np.asarray(without.data))


def test_e4m3_scales_move_along_their_grid():
    x, w = activations("correlated"), weight()
    before, after = (coded(solved("nvfp4", w, x, p)) for p in (0, 2))
    assert after.scale.dtype == before.scale.dtype == np.uint8 and after.global_scale == before.global_scale
    moved = np.mean(np.asarray(after.scale) != np.asarray(before.scale))
    assert 0.01 < moved < 0.9 and np.asarray(after.scale).min() > 0 and np.asarray(after.scale).max() <= 0x7E


def test_it_is_the_same_in_double_precision():
    """The descent in NumPy, one code and one scale after the other: the same error, and most codes alike."""
    x, w = activations("correlated"), weight().astype(np.float64)
    h = damped(x)
    scale = np.repeat(np.abs(w.reshape(N, 2, 128)).max(-1) / 7, 128, axis=1)
    q = np.clip(np.round(w / scale), -7, 7) * scale
    format = formats.get("int4")
    grid = _descent.Grid(
        jnp.asarray(scale, jnp.float32), None, functools.partial(_numerics.to_grid, format=format), lambda s: s, 128
    )
    got, _ = jax.jit(lambda q, w, h: _descent.descend(q, w, h, grid, 2))(
        *(jnp.asarray(a, jnp.float32) for a in (q, w, h))
    )
    for _ in range(2):
        for start in (0, 128):
            for j in range(start, start + 128):
                best = q[:, j] - (q - w) @ h[:, j] / h[j, j]
                q[:, j] = np.clip(np.round(best / scale[:, j]), -8, 7) * scale[:, j]
            at = slice(start, start + 128)
            part = q[:, at]
            step = -np.sum(((q - w) @ h[:, at]) * part, 1) / np.sum((part @ h[at, at]) * part, 1)
            q[:, at], scale[:, at] = part * (1 + step[:, None]), scale[:, at] * (1 + step[:, None])
    assert error(w, np.asarray(got, np.float64), h) == pytest.approx(error(w, q, h), rel=0.01)
    assert np.mean(np.abs(np.asarray(got) - q) < 1e-3 * scale) > 0.9


@pytest.mark.parametrize("passes", [-1, 101, 1.5, True, "all"])
def test_wrong_numbers_of_passes_are_refused(passes):
    with pytest.raises(jqopt.PlanError, match="write a whole number from 0 to 100"):
        algorithms.get("gptq", passes=passes)
