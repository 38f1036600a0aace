"""qdot on CPU in C++ (AVX-512, AVX2, or any processor): weight-only products of few rows, all cores, no decoded copy.

XLA on CPU writes a decoded tile to memory and reads it back; here codes become float32 in registers. `ffi_build` has
how the library is built and found, `ffi/` the code: float32 products and sums like every kernel's.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import decode, ffi_build
from ._device import platform
from ._operands import by_row, decoded, dot, finish, left, row_scale, unknown
from ._types import Kernel, Operand, Packed, Shapes, as_is
from .epilogue import NOTHING

ELEMENTS = {"e2m1": 0, "int4": 1, "uint4": 2, "int8": 3, "e4m3": 4, "e5m2": 5}  # as in ffi/gemm.h
SCALES = {None: 0, "float32": 1, "e4m3": 2, "e8m0": 3}
MULTIPLE = 16  # columns: what scales are spread to
MOST_ROWS = 32  # with more, float32 products are as fast and XLA's forms are too
BEST = -1  # the best instruction set of this processor; else its place in `ffi_build.Library.isas`


def _gemm(lhs, rhs: Packed, *, lhs_spec, rhs_spec, n, k, out_dtype=jnp.float32, epilogue=NOTHING, isa: int = BEST):
    x, left_scale = left(lhs, lhs_spec, k)
    y: Any = _product(x, rhs._replace(global_scale=None), rhs_spec, n, isa)
    return finish(y, left_scale, row_scale(rhs, rhs_spec), out_dtype, epilogue)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x: jax.Array, rhs: Packed, spec: Operand, n: int, isa: int) -> jax.Array:
    """x [m, k] f32 times all of the weight that `row_scale` does not hold -> [m, n] f32."""
    found = ffi_build.library()
    if isinstance(found, str):
        raise RuntimeError(found)
    k, nothing = x.shape[1], jnp.zeros((0, 0), jnp.float32)
    zero = nothing if rhs.zero_point is None else rhs.zero_point.astype(jnp.float32)
    scale = jnp.ones_like(zero) if rhs.scale is None and rhs.zero_point is not None else rhs.scale
    scale, kind = (nothing, 0) if by_row(spec) or scale is None else _stored(scale, spec)
    rows, block = _block(spec, n, k)
    call = jax.ffi.ffi_call(found.target, jax.ShapeDtypeStruct((x.shape[0], n), jnp.float32), vmap_method="expand_dims")
    numbers = {"element": ELEMENTS[spec.element], "kind": kind, "rows": rows, "block": block, "isa": isa}
    return call(x, rhs.data, scale, zero, **{name: np.int64(number) for name, number in numbers.items()})


def _stored(scale: jax.Array, spec: Operand) -> tuple[jax.Array, int]:
    return (scale, SCALES[spec.scale]) if scale.dtype == jnp.uint8 else (scale.astype(jnp.float32), SCALES["float32"])


def _block(spec: Operand, n: int, k: int) -> tuple[int, int]:
    """(rows, columns) of the weight that share a scale or zero point; the columns a multiple of 16."""
    if spec.granularity == "block" and spec.block is not None:
        return spec.block if isinstance(spec.block, tuple) else (1, spec.block)
    whole = max(1, -(-k // MULTIPLE)) * MULTIPLE
    return (max(n, 1) if spec.granularity == "tensor" else 1), whole


def _forward(x, rhs, spec, n, isa):
    return _product(x, rhs, spec, n, isa), (x, rhs)


def _backward(spec, n, isa, kept, g):
    """Of the same product in XLA's operations: the weight is decoded, as it would be for any gradient."""
    k = kept[0].shape[1]
    _, back = jax.vjp(lambda x, rhs: dot(x, _values(rhs, spec, k)), *kept)
    return back(g)


def _values(rhs: Packed, spec: Operand, k: int) -> jax.Array:
    return decoded(*decode.whole(rhs.data, spec.element, k), rhs, spec, k)


_product.defvjp(_forward, _backward)


def refuses(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    """Why not, the library apart."""
    if platform(device) != "cpu":
        return f"C++ for the CPU, not for {device}"
    if why := unknown(lhs, rhs):
        return why
    if rhs.element not in ELEMENTS:
        return f"rhs is {rhs.element}, not {', '.join(ELEMENTS)}"
    block = rhs.block[1] if isinstance(rhs.block, tuple) else rhs.block
    if rhs.granularity == "block" and block and block % MULTIPLE:
        return f"rhs block {block} is not a multiple of {MULTIPLE} columns"
    if rhs.scale not in SCALES:
        return f"rhs scales are {rhs.scale}, not {', '.join(name for name in SCALES if name)}"
    if shapes.m > MOST_ROWS:
        return f"m={shapes.m}: from {MOST_ROWS + 1} rows on, XLA's forms are as fast"
    return None


def _supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if why := refuses(lhs, rhs, device, shapes):
        return why
    found = ffi_build.library()
    return found if isinstance(found, str) else None


ffi_gemm = Kernel("ffi_gemm", "qdot", _supports, as_is, _gemm, backend="ffi")
