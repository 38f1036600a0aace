"""An opened checkpoint: its manifest, and leaves that are read with target shardings and verified one by one."""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from jqopt import _attention_ops, _plan
from jqopt._apply import check_params
from jqopt._plan import Plan
from jqopt.errors import CheckpointError, JqoptError, PlanError, UnsupportedError
from jqopt.export import manifest as _manifest
from jqopt.export.inputs import call_of
from jqopt.export.manifest import Leaf, Manifest
from jqopt.export.tree import Parts, describe, fill, parts_of, rebuild

METADATA = "_CHECKPOINT_METADATA"
"""The file at a checkpoint's root that holds the manifest; every Orbax checkpoint has one."""

WIDE = ("int64", "uint64", "float64", "complex128")
"""Dtypes that JAX has only with jax_enable_x64; else it casts without a word."""

IN_FLIGHT = 1 << 30
"""Bytes that may be on their way between devices and disk."""

CHUNK = 1 << 25
"""Larger arrays are stored in pieces of this many bytes: a reader unpacks piece by piece, and never a whole array."""

PathLike = str | os.PathLike[str]
Shardings = Any
"""One Sharding; a tree of Shardings like the parameters; or a function of (path, leaf, ShapeDtypeStruct)."""


def local(directory: PathLike) -> pathlib.Path:
    """The absolute path of a local folder.

    Raises:
        UnsupportedError: it is a URL.
    """
    if "://" in os.fspath(directory):
        raise UnsupportedError(f"{directory}: checkpoints are written to and read from local folders; copy it there.")
    return pathlib.Path(directory).absolute()


def prefix_of(kind: str) -> Parts:
    """What stands before the names of a tree that has no collections of its own."""
    return ("params",) if kind == "function" else ()


def context(sizes: Iterable[int]) -> ocp.Context:
    """Orbax's settings for reading and writing leaves of these sizes (bytes).

    Not the caller's, which may cast dtypes or read in part. At most a gigabyte (or the largest leaf) is in flight, and
    host arrays aren't copied first: saving waits, so nobody changes them meanwhile.
    """
    made = ocp.Context()
    limit = max(IN_FLIGHT, *(size + 1 for size in sizes))  # a leaf that reaches the limit is an error to Orbax
    made.memory.write_concurrent_bytes = made.memory.read_concurrent_bytes = limit
    made.memory.transfer_concurrent_bytes = limit
    made.memory.deepcopy_host_arrays = False
    made.array.saving.storage_options.chunk_byte_size = CHUNK
    return made


