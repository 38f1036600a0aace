"""The launch of `triton_code.scaled`: NVFP4, MXFP4 and MXFP8 products on the block scales of Blackwell's tensor cores.

XLA has a cuDNN call for NVFP4 and MXFP8 on compute capability 10 (`xla_scaled`, which comes first), none for MXFP4 and
none on 12. On 10, scales in tiles of 128x4 go to the tensor cores' memory straight from shared memory: those of a
weight come so from `prepare`, once; those of an activation are put so for each product. Scales as they are stored are
taken too, through registers. On 12 the tensor cores read scales from registers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from . import _tiles, decode
from ._tiles import Tile
from ._types import Operand, Packed, Shapes
from .epilogue import NOTHING, Epilogue
from .quantize_swizzle import xla_swizzle
from .triton_call import Launch

BLOCKS = {("e2m1", "e4m3"): 16, ("e2m1", "e8m0"): 32, ("e4m3", "e8m0"): 32, ("e5m2", "e8m0"): 32}
OLDEST = 100  # the first compute capability with such tensor cores
ROWS = 128  # of a tile of scales


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
    if capability is not None and capability < OLDEST:
        return f"compute capability {capability / 10}: block-scaled tensor cores come with {OLDEST / 10}"
    return None


def prepare(packed: Packed) -> Packed:
    """A weight whose block scales lie in tiles of 128x4, uint8 [n / 128, columns / 4, 32, 4, 4], padded with zeros.

    Only this kernel reads it. [.., r, q, c] is the scale of row r + 32 q, column c of a tile.
    """
    assert packed.scale is not None, "a weight without block scales"
    return packed._replace(scale=tiled(packed.scale))


def tiled(scale: jax.Array) -> jax.Array:
    """Scales [rows, columns] -> [rows / 128, columns / 4, 32, 4, 4]."""
    down, across = -(-scale.shape[0] // ROWS), -(-scale.shape[1] // 4)
    return xla_swizzle(scale).reshape(down, across, 32, 4, 4)


def launch(
    lhs: Packed, rhs: Packed, lhs_spec: Operand, rhs_spec: Operand, shapes: Shapes, out_dtype, number: int, *,
    tile: Tile | None = None, epilogue: Epilogue = NOTHING,
):  # fmt: skip
    """(Launch, what to do with its result): as `triton_dot.dot_launch`."""
    m, n, k, _ = shapes
    bits = decode.CODINGS[rhs_spec.element].bits
    tile = tile or _tiles.find("triton_scaled", bits, 8 * lhs.data.dtype.itemsize, shapes, number)
    x = lhs.data if bits == 8 else lhs.data[:, 0::2] | (lhs.data[:, 1::2] << 4)
    assert lhs.scale is not None and rhs.scale is not None, "operands without block scales"
    tiled_weight = rhs.scale.ndim == 5
    if tiled_weight and tile.bn % ROWS:
        raise ValueError(
            f"triton_scaled: a tile of {tile.bn} rows of the weight, and its scales lie in tiles of {ROWS}"
        )
    in_tiles = _tiles.family(number) == OLDEST and tile.bm % ROWS == 0
    wholes = [s.global_scale for s in (lhs, rhs) if s.global_scale is not None]
    constants = {
        "N": n, "K": k, "BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "GROUP": tile.group, "BITS": bits,
        "BLOCK": rhs_spec.block, "SCALE": rhs_spec.scale, "GLOBAL": bool(wholes),
        "X_TILED": in_tiles, "TILED": tiled_weight,
        "X_ELEMENT": lhs_spec.element, "ELEMENT": rhs_spec.element,
        "BIAS": epilogue.bias is not None, "ACTIVATION": epilogue.activation or "none",
    }  # fmt: skip
    bias = jnp.ones((1,), jnp.float32) if epilogue.bias is None else epilogue.bias
    grid = (-(-m // tile.bm) * -(-n // tile.bn), 1)
    whole = functools.reduce(jnp.multiply, wholes, jnp.ones((1,), jnp.float32))
    operands = (x, tiled(lhs.scale) if in_tiles else lhs.scale, rhs.data, rhs.scale, whole, bias, m)
    out = jax.ShapeDtypeStruct((m, n), out_dtype)
    return Launch("scaled", operands, out, grid, constants, tile.warps, tile.stages), lambda y: y
