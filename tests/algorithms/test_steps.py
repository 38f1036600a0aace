"""Steps of a task: each keeps the product it should keep, and is never worse by what it minimizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt
from jqopt import algorithms, formats
from jqopt.algorithms import InputQuantizer, Problem, chain
from jqopt.algorithms import _statistics as statistics
from tests import arrays

N, K, TOKENS = 32, 64, 512


def activations(seed: int = 0, k: int = K, outliers: bool = True) -> jax.Array:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(TOKENS, k)) * np.geomspace(1, 0.1, k)) @ rng.normal(size=(k, k)) / 4
    if outliers:
        x[:, [3, k // 2]] *= 30
    return jnp.asarray(x, jnp.float32)


def weights(count: int = 2, seed: int = 1, k: int = K) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_t(4, size=(N + 16 * i, k)) / 8, jnp.float32) for i in range(count)]


def made(algorithm, x, ws, format="int8", input=None, **options) -> algorithms.Task:
    spec = formats.get(format)
    kinds = {s.name: s for s in (algorithms.CHANNELS, algorithms.MOMENTS, *algorithm.statistics)}
    state = {name: s.update(s.init(x.shape[1]), x) for name, s in kinds.items()}
    granularity = options.pop("granularity", spec.granularity)
    problem = Problem(spec, granularity, input, tuple(range(len(ws))), options.pop("powers", False))
    return algorithms.task(ws, problem, state, **options)


INT8 = InputQuantizer(formats.get("int8"), "tensor", True)


def outputs(task: algorithms.Task, x: jax.Array) -> list[np.ndarray]:
    """What the task's weights make of the scaled input, before any rounding."""
    seen = x if task.pre_scale is None else x * task.pre_scale
    out = []
    for w, low in zip(task.weights, task.low_rank, strict=True):
        y = jnp.einsum("tk,enk->ten", seen, w)
        if low is not None:
            y = y + jnp.einsum("tk,erk,enr->ten", seen, low[0].astype(jnp.float32), low[1].astype(jnp.float32))
        out.append(np.asarray(y)[:, 0])
    return out


