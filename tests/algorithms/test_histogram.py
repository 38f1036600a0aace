"""Histograms exact under any split, growth and mesh; the clips of ModelOpt's own histogram; the clips theory gives."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jqopt import formats
from jqopt.algorithms import histogram, ranges
from jqopt.algorithms.histogram import Counts, Histogram

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "modelopt_golden.npz")
COUNTS, EDGES = GOLDEN["calib/hist/counts"], GOLDEN["calib/hist/bin_edges"]
DATA = GOLDEN["calib/hist/data"].astype(np.float32)

update, merge, entropy = jax.jit(histogram.update), jax.jit(histogram.merge), jax.jit(ranges.entropy)
int8 = jax.jit(lambda s: ranges.mse(s, ranges.rounder(formats.get("int8"))))


def percentile(state: Histogram, p: float) -> float:
    return float(jax.jit(ranges.percentile, static_argnums=1)(state, p))


def gathered(*batches: np.ndarray | jax.Array) -> Histogram:
    state = histogram.init()
    for batch in batches:
        state = update(state, jnp.asarray(batch, jnp.float32).reshape(1, -1))
    return state


def numbers(state: Histogram) -> list[int]:
    """The counts as Python's whole numbers."""
    return [int(h) * 2**20 + int(low) for h, low in zip(np.asarray(state.high), np.asarray(state.low), strict=True)]


def same(a: Histogram, b: Histogram) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def by_numpy(x: np.ndarray) -> tuple[int, np.ndarray]:
    """(exponent, counts) in float64, with NumPy's own histogram."""
    x = np.abs(x.astype(np.float64)).ravel()
    exponent = int(np.floor(np.log2(x.max()))) + 1
    return exponent, np.histogram(x, bins=2048, range=(0, 2.0**exponent))[0]


def whole(counts: np.ndarray) -> Counts:
    return Counts(jnp.zeros(counts.size, jnp.int32), jnp.asarray(counts, jnp.int32))


# The statistic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0**-90, 2.0**120, 0.37])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_counts_as_numpy_does(scale, dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_t(3, (64, 37)) * scale, dtype)
    state = update(histogram.init(), x)
    exponent, counts = by_numpy(np.asarray(x.astype(jnp.float32)))
    assert int(state.exponent) == exponent and np.array_equal(numbers(state), counts)
    assert float(state.amax) == float(jnp.abs(x).max()) and float(state.seen) == 1


def test_edges_belong_to_the_bin_above():
    """Powers of two lie at the lower edge of the upper half; 2^e itself opens the next range."""
    state = gathered(np.array([1.0, 2.0, np.nextafter(np.float32(2), np.float32(0)), 0.0, -0.5]))
    assert int(state.exponent) == 2
    assert {j: n for j, n in enumerate(numbers(state)) if n} == {0: 1, 256: 1, 512: 1, 1023: 1, 1024: 1}


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(0, 10_000))
def test_any_split_and_order_gives_the_same_state(splits, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_t(2, 400).astype(np.float32) * 2.0 ** rng.integers(-20, 20)
    parts = np.split(x, [100 * s for s in sorted(splits)])
    assert same(gathered(*parts), gathered(x))
    assert same(gathered(*parts[::-1]), gathered(x))


@pytest.mark.parametrize("steps", [0, 1, 5, 11, 30, 200])
def test_growth_keeps_every_count(steps):
    """A first batch of small values, then one 2^steps times as large: as if both had come at once."""
    x = np.random.default_rng(1).uniform(0.5, 1, 999).astype(np.float32) * np.float32(2.0**-99)
    top = np.float32(2.0 ** (steps - 99))
    state = gathered(x, np.array([top]))
    assert sum(numbers(state)) == 1000 and same(state, gathered(np.append(x, top)))
    assert int(state.exponent) == max(steps - 98, -98)
    width = 2.0 ** (int(state.exponent) - 11)
    assert np.array_equal(numbers(state), np.bincount((np.append(x, top) / width).astype(int), minlength=2048))


def test_counts_beyond_the_whole_numbers_of_float32():
    """999 values, doubled 36 times: 6.9e13 in all, far above 2^24 and 2^32."""
    state = gathered(np.random.default_rng(2).normal(size=999))
    first = numbers(state)
    for _ in range(36):
        state = merge(state, state)
    assert numbers(state) == [n << 36 for n in first]
    once = merge(state, gathered(np.full(1, float(state.amax))))
    assert sum(numbers(once)) == (999 << 36) + 1


def test_what_is_not_finite_stays_to_be_reported():
    for bad in (np.nan, np.inf, -np.inf):
        state = gathered(np.array([1.0, bad, 2.0]), np.ones(5))
        assert sum(numbers(state)) == 8
        expected = np.float32(abs(bad))
        assert np.array_equal(state.amax, expected, equal_nan=True)
        for found in (percentile(state, 99.9), entropy(state), int8(state)):
            assert np.array_equal(np.float32(found), expected, equal_nan=True)


def test_nothing_seen():
    state = update(histogram.init(), jnp.zeros((0, 4), jnp.float32))
    assert same(state, histogram.init())
    assert percentile(state, 99.0) == 0 and float(entropy(state)) == 0 and float(int8(state)) == 0


def test_under_scan_and_vmap():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(3, 4, 8, 16)) * [[[[1.0]]], [[[300.0]]], [[[1e-3]]]])
    x = x.astype(jnp.float32)
    scanned = jax.jit(lambda x: jax.lax.scan(lambda s, b: (histogram.update(s, b), None), histogram.init(), x)[0])
    alone = [scanned(layer) for layer in x]
    stacked = jax.jit(jax.vmap(scanned))(x)
    for i, state in enumerate(alone):
        assert same(jax.tree.map(lambda s, i=i: s[i], stacked), state) and same(state, gathered(*x[i]))
    for solve in (entropy, int8, lambda s: ranges.percentile(s, 99.0)):
        one = jax.jit(solve)
        np.testing.assert_allclose(jax.jit(jax.vmap(solve))(stacked), [one(s) for s in alone], rtol=1e-6)


