"""MODEL arguments of the command line: `package.module:function`, Hugging Face folders, and saved checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import pydantic
from flax import linen, nnx

import jqopt
from jqopt import _apply
from jqopt._calibrate import as_call
from jqopt._cli_data import Data, read
from jqopt._cli_print import note
from jqopt._report import named
from jqopt._trace import Graph
from jqopt.errors import CheckpointError, PlanError, TraceError
from jqopt.export.checkpoint import METADATA, Checkpoint
from jqopt.frontends import function_of
from jqopt.hf import load_config, load_model
from jqopt.hf.folder import CARRIED, CONFIG

INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
KEPT = (CONFIG, *CARRIED)
"""Files of a Hugging Face folder that a checkpoint keeps, so that it needs the folder no more."""

RANDOM = "random numbers: what the model computes means nothing"
"""What a checkpoint says it was calibrated with, where that is so."""

TOKENS = (1, 128)
"""The shape of the ids a language model is traced with where nothing else is said."""


class Source(pydantic.BaseModel):
    """Where a model came from, as its checkpoint remembers it. `files`: {kept file: sha256}."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: Literal["huggingface", "function"]
    name: str  # the MODEL argument
    scan_layers: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    calibration: str = ""
    files: dict[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that a MODEL argument names. `params` None: an NNX module, which holds its own.

    `inputs`: one batch to trace with, or None. `vocabulary`: how many token ids it knows, if it says so. `folder`:
    where its tokenizer.json may lie. `source`: what a checkpoint of it remembers.
    """

    model: Any
    params: Any
    inputs: Any
    source: Source
    vocabulary: int | None = None
    folder: Path | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of its inputs that are no arrays (`train: False`): they go with every call."""
        _, kwargs = as_call(() if self.inputs is None else self.inputs, {})
        return {name: x for name, x in kwargs.items() if not any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(x))}

    @property
    def tree(self) -> Any:
        """Its parameters (and other state) as its plan knows them."""
        return function_of(self.model, self.params).params

    def with_weights(self) -> Loaded:
        """The same with the weights of the Hugging Face folder, if it was loaded without."""
        if self.folder is None or not isinstance(jax.tree.leaves(self.params)[0], jax.ShapeDtypeStruct):
            return self
        options = {"scan_layers": self.source.scan_layers, "dtype": jnp.dtype(self.source.dtype)}
        return dataclasses.replace(self, params=load_model(self.folder, **options)[1])

    def read(self, file: Path | None, length: int, batch: int, vocabulary: int | None = None) -> Data | None:
        """The examples of a data file, or None without a file."""
        if file is None:
            return None
        tokenizer = None if self.folder is None else self.folder / "tokenizer.json"
        return read(file, length=length, batch=batch, vocabulary=vocabulary or self.vocabulary, tokenizer=tokenizer)

    def example(self, texts: list[str], data: Data | None) -> Any:
        """One batch to trace with: the shapes the user wrote, else the data's first batch, else the model's own.

        Raises:
            TraceError: there is none of them.
        """
        if texts:
            return inputs_of(texts)
        found = self.inputs if data is None else next(iter(data))
        if found is None:
            raise TraceError(
                f"{self.source.name}: nothing says which inputs to trace it with: let the function return them too, or "
                "write --input SHAPE, or --data FILE"
            )
        return found

    def trace(self, inputs: Any) -> Graph:
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
    module = family.build(config, scan_layers, jnp.dtype(dtype))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    variables = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), shapes)
    source = Source(kind="huggingface", name=str(folder), scan_layers=scan_layers, dtype=dtype)  # type: ignore[arg-type]
    ids = jax.ShapeDtypeStruct(TOKENS, jnp.int32)
    found = Loaded(module, variables, ids, source, getattr(config, "vocab_size", None), folder)
    return found.with_weights() if weights else found


def _from_function(text: str) -> Loaded:
    make = _function(text)
    try:
        found = make()
    except Exception as error:
        raise TraceError(f"{text}: calling it raised {type(error).__name__}: {error}") from error
    source = Source(kind="function", name=text)
    model, *rest = found if isinstance(found, tuple) and found else (found,)
    if isinstance(model, nnx.Module) and len(rest) <= 1:
        return Loaded(model, None, rest[0] if rest else None, source)
    if (callable(model) or isinstance(model, linen.Module)) and len(rest) in (1, 2):
        params, inputs = rest if len(rest) == 2 else (rest[0], None)
        return Loaded(model, params, inputs, source)
    raise TraceError(
        f"{text}: it returned {_kinds(found)}; expected (model, params) or (model, params, inputs) with a Linen module "
        "or a function of (params, *inputs), or an NNX module, or (nnx_module, inputs)"
    )


