"""What the XLA kernels do with operands before and after a product: which scales go where, and what is exact."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import decode
from ._types import Operand, Packed
from .epilogue import NOTHING, Epilogue

NT = (((1,), (1,)), ((), ()))  # [m, k] x [n, k] -> [m, n]


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [m, k] @ w.T for w [n, k], f32 sums; float32 inputs are not rounded to TF32 or bfloat16 on the way."""
    precision = "highest" if x.dtype == jnp.float32 else None
    return lax.dot_general(x, w, NT, precision=precision, preferred_element_type=jnp.float32)


def unknown(lhs: Operand, rhs: Operand) -> str | None:
    """Why `decode` cannot read an operand, or None."""
    for side, spec in (("lhs", lhs), ("rhs", rhs)):
        if spec.element not in decode.CODINGS and (side, spec.element) != ("lhs", "float"):
            return f"{side} element {spec.element!r} is unknown; known: {', '.join(sorted(decode.CODINGS))}"
        if spec.zero_point and not spec.element.startswith(("int", "uint")):
            return f"{side} has a zero point, which only integer elements have, and is {spec.element}"
    return None


def by_row(spec: Operand) -> bool:
    """Whether the operand's scale is constant along k, and so can be applied after the product."""
    return spec.element != "float" and spec.granularity in ("tensor", "channel") and not spec.zero_point


def fits_bf16(spec: Operand) -> bool:
    """Whether every value without its row scale is exactly a bfloat16 (8 significant bits)."""
    if spec.element in ("float", "nf4") or spec.zero_point:
        return False
    if by_row(spec) or spec.scale in (None, "e8m0"):
        return True
    return spec.scale == "e4m3" and decode.CODINGS[spec.element].mantissa is not None  # at most 4 x 4 bits


def both_fit_bf16(x: jax.Array | Packed, lhs: Operand, rhs: Operand) -> bool:
    """Whether a bfloat16 product of the operands without row scales loses nothing."""
    exact = x.dtype == jnp.bfloat16 if isinstance(x, jax.Array) else fits_bf16(lhs)
    return exact and fits_bf16(rhs)


def row_scale(packed: Packed, spec: Operand) -> jax.Array | None:
    """[], [1, 1] or [rows, 1] f32: everything that multiplies whole rows (`decode.unit` excluded); None: nothing."""
    scale = decode.scales(packed.scale, spec.scale) if by_row(spec) and packed.scale is not None else None
    if scale is None or packed.global_scale is None:
        return packed.global_scale if scale is None else scale
    return scale * packed.global_scale


def block_scale(packed: Packed, spec: Operand) -> jax.Array | None:
    """f32 scales that must be applied before the product, as stored: [r, c]; None where there are none."""
    return None if by_row(spec) or packed.scale is None else decode.scales(packed.scale, spec.scale)


def blocks(stored: jax.Array, spec: Operand, rows: int, k: int) -> tuple[jax.Array, int]:
    """Scales or zero points [r, c] -> ([rows or 1, ceil(k/b)], b), with 2-D blocks repeated along rows."""
    if spec.granularity != "block" or spec.block is None:
        return stored, k
    bn, bk = spec.block if isinstance(spec.block, tuple) else (1, spec.block)
    return (stored if bn == 1 else jnp.repeat(stored, bn, axis=0)[:rows]), bk


def per_block(w: jax.Array, along: jax.Array, b: int, op) -> jax.Array:
    """op(w [rows, c], along [rows or 1, ceil(c/b)], each of its columns repeated b times)."""
    rows, c = w.shape
    if along.shape[1] == 1:
        return op(w, along)
    if c % b == 0:  # one broadcast: jnp would make three steps of it for each weight, all of which XLA must compile
        each = lax.broadcast_in_dim(along, (along.shape[0], c // b, b), (0, 1))
        return op(w.reshape(rows, c // b, b), each).reshape(rows, c)
    return op(w, jnp.repeat(along, b, axis=1)[:, :c])


def decoded(w: jax.Array, unit: float, packed: Packed, spec: Operand, k: int) -> jax.Array:
    """Codes as numbers [rows, k], divided by `unit` -> f32 values, all but what `row_scale` holds."""
    scale = block_scale(packed, spec)
    if packed.zero_point is not None:
        zero = packed.zero_point.astype(jnp.float32)
        w = per_block(w, *blocks(zero, spec, w.shape[0], k), jnp.subtract)
    if scale is None or spec.scale == "e8m0":  # which has scales that overflow when multiplied by it
        w = w if unit == 1 else lax.mul(w, np.float32(unit))
    elif unit != 1:
        scale = lax.mul(scale, np.float32(unit))
    return w if scale is None else per_block(w, *blocks(scale, spec, w.shape[0], k), jnp.multiply)


def left(lhs: jax.Array | Packed, spec: Operand, k: int) -> tuple[jax.Array, jax.Array | None]:
    """Left operand -> (f32 [m, k], what multiplies rows of the result: [m, 1], [1, 1], [] or None)."""
    if not isinstance(lhs, Packed):
        return lhs.astype(jnp.float32), None
    return decoded(decode.raw(lhs.data, spec.element), decode.unit(spec.element), lhs, spec, k), row_scale(lhs, spec)


def finish(
    y: jax.Array,
    left_scale: jax.Array | None,
    right_scale: jax.Array | None,
    out_dtype,
    epilogue: Epilogue = NOTHING,
) -> jax.Array:
    """Apply row scales, each [] or [m or 1, 1] and [n or 1, 1], to a product [m, n], and what follows it."""
    for scale in (None if right_scale is None else right_scale.T, left_scale):
        y = y if scale is None else y * scale
    return epilogue.after(y).astype(out_dtype)
