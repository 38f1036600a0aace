"""MODEL arguments of the command line: `package.module:function`, Hugging Face folders, and saved checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jqopt
from jqopt import _apply
from jqopt._calibrate import as_call
from jqopt.errors import CheckpointError, TraceError
from jqopt.export.checkpoint import METADATA, Checkpoint
from jqopt.frontends import function_of
from jqopt.hf import load_config, load_model

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
KEPT = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
"""Files of a Hugging Face folder that a checkpoint keeps, so that it needs the folder no more."""

TOKENS = (1, 128)
"""The shape of the ids a language model is traced with where nothing else is said."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that a MODEL argument names. `params` None: an NNX module, which holds its own.

    `inputs`: one batch to trace with, or None. `vocabulary`: how many token ids it knows, if it says so. `folder`:
    where its tokenizer.json may lie. `source`: what a checkpoint of it remembers.
    """

    model: Any
    params: Any
    inputs: Any
    source: dict[str, Any]
    vocabulary: int | None = None
    folder: Path | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of its inputs that are no arrays (`train: False`): they go with every call."""
        _, kwargs = as_call(() if self.inputs is None else self.inputs, {})
        return {name: x for name, x in kwargs.items() if not any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(x))}

    @property
    def tokenizer(self) -> Path | None:
        return None if self.folder is None else self.folder / "tokenizer.json"

    def trace(self, inputs: Any) -> jqopt.trace.__annotations__["return"]:  # type: ignore[name-defined]
        """Its graph at the shapes of one batch."""
        lead = () if self.params is None else (self.params,)
        args, kwargs = as_call(inputs, self.options)
        return jqopt.trace(self.model, *lead, *args, **kwargs)

    def callable(self) -> Callable[[Any], Any]:
        """The float model as a jitted function of one batch."""
        function = function_of(self.model, self.params)
        run = _apply.Static(lambda params, args, kwargs: function.call(params, *args, **kwargs))

        def call(batch: Any) -> Any:
            args, kwargs = as_call(batch, self.options)
            return run(function.params, *args, **kwargs)

        return call


def is_checkpoint(text: str) -> bool:
    """Whether it is a folder that `jqopt.save` wrote."""
    return (Path(text) / METADATA).is_file()


def is_model(text: str) -> bool:
    """Whether it has the form of a MODEL: an existing folder, or `package.module:function`."""
    return Path(text).is_dir() or FUNCTION.fullmatch(text) is not None


def load(text: str, *, scan_layers: bool = False, dtype: str = "float32", weights: bool = True) -> Loaded:
    """The model that a MODEL argument names.

    Args:
        scan_layers, dtype: of Hugging Face models.
        weights: False: shapes do in place of the weights of a Hugging Face model, which aren't read.

    Raises:
        TraceError: the module or function isn't there, fails, or returns something else than a model.
        CheckpointError, UnsupportedError: the folder can't be read.
    """
    if Path(text).is_dir():
        return _from_folder(Path(text), scan_layers, dtype, weights)
    return _from_function(text)


def _from_folder(folder: Path, scan_layers: bool, dtype: str, weights: bool) -> Loaded:
    if is_checkpoint(str(folder)):
        raise CheckpointError(f"{folder} is quantized already (a jqopt checkpoint); give the float model.")
    family, config = load_config(folder)
    if weights:
        module, variables = load_model(folder, scan_layers=scan_layers, dtype=jnp.dtype(dtype))
    else:
        module = family.build(config, scan_layers, jnp.dtype(dtype))
        variables = _shapes_of(module, jnp.dtype(dtype))
    source = {"kind": "huggingface", "folder": str(folder), "scan_layers": scan_layers, "dtype": dtype}
    inputs = jax.ShapeDtypeStruct(TOKENS, jnp.int32)
    return Loaded(module, variables, inputs, source, getattr(config, "vocab_size", None), folder)


def _shapes_of(module: Any, dtype: Any) -> Any:
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)


def _from_function(text: str) -> Loaded:
    make = _function(text)
    try:
        found = make()
    except Exception as error:
        raise TraceError(f"{text}: calling it raised {type(error).__name__}: {error}") from error
    source = {"kind": "function", "name": text}
    parts = found if isinstance(found, tuple) else (found,)
    if isinstance(parts[0], nnx.Module) and len(parts) <= 2:
        return Loaded(parts[0], None, parts[1] if len(parts) == 2 else None, source)
    if callable(parts[0]) and len(parts) in (2, 3) or hasattr(parts[0], "apply") and len(parts) in (2, 3):
        return Loaded(parts[0], parts[1], parts[2] if len(parts) == 3 else None, source)
    raise TraceError(
        f"{text}: it returned {_kinds(found)}; expected (model, params) or (model, params, inputs) with a Linen module "
        "or a function of (params, *inputs), or an NNX module, or (nnx_module, inputs)"
    )


