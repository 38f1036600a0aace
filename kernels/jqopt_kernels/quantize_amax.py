"""amax, the largest |x|, which scales are made of: of a whole matrix or of its rows, Hadamard-transformed or not."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from . import quantize_math as qm
from ._types import Kernel, Operand, Shapes, as_is
from .quantize_pallas import pow2, refusal, transformed
from .quantize_pallas_call import call, load, program, store
from .quantize_way import NEAREST, Way, check_hadamard
from .quantize_xla import hadamard, no_gradient

ROWS, COLUMNS = 32, 512  # of a tile, at most


def per_row(spec: Operand) -> bool:
    """Whether a format takes an amax [m, 1] of each row; else it takes one of the whole, []."""
    return spec.granularity == "channel"


def _of_nothing(x: jax.Array, spec: Operand) -> jax.Array:
    return jnp.zeros((x.shape[0], 1) if per_row(spec) else (), jnp.float32)


@no_gradient
def xla_run(x, *, spec: Operand, way: Way = NEAREST) -> jax.Array:
    """x [m, k] -> [] or [m, 1] float32; 0 of nothing, NaN if there is one."""
    check_hadamard(way, x.shape[1])
    if 0 in x.shape:
        return _of_nothing(x, spec)
    y = x.astype(jnp.float32)
    y = y if way.hadamard is None else hadamard(y, way.hadamard)
    return qm.amax(y, (1,))[:, None] if per_row(spec) else qm.amax(y, (0, 1))


def _kernel(size: tuple[int, int], full: tuple[int, int], way: Way, rows: bool, interpret: bool, *refs: Any) -> None:
    i, j = program(0), program(1)
    x = load(refs[0], (i * size[0], j * size[1]), size, full).astype(jnp.float32)
    largest = qm.amax(transformed(x, way), (1,))
    if rows:
        store(refs[1], largest[:, None], (i * size[0], j), (full[0], -(-full[1] // size[1])))
    else:
        refs[1][i, j] = qm.amax(largest, (0,))


@no_gradient
def pallas_run(x, *, spec: Operand, way: Way = NEAREST) -> jax.Array:
    """As `xla_run`: each program gives the amax of its tile or of its rows in it, XLA the amax of those."""
    check_hadamard(way, x.shape[1])
    (m, k), rows = x.shape, per_row(spec)
    if 0 in (m, k):
        return _of_nothing(x, spec)
    size = (min(ROWS, pow2(m)), min(COLUMNS, max(16, pow2(k))))
    grid = (-(-m // size[0]), -(-k // size[1]))
    kernel = functools.partial(_kernel, size, (m, k), way, rows)
    (found,) = call(kernel, [x], [((m if rows else grid[0], grid[1]), jnp.float32)], grid, 8)
    return qm.amax(found, (1,))[:, None] if rows else qm.amax(found, (0, 1))


def _xla_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    return f"lhs is {lhs.element}; an amax is of floats" if lhs.element != "float" else None


def _pallas_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    plain = Operand("e4m3", None, "float32", "tensor")  # what the format is changes nothing but the result's shape
    return _xla_supports(lhs, rhs, device, shapes) or refusal(plain, device, shapes)


xla_amax = Kernel("xla_amax", "amax", _xla_supports, as_is, xla_run)
pallas_amax = Kernel("pallas_amax", "amax", _pallas_supports, as_is, pallas_run, backend="pallas")
