"""Number formats as data: what an element is, how many share a scale, how the scale is stored."""

from __future__ import annotations

import dataclasses
import difflib

from jqopt.errors import UnsupportedError


@dataclasses.dataclass(frozen=True)
class Element:
    """The set of values one code can stand for.

    `max` is the largest value a scale is made for; `min` the smallest code value kept (int8 keeps -128 although its
    scale is amax / 127). `signed_zero`: -0.0 keeps its sign bit, as in casts to fp8; otherwise it becomes +0.
    """

    name: str
    bits: int
    max: float
    kind: str
    min: float
    exponent_bits: int = 0
    mantissa_bits: int = 0
    bias: int = 0
    table: tuple[float, ...] = ()
    signed_zero: bool = False
    nan: int | None = None  # the code of NaN, where there is one


@dataclasses.dataclass(frozen=True)
class ScaleFormat:
    """How a block's scale is stored: float32, e4m3 bits (times a global scale), or e8m0 (a power of two)."""

    name: str
    bits: int


@dataclasses.dataclass(frozen=True)
class Format:
    """A number format: an element, the block of elements that shares a scale, and the scale's own format.

    `block`: an int b (b elements along the contracted axis), a pair (rows, contracted), or None: one scale for a
    channel or for the whole tensor, by granularity. `ranges`: what a block's largest value is multiplied by before it
    becomes the scale; of several the one with the least squared error (what is stored doesn't tell). `scale_max`: the
    scale that the block with the tensor's largest value gets, under a global scale. `then`: what the decoded values are
    rounded to once more, under the global scale (int4 weights that fp8 products read).
    """

    name: str
    element: Element
    block: int | tuple[int, int] | None
    scale: ScaleFormat
    global_scale: bool = False
    zero_point: bool = False
    ranges: tuple[float, ...] = (1.0,)
    scale_max: float = 448.0
    then: Element | None = None

    @property
    def tile(self) -> tuple[int, int] | None:
        """`block` as (rows, contracted), or None."""
        return (1, self.block) if isinstance(self.block, int) else self.block

    @property
    def granularity(self) -> str:
        """Which values share a scale by default: "block", or without a block "tensor" (floats) or "channel"."""
        if self.block is not None:
            return "block"
        return "tensor" if self.element.kind == "float" else "channel"

    def with_block(self, block: int | tuple[int, int] | list[int] | None) -> Format:
        """This format with another block size.

        Raises:
            UnsupportedError: the block is not a positive int or a pair of them, or it is None for a format whose
                scales are not float32 (those need a block).
        """
        pair = tuple(block) if isinstance(block, list | tuple) else block
        sizes = pair if isinstance(pair, tuple) else (pair,) if pair is not None else ()
        if (
            not all(isinstance(size, int) and 0 < size <= LARGEST_BLOCK for size in sizes)
            or len(sizes) > 2
            or pair == ()
        ):
            raise UnsupportedError(
                f"format {self.name!r}: block {block!r} is not a block size; "
                f"write a whole number from 1 to {LARGEST_BLOCK}, or a pair [rows, columns] of them "
                "(one scale for a whole row is granularity 'channel', for a whole matrix 'tensor')"
            )
        if pair is None and self.scale.name != "float32":
            raise UnsupportedError(
                f"format {self.name!r} stores its scales as {self.scale.name} and needs a block; write a number, "
                f"such as {self.block}"
            )
        if isinstance(pair, tuple) and len(pair) == 1:
            pair = pair[0]
        return dataclasses.replace(self, block=pair)

    def scale_shape(self, n: int, k: int, granularity: str | None = None) -> tuple[int, int]:
        """The shape of the scales of a matrix [n, k]."""
        rows, cols = self.tile_for(n, k, granularity)
        return ceil_div(n, rows), ceil_div(k, cols)

    def tile_for(self, n, k, granularity: str | None = None) -> tuple:
        """(rows, columns) that share one scale in a matrix [n, k].

        Raises:
            UnsupportedError: an unknown granularity, or one this format cannot have.
        """
        granularity = granularity or self.granularity
        if granularity == "block" and self.tile is not None:
            return self.tile
        if granularity in ("channel", "token", "tensor") and self.scale.name == "float32":
            return (n, k) if granularity == "tensor" else (1, k)
        if granularity not in GRANULARITIES:
            raise UnsupportedError(_unknown("granularity", granularity, GRANULARITIES))
        reason = (
            "it has no block size; write format.with_block(128), or 'block: 128' in a recipe"
            if granularity == "block"
            else f"its {self.scale.name} scales belong to blocks of {self.block}; write 'block'"
        )
        raise UnsupportedError(f"format {self.name!r} cannot have granularity {granularity!r}: {reason}")

    def bits_per_value(self, n: int, k: int, granularity: str | None = None) -> float:
        """Stored bits per value of a matrix [n, k]: codes, padding of the last byte, scales and zero points."""
        codes = n * (-(-k * self.element.bits // 8) * 8)
        rows, cols = self.scale_shape(n, k, granularity)
        scales = rows * cols * (self.scale.bits + (8 if self.zero_point else 0))
        return (codes + scales + (32 if self.global_scale else 0)) / max(n * k, 1)


def ceil_div(size, part):
    """How many parts cover a size; a part as large as the size covers it, also where both are 0 or symbolic."""
    if part == 1 or size == part:
        return size if part == 1 else 1
    return -(-size // part)


GRANULARITIES = ("tensor", "channel", "token", "block")
LARGEST_BLOCK = 1 << 16
"""A short block is padded to its whole length while it is quantized: a larger one would fill the memory."""

# Values of the 4-bit NormalFloat: quantiles of N(0, 1) scaled to [-1, 1] (QLoRA, arXiv 2305.14314, appendix E).
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# OCP 8-bit Floating Point (OFP8) and Microscaling (MX) v1.0; e4m3 is the "fn" form (no infinity).
E2M1 = Element("e2m1", 4, 6.0, "float", -6.0, 2, 1, 1)
E3M2 = Element("e3m2", 6, 28.0, "float", -28.0, 3, 2, 3, signed_zero=True)
E2M3 = Element("e2m3", 6, 7.5, "float", -7.5, 2, 3, 1, signed_zero=True)
E4M3 = Element("e4m3", 8, 448.0, "float", -448.0, 4, 3, 7, signed_zero=True, nan=0x7F)
E5M2 = Element("e5m2", 8, 57344.0, "float", -57344.0, 5, 2, 15, signed_zero=True, nan=0x7F)
INT8 = Element("int8", 8, 127, "int", -128)
INT8_SYMMETRIC = Element("int8_symmetric", 8, 127, "int", -127)
INT4 = Element("int4", 4, 7, "int", -8)
UINT4 = Element("uint4", 4, 15, "int", 0)
NF4 = Element("nf4", 4, 1.0, "table", -1.0, table=_NF4)

FLOAT32 = ScaleFormat("float32", 32)
SCALE_E4M3 = ScaleFormat("e4m3", 8)
E8M0 = ScaleFormat("e8m0", 8)

# Where a block's largest value comes to lie: from 8, saturated to 6, to 3.4. Steps are those of e4m3 or less; the last
# one times 256 is still an e4m3. The first two are four over six, which equal errors prefer.
_SWEPT = (1.0, 1.5, 0.75, 0.8125, 0.875, 0.9375, 1.0625, 1.125, 1.25, 1.375, 1.625, 1.75)

_FORMATS = {
    f.name: f
    for f in (
        Format("int8", INT8, None, FLOAT32),
        Format("int4", INT4, 128, FLOAT32),
        Format("int4_fp8", INT4, 128, FLOAT32, global_scale=True, then=E4M3),
        Format("uint4", UINT4, 128, FLOAT32, zero_point=True),
        Format("fp8", E4M3, None, FLOAT32),
        Format("fp8_e5m2", E5M2, None, FLOAT32),
        Format("fp8_block", E4M3, (128, 128), FLOAT32),
        Format("nvfp4", E2M1, 16, SCALE_E4M3, global_scale=True),
        # Cook et al., Four Over Six, arXiv 2512.02010: 1.5 times the largest scale, 384, must still be an e4m3.
        Format("nvfp4_four_over_six", E2M1, 16, SCALE_E4M3, global_scale=True, ranges=(1.0, 1.5), scale_max=256.0),
        Format("nvfp4_swept", E2M1, 16, SCALE_E4M3, global_scale=True, ranges=_SWEPT, scale_max=256.0),
        Format("mxfp8", E4M3, 32, E8M0),
        Format("mxfp6", E3M2, 32, E8M0),
        Format("mxfp6_e2m3", E2M3, 32, E8M0),
        Format("mxfp4", E2M1, 32, E8M0),
        Format("mxint8", INT8_SYMMETRIC, 32, E8M0),
        Format("nf4", NF4, 64, FLOAT32),
    )
}


def names() -> tuple[str, ...]:
    """The names of all formats, as recipes and manifests spell them."""
    return tuple(_FORMATS)


def get(name: str | Format) -> Format:
    """The format called `name` (a Format is returned as it is).

    Raises:
        UnsupportedError: no such format; the message gives the nearest name and lists all.
    """
    if isinstance(name, Format):
        return name
    if name not in _FORMATS:
        raise UnsupportedError(_unknown("format", name, names()))
    return _FORMATS[name]


def _unknown(what: str, found: object, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(found).lower(), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {found!r}{hint} Known: {', '.join(known)}"
