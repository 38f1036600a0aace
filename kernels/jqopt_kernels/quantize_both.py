"""Row-wise and column-wise codes of a matrix in one pass, for training: a GEMM contracts one copy along k, one along m.

The column-wise copy is x.T with its codes along m, as a GEMM that contracts rows reads it: what `quantize` would give
for the transpose, but the random bits of stochastic rounding belong to a value's place in x.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp

from ._types import Kernel, Operand, Packed, Shapes, as_is
from .decode import CODINGS
from .quantize_pallas import LONGEST, Plan, Tile, dither_at, finished, outputs, refusal, scalars, write_copy
from .quantize_pallas_call import call, load, program, scalar
from .quantize_way import NEAREST, Random, Way, check, needs_scale, packed_of, tile
from .quantize_xla import codes_and_scales, dither_of, no_gradient, packed_codes, supports, whole_scale


@no_gradient
def xla_run(
    x, *, spec: Operand, way: Way = NEAREST, column_way: Way = NEAREST, scale: Any = None, column_scale: Any = None,
    random: Random | None = None, column_random: Random | None = None, packed: bool = False,
) -> tuple[Packed, Packed]:  # fmt: skip
    """Packed of x [m, k] and of x.T [k, m]; see `reference_quantize.quantize_both`."""
    check(spec, way, x.shape[1], scale, random)
    check(spec, column_way, x.shape[0], column_scale, column_random)
    y = x.astype(jnp.float32)
    dither = None if random is None else dither_of(random, *x.shape)
    turned = None if column_random is None else dither_of(column_random, *x.shape).T
    made = []
    for z, w, s, d in ((y, way, scale, dither), (y.T, column_way, column_scale, turned)):
        codes, stored = codes_and_scales(z, spec, w, s, d)
        made.append(packed_of(packed_codes(codes, spec, packed), stored, whole_scale(s, w), spec))
    return made[0], made[1]


def _kernel(rows: Plan, columns: Plan, interpret: bool, *refs: Any) -> None:
    rest, size, full = iter(refs), (rows.tile.rows, rows.tile.columns), (rows.m, rows.k)
    place = (program(0), program(1))
    at = (place[0] * size[0], place[1] * size[1])
    x = load(next(rest), at, size, full).astype(jnp.float32)
    operands = []
    for plan in (rows, columns):
        given = scalar(next(rest)) if needs_scale(plan.spec) else None
        operands.append((given, dither_at(next(rest), at, size, interpret) if plan.way.stochastic else None))
    refs = tuple(rest)
    (given, dither), (column_given, turned) = operands
    write_copy(rows, x, given, dither, interpret, refs[: len(refs) // 2], place, full)
    turned = None if turned is None else turned.T
    write_copy(columns, x.T, column_given, turned, interpret, refs[len(refs) // 2 :], place[::-1], full[::-1])


@no_gradient
def pallas_run(
    x, *, spec: Operand, way: Way = NEAREST, column_way: Way = NEAREST, scale: Any = None, column_scale: Any = None,
    random: Random | None = None, column_random: Random | None = None, packed: bool = False,
) -> tuple[Packed, Packed]:  # fmt: skip
    """As `xla_run`, reading x once."""
    m, k = x.shape
    check(spec, way, k, scale, random)
    check(spec, column_way, m, column_scale, column_random)
    pairs, side = packed and CODINGS[spec.element].bits == 4, _side(spec)
    rows = Plan(m, k, Tile(side, side), spec, way, pairs, 1)
    columns = Plan(k, m, Tile(side, side), spec, column_way, pairs, 1)
    shapes = [*outputs(spec, m, k, pairs), *outputs(spec, k, m, pairs)]
    if m == 0 or k == 0:
        found = [jnp.zeros(shape, dtype) for shape, dtype in shapes]
    else:
        operands = [x, *scalars(spec, way, scale, random), *scalars(spec, column_way, column_scale, column_random)]
        grid = (-(-m // side), -(-k // side))
        found = call(functools.partial(_kernel, rows, columns), operands, shapes, grid, rows.tile.warps)
    half = len(found) // 2
    made = [
        finished(arrays[0], arrays[1] if half > 1 else None, spec, w, s, packed)
        for arrays, w, s in ((found[:half], way, scale), (found[half:], column_way, column_scale))
    ]
    return made[0], made[1]


def _side(spec: Operand) -> int:
    """Rows and columns of a program's square tile: a multiple of both sides of the format's."""
    return max(64, *(tile(spec, 64) or (1, 1)))


def _both(known: Any, lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if rhs.granularity == "channel":
        return "scales of rows and scales of columns are not found in one pass over tiles"
    return known(lhs, rhs, device, shapes)


def _pallas_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if (why := supports(lhs, rhs, device, shapes) or refusal(rhs, device, shapes)) is not None:
        return why
    return f"block {rhs.block} is wider than {int(LONGEST**0.5)}" if _side(rhs) ** 2 > LONGEST else None


_xla, _pallas = functools.partial(_both, supports), functools.partial(_both, _pallas_supports)
xla_quantize_both = Kernel("xla_quantize_both", "quantize_both", _xla, as_is, xla_run)
pallas_quantize_both = Kernel("pallas_quantize_both", "quantize_both", _pallas, as_is, pallas_run, backend="pallas")
