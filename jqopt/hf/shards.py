"""Writing safetensors: shards of a given size, tensors in any order, and a journal by which a cut write goes on."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jqopt.errors import CheckpointError
from jqopt.hf.safetensors import DTYPES, INDEX, SINGLE, open_file

JOURNAL = "jqopt.json"
"""Beside the shards: which tensors are there, and the sha256 of each. Engines don't look at it; `load_hf` does."""

SCHEMA = 1
WORDS = {dtype: word for word, dtype in DTYPES.items()}


class Slot(NamedTuple):
    """One tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Shard(NamedTuple):
    """One file: its header, and where each tensor begins."""

    file: str
    header: bytes
    slots: tuple[Slot, ...]
    offsets: Mapping[str, int]


def lay_out(slots: Iterable[Slot], most: int) -> tuple[Shard, ...]:
    """Shards of at most `most` bytes of data (a larger tensor stands alone), filled in the order given."""
    parts: list[list[Slot]] = [[]]
    size = 0
    for slot in slots:
        if parts[-1] and size + slot.nbytes > most:
            parts.append([])
            size = 0
        parts[-1].append(slot)
        size += slot.nbytes
    if len(parts) == 1:
        return (_shard(SINGLE, parts[0]),)
    count = len(parts)
    return tuple(_shard(f"model-{i:05}-of-{count:05}.safetensors", part) for i, part in enumerate(parts, 1))


def _shard(file: str, slots: Sequence[Slot]) -> Shard:
    # Wide dtypes first: readers view the bytes in place, which needs every tensor aligned to its own size.
    ordered = sorted(slots, key=lambda slot: -slot.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    starts, at = {}, 0
    for slot in ordered:
        starts[slot.name] = at
        header[slot.name] = {
            "dtype": WORDS[slot.dtype], "shape": list(slot.shape), "data_offsets": [at, at + slot.nbytes],
        }  # fmt: skip
        at += slot.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    whole = len(text).to_bytes(8, "little") + text
    return Shard(file, whole, tuple(ordered), {name: len(whole) + start for name, start in starts.items()})


def index_of(shards: Sequence[Shard]) -> dict[str, Any] | None:
    """The index file's content; None for a single file."""
    if len(shards) == 1:
        return None
    places = {slot.name: shard.file for shard in shards for slot in shard.slots}
    total = sum(slot.nbytes for shard in shards for slot in shard.slots)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


class Writer:
    """Writes the tensors of shards into a folder, in any order.

    `digests` of finished shards are in the journal as soon as they are; `continued` names the tensors that an earlier,
    interrupted write of the same has finished.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], about: Mapping[str, Any], fingerprint: str):
        """`about`: what the journal says besides. `fingerprint`: of the values; another's write isn't continued.

        Raises:
            CheckpointError: the folder holds an unfinished write of something else.
        """
        self.folder, self.shards = folder, tuple(shards)
        headers = hashlib.sha256(b"".join(s.header for s in self.shards)).hexdigest()
        self.about = {"schema": SCHEMA, **about}
        self.unfinished = {"values": fingerprint, "headers": headers}
        self.digests: dict[str, str] = {}
        self._shard_of = {slot.name: shard for shard in self.shards for slot in shard.slots}
        self._slots = {slot.name: slot for shard in self.shards for slot in shard.slots}
        self._open: dict[str, BinaryIO] = {}
        self._left = {shard.file: len(shard.slots) for shard in self.shards}
        self._new: dict[str, dict[str, str]] = {shard.file: {} for shard in self.shards}
        self.continued = self._continue()

    def _continue(self) -> frozenset[str]:
        before = read_journal(self.folder)
        if before is None:
            return frozenset()
        if {k: v for k, v in before.items() if k != "tensors"} != self.about | self.unfinished:
            raise CheckpointError(
                f"{self.folder}: it holds an unfinished export of another model, or with other options; write "
                "overwrite=True (--overwrite) to begin anew"
            )
        for shard in self.shards:
            found = {slot.name: before["tensors"].get(slot.name) for slot in shard.slots}
            if all(found.values()) and _intact(self.folder / shard.file, shard, found):
                self.digests.update(found)
                self._left[shard.file] = 0
        self._note()
        return frozenset(self.digests)

    def write(self, name: str, value: np.ndarray | Iterable[np.ndarray]) -> None:
        """One tensor, once: whole, or in pieces that follow each other. Its shard is closed with its last tensor."""
        slot, shard = self._slots[name], self._shard_of[name]
        file, seen, written = self._file(shard), hashlib.sha256(), 0
        file.seek(shard.offsets[name])
        for piece in (value,) if isinstance(value, np.ndarray) else value:
            assert piece.dtype == slot.dtype, (name, piece.dtype, slot)
            data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
            file.write(data)
            seen.update(data)
            written += len(data)
        assert written == slot.nbytes, (name, written, slot)
        self._new[shard.file][name] = seen.hexdigest()
        self._left[shard.file] -= 1
        if self._left[shard.file] == 0:
            self._finish(shard)

    def _file(self, shard: Shard) -> BinaryIO:
        if shard.file not in self._open:
            file = self._open[shard.file] = (self.folder / shard.file).open("wb")
            file.write(shard.header)
            file.truncate(len(shard.header) + sum(slot.nbytes for slot in shard.slots))
        return self._open[shard.file]

    def _finish(self, shard: Shard) -> None:
        file = self._open.pop(shard.file)
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self.digests.update(self._new[shard.file])
        self._note()

    def _note(self, finished: bool = False) -> None:
        fresh, about = self.folder / f"{JOURNAL}.new", self.about if finished else self.about | self.unfinished
        fresh.write_text(json.dumps({**about, "tensors": dict(sorted(self.digests.items()))}, indent=1) + "\n")
        fresh.replace(self.folder / JOURNAL)

    def close(self) -> None:
        """Closes files that are still open (after an error)."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def finish(self) -> None:
        """The index and the journal, when every tensor is written."""
        waiting = [file for file, left in self._left.items() if left]
        assert not waiting, waiting
        for shard in self.shards:
            if not shard.slots and not (self.folder / shard.file).is_file():
                (self.folder / shard.file).write_bytes(shard.header)
        index = index_of(self.shards)
        if index is not None:
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        self._note(finished=True)


def _intact(path: Path, shard: Shard, digests: Mapping[str, str | None]) -> bool:
    """Has a shard that the journal calls finished the header and the bytes it should have?"""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        if file.read(len(shard.header)) != shard.header:
            return False
    try:
        entries = open_file(path)
    except CheckpointError:
        return False
    return all(digest(entries[name].read()) == found for name, found in digests.items())


def digest(value: np.ndarray) -> str:
    """sha256 of a tensor's bytes, as the journal has it."""
    return hashlib.sha256(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data).hexdigest()


def read_journal(folder: Path) -> dict[str, Any] | None:
    """The journal of a folder, or None where there is none.

    Raises:
        CheckpointError: it is damaged, or of a newer version.
    """
    path = folder / JOURNAL
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its JSON cannot be read: {error}") from None
    tensors = found.get("tensors") if isinstance(found, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(x, str) for x in tensors.values()):
        raise CheckpointError(f"{path}: expected an object with `tensors`, the sha256 of each")
    if found.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}: it has schema {found.get('schema')!r}; this jqopt reads {SCHEMA}")
    return found
