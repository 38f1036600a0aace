"""qdot in plain XLA: int8, fp8, weight tiles for few rows, and decode-then-dot for everything else."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from . import decode
from ._types import Kernel, Operand, Packed, Shapes, as_is

GPUS = ("gpu", "cuda", "rocm")  # jax.default_backend() says "gpu"; lowering platforms say "cuda" or "rocm"
TILE = 256  # rows of the weight decoded at a time
TILED_ROWS = 32  # up to this m, tiles beat decoding the weight once
INT8_ROWS = 8  # below this m, XLA on CPU has no int8 product and widens the whole weight to int32
BF16_ROWS = 8  # from this m, a bfloat16 product beats float32 (below it XLA on CPU widens the weight)
INT32_K = (2**31 - 1) // 128**2  # longer sums of int8 products could overflow int32

_NT = (((1,), (1,)), ((), ()))


def _dot(x: jax.Array, w: jax.Array, out=jnp.float32) -> jax.Array:
    precision = "highest" if x.dtype == jnp.float32 else None
    return lax.dot_general(x, w, _NT, precision=precision, preferred_element_type=out)


# --- operands -------------------------------------------------------------------------------------------------------


def _fits_bf16(spec: Operand) -> bool:
    """Whether every value without its row scale is a bfloat16 (8 significant bits) exactly."""
    if spec.element in ("float", "nf4") or spec.zero_point:
        return False
    if _by_row(spec) or spec.scale in (None, "e8m0"):
        return True
    return spec.scale == "e4m3" and decode.CODINGS[spec.element].mantissa in (1, 2, 3)  # 4 x 4 significant bits


def _by_row(spec: Operand) -> bool:
    """Whether the operand's scale is constant along k, and so can be applied after the product."""
    return spec.element != "float" and spec.granularity in ("tensor", "channel") and not spec.zero_point


def _unit(spec: Operand) -> float:
    return decode.unit(spec.element)


def _row_scale(packed: Packed, spec: Operand) -> jax.Array:
    """[1, 1] or [rows, 1] f32: everything that multiplies whole rows of raw codes, `unit` excluded."""
    scale = jnp.ones((1, 1), jnp.float32)
    if _by_row(spec) and packed.scale is not None:
        scale = decode.scales(packed.scale, spec.scale)
    return scale if packed.global_scale is None else scale * packed.global_scale


def _blocks(blocks: jax.Array, spec: Operand, rows: int, k: int) -> tuple[jax.Array, int]:
    """Scales or zero points [r, c] -> ([rows or 1, ceil(k/b)], b), 2-D blocks repeated along rows."""
    if spec.granularity != "block" or spec.block is None:
        return blocks, k
    bn, bk = spec.block if isinstance(spec.block, tuple) else (1, spec.block)
    return (blocks if bn == 1 else jnp.repeat(blocks, bn, axis=0)[:rows]), bk