STEPS = {
    "smoothquant": algorithms.smoothquant(),
    "smoothquant 0": algorithms.smoothquant(alpha=0.0),
    "smoothquant 0.5": algorithms.smoothquant(alpha=0.5),
    "smoothquant 1": algorithms.smoothquant(alpha=1.0),
    "awq": algorithms.awq(objective="weights"),
    "svdquant": algorithms.svdquant(rank=4, weighted=False),
    "svdquant weighted": algorithms.svdquant(rank=4),
    "smoothquant+svdquant": chain(algorithms.smoothquant(0.5), algorithms.svdquant(rank=4)),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_float_function_stays(name):
    x, ws = activations(), weights()
    task = made(STEPS[name], x, ws, input=INT8)
    for got, w in zip(outputs(STEPS[name].solve(task), x), ws, strict=True):
        want = np.asarray(x @ w.T)
        np.testing.assert_allclose(got, want, atol=(2e-2 if "svd" in name else 2e-6) * np.abs(want).max())


def test_alpha_zero_flattens_weights_and_one_activations():
    x, ws = activations(), weights()
    flat_w = STEPS["smoothquant 0"].solve(made(STEPS["smoothquant 0"], x, ws))
    largest = np.max([np.abs(np.asarray(w)).max((0, 1)) for w in flat_w.weights], axis=0)
    np.testing.assert_allclose(largest, 1, rtol=1e-5)
    flat_x = STEPS["smoothquant 1"].solve(made(STEPS["smoothquant 1"], x, ws))
    np.testing.assert_allclose(statistics.channel_amax(flat_x), 1, rtol=1e-5)


def error(task, x, ws, tokens=None) -> float:
    """Squared error of rounded weights and activations over all tokens x, or over `tokens` with the scales of x."""
    scale = 1 if task.pre_scale is None else task.pre_scale
    largest, x = jnp.max(jnp.abs(x * scale)), x if tokens is None else tokens
    seen = algorithms._base.input_qdq(task, x * scale, largest)
    total = 0.0
    for i, w in enumerate(ws):
        got = jnp.einsum("tk,enk->tn", seen, algorithms._base.qdq(task, i))
        total += float(jnp.sum(jnp.square(got - x @ w.T)))
    return total


@pytest.mark.parametrize("format", ["int8", "nvfp4", "int4"])
def test_the_searched_alpha_is_the_best_of_the_grid_and_of_none(format):
    """On the tokens that it is tried on, of so few the least number; over all of them it is among the best."""
    x, ws = activations(), weights()
    search = STEPS["smoothquant"]
    task = made(search, x, ws, format, INT8)
    tokens, there, parts = statistics.sample(task)
    assert int(parts) == 1 and there[: statistics.PART].all()
    for on, slack in ((tokens[: statistics.PART], 1e-4), (None, 0.02)):
        found = error(search.solve(task), x, ws, on)
        others = [error(algorithms.smoothquant(alpha=a / 10).solve(task), x, ws, on) for a in range(11)]
        assert found <= min([*others, error(task, x, ws, on)]) * (1 + slack)
    if format == "int8":
        assert found < 0.2 * error(task, x, ws)  # two outlier channels of 64 under one scale


@pytest.mark.parametrize(("seen", "parts"), [(1, 1), (16_384, 1), (100_000, 6), (262_144, 16), (10_000_000, 16)])
def test_a_search_tries_one_token_of_128(seen, parts):
    task = made(STEPS["smoothquant"], activations(), weights(), input=INT8)
    rows = task.stats["rows"]._replace(count=jnp.uint32(seen))
    assert int(statistics.sample(task.replace(stats={**task.stats, "rows": rows}))[2]) == parts


@pytest.mark.parametrize("format", ["int4", "nvfp4", "int8"])
def test_awq_is_never_worse_than_no_scale(format):
    for seed in range(3):
        x, ws = activations(seed), weights(seed=seed + 5)
        algorithm = algorithms.awq(objective="weights")
        task = made(algorithm, x, ws, format)
        assert error(algorithm.solve(task), x, ws) <= error(task, x, ws) * (1 + 1e-4)


@pytest.mark.parametrize("name", ["smoothquant 0.5", "awq"])
def test_ties_and_powers_of_two_hold(name):
    x, ws = activations(), weights()
    ties = jnp.arange(K, dtype=jnp.int32) % 16
    done = STEPS[name].solve(made(STEPS[name], x, ws, ties=ties, powers=True))
    pre = np.asarray(done.pre_scale)
    assert all(np.unique(pre[np.arange(K) % 16 == i]).size == 1 for i in range(16)) and np.unique(pre).size > 1
    assert np.all(np.log2(pre) == np.round(np.log2(pre)))
    for got, w in zip(outputs(done, x), ws, strict=True):
        np.testing.assert_allclose(got, np.asarray(x @ w.T), rtol=1e-5, atol=1e-4)


def test_channels_that_no_data_reached_keep_their_scale():
    x = activations().at[:, 5].set(0)
    for name in ("smoothquant 0.5", "smoothquant", "awq"):
        done = STEPS[name].solve(made(STEPS[name], x, weights()))
        assert np.all(np.isfinite(done.pre_scale)) and np.all(np.asarray(done.pre_scale) > 0)
    assert np.asarray(STEPS["smoothquant 0.5"].solve(made(STEPS["smoothquant 0.5"], x, weights())).pre_scale)[5] == 1


def test_a_full_rank_part_leaves_nothing_and_none_all():
    x, (w,) = activations(outliers=False), weights(1)
    none = algorithms.svdquant(rank=0).solve(made(algorithms.svdquant(rank=0), x, [w]))
    np.testing.assert_array_equal(none.weights[0][0], w)
    rest = [
        float(
            jnp.linalg.norm(
                algorithms.svdquant(rank=r, weighted=False).solve(made(STEPS["svdquant"], x, [w])).weights[0]
            )
        )
        for r in (1, 2, 4, 8)  # at most K / 16
    ]
    assert float(jnp.linalg.norm(w)) > rest[0] > rest[1] > rest[2] == pytest.approx(rest[3])


def weighted(d, h) -> float:
    return float(jnp.sum(jnp.matmul(d, h) * d))


def test_the_weighted_low_rank_part_takes_more_of_the_output():
    x, (w,) = activations(), weights(1)
    h = x.T @ x
    left = {}
    for flag in (False, True):
        algorithm = algorithms.svdquant(rank=4, weighted=flag)
        left[flag] = weighted(algorithm.solve(made(algorithm, x, [w])).weights[0][0], h)
    assert left[True] < left[False] < weighted(w, h)


@pytest.mark.parametrize("format", ["nvfp4", "int4", "mxfp4", "int8"])
def test_local_hessian_minimizes_each_tiles_part_of_the_output_error(format):
    """By its own measure it is never above mse, nor mse below it by the squared error."""
    x, (w,) = activations(), weights(1)
    spec = formats.get(format)
    tile = spec.tile_for(N, K, spec.granularity)[1]
    h = np.asarray(statistics.moments(made(algorithms.local_hessian(), x, [w])))
    local = np.kron(np.eye(-(-K // tile)), np.ones((tile, tile)))[:K, :K] * h

    def run(algorithm):
        task = algorithm.solve(made(algorithm, x, [w], format))
        d = np.asarray(algorithms._base.qdq(task, 0)[0] - w)
        return float(np.sum((d @ local) * d)), float(np.sum(d * d))

    (mine, plain), (theirs, least) = run(algorithms.local_hessian()), run(algorithms.mse())
    assert mine <= theirs * (1 + 1e-5) and least <= plain * (1 + 1e-5)


def test_awq_clip_is_never_worse_than_none_and_shrinks_only():
    x, (w,) = activations(), weights(1)
    algorithm = algorithms.awq_clip()
    task = made(algorithm, x, [w], "int4")
    done = algorithm.solve(task)
    tile = algorithms.max().solve(task)
    h = statistics.moments(task)
    errors = [weighted(algorithms._base.qdq(t, 0)[0] - w, h) for t in (done, tile)]
    assert errors[0] <= errors[1] * (1 + 1e-5)  # one tile a row: its part is the whole
    own = np.abs(np.asarray(w)).reshape(N, -1, K if K < 128 else 128).max(-1)
    factor = np.asarray(done.tiles[0][0]) / own
    assert np.all((factor <= 1) & (factor >= 0.5 - 1e-6)) and np.any(factor < 1)


def test_four_over_six_chooses_four_where_values_lie_near_the_largest():
    """Between 4 and 6 sixths of the largest there is no e2m1; with the largest as 4 there is one at 5 sixths of it."""
    near = np.tile(np.array([6, 5, 5, -5, 5, 5, -5, 5, 5, 5, 5, -5, 5, 5, 5, 5], np.float32), (1, 4))
    plain = np.tile(np.array([6, 4, 3, -2, 1.5, 1, 0.5, 0, 6, 4, 3, -2, 1.5, 1, 0.5, 0], np.float32), (1, 4))
    algorithm = algorithms.four_over_six()
    for rows, factor in ((near, 1.5), (plain, 1.0)):
        done = algorithm.solve(made(algorithm, jnp.ones((4, 64)), [jnp.asarray(rows)], "nvfp4"))
        np.testing.assert_allclose(np.asarray(done.tiles[0]) / 6, factor)
        codes = algorithms.rounded(done).codes[0]
        assert float(codes.global_scale[0]) == pytest.approx(6 / (6 * 256), rel=1e-6)


def test_activations_choose_between_four_and_six_by_themselves():
    from jqopt import _numerics

    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 256)), jnp.float32)
    own, plain = formats.get("nvfp4_four_over_six"), formats.get("nvfp4")
    got = _numerics.qdq_matrix(x, own)
    wide = 448 / 256 * jnp.max(jnp.abs(x))
    amax = jnp.max(jnp.abs(x.reshape(64, 16, 16)), -1)
    tried = [_numerics.qdq_matrix(x, plain, tensor_amax=wide, tile_amax=amax * f) for f in (1.0, 1.5)]
    errors = np.stack([np.square(np.asarray(t - x)).reshape(64, 16, 16).sum(-1) for t in tried])
    want = np.where((errors[1] < errors[0])[..., None], *(np.asarray(t).reshape(64, 16, 16) for t in tried[::-1]))
    np.testing.assert_allclose(np.asarray(got), want.reshape(64, 256), rtol=3e-7)  # the global scale: two ways to round
    codes = _numerics.quantize_matrix(x, own)
    np.testing.assert_array_equal(_numerics.dequantize_matrix(*codes, own, 256), got)


def test_steps_that_would_undo_each_other_are_refused():
    with pytest.raises(jqopt.PlanError, match=r"smoothquant scales .* can't follow gptq.*write \[smoothquant, gptq\]"):
        chain(algorithms.gptq(), algorithms.smoothquant())
    with pytest.raises(jqopt.PlanError, match="with one that rounds"):
        chain(algorithms.gptq(), algorithms.gptq())


def test_a_chain_gathers_each_statistic_once():
    both = chain(algorithms.awq(), algorithms.gptq())
    assert sorted(s.name for s in both.statistics) == ["amax", "channels", "moments", "rows"]
    assert [a.name for a in both.parts] == ["awq", "gptq"] and both.scales_input and both.uses_data


@pytest.mark.parametrize("split", [[512], [1, 200, 311], [128] * 4])
def test_any_split_keeps_the_same_sample(split):
    x = activations()
    x = jnp.concatenate([x] * 6)  # more than a sample
    parts = jnp.split(x, np.cumsum([*split, 512, 700])[:-1])
    state = algorithms.ROWS.init(K)
    for part in parts:
        state = algorithms.ROWS.update(state, part)
    whole = algorithms.ROWS.update(algorithms.ROWS.init(K), x)
    sorted_by_rank = lambda s: np.asarray(s.x)[np.argsort(s.rank)]  # noqa: E731
    np.testing.assert_array_equal(sorted_by_rank(state), sorted_by_rank(whole))
    numbers = np.argsort(np.asarray(jax.vmap(statistics._hash)(jnp.arange(len(x), dtype=jnp.uint32))))
    np.testing.assert_array_equal(sorted_by_rank(whole), np.asarray(x)[numbers[: statistics.SAMPLE]])
    assert int(state.count) == len(x) and np.unique(np.asarray(state.rank)).size == statistics.SAMPLE


def test_qep_reaches_the_least_squares_solution():
    x, (w,) = activations(outliers=False), weights(1)
    noisy = x + 0.1 * arrays.normal(7, x.shape) * jnp.std(x)
    algorithm = algorithms.qep(strength=1.0, damp=1e-6)
    task = made(algorithm, noisy, [w])
    same = algorithm.solve(task.replace(stats={**task.stats, "cross": jnp.zeros((K, K))}))
    np.testing.assert_array_equal(same.weights[0][0], w)
    done = algorithm.solve(task.replace(stats={**task.stats, "cross": (x - noisy).T @ noisy}))
    got = np.asarray(done.weights[0][0])
    want = np.linalg.lstsq(np.asarray(noisy, np.float64), np.asarray(x @ w.T, np.float64), rcond=None)[0].T
    off = lambda v: np.linalg.norm(np.asarray(noisy) @ v.T - np.asarray(x @ w.T))  # noqa: E731
    assert off(got) <= off(want) * 1.01 < off(np.asarray(w))


def after(algorithm, format, x, w):
    """(what the codes stand for [N, K], the task before)"""
    from jqopt import _numerics

    task = made(algorithm, x, [w], format)
    solve = jax.jit(lambda t: algorithms.rounded(algorithm.solve(t)).codes[0])
    codes = jax.tree.map(lambda c: c[0], solve(task))
    return np.asarray(_numerics.dequantize_matrix(*codes, formats.get(format), w.shape[1])), task


@pytest.mark.parametrize("format", ["int4", "nvfp4", "int8"])
def test_hqq_lowers_the_norm_that_it_minimizes_in_each_tile(format):
    x, (w,) = activations(), weights(1)
    tile = formats.get(format).tile_for(N, K, formats.get(format).granularity)[1]
    lost = lambda q: (np.abs(q - np.asarray(w)) ** 0.7).reshape(N, -1, min(tile, K)).sum(-1)  # noqa: E731
    mine, plain = (lost(after(a, format, x, w)[0]) for a in (algorithms.hqq(), algorithms.max()))
    assert np.all(mine <= plain * (1 + 1e-4)) and mine.sum() < 0.995 * plain.sum()


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("format", ["int4", "nvfp4"])
def test_lsq_never_ends_above_where_it_starts(format, dual):
    """Of all steps each row keeps the one of least output error, the scales of mse among them."""
    x, (w,) = activations(), weights(1)
    q, task = after(algorithms.lsq(steps=60, dual=dual), format, x, w)
    start, _ = after(algorithms.mse(), format, x, w)
    h = np.asarray(statistics.moments(task))
    rows = [np.einsum("nk,kj,nj->n", d, h, d) for d in (q - np.asarray(w), start - np.asarray(w))]
    assert np.all(rows[0] <= rows[1] * (1 + 1e-3)) and rows[0].sum() < 0.9 * rows[1].sum()


def test_dual_lsq_stores_another_scale_than_codes_were_made_with():
    x, (w,) = activations(), weights(1)
    algorithm = algorithms.lsq(steps=60, dual=True)
    done = jax.jit(algorithm.solve)(made(algorithm, x, [w], "int4"))
    stored = np.asarray(done.codes[0].scale[0]) * 7
    assert np.any(np.abs(stored / np.asarray(done.tiles[0][0]) - 1) > 1e-3)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [("hqq", {"norm": 2}, "above 0 and up to 1"), ("lsq", {"rate": 0}, "between 0 and 1"),
     ("qep", {"strength": 2}, "from 0 to 1"), ("svdquant", {"rank": -1}, "such as 32"),
     ("hadamard", {"block": 1.5}, "number of channels"), ("awq", {"objective": "best"}, "weights or outputs"),
     ("smoothquant", {"alpha": 2}, "search, or a number"), ("awq", {"alpha_grid": 0}, "number of steps"),
     ("awq_clip", {"least": 2}, "between 0 and 1")],
)  # fmt: skip
def test_wrong_options_are_refused(name, options, said):
    with pytest.raises(jqopt.PlanError, match=said):
        algorithms.get(name, **options)
