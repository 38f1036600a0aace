"""The one place where quantizers call Pallas: interpreted on CPU, Triton elsewhere; masked loads and stores of tiles.

Pallas is imported when it is first used: it takes longer than all else that jqopt_kernels imports.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@functools.cache
def _pallas() -> tuple[Any, Any]:
    """Pallas and its lowering to Triton, which JAX 0.11 deprecates: it still works in 0.12, and warns when lowered."""
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    return pallas, triton


def call(
    kernel: Callable[..., None],
    operands: Sequence[jax.Array],
    outputs: Sequence[tuple[tuple[int, ...], Any]],
    grid: tuple[int, ...],
    warps: int,
) -> list[jax.Array]:
    """Runs kernel(interpret, *operand refs, *output refs) for each point of the grid; all refs are whole arrays."""
    pl, plt = _pallas()
    varying = _varying(operands)
    like = functools.partial(jax.ShapeDtypeStruct, **varying)
    shapes = [like(shape, dtype) for shape, dtype in outputs]

    def run(interpret: bool, *arrays: jax.Array) -> list[jax.Array]:
        return pl.pallas_call(
            functools.partial(kernel, interpret), shapes, grid=grid, interpret=interpret,
            compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        )(*arrays)  # fmt: skip

    if varying:  # JAX 0.10 cannot interpret a kernel in a shard_map with check_vma=True, which is for CPU alone
        return run(False, *operands)
    return lax.platform_dependent(*operands, cpu=functools.partial(run, True), default=functools.partial(run, False))


def _varying(operands: Sequence[jax.Array]) -> dict[str, Any]:
    """In a shard_map: over which axes of the mesh the outputs differ, as ShapeDtypeStruct takes it."""
    types = [jax.typeof(x) for x in operands]
    found = [t for t in (getattr(t, "manual_axis_type", None) for t in types) if t is not None]
    most = max(found, key=lambda t: len(t.varying), default=None)
    return {"manual_axis_type": most} if most is not None and most.varying else {}


def divide_rn(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y correctly rounded: Triton's own division may be wrong by two units in the last place."""
    y = jnp.broadcast_to(y, x.shape)
    (out,) = _pallas()[1].elementwise_inline_asm(
        "div.rn.f32 $0, $1, $2;", args=[x, y], constraints="=f,f,f", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )  # fmt: skip
    return out


def product(x: jax.Array, factor: np.uint32) -> tuple[jax.Array, jax.Array]:
    """Upper and lower 32 bits of uint32 x * factor: under Triton Pallas has no operation for the upper ones.

    The instruction's result is called signed, since Pallas' other operations do not take what is called unsigned.
    """
    (high,) = _pallas()[1].elementwise_inline_asm(
        f"mul.hi.u32 $0, $1, {int(factor)};", args=[x], constraints="=r,r", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.int32)],
    )  # fmt: skip
    return lax.bitcast_convert_type(high, jnp.uint32), x * factor


def program(axis: int) -> jax.Array:
    """This program's place on an axis of the grid."""
    return _pallas()[0].program_id(axis)


def scalar(ref: Any, at: int = 0) -> jax.Array:
    """One number of an operand [n]."""
    return ref[at]


def load(ref: Any, at: tuple, size: tuple[int, int], full: tuple[int, int]) -> jax.Array:
    """The tile of this size that starts `at`, with zeros where it stands over the edge of the array."""
    pl, plt = _pallas()
    mask = _inside(at, size, full)
    where = ref.at[pl.ds(at[0], size[0]), pl.ds(at[1], size[1])]
    return plt.load(where) if mask is None else plt.load(where, mask=mask, other=jnp.zeros((), ref.dtype))


def store(ref: Any, value: jax.Array, at: tuple, full: tuple[int, int]) -> None:
    """Writes the part of a tile that lies within the array."""
    pl, plt = _pallas()
    size = value.shape
    plt.store(ref.at[pl.ds(at[0], size[0]), pl.ds(at[1], size[1])], value, mask=_inside(at, size, full))


def _inside(at: tuple, size: tuple[int, ...], full: tuple[int, int]) -> jax.Array | None:
    """Which values of a tile lie within the array; None where all always do."""
    if full[0] % size[0] == 0 and full[1] % size[1] == 0:
        return None
    rows = at[0] + lax.broadcasted_iota(jnp.int32, size, 0)
    columns = at[1] + lax.broadcasted_iota(jnp.int32, size, 1)
    return (rows < full[0]) & (columns < full[1])
