"""The manifest of a checkpoint: what every leaf is, as checked and versioned JSON data. No files here."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import pydantic

from jqopt import formats
from jqopt._qtensor import Layout, QTensor
from jqopt.errors import CheckpointError, UnsupportedError
from jqopt.export.inputs import Inputs, is_key
from jqopt.export.tree import Checked, Node
from jqopt.formats import Format

SCHEMA = 2
"""The version of this file format. It rises with every change that an older jqopt would misread.

2: `attention`, the scales of attention's operands. A checkpoint without them is still written as 1.
"""

ATTENTION = "attention_scales"
"""The stored arrays of `Manifest.attention` stand below this name: `attention_scales/layers_0/attn/k_scale`."""

CODES = 1
"""The version of how codes and scales are packed into bytes."""

FIELDS = tuple(
    f.name for f in dataclasses.fields(QTensor) if not f.metadata.get("static") and f.name not in QTensor.DERIVED
)
"""The arrays a QTensor may hold and a checkpoint stores."""

UNSTORABLE = ("uint4", "uint2")
"""Dtypes that Orbax's storage doesn't know."""


class Leaf(Checked):
    """One stored array. `sha256` is of its bytes, in row-major order, little-endian, one byte for an int4."""

    dtype: str
    shape: list[int]
    sha256: str = pydantic.Field(pattern="^[0-9a-f]{64}$")
    host: bool = False  # a numpy array, and comes back as one

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class LayoutData(Checked):
    """`Layout` as data."""

    shape: list[int]
    atoms: list[int]
    stack: list[int]
    rows: list[int]
    cols: list[int]


class Packing(Checked):
    """All that a quantized tensor's bytes mean: nothing of it is guessed from shapes or names."""

    codes: int  # version of the packing
    format: str
    element: str
    bits: int
    scale: str
    global_scale: bool
    zero_point: bool
    then: str = ""
    block: int | list[int] | None
    granularity: str
    layout: LayoutData
    dtype: str
    leaves: list[str]
    rotation: int = 0


class Tensor(Checked):
    """One leaf of the parameter tree. `parameter`: its path as recipes spell it, or None for other state."""

    kind: Literal["array", "key", "quantized"]
    parameter: str | None
    impl: str | None = None  # of a random key
    packing: Packing | None = None


class Manifest(Checked):
    """What `_CHECKPOINT_METADATA` holds under `custom_metadata`, except for the manifest's own sha256."""

    version: int = pydantic.Field(alias="schema")
    writer: str
    kind: Literal["linen", "nnx", "function"]
    model: str
    plan: dict[str, Any]
    tree: Node
    tensors: dict[str, Tensor]
    leaves: dict[str, Leaf]
    inputs: Inputs | None = None
    attention: dict[str, list[str]] = pydantic.Field(default_factory=dict)  # {attention: its scales, biases}
    source: dict[str, Any] | None = None  # where the model came from, in the words of whoever saved it

    def to_dict(self) -> dict[str, Any]:
        """JSON data, signed with its own sha256."""
        data = json.loads(json.dumps(self.model_dump(by_alias=True, exclude_defaults=True)))
        return {**data, "sha256": signature(data)}

    def leaves_of(self, name: str) -> dict[str, str]:
        """{field of the tensor: name of the stored array}; the field of a plain array is ""."""
        packing = self.tensors[name].packing
        return {"": name} if packing is None else {field: f"{name}/{field}" for field in packing.leaves}

    def attention_leaves(self) -> dict[tuple[str, str], str]:
        """{(attention, name): name of the stored array}."""
        return {(k, f): "/".join(attention_parts(k, f)) for k, fields in self.attention.items() for f in fields}

    def path_of(self, name: str) -> str:
        """The tensor's parameter path; for other state its name."""
        return self.tensors[name].parameter or name


def attention_parts(key: str, field: str) -> tuple[str, ...]:
    """Where a scale of an attention is stored."""
    return (ATTENTION, *key.split("/"), field)


