"""The one door to Pallas: launching a kernel (compiled for CUDA, interpreted on a CPU) and its masked loads.

Kernels take whole arrays and compute their own positions, masked where a tile hangs over, so that no size has to be a
multiple of anything. They are lowered through Triton inside XLA, without the Triton package. JAX 0.11 calls this
lowering deprecated in favour of Mosaic GPU (or of jax-triton, which needs that package); it is still in 0.12. The
warning comes when a program is lowered, outside of any call of ours: our tests, whose warnings are errors, allow it by
its text in pyproject.toml.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._device import interprets, platform

MOST_BYTES = 1 << 31  # Pallas reckons positions in signed 32 bits up to 2^32 bytes: no more single bytes than this


def launch(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    out: Any,
    operands: Sequence[jax.Array],
    *,
    warps: int = 4,
    stages: int = 3,
    name: str,
) -> Any:
    """kernel(*operand refs, *output refs) over `grid`; `out`: jax.ShapeDtypeStruct, or several.

    What runs is decided where the program is lowered: compiled for CUDA, interpreted on a CPU.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    def run(interpret: bool):
        params = triton.CompilerParams(num_warps=warps, num_stages=stages)
        return pl.pallas_call(kernel, out_shape=out, grid=grid, interpret=interpret, compiler_params=params, name=name)

    return lax.platform_dependent(*operands, cpu=run(True), default=run(False))


def load(ref: Any, index: tuple, mask: jax.Array) -> jax.Array:
    """ref[index], 0 where the mask is False; the indices and the mask are arrays that broadcast together."""
    from jax.experimental.pallas import triton

    shape = jnp.broadcast_shapes(*(jnp.shape(i) for i in index), mask.shape)
    whole = tuple(i if jnp.ndim(i) == 0 else jnp.broadcast_to(i, shape) for i in index)
    return triton.load(ref.at[whole], mask=jnp.broadcast_to(mask, shape), other=jnp.zeros((), ref.dtype))


def store(ref: Any, index: tuple, value: jax.Array, mask: jax.Array) -> None:
    """ref[index] = value where the mask is True."""
    from jax.experimental.pallas import triton

    whole = tuple(i if jnp.ndim(i) == 0 else jnp.broadcast_to(i, value.shape) for i in index)
    triton.store(ref.at[whole], value.astype(ref.dtype), mask=jnp.broadcast_to(mask, value.shape))


def program_id(axis: int) -> jax.Array:
    from jax.experimental import pallas as pl

    return pl.program_id(axis)


def span(start: Any, size: int) -> jax.Array:
    """start, start + 1, ...: `size` positions, a power of two."""
    return start + lax.iota(jnp.int32, size)


def power(n: int) -> int:
    """The smallest power of two that is not less than n (nor than 1)."""
    return 1 << max(n - 1, 0).bit_length()


def steps(n: int, size: int) -> int:
    """How many pieces of `size` hold n."""
    return -(-n // size)


def no_place(device: str, bytes_: int) -> str | None:
    """Why no Pallas kernel runs on this device, or over so large an array of bytes; None where it can."""
    if platform(device) == "cpu" and not interprets(device):
        return 'Pallas is only interpreted on a CPU, for tests; ask for the device "cpu:interpret"'
    if platform(device) not in ("cpu", "cuda"):
        return f"written for CUDA, not for {device}"
    if bytes_ > MOST_BYTES:
        return f"{bytes_} bytes of codes: Pallas counts positions in signed 32 bits, up to {MOST_BYTES}"
    return None