def _kinds(found: Any) -> str:
    if isinstance(found, tuple):
        return f"({', '.join(type(x).__name__ for x in found)})"
    return type(found).__name__


def _function(text: str) -> Callable[[], Any]:
    """The function that `package.module:name` names; modules are looked for in the working folder first, as python -m does."""
    name, _, attribute = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise TraceError(f"{text}: importing {name} raised ModuleNotFoundError: {error}") from error
        raise TraceError(
            f"{text}: found no module {error.name!r}, neither in {os.getcwd()} nor among the installed packages"
        ) from None
    except Exception as error:
        raise TraceError(f"{text}: importing {name} raised {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            there = [n for n, x in vars(found).items() if callable(x) and not n.startswith("_")]
            raise TraceError(f"{text}: {name} has no {attribute!r}; it has {', '.join(there[:12]) or 'no function'}")
        found = getattr(found, part)
    if not callable(found):
        raise TraceError(f"{text}: it is a {type(found).__name__}, expected a function without arguments")
    return found


# ----------------------------------------------------------------------------------------------- checkpoints


def kept_files(loaded: Loaded) -> dict[str, Path]:
    """The files that a checkpoint of the model keeps, by their names in it."""
    if loaded.source["kind"] != "huggingface" or loaded.folder is None:
        return {}
    return {f"hf/{name}": file for name in KEPT if (file := loaded.folder / name).is_file()}


def remembered(loaded: Loaded, calibration: str) -> dict[str, Any]:
    """What a checkpoint notes of its origin."""
    files = {name: _sha256(file) for name, file in kept_files(loaded).items()}
    return {**loaded.source, "calibration": calibration, **({"files": files} if files else {})}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def model_of(checkpoint: Checkpoint, text: str | None, **options: Any) -> Loaded:
    """The model of a checkpoint, without weights: from the files it keeps, or the MODEL that the user names.

    A checkpoint's data never run code: a function whose name stands in it is called only when the user writes it.

    Raises:
        CheckpointError: it can't be known, or the kept files are damaged.
    """
    source = checkpoint.manifest.source or {}
    if source.get("kind") == "huggingface":
        options = {"scan_layers": source.get("scan_layers"), "dtype": source.get("dtype")}
    if text is not None:
        return load(text, weights=False, **options)
    if source.get("kind") == "huggingface":
        _check_kept(checkpoint.directory, source.get("files") or {})
        return load(str(checkpoint.directory / "hf"), weights=False, **options)
    name = source.get("name")
    said = f"It was made from {name}: if you trust that code, write --model {name}" if name else "Write --model MODEL"
    raise CheckpointError(f"{checkpoint.directory}: the checkpoint holds weights and plan, but not the model's code. {said}")


def _check_kept(folder: Path, files: Mapping[str, str]) -> None:
    for name, digest in files.items():
        if name.removeprefix("hf/") not in KEPT:
            raise CheckpointError(f"{folder}: the manifest lists an unknown file {name!r}")
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise CheckpointError(f"{folder / name}: the file is missing or damaged; write --model with the original folder")


def load_checkpoint(text: str, model: str | None, **options: Any) -> tuple[jqopt.QTensor, Loaded]:
    """(quantized model, its model without weights)."""
    loaded = model_of(Checkpoint(text), model, **options)
    return jqopt.load(text, loaded.model), loaded


# ---------------------------------------------------------------------------------------------------- inputs


def inputs_of(texts: list[str]) -> Any:
    """`["2x128:int32"]` or `["ids=2x128:int32", ...]` as shapes: a tuple of inputs, or a dict of keywords.

    Raises:
        ValueError: what is wrong with one of them.
    """
    found = [_input(text) for text in texts]
    named = [name for name, _ in found if name is not None]
    if named and len(named) < len(found):
        raise ValueError("either all inputs have names, or none")
    return dict(found) if named else tuple(shape for _, shape in found)


def _input(text: str) -> tuple[str | None, jax.ShapeDtypeStruct]:
    match = INPUT.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r}: expected a shape and a dtype, such as 2x128:int32 or x=8x32:float32")
    try:
        dtype = jnp.dtype(match["dtype"] or "float32")
    except TypeError:
        raise ValueError(f"{text!r}: unknown dtype {match['dtype']!r}") from None
    return match["name"], jax.ShapeDtypeStruct(tuple(map(int, match["shape"].split("x"))), dtype)
