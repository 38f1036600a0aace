"""Hugging Face checkpoint folders as Flax models: `module, variables = load_model(folder)`, then `generate`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jqopt.errors import CheckpointError, UnsupportedError
from jqopt.hf import families
from jqopt.hf.decode import init_cache
from jqopt.hf.families import Family, Place
from jqopt.hf.generation import Generated, generate
from jqopt.hf.names import NameMap, Rule
from jqopt.hf.safetensors import Entry, open_folder

__all__ = ["Generated", "NameMap", "Rule", "generate", "init_cache", "load_config", "load_model"]

Variables = dict[str, Any]


def load_config(folder: str | Path) -> tuple[Family, Any]:
    """The family of a checkpoint folder and its parsed configuration; no weights are read.

    Raises CheckpointError where config.json is missing or no JSON object, UnsupportedError where the model
    is of an unknown family, or already quantized.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: found no config.json; expected a Hugging Face checkpoint folder")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its JSON cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: its JSON is a {type(config).__name__}; expected an object")
    if config.get("quantization_config"):
        raise UnsupportedError(
            f"{path}: has a quantization_config, so the weights are quantized already; load the original checkpoint"
        )
    family = families.find(config)
    try:
        return family, family.parse(config)
    except (TypeError, ValueError, AttributeError) as error:  # what arithmetic says to a text where a number should be
        raise CheckpointError(f"{path}: a setting is of the wrong kind: {error}") from error


def load_model(
    folder: str | Path, *, scan_layers: bool = False, dtype: Any = jnp.float32
) -> tuple[nn.Module, Variables]:
    """The Flax module of a Hugging Face checkpoint folder, and its variables {"params": ...}.

    Parameters and computation are in `dtype`; float32 holds a bfloat16 checkpoint exactly. With
    `scan_layers` the blocks are one `nn.scan` and their parameters carry a leading layer axis. Tensors are
    read one at a time.

    Raises UnsupportedError for families and settings that are not known, CheckpointError where a tensor is
    missing, unexpected, or of another shape than the configuration says.
    """
    family, config = load_config(folder)
    module = family.build(config, scan_layers, dtype)
    places = family.places(config, scan_layers)
    entries = _prefixed(open_folder(Path(folder)), family, places)
    _check_names(Path(folder), family, config, places, entries)
    shapes = _parameter_shapes(module)
    leaves = {place.path: _read(place, entries, shapes[place.path], dtype) for place in places}
    return module, {"params": traverse_util.unflatten_dict(leaves, sep="/")}


def _prefixed(entries: dict[str, Entry], family: Family, places: tuple[Place, ...]) -> dict[str, Entry]:
    """The tensors under the family's names: a checkpoint of the model without its head may lack their beginning."""
    if not family.prefix or any(tensor in entries for place in places for tensor in place.tensors):
        return entries
    return {family.prefix + name: entry for name, entry in entries.items()}


def _check_names(
    folder: Path, family: Family, config: Any, places: tuple[Place, ...], entries: Mapping[str, Entry]
) -> None:
    expected = {tensor for place in places for tensor in place.tensors}
    copies = family.copies(config)
    missing = sorted(expected - set(entries))
    fused = next((n for n in entries if n.endswith("experts.gate_up_proj")), None)
    if missing and fused is not None:
        raise UnsupportedError(
            f"{folder}: {fused} holds all experts of a layer in one tensor; expected one tensor an expert, as "
            "transformers' save_pretrained(folder) writes them (its save_original_format is on by default)"
        )
    extra = sorted(n for n in set(entries) - expected - set(copies) if not n.endswith(family.derived))
    for names, fault in ((missing, "missing"), (extra, "unexpected")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{folder}: tensor {names[0]}{more} {fault}: the checkpoint does not fit the "
                f"{family.name!r} model that its config.json describes ({len(expected)} tensors expected, "
                f"{len(entries)} found)"
            )
    for copy, original in copies.items():
        if copy in entries and not np.array_equal(entries[copy].read(), entries[original].read()):
            raise CheckpointError(
                f"{folder}: {copy} differs from {original}, which config.json says is the same matrix; if "
                'they are two, write "tie_word_embeddings": false there'
            )


def _parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params: Any = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def _read(place: Place, entries: Mapping[str, Entry], shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """One Flax parameter of the given shape, filled tensor by tensor: no second copy of it in memory."""
    filled = np.empty(shape, jnp.dtype(dtype))
    parts = filled.reshape(-1, *shape[len(place.stack) :])
    for part, tensor in zip(parts, place.tensors, strict=True):
        part[...] = _oriented(entries[tensor], place, part.shape)
    return jnp.asarray(filled)


def _oriented(entry: Entry, place: Place, shape: tuple[int, ...]) -> np.ndarray:
    expected = shape[::-1] if place.transpose else shape
    if entry.shape != expected:
        raise CheckpointError(
            f"{entry.file}: {entry.name} has shape {list(entry.shape)}; config.json asks for {list(expected)}"
        )
    if not jnp.issubdtype(entry.dtype, jnp.floating) or entry.dtype.itemsize < 2:  # packed F4 reads as uint8
        raise UnsupportedError(
            f"{entry.file}: {entry.name} is stored as {entry.dtype}; expected float16, bfloat16, float32 "
            "or float64. Already quantized weights cannot be quantized again: load the original checkpoint"
        )
    tensor = entry.read()
    return tensor.T if place.transpose else tensor
