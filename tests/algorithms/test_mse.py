"""mse: never worse than max, in any format; the clip that theory gives for a Gaussian."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqopt import _numerics, algorithms, formats
from jqopt.algorithms import Problem

FORMATS = ("int8", "int4", "uint4", "fp8", "nvfp4", "mxfp4", "mxfp8", "mxfp6", "mxint8", "nf4")


def values(codes, format, k) -> np.ndarray:
    return np.asarray(_numerics.dequantize_matrix(*codes, format, k))


def codes_of(name: str, w: jax.Array, problem: Problem):
    solve = lambda w: algorithms.rounded(algorithms.get(name).solve(algorithms.task([w], problem)))  # noqa: E731
    return jax.tree.map(lambda x: x[0], jax.jit(solve)(w).codes[0])


def both(name: str, w: jax.Array, granularity: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors of each value under max and under mse."""
    format = formats.get(name)
    problem = Problem(format, granularity or format.granularity)
    run = {a: codes_of(a, w, problem) for a in ("max", "mse")}
    return tuple(np.square(values(c, format, w.shape[1]) - np.asarray(w)) for c in run.values())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["normal", "outliers", "uniform", "zeros"])
def test_it_is_never_worse_than_max(name, kind):
    rng = np.random.default_rng(0)
    w = {"normal": rng.normal(size=(8, 256)), "uniform": rng.uniform(-1, 1, (8, 256)), "zeros": np.zeros((8, 256)),
         "outliers": rng.standard_t(2, (8, 256))}[kind]  # fmt: skip
    plain, searched = both(name, jnp.asarray(w, jnp.float32))
    format = formats.get(name)
    rows, cols = format.tile_for(8, 256, format.granularity)
    tile = lambda e: e.reshape(8 // rows, rows, 256 // cols, cols).sum((1, 3))  # noqa: E731
    assert np.all(tile(searched) <= tile(plain) * (1 + 1e-6) + 1e-30)


def test_it_finds_the_clip_of_a_gaussian():
    """The best clip of 4-bit codes -7..7 is 2.5 standard deviations, of 8-bit codes 3.9: max is 4.5 of a million."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 200_000)), jnp.float32)
    for name, sigma in (("int4", 2.5), ("int8", 3.9)):
        format = formats.get(name)
        codes = codes_of("mse", w, Problem(format, "channel"))
        clip = np.asarray(codes.scale) * format.element.max
        step = 0.025 * float(jnp.abs(w).max())
        assert np.all(np.abs(clip - sigma) < 1.5 * step), (name, clip)


def test_both_ends_of_a_range_with_a_zero_point_are_chosen():
    """Against every pair of ends on a grid, by hand: skewed values with an outlier below."""
    rng = np.random.default_rng(0)
    w = rng.gumbel(size=(4, 128)).astype(np.float32)
    w[:, 5] = -6.0
    plain, searched = (e.sum(1) for e in both("uint4", jnp.asarray(w)))

    def error(row: np.ndarray, low: float, high: float) -> float:
        scale = (high - low) / 15
        zero = np.round(-low / scale)
        return float(np.square((np.clip(np.round(row / scale) + zero, 0, 15) - zero) * scale - row).sum())

    sides = np.arange(0.5, 1.001, 0.025)
    best = [min(error(r, a * r.min(), b * r.max()) for a in sides for b in sides) for r in w]
    assert np.all(np.asarray(best) < plain) and np.all(searched <= 1.02 * np.asarray(best))
