"""Packed checkpoints that serving engines load, made by us or by others: their tensors, checked, as QTensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jqopt import formats
from jqopt._plan import Decision
from jqopt._qtensor import QTensor
from jqopt._recipe import TensorSpec
from jqopt.errors import CheckpointError, UnsupportedError
from jqopt.export import compressed_tensors, layouts, modelopt, schemes
from jqopt.export.layouts import SHAPE, Size, Stored
from jqopt.export.schemes import Config, Found, Target
from jqopt.hf.families import Place
from jqopt.hf.folder import CONFIG, Identity, identity, read_json, stack_of
from jqopt.hf.safetensors import Entry, open_folder
from jqopt.hf.shards import JOURNAL, digest, read_journal

TARGETS: dict[str, Target] = {t.name: t for t in (compressed_tensors.TARGET, modelopt.TARGET)}
WEIGHT = ".weight"
LARGEST = 448.0 * 6.0
"""No weight of a model is larger; a scale that would allow one is a reciprocal, or damage."""


class Folder(NamedTuple):
    """An opened folder: which model, in which format, its configuration and its tensors."""

    model: Identity
    target: Target
    config: Config
    entries: Mapping[str, Entry]


def open_packed(folder: str | Path, verify: bool = True) -> Folder:
    """Opens a folder whose config.json says that its weights are packed.

    Args:
        verify: compare each tensor with its sha256, where the folder has them (exports of jqopt do).

    Raises:
        CheckpointError: it isn't one, or is damaged.
        UnsupportedError: a format, scheme or family that jqopt doesn't read.
    """
    model = identity(folder)
    quantization, files = model.quantization, {}
    beside = model.folder / modelopt.FILE
    if beside.is_file():
        files[modelopt.FILE] = read_json(beside)
        quantization = quantization or {"quant_method": modelopt.METHOD}
    if not quantization:
        raise CheckpointError(
            f"{folder}/{CONFIG} has no quantization_config: its weights aren't packed. Read it with "
            "jqopt.hf.load_model, and quantize it with jqopt.quantize_model."
        )
    method = quantization.get("quant_method")
    if method not in TARGETS:
        raise UnsupportedError(f"{folder}/{CONFIG}: quant_method {method!r} is not read; read are {', '.join(TARGETS)}")
    target = TARGETS[method]
    entries = open_folder(model.folder)
    if verify:
        _verify(model.folder, entries)
    return Folder(model, target, target.parse(quantization, files), entries)


def _verify(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Compares the tensors with the sha256 that jqopt wrote beside them."""
    journal = read_journal(folder)
    if journal is None:
        return
    digests = journal["tensors"]
    for name in sorted(set(digests) ^ set(entries)):
        where = "missing from the files" if name in digests else f"not in {JOURNAL}"
        raise CheckpointError(f"{folder}: {name} is {where}: the folder was changed after it was exported")
    for name, expected in digests.items():
        if digest(entries[name].read()) != expected:
            raise CheckpointError(
                f"{folder}: {name}: its bytes aren't those that were exported (sha256): the file is damaged or was "
                f"rewritten. If that was meant, delete {JOURNAL}, or write verify=False."
            )


class Weight(NamedTuple):
    """One packed parameter: where it comes from, its scheme, sizes of a matrix, and the tensors it has."""

    place: Place
    found: Found
    size: Size
    stored: tuple[Stored, ...]

    @property
    def spec(self) -> TensorSpec:
        return schemes.blocked(self.found.row, self.found.block)

    def name(self, number: int, stored: Stored) -> str:
        return f"{self.place.tensors[number].removesuffix(WEIGHT)}.{stored.suffix}"


def weights_of(folder: Folder, places: Sequence[Place], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Weight]:
    """The packed parameters by path; every tensor of the folder is accounted for.

    Raises:
        CheckpointError: a tensor is missing or unexpected, or layers that share scales have different ones.
    """
    out: dict[str, Weight] = {}
    used: set[str] = set()
    for place in places:
        found = _scheme(folder, place)
        if found is None:
            used |= set(place.tensors)
            continue
        out[place.path] = weight = _weight(folder, place, found, shapes[place.path])
        used |= {weight.name(i, s) for i in range(len(place.tensors)) for s in weight.stored}
    used |= {name for names in cache_names(folder, places).values() for name in names}
    _check_names(folder, used)
    _check_fused(folder, out.values())
    return out


def _scheme(folder: Folder, place: Place) -> Found | None:
    """What the configuration says of a parameter: of all its layers the same."""
    if not place.transpose or not place.tensors[0].endswith(WEIGHT):
        return None
    said = {name: folder.config.of(name.removesuffix(WEIGHT)) for name in place.tensors}
    kinds = {None if f is None else (f.row.name, f.block): f for f in said.values()}
    if len(kinds) > 1:
        names = [str(k if k is None else k[0]) for k in kinds]
        raise UnsupportedError(
            f"{folder.model.folder}: {place.path}: its layers have different schemes ({', '.join(names)}) and can't be "
            "one stacked parameter; load with scan_layers=False"
        )
    return next(iter(kinds.values()))


