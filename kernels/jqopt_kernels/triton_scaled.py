"""The launch of `triton_code.scaled`: MXFP4 x MXFP4 and MXFP8 x MXFP8 on the block scales of Blackwell's tensor cores.

XLA has a cuDNN call for MXFP8 and NVFP4 (`xla_scaled`), none for MXFP4. NVFP4 is not taken here: Triton's interpreter
reads its scales as e8m0, so that its numbers could not be checked without a GPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from . import decode
from ._types import Operand, Packed, Shapes
from .epilogue import NOTHING, Epilogue
from .triton_call import Launch

BLOCK, CAPABILITIES = 32, range(100, 120)
TILE = (128, 128, 32)  # rows of the activation, of the weight, and how many blocks of k at a time divided by bits
WARPS, STAGES, GROUP = 8, 2, 8


def refuses(lhs: Operand, rhs: Operand, shapes: Shapes, capability: int | None) -> str | None:
    """Why not, what every Triton kernel needs apart."""
    for side, spec in (("lhs", lhs), ("rhs", rhs)):
        if spec.element not in ("e2m1", "e4m3", "e5m2") or spec.scale != "e8m0" or spec.block != BLOCK:
            return f"{side} is {spec.element} with {spec.scale} scales of blocks {spec.block}, not MXFP4 or MXFP8"
    if decode.CODINGS[lhs.element].bits != decode.CODINGS[rhs.element].bits:
        return f"lhs is {lhs.element} and rhs {rhs.element}: codes of different widths"
    if shapes.k % BLOCK:
        return f"k={shapes.k} is not a multiple of the block {BLOCK}"
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
    bm, bn, per_bit = TILE
    constants = {
        "N": n, "K": k, "BM": bm, "BN": bn, "BK": per_bit * BLOCK // bits, "GROUP": GROUP, "BITS": bits,
        "X_ELEMENT": lhs_spec.element, "ELEMENT": rhs_spec.element,
        "BIAS": epilogue.bias is not None, "ACTIVATION": epilogue.activation or "none",
    }  # fmt: skip
    bias = jnp.ones((1,), jnp.float32) if epilogue.bias is None else epilogue.bias
    grid = (-(-m // bm) * -(-n // bn), 1)
    operands = (x, lhs.scale, rhs.data, rhs.scale, bias, m)
    out = jax.ShapeDtypeStruct((m, n), out_dtype)
    return Launch("scaled", operands, out, grid, constants, WARPS, STAGES), lambda y: y
