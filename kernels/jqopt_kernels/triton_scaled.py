"""The launch of `triton_code.scaled`: NVFP4, MXFP4 and MXFP8 products on the block scales of Blackwell's tensor cores.

XLA has a cuDNN call for NVFP4 and MXFP8 (`xla_scaled`, which comes first), none for MXFP4.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from . import decode
from ._types import Operand, Packed, Shapes
from .epilogue import NOTHING, Epilogue
from .triton_call import Launch

BLOCKS = {("e2m1", "e4m3"): 16, ("e2m1", "e8m0"): 32, ("e4m3", "e8m0"): 32, ("e5m2", "e8m0"): 32}
CAPABILITIES = range(100, 120)
TILE = (128, 128, 1024)  # rows of the activation, of the weight, and bits of each at a time
WARPS, STAGES, GROUP = 8, 2, 8


def refuses(lhs: Operand, rhs: Operand, shapes: Shapes, capability: int | None) -> str | None:
    """Why not, what every Triton kernel needs apart."""
    for side, spec in (("lhs", lhs), ("rhs", rhs)):
        block = BLOCKS.get((spec.element, str(spec.scale)))
        if block is None or block != spec.block:
            return (
                f"{side} is {spec.element} with {spec.scale} scales of blocks {spec.block}, not NVFP4, MXFP4 or MXFP8"
            )
        if shapes.k % block:
            return f"k={shapes.k} is not a multiple of the block {block}"
    if lhs.scale != rhs.scale:
        return f"lhs has {lhs.scale} scales and rhs {rhs.scale}: the tensor cores take one kind"
    if decode.CODINGS[lhs.element].bits != decode.CODINGS[rhs.element].bits:
        return f"lhs is {lhs.element} and rhs {rhs.element}: codes of different widths"
    if capability is not None and capability not in CAPABILITIES:
        return f"compute capability {capability / 10}: block-scaled tensor cores as this kernel knows them are 10.0's"
    return None


def launch(
    lhs: Packed, rhs: Packed, lhs_spec: Operand, rhs_spec: Operand, shapes: Shapes, out_dtype, number: int, *,
    epilogue: Epilogue = NOTHING,
):  # fmt: skip
    """(Launch, what to do with its result): as `triton_dot.dot_launch`."""
    m, n, k, _ = shapes
    bits = decode.CODINGS[rhs_spec.element].bits
    x = lhs.data if bits == 8 else lhs.data[:, 0::2] | (lhs.data[:, 1::2] << 4)
    bm, bn, wide = TILE
    wholes = [s.global_scale for s in (lhs, rhs) if s.global_scale is not None]
    constants = {
        "N": n, "K": k, "BM": bm, "BN": bn, "BK": wide // bits, "GROUP": GROUP, "BITS": bits,
        "BLOCK": rhs_spec.block, "SCALE": rhs_spec.scale, "GLOBAL": bool(wholes),
        "X_ELEMENT": lhs_spec.element, "ELEMENT": rhs_spec.element,
        "BIAS": epilogue.bias is not None, "ACTIVATION": epilogue.activation or "none",
    }  # fmt: skip
    bias = jnp.ones((1,), jnp.float32) if epilogue.bias is None else epilogue.bias
    grid = (-(-m // bm) * -(-n // bn), 1)
    whole = functools.reduce(jnp.multiply, wholes, jnp.ones((1,), jnp.float32))
    operands = (x, lhs.scale, rhs.data, rhs.scale, whole, bias, m)
    out = jax.ShapeDtypeStruct((m, n), out_dtype)
    return Launch("scaled", operands, out, grid, constants, WARPS, STAGES), lambda y: y
