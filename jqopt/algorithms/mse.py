"""mse: weight scales that minimize the squared rounding error of each tile, searched around the largest value's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jqopt import _numerics
from jqopt._numerics import Codes, amax_of, quantize_matrix
from jqopt.algorithms import max as _max
from jqopt.algorithms._base import Algorithm, Problem
from jqopt.formats import Format

STEP = 0.025


def factors(format: Format) -> np.ndarray:
    """What the largest absolute value of a tile is multiplied by: 1 first, so that a tie keeps it, then from 0.5.

    Up to 1 where codes are evenly spaced. Those of small floats lie closer below the largest: there it may pay to scale
    it to the second largest code (6 / 4 = 1.5 times for e2m1), so candidates reach 1.75.
    """
    most = 1.75 if format.element.kind == "float" else 1.0
    return np.concatenate([[1.0], np.arange(0.5, most + STEP / 2, STEP)]).astype(np.float32)


def mse() -> Algorithm:
    """Round to nearest under scales searched per tile; the largest value's own is among the candidates.

    So the error is never larger than that of `max`. It needs no data: activations get the scales of `max`. Formats
    with zero points keep the scales of `max`, since a tile's amax says too little of them.

    Source: the `mse` calibrator of ModelOpt, whose candidates leave out 1.
    """
    return Algorithm("mse", _max.init, _max.update, solve, lambda state: state.amax, _max.allreduce)


def solve(w: jax.Array, state: object, problem: Problem) -> Codes:
    """w [n, k]; the statistics aren't used."""
    return quantize_matrix(
        w, problem.format, granularity=problem.granularity, tensor_amax=problem.tensor_amax,
        tile_amax=tile_amax(w, problem),
    )  # fmt: skip


def tile_amax(w: jax.Array, problem: Problem) -> jax.Array | None:
    """The amax [rows, cols] that each tile of w [n, k] is best scaled by; None where the format takes none."""
    format, granularity = problem.format, problem.granularity
    if format.zero_point or (problem.tensor_amax is not None and not format.global_scale):
        return None
    n, k = w.shape
    tile = format.tile_for(n, k, granularity)
    tiles = _numerics.to_tiles(w.astype(jnp.float32), tile)
    own = amax_of(tiles, (-3, -1))

    def candidate(best: tuple[jax.Array, jax.Array], factor: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        amax = own * factor
        got = _numerics.qdq_matrix(w, format, granularity=granularity, tensor_amax=_whole(problem, own), tile_amax=amax)
        error = jnp.sum(jnp.square(_numerics.to_tiles(got, tile) - tiles), axis=(-3, -1))
        better = error < best[1]
        return (jnp.where(better, amax, best[0]), jnp.where(better, error, best[1])), None

    start = (own, jnp.full(own.shape, jnp.inf, jnp.float32))
    (found, _), _ = jax.lax.scan(candidate, start, jnp.asarray(factors(format)))
    return found


def _whole(problem: Problem, own: jax.Array) -> jax.Array | None:
    """The tensor's amax: the global scale must not follow the candidate."""
    if not problem.format.global_scale:
        return None
    return amax_of(own) if problem.tensor_amax is None else problem.tensor_amax