def _per_block(w: jax.Array, blocks: jax.Array, b: int, op) -> jax.Array:
    """op(w [rows, c], blocks [rows or 1, ceil(c/b)] repeated b times along k)."""
    rows, c = w.shape
    if blocks.shape[1] == 1:
        return op(w, blocks)
    if c % b == 0:
        return op(w.reshape(rows, c // b, b), blocks[:, :, None]).reshape(rows, c)
    return op(w, jnp.repeat(blocks, b, axis=1)[:, :c])


def _lhs(lhs, spec: Operand, k: int) -> tuple[jax.Array, jax.Array | None]:
    """Left operand -> (f32 [m, k], what multiplies rows of the result: [m, 1], [1, 1] or None)."""
    if spec.element == "float":
        return lhs.astype(jnp.float32), None
    w = decode.values(lhs.data, spec.element)
    m = w.shape[0]
    if spec.zero_point:
        zero, b = _blocks(lhs.zero_point.astype(jnp.float32), spec, m, k)
        w = _per_block(w, zero, b, jnp.subtract)
    if lhs.scale is not None and not _by_row(spec):
        scale, b = _blocks(decode.scales(lhs.scale, spec.scale), spec, m, k)
        w = _per_block(w, scale, b, jnp.multiply)
    return w, _row_scale(lhs, spec)


def _finish(y: jax.Array, left: jax.Array | None, right: jax.Array, out_dtype) -> jax.Array:
    """Apply row scales left [m, 1] and right [n, 1] to a product [m, n]."""
    y = y * right.T
    return (y if left is None else y * left).astype(out_dtype)


def _unknown(lhs: Operand, rhs: Operand) -> str | None:
    for side, spec in (("lhs", lhs), ("rhs", rhs)):
        if spec.element not in decode.CODINGS and (side, spec.element) != ("lhs", "float"):
            return f"{side} element {spec.element!r} is unknown; known: {', '.join(sorted(decode.CODINGS))}"
        if spec.zero_point and not spec.element.startswith(("int", "uint")):
            return f"{side} has a zero point, which only integer elements have, and is {spec.element}"
    return None


# --- int8 x int8 ----------------------------------------------------------------------------------------------------


def _int8(lhs: Packed, rhs: Packed, *, lhs_spec, rhs_spec, n, k, out_dtype=jnp.float32):
    """Exact int32 sums, then the scales."""
    acc = lax.dot_general(lhs.data, rhs.data, _NT, preferred_element_type=jnp.int32)
    return _finish(acc.astype(jnp.float32), _row_scale(lhs, lhs_spec), _row_scale(rhs, rhs_spec), out_dtype)


def _int8_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    for side, spec in (("lhs", lhs), ("rhs", rhs)):
        if spec.element != "int8":
            return f"{side} is {spec.element}, not int8"
        if not _by_row(spec):
            return f"{side} scales vary along k ({spec.granularity}, zero_point={spec.zero_point})"
    if shapes.k > INT32_K:
        return f"k={shapes.k} can overflow int32 sums (limit {INT32_K})"
    if device == "cpu" and shapes.m < INT8_ROWS:
        return f"m={shapes.m} < {INT8_ROWS}: XLA on CPU widens the whole weight to int32"
    return None


# --- fp8 x fp8 ------------------------------------------------------------------------------------------------------

_FP8 = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


def _fp8(lhs: Packed, rhs: Packed, *, lhs_spec, rhs_spec, n, k, out_dtype=jnp.float32):
    """A product of fp8 arrays, which XLA hands to cuBLASLt, then the scales."""
    a = lax.bitcast_convert_type(lhs.data, _FP8[lhs_spec.element])
    b = lax.bitcast_convert_type(rhs.data, _FP8[rhs_spec.element])
    acc = lax.dot_general(a, b, _NT, preferred_element_type=jnp.float32)
    return _finish(acc, _row_scale(lhs, lhs_spec), _row_scale(rhs, rhs_spec), out_dtype)


def _fp8_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    for side, spec in (("lhs", lhs), ("rhs", rhs)):
        if spec.element not in _FP8:
            return f"{side} is {spec.element}, not e4m3 or e5m2"
        if not _by_row(spec):
            return f"{side} scales vary along k ({spec.granularity}, zero_point={spec.zero_point})"
    if lhs.element == rhs.element == "e5m2":
        return "cuBLASLt has no e5m2 x e5m2"
    if device not in GPUS:
        return f"XLA on {device} converts fp8 arrays one element at a time"
    return None


# --- tiles of the weight, decoded as they are used ------------------------------------------------------------------


def _planes(rhs: Packed, spec: Operand, n: int, k: int):
    """What a tile needs: (data, block scales or None, zero points or None, columns of k after padding).

    Scales become f32 here, once, because inside the loop they would cost as much as the codes. Where scales vary
    along k, k is padded to whole blocks (the left operand is zero there).
    """
    scale, zero, data, width = None, None, rhs.data, rhs.data.shape[1] * 8 // decode.CODINGS[spec.element].bits
    if not _by_row(spec) and rhs.scale is not None:
        scale = decode.scales(rhs.scale, spec.scale) * decode.unit(spec.element)
        scale, b = _blocks(scale, spec, n, k)
    if spec.zero_point:
        zero, b = _blocks(rhs.zero_point.astype(jnp.float32), spec, n, k)
    if spec.granularity == "block" and spec.block is not None and (scale is not None or zero is not None):
        blocks = (scale if scale is not None else zero).shape[1]
        packed = blocks * b * decode.CODINGS[spec.element].bits // 8
        data, width = jnp.pad(data, ((0, 0), (0, max(0, packed - data.shape[1])))), blocks * b
    return data, scale, zero, width


def _tile_dot(xs: list[jax.Array], parts, scale, zero, element: str) -> jax.Array:
    """sum over planes of xs[p] [m, c] @ (decoded plane p [rows, c]).T"""
    decoded = [_shifted(decode.raw(codes, element), zero) for codes in decode.planes(parts, element)]
    if len(decoded) > 1 and xs[0].shape[0] == 1:  # the planes are summed before they are written: half the memory
        total = functools.reduce(jnp.add, [w * x for w, x in zip(decoded, xs, strict=True)])
        return _dot(jnp.ones((1, total.shape[1]), jnp.float32), _scaled(total, scale))
    products = [_dot(x, _scaled(w, scale).astype(x.dtype)) for w, x in zip(decoded, xs, strict=True)]
    return functools.reduce(jnp.add, products)


def _shifted(w: jax.Array, zero: jax.Array | None) -> jax.Array:
    return w if zero is None else _per_block(w, zero, w.shape[1] // zero.shape[1], jnp.subtract)


def _scaled(w: jax.Array, scale: jax.Array | None) -> jax.Array:
    return w if scale is None else _per_block(w, scale, w.shape[1] // scale.shape[1], jnp.multiply)


def _over_rows(f, arrays, n: int, tile: int) -> jax.Array:
    """f on row tiles of a pytree of [n, ...] or [1, ...] arrays -> [m, n]; the last tile overlaps where n is ragged."""
    if n <= tile:
        return f(*arrays)
    count, whole = -(-n // tile), n // tile

    def rows(start, a):
        return a if a.shape[0] == 1 else lax.dynamic_slice_in_dim(a, start, tile)

    starts = jnp.minimum(jnp.arange(count, dtype=jnp.int32) * tile, n - tile)
    ys = lax.map(lambda start: f(*jax.tree.map(functools.partial(rows, start), arrays)), starts)
    m = ys.shape[1]
    y = jnp.moveaxis(ys[:whole], 0, 1).reshape(m, whole * tile)
    return y if whole == count else jnp.concatenate([y, ys[-1][:, tile - n % tile :]], axis=1)


def _tiled(lhs, rhs: Packed, *, lhs_spec, rhs_spec, n, k, out_dtype=jnp.float32, tile=TILE):
    """No decoded copy of the weight: TILE rows of it are decoded, used and dropped."""
    x, left = _lhs(lhs, lhs_spec, k)
    x_dtype = lhs.dtype if lhs_spec.element == "float" else None
    data, scale, zero, width = _planes(rhs, rhs_spec, n, k)
    p = decode.per_unit(rhs_spec.element)
    x = jnp.pad(x, ((0, 0), (0, width - k)))
    if x.shape[0] >= BF16_ROWS and _fits_bf16(rhs_spec) and (x_dtype == jnp.bfloat16 or _fits_bf16(lhs_spec)):
        x = x.astype(jnp.bfloat16)
    xs, parts = [x[:, i::p] for i in range(p)], decode.split(data, rhs_spec.element)
    y = _over_rows(lambda *a: _tile_dot(xs, *a, rhs_spec.element), (parts, scale, zero), n, tile)
    unit = 1.0 if scale is not None else _unit(rhs_spec)
    return _finish(y, left, _row_scale(rhs, rhs_spec) * unit, out_dtype)


def _tiled_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if why := _unknown(lhs, rhs):
        return why
    block = rhs.block[1] if isinstance(rhs.block, tuple) else rhs.block
    if rhs.granularity == "block" and block and block % decode.per_unit(rhs.element):
        return f"rhs block {block} is not a multiple of the {decode.per_unit(rhs.element)} codes packed together"
    if device != "cpu":
        return f"XLA on {device} fuses the decoding of few rows by itself; a loop would only serialize it"
    if shapes.m > TILED_ROWS:
        return f"m={shapes.m} > {TILED_ROWS}: decoding the weight once is faster"
    return None


# --- decode both, one dot -------------------------------------------------------------------------------------------


def _weight(rhs: Packed, spec: Operand, n: int, k: int) -> jax.Array:
    """[n, k] f32 without row scales and global scale."""
    w = decode.raw(decode.unpack(rhs.data, spec.element, k), spec.element)
    if spec.zero_point:
        zero, b = _blocks(rhs.zero_point.astype(jnp.float32), spec, n, k)
        w = _per_block(w, zero, b, jnp.subtract)
    if rhs.scale is not None and not _by_row(spec):
        scale, b = _blocks(decode.scales(rhs.scale, spec.scale), spec, n, k)
        w = _per_block(w, scale, b, jnp.multiply)
    return w


def _decode(lhs, rhs: Packed, *, lhs_spec, rhs_spec, n, k, out_dtype=jnp.float32):
    """The weight is decoded once; for many rows the product outweighs that."""
    x, left = _lhs(lhs, lhs_spec, k)
    y = _dot(x, _weight(rhs, rhs_spec, n, k))
    return _finish(y, left, _row_scale(rhs, rhs_spec) * _unit(rhs_spec), out_dtype)


def _decode_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    return _unknown(lhs, rhs)


xla_int8 = Kernel("xla_int8", "qdot", _int8_supports, as_is, _int8)
xla_fp8 = Kernel("xla_fp8", "qdot", _fp8_supports, as_is, _fp8)
xla_tiled = Kernel("xla_tiled", "qdot", _tiled_supports, as_is, _tiled)
xla_decode = Kernel("xla_decode", "qdot", _decode_supports, as_is, _decode)