def test_a_mesh_equals_one_device():
    """Eight devices, of which each sees another range; two updates each, before them some data in common."""
    mesh, spec = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("d",)), jax.sharding.PartitionSpec
    x = np.random.default_rng(4).normal(size=(2, 64, 16)) * np.repeat(2.0 ** np.arange(8), 8)[:, None]
    x = jnp.asarray(x, jnp.float32)
    start = gathered(np.full(77, 0.25))

    def body(x):
        after = histogram.update(histogram.update(start, x[0]), x[1])
        return histogram.allreduce(start, after, ("d",))

    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec(None, "d"), out_specs=spec()))
    expected = gathered(np.full(77, 0.25), *x)
    assert same(run(x), expected)
    placed = jax.device_put(x.reshape(-1, 16), jax.sharding.NamedSharding(mesh, spec("d")))  # the compiler's own split
    assert same(update(start, placed), expected)


# Percentile ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.0, 50.0, 99.9, 99.99])
def test_percentile_is_the_right_edge_of_the_bin_of_the_quantile(p):
    x = np.abs(np.random.default_rng(5).normal(size=20_000)).astype(np.float32)
    state = gathered(x)
    exact = np.sort(x)[math.ceil(Fraction(str(p)) * x.size / 100) - 1]
    width = 2.0 ** (int(state.exponent) - 11)
    assert percentile(state, p) == min(float(x.max()), (np.floor(exact / width) + 1) * width)


def test_percentile_is_monotone_and_reaches_the_amax():
    state = gathered(np.random.default_rng(6).standard_t(2, 50_000))
    found = [percentile(state, p) for p in (0.01, 10, 49.9, 50, 99, 99.99, 100)]
    assert found == sorted(found) and found[-1] == float(state.amax)


def test_percentile_counts_single_values_among_billions():
    """2^32 values in bin 0, then 5, 3 and 2: float32 cumulative counts could not tell these tails apart."""
    counts = np.zeros(2048, np.int64)
    counts[[0, 1100, 1200, 1300]] = 2**32, 5, 3, 2
    total = counts.sum()
    halves = Counts(jnp.asarray(counts >> 20, jnp.int32), jnp.asarray(counts & (2**20 - 1), jnp.int32))
    for above, expected in ((0.5, 1300), (2.0, 1200), (4.9, 1200), (5.0, 1100), (9.9, 1100), (10.0, 0)):
        assert int(ranges.percentile_bin(halves, 100 * (1 - above / float(total)))) == expected, above


