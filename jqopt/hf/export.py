"""Quantized models to Hugging Face folders that serving engines load: one writer for every target's table."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jqopt.errors import CheckpointError
from jqopt.export import layouts, schemes
from jqopt.export.layouts import SHAPE, Size, Stored
from jqopt.export.manifest import writer
from jqopt.export.parameters import Parameters
from jqopt.export.schemes import Target
from jqopt.hf import folder as _folder
from jqopt.hf.export_job import Job, Part, Scale, by_tensor, make_job
from jqopt.hf.folder import Identity
from jqopt.hf.mapped import LastRead, shape_of
from jqopt.hf.names import NameMap
from jqopt.hf.shards import JOURNAL, Slot, Writer, lay_out

PIECE = 1 << 24
"""Bytes of an unquantized tensor that are cast and turned at once."""


class Exported(NamedTuple):
    """What was written. `notes`: what a reader should know, such as casts; `print` it."""

    directory: Path
    target: str
    schemes: dict[str, int]
    tensors: int
    nbytes: int
    files: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        held = ", ".join(f"{count} x {name}" for name, count in self.schemes.items())
        head = f"{self.directory}: {self.target}, {held}; {self.tensors} tensors, {self.nbytes / 1e6:.4g} MB"
        return "\n".join([head, *(f"note: {n}" for n in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {**self._asdict(), "directory": str(self.directory)}


def export_folder(
    params: Parameters,
    model: Identity,
    target: Target,
    directory: str | Path,
    *,
    names: NameMap | None = None,
    engine: str | None = None,
    dtype: Any = None,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    resume: bool = False,
) -> Exported:
    """Writes a folder that engines load; it appears in one step when all of it is there.

    Raises:
        UnsupportedError: something the target can't hold, or an engine that doesn't load it.
        CheckpointError: something is there already.
    """
    schemes.check_engine(engine)
    params = params if names is None else LastRead(params, names)
    job = make_job(params, model, target, engine, dtype, names)
    shards = lay_out(_slots(job, target), max_shard_size)
    out = Path(directory).absolute()
    fresh = _begin(out, overwrite, resume)
    files = Writer(fresh, shards, {"writer": writer(), "target": target.name}, params.fingerprint())
    try:
        for part in job.parts:
            _write(files, params, part, job.dtype)
        for scale in job.scales:
            _write_scale(files, params, scale, target, job.factor)
        files.finish()
    finally:
        files.close()
    _finish(fresh, out, model, job)
    slots = [slot for shard in shards for slot in shard.slots]
    counts: dict[str, int] = {}
    for part in job.parts:
        if part.row is not None:
            counts[part.row.name] = counts.get(part.row.name, 0) + len(part.place.tensors)
    written = tuple(sorted(path.name for path in out.iterdir()))
    return Exported(out, target.name, counts, len(slots), sum(s.nbytes for s in slots), written, job.notes)


# ---------------------------------------------------------------------------------------------------- writing


def _slots(job: Job, target: Target) -> Iterator[Slot]:
    for part in job.parts:
        for i, name in enumerate(part.place.tensors):
            if part.row is None:
                yield Slot(name, job.dtype, shape_of(part.place, part.parameter, part.cut))
            else:
                yield from (Slot(*entry) for entry in _stored(part, part.modules[i]))
    for scale in job.scales:
        shape = layouts.shape_of(target.kv, Size(1, 1, 1, 1, 8, True))
        yield from (Slot(name, layouts.dtype_of(target.kv), shape) for name in scale.names)


def _stored(part: Part, module: str) -> Iterator[tuple[str, np.dtype, tuple[int, ...]]]:
    assert part.row is not None and part.size is not None
    for stored in part.row.tensors:
        if stored.leaf == SHAPE or stored.leaf in part.packed.leaves:
            yield f"{module}.{stored.suffix}", layouts.dtype_of(stored), layouts.shape_of(stored, part.size)


def _write(files: Writer, params: Parameters, part: Part, dtype: np.dtype) -> None:
    """All tensors of one parameter, array after array, so that only one is held."""
    if part.row is None:
        _write_floats(files, params, part, dtype)
        return
    for stored in part.row.tensors:
        if stored.leaf == SHAPE or stored.leaf in part.packed.leaves:
            _write_leaf(files, params, part, stored)


def _write_floats(files: Writer, params: Parameters, part: Part, dtype: np.dtype) -> None:
    if all(name in files.continued for name in part.place.tensors):
        return
    x = params.read(part.place.path)
    if part.cut is not None:
        files.write(part.cut.piece.tensor, _pieces(part.cut.floats(x), dtype))
        return
    whole = x.reshape((len(part.place.tensors), *x.shape[len(_folder.stack_of(part.place)) :]))
    for name, one in zip(part.place.tensors, whole, strict=True):
        if name not in files.continued:
            files.write(name, _pieces(np.swapaxes(one, -1, -2) if part.place.transpose else one, dtype))


def _pieces(x: np.ndarray, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The array in another dtype, a few rows at a time, so that no second one of its size is held."""
    rows = x if x.ndim > 1 else x.reshape(1, -1)
    step = max(1, PIECE * len(rows) // max(rows.nbytes, 1))
    for start in range(0, len(rows), step):
        yield np.ascontiguousarray(rows[start : start + step], dtype)


def _write_leaf(files: Writer, params: Parameters, part: Part, stored: Stored) -> None:
    assert part.size is not None
    names = [f"{module}.{stored.suffix}" for module in part.modules]
    if all(name in files.continued for name in names):
        return
    if stored.leaf == SHAPE:
        values = np.zeros((len(names), 0))
    else:
        values = by_tensor(part, params.read(part.place.path, stored.leaf), stored.leaf)
    for name, one in zip(names, values, strict=True):
        if name not in files.continued:
            files.write(name, layouts.write(stored, one, part.size))


def _write_scale(files: Writer, params: Parameters, scale: Scale, target: Target, factor: float) -> None:
    found = np.asarray(params.attention[scale.key][scale.leaf], np.float32) * np.float32(factor)
    flat = np.broadcast_to(found.reshape(-1), (len(scale.names),))
    for name, one in zip(scale.names, flat, strict=True):
        if name not in files.continued:
            files.write(name, layouts.write(target.kv, one, Size(1, 1, 1, 1, 8, True)))


# ------------------------------------------------------------------------------------------------- the folder


def _begin(out: Path, overwrite: bool, resume: bool) -> Path:
    """The folder beside the target that is written first.

    Raises:
        CheckpointError: something is there already.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not (out / JOURNAL).is_file():
            raise CheckpointError(
                f"{out} is there already and is no export of jqopt: it stays. Write to another folder."
            )
        if not overwrite:
            raise CheckpointError(f"{out} holds an export already; write overwrite=True (--overwrite) to replace it.")
    fresh = out.with_name(f"{out.name}.jqopt-export")
    if fresh.exists() and not resume:
        if not overwrite:
            raise CheckpointError(
                f"{fresh} is left of an export that was cut; write resume=True (--resume) to go on, or overwrite=True "
                "(--overwrite) to begin anew."
            )
        shutil.rmtree(fresh)
    fresh.mkdir(parents=True, exist_ok=True)
    return fresh


def _finish(fresh: Path, out: Path, model: Identity, job: Job) -> None:
    """The files beside the weights, then one rename."""
    for name, file in model.carried().items():
        shutil.copyfile(file, fresh / name)
    for name, data in {_folder.CONFIG: job.config, **job.files}.items():
        (fresh / name).write_text(json.dumps(data, indent=2) + "\n")
    old = out.with_name(f"{out.name}.jqopt-old-{uuid.uuid4().hex[:8]}")
    if out.exists():
        out.rename(old)
    try:
        fresh.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    if old.exists():
        shutil.rmtree(old)
