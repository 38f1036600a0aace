"""Quantizers as Pallas kernels for Triton: one program reads one tile of a matrix and writes its codes and scales.

The arithmetic is `quantize_math`'s; here is what a tile is, how it is read and written, and what may come before the
quantizer: RMSNorm or SwiGLU, whose result then never reaches memory. On CPU the same kernels run interpreted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import quantize_math as qm
from ._device import capability, platform
from ._types import Kernel, Operand, Packed, Shapes, as_is
from .decode import CODINGS
from .quantize_pallas_call import call, divide_rn, load, product, program, scalar, store
from .quantize_way import NEAREST, Random, Way, check, needs_scale, packed_of, scale_shape, tile, unknown
from .quantize_xla import no_gradient, pack6, whole_scale

VALUES = 4096  # values of a tile, where the format leaves a choice: 32 for each thread of four warps
WIDEST = 512  # columns of such a tile
LONGEST = 16384  # values of a row that one program holds, where a scale or a norm needs the whole row
MOST = 2**31  # values of a matrix: Triton's offsets are 32-bit


class Tile(NamedTuple):
    """The tile of a program, [rows, columns], powers of two, and the warps that share it."""

    rows: int
    columns: int

    @property
    def warps(self) -> int:
        return 4 if self.rows * self.columns <= VALUES else 8


def pow2(n: int) -> int:
    """The smallest power of two not below n."""
    return 1 << max(0, n - 1).bit_length()


def tile_of(spec: Operand, m: int, k: int, full_rows: bool) -> Tile:
    """The tile for a format: whole rows where a scale or a norm needs them, else a few thousand values."""
    rows, columns = tile(spec, k) or (1, 1)
    if full_rows or spec.granularity == "channel":
        wide = max(pow2(k), 16)
    else:
        wide = max(columns, 16, min(pow2(k), WIDEST, VALUES // rows))
    return Tile(max(rows, min(pow2(max(m, 1)), max(1, VALUES // wide))), wide)


# What comes before the quantizer ------------------------------------------------------------------------------------


class Before(NamedTuple):
    """A function of whole tiles that comes before the quantizer, and whether it needs whole rows."""

    apply: Callable[..., jax.Array]
    full_rows: bool = False


def _rounded(y: jax.Array, dtype: Any) -> jax.Array:
    """y as a program that writes it in this dtype would read it again."""
    if dtype == jnp.float32:
        return y
    return qm.bfloat16(y) if dtype == jnp.bfloat16 else y.astype(dtype).astype(jnp.float32)


def _plain(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    g = gate.astype(jnp.float32)
    return _rounded(g / (jnp.float32(1) + jnp.exp(-g)) * up.astype(jnp.float32), gate.dtype)


def _rms_norm(x: jax.Array, weight: jax.Array, *, k: int, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    mean = jnp.sum(y * y, axis=1, keepdims=True) * jnp.float32(1 / k)
    factor = lax.rsqrt(mean + jnp.float32(eps))
    return _rounded(y * (jnp.broadcast_to(factor, y.shape) * weight.astype(jnp.float32)), x.dtype)


# One tile -----------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What a kernel is made for: sizes, tile, format, way, whether bytes hold two codes, and which operands come."""

    m: int
    k: int
    tile: Tile
    spec: Operand
    way: Way
    pairs: bool
    inputs: int
    rows: int = 0  # how many of the inputs are rows [k]


def _kernel(plan: Plan, before: Before, interpret: bool, *refs: Any) -> None:
    rest, size, full = iter(refs), (plan.tile.rows, plan.tile.columns), (plan.m, plan.k)
    place = (program(0), program(1))
    at = (place[0] * size[0], place[1] * size[1])
    values = [load(next(rest), at, size, full) for _ in range(plan.inputs)]
    values += [load(next(rest), (0, at[1]), (1, size[1]), (1, plan.k)) for _ in range(plan.rows)]
    given = scalar(next(rest)) if needs_scale(plan.spec) else None
    dither = dither_at(next(rest), at, size, interpret) if plan.way.stochastic else None
    write_copy(plan, before.apply(*values), given, dither, interpret, list(rest), place, full)


