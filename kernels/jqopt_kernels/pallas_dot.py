"""qdot on CUDA through Pallas: weights are decoded inside of the product and never written.

pallas_gemv multiplies and adds (few rows, bound by reading the weight); pallas_skinny and pallas_gemm feed tensor
cores. Where the sum over k is split among programs, their partial sums are added afterwards, in a fixed order.

Nothing is rounded: a tile is multiplied in bfloat16 only where both sides are bfloat16 numbers. Codes always are, so
float32 block scales (and those of an fp8 left operand in blocks) multiply the float32 product of their block instead.
Everything else is multiplied in float32, without tensor cores.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _pallas_weight as tiles
from . import decode
from ._gradient import straight_through
from ._operands import NT, finish, fits_bf16, left, row_scale, unknown
from ._pallas import launch, load, no_place, power, program_id, span, steps, store
from ._pallas_weight import Arrays, Weight
from ._types import Kernel, Operand, Packed, Shapes, as_is

FEW, SOME = 4, 64  # rows up to which gemv, and skinny, are meant
PROGRAMS = 264  # two for each multiprocessor of an H100 or H200: the sum over k is split until there are as many
LEAST_STEPS = 4  # of a split sum


class Tile(NamedTuple):
    """Sizes of a program: bm x bn results, bk of k a step, by `warps`, `stages` loads in flight."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


GEMV = Tile(1, 8, 1024, 4, 2)
SKINNY = Tile(16, 64, 128, 4, 3)
GEMM = Tile(128, 128, 64, 8, 3)
EXACT = Tile(32, 32, 32, 4, 2)  # products of float32: no tensor cores, and registers for twice the bytes


class Left(NamedTuple):
    """A left operand as kernels take it: [m, k] values; f32 [m, k/block] scales of the products of blocks, or None."""

    x: jax.Array
    scale: jax.Array | None = None
    block: int | None = None


class Plan(NamedTuple):
    """Static facts of one launch."""

    m: int
    weight: Weight
    tile: Tile
    split: int
    after: bool  # block scales multiply the products of blocks
    left_block: int | None
    halves: bool  # x is [planes, m, k / planes]


# -------------------------------------------------------------------------------------------------- kernels


def _rows_and_steps(plan: Plan) -> tuple[jax.Array, jax.Array, int]:
    """(rows of the weight, first step, steps) of this program; grid: row tiles of x, of the weight, parts of k."""
    tile, count = plan.tile, steps(steps(plan.weight.k, plan.tile.bk), plan.split)
    return span(program_id(1) * tile.bn, tile.bn), program_id(2) * count, count


