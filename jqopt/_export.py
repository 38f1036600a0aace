"""`export`: quantized models as folders for other programs; one function a target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jqopt._model import QuantizedModel
from jqopt.errors import CheckpointError, UnsupportedError
from jqopt.export import compressed_tensors, modelopt, stablehlo
from jqopt.export.checkpoint import METADATA, Checkpoint
from jqopt.export.parameters import InMemory, OnDisk, Parameters
from jqopt.export.schemes import Target
from jqopt.hf import folder
from jqopt.hf.export import export_folder

DEFAULT = compressed_tensors.METHOD


def _folders(target: Target) -> Callable[..., Any]:
    """The writer of a target whose exports are Hugging Face folders."""

    def write(model: Any, directory: str | Path, *, source: str | Path | None = None, **options: Any) -> Any:
        params = _parameters(model)
        return export_folder(params, folder.identity(_source(model, source)), target, directory, **options)

    return write


def _stablehlo(model: Any, directory: str | Path, **options: Any) -> Any:
    """A program for each platform, with its weights; a checkpoint on disk has none."""
    if not isinstance(model, QuantizedModel):
        raise UnsupportedError(
            f"target 'stablehlo' needs a model that runs, found {model!r}: load it with jqopt.load(dir, model). (The "
            "command line, `jqopt export CKPT --target stablehlo`, does.)"
        )
    return stablehlo.export(model, directory, **options)


TARGETS: dict[str, Callable[..., Any]] = {
    compressed_tensors.METHOD: _folders(compressed_tensors.TARGET),
    modelopt.METHOD: _folders(modelopt.TARGET),
    stablehlo.NAME: _stablehlo,
}
"""What `export` can write, by name: functions of (model, directory, **options)."""


def export(model: QuantizedModel | str | Path, directory: str | Path, target: str = DEFAULT, **options: Any) -> Any:
    """Writes a quantized model for other programs; docs/export.md says what each engine loads.

    Args:
        model: a QuantizedModel of a Hugging Face model, or a checkpoint's folder, which is then read array by array.
        directory: the folder to write. It appears in one step, when everything is written.
        target: "compressed-tensors" (vLLM, transformers, SGLang), "modelopt" (TensorRT-LLM, vLLM, SGLang), "stablehlo".
        options: of the first two targets: `source`, the Hugging Face folder of the float model, from which config.json
            and tokenizer come (checkpoints of `jqopt quantize` and models of `load_hf` know theirs); `names`, the
            `jqopt.hf.NameMap` of a model that isn't `jqopt.hf.load_model`'s; `engine`, who must load it (default vLLM;
            "other": don't ask); `dtype` of unquantized parameters (default: config.json's); `max_shard_size` in bytes;
            `overwrite`; `resume`, to go on after a cut. Of "stablehlo" (docs/export.md), which takes no folder: the
            bounds `batch` and `length`, `platforms`, `overwrite`, `dims`, `axes`, `inputs`, `backend`.

    Returns:
        What was written; `print` it.

    Raises:
        UnsupportedError: something the target can't hold, or that the engine doesn't load: the message says what to do.
        CheckpointError: something is there already, or a source or checkpoint can't be read.
    """
    if target not in TARGETS:
        raise UnsupportedError(f"unknown target {target!r}; known are {', '.join(TARGETS)}")
    return TARGETS[target](model, directory, **options)


def _parameters(model: Any) -> Parameters:
    if isinstance(model, QuantizedModel):
        return InMemory(model)
    if not isinstance(model, str | Path):
        raise UnsupportedError(f"expected a QuantizedModel or the folder of a checkpoint, found {type(model).__name__}")
    return OnDisk(Checkpoint(model))


def _source(model: Any, given: str | Path | None) -> Path:
    """The Hugging Face folder that a model comes from."""
    if given is not None:
        return Path(given)
    found = model.source if isinstance(model, QuantizedModel) else kept(model)
    if found is None:
        raise CheckpointError(
            "nothing says which Hugging Face model this is: write source=FOLDER (--source), the folder with the float "
            "model's config.json and tokenizer"
        )
    return Path(found)


def kept(checkpoint: str | Path) -> Path | None:
    """The Hugging Face files that a checkpoint of `jqopt quantize` keeps, or None."""
    found = Path(checkpoint) / "hf"
    return found if (Path(checkpoint) / METADATA).is_file() and (found / folder.CONFIG).is_file() else None
