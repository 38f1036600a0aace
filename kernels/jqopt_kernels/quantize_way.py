"""The words of the quantizer ops: how scales are found and values rounded, and which formats they know."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._types import Operand, Packed
from .decode import CODINGS

TINY = 2.0**-117  # scales below this count as zero: times the smallest e4m3 it is the smallest normal float32
F32_MAX = float(np.finfo(np.float32).max)
SIXTH = float(np.float32(1) / np.float32(6))
LARGEST = {"e2m1": 6.0, "e2m3": 7.5, "e3m2": 28.0, "e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0}
UNSIGNED_ZERO = ("e2m1",)  # -0 becomes +0; the other floats keep its sign, as casts do
NAN = {"e4m3": 0x7F, "e5m2": 0x7F}
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)  # TransformerEngine's, for training


class Way(NamedTuple):
    """How values become codes (static, hashable).

    encode: scales are what values are multiplied by (TransformerEngine's training arithmetic). Else they are what
        codes are multiplied by, and values are divided by them (ModelOpt's export arithmetic).
    scale_up: e4m3 block scales are rounded up, so that no value of a block saturates (encode only).
    power_of_two: float32 encode scales are rounded down to a power of two (encode only).
    hadamard: 16 signs: blocks of 16 along k are first multiplied by (1/4) diag(signs) H16 and rounded to bfloat16.
    stochastic: values are rounded up with the probability of their place between two neighbours; needs a key.
    keep_nan: NaN in x becomes the element's code of NaN, where it has one, instead of the largest value.
    """

    encode: bool = False
    scale_up: bool = False
    power_of_two: bool = False
    hadamard: tuple[int, ...] | None = None
    stochastic: bool = False
    keep_nan: bool = False


NEAREST = Way()


class Random(NamedTuple):
    """What stochastic rounding draws from: key uint32 [2], start uint32 [2], the row and column of x's first value.

    The bits of a value depend on the key and on its row and column in the whole tensor alone, so a device that holds a
    part of it passes where the part starts (its column a multiple of 8), and gets the bits that one device would.
    """

    key: jax.Array
    start: jax.Array | None = None


def tile(spec: Operand, k: int) -> tuple[int, int] | None:
    """(rows, columns) that share a scale; None: the scale is given for the whole."""
    if spec.granularity == "tensor":
        return None
    if spec.granularity == "channel" or spec.block is None:
        return 1, k
    return spec.block if isinstance(spec.block, tuple) else (1, spec.block)


def needs_scale(spec: Operand) -> bool:
    """Whether the scale of the tensor must be given."""
    return spec.global_scale or spec.granularity == "tensor"


def unknown(spec: Operand) -> str | None:
    """Why no quantizer knows this format, or None."""
    if spec.element not in LARGEST:
        return f"element {spec.element!r} has no quantizer; those that have: {', '.join(sorted(LARGEST))}"
    if spec.zero_point:
        return "zero points have no quantizer"
    if spec.granularity not in ("tensor", "channel", "block"):
        return f"granularity {spec.granularity!r} is none of tensor, channel, block"
    if spec.granularity == "block" and spec.block is None:
        return "granularity 'block' needs a block"
    known = {"float32", "e8m0", "e4m3"} if spec.granularity == "block" else {"float32"}
    if spec.scale not in known:
        return f"{spec.granularity} scales are stored as {spec.scale}, not as {' or '.join(sorted(known))}"
    if (spec.scale == "e4m3") != spec.global_scale:
        return "e4m3 scales come with a global scale, and only they do"
    return "int8 blocks have no quantizer" if spec.element == "int8" and spec.granularity == "block" else None


def check(spec: Operand, way: Way, k: int, scale: jax.Array | None, random: Random | None) -> None:
    """Raises ValueError for arguments of `run` that contradict each other."""
    if (why := unknown(spec)) is not None:
        raise ValueError(f"quantize: {why}")
    if needs_scale(spec) != (scale is not None):
        wanted = "needs `scale`, [] float32" if scale is None else "finds its scales itself: leave `scale` out"
        raise ValueError(f"quantize: {spec.element} with granularity {spec.granularity} {wanted}")
    if way.stochastic != (random is not None):
        raise ValueError("quantize: Way(stochastic=True) and a `random` key go together")
    if way.stochastic and CODINGS[spec.element].mantissa is None:
        raise ValueError(f"quantize: {spec.element} has no stochastic rounding; floats have")
    check_hadamard(way, k)
    if not way.encode and (way.scale_up or way.power_of_two):
        raise ValueError("quantize: scale_up and power_of_two are of encode scales; write Way(encode=True)")


def check_hadamard(way: Way, k: int) -> None:
    """Raises ValueError where rows of k values have no Hadamard transform."""
    if way.hadamard is not None and (k % 16 or len(way.hadamard) != 16):
        raise ValueError(
            f"quantize: found a Hadamard transform of k={k} with {len(way.hadamard)} signs, expected a multiple of 16 "
            "(pad with zeros) and 16 signs"
        )


def scale_shape(spec: Operand, m: int, k: int) -> tuple[int, int]:
    """The shape of the stored scales of a matrix [m, k]."""
    rows, columns = tile(spec, k) or (m, k)
    return (1, 1) if spec.granularity == "tensor" else (-(-m // rows), 1 if columns == k else -(-k // columns))


def no_scales(spec: Operand, m: int, k: int) -> jax.Array | None:
    """The stored scales of a matrix without values: zeros, where a row has one all the same."""
    if spec.granularity == "tensor":
        return None
    return jnp.zeros(scale_shape(spec, m, k), jnp.float32 if spec.scale == "float32" else jnp.uint8)


def packed_of(data: jax.Array, found: jax.Array | None, whole: jax.Array | None, spec: Operand) -> Packed:
    """Codes, the scales found from x, and the scale of decoding the whole, in their places."""
    if spec.granularity == "tensor":
        assert whole is not None
        return Packed(data, whole.reshape(1, 1))
    return Packed(data, found, whole if spec.global_scale else None)