def dither_at(ref: Any, at: tuple, size: tuple[int, int], interpret: bool) -> jax.Array:
    """Random numbers of a tile; the operand holds two words of a key, the first row and the first column."""
    key, start = (scalar(ref, 0), scalar(ref, 1)), (scalar(ref, 2), scalar(ref, 3))
    times = qm.product if interpret else product
    return qm.uniform(key, start[0] + at[0].astype(jnp.uint32), start[1] + at[1].astype(jnp.uint32), *size, times)


def write_copy(
    plan: Plan, x: jax.Array, given: Any, dither: Any, interpret: bool, refs: Sequence[Any], place: tuple, full: tuple
) -> None:
    """Quantizes the tile at this place among tiles; its codes go to the first ref, its scales, if any, to the second.

    Where a tile starts is always a product of its place with a number, by which Triton knows how wide it may write.
    """
    shared = tile(plan.spec, plan.k)
    if plan.spec.granularity == "channel":
        shared = (1, x.shape[1])
    x = transformed(x, plan.way)
    div = qm.divide if interpret else divide_rn
    codes, stored = qm.quantize_tile(x, given, plan.spec, plan.way, shared, dither, div)
    (i, j), (r, c) = place, x.shape
    if plan.pairs:
        store(refs[0], qm.pairs(codes).astype(jnp.uint8), (i * r, j * (c // 2)), (full[0], -(-full[1] // 2)))
    else:
        store(refs[0], codes.astype(refs[0].dtype), (i * r, j * c), full)
    if stored is not None and shared is not None:
        stored = stored if stored.dtype == jnp.float32 else stored.astype(jnp.uint8)
        store(refs[1], stored, (i * (r // shared[0]), j * (c // shared[1])), scale_shape(plan.spec, *full))


def transformed(x: jax.Array, way: Way) -> jax.Array:
    """The Hadamard transform of a tile, where the way has one."""
    return x if way.hadamard is None else qm.hadamard(x, _signs(way.hadamard, x.shape))


def _signs(signs: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    """The signs along columns, from the bits of one number: a kernel holds no constant arrays."""
    mask = np.uint32(sum(1 << i for i, s in enumerate(signs) if s < 0))
    place = lax.broadcasted_iota(jnp.uint32, shape, 1) & np.uint32(15)
    return jnp.where(((mask >> place) & np.uint32(1)) == 1, jnp.float32(-1), jnp.float32(1))


# The ops ------------------------------------------------------------------------------------------------------------


def outputs(spec: Operand, m: int, k: int, pairs: bool) -> list[tuple[tuple[int, int], Any]]:
    """Shapes and dtypes of the arrays that a copy is written to."""
    out: list[tuple[tuple[int, int], Any]] = [((m, -(-k // 2) if pairs else k), jnp.uint8)]
    if spec.granularity != "tensor":
        out.append((scale_shape(spec, m, k), jnp.float32 if spec.scale == "float32" else jnp.uint8))
    return out


def scalars(spec: Operand, way: Way, scale: jax.Array | None, random: Random | None) -> list[jax.Array]:
    """The small operands of a copy, in the kernel's order."""
    out = [scale.astype(jnp.float32).reshape(1)] if needs_scale(spec) and scale is not None else []
    if way.stochastic and random is not None:
        start = jnp.zeros(2, jnp.uint32) if random.start is None else random.start.astype(jnp.uint32)
        out.append(jnp.concatenate([random.key.astype(jnp.uint32), start]))
    return out


def finished(data: jax.Array, stored: jax.Array | None, spec: Operand, way: Way, scale: Any, packed: bool) -> Packed:
    """The arrays of a copy as `Packed`."""
    if CODINGS[spec.element].mantissa is None:
        data = lax.bitcast_convert_type(data, jnp.int8)
    if packed and CODINGS[spec.element].bits == 6:
        data = pack6(data)
    return packed_of(data, stored, whole_scale(scale, way), spec)


def _run(
    before: Before, inputs: Sequence[jax.Array], rows: Sequence[jax.Array], spec: Operand, way: Way,
    scale: jax.Array | None, random: Random | None, packed: bool,
) -> Packed:  # fmt: skip
    m, k = inputs[0].shape
    check(spec, way, k, scale, random)
    pairs = packed and CODINGS[spec.element].bits == 4
    if m == 0 or k == 0:
        empty = [jnp.zeros(shape, dtype) for shape, dtype in outputs(spec, m, k, pairs)]
        return finished(empty[0], empty[1] if len(empty) > 1 else None, spec, way, scale, packed)
    size = tile_of(spec, m, k, before.full_rows)
    plan = Plan(m, k, size, spec, way, pairs, len(inputs), len(rows))
    operands = [*inputs, *(r.reshape(1, k) for r in rows), *scalars(spec, way, scale, random)]
    grid = (-(-m // size.rows), -(-k // size.columns))
    found = call(functools.partial(_kernel, plan, before), operands, outputs(spec, m, k, pairs), grid, size.warps)
    return finished(found[0], found[1] if len(found) > 1 else None, spec, way, scale, packed)


@no_gradient
def _quantize(x, *, spec, way=NEAREST, scale=None, random=None, packed=False):
    return _run(Before(_plain), [x], [], spec, way, scale, random, packed)


@no_gradient
def _swiglu_quantize(gate, up, *, spec, way=NEAREST, scale=None, random=None, packed=False):
    return _run(Before(_swiglu), [gate, up], [], spec, way, scale, random, packed)


@no_gradient
def _norm_quantize(x, weight, *, eps=1e-6, spec, way=NEAREST, scale=None, random=None, packed=False):
    norm = functools.partial(_rms_norm, k=x.shape[1], eps=eps)
    return _run(Before(norm, True), [x], [weight], spec, way, scale, random, packed)


def no_chip(device: str) -> str | None:
    """Why no kernel of Pallas and Triton is compiled for this device, or None."""
    if platform(device) != "cuda":
        return f"Pallas-Triton compiles for CUDA, not for {device} (on CPU it runs interpreted, for tests)"
    if capability(device) is None:
        return f"Pallas-Triton compiles for one chip, and {device!r} names none; write its capability, as in 'cuda:90'"
    return None


def refusal(spec: Operand, device: str, shapes: Shapes, full_rows: bool = False) -> str | None:
    """Why the Pallas kernels cannot quantize such a matrix [m, k], or None."""
    if (why := no_chip(device)) is not None or (why := unknown(spec)) is not None:
        return why
    shared = tile(spec, shapes.k) or (1, 1)
    if spec.granularity == "block" and any(n != pow2(n) for n in shared):
        return f"block {spec.block} is not a power of two"
    if shared[0] * shared[1] > LONGEST and spec.granularity == "block":
        return f"block {spec.block} holds more than {LONGEST} values"
    if (full_rows or spec.granularity == "channel") and shapes.k > LONGEST:
        return f"k={shapes.k}: one program holds a row, of at most {LONGEST} values"
    return f"m * k is {shapes.m * shapes.k}, offsets are 32-bit" if shapes.m * shapes.k >= MOST else None


def _supports(full_rows: bool, lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if lhs.element != "float":
        return f"lhs is {lhs.element}; what is quantized is float"
    return refusal(rhs, device, shapes, full_rows)


_any, _rows = functools.partial(_supports, False), functools.partial(_supports, True)
pallas_quantize = Kernel("pallas_quantize", "quantize", _any, as_is, _quantize, backend="pallas")
pallas_swiglu_quantize = Kernel(
    "pallas_swiglu_quantize", "swiglu_quantize", _any, as_is, _swiglu_quantize, backend="pallas"
)
pallas_norm_quantize = Kernel("pallas_norm_quantize", "norm_quantize", _rows, as_is, _norm_quantize, backend="pallas")
