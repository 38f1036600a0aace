"""`jqopt export --target stablehlo`, and `jqopt serve-check`: does an exported folder load, and run?"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jqopt
from jqopt import artifacts
from jqopt._cli_models import model_of
from jqopt._cli_print import Shown
from jqopt.errors import CheckpointError, UnsupportedError
from jqopt.export import artifact, stablehlo
from jqopt.export.checkpoint import Checkpoint
from jqopt.hf.folder import CONFIG

SIZES = {"batch": 2, "length": 16}
"""Of the batch that is tried, as far as the bounds allow."""


def export(checkpoint: Path, out: Path, target: str, model: str | None, options: Mapping[str, Any]) -> Any:
    """An export of a checkpoint; for a program its model is loaded."""
    if target != stablehlo.NAME:
        return jqopt.export(checkpoint, out, target, **options)
    loaded = model_of(Checkpoint(checkpoint), model)
    return jqopt.export(jqopt.load(checkpoint, loaded.model), out, target, **options)


def serve_check(folder: Path, asked: Mapping[str, int]) -> Shown:
    """Loads a folder and runs one batch of random tokens; failed where what comes out isn't finite.

    Raises:
        CheckpointError: it is no export, or damaged.
        UnsupportedError: no program for this platform, or sizes out of bounds.
    """
    if (folder / artifact.FILE).is_file():
        kind, run, inputs = _artifact(folder, asked)
    elif (folder / CONFIG).is_file():
        kind, run, inputs = _folder(folder, asked)
    else:
        raise CheckpointError(f"{folder}: found neither {artifact.FILE} (stablehlo) nor {CONFIG} (Hugging Face)")
    start = time.perf_counter()
    leaves = [np.asarray(x) for x in jax.tree.leaves(run(*inputs))]
    seconds = time.perf_counter() - start
    finite = all(bool(np.isfinite(x.astype(np.float32)).all()) for x in leaves)
    taken, given = ([f"{x.dtype}{list(x.shape)}" for x in arrays] for arrays in (inputs, leaves))
    facts = {
        "folder": str(folder),
        "kind": kind,
        "inputs": taken,
        "outputs": given,
        "finite": finite,
        "seconds": seconds,
    }
    verdict = "ok" if finite else "FAILED: not all of it is finite"
    text = f"{kind}: {', '.join(taken)} -> {', '.join(given)} in {seconds:.2f} s, compiling included\n{verdict}"
    return Shown(facts, text, failed=not finite)


def _artifact(folder: Path, asked: Mapping[str, int]) -> tuple[str, Any, list[np.ndarray]]:
    found = artifacts.load(folder)
    dims = found.manifest.dims
    if unknown := sorted(set(asked) - set(dims)):
        raise UnsupportedError(f"{unknown[0]}: this artifact has no axis of that name to choose; it has {found}")
    sizes = {name: asked.get(name, min(max(SIZES.get(name, 1), b[0]), b[1])) for name, b in dims.items()}
    rng, most = np.random.default_rng(0), found.manifest.tokens or 2
    inputs = []
    for x in found.manifest.inputs:
        shape = [sizes[a] if isinstance(a, str) else a for a in x.shape]
        whole = np.issubdtype(np.dtype(x.dtype), np.integer)
        values = rng.integers(0, min(most, np.iinfo(x.dtype).max), shape) if whole else rng.normal(size=shape)
        inputs.append(values.astype(x.dtype))
    return f"stablehlo for {found.platform}", found, inputs


def _folder(folder: Path, asked: Mapping[str, int]) -> tuple[str, Any, list[np.ndarray]]:
    qm = jqopt.load_hf(folder)
    sizes = {**SIZES, **asked}
    tokens = qm.model.config.vocab_size
    ids = np.random.default_rng(0).integers(0, tokens, (sizes["batch"], sizes["length"]))
    return f"Hugging Face, {qm.plan.recipe.name}", qm, [ids.astype(np.int32)]
