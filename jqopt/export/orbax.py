"""Checkpoints on disk: packed leaves, scales, plan and manifest, written with Orbax in one step."""

from __future__ import annotations

import difflib
import fnmatch
import pathlib
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jqopt import _plan
from jqopt._apply import is_qtensor
from jqopt.errors import CheckpointError, UnsupportedError
from jqopt.export import manifest as _manifest
from jqopt.export.checkpoint import METADATA, Checkpoint, PathLike, Shardings, context, local, prefix_of
from jqopt.export.inputs import inputs_of
from jqopt.export.manifest import Leaf, Manifest
from jqopt.export.tree import Parts, check_unique, describe, parts_of


def save(
    directory: PathLike,
    qm: Any,
    *,
    overwrite: bool = False,
    source: Mapping[str, Any] | None = None,
    files: Mapping[str, PathLike] | None = None,
) -> None:
    """Writes a quantized model: packed weights, scales, all other state, the plan and its recipe.

    The folder appears in one step when all is written: an interrupted save leaves what was there before. The weights
    are read twice, once for their sha256; beside them at most one leaf and what Orbax has in flight are in memory.

    Args:
        directory: a local folder that doesn't exist (or is empty).
        qm: what `quantize_model` or `load` returned.
        overwrite: replace the checkpoint that is there.
        source: JSON data on where the model came from, kept in the manifest as it is.
        files: files to keep in the checkpoint's folder, by their names in it (`"hf/config.json"`).

    Raises:
        CheckpointError: something is there already.
        UnsupportedError: a leaf that can't be stored (its name is in the message), or arrays of several processes.
    """
    target = local(directory)
    check_target(target, overwrite)
    kind, prefix = qm.plan.function.kind, prefix_of(qm.plan.function.kind)
    tree, leaves = describe(qm.params, prefix)
    paths = _paths(qm, prefix)
    stored = {parts: _manifest.arrays_of("/".join(parts), leaf) for parts, leaf in leaves.items()}
    scales = {k: {f: np.asarray(x) for f, x in found.items()} for k, found in qm.quant.attention.items()}
    stored |= {(*_manifest.attention_parts(k, f),): {"": x} for k, found in scales.items() for f, x in found.items()}
    check_unique(parts for parts, _ in _each(stored))
    manifest = Manifest(
        schema=_manifest.SCHEMA if scales else 1, writer=_manifest.writer(), kind=kind, model=qm.plan.function.name,
        plan=_plan.to_dict(qm.plan), tree=tree,
        tensors={"/".join(p): _manifest.tensor_of("/".join(p), x, paths[p]) for p, x in leaves.items()},
        leaves={"/".join(p): _leaf("/".join(p), x) for p, x in _each(stored)},
        attention={k: sorted(found) for k, found in scales.items()},
        inputs=inputs_of(getattr(qm, "inputs", None)), source=None if source is None else dict(source),
    )  # fmt: skip
    _write(target, _nested(_each(stored)), manifest.to_dict(), files or {})


def _paths(qm: Any, prefix: Parts) -> dict[Parts, str | None]:
    """The parameter path of each leaf, as recipes and plans spell it; None for other collections and state."""
    flat, _ = jax.tree_util.tree_flatten_with_path(qm.params, is_leaf=is_qtensor)
    return {(*prefix, *parts_of(key)): qm.plan.function.path_of(key) for key, _ in flat}


def _each(stored: Mapping[Parts, Mapping[str, Any]]) -> Iterable[tuple[Parts, Any]]:
    for parts, arrays in stored.items():
        for field, x in arrays.items():
            yield ((*parts, field) if field else parts), x


def _leaf(name: str, x: Any) -> Leaf:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        raise UnsupportedError(f"{name}: the array spans several processes; checkpoints are written by one process.")
    return Leaf(dtype=str(x.dtype), shape=list(x.shape), sha256=_manifest.digest(x), host=not isinstance(x, jax.Array))


def _nested(arrays: Iterable[tuple[Parts, Any]]) -> dict[str, Any]:
    """Nested dicts of what has bytes: Orbax refuses arrays without (the manifest alone holds those)."""
    root: dict[str, Any] = {}
    for parts, x in arrays:
        if x.size:
            node = root
            for part in parts[:-1]:
                node = node.setdefault(part, {})
            node[parts[-1]] = x
    return root


def check_target(directory: PathLike, overwrite: bool) -> None:
    """Whether `save` may write there.

    Raises:
        CheckpointError: something is there already.
    """
    target = local(directory)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / METADATA).is_file():
        raise CheckpointError(f"{target} is there already and is no checkpoint: it stays. Write to another folder.")
    if not overwrite:
        raise CheckpointError(
            f"{target} holds a checkpoint already; write overwrite=True (jqopt quantize: --overwrite) to replace it."
        )


def _write(
    target: pathlib.Path, arrays: dict[str, Any], manifest: dict[str, Any], files: Mapping[str, PathLike]
) -> None:
    """All of it beside the target, then one rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex[:8]
    fresh, old = (target.with_name(f"{target.name}.jqopt-{what}-{mark}") for what in ("new", "old"))
    try:
        with context(x.nbytes for x in jax.tree.leaves(arrays)):
            ocp.save(str(fresh), arrays, custom_metadata=manifest)
        for name, file in files.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, fresh / name)
        if (target / METADATA).exists():
            target.rename(old)
        fresh.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        for left in target.parent.glob(f"{target.name}.jqopt-new-{mark}*"):
            shutil.rmtree(left, ignore_errors=True)
        raise
    if old.exists():
        shutil.rmtree(old)


def load_params(
    directory: PathLike,
    *,
    only: str | Sequence[str] | None = None,
    shardings: Shardings = None,
    verify: bool = True,
) -> dict[str, Any]:
    """{parameter path: QTensor or array}, without a model; state that is no parameter under its whole name.

    Args:
        only: a glob over parameter paths (`*` crosses `/`), or several: only what matches is read from disk.
        shardings: see `jqopt.load`; a tree must be like the whole parameter tree.
        verify: compare each leaf with its sha256.

    Raises:
        CheckpointError: as `jqopt.load`; or a glob matches nothing.
    """
    checkpoint = Checkpoint(directory)
    paths = {name: checkpoint.manifest.path_of(name) for name in checkpoint.manifest.tensors}
    if len({*paths.values()}) < len(paths):
        raise UnsupportedError(f"{directory}: a parameter and other state have one name; load it with its model.")
    names = list(paths) if only is None else _matching([only] if isinstance(only, str) else only, paths)
    return {paths[name]: x for name, x in checkpoint.load(names, shardings, verify).items()}


def _matching(globs: Sequence[str], paths: Mapping[str, str]) -> list[str]:
    for glob in globs:
        if not any(fnmatch.fnmatchcase(path, glob) for path in paths.values()):
            near = difflib.get_close_matches(glob, paths.values(), n=3, cutoff=0.3) or list(paths.values())[:3]
            raise CheckpointError(
                f"only={glob!r} matches no parameter of the checkpoint; there are {', '.join(near)}, ..."
            )
    return [name for name, path in paths.items() if any(fnmatch.fnmatchcase(path, glob) for glob in globs)]
