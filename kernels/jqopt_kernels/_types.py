"""The words kernels and their callers share: what an operand is, what its arrays are, what a kernel is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax


class Operand(NamedTuple):
    """Static description of one operand of an op (hashable, known at trace time).

    element: "float" (not quantized), int8, int4, uint4, e4m3, e5m2, e2m1, e3m2, e2m3 or nf4.
    block: length of a scale block along k, or (rows, k) for 2-D blocks, or None.
    scale: how scales are stored: "float32", "e4m3" or "e8m0" bits in uint8, or None for no scale.
    granularity: "tensor" ([1, 1]), "channel" ([rows, 1]; a token is a row of lhs), "block", or None for floats.
    global_scale: whether a second float32 scale of the whole tensor multiplies every value.
    zero_point: whether values are (code - zero_point) * scale.
    """

    element: str
    block: int | tuple[int, int] | None = None
    scale: str | None = None
    granularity: str | None = None
    global_scale: bool = False
    zero_point: bool = False


class Packed(NamedTuple):
    """Arrays of one quantized operand, as a matrix with k last.

    data: codes. As rhs [n, k_packed]: two 4-bit codes a byte (low nibble first), four 6-bit codes in three bytes
        (little-endian), else one code a byte. As lhs [m, k]: one code a byte, never packed. int8 for int elements
        (int4 may also be the nibble in uint8), uint8 for the others.
    scale: [1, 1], [rows, 1], [rows, ceil(k/block)] or [ceil(rows/bn), ceil(k/bk)]; float32, or uint8 bits. What a
        kernel's `prepare` made, for that kernel alone, may lie otherwise.
    global_scale: [] float32, or None.
    zero_point: like `scale`, in code units, any integer or float type; or None.
    """

    data: jax.Array
    scale: jax.Array | None
    global_scale: jax.Array | None = None
    zero_point: jax.Array | None = None


class Shapes(NamedTuple):
    """The sizes of one matrix product [m, k] x [n, k] -> [m, n]; `groups` experts share the m rows of a grouped one."""

    m: int
    n: int
    k: int
    groups: int = 1


class Kernel(NamedTuple):
    """One implementation of one op.

    supports(lhs, rhs, device, shapes) is None where the kernel can do it, else the reason why not.
    prepare(packed) -> packed is applied once to a weight that will be used many times (may be the identity).
    run(lhs, rhs, *, lhs_spec, rhs_spec, n, k, out_dtype, epilogue) -> [m, n]; see `reference.qdot` for what it must
        equal. Of the op "ragged": run(lhs, rhs, sizes, *, ...), see `reference.ragged`; of "attend", see `attend`.
    low_precision: it multiplies the codes of a quantized lhs themselves. Any other kernel decodes them first, so that
        a caller who has the values at hand may as well pass those, as a float lhs.
    backend: the family it belongs to, by which callers may ask for it: xla, triton, pallas, ffi or reference.
    on(device) -> run for one device, where it depends on it; the same function each time. `table.find` calls it; a
        `run` that was not bound so is for this process's default device.
    """

    name: str
    op: str
    supports: Callable[[Operand, Operand, str, Shapes], str | None]
    prepare: Callable[[Packed], Packed]
    run: Callable[..., jax.Array]
    low_precision: bool = False
    backend: str = "xla"
    on: Callable[[str], Callable[..., jax.Array]] | None = None


def as_is(packed: Packed) -> Packed:
    """`prepare` of kernels that read the stored layout."""
    return packed
