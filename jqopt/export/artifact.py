"""The manifest of a deployable artifact: what its programs take and give, as checked and versioned JSON data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import pydantic

from jqopt.errors import CheckpointError
from jqopt.export.tree import Checked

FILE = "manifest.json"
FORMAT = "jqopt.stablehlo"
VERSION = 1
"""The version of this file format. It rises with every change that an older reader would misread."""

WEIGHTS = "weights.safetensors"


class Data(Checked):
    """A file of the artifact, beside the manifest."""

    file: str = pydantic.Field(pattern=r"^[\w.-]+$")
    sha256: str = pydantic.Field(pattern="^[0-9a-f]{64}$")


class Program(Checked):
    """One platform's program twice: as `jax.export` serializes it, and as portable StableHLO bytecode."""

    jax: Data
    stablehlo: Data


class Array(Checked):
    """One weight: the programs take them in this order, before the inputs."""

    name: str
    dtype: str
    shape: list[int]


class Input(Checked):
    """One input: sizes of its axes, or the names of those in `Manifest.dims`."""

    name: str
    dtype: str
    shape: list[int | str]


class Manifest(Checked):
    """All that a reader needs. `dims`: {name: [least, most]}; `output`: a tree in which numbers count `results`.

    `tokens`: whole numbers below it are valid where an input is looked up in a table; None: no table.
    """

    format: Literal["jqopt.stablehlo"]
    version: int
    writer: str
    jax: str
    model: str
    dims: dict[str, list[int]]
    inputs: list[Input]
    results: list[Input]
    output: Any
    weights: Data
    arrays: list[Array]
    programs: dict[str, Program]
    tokens: int | None
    plan: dict[str, Any]

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Manifest:
        for name, bounds in self.dims.items():
            if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1]:
                raise ValueError(f"dims: {name} is {bounds}; expected [least, most]")
        named = {axis for x in self.inputs for axis in x.shape if isinstance(axis, str)}
        if named != set(self.dims):
            raise ValueError(f"inputs have the dims {sorted(named)}, bounds are given for {sorted(self.dims)}")
        if not self.programs:
            raise ValueError("no program")
        rebuild(self.output, self.results)
        return self


def read(folder: Path) -> Manifest:
    """The manifest of an artifact's folder.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer version.
    """
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: found no {FILE}; expected the folder that target='stablehlo' wrote")
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict) and found.get("format") == FORMAT and found.get("version") != VERSION:
            raise CheckpointError(
                f"{path}: version {found.get('version')!r}; this jqopt reads {VERSION}. Read it with a newer jqopt"
            )
        return Manifest.model_validate(found)
    except (ValueError, RecursionError) as error:  # JSON's, UTF-8's and pydantic's errors are ValueErrors
        raise CheckpointError(f"{path}: it can't be read: {error}") from None


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(folder: Path, data: Data) -> Path:
    """The path of a file that is there and has its sha256.

    Raises:
        CheckpointError: it doesn't.
    """
    path = folder / data.file
    if not path.is_file():
        raise CheckpointError(f"{folder}: {data.file} is missing; export it again")
    if sha256(path) != data.sha256:
        raise CheckpointError(f"{path}: damaged: its sha256 isn't the one in {FILE}; export or copy it again")
    return path


# ---------------------------------------------------------------------------------------------------- output trees


def outline(tree: Any) -> tuple[Any, list[Any]]:
    """(JSON, leaves): a tree as nested `{"dict": {}}`, `{"list": []}`, `{"tuple": []}`, null, numbers for its leaves.

    Containers of other classes become dicts of their leaves by path.
    """
    leaves: list[Any] = []

    def walk(node: Any) -> Any:
        if node is None:
            return None
        if type(node) is dict and all(type(key) is str for key in node):
            return {"dict": {key: walk(item) for key, item in sorted(node.items())}}
        if type(node) in (list, tuple):
            return {type(node).__name__: [walk(item) for item in node]}
        flat, _ = jax.tree_util.tree_flatten_with_path(node)
        if len(flat) == 1 and flat[0][0] == ():
            leaves.append(node)
            return len(leaves) - 1
        return {"dict": {jax.tree_util.keystr(key, simple=True, separator="/"): walk(item) for key, item in flat}}

    return walk(tree), leaves


def rebuild(node: Any, leaves: Sequence[Any]) -> Any:
    """The tree that `outline` saw, with these leaves.

    Raises:
        ValueError: it is no such JSON.
    """
    if node is None:
        return None
    if type(node) is int and 0 <= node < len(leaves):
        return leaves[node]
    kind, items = next(iter(node.items())) if isinstance(node, Mapping) and len(node) == 1 else ("", None)
    if kind == "dict" and isinstance(items, Mapping):
        return {key: rebuild(item, leaves) for key, item in items.items()}
    if kind in ("list", "tuple") and isinstance(items, list):
        return (list if kind == "list" else tuple)(rebuild(item, leaves) for item in items)
    raise ValueError(f"output: {node!r} is no tree of {len(leaves)} results")