def _x(ref: Any, plan: Plan, rows: Any, limit: Any, step: jax.Array) -> list[jax.Array]:
    """x at each plane's positions of k: [bm, bk / planes], or [bk / planes] of one row; zero from row `limit` on."""
    planes, k, bk = plan.weight.planes, plan.weight.k, plan.tile.bk
    if plan.halves:
        column = span(step * (bk // planes), bk // planes)
        mask = (rows < limit)[:, None] & (column < steps(k, planes))[None, :]
        return [load(ref, (p, rows[:, None], column[None, :]), mask) for p in range(planes)]
    column = span(step * bk, bk)
    if jnp.ndim(rows) == 0:
        return _planes(load(ref, (rows, column), column < k), planes)
    return _planes(load(ref, (rows[:, None], column[None, :]), (rows < limit)[:, None] & (column < k)[None, :]), planes)


def _planes(x: jax.Array, planes: int) -> list[jax.Array]:
    """[..., bk] -> what meets each plane of the codes: for two, the even and the odd positions."""
    if planes == 1:
        return [x]
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return [half.reshape(pairs.shape[:-1]) for half in lax.split(pairs, (1, 1), axis=x.ndim)]


def _gemv(*refs: Any, plan: Plan, present: tuple[bool, ...]) -> None:
    """Products of a block are added before they are scaled: one multiplication a block."""
    x_ref, arrays, _, out = _refs(refs, present)
    rows, first, count = _rows_and_steps(plan)
    weight, tile = plan.weight, plan.tile
    blocks = max(1, tile.bk // weight.block[1]) if weight.in_blocks else 1
    unit = np.float32(_unit(weight))

    def step(i: jax.Array, sums: tuple) -> tuple:
        planes = tiles.numbers(arrays, weight, rows, first + i, tile.bk)
        scale = None if arrays.scale is None else tiles.scales(arrays, weight, rows, first + i, tile.bk)
        xs = [_x(x_ref, plan, m, plan.m, first + i) for m in range(plan.m)]
        return tuple(s + block_sums(planes, x, scale) for s, x in zip(sums, xs, strict=True))

    def block_sums(planes: list, xs: list, scale: Any) -> jax.Array:
        products = functools.reduce(
            jnp.add, [w * x.astype(jnp.float32)[None, :] for w, x in zip(planes, xs, strict=True)]
        )
        sums = products.reshape(tile.bn, blocks, -1).sum(axis=-1) if blocks > 1 else products.sum(axis=-1)[:, None]
        return sums if scale is None else sums * unit * scale

    zero = tuple(jnp.zeros((tile.bn, blocks), jnp.float32) for _ in range(plan.m))
    for m, s in enumerate(lax.fori_loop(0, count, step, zero)):
        store(out, (program_id(2), m, rows), s.sum(axis=1), rows < weight.n)


def _dot(*refs: Any, plan: Plan, present: tuple[bool, ...]) -> None:
    """A tile of x times a tile of the weight, on tensor cores where x is bfloat16."""
    x_ref, arrays, left_scale, out = _refs(refs, present)
    rows, first, count = _rows_and_steps(plan)
    x_rows = span(program_id(0) * plan.tile.bm, plan.tile.bm)
    acc = accumulate(x_ref, arrays, left_scale, plan, (x_rows, plan.m), rows, (first, count))
    keep = (x_rows < plan.m)[:, None] & (rows < plan.weight.n)[None, :]
    store(out, (program_id(2), x_rows[:, None], rows[None, :]), acc, keep)


def accumulate(
    x_ref: Any, arrays: Arrays, left_scale: Any, plan: Plan, of: tuple, rows: jax.Array, over: tuple, lead: tuple = ()
) -> jax.Array:
    """f32 [bm, bn]: rows of x (`of`: positions, and where they end) times rows of a weight.

    over: the first step of k, and how many (0 where there is nothing to do); lead: index of the weight's leading axes.
    """
    weight, tile, unit = plan.weight, plan.tile, np.float32(_unit(plan.weight))
    (x_rows, limit), (first, count) = of, over

    def step(i: jax.Array, acc: jax.Array) -> jax.Array:
        decoded = tiles.numbers if arrays.scale is None or plan.after else tiles.scaled
        ws = decoded(arrays, weight, rows, first + i, tile.bk, lead)
        total = functools.reduce(jnp.add, map(_product, _x(x_ref, plan, x_rows, limit, first + i), ws))
        if plan.after:
            total = total * unit * tiles.scales(arrays, weight, rows, first + i, tile.bk, lead).reshape(1, tile.bn)
        if plan.left_block is not None:
            block = lax.div(first + i, np.int32(plan.left_block // tile.bk))
            held = (x_rows < limit) & (block < steps(weight.k, plan.left_block))
            total = total * load(left_scale, (x_rows, jnp.full_like(x_rows, block)), held)[:, None]
        return acc + total

    return lax.fori_loop(0, count, step, jnp.zeros((tile.bm, tile.bn), jnp.float32))


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """[bm, c] x [bn, c] -> f32 [bm, bn], in x's type."""
    precision = "highest" if x.dtype == jnp.float32 else None
    return lax.dot_general(x, w.astype(x.dtype), NT, precision=precision, preferred_element_type=jnp.float32)


def _refs(refs: tuple, present: tuple[bool, ...]) -> tuple[Any, Arrays, Any, Any]:
    """(x, weight, left scale, out) of a kernel's refs, None for operands that it was launched without."""
    given = iter(refs)
    x, data, scale, zero, left_scale = (next(given) if here else None for here in present)
    return x, Arrays(data, scale, zero), left_scale, next(given)


# ----------------------------------------------------------------------------------------------- launching


def _run(body: Any, plan: Plan, x: Left, arrays: Arrays, name: str) -> jax.Array:
    """[m, n] f32, without what is outside of the sum over k."""
    operands = (x.x, *arrays, x.scale)
    present = tuple(a is not None for a in operands)
    tile, n = plan.tile, plan.weight.n
    grid = (steps(plan.m, tile.bm), steps(n, tile.bn), plan.split)
    kernel = functools.partial(body, plan=plan, present=present)
    out = jax.ShapeDtypeStruct((plan.split, plan.m, n), jnp.float32)
    given = [a for a in operands if a is not None]
    parts = launch(kernel, grid, out, given, warps=tile.warps, stages=tile.stages, name=name)
    return parts[0] if plan.split == 1 else parts.sum(axis=0)


def _split(m: int, n: int, k: int, tile: Tile) -> int:
    """Among how many programs a sum over k is split: until the device is busy, and each has some steps left."""
    programs, most = steps(m, tile.bm) * steps(n, tile.bn), steps(k, tile.bk) // LEAST_STEPS
    return max(1, min(PROGRAMS // programs, most))


def _narrowed(tile: Tile, weight: Weight, block: int | None) -> Tile:
    """Steps no longer than k, and than a block whose products are scaled."""
    least = 16 * weight.planes  # what a tensor core takes at a time
    bk = min(tile.bk, max(power(weight.k), least))
    return tile._replace(bk=bk if block is None else min(bk, block))


def _one(body: Any, name: str, tile: Tile) -> Any:
    def product(lhs, rhs: Packed, *, lhs_spec, rhs_spec, n, k, out_dtype, epilogue):
        m, weight = _rows_of(lhs), Weight(rhs_spec, n, k)
        if 0 in (m, n, k):
            return finish(jnp.zeros((m, n), jnp.float32), None, None, out_dtype, epilogue)
        row = row_scale(lhs, lhs_spec) if isinstance(lhs, Packed) else None
        if body is _gemv:
            x, after = Left(_values(lhs, lhs_spec, k)), False
            fit = _narrowed(tile._replace(bm=m), weight, None)
        else:
            x, after = prepared(lhs, lhs_spec, rhs, weight)
            fit = tile_for(tile, x, weight, after, m)
        halves = tile is GEMM and weight.planes > 1
        if halves:
            x = x._replace(x=_in_halves(x.x, weight.planes))
        plan = Plan(m, weight, fit, _split(m, n, k, fit), after, x.block, halves)
        y = _run(body, plan, x, tiles.arrays(rhs, weight), name)
        if not weight.in_blocks and _unit(weight) != 1:
            y = y * np.float32(_unit(weight))
        return finish(y, row, tiles.outside(rhs, rhs_spec), out_dtype, epilogue)

    return straight_through(product)


def _unit(weight: Weight) -> float:
    return decode.unit(weight.spec.element)


def _rows_of(lhs: Any) -> int:
    return (lhs.data if isinstance(lhs, Packed) else lhs).shape[0]


def _values(lhs: Any, spec: Operand, k: int) -> jax.Array:
    return left(lhs, spec, k)[0] if isinstance(lhs, Packed) else lhs


def prepared(lhs: Any, spec: Operand, rhs: Packed, weight: Weight) -> tuple[Left, bool]:
    """(left operand in the type to multiply in, whether block scales multiply products of blocks)."""
    after = weight.in_blocks and weight.spec.scale == "float32" and _multiplies(weight.block[1], weight)
    if not _codes_fit(rhs, weight.spec) or not (after or not weight.in_blocks or _scaled_fit(weight.spec)):
        return Left(_values(lhs, spec, weight.k).astype(jnp.float32)), after
    if not isinstance(lhs, Packed):
        return Left(lhs if lhs.dtype == jnp.bfloat16 else lhs.astype(jnp.float32)), after
    if fits_bf16(spec):
        return Left(_values(lhs, spec, weight.k).astype(jnp.bfloat16)), after
    block = spec.block[1] if isinstance(spec.block, tuple) else spec.block
    rows = spec.block[0] if isinstance(spec.block, tuple) else 1
    codes = spec.scale == "float32" and not spec.zero_point and spec.element != "nf4"
    if codes and block and rows == 1 and _multiplies(block, weight):
        return Left(decode.values(lhs.data, spec.element).astype(jnp.bfloat16), lhs.scale, block), after
    return Left(_values(lhs, spec, weight.k).astype(jnp.float32)), after


def _multiplies(block: int, weight: Weight) -> bool:
    """Whether products of whole blocks can be scaled: a tensor core takes 16 positions of a plane at a time."""
    return block & (block - 1) == 0 and block >= 16 * weight.planes


def _codes_fit(rhs: Packed, spec: Operand) -> bool:
    """Whether codes less their zero points are bfloat16 numbers: at most 8 bits and a sign."""
    return rhs.zero_point is None or rhs.zero_point.dtype in (jnp.uint8, jnp.int8)


def _scaled_fit(spec: Operand) -> bool:
    """Whether codes times block scales are bfloat16 numbers."""
    return spec.scale == "e8m0" or fits_bf16(spec)


def tile_for(tile: Tile, x: Left, weight: Weight, after: bool, m: int) -> Tile:
    """The tile of a product on tensor cores, or of one in float32, for this many rows and these blocks."""
    if x.x.dtype == jnp.float32:
        tile = EXACT
    inner = [b for b in (weight.block[1] if after else None, x.block) if b is not None]
    tile = tile._replace(bm=min(tile.bm if tile is not SKINNY else SOME, max(16, power(m))))
    return _narrowed(tile, weight, min(inner, default=None))


def _in_halves(x: jax.Array, planes: int) -> jax.Array:
    """[m, k] -> [planes, m, k / planes]: what meets each plane of the codes lies together."""
    m, k = x.shape
    x = jnp.pad(x, ((0, 0), (0, -k % planes)))
    return x.reshape(m, -1, planes).transpose(2, 0, 1)


def _supports(least: int, most: int | None, rows: str, lhs: Operand, rhs: Operand, device: str, shapes: Shapes):
    if why := unknown(lhs, rhs) or tiles.unreadable(rhs):
        return why
    if shapes.m < least or (most is not None and shapes.m > most):
        return f"m={shapes.m}: {rows}"
    return no_place(device, shapes.n * steps(shapes.k, decode.plane_count(rhs.element)))


def _kernel(name: str, body: Any, tile: Tile, least: int, most: int | None, rows: str) -> Kernel:
    supports = functools.partial(_supports, least, most, rows)
    return Kernel(name, "qdot", supports, as_is, _one(body, name, tile), low_precision=True, backend="pallas")


pallas_gemv = _kernel("pallas_gemv", _gemv, GEMV, 0, FEW, f"for up to {FEW} rows; more of them feed tensor cores")
pallas_skinny = _kernel(
    "pallas_skinny", _dot, SKINNY, FEW + 1, SOME, f"for {FEW + 1} to {SOME} rows (pallas_gemv, pallas_gemm)"
)
pallas_gemm = _kernel("pallas_gemm", _dot, GEMM, SOME + 1, None, f"for more than {SOME} rows (pallas_skinny)")