@pytest.mark.parametrize("p", [99.0, 99.99])
def test_percentile_is_one_bin_above_modelopts(p):
    """ModelOpt gives the left edge of the bin in which p per cent are reached, and so clips more than asked."""
    found = int(ranges.percentile_bin(whole(COUNTS), p))
    assert EDGES[found] == GOLDEN[f"calib/hist/percentile{p}"]
    state = gathered(*DATA)
    right = min(EDGES[found + 1], float(state.amax))
    asked = np.quantile(np.abs(DATA), p / 100, method="inverted_cdf")
    assert GOLDEN[f"calib/hist/percentile{p}"] <= asked <= right
    width = 2.0 ** (int(state.exponent) - 11)
    assert percentile(state, p) == min((np.floor(asked / width) + 1) * width, float(state.amax))


# Entropy ------------------------------------------------------------------------------------------------------------


def by_definition(counts: np.ndarray, levels: int) -> np.ndarray:
    """The divergences in float64, bin by bin, as the method is described."""
    c = counts.astype(np.float64)
    c[0] = c[1]
    found = []
    for kept in range(128, c.size + 1):
        q, level = np.zeros(kept), np.arange(kept) * levels // kept
        filled = c[:kept] > 0
        of_level, bins = np.bincount(level, c[:kept], levels), np.bincount(level[filled], minlength=levels)
        q[filled] = (of_level / np.maximum(bins, 1))[level][filled]
        p = c[:kept].copy()
        p[-1] += c[kept:].sum()
        p, q = p / p.sum(), q / q.sum()
        on = p > 0
        found.append(np.inf if np.any(q[on] == 0) else np.sum(p[on] * np.log(p[on] / q[on])))
    return np.array(found)


@pytest.mark.parametrize("levels", [8, 128, 256])
def test_divergences_are_those_of_the_definition(levels):
    ours = np.asarray(jax.jit(ranges.divergences, static_argnums=1)(whole(COUNTS), levels))
    expected = by_definition(COUNTS, levels)
    assert np.array_equal(np.isinf(ours), np.isinf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(ours[finite], expected[finite], rtol=2e-5, atol=1e-6)


def test_entropy_equals_modelopts_on_its_histogram():
    kept = int(jax.jit(ranges.entropy_bins, static_argnums=(1, 2))(whole(COUNTS), 128, COUNTS.size))
    assert EDGES[kept] == GOLDEN["calib/hist/entropy"]


def test_entropy_on_our_own_histogram_is_within_a_bin_of_modelopts():
    """Bins of other widths (2^-6 to 0.0067) can't agree closer; here they happen to agree in what to keep."""
    state = gathered(*DATA)
    assert abs(float(entropy(state)) - GOLDEN["calib/hist/entropy"]) <= 2.0 ** (int(state.exponent) - 11)


def test_entropy_leaves_the_histogram_as_it_was():
    state = gathered(*DATA)
    before = numbers(state)
    entropy(state)
    assert numbers(state) == before


def test_entropy_of_a_uniform_histogram_is_the_amax():
    state = gathered(np.linspace(-1.9999, 1.9999, 200_000))
    assert float(entropy(state)) >= 0.995 * float(state.amax)


def test_entropy_clips_a_far_tail():
    x = np.append(np.random.default_rng(7).normal(size=200_000), [60.0])
    assert 3 < float(entropy(gathered(x))) < 8


# Squared error ------------------------------------------------------------------------------------------------------


def best_clip_of_a_gaussian(most: int) -> float:
    """By integration: the clip a that minimizes E (round(x most / a), at most `most`, a / most - x)^2."""
    x = np.linspace(0, 9, 200_001)
    density = np.exp(-x * x / 2)
    clips = np.arange(1, 6, 0.005)
    return clips[np.argmin([(density * (np.minimum(np.round(x * most / a), most) * a / most - x) ** 2).sum()
                            for a in clips])]  # fmt: skip


@pytest.mark.optimized  # computes more than it compiles
@pytest.mark.parametrize(("name", "expected"), [("int4", 2.475), ("int8", 3.92)])
def test_mse_finds_the_clip_of_a_gaussian(name, expected):
    """The data are a million quantiles of |x|, without noise in the tail; candidates lie 1.1 % apart.

    A grid of tenths of sigma gives 2.5 and 3.9.
    """
    format = formats.get(name).with_block(None)
    assert best_clip_of_a_gaussian(int(format.element.max)) == pytest.approx(expected, abs=0.006)
    n = 1_000_000
    state = gathered(-jax.scipy.special.ndtri((jnp.arange(n, dtype=jnp.float32) + 0.5) / (2 * n)))
    found = float(jax.jit(lambda s: ranges.mse(s, ranges.rounder(format)))(state))
    assert found == pytest.approx(expected, rel=0.011)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "fp8_e5m2"])