def signature(data: Mapping[str, Any]) -> str:
    """sha256 of JSON data without its own `sha256`: keys sorted, no spaces, ASCII."""
    rest = {k: v for k, v in data.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse(data: Any, where: str) -> Manifest:
    """The manifest in JSON data.

    Raises:
        CheckpointError: it isn't one, is of a newer version, was damaged, or contradicts itself.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("schema"), int) or data["schema"] < 1:
        raise CheckpointError(
            f"{where} holds no jqopt manifest: it was lost, or the checkpoint was written by something else. "
            "Expected what jqopt.save writes; a plain Orbax checkpoint is read with orbax.checkpoint.v1.load."
        )
    if data["schema"] > SCHEMA:
        raise CheckpointError(
            f"{where}: the checkpoint has schema {data['schema']}, written by jqopt {data.get('writer')}; the newest "
            f"that this jqopt reads is {SCHEMA}. Upgrade jqopt."
        )
    if data.get("sha256") != signature(data):
        raise CheckpointError(f"{where}: the manifest is damaged: its sha256 isn't the one it was written with.")
    try:
        manifest = Manifest.model_validate({k: v for k, v in data.items() if k != "sha256"})
    except pydantic.ValidationError as e:
        first = e.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{where}: {at}: {first['msg']}, found {first['input']!r}") from None
    _check_names(manifest, where)
    return manifest


def _check_names(manifest: Manifest, where: str) -> None:
    """Tensors and leaves must belong together."""
    for name, tensor in manifest.tensors.items():
        if (tensor.kind == "quantized") != (tensor.packing is not None) or (tensor.kind == "key") != bool(tensor.impl):
            raise CheckpointError(f"{where}: {name} is said to be of kind {tensor.kind!r}, but is described otherwise.")
    placed = set(manifest.tree.leaves)
    lost = set() if manifest.tree.customs else set(manifest.tensors) - placed
    if odd := sorted((placed - set(manifest.tensors)) | lost):
        raise CheckpointError(f"{where}: {odd[0]}: the manifest's tree and its list of tensors differ.")
    wanted = {leaf for name in manifest.tensors for leaf in manifest.leaves_of(name).values()}
    wanted |= set(manifest.attention_leaves().values())
    if wanted != set(manifest.leaves):
        odd = sorted(wanted ^ set(manifest.leaves))[0]
        raise CheckpointError(f"{where}: {odd}: the manifest's lists of tensors and of leaves differ.")


# ------------------------------------------------------------------------------------------- tensors


def arrays_of(name: str, leaf: Any) -> dict[str, Any]:
    """The arrays to store for one leaf of a parameter tree, by field.

    Raises:
        UnsupportedError: it isn't an array, or Orbax can't store its dtype.
    """
    if isinstance(leaf, QTensor):
        return {f: getattr(leaf, f) for f in FIELDS if getattr(leaf, f) is not None}
    if is_key(leaf):
        return {"": jax.random.key_data(leaf)}
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        raise UnsupportedError(f"{name}: expected an array, found {type(leaf).__name__} {leaf!r}; write jnp.asarray.")
    if str(leaf.dtype) in UNSTORABLE or leaf.dtype == object:
        raise UnsupportedError(f"{name}: Orbax can't store {leaf.dtype}; save it as uint8.")
    return {"": leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)}


def tensor_of(name: str, leaf: Any, parameter: str | None) -> Tensor:
    """The manifest's entry for one leaf of a parameter tree."""
    if isinstance(leaf, QTensor):
        return Tensor(kind="quantized", parameter=parameter, packing=_packing(name, leaf))
    if is_key(leaf):
        return Tensor(kind="key", parameter=parameter, impl=str(jax.random.key_impl(leaf)))
    return Tensor(kind="array", parameter=parameter)


def _packing(name: str, q: QTensor) -> Packing:
    f = q.format
    if f.name not in formats.names() or formats.get(f.name).with_block(f.block) != f:
        raise UnsupportedError(
            f"{name}: format {f.name!r} isn't one of jqopt's own ({', '.join(formats.names())}) with another block; a "
            "checkpoint names its format, and a reader wouldn't know this one."
        )
    return Packing(
        codes=CODES, **_facts(f), block=list(f.block) if isinstance(f.block, tuple) else f.block,
        granularity=q.granularity, dtype=q.dtype, leaves=list(arrays_of(name, q)), rotation=q.rotation,
        layout=LayoutData(**{k: list(getattr(q.layout, k)) for k in LayoutData.model_fields}),
    )  # fmt: skip


def _facts(f: Format) -> dict[str, Any]:
    """What a format's name stands for."""
    return {
        "format": f.name,
        "element": f.element.name,
        "bits": f.element.bits,
        "scale": f.scale.name,
        "global_scale": f.global_scale,
        "zero_point": f.zero_point,
        "then": "" if f.then is None else f.then.name,
    }


def tensor_from(name: str, tensor: Tensor, arrays: Mapping[str, Any]) -> Any:
    """The leaf of the parameter tree that these stored arrays make, by field.

    Raises:
        CheckpointError: a format or packing this jqopt doesn't know.
    """
    if tensor.kind == "key":
        return jax.random.wrap_key_data(arrays[""], impl=tensor.impl)
    if tensor.packing is None:
        return arrays[""]
    format, layout = unpacked(name, tensor.packing)
    return QTensor(
        **{**dict.fromkeys(FIELDS), **arrays}, format=format, granularity=tensor.packing.granularity, layout=layout,
        dtype=tensor.packing.dtype, rotation=tensor.packing.rotation,
    )  # fmt: skip


def unpacked(name: str, packing: Packing) -> tuple[Format, Layout]:
    """The format and layout of a quantized tensor, checked against what this jqopt means by the format's name.

    Raises:
        CheckpointError: an unknown format, a newer packing, or a name that means something else here.
    """
    if packing.codes > CODES:
        raise CheckpointError(f"{name}: packing version {packing.codes} is newer than {CODES}. Upgrade jqopt.")
    try:
        format = formats.get(packing.format).with_block(packing.block)
        layout = Layout(**{k: tuple(v) for k, v in packing.layout.model_dump().items()})
        np.dtype(packing.dtype)
    except (UnsupportedError, TypeError) as e:
        raise CheckpointError(f"{name}: this jqopt can't read the tensor: {e}") from None
    for fact, here in _facts(format).items():
        if getattr(packing, fact) != here:
            raise CheckpointError(
                f"{name}: the checkpoint's {packing.format!r} has {fact} {getattr(packing, fact)!r}, but this jqopt's "
                f"has {here!r}."
            )
    if not {"data", "scale"} <= set(packing.leaves) <= set(FIELDS):
        raise CheckpointError(f"{name}: a quantized tensor can't have the leaves {packing.leaves}.")
    return format, layout


def digest(x: Any) -> str:
    """sha256 of an array's bytes in row-major order."""
    if isinstance(x, jax.Array):  # a new Array of the same buffers: the old one doesn't keep the host's copy
        shards = [s.data for s in x.addressable_shards]
        x = np.asarray(jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards))
    return hashlib.sha256(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data).hexdigest()


def writer() -> str:
    """The version of jqopt that writes."""
    try:
        return importlib.metadata.version("jqopt")
    except importlib.metadata.PackageNotFoundError:
        return "source tree"