def _weight(folder: Folder, place: Place, found: Found, shape: tuple[int, ...]) -> Weight:
    k, n = shape[-2:]
    spec = schemes.blocked(found.row, found.block)
    size = schemes.size_of(place.path, found.row, spec.element_format(), spec.granularity or "", n, k)
    whole = Weight(place, found, size, found.row.tensors)
    has = []
    for stored in found.row.tensors:
        there = [whole.name(i, stored) in folder.entries for i in range(len(place.tensors))]
        if all(there) or not (stored.optional or any(there)):
            has.append(stored)
        elif any(there):
            raise CheckpointError(
                f"{folder.model.folder}: {whole.name(there.index(False), stored)} is missing, which other layers have"
                + ("; load with scan_layers=False" if stored.optional else "")
            )
    return whole._replace(stored=tuple(has))


def _check_names(folder: Folder, used: set[str]) -> None:
    model = folder.model
    copies = model.family.copies(model.parsed)
    missing = sorted(used - set(folder.entries))
    extra = sorted(
        n
        for n in set(folder.entries) - used - set(copies)
        if not (model.family.derived and n.endswith(model.family.derived))
    )
    for names, fault in ((missing, "missing"), (extra, "unexpected")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{model.folder}: tensor {names[0]}{more} {fault}: the files don't fit what {CONFIG} says "
                f"({folder.target.name}; {len(used)} tensors expected, {len(folder.entries)} found)"
            )
    for copy, original in copies.items():
        if copy in folder.entries and not np.array_equal(folder.entries[copy].read(), folder.entries[original].read()):
            raise CheckpointError(f"{model.folder}: {copy} differs from {original}, which {CONFIG} says is the same")


def _check_fused(folder: Folder, weights: Iterable[Weight]) -> None:
    """Layers that read one input in one product must share its scales and the global scale."""
    at = {name.removesuffix(WEIGHT): (w, i) for w in weights for i, name in enumerate(w.place.tensors)}
    for names in schemes.fused(list(at)):
        first, number = at[names[0]]
        for stored in first.stored:
            if not stored.shared or stored.leaf == "scale":
                continue
            for other in (at[name] for name in names[1:]):
                mine, theirs = first.name(number, stored), other[0].name(other[1], stored)
                if (
                    theirs in folder.entries
                    and mine in folder.entries
                    and not np.array_equal(folder.entries[mine].read(), folder.entries[theirs].read())
                ):
                    raise CheckpointError(
                        f"{folder.model.folder}: {mine} and {theirs} differ, but {' and '.join(names)} are run as one "
                        "product with one such scale; the exporter must unify them"
                    )


# ---------------------------------------------------------------------------------------------------- reading


def read_weight(folder: Folder, weight: Weight, decision: Decision, dtype: Any) -> QTensor:
    """The QTensor of a parameter, tensor by tensor.

    Raises:
        CheckpointError: a tensor has another dtype or shape, or values that can't be.
    """
    spec, layout = weight.spec, decision.layout
    assert layout is not None
    stack = stack_of(weight.place)
    leaves = {s.leaf: _stacked(folder, weight, s) for s in weight.stored}
    leaves.pop(SHAPE, None)  # it has been compared
    _check_bound(folder, weight, leaves, spec.element_format())
    if "input_scale" in leaves:
        leaves["input_scale"] = _shared_by_inner(folder, weight, leaves["input_scale"], stack, len(decision.outer))
    shaped = {f: x if f == "input_scale" else x.reshape((*stack, *x.shape[1:])) for f, x in leaves.items()}
    has = {f: jnp.asarray(x) for f, x in shaped.items()}
    return QTensor(
        has["data"], has["scale"], has.get("global_scale"), has.get("zero_point"), has.get("input_scale"),
        has.get("pre_scale"), decision.format, decision.granularity, layout, np.dtype(dtype).name,
    )  # fmt: skip


def _stacked(folder: Folder, weight: Weight, stored: Stored) -> np.ndarray:
    """[tensors, ...]: a leaf of each matrix."""
    filled: np.ndarray | None = None
    for i in range(len(weight.place.tensors)):
        name = weight.name(i, stored)
        one = layouts.read(f"{folder.model.folder}: {name}", stored, folder.entries[name].read(), weight.size)
        if filled is None:
            filled = np.empty((len(weight.place.tensors), *one.shape), one.dtype)
        filled[i] = one
    assert filled is not None
    return filled


def _shared_by_inner(
    folder: Folder, weight: Weight, scale: np.ndarray, stack: tuple[int, ...], outer: int
) -> np.ndarray:
    """[tensors] -> [*outer]: experts read one activation, and have one scale for it."""
    rows = scale.reshape((*stack[:outer], -1))
    if not (rows == rows[..., :1]).all():
        raise UnsupportedError(
            f"{folder.model.folder}: {weight.place.path}: its matrices read one input, but have different input "
            "scales; jqopt holds one for each input"
        )
    return rows[..., 0]


