"""qdot as one XLA product: int8 x int8, fp8 x fp8, and, for everything else, decode both and multiply."""

from __future__ import annotations

import os
import re

import jax.numpy as jnp
from jax import lax

from . import decode
from ._device import GPUS, platform
from ._operands import NT, both_fit_bf16, by_row, decoded, dot, finish, left, row_scale, unknown
from ._types import Kernel, Operand, Packed, Shapes, as_is
from .epilogue import NOTHING

INT32_K = (2**31 - 1) // 128**2  # longer sums of int8 products could overflow int32
FP8 = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


def _wrong(lhs: Operand, rhs: Operand, elements) -> str | None:
    """Why the codes themselves cannot be multiplied: another element, or scales inside the sum."""
    for side, spec in (("lhs", lhs), ("rhs", rhs)):
        if spec.element not in elements:
            return f"{side} is {spec.element}, not {' or '.join(elements)}"
        if spec.zero_point:
            return f"{side} has zero points"
        if not by_row(spec):
            return f"{side} scales vary along k (granularity {spec.granularity}, block {spec.block})"
    return None


def _int8(lhs: Packed, rhs: Packed, *, lhs_spec, rhs_spec, n, k, out_dtype=jnp.float32, epilogue=NOTHING):
    """Exact int32 sums, then the scales."""
    acc = lax.dot_general(lhs.data, rhs.data, NT, preferred_element_type=jnp.int32)
    return finish(acc.astype(jnp.float32), row_scale(lhs, lhs_spec), row_scale(rhs, rhs_spec), out_dtype, epilogue)


def _int8_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if why := _wrong(lhs, rhs, ("int8",)):
        return why
    if shapes.k > INT32_K:
        return f"k={shapes.k} can overflow int32 sums (limit {INT32_K})"
    if platform(device) == "cpu" and shapes.m == 1:
        return "m=1: XLA on CPU widens the whole weight to int32"
    return None


def _int8_row(lhs: Packed, rhs: Packed, **specs):
    """One row on CPU: a second row of zeros makes it a product that XLA has (50 times faster at k = n = 4096)."""
    m, pad = lhs.data.shape[0], ((0, 1), (0, 0))
    scale = lhs.scale if lhs.scale is None or lhs.scale.shape[0] == 1 else jnp.pad(lhs.scale, pad)
    return _int8(lhs._replace(data=jnp.pad(lhs.data, pad), scale=scale), rhs, **specs)[:m]


def _int8_row_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if platform(device) != "cpu":
        return f"XLA on {device} needs no help with one row"
    if shapes.m != 1:
        return f"m={shapes.m} is not 1"
    return _int8_supports(lhs, rhs, device, shapes._replace(m=2))


def _fp8(lhs: Packed, rhs: Packed, *, lhs_spec, rhs_spec, n, k, out_dtype=jnp.float32, epilogue=NOTHING):
    """A product of fp8 arrays, which XLA gives to cuBLASLt or to a kernel of its own, whichever it finds faster.

    "highest" also turns off cuBLASLt's fast accumulation, which keeps about 14 bits of a sum.
    """
    a = lax.bitcast_convert_type(lhs.data, FP8[lhs_spec.element])
    b = lax.bitcast_convert_type(rhs.data, FP8[rhs_spec.element])
    scales = row_scale(lhs, lhs_spec), row_scale(rhs, rhs_spec)
    if only_cublas() and all(s is None or s.size == 1 for s in scales):
        # What XLA's rewriter looks for: scales go into the call. By default XLA makes kernels of its own before that,
        # for which these would be products of float32, with the weight decoded in memory.
        ones = (jnp.float32(1) if s is None else s.reshape(()) for s in scales)
        a, b = (x.astype(jnp.float32) * s for x, s in zip((a, b), ones, strict=True))
        return finish(dot(a, b), None, None, out_dtype, epilogue)
    acc = lax.dot_general(a, b, NT, precision="highest", preferred_element_type=jnp.float32)
    return finish(acc, *scales, out_dtype, epilogue)


def only_cublas() -> bool:
    """Whether XLA_FLAGS keep XLA from making kernels of its own for products: --xla_gpu_enable_triton_gemm=false."""
    said = re.findall(r"--xla_gpu_enable_triton_gemm=(\w+)", os.environ.get("XLA_FLAGS", ""))
    return bool(said) and said[-1].lower() in ("false", "0")


def _fp8_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if why := _wrong(lhs, rhs, tuple(FP8)):
        return why
    if lhs.element == rhs.element == "e5m2":
        return "cuBLASLt has no e5m2 x e5m2"
    if platform(device) not in GPUS:
        return f"XLA on {device} converts fp8 arrays one element at a time"
    return None


def _fp8_dot(lhs: Packed, rhs: Packed, *, lhs_spec, rhs_spec, n, k, out_dtype=jnp.float32, epilogue=NOTHING):
    """The product of fp8 arrays as it stands, scales after it: exact products, float32 sums."""
    a = lax.bitcast_convert_type(lhs.data, FP8[lhs_spec.element])
    b = lax.bitcast_convert_type(rhs.data, FP8[rhs_spec.element])
    acc = lax.dot_general(a, b, NT, preferred_element_type=jnp.float32)
    return finish(acc, row_scale(lhs, lhs_spec), row_scale(rhs, rhs_spec), out_dtype, epilogue)


def _fp8_dot_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if why := _wrong(lhs, rhs, tuple(FP8)):
        return why
    if platform(device) in GPUS:
        return f"on {device} xla_fp8 uses the tensor cores for fp8"
    if platform(device) == "cpu" and shapes.m == 1:
        return "m=1: XLA on CPU has no fp8 product for one row: it widens the whole weight"
    return None


def _decode(lhs, rhs: Packed, *, lhs_spec, rhs_spec, n, k, out_dtype=jnp.float32, epilogue=NOTHING):
    """Both operands decoded as a whole; in bfloat16 where that is exact."""
    dtype = jnp.bfloat16 if both_fit_bf16(lhs, lhs_spec, rhs_spec) else jnp.float32
    x, left_scale = left(lhs, lhs_spec, k)
    w = decoded(*decode.whole(rhs.data, rhs_spec.element, k), rhs, rhs_spec, k)
    return finish(dot(x.astype(dtype), w.astype(dtype)), left_scale, row_scale(rhs, rhs_spec), out_dtype, epilogue)


def _decode_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    return unknown(lhs, rhs)


xla_int8 = Kernel("xla_int8", "qdot", _int8_supports, as_is, _int8, low_precision=True)
xla_int8_row = Kernel("xla_int8_row", "qdot", _int8_row_supports, as_is, _int8_row, low_precision=True)
xla_fp8 = Kernel("xla_fp8", "qdot", _fp8_supports, as_is, _fp8, low_precision=True)
xla_fp8_dot = Kernel("xla_fp8_dot", "qdot", _fp8_dot_supports, as_is, _fp8_dot, low_precision=True)
xla_decode = Kernel("xla_decode", "qdot", _decode_supports, as_is, _decode)
