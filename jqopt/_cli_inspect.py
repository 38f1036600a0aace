"""What is in a saved checkpoint: its tensors, its recipe, its origin, and which kernel each site would run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jqopt import _ops, _report
from jqopt._cli_models import source_of
from jqopt._ops import Weight
from jqopt._plan import Decision, describe
from jqopt._report import Report, size
from jqopt._table import table
from jqopt.export.checkpoint import Checkpoint
from jqopt.export.manifest import Manifest, tensor_from

INSTEAD = {
    "gather": "decodes the rows it looks up",
    "conv": "decodes the kernel, then convolves",
    "ragged_dot": "multiplies each expert's rows by its packed weight",
}
"""What runs at sites for which there is no table of kernels."""


def facts(checkpoint: Checkpoint, rows: Sequence[int], device: str | None = None) -> dict[str, Any]:
    """All there is to say, as JSON data.

    Args:
        rows: of the activation, for the choice of kernels: 1 is one token, more a batch or a prompt.
        device: "cpu", "gpu", "tpu", or "cuda:90" with a capability; default: this machine's.
    """
    manifest, plan = checkpoint.manifest, checkpoint.plan()
    source, device = source_of(checkpoint), device or _ops.here()
    report = stored_report(checkpoint)
    return {
        "directory": str(checkpoint.directory),
        "schema": manifest.version,
        "writer": manifest.writer,
        "model": {"kind": manifest.kind, "name": manifest.model},
        "source": manifest.source if source is None else source.model_dump(),
        "recipe": {"fingerprint": plan.recipe.fingerprint, **plan.recipe.to_dict()},
        "inputs": _inputs(checkpoint),
        "tensors": [_tensor(manifest, name, shape) for name, shape in checkpoint.shapes().items()],
        "bytes": {"before": report.bytes_before, "after": report.bytes_after},
        "bits_per_weight": report.bits_per_weight,
        "device": device,
        "sites": [_site(d, rows, device) for d in plan.decisions if d.weight is not None],
    }


def _inputs(checkpoint: Checkpoint) -> list[str]:
    call = checkpoint.call()
    if call is None:
        return []
    args, kwargs = call
    return [*map(_word, args), *(f"{name}={_word(x)}" for name, x in kwargs.items())]


def _word(x: Any) -> str:
    leaves = jax.tree.leaves(x)
    words = [f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "shape") else repr(leaf) for leaf in leaves]
    return words[0] if len(words) == 1 else f"({', '.join(words)})"


def _tensor(manifest: Manifest, name: str, shape: Any) -> dict[str, Any]:
    tensor = manifest.tensors[name]
    leaves = {field: manifest.leaves[leaf] for field, leaf in manifest.leaves_of(name).items()}
    packing = tensor.packing
    return {
        "name": manifest.path_of(name),
        "parameter": tensor.parameter is not None,
        "kind": tensor.kind,
        "format": None if packing is None else packing.format,
        "granularity": None if packing is None else packing.granularity,
        "block": None if packing is None else packing.block,
        "shape": list(shape.shape),
        "dtype": str(shape.dtype),
        "bytes": sum(leaf.size * _itemsize(leaf.dtype) for leaf in leaves.values()),
        "leaves": {field or "value": {"dtype": x.dtype, "shape": x.shape} for field, x in leaves.items()},
    }


def _itemsize(dtype: str) -> int:
    return np.dtype(dtype).itemsize


def _site(d: Decision, rows: Sequence[int], device: str) -> dict[str, Any]:
    assert d.layout is not None, d.key
    site = {
        "site": d.key, "op": d.op, "path": d.path, "weight": describe(d.weight), "input": describe(d.input),
        "matrices": math.prod(d.layout.atoms[i] for i in d.layout.stack), "n": d.layout.n, "k": d.layout.k,
    }  # fmt: skip
    if d.op in INSTEAD:
        return {**site, "runs": INSTEAD[d.op], "kernels": []}
    weight = Weight(d.format, d.granularity, d.layout.n, d.layout.k)
    return {**site, "runs": None, "kernels": [_kernel(weight, d, m, device) for m in rows]}


def _kernel(weight: Weight, d: Decision, m: int, device: str) -> dict[str, Any]:
    backend = d.backend or None
    try:
        name = _ops.chosen(weight, d.input_format, m, device, backend)
    except _ops.NoKernel:
        name = f"none: the recipe asks for {backend}, which cannot"
    others = [pair for pair in _ops.explain(weight, d.input_format, m, device, backend) if pair[0] != name]
    return {"rows": m, "kernel": name, "not": {kernel: why for kernel, why in others if why is not None}}


# ---------------------------------------------------------------------------------------------------- as text


def text(facts: Mapping[str, Any]) -> str:
    """`facts` for people."""
    return "\n\n".join((_head(facts), _tensors(facts), _kernels(facts)))


def _head(facts: Mapping[str, Any]) -> str:
    recipe, source, model = facts["recipe"], facts["source"], facts["model"]
    lines = [
        f"{facts['directory']}: schema {facts['schema']}, written by jqopt {facts['writer']}",
        f"model: {model['name']} ({model['kind']})"
        + (f", from {source['name']}" if source and "name" in source else ""),
        f"recipe: {recipe['name']}, {len(recipe['rules'])} rules, sha256 {recipe['fingerprint'][:12]}",
        f"traced with: {', '.join(facts['inputs']) or 'unknown'}",
    ]
    if source and source.get("calibration"):
        lines.append(f"calibrated with: {source['calibration']}")
    return "\n".join(lines)


def _tensors(facts: Mapping[str, Any]) -> str:
    rows = []
    for t in facts["tensors"]:
        block = "x".join(map(str, t["block"])) if isinstance(t["block"], list) else t["block"]
        scales = block if t["granularity"] == "block" else t["granularity"]
        stored = f"{t['format']}/{scales}" if t["format"] else ("" if t["parameter"] else "state")
        rows.append((t["name"], "x".join(map(str, t["shape"])), t["dtype"], stored, size(t["bytes"])))
    before, after = facts["bytes"]["before"], facts["bytes"]["after"]
    total = (
        f"{size(after)} of parameters ({size(before)} before), {facts['bits_per_weight']:.2f} bits per packed weight"
    )
    return table(("tensor", "shape", "dtype", "packed", "bytes"), rows) + f"\n{total}"


def _kernels(facts: Mapping[str, Any]) -> str:
    """Sites that run the same kernels in one row, and below it why the others don't."""
    groups: dict[tuple, list[str]] = {}
    for site in facts["sites"]:
        runs = site["runs"] or ", ".join(f"{k['kernel']} ({_rows(k['rows'])})" for k in site["kernels"])
        what = f"({site['op']}, {site['weight']} x {site['input']}): {runs}"
        groups.setdefault((what, *_refusals(site["kernels"])), []).append(site["site"])
    lines = [f"kernels on {facts['device']}:"]
    for (what, *refusals), sites in groups.items():
        more = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
        lines += [f"  {sites[0]}{more} {what}", *(f"    not {text}" for text in refusals)]
    return "\n".join(lines)