def _decoded(scale: np.ndarray, format: formats.Format) -> np.ndarray:
    """Stored scales as float32, without a device."""
    dtypes = {"e4m3": ml_dtypes.float8_e4m3fn, "e8m0": ml_dtypes.float8_e8m0fnu}
    return scale.view(dtypes[format.scale.name]).astype(np.float32) if format.scale.name in dtypes else scale


def _check_bound(folder: Folder, weight: Weight, leaves: Mapping[str, np.ndarray], format: formats.Format) -> None:
    """The largest number that codes and scales allow must be one that weights can be."""
    scale = _decoded(leaves["scale"], format)
    largest = scale.reshape(scale.shape[0], -1).max(axis=1) * np.float32(format.element.max)
    if "global_scale" in leaves and format.then is None:
        largest = largest * leaves["global_scale"]
    if (worst := float(largest.max())) > LARGEST:
        name = weight.place.tensors[int(largest.argmax())]
        what = next((s.suffix for s in weight.stored if s.leaf == "global_scale"), "weight_scale")
        raise CheckpointError(
            f"{folder.model.folder}: {name}: with its {what} weights would be as large as {worst:.3g}; is it the "
            "reciprocal of what it should be? (compressed-tensors divides by weight_global_scale, ModelOpt multiplies)"
        )


def read_floats(folder: Folder, place: Place, shape: tuple[int, ...], dtype: Any) -> Any:
    """A parameter that isn't packed, filled tensor by tensor.

    Raises:
        CheckpointError: a tensor has another shape, or isn't in floats.
    """
    stack = stack_of(place)
    filled = np.empty(shape, jnp.dtype(dtype))
    parts = filled.reshape(len(place.tensors), *shape[len(stack) :])
    for part, tensor in zip(parts, place.tensors, strict=True):
        entry = folder.entries[tensor]
        expected = (*part.shape[:-2], part.shape[-1], part.shape[-2]) if place.transpose else part.shape
        if entry.shape != expected or not jnp.issubdtype(entry.dtype, jnp.floating) or entry.dtype.itemsize < 2:
            raise CheckpointError(
                f"{folder.model.folder}: {tensor}: found {entry.dtype}{list(entry.shape)}; {CONFIG} says that it isn't "
                f"packed and has shape {list(expected)}"
            )
        found = entry.read()
        part[...] = np.swapaxes(found, -1, -2) if place.transpose else found
    return jnp.asarray(filled)


# ------------------------------------------------------------------------------------------------------ cache


def cache_names(folder: Folder, places: Sequence[Place]) -> dict[tuple[str, str], tuple[str, ...]]:
    """{(path of the attention, "k_scale" or "v_scale"): tensors, one a layer}; {} without a quantized cache."""
    out: dict[tuple[str, str], tuple[str, ...]] = {}
    end = f".k_proj{WEIGHT}"
    for place in places if folder.config.kv else ():
        if place.tensors[0].endswith(end):
            key = place.path.rsplit("/k_proj", 1)[0]
            for part in "kv":
                names = tuple(folder.target.kv_name(t.removesuffix(end), part) for t in place.tensors)
                out[key, f"{part}_scale"] = names
    return out


def read_cache(folder: Folder, places: Sequence[Place]) -> dict[str, dict[str, Any]]:
    """{attention: {"k_scale": [*layers], ...}}, float32."""
    out: dict[str, dict[str, Any]] = {}
    stacks = {p.path.rsplit("/k_proj", 1)[0]: stack_of(p) for p in places}
    size, stored = Size(1, 1, 1, 1, 8, True), folder.target.kv
    for (key, leaf), names in cache_names(folder, places).items():
        found = [layouts.read(f"{folder.model.folder}: {n}", stored, folder.entries[n].read(), size) for n in names]
        factor = np.float32(folder.target.kv_factors[folder.config.kv or ""])
        values = np.asarray(found, np.float32).reshape(stacks[key]) / factor
        out.setdefault(key, {})[leaf] = jnp.asarray(values, jnp.float32)
    return out


def recipe_of(folder: Folder, weights: Mapping[str, Weight]) -> dict[str, Any]:
    """The recipe under which a plan says of each parameter what the folder says."""
    rules: dict[str, dict[str, Any]] = {}
    for path, weight in weights.items():
        rule: dict[str, Any] = {"weight": weight.spec.to_dict()}
        if weight.found.row.input is not None:
            rule["input"] = weight.found.row.input.to_dict()
        known = rules.setdefault(json.dumps(rule, sort_keys=True), {"match": {"path": []}, **rule})
        known["match"]["path"].append(path)
    made: dict[str, Any] = {"schema": 1, "name": f"{folder.target.name} of {folder.model.folder.name}"}
    made["rules"] = list(rules.values())
    if folder.config.kv:
        made["kv_cache"] = {"format": folder.config.kv.lower(), "scaling": "static"}
    return made