@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy", "outlier", "relu", "one value"])
def test_mse_is_never_worse_than_max(name, kind):
    rng = np.random.default_rng(9)
    x = {"normal": rng.normal(size=5000), "uniform": rng.uniform(-1, 1, 5000), "heavy": rng.standard_t(1, 5000),
         "outlier": np.append(rng.normal(size=5000), 3e6), "relu": np.maximum(rng.normal(size=5000), 0),
         "one value": np.full(9, 0.7)}[kind]  # fmt: skip
    state = gathered(x)
    rounded = jax.jit(ranges.rounder(formats.get(name).with_block(None)))
    centers = (np.arange(2048) + 0.5) * 2.0 ** (int(state.exponent) - 11)
    counts = np.array(numbers(state), np.float64)

    def error(amax) -> float:
        got = np.asarray(rounded(jnp.asarray(centers, jnp.float32), jnp.float32(amax)), np.float64)
        return float((counts * (got - centers) ** 2).sum())

    found = float(jax.jit(lambda s: ranges.mse(s, rounded))(state))
    assert 0 < found <= float(state.amax)
    assert error(found) <= error(float(state.amax)) * (1 + 1e-6)


def test_modelopts_mse_always_takes_its_first_candidate():
    """It hands the number of bits to its quantizer as the bias, and False as the bits: every value becomes amax + 8.

    Its result is then the smallest candidate, whatever the data: here it clips 45 % of the values. The bits in their
    place give the candidate 24.78 of its own histogram; ours differs by less than a step of candidates (1.1 %).
    """
    centers = ((EDGES[1:] + EDGES[:-1]) / 2).astype(np.float64)
    theirs = float(GOLDEN["calib/hist/mse"])
    assert theirs == np.float32(centers[128])
    candidates = centers[128:]
    with_defect = [(COUNTS * (amax + 8 - centers) ** 2).sum() for amax in candidates]
    assert candidates[np.argmin(with_defect)] == pytest.approx(theirs)
    step = candidates / 127
    meant = [(COUNTS * (np.clip(np.round(centers / s), -127, 127) * s - centers) ** 2).sum() for s in step]
    assert candidates[np.argmin(meant)] == pytest.approx(24.782, abs=1e-3)
    ours = float(int8(gathered(*DATA)))
    assert ours == pytest.approx(24.782, rel=0.011)
    x = np.abs(DATA).astype(np.float64).ravel()
    error = lambda a: ((np.clip(np.round(x / (a / 127)), -127, 127) * (a / 127) - x) ** 2).sum()  # noqa: E731
    assert error(ours) < 0.01 * error(theirs)


# All of them --------------------------------------------------------------------------------------------------------


def test_zeros_only():
    state = gathered(np.zeros(100))
    assert sum(numbers(state)) == 100 and percentile(state, 99.0) == 0
    assert float(entropy(state)) == 0 and float(int8(state)) == 0


def test_a_huge_outlier_leaves_one_bin_to_the_rest():
    """1e30 among normal values: a percentile can't see finer than the bin, 2^-11 of the range, and nothing is NaN."""
    state = gathered(np.append(np.random.default_rng(10).normal(size=10_000), 1e30))
    assert percentile(state, 99.0) == 2.0 ** (100 - 11)
    for found in (float(entropy(state)), float(int8(state))):
        assert 0 < found <= float(np.float32(1e30))


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**40])
def test_powers_of_two_scale_through(factor):
    x = np.random.default_rng(11).standard_t(3, 20_000).astype(np.float32)
    one, other = gathered(x), gathered(x * np.float32(factor))
    for solve in (entropy, int8, lambda s: ranges.percentile(s, 99.5)):
        assert float(solve(other)) == float(solve(one)) * factor
