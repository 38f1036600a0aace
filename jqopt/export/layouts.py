"""How the arrays of one packed matrix stand in the files of other tools: named forms, each both ways, as data.

The leaves of a QTensor for one matrix: data [n, bytes], scale and zero_point [rows, cols], pre_scale [k], others [].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jqopt.errors import CheckpointError

Shape = tuple[int, ...]

DTYPES: dict[str, tuple[np.dtype, ...]] = {
    "uint8": (np.dtype(np.uint8),),
    "int8": (np.dtype(np.int8),),
    "int32": (np.dtype(np.int32),),
    "int64": (np.dtype(np.int64),),
    "float8_e4m3fn": (np.dtype(ml_dtypes.float8_e4m3fn),),
    "float32": (np.dtype(np.float32),),
    "float": (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)),
}
"""What a stored tensor may be, by the word of the tables; the first is what is written."""


class Size(NamedTuple):
    """The sizes of one packed matrix: [n, k], its scales [rows, cols], bits of a code, and are codes signed?"""

    n: int
    k: int
    rows: int
    cols: int
    bits: int
    signed: bool


class Form(NamedTuple):
    """One way an array is laid out: the shapes it may have (the first is written), to it and back."""

    shapes: Callable[[Size], tuple[Shape, ...]]
    write: Callable[[np.ndarray, Size], np.ndarray]
    read: Callable[[np.ndarray, Size], np.ndarray]


class Stored(NamedTuple):
    """One tensor of a packed matrix: `suffix` of its name, the leaf it holds, its dtype and form.

    `inverse`: the file holds 1 / value. `optional`: it may be missing. `shared`: the same in all matrices that an
    engine runs as one.
    """

    suffix: str
    leaf: str
    dtype: str
    form: str
    inverse: bool = False
    optional: bool = False
    shared: bool = False


def _reshaped(shape: Callable[[Size], Shape], back: Callable[[Size], Shape]) -> Form:
    return Form(lambda s: (shape(s),), lambda x, s: x.reshape(shape(s)), lambda x, s: x.reshape(back(s)))


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _to_words(codes: np.ndarray, size: Size) -> np.ndarray:
    """Packed rows of bytes [m, b] as little-endian int32; signed codes become code + 2^(bits - 1)."""
    k = size.k
    half = (0x80 if size.bits == 8 else 0x88) if size.signed else 0
    out = np.zeros((codes.shape[0], 4 * _words(k, size.bits)), np.uint8)
    out[:, : codes.shape[1]] = codes.view(np.uint8) ^ half
    if size.bits == 4 and k % 2:
        out[:, codes.shape[1] - 1] &= 15
    return out.view("<i4")


def _from_words(words: np.ndarray, size: Size) -> np.ndarray:
    half = (0x80 if size.bits == 8 else 0x88) if size.signed else 0
    codes = np.ascontiguousarray(words).view(np.uint8)[:, : -(-size.k * size.bits // 8)] ^ np.uint8(half)
    if size.bits == 4 and size.k % 2:
        codes[:, -1] &= 15
    return codes.view(np.int8) if size.bits == 8 and size.signed else codes


def nibbles(data: np.ndarray, k: int) -> np.ndarray:
    """Bytes [m, ceil(k / 2)] as codes [m, k], low nibble first."""
    return np.stack([data & 15, data >> 4], axis=-1).reshape(data.shape[0], -1)[:, :k]


def paired(codes: np.ndarray) -> np.ndarray:
    """Codes [m, k] as bytes [m, ceil(k / 2)], low nibble first."""
    even = codes if codes.shape[1] % 2 == 0 else np.pad(codes, [(0, 0), (0, 1)])
    return even[:, ::2] | even[:, 1::2] << np.uint8(4)


def _zeros_to_words(zero: np.ndarray, size: Size) -> np.ndarray:
    """Zero points [n, cols] (unsigned codes) packed along n."""
    turned = size._replace(k=size.n, signed=False)
    codes = np.ascontiguousarray(zero.T)
    return np.ascontiguousarray(_to_words(paired(codes) if size.bits == 4 else codes, turned).T)


def _zeros_from_words(words: np.ndarray, size: Size) -> np.ndarray:
    codes = _from_words(np.ascontiguousarray(words.T), size._replace(k=size.n, signed=False))
    return np.ascontiguousarray((nibbles(codes, size.n) if size.bits == 4 else codes).T)


def _to_row_pairs(data: np.ndarray, size: Size) -> np.ndarray:
    """4-bit codes as ModelOpt packs integers: byte [i, j] holds rows 2i (low nibble) and 2i + 1 of column j."""
    codes = nibbles(data, size.k)
    return codes[::2] | codes[1::2] << np.uint8(4)


def _from_row_pairs(data: np.ndarray, size: Size) -> np.ndarray:
    codes = np.stack([data & 15, data >> 4], axis=1).reshape(size.n, size.k)
    return paired(codes)


def _tiles(size: Size) -> tuple[Shape, ...]:
    whole = (size.rows, 1, size.cols, 1)
    return (whole, ()) if size.rows * size.cols == 1 else (whole,)  # vLLM 0.32 can't read the latter, ModelOpt's


def _grid(s: Size) -> Shape:
    return (s.rows, s.cols)


FORMS: dict[str, Form] = {
    "codes": _reshaped(lambda s: (s.n, -(-s.k * s.bits // 8)), lambda s: (s.n, -(-s.k * s.bits // 8))),
    "words": Form(lambda s: ((s.n, _words(s.k, s.bits)),), _to_words, _from_words),
    "words of rows": Form(lambda s: ((_words(s.n, s.bits), s.cols),), _zeros_to_words, _zeros_from_words),
    "row pairs": Form(lambda s: ((s.n // 2, s.k),), _to_row_pairs, _from_row_pairs),
    "grid": _reshaped(_grid, _grid),
    "column": _reshaped(lambda s: (s.n, 1), _grid),
    "vector": _reshaped(lambda s: (s.n,), _grid),
    "one scale": _reshaped(lambda s: (1,), _grid),
    "scalar scale": _reshaped(lambda s: (), _grid),
    "tiles": Form(_tiles, lambda x, s: x.reshape(_tiles(s)[0]), lambda x, s: x.reshape(_grid(s))),
    "one": _reshaped(lambda s: (1,), lambda s: ()),
    "scalar": _reshaped(lambda s: (), lambda s: ()),
    "channels": _reshaped(lambda s: (s.k,), lambda s: (s.k,)),
    "shape": Form(lambda s: ((2,),), lambda x, s: np.array([s.n, s.k], np.int64), lambda x, s: x),
}
"""The forms by the names that the tables use."""

SHAPE = "shape"
"""The leaf of a tensor that only repeats [n, k]."""


def shape_of(stored: Stored, size: Size) -> Shape:
    """The shape that is written."""
    return FORMS[stored.form].shapes(size)[0]


def dtype_of(stored: Stored) -> np.dtype:
    """The dtype that is written."""
    return DTYPES[stored.dtype][0]


def write(stored: Stored, leaf: np.ndarray, size: Size) -> np.ndarray:
    """A leaf of one matrix as it stands in the file, contiguous."""
    dtype = dtype_of(stored)
    value = inverted(leaf) if stored.inverse else leaf
    out = np.ascontiguousarray(FORMS[stored.form].write(np.asarray(value), size)).reshape(shape_of(stored, size))
    return out.view(dtype) if out.dtype.itemsize == dtype.itemsize else out.astype(dtype)


def read(name: str, stored: Stored, found: np.ndarray, size: Size) -> np.ndarray:
    """The leaf of one matrix that a file's tensor holds.

    Raises:
        CheckpointError: dtype, shape or values are not what the table says.
    """
    form, allowed = FORMS[stored.form], DTYPES[stored.dtype]
    if found.dtype not in allowed:
        raise CheckpointError(f"{name}: found {found.dtype}, expected {' or '.join(map(str, allowed))}")
    if tuple(found.shape) not in form.shapes(size):
        expected = " or ".join(str(list(s)) for s in form.shapes(size))
        raise CheckpointError(
            f"{name}: found shape {list(found.shape)}, expected {expected} for a weight [{size.n}, {size.k}]"
        )
    if stored.leaf == SHAPE:
        if found.tolist() != [size.n, size.k]:
            raise CheckpointError(f"{name}: it says {found.tolist()}, the weight is [{size.n}, {size.k}]")
        return found
    if allowed[0].kind == "f" and allowed[0].itemsize == 4:
        found = found.astype(np.float32)
        if not (np.isfinite(found).all() and (found >= 0).all() and (stored.leaf == "scale" or (found > 0).all())):
            raise CheckpointError(f"{name}: a scale must be finite and positive; found {_extremes(found)}")
    elif stored.dtype == "float8_e4m3fn":
        found = found.view(np.uint8)
        _check_e4m3(name, stored, found)
    elif stored.dtype == "uint8" and stored.leaf == "scale" and bool((found == 0xFF).any()):
        raise CheckpointError(f"{name}: the block scales hold NaN")
    value = np.asarray(form.read(np.asarray(found), size))
    return inverted(value) if stored.inverse else value


def _check_e4m3(name: str, stored: Stored, bits: np.ndarray) -> None:
    if stored.leaf == "scale" and bits.size and int(bits.max()) >= 0x7F:
        raise CheckpointError(f"{name}: block scales must not be negative or NaN")
    if stored.leaf == "data" and bool(((bits & 0x7F) == 0x7F).any()):
        raise CheckpointError(f"{name}: the codes hold NaN")


def inverted(x: Any) -> np.ndarray:
    """1 / x, correctly rounded. Three times in a row it gives what once gives, so files written anew are the same."""
    return np.asarray(np.float32(1) / np.asarray(x, np.float32), np.float32)


def _extremes(x: np.ndarray) -> str:
    return f"values from {np.min(x)} to {np.max(x)}"
