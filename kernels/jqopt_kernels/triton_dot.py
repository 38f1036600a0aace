"""qdot on CUDA devices by Triton: what its kernels can do, how they are launched, and their gradient.

Every product is as exact as the contract says: bfloat16 tensor cores multiply only what bfloat16 holds. Codes do; codes
times scales of NVFP4 and MX do; float32 scales of blocks multiply the sums of a block instead; a float16 or float32
activation is cut into two or three bfloat16 numbers that add up to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _tiles, decode, triton_call, triton_scaled
from ._device import capability, here, platform
from ._gradient import straight_through
from ._operands import by_row, finish, fits_bf16, left, row_scale
from ._tiles import Tile
from ._types import Kernel, Operand, Packed, Shapes, as_is
from .epilogue import NOTHING, Epilogue
from .triton_call import Launch

ELEMENTS = ("e2m1", "e4m3", "e5m2", "int4", "uint4", "int8")  # what triton_code.code_half decodes
FP8 = ("e4m3", "e5m2")
GEMV_ROWS, SKINNY_ROWS = 4, 64
DECODE_FIRST = 1024  # with more rows, a weight that is decoded once costs little beside the product
SMALLEST_DOT = 32  # columns of a block that a tensor core sums on its own
THREAD_BITS = 128  # what a thread loads at a time
PARTS = {"bfloat16": 1, "float16": 2, "float32": 3}  # bfloat16 numbers that add up to one exactly

# ------------------------------------------------------------------------------------------- what they can do


def _device_refuses(device: str) -> str | None:
    if platform(device) != "cuda":
        return f"Triton kernels are for CUDA devices, not {device}"
    number = capability(device)
    if number is None:
        return f"device {device!r} does not say its compute capability; write 'cuda:90'"
    if _tiles.family(number) is None:
        return f"compute capability {number / 10}: these kernels need {_tiles.CAPABILITIES[0] / 10} or newer"
    return triton_call.missing()  # last: it imports


def _operand_refuses(side: str, spec: Operand) -> str | None:
    """Why no kernel here decodes an operand that is not float."""
    if spec.element not in ELEMENTS:
        return f"{side} element {spec.element!r} is not decoded in Triton; known: {', '.join(ELEMENTS)}"
    if spec.zero_point and not spec.element.startswith(("int", "uint")):
        return f"{side} has a zero point, which only integer elements have, and is {spec.element}"
    if spec.granularity == "block" and (b := _block(spec)) and (b < 16 or b & (b - 1)):
        return f"{side} block {b} is not a power of two from 16 on"
    return None


def _gemv_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if lhs.element != "float":
        return f"lhs is {lhs.element}, not float"
    if shapes.m > GEMV_ROWS:
        return f"m={shapes.m}: more than {GEMV_ROWS} rows are for tensor cores"
    return _operand_refuses("rhs", rhs) or _device_refuses(device)


def _dot_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    for side, spec in (("lhs", lhs), ("rhs", rhs)):
        if (side, spec.element) == ("lhs", "float"):
            continue
        if why := _operand_refuses(side, spec):
            return why
        if spec.zero_point:
            return f"{side} has zero points, which only triton_gemv subtracts"
        if _outside(spec) and _block(spec) < SMALLEST_DOT:
            return f"{side} has {spec.scale} scales of blocks of {_block(spec)}: too short to be summed on their own"
    if isinstance(lhs.block, tuple) and lhs.block[0] != 1:
        return f"lhs blocks {lhs.block} span several rows"
    return _device_refuses(device)


def _skinny_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if shapes.m > SKINNY_ROWS:
        return f"m={shapes.m}: more than {SKINNY_ROWS} rows fill the device without splitting k"
    return _dot_supports(lhs, rhs, device, shapes)


def _gemm_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if shapes.m > DECODE_FIRST:
        return f"m={shapes.m}: with more than {DECODE_FIRST} rows a weight decoded once costs little"
    return _dot_supports(lhs, rhs, device, shapes)


def _fp8_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    for side, spec in (("lhs", lhs), ("rhs", rhs)):
        if spec.element not in FP8:
            return f"{side} is {spec.element}, not {' or '.join(FP8)}"
        if not by_row(spec) and not _outside(spec):
            return f"{side} has {spec.scale} scales, which cannot be applied to sums of a block"
    if by_row(lhs) and by_row(rhs):
        return "no scale varies along k: one cuBLASLt call does it (xla_fp8)"
    return _dot_supports(lhs, rhs, device, shapes)


def _scaled_supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if shapes.m <= SKINNY_ROWS:
        return f"m={shapes.m}: up to {SKINNY_ROWS} rows leave the device idle, unless k is split"
    number = capability(device) if platform(device) == "cuda" else None
    return triton_scaled.refuses(lhs, rhs, shapes, number) or _device_refuses(device)


def _block(spec: Operand) -> int:
    """Columns that share a scale; 0 where scales do not vary along k."""
    block = spec.block[1] if isinstance(spec.block, tuple) else spec.block
    return block or 0 if spec.granularity == "block" else 0


def _outside(spec: Operand) -> bool:
    """Whether scales vary along k and must multiply sums, because bfloat16 does not hold code times scale."""
    return spec.element != "float" and bool(_block(spec)) and not fits_bf16(spec)


# ------------------------------------------------------------------------------------------- how they are launched


class _Side(NamedTuple):
    """One operand as the kernels take it.

    kind, scale: scales of blocks as `triton_code.scale_float` names them, "none" where values have none of their own.
    row: what multiplies whole rows of the result, [] or [rows or 1, 1] f32, or None. per: rows and columns of a block.
    """

    data: jax.Array
    kind: str
    scale: jax.Array
    row: jax.Array | None
    per: tuple[int, int]


def _side(operand: Any, spec: Operand, rows: int, k: int) -> _Side:
    one = jnp.ones((1,), jnp.float32)
    if not isinstance(operand, Packed):
        x = operand if operand.dtype.name in PARTS else operand.astype(jnp.float32)
        return _Side(x, "none", one, None, (1, k))
    data = operand.data
    if data.dtype == jnp.int8:
        data = lax.bitcast_convert_type(data, jnp.uint8)
    per = (rows if spec.granularity == "tensor" else 1, _block(spec) or k)
    if _block(spec) and isinstance(spec.block, tuple):
        per = spec.block
    if operand.scale is None or by_row(spec):
        return _Side(data, "none", one, row_scale(operand, spec), per)
    kind = "float32" if operand.scale.dtype == jnp.float32 else str(spec.scale)
    return _Side(data, kind, operand.scale, row_scale(operand, spec), per)


def gemv_launch(
    lhs, rhs: Packed, lhs_spec: Operand, rhs_spec: Operand, shapes: Shapes, out_dtype, number: int, *,
    tile: Tile | None = None, epilogue: Epilogue = NOTHING,
):  # fmt: skip
    """(Launch, what to do with its result) of `triton_code.gemv`; `number` is the device's compute capability."""
    m, n, k, _ = shapes
    x, w = _side(lhs, lhs_spec, m, k), _side(rhs, rhs_spec, n, k)
    bits = decode.CODINGS[rhs_spec.element].bits
    tile = tile or _tiles.find("triton_gemv", bits, 8 * x.data.dtype.itemsize, shapes, number)
    zero = None if rhs.zero_point is None else rhs.zero_point.astype(jnp.float32)
    wide = THREAD_BITS // bits
    constants = {
        "M": m, "N": n, "K": k, "BN": tile.bn, "BK": tile.bk, "SUB": min(_block(rhs_spec) or wide, wide),
        "ELEMENT": rhs_spec.element, "BITS": bits, "SCALE": w.kind, "BLOCK_ROWS": w.per[0], "BLOCK": w.per[1],
        "ZERO": zero is not None, "RS": _mode(w.row), "STAGES": tile.stages,
        "BIAS": epilogue.bias is not None, "ACTIVATION": epilogue.activation or "none",
        "UNIT": decode.unit(rhs_spec.element) if rhs_spec.element == "e2m1" else 1.0,
    }  # fmt: skip
    operands = (x.data, w.data, w.scale, _flat(zero) if zero is None else zero, _flat(w.row), _flat(epilogue.bias))
    out = jax.ShapeDtypeStruct((m, n), out_dtype)
    return Launch("gemv", operands, out, (-(-n // tile.bn), 1), constants, tile.warps, tile.stages), lambda y: y


def dot_launch(
    lhs, rhs: Packed, lhs_spec: Operand, rhs_spec: Operand, shapes: Shapes, out_dtype, number: int, *,
    kernel: str, tile: Tile | None = None, epilogue: Epilogue = NOTHING,
):  # fmt: skip
    """(Launch, what to do with its result) of `triton_code.product` with the tiles of `kernel`."""
    m, n, k, _ = shapes
    x, w = _side(lhs, lhs_spec, m, k), _side(rhs, rhs_spec, n, k)
    bits, fp8 = decode.CODINGS[rhs_spec.element].bits, kernel == "triton_fp8_block"
    tile = tile or _tiles.find(kernel, bits, 8 * x.data.dtype.itemsize, shapes, number)
    if reads_words(lhs_spec, rhs_spec, k, tile, number):
        return _words_launch(lhs, rhs, lhs_spec, rhs_spec, shapes, out_dtype, tile, epilogue)
    bk = min([tile.bk, *(_block(s) for s in (lhs_spec, rhs_spec) if _outside(s))])
    data = x.data if isinstance(lhs, Packed) else in_parts(x.data)
    tiles = -(-n // tile.bn) * -(-m // tile.bm)
    split = _split(tile, tiles, k, bk)
    whole, inside = split == 1, epilogue if split == 1 else NOTHING
    constants = {
        "N": n, "K": k, "BM": tile.bm, "BN": tile.bn, "BK": bk, "SPLIT": split, "GROUP": tile.group,
        "HALVES": tile.halves, "PARTS": PARTS.get(x.data.dtype.name, 1), "FP8": fp8, "BITS": bits,
        "X_ELEMENT": lhs_spec.element, "X_SCALE": x.kind, "X_BLOCK": x.per[1], "X_OUTSIDE": _outside(lhs_spec),
        "ELEMENT": rhs_spec.element, "SCALE": w.kind, "BLOCK_ROWS": w.per[0], "BLOCK": w.per[1],
        "OUTSIDE": _outside(rhs_spec), "UNIT": 1.0 if fp8 else _unit(lhs_spec) * _unit(rhs_spec), "WIDE": False,
        "LS": _mode(x.row) if whole else 0, "RS": _mode(w.row) if whole else 0,
        "STAGES": tile.stages, "BIAS": inside.bias is not None, "ACTIVATION": inside.activation or "none",
    }  # fmt: skip
    operands = (data, x.scale, w.data, w.scale, _flat(x.row), _flat(w.row), _flat(inside.bias), m)
    out = jax.ShapeDtypeStruct((m, n) if whole else (split, m, n), out_dtype if whole else jnp.float32)
    launch = Launch("product", operands, out, (tiles, split), constants, tile.warps, tile.stages)
    after = functools.partial(_added, left_scale=x.row, right_scale=w.row, out_dtype=out_dtype, epilogue=epilogue)
    return launch, (lambda y: y) if whole else after


def reads_words(lhs: Operand, rhs: Operand, k: int, tile: Tile, capability: int) -> bool:
    """Whether `triton_words.words` multiplies these: 4-bit codes, x floats or exact as bfloat16, and whole words.

    For sm_100 with fewer than four warps, for which Triton takes `mma.sync`: four give the weights to the tensor cores
    by way of their own memory, and there Triton 3.9 fails to compile some tiles.
    """
    inside = not by_row(rhs) and not _outside(rhs) and rhs.scale is not None
    return (
        (_tiles.family(capability) != 100 or tile.warps < 4)
        and decode.CODINGS[rhs.element].bits == 4
        and not (inside and rhs.element != "e2m1")
        and (lhs.element == "float" or fits_bf16(lhs))
        and k % 8 == 0
        and min(tile.bk, _block(rhs) if _outside(rhs) else tile.bk) >= 64
    )


def _words_launch(
    lhs, rhs: Packed, lhs_spec: Operand, rhs_spec: Operand, shapes: Shapes, out_dtype, tile: Tile, epilogue: Epilogue
):
    """As `dot_launch`, of `triton_words.words`. Codes of the left operand become bfloat16 before, in XLA."""
    m, n, k, _ = shapes
    x, left_scale = (lhs, None) if not isinstance(lhs, Packed) else left(lhs, lhs_spec, k)
    x = x.astype(jnp.bfloat16) if isinstance(lhs, Packed) else _side(x, lhs_spec, m, k).data
    w = _side(rhs, rhs_spec, n, k)
    bk = min(tile.bk, _block(rhs_spec)) if _outside(rhs_spec) else tile.bk
    tiles = -(-n // tile.bn) * -(-m // tile.bm)
    split = _split(tile, tiles, k, bk)
    whole, inside = split == 1, epilogue if split == 1 else NOTHING
    parts = in_parts(x)
    planes = tile.bm > SKINNY_ROWS
    x = in_planes(parts) if planes else parts
    constants = {
        "N": n, "K": k, "BM": tile.bm, "BN": tile.bn, "BK": bk, "SPLIT": split, "GROUP": tile.group,
        "PARTS": parts.shape[1], "PLANE": x.shape[3] if planes else 0, "ELEMENT": rhs_spec.element,
        "SCALE": w.kind, "BLOCK": w.per[1], "BLOCK_ROWS": w.per[0], "OUTSIDE": _outside(rhs_spec),
        "LS": _mode(left_scale) if whole else 0, "RS": _mode(w.row) if whole else 0, "UNIT": _unit(rhs_spec),
        "WIDE": False, "STAGES": tile.stages, "BIAS": inside.bias is not None,
        "ACTIVATION": inside.activation or "none",
    }  # fmt: skip
    operands = (x, w.data, w.scale, _flat(left_scale), _flat(w.row), _flat(inside.bias), m)
    out = jax.ShapeDtypeStruct((m, n) if whole else (split, m, n), out_dtype if whole else jnp.float32)
    launch = Launch("words", operands, out, (tiles, split), constants, tile.warps, tile.stages)
    after = functools.partial(_added, left_scale=left_scale, right_scale=w.row, out_dtype=out_dtype, epilogue=epilogue)
    return launch, (lambda y: y) if whole else after


def _added(parts: jax.Array, **rest: Any) -> jax.Array:
    """Parts of k are added in one order, whichever is done first; XLA fuses this with what reads it."""
    return finish(jnp.sum(parts, axis=0), **rest)


def in_parts(x: jax.Array) -> jax.Array:
    """Floats [m, k] -> [m, PARTS, k] bfloat16 that add up to x exactly; of inf the first is inf and the rest 0."""
    parts, rest = [], x.astype(jnp.float32)
    for _ in range(PARTS[x.dtype.name] - 1):  # eight significant bits each
        bits = lax.bitcast_convert_type(rest, jnp.uint32) & jnp.uint32(0xFFFF0000)
        high = lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(high)
        rest = jnp.where(rest == high, 0.0, rest - high)
    return jnp.stack([*parts, rest], axis=1).astype(jnp.bfloat16)


def in_planes(x: jax.Array) -> jax.Array:
    """x [..., k] -> [..., 4, ceil(k / 64) 16], in the order in which `triton_words` reads weights.

    Plane p has columns 2p and 2p + 1 of each eight, the eights of each eight of them as 0, 2, 4, 6, 1, 3, 5, 7. Zeros
    behind column k.
    """
    lead = x.ndim - 1
    x = jnp.pad(x, [(0, 0)] * lead + [(0, -x.shape[-1] % 64)])
    x = x.reshape(*x.shape[:-1], -1, 4, 2, 4, 2)
    order = (*range(lead), *(lead + i for i in (3, 0, 2, 1, 4)))
    return x.transpose(order).reshape(*x.shape[:lead], 4, -1)


def _split(tile: Tile, tiles: int, k: int, bk: int) -> int:
    """Parts of k: as the tile says, or the most (a power of two) that stay within `programs` programs of four steps.

    Each part writes float32 sums, which are read once more: with many rows, as many bytes as the weight itself.
    """
    split = tile.split or 1
    while tile.split == 0 and tiles * split * 2 <= tile.programs and split * 2 * 4 * bk <= k:
        split *= 2
    return split


def _unit(spec: Operand) -> float:
    """The power of two that `triton_code.values` leaves out of an operand."""
    if spec.element != "e2m1":
        return 1.0
    if by_row(spec) or _outside(spec) or spec.scale is None:
        return 2.0**14
    return 2.0**8 if spec.scale == "e4m3" else 1.0


def _mode(scale: jax.Array | None) -> int:
    """0 none, 1 one for all rows, 2 one a row."""
    return 0 if scale is None else 1 if scale.size == 1 else 2


def _flat(scale: jax.Array | None) -> jax.Array:
    return jnp.ones((1,), jnp.float32) if scale is None else scale.reshape(-1)


# ------------------------------------------------------------------------------------------- run


LAUNCHES: dict[str, Callable] = {
    "triton_gemv": gemv_launch,
    **{
        name: functools.partial(dot_launch, kernel=name)
        for name in ("triton_skinny", "triton_gemm", "triton_fp8_block")
    },
}


def launches() -> dict[str, Callable]:
    """Every kernel's: those of LAUNCHES, which every device has, and Blackwell's."""
    return LAUNCHES | {"triton_scaled": triton_scaled.launch}


def _run(
    name: str, device: str | None, lhs, rhs: Packed, *, lhs_spec: Operand, rhs_spec: Operand, n: int, k: int,
    out_dtype: Any, epilogue: Epilogue,
) -> jax.Array:  # fmt: skip
    """`reference.qdot` by one kernel. Raises ValueError where the device is none these kernels are for."""
    device = here() if device is None else device
    if why := _device_refuses(device):
        raise ValueError(f"{name}: {why}. A kernel from jqopt_kernels.find(..., 'cuda:90') knows its device")
    bias = None if epilogue.bias is None else epilogue.bias.astype(jnp.float32)
    product = _product(name, device, lhs_spec, rhs_spec, n, k, np.dtype(out_dtype), epilogue.activation)
    return product(lhs, rhs, bias)


@functools.lru_cache(maxsize=1024)
def _product(
    name: str, device: str, lhs_spec: Operand, rhs_spec: Operand, n: int, k: int, out_dtype: np.dtype,
    activation: str | None,
) -> Callable[..., jax.Array]:  # fmt: skip
    """The product as a function of arrays, which can be mapped (one at a time)."""

    @jax.custom_batching.sequential_vmap
    def product(lhs, rhs: Packed, bias: jax.Array | None) -> jax.Array:
        m = lhs.data.shape[0] if isinstance(lhs, Packed) else lhs.shape[0]
        epilogue = Epilogue(bias, activation)
        if 0 in (m, n, k):
            return epilogue.after(jnp.zeros((m, n), jnp.float32)).astype(out_dtype)
        number = capability(device)
        assert number is not None  # `_run` has looked
        shapes = Shapes(m, n, k)
        launch, after = launches()[name](lhs, rhs, lhs_spec, rhs_spec, shapes, out_dtype, number, epilogue=epilogue)
        return after(triton_call.call(launch, number))

    return product


@functools.lru_cache(maxsize=256)
def _on(name: str, device: str | None) -> Callable[..., jax.Array]:
    return straight_through(functools.partial(_run, name, device))


def _kernel(name: str, supports: Callable, row: str | None = None) -> Kernel:
    codes = name != "triton_gemv"
    return Kernel(row or name, "qdot", supports, as_is, _on(name, None), codes, "triton", functools.partial(_on, name))


triton_gemv = _kernel("triton_gemv", _gemv_supports)
triton_skinny = _kernel("triton_skinny", _skinny_supports)
triton_gemm = _kernel("triton_gemm", _gemm_supports)
triton_scaled_gemm = _kernel("triton_scaled", _scaled_supports)._replace(prepare=triton_scaled.prepare)
triton_fp8_block = _kernel("triton_fp8_block", _fp8_supports)
# The same code without a limit, for those who ask for it: it never writes a decoded weight.
triton_gemm_large = _kernel("triton_gemm", _dot_supports, "triton_gemm_large")
