"""Scales of weights found by search: mse, local_hessian, awq_clip, four_over_six."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jqopt import _numerics
from jqopt._numerics import amax_of
from jqopt.algorithms import _statistics
from jqopt.algorithms._base import Algorithm, Problem, Task, qdq
from jqopt.errors import PlanError
from jqopt.formats import Format

STEP = 0.025
_Error = Callable[[Array, tuple], Array]
"""The error of each tile [.., rows, cols] of a difference [.., n, k]; the tile is (rows, columns)."""


def factors(format: Format) -> np.ndarray:
    """What the largest absolute value of a tile is multiplied by: 1 first, so that a tie keeps it, then from 0.5.

    Up to 1.1 where codes are evenly spaced (-8 reaches further than 7). Those of small floats lie closer below the
    largest: there it may pay to scale it to the second largest code (6 / 4 = 1.5 times for e2m1), so candidates
    reach 1.75. For nvfp4 they lie close enough to meet every e4m3 scale between.
    """
    most = 1.75 if format.element.kind == "float" else 1.1
    return np.concatenate([[1.0], np.arange(0.5, most + STEP / 2, STEP)]).astype(np.float32)


def mse() -> Algorithm:
    """Scales that minimize the squared rounding error of each tile; the largest value's own is among the candidates.

    So the error is never larger than that of `max`. It needs no data: activations get the scales of `max`. With zero
    points both ends of a tile's range are chosen. One scale for a tensor is chosen for all the weights that share it.

    Source: the `mse` calibrator of ModelOpt, whose candidates leave out 1; for nvfp4 its sweep over e4m3 scales.
    """
    return Algorithm("mse", lambda task: searched(task, factors(task.problem.format), _squared), stage="range")


def local_hessian() -> Algorithm:
    """As `mse`, minimizing each tile's part of the output error: d^T H_bb d, H_bb the tile's block of sum x x^T.

    Source: `local_hessian` of ModelOpt, whose blocks are nvfp4's 16; here any tile along k.
    """

    def solve(task: Task) -> Task:
        return searched(task, factors(task.problem.format), _weighted(_statistics.moments(task)))

    return Algorithm("local_hessian", solve, "range", (_statistics.AMAX, _statistics.MOMENTS))


def awq_clip(least: float = 0.5, step: float = 0.05) -> Algorithm:
    """Shrinks each tile's range to the factor of 1, 1 - step, .., least that minimizes its part of the output error.

    The error is over all tokens seen, by their second moments, where AWQ takes a sample of 64 (Lin et al., AWQ,
    arXiv 2306.00978, section 3.2).

    Raises:
        PlanError: an option has no such value.
    """
    if not 0 < least < 1 or not 0 < step < 1:
        raise PlanError(f"awq_clip: least is {least!r} and step {step!r}; write numbers between 0 and 1")
    candidates = np.concatenate([[1.0], np.arange(1 - step, least - step / 2, -step)]).astype(np.float32)

    def solve(task: Task) -> Task:
        return searched(task, candidates, _weighted(_statistics.moments(task)))

    return Algorithm("awq_clip", solve, "range", (_statistics.AMAX, _statistics.MOMENTS))


def four_over_six() -> Algorithm:
    """For nvfp4: each block's largest value becomes 6 or 4, whichever gives the smaller squared error.

    The global scale is amax / (6 * 256), so that 1.5 times the largest block scale (384) is still an e4m3. What `mse`
    chooses from holds both, so it is at least as good for weights; for activations write the format
    `nvfp4_four_over_six`. Source: Cook et al., Four Over Six, arXiv 2512.02010.
    """

    def solve(task: Task) -> Task:
        wide = tuple(None if a is None else a * np.float32(448 / 256) for a in task.amax)
        return searched(task.replace(amax=wide), np.asarray([1.0, 1.5], np.float32), _squared)

    return Algorithm("four_over_six", solve, "range", refuses=_only_two_levels)


def _only_two_levels(problem: Problem, n: int, k: int) -> str:
    return "" if problem.format.global_scale else f"it is for nvfp4, not {problem.format.name}"


def tried(task: Task) -> Task:
    """The task as a trial of rounding should see it: scales from a few factors, if a later step will search them."""
    if not task.problem.searched:
        return task
    few = [1.0, 0.95, 0.9, 0.85, 0.8, 0.7]
    more = [1.25, 1.5] if task.problem.format.element.kind == "float" else []
    return searched(task, np.asarray([*few, *more], np.float32), _squared)


def searched(task: Task, candidates: np.ndarray, error: _Error) -> Task:
    """The task with the candidate (a factor of its largest absolute value; ties keep the earlier) of least error.

    With zero points candidates are `pairs`, of the two ends of the range.
    """
    p = task.problem
    if p.format.zero_point:
        candidates = pairs(candidates)
    elif p.granularity == "tensor" and not p.format.global_scale:
        return task.replace(amax=_tensor_level(task, candidates, error))
    return task.replace(tiles=tuple(_best(task, i, candidates, error) for i in range(len(task.weights))))


SIDES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)


def pairs(candidates: np.ndarray) -> np.ndarray:
    """[c, 2] factors of a range's lower and upper end: equal ones that don't widen it; of many, also unequal ones."""
    shrunk = [float(f) for f in candidates if f <= 1]
    sides = [f for f in SIDES if f >= min(shrunk)] if len(candidates) > 8 else []
    unequal = [(a, b) for a in sides for b in sides if a != b]
    return np.asarray([*((f, f) for f in shrunk), *unequal], np.float32)


def _best(task: Task, i: int, candidates: np.ndarray, error: _Error) -> Array:
    w, p = task.weights[i], task.problem
    n, k = w.shape[-2:]
    tile = p.format.tile_for(n, k, p.granularity)
    tiles = _numerics.to_tiles(w, tile)
    own = _numerics.tile_range(tiles) if p.format.zero_point else amax_of(tiles, (-3, -1))
    each = lambda x: x.reshape(*x.shape, *[1] * (own.ndim - x.ndim))  # noqa: E731

    def candidate(best: tuple[Array, Array], factor: Array) -> tuple[tuple[Array, Array], None]:
        found = own * factor
        wrong = error(qdq(task, i, tile=found) - w, tile)
        better = wrong < best[1]
        return (jnp.where(each(better), found, best[0]), jnp.where(better, wrong, best[1])), None

    least = jnp.full((*w.shape[:-2], *own.shape[1:3]), jnp.inf, jnp.float32)
    (best, _), _ = lax.scan(candidate, (own, least), jnp.asarray(candidates))
    return best


def _tensor_level(task: Task, candidates: np.ndarray, error: _Error) -> tuple[Array | None, ...]:
    """The amax [e] of each weight's one scale: the best for all that share it; as it is where others share it too."""
    out = list(task.amax)
    for number in sorted({f for f in task.problem.fused if f >= 0}):
        members = [i for i, f in enumerate(task.problem.fused) if f == number]
        own = task.amax[members[0]]
        if own is None or any(task.weights[i].shape[0] != own.shape[0] for i in members):
            continue

        def candidate(best: tuple[Array, Array], factor: Array, own=own, members=members) -> tuple:
            amax = own * factor
            found = [error(qdq(task, i, amax=amax) - task.weights[i], task.weights[i].shape[-2:]) for i in members]
            wrong = functools.reduce(jnp.add, [f.reshape(own.shape) for f in found])
            better = wrong < best[1]
            return (jnp.where(better, amax, best[0]), jnp.where(better, wrong, best[1])), None

        (best, _), _ = lax.scan(candidate, (own, jnp.full_like(own, jnp.inf)), jnp.asarray(candidates))
        for i in members:
            out[i] = best
    return tuple(out)


def _squared(d: Array, tile: tuple) -> Array:
    return jnp.sum(jnp.square(_numerics.to_tiles(d, tile)), axis=(-3, -1))


def _weighted(h: Array) -> _Error:
    """d^T H_bb d of each tile's rows, summed; h [k, k]."""
    return functools.partial(_local, h)


def _local(h: Array, d: Array, tile: tuple) -> Array:
    tiles = _numerics.to_tiles(d, tile)
    count, size = tiles.shape[-2:]
    short = count * size - h.shape[0]
    h = jnp.pad(h, ((0, short), (0, short))).reshape(count, size, count, size)
    blocks = h[jnp.arange(count), :, jnp.arange(count), :]  # [count, size, size]
    return jnp.sum(jnp.einsum("...arbc,bcd->...arbd", tiles, blocks) * tiles, axis=(-3, -1))
