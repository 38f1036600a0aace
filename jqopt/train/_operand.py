"""One operand of a training GEMM: from values to packed codes and back, with the scales that its recipe asks for."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jqopt._numerics import (
    decode,
    decode_scale,
    divide,
    encode,
    exponent_from_amax,
    from_bits,
    from_tiles,
    met,
    pack,
    round_to,
    scale_codes,
    to_bits,
    to_tiles,
    unpack,
    written,
)
from jqopt._recipe_train import TrainOperand
from jqopt.formats import Format
from jqopt.train import quantizers

ROWS, COLUMNS = -1, -2
"""The axis that a GEMM contracts: a rowwise copy of an operand [r, c] is contracted along c, a columnwise along r."""


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """One copy of an operand, as the recipe says; a static value. `tile`: [rows, contracted] that share a scale."""

    format: Format
    tile: tuple[int, int] | None
    delayed: bool = False
    stochastic: bool = False
    scale_up: bool = False
    power_of_two: bool = False
    hadamard: bool = False
    row_scaled: bool = False
    four_over_six: str | None = None
    scale_max: float = 448.0

    def same_both_ways(self, other: Quantizer | None) -> bool:
        """Do both copies of an operand hold the same numbers?"""
        square = self.tile is None or self.tile[0] == self.tile[1]
        return self == other and square and not (self.stochastic or self.hadamard or self.row_scaled)

    @property
    def global_amax(self) -> bool:
        """Does a scale come from the largest value of the whole tensor?"""
        return not self.row_scaled and (self.tile is None or self.format.global_scale)

    def __str__(self) -> str:
        words = [self.format.name, f"{self.tile[0]}x{self.tile[1]}" if self.tile else "tensor"]
        words += ["delayed"] * self.delayed + ["stochastic"] * self.stochastic + ["hadamard"] * self.hadamard
        words += ["scale up"] * self.scale_up + ["power of two"] * self.power_of_two
        words += ["row scaled"] * self.row_scaled + [f"4/6 {self.four_over_six}"] * bool(self.four_over_six)
        return " ".join(words)


def quantizer(spec: TrainOperand | None, hadamard: bool = False) -> Quantizer | None:
    """The quantizer of a copy with this spec; `hadamard`: the copy may be transformed."""
    if spec is None:
        return None
    return Quantizer(
        spec.element_format(), spec.tiles, spec.way == "delayed", spec.rounding == "stochastic",
        spec.scale_rounding == "up", spec.scale_rounding == "power_of_two", hadamard and spec.hadamard,
        spec.row_scaled, spec.four_over_six, float(spec.scale_max),
    )  # fmt: skip


class Measured(NamedTuple):
    """Values [..., r, c] float32, ready to be quantized, and their largest: of each tile, and of the whole [..., 1, 1].

    Row scaled, `whole` has the length of the axis that isn't contracted. Tiles are those of the values' own layout.
    """

    values: Array
    tiles: Array | None
    whole: Array


class Packed(NamedTuple):
    """Codes [..., r, c * bits / 8], scales of tiles, and the scale of the whole [..., 1, 1] (a GEMM applies it)."""

    data: Array
    scale: Array | None
    whole: Array | None


def pinned(x: Array) -> Array:
    """float32, surely rounded to x's dtype before: XLA may otherwise keep excess precision of what made x.

    One unit in the last place moves the largest value, hence all scales, hence all rounding: without this, gradients
    under jit, scan and remat would differ by tens of percents.
    """
    if x.dtype != jnp.float32 and jnp.issubdtype(x.dtype, jnp.floating):
        info = jnp.finfo(x.dtype)
        x = lax.reduce_precision(x, info.nexp, info.nmant)
    return written(x)


# jitted so that JAX traces and lowers each of these once for all sites of one shape
@functools.partial(jax.jit, static_argnums=(1, 2))
def measure(x: Array, q: Quantizer, axis: int) -> Measured:
    """The values of x [..., r, c] (float32, pinned) that are quantized to be contracted along `axis`."""
    if q.hadamard:
        short = -x.shape[axis] % 16
        if short:
            at = axis % x.ndim
            x = jnp.pad(x, [(0, short if i == at else 0) for i in range(x.ndim)])
        x = written(quantizers.hadamard16(x, axis=axis))
    size = lax.abs(x)
    tiles = None if q.tile is None else _largest(to_tiles(size, _laid(q.tile, axis)), (-3, -1))
    if q.row_scaled:
        return Measured(x, tiles, _largest(size, (axis,), keep=True))
    whole = _largest(size if tiles is None else tiles, (-2, -1))
    return Measured(x, tiles, whole[..., None, None])


def _largest(size: Array, axes: tuple[int, ...], keep: bool = False) -> Array:
    """The maximum over these axes, 0 of nothing. XLA on CPU passes NaN over here: rounding keeps it. (`amax_of` would
    not, but XLA has a routine for maxima of floats, while LLVM must compile one for maxima of bits.)"""
    over = tuple(a % size.ndim for a in axes)
    if any(size.shape[a] == 0 for a in over):
        size = jnp.pad(size, [(0, int(a in over and n == 0)) for a, n in enumerate(size.shape)])
    found = lax.reduce_max(size, over)
    return jnp.expand_dims(found, axes) if keep else found


def _laid(tile: tuple[int, int], axis: int) -> tuple[int, int]:
    return tile if axis == ROWS else (tile[1], tile[0])


class _Scales(NamedTuple):
    """What tiles (or, without a tile, the whole) are multiplied by; what their codes are, and the product of a GEMM."""

    encode: Array
    tiles: Array | None
    whole: Array | None


def _scales(m: Measured, q: Quantizer, axis: int, given: Array | None) -> _Scales:
    f = q.format
    if m.tiles is None:
        scale = quantizers.fp8_scale(m.whole, f.element, q.power_of_two) if given is None else given
        scale = jnp.broadcast_to(scale, m.whole.shape)
        return _Scales(scale, None, divide(1.0, scale))
    if f.global_scale:
        whole = written(quantizers.encode_scale(m.whole, f.element.max * q.scale_max))
        scale = quantizers.block_scale(m.tiles, whole, q.scale_up)
        return _Scales(quantizers.block_encode_scale(scale, whole), scale, _global(m.whole, q))
    if f.scale.name == "e8m0":
        exponent = exponent_from_amax(m.tiles, f.element.max)
        return _Scales(from_bits((np.uint32(254) - exponent) << 23), from_bits(exponent << 23), None)
    scale = quantizers.fp8_scale(m.tiles, f.element, q.power_of_two)
    return _Scales(scale, divide(1.0, scale), None)


def _stored(scale: Array, f: Format) -> Array:
    """The scales of tiles, from their values to as they are kept."""
    if f.scale.name == "e8m0":
        return (to_bits(scale) >> 23).astype(jnp.uint8)
    return scale_codes(scale) if f.global_scale else scale


def _global(amax: Array, q: Quantizer) -> Array:
    return divide(amax, q.format.element.max * q.scale_max)


@functools.partial(jax.jit, static_argnums=(1, 2))
def codes(m: Measured, q: Quantizer, axis: int, given: Array | None = None, dither: Array | None = None) -> Packed:
    """The packed codes of measured values; `given`: the encode scale of delayed scaling; `dither`: see `encode`."""
    if q.four_over_six is not None:
        return _four_over_six(m, q, axis)
    s = _scales(m, q, axis, given)
    scaled, shape = _scaled(m, q, axis, s)
    data = _flat(encode(scaled, q.format.element, _tiled(dither, q, axis)), q, shape)
    return Packed(pack(data, q.format.element.bits), None if s.tiles is None else _stored(s.tiles, q.format), s.whole)


@functools.partial(jax.jit, static_argnums=(1, 2))
def values(
    m: Measured, q: Quantizer, axis: int, given: Array | None = None, dither: Array | None = None
) -> tuple[Array, Array | None]:
    """(what the codes stand for, float32 [..., r, c], the scale of the whole): unpacked(codes(...)), bit for bit."""
    if q.four_over_six is not None:
        return unpacked(_four_over_six(m, q, axis), q, axis, m.values.shape[-1])
    s = _scales(m, q, axis, given)
    scaled, shape = _scaled(m, q, axis, s)
    grid = round_to(scaled, q.format.element, _tiled(dither, q, axis))
    if s.tiles is not None:
        grid = grid * met(s.tiles, grid)
    return _flat(grid, q, shape), s.whole


def _scaled(m: Measured, q: Quantizer, axis: int, s: _Scales) -> tuple[Array, tuple[int, ...]]:
    """Values as multiples of their scales, in tiles where there are any."""
    shape = m.values.shape[-2:]
    if q.tile is None:
        return m.values * s.encode, shape
    tiles = to_tiles(m.values, _laid(q.tile, axis))
    return tiles * met(s.encode, tiles), shape


def _tiled(x: Array | None, q: Quantizer, axis: int) -> Array | None:
    return x if x is None or q.tile is None else to_tiles(x, _laid(q.tile, axis))


def _flat(x: Array, q: Quantizer, shape: tuple[int, ...]) -> Array:
    return x if q.tile is None else from_tiles(x, *shape)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def unpacked(p: Packed, q: Quantizer, axis: int, columns: int) -> tuple[Array, Array | None]:
    """(what packed codes stand for, float32 [..., r, c], and the scale of the whole)."""
    grid = decode(unpack(p.data, q.format.element.bits, columns), q.format.element)
    if p.scale is None or q.tile is None:
        return grid, p.whole
    tiles = to_tiles(grid, _laid(q.tile, axis))
    return from_tiles(tiles * met(decode_scale(p.scale, q.format), tiles), *grid.shape[-2:]), p.whole


def _four_over_six(m: Measured, q: Quantizer, axis: int) -> Packed:
    """Rowwise as `quantizers.nvfp4` does it; columnwise the same of the transpose."""
    turn = (lambda x: x.mT) if axis == COLUMNS else (lambda x: x)
    assert q.tile is not None and m.tiles is not None
    x, amax = turn(m.values), turn(m.whole)
    whole = quantizers.encode_scale(amax, 6 * q.scale_max)
    flat_amax = amax[..., 0] if q.row_scaled else amax[..., 0, 0]
    found, scale = quantizers.four_over_six_codes(
        to_tiles(x, q.tile), turn(m.tiles), whole, flat_amax, q.row_scaled, q.four_over_six, q.scale_max
    )
    data = turn(from_tiles(found, *x.shape[-2:]))
    return Packed(pack(data, q.format.element.bits), turn(scale), _global(m.whole, q))
