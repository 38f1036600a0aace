"""Reading safetensors files one tensor at a time: the header is checked, the data is memory-mapped.

Format: 8 bytes little-endian header length, a JSON object of `name: {dtype, shape, data_offsets}`, then the
data (https://github.com/huggingface/safetensors#format). The headers come from strangers: every number in
them is checked against the file before it is used.
"""

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jqopt.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "C64": np.dtype(np.complex64),
}
PACKED = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Elements that are narrower than a byte, and their bits: they are read as the bytes they are packed in, uint8."""

# The limit of the reference implementation; a longer header is damage or an attack on memory.
MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its file, and its first byte counted from the start of that file.

    `shape` counts elements. `dtype` is what `read` gives: of elements narrower than a byte (`bits` 4 or 6) uint8, the
    bytes they are packed in along the last axis (F4: two a byte, as their writer ordered them).
    """

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    bits: int | None = None

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape of what `read` gives."""
        return self.shape if self.bits is None else (*self.shape[:-1], self.shape[-1] * self.bits // 8)

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored) * self.dtype.itemsize

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The tensor, or indices `start` to `stop` of its first axis: a read-only view of the mapped file.

        Pages are loaded when touched, and only those of the slice can be.
        """
        shape = self.stored
        if shape:
            first, last, _ = slice(start, stop).indices(shape[0])
            shape = (max(last - first, 0), *shape[1:])
            begin = self.offset + first * math.prod(shape[1:]) * self.dtype.itemsize
        else:
            begin = self.offset
        size = math.prod(shape) * self.dtype.itemsize
        if size == 0:
            return np.empty(shape, self.dtype)
        raw = np.memmap(self.file, np.uint8, "r", offset=begin, shape=(size,))
        # A view needs an aligned start, which the format recommends but does not promise.
        raw = raw if begin % self.dtype.itemsize == 0 else raw.copy()
        return raw.view(self.dtype).reshape(shape)


def open_folder(folder: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint folder by name: of `model.safetensors`, or of the shards its index names.

    Raises CheckpointError where there is neither, or where index and shards disagree.
    """
    if (folder / INDEX).is_file():
        return _open_shards(folder)
    if (folder / SINGLE).is_file():
        return open_file(folder / SINGLE)
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
    state = "it is not a folder" if found is None else f"it holds {', '.join(found[:12]) or 'nothing'}"
    raise CheckpointError(
        f"{folder}: found neither {SINGLE} nor {INDEX} ({state}). PyTorch .bin files are not read: save "
        "the model with transformers' save_pretrained(folder, safe_serialization=True)"
    )


def open_file(path: Path) -> dict[str, Entry]:
    """Every tensor of one file by name. Raises CheckpointError where the header and the file do not agree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{path}: not a safetensors file, or cut short: it announces a header of {length} bytes "
                f"and has {size} bytes in all"
            )
        header = _parse(path, file.read(length))
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length, size) for name, value in header.items()}
    _check_disjoint(path, entries.values())
    return entries


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise CheckpointError(f"{path}: its JSON cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: its JSON is a {type(value).__name__}; expected an object")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return table


def _entry(path: Path, name: str, value: Any, start: int, size: int) -> Entry:
    """The header's statement on one tensor, checked; the data begin at `start`, the file has `size` bytes."""
    value = value if isinstance(value, dict) else {}
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: {name}: shape {shape!r} or data_offsets {offsets!r} is not a list of sizes")
    if not isinstance(dtype, str) or dtype not in {**DTYPES, **PACKED}:
        known = ", ".join([*DTYPES, *PACKED])
        raise CheckpointError(f"{path}: {name}: dtype {dtype!r} is not read; known are {known}")
    bits = PACKED.get(dtype)
    if bits is not None and (not shape or shape[-1] * bits % 8):
        raise CheckpointError(f"{path}: {name}: {dtype}{shape}: the last axis does not fill whole bytes")
    entry = Entry(path, name, DTYPES["U8" if bits else dtype], tuple(shape), start + offsets[0], bits)
    if offsets[1] - offsets[0] != entry.nbytes or start + offsets[1] > size:
        raise CheckpointError(
            f"{path}: {name}: data_offsets {offsets} should span the {entry.nbytes} bytes of "
            f"{dtype}{shape} and end within the file's {size - start} data bytes; the file is damaged or "
            "cut short"
        )
    return entry


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_disjoint(path: Path, entries: Iterable[Entry]) -> None:
    ordered = sorted((entry for entry in entries if entry.nbytes), key=lambda entry: entry.offset)
    for before, after in itertools.pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise CheckpointError(f"{path}: the data of {before.name} and {after.name} overlap")


def _open_shards(folder: Path) -> dict[str, Entry]:
    index = folder / INDEX
    places = _parse(index, index.read_bytes()).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(f"{index}: 'weight_map' should map each tensor name to a file name")
    shards = {shard: _open_shard(index, shard) for shard in sorted(set(places.values()))}
    for name, shard in places.items():
        if name not in shards[shard]:
            raise CheckpointError(f"{index}: it places {name} in {shard}, which does not hold it")
    stray = sorted({name for entries in shards.values() for name in entries} - set(places))
    if stray:
        raise CheckpointError(f"{index}: the shards also hold {stray[0]}, which the index does not list")
    return {name: shards[shard][name] for name, shard in places.items()}


def _open_shard(index: Path, shard: str) -> dict[str, Entry]:
    # A name with a folder in it could point anywhere on the reader's disk.
    if Path(shard).name != shard or not (index.parent / shard).is_file():
        raise CheckpointError(f"{index}: it names the file {shard!r}, which is not in {index.parent}")
    return open_file(index.parent / shard)
