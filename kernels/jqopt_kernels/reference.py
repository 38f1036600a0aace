"""The oracle: qdot for every combination of operands, by dequantizing both and one f32 dot_general.

Written for clarity and independent of `decode.py`: elements are looked up in tables computed from the definition of
each format, so that a kernel's bit tricks are tested against something else.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._types import Kernel, Operand, Packed, Shapes, as_is
from .epilogue import NOTHING, Epilogue

# exponent bits, mantissa bits, bias; OCP Microscaling Formats v1.0 (5.3), OCP 8-bit Floating Point (OFP8) v1.0
_FLOATS = {"e2m1": (2, 1, 1), "e2m3": (2, 3, 1), "e3m2": (3, 2, 3), "e4m3": (4, 3, 7), "e5m2": (5, 2, 15)}
# bitsandbytes' NormalFloat4: quantiles of N(0, 1) scaled to [-1, 1] (QLoRA, arXiv:2305.14314, appendix E)
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)  # fmt: skip
BITS = {"int8": 8, "e4m3": 8, "e5m2": 8, "e3m2": 6, "e2m3": 6, "int4": 4, "uint4": 4, "e2m1": 4, "nf4": 4}


def float_table(exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    """Values of all codes sign|exponent|mantissa of a small float, without its NaN and inf codes. Exact in f32."""
    signs, exponents, mantissas = (1.0, -1.0), range(1 << exponent_bits), range(1 << mantissa_bits)
    unit = 2.0**-mantissa_bits
    return np.array(
        [
            s * (m * unit * 2.0 ** (1 - bias) if e == 0 else (1 + m * unit) * 2.0 ** (e - bias))
            for s, e, m in itertools.product(signs, exponents, mantissas)
        ],
        np.float32,
    )


def element_table(element: str) -> np.ndarray:
    """[2**bits] f32: the value of each code (read as unsigned). Raises KeyError for an unknown element."""
    if element == "nf4":
        return np.array(NF4, np.float32)
    if element == "uint4":
        return np.arange(16, dtype=np.float32)
    if element in ("int4", "int8"):
        half = 1 << (BITS[element] - 1)
        return ((np.arange(2 * half) + half) % (2 * half) - half).astype(np.float32)
    table = float_table(*_FLOATS[element])
    if element == "e4m3":
        table[[0x7F, 0xFF]] = np.nan
    if element == "e5m2":
        table[[0x7C, 0xFC]] = np.inf, -np.inf
        table[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    return table


def scale_table(kind: str | None) -> np.ndarray:
    """[256] f32: the value of each scale byte; "e4m3", or "e8m0" = 2^(byte - 127) with 255 = NaN."""
    if kind == "e8m0":
        return np.append(2.0 ** (np.arange(255) - 127.0), np.nan).astype(np.float32)
    if kind == "e4m3":
        return element_table(kind)
    raise KeyError(f"scales in uint8 are e4m3 or e8m0 bits, not {kind}")


def unpack(data: jax.Array, element: str, k: int) -> jax.Array:
    """Packed codes [rows, k_packed] -> one code a byte [rows, k]."""
    rows, u8 = data.shape[0], data.astype(jnp.uint8) if data.dtype != jnp.int8 else data
    if BITS[element] == 4:
        return jnp.stack([u8 & 15, u8 >> 4], axis=-1).reshape(rows, -1)[:, :k]
    if BITS[element] == 6:
        b = u8.reshape(rows, -1, 3).astype(jnp.uint32)
        word = b[..., 0] | (b[..., 1] << 8) | (b[..., 2] << 16)
        return jnp.stack([(word >> s) & 63 for s in (0, 6, 12, 18)], -1).reshape(rows, -1)[:, :k].astype(jnp.uint8)
    return u8


def expand(blocks: jax.Array, spec: Operand, rows: int, k: int) -> jax.Array:
    """A scale or zero point [r, c] -> broadcastable to [rows, k]."""
    if spec.granularity != "block" or spec.block is None:
        return blocks
    bn, bk = spec.block if isinstance(spec.block, tuple) else (1, spec.block)
    return jnp.repeat(jnp.repeat(blocks, bn, axis=0)[:rows], bk, axis=1)[:, :k]


def dequantize(packed: Packed, spec: Operand, rows: int, k: int, *, is_packed: bool = True) -> jax.Array:
    """[rows, k] f32 of one operand: (code - zero_point) * scale * global_scale, in that order."""
    codes = unpack(packed.data, spec.element, k) if is_packed else packed.data
    index = lax.bitcast_convert_type(codes, jnp.uint8) if codes.dtype == jnp.int8 else codes
    index = index.astype(jnp.int32) & ((1 << BITS[spec.element]) - 1)
    values = jnp.take(jnp.asarray(element_table(spec.element)), index, axis=0)
    if packed.zero_point is not None:
        values = values - expand(packed.zero_point.astype(jnp.float32), spec, rows, k)
    if packed.scale is not None:
        scale = packed.scale
        if scale.dtype == jnp.uint8:
            scale = jnp.take(jnp.asarray(scale_table(spec.scale)), scale.astype(jnp.int32), axis=0)
        values = values * expand(scale.astype(jnp.float32), spec, rows, k)
    return values if packed.global_scale is None else values * packed.global_scale


def qdot(
    lhs, rhs: Packed, *, lhs_spec: Operand, rhs_spec: Operand, n: int, k: int, out_dtype=jnp.float32,
    epilogue: Epilogue = NOTHING,
):  # fmt: skip
    """y [m, n] = dequantize(lhs) [m, k] @ dequantize(rhs).T [k, n], products and sums in f32; then the epilogue.

    lhs: float array [m, k], or `Packed` with unpacked codes. rhs: `Packed`.
    """
    x = lhs if lhs_spec.element == "float" else dequantize(lhs, lhs_spec, lhs.data.shape[0], k, is_packed=False)
    w = dequantize(rhs, rhs_spec, n, k)
    y = lax.dot_general(
        x.astype(jnp.float32), w, (((1,), (1,)), ((), ())), precision="highest", preferred_element_type=jnp.float32
    )
    return epilogue.after(y).astype(out_dtype)


def _supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    for side, element in (("lhs", lhs.element), ("rhs", rhs.element)):
        if element not in BITS and (side, element) != ("lhs", "float"):
            return f"{side} element {element!r} is unknown; known: {', '.join(sorted(BITS))}"
    return None


reference = Kernel("reference", "qdot", _supports, as_is, qdot, backend="reference")


def ragged(lhs, rhs: Packed, sizes, *, lhs_spec: Operand, rhs_spec: Operand, n: int, k: int, out_dtype=jnp.float32):
    """y [m, n]: rows of lhs [m, k] in consecutive groups, each times its expert of rhs [e, n, k].

    sizes: [e] rows of each group, integers; rows behind the last group are zero. rhs: `Packed`, every array with a
    leading axis of experts.
    """
    w = jax.vmap(lambda packed: dequantize(packed, rhs_spec, n, k))(rhs)
    each = jnp.einsum("mk,enk->emn", lhs.astype(jnp.float32), w, precision="highest")
    last, row = jnp.cumsum(sizes), jnp.arange(lhs.shape[0])
    mine = (row >= (last - sizes)[:, None]) & (row < last[:, None])
    return jnp.where(mine[:, :, None], each, 0).sum(axis=0).astype(out_dtype)


def _ragged_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if lhs.element != "float":
        return f"lhs is {lhs.element}: grouped products take float activations"
    return _supports(lhs, rhs, device, shapes)


reference_ragged = Kernel("reference", "ragged", _ragged_supports, as_is, ragged, backend="reference")