class Checkpoint:
    """An opened checkpoint: its manifest, and the leaves that its storage says it has."""

    def __init__(self, directory: PathLike):
        """Reads the manifest and compares it with what is stored; no array yet.

        Raises:
            CheckpointError: there is no checkpoint, it is damaged or incomplete, or of a newer version.
        """
        self.directory = local(directory)
        if not (self.directory / METADATA).is_file():
            raise CheckpointError(f"{self.directory} is no checkpoint: it has no file {METADATA}.")
        try:
            with context([0]):
                found = ocp.metadata(str(self.directory))
            self.structure = found.metadata
        except Exception as e:
            raise CheckpointError(f"{self.directory}: Orbax can't read its metadata: {_short(e)}") from e
        self.manifest = _manifest.parse(found.custom_metadata, str(self.directory / METADATA))
        if self.structure is None:  # Orbax raises nothing here, but logs why
            raise CheckpointError(
                f"{self.directory}: Orbax can't read which arrays it holds: one of the files _METADATA, _sharding, "
                "manifest.ocdbt and d/* below state/ is damaged or gone; Orbax's log says which."
            )
        self._check_stored()

    def _check_stored(self) -> None:
        flat, _ = jax.tree_util.tree_flatten_with_path(self.structure)
        stored = {"/".join(parts_of(key)): leaf for key, leaf in flat}
        listed = {name: leaf for name, leaf in self.manifest.leaves.items() if leaf.size}
        for name in sorted(listed.keys() ^ stored.keys()):
            where = "listed in the manifest but not stored" if name in listed else "stored but not in the manifest"
            raise CheckpointError(f"{self.directory}: {name}: the array is {where}.")
        for name, leaf in listed.items():
            _same(name, leaf, stored[name])

    def check_kind(self, kind: str, model: str) -> None:
        """The model must be of the frontend that wrote the checkpoint."""
        words = {"linen": "a Flax Linen module", "nnx": "a Flax NNX module", "function": "a function"}
        if kind != self.manifest.kind:
            raise CheckpointError(
                f"{self.directory} holds {words[self.manifest.kind]} ({self.manifest.model}), but the model given is "
                f"{words[kind]} ({model})."
            )

    def plan(self, function: Any = None) -> Plan:
        """The plan the model was quantized with, for a model's function."""
        try:
            return _plan.from_dict(self.manifest.plan, function)
        except (JqoptError, KeyError, TypeError, ValueError) as e:
            raise CheckpointError(f"{self.directory}: this jqopt can't read the plan: {_short(e)}") from e

    def call(self) -> tuple[tuple, dict] | None:
        """(args, kwargs) that the model was traced with, as shapes, if they were saved."""
        return None if self.manifest.inputs is None else call_of(self.manifest.inputs)

    def shapes(self) -> dict[str, Any]:
        """{tensor name: ShapeDtypeStruct}, of the parameter that a packed tensor stands for."""
        return {name: _shape(name, self.manifest) for name in self.manifest.tensors}

    def tree(self, leaves: Mapping[str, Any], example: Any = None) -> Any:
        """The parameter tree with these leaves: like the example, or as it was saved.

        Raises:
            CheckpointError: the example has other names or shapes, or the tree can't be rebuilt without one.
        """
        if example is None:
            return rebuild(self.manifest.tree, leaves)
        return fill(example, prefix_of(self.manifest.kind), leaves)

    def check_params(self, plan: Plan, tree: Any) -> None:
        """The tree must be the plan's."""
        try:
            check_params(plan, tree)
        except PlanError as e:
            raise CheckpointError(f"{self.directory}: plan and parameters don't belong together: {e}") from e

    def load(self, names: Sequence[str], shardings: Shardings = None, verify: bool = True) -> dict[str, Any]:
        """{tensor name: QTensor, array or random key} for some of the manifest's tensors.

        Raises:
            CheckpointError: a leaf is missing, damaged, or of another dtype or shape than the manifest says.
            UnsupportedError: a sharding doesn't fit a leaf.
        """
        place = _placer(self.manifest, shardings)
        fields = {name: self.manifest.leaves_of(name) for name in names}
        wanted: dict[str, Any] = {}
        for name in names:
            if (packing := self.manifest.tensors[name].packing) is not None:
                _manifest.unpacked(name, packing)
            for field, leaf in fields[name].items():
                wanted[leaf] = _target(leaf, self.manifest.leaves[leaf], lambda s, n=name, f=field: place(n, f, s))
        arrays = self._read(wanted)
        for leaf, x in arrays.items():
            _check(leaf, self.manifest.leaves[leaf], x, verify)
        return {
            name: _manifest.tensor_from(name, self.manifest.tensors[name], {f: arrays[n] for f, n in of.items()})
            for name, of in fields.items()
        }

    def array(self, leaf: str, verify: bool = True) -> np.ndarray:
        """One stored array, on the host.

        Raises:
            CheckpointError: as `load`.
        """
        described = self.manifest.leaves[leaf]
        found = self._read({leaf: np.broadcast_to(np.zeros((), _dtype(leaf, described)), tuple(described.shape))})[leaf]
        _check(leaf, described, found, verify)
        return np.asarray(found)

    def attention(self, verify: bool = True) -> dict[str, dict[str, Any]]:
        """{attention: {name: array}}: the scales and biases of attention's operands, on no device in particular.

        Raises:
            CheckpointError: as `load`.
        """
        leaves = self.manifest.attention_leaves()
        described = {leaf: self.manifest.leaves[leaf] for leaf in leaves.values()}
        arrays = self._read({n: np.broadcast_to(np.zeros((), _dtype(n, d)), d.shape) for n, d in described.items()})
        out: dict[str, dict[str, Any]] = {}
        for (key, field), leaf in leaves.items():
            _check(leaf, described[leaf], arrays[leaf], verify)
            out.setdefault(key, {})[field] = jnp.asarray(arrays[leaf])
        return out

    def check_attention(self, plan: Plan, scales: Mapping[str, Any]) -> None:
        """The scales must be the plan's."""
        try:
            _attention_ops.check_scales(plan.attention, scales)
        except PlanError as e:
            raise CheckpointError(f"{self.directory}: plan and scales of attention don't belong together: {e}") from e

    def _read(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """The stored arrays, and empty ones for those without bytes."""
        empty = {n: _empty(t) for n, t in wanted.items() if not math.prod(t.shape)}
        rest = {n: t for n, t in wanted.items() if n not in empty}
        try:
            return {**self._restore(rest), **empty}
        except Exception as e:
            for name, target in rest.items():
                with _naming(self.directory, name):
                    self._restore({name: target})
            raise CheckpointError(f"{self.directory}: Orbax can't read it: {_short(e)}") from e

    def _restore(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        if not wanted:
            return {}
        flat, treedef = jax.tree_util.tree_flatten_with_path(self.structure)
        names = ["/".join(parts_of(key)) for key, _ in flat]
        targets = treedef.unflatten([wanted.get(name, ocp.PLACEHOLDER) for name in names])
        with context(math.prod(t.shape) * t.dtype.itemsize for t in wanted.values()):
            loaded = jax.tree.leaves(ocp.load(str(self.directory), targets))
        return {name: x for name, x in zip(names, loaded, strict=True) if name in wanted}


def _shape(name: str, manifest: Manifest) -> jax.ShapeDtypeStruct:
    tensor = manifest.tensors[name]
    if tensor.packing is not None:
        _, layout = _manifest.unpacked(name, tensor.packing)
        return jax.ShapeDtypeStruct(layout.shape, np.dtype(tensor.packing.dtype))
    leaf = manifest.leaves[name]
    shape = jax.ShapeDtypeStruct(tuple(leaf.shape), _dtype(name, leaf))
    if tensor.kind == "key":
        return jax.eval_shape(lambda x: jax.random.wrap_key_data(x, impl=tensor.impl), shape)
    return shape


def _same(name: str, leaf: Leaf, found: Any) -> None:
    """What stands in the checkpoint must have the dtype and shape that the manifest says."""
    if (str(found.dtype), list(found.shape)) != (leaf.dtype, leaf.shape):
        raise CheckpointError(
            f"{name}: found {found.dtype}{list(found.shape)}, but the manifest says {leaf.dtype}{leaf.shape}."
        )


def _check(name: str, leaf: Leaf, x: Any, verify: bool) -> None:
    _same(name, leaf, x)
    if not verify:
        return
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        raise UnsupportedError(f"{name}: an array that spans several processes can't be verified; write verify=False.")
    if _manifest.digest(x) != leaf.sha256:
        raise CheckpointError(f"{name}: the bytes are damaged: their sha256 isn't the one they were saved with.")


def _target(name: str, leaf: Leaf, place: Callable[[Any], Any]) -> Any:
    """What Orbax is told to restore: an array of this dtype, shape and sharding."""
    dtype, shape = _dtype(name, leaf), tuple(leaf.shape)
    if leaf.host:
        return np.broadcast_to(np.zeros((), dtype), shape)
    if str(dtype) in WIDE and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise CheckpointError(f"{name}: it is {dtype}, which this JAX would cast: set jax_enable_x64 to load it.")
    plain = jax.ShapeDtypeStruct(shape, dtype)
    sharding = place(plain)
    try:
        sharding.shard_shape(shape)
    except ValueError as e:
        raise UnsupportedError(f"{name}: the sharding {sharding} doesn't fit {dtype}{list(shape)}: {e}") from None
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _dtype(name: str, leaf: Leaf) -> np.dtype:
    try:
        return np.dtype(leaf.dtype)
    except TypeError:
        raise CheckpointError(f"{name}: unknown dtype {leaf.dtype!r}") from None


def _empty(target: Any) -> Any:
    zeros = np.zeros(target.shape, target.dtype)
    return zeros if isinstance(target, np.ndarray) else jax.device_put(zeros, target.sharding)


def _placer(manifest: Manifest, shardings: Shardings) -> Callable[[str, str, Any], Any]:
    """(tensor name, field, shape) -> Sharding."""
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        return lambda name, field, shape: shardings
    if callable(shardings):
        return lambda name, field, shape: shardings(manifest.path_of(name), field, shape)
    _, found = describe(shardings, prefix_of(manifest.kind))
    by_name = {"/".join(parts): s for parts, s in found.items()}

    def place(name: str, field: str, shape: Any) -> Any:
        sharding = by_name.get(name)
        sharding = getattr(sharding, field, sharding) if field else sharding
        if not isinstance(sharding, jax.sharding.Sharding):
            raise UnsupportedError(
                f"{name}: `shardings` has no Sharding for its leaf {field!r}, found {sharding!r}. Give a tree like the "
                "parameters, for instance jax.tree.map(lambda x: x.sharding, qm.params), or a function."
            )
        return sharding

    return place


@contextlib.contextmanager
def _naming(directory: pathlib.Path, name: str):
    """Turns what Orbax raises into an error that names the leaf."""
    try:
        yield
    except Exception as e:
        raise CheckpointError(f"{directory}: {name}: Orbax can't read the array: {_short(e)}") from e


def _short(e: Exception, most: int = 300) -> str:
    text = " ".join(f"{type(e).__name__}: {e}".partition(" See full TensorStore details")[0].split())
    return text if len(text) <= most else text[:most] + "..."