def _refusals(kernels: list[dict]) -> list[str]:
    """Each kernel's reason why not; with the rows it is for, where these matter."""
    found: dict[tuple[str, str], list[int]] = {}
    for kernel in kernels:
        for name, why in kernel["not"].items():
            found.setdefault((name, why), []).append(kernel["rows"])
    every = [kernel["rows"] for kernel in kernels]
    at = {key: "" if rows == every else f" at {', '.join(map(_rows, rows))}" for key, rows in found.items()}
    return [f"{name}{at[name, why]}: {why}" for name, why in found]


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


# ---------------------------------------------------------------------------------------------------- reports


def stored_report(checkpoint: Checkpoint, floats: Mapping[str, Any] | None = None) -> Report:
    """The report of a checkpoint's packed weights: sizes only, or errors too where the float parameters are given.

    Without floats nothing is read but the manifest; with them, every packed weight.
    """
    plan = checkpoint.plan()
    names = [n for n, t in checkpoint.manifest.tensors.items() if t.parameter in plan.parameters]
    leaves = checkpoint.load(names) if floats else {name: _abstract(checkpoint, name) for name in names}
    by_path = {checkpoint.manifest.path_of(name): leaf for name, leaf in leaves.items()}
    return _report.report_leaves(plan, by_path, floats or {})


def _abstract(checkpoint: Checkpoint, name: str) -> Any:
    """A tensor of shapes in place of arrays."""
    manifest = checkpoint.manifest
    leaves = {field: manifest.leaves[leaf] for field, leaf in manifest.leaves_of(name).items()}
    shapes = {f: jax.ShapeDtypeStruct(tuple(x.shape), np.dtype(x.dtype)) for f, x in leaves.items()}
    return tensor_from(name, manifest.tensors[name], shapes)
