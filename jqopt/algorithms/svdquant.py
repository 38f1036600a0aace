"""svdquant: a low-rank part of the weight stays in 16 bits, on the unquantized input; the rest is quantized."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jqopt.algorithms import _statistics
from jqopt.algorithms._base import Algorithm, Task, rank_at, tensor_amax
from jqopt.algorithms._statistics import moments
from jqopt.errors import PlanError


def svdquant(rank: int = 32, weighted: bool = True) -> Algorithm:
    """W = R + B A, A [r, k] and B [n, r] in bfloat16; R is quantized. The branch is charged in the plan's bits.

    Args:
        rank: r, at most k / 16 and n of each weight.
        weighted: take out what matters most for the outputs, the first singular vectors of W H^1/2 with H the inputs'
            second moments, rather than of W.

    Best after a step that scales: `[smoothquant, svdquant, gptq]`. Source: Li et al., SVDQuant, arXiv 2411.05007.

    Raises:
        PlanError: an option has no such value.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        raise PlanError(f"svdquant: rank is {rank!r}; write a number such as 32")
    if not isinstance(weighted, bool):
        raise PlanError(f"svdquant: weighted is {weighted!r}; write true or false")
    statistics = (_statistics.AMAX, _statistics.MOMENTS) if weighted else ()
    solve = functools.partial(_solve, rank=rank, weighted=weighted)
    return Algorithm("svdquant", solve, "low_rank", statistics, rank=rank)


def _solve(task: Task, *, rank: int, weighted: bool) -> Task:
    root = _root(moments(task)) if weighted else None
    parts = [_low_rank(w, rank_at(rank, *w.shape[-2:]), root) for w in task.weights]
    weights = tuple(w if p is None else w - _product(p) for w, p in zip(task.weights, parts, strict=True))
    return task.replace(
        weights=weights, low_rank=tuple(parts), amax=tensor_amax(weights, task.problem), tiles=(None,) * len(weights)
    )


def _product(part: tuple[Array, Array]) -> Array:
    a, b = (x.astype(jnp.float32) for x in part)
    return jnp.matmul(b, a)


def _root(h: Array) -> tuple[Array, Array]:
    """(H^1/2, H^-1/2) of the damped second moments."""
    values, vectors = jnp.linalg.eigh(h + jnp.float32(1e-4) * jnp.eye(h.shape[0], dtype=h.dtype))
    root = jnp.sqrt(jnp.maximum(values, jnp.float32(1e-6)))
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _low_rank(w: Array, rank: int, root: tuple[Array, Array] | None) -> tuple[Array, Array] | None:
    """(a [e, r, k], b [e, n, r]) in bfloat16 of w [e, n, k]."""
    if rank == 0:
        return None
    u, s, v = jax.vmap(functools.partial(jnp.linalg.svd, full_matrices=False))(w if root is None else w @ root[0])
    a = v[:, :rank] if root is None else v[:, :rank] @ root[1]
    split = jnp.sqrt(s[:, :rank])  # so that neither factor holds all of the size
    return (a * split[:, :, None]).astype(jnp.bfloat16), (u[:, :, :rank] * split[:, None, :]).astype(jnp.bfloat16)
