"""qdot on Blackwell's own block scales: NVFP4 x NVFP4 and MXFP8 x MXFP8 as one cuDNN call, by jax.nn.scaled_matmul.

XLA makes the call where the device has such tensor cores and cuDNN is 9.7 or newer, and pads and swizzles scales for it
(jax 0.10.2, compiled for compute capability 10.0 without a GPU). Elsewhere it would decode both operands into memory.
`jax.lax.scaled_dot` stands in for it on a CPU, where scaled_matmul has no lowering: on CUDA it decodes NVFP4 first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from ._device import capability, platform
from ._gradient import straight_through
from ._operands import NT, finish
from ._types import Kernel, Operand, Packed, Shapes, as_is

BLOCKS = {("e2m1", "e4m3"): 16, ("e4m3", "e8m0"): 32, ("e5m2", "e8m0"): 32}  # element and scale: cuDNN's block
NATIVE = {
    "e2m1": jnp.float4_e2m1fn, "e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2, "e8m0": jnp.float8_e8m0fnu,
}  # fmt: skip
CAPABILITIES = range(100, 120)  # compute capability 12 has these tensor cores too: not tried


@straight_through
def _scaled(lhs: Packed, rhs: Packed, *, lhs_spec, rhs_spec, n, k, out_dtype, epilogue):
    if 0 in (lhs.data.shape[0], n, k):
        return finish(jnp.zeros((lhs.data.shape[0], n), jnp.float32), None, None, out_dtype, epilogue)
    operands = [
        _values(_pairs(lhs.data) if lhs_spec.element == "e2m1" else lhs.data, lhs_spec.element),
        _values(rhs.data, rhs_spec.element),
        *(_values(side.scale, str(spec.scale)) for side, spec in ((lhs, lhs_spec), (rhs, rhs_spec))),
    ]
    y = lax.platform_dependent(*operands, cpu=_on_cpu, default=_on_cuda)
    return finish(y, lhs.global_scale, rhs.global_scale, out_dtype, epilogue)


def _pairs(codes: jax.Array) -> jax.Array:
    """4-bit codes, one a byte [m, k] -> two a byte [m, k / 2], low nibble first."""
    return lax.bitwise_or(codes[:, 0::2], lax.shift_left(codes[:, 1::2], jnp.uint8(4)))


def _values(bits: jax.Array | None, kind: str) -> jax.Array:
    """Stored bits [rows, bytes] as an array of their own type [rows, columns]."""
    assert bits is not None, kind
    values = lax.bitcast_convert_type(bits, NATIVE[kind])
    return values.reshape(bits.shape[0], -1)


@jax.custom_batching.sequential_vmap
def _on_cuda(x: jax.Array, w: jax.Array, x_scale: jax.Array, w_scale: jax.Array) -> jax.Array:
    one = (a[None] for a in (x, w, x_scale, w_scale))
    return jax.nn.scaled_matmul(*one, preferred_element_type=jnp.float32)[0]


def _on_cpu(x: jax.Array, w: jax.Array, x_scale: jax.Array, w_scale: jax.Array) -> jax.Array:
    return lax.scaled_dot(
        x, w, lhs_scale=x_scale, rhs_scale=w_scale, dimension_numbers=NT, preferred_element_type=jnp.float32
    )


def _supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    for side, spec in (("lhs", lhs), ("rhs", rhs)):
        if (spec.element, spec.scale) not in BLOCKS:
            return f"{side} is {spec.element} with {spec.scale} scales: cuDNN has NVFP4 and MXFP8 on both sides"
        if (block := BLOCKS[spec.element, str(spec.scale)]) != spec.block:
            return f"{side} has blocks {spec.block}: cuDNN's are {block} of {spec.element}"
        if shapes.k % block:
            return f"k={shapes.k} is not a multiple of the block {block}"
    if lhs.scale != rhs.scale:
        return f"one side has {lhs.scale} scales, the other {rhs.scale}"
    if platform(device) != "cuda":
        return f"for CUDA devices of compute capability 10, not for {device}"
    number = capability(device)
    if number is None:
        return f"device {device!r} does not say its compute capability; write 'cuda:100'"
    if number not in CAPABILITIES:
        return f"compute capability {number / 10}: block-scaled products of cuDNN are for 10.0 and its kin"
    return None


xla_scaled = Kernel("xla_scaled", "qdot", _supports, as_is, _scaled, low_precision=True)