def _kinds(found: Any) -> str:
    if isinstance(found, tuple):
        return f"({', '.join(type(x).__name__ for x in found)})"
    return type(found).__name__


def _function(text: str) -> Callable[[], Any]:
    """The function that `package.module:name` names; modules are looked for in the working folder first."""
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
    if loaded.source.kind != "huggingface" or loaded.folder is None:
        return {}
    return {f"hf/{name}": file for name in KEPT if (file := loaded.folder / name).is_file()}


def remembered(loaded: Loaded, calibration: str) -> dict[str, Any]:
    """What a checkpoint of the model notes of its origin."""
    files = {name: _sha256(file) for name, file in kept_files(loaded).items()}
    return loaded.source.model_copy(update={"calibration": calibration, "files": files}).model_dump()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def source_of(checkpoint: Checkpoint) -> Source | None:
    """What a checkpoint remembers of its origin; None where it's nothing that the command line wrote."""
    try:
        return Source.model_validate(checkpoint.manifest.source)
    except pydantic.ValidationError:
        return None


def model_of(checkpoint: Checkpoint, text: str | None, *, weights: bool = False, **options: Any) -> Loaded:
    """The model of a checkpoint: the MODEL that the user names, or else from the files the checkpoint keeps.

    A checkpoint's data never run code: a function whose name stands in it is called only when the user writes it.

    Raises:
        CheckpointError: the model can't be known, or the kept files are damaged.
    """
    source = source_of(checkpoint)
    kept = source is not None and source.kind == "huggingface"
    if source is not None and kept:
        options = {"scan_layers": source.scan_layers, "dtype": source.dtype}
    if text is not None:
        return load(text, weights=weights, **options)
    if source is not None and kept:
        _check_kept(checkpoint.directory, source)
        return load(str(checkpoint.directory / "hf"), weights=False, **options)
    raise CheckpointError(
        f"{checkpoint.directory}: the checkpoint holds weights and plan, but no code of the model. "
        + (f"It was made from {source.name}: if you trust that code, write --model {source.name}" if source else
           "Write --model MODEL with the model that was quantized.")
    )  # fmt: skip


def _check_kept(folder: Path, source: Source) -> None:
    for name in KEPT:
        kept, file = f"hf/{name}", folder / "hf" / name
        if kept in source.files and not (file.is_file() and _sha256(file) == source.files[kept]):
            raise CheckpointError(f"{file}: the file is missing or damaged; write --model with the original folder")
    if "hf/config.json" not in source.files:
        raise CheckpointError(f"{folder}: it keeps no config.json; write --model with the original folder")


def runnable(text: str, model: str | None = None, **options: Any) -> tuple[Callable[[Any], Any], Loaded]:
    """(a function of one batch, its model) of a MODEL or a checkpoint; `model` names a checkpoint's model.

    Raises:
        CheckpointError, TraceError, UnsupportedError: as `load` and `jqopt.load`.
    """
    if not is_checkpoint(text):
        loaded = load(text, **options)
        return loaded.callable(), loaded
    checkpoint = Checkpoint(text)
    loaded, source = model_of(checkpoint, model, **options), source_of(checkpoint)
    if source is not None and source.calibration == RANDOM:
        note(f"WARNING: {text} was calibrated with {RANDOM}.")
    qm = jqopt.load(text, loaded.model)

    def call(batch: Any) -> Any:
        args, kwargs = as_call(batch, loaded.options)
        return qm(*args, **kwargs)

    return call, loaded


def warn_if_random(folder: Path) -> None:
    """Says on stderr that a checkpoint was calibrated with random numbers, if it was."""
    source = source_of(Checkpoint(folder))
    if source is not None and source.calibration == RANDOM:
        note(f"WARNING: {folder} was calibrated with {RANDOM}.")


def floats_of(checkpoint: Checkpoint, text: str, **options: Any) -> dict[str, Any]:
    """The float parameters, by path, of the model that a checkpoint was made from.

    Raises:
        CheckpointError: they aren't that model's.
    """
    loaded = model_of(checkpoint, text, weights=True, **options)
    function = function_of(loaded.model, loaded.params)
    floats = named(function, function.params)
    try:
        _apply.check_paths(checkpoint.plan(), floats)
    except PlanError as error:
        raise CheckpointError(f"{text} isn't the model that {checkpoint.directory} was made from: {error}") from None
    return floats


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
