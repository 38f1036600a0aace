"""The parameters of a quantized model, one at a time: of a model in memory, or of a checkpoint that stays on disk."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any, Protocol

import jax
import numpy as np

from jqopt._apply import is_qtensor
from jqopt._plan import Plan
from jqopt._qtensor import Layout, QTensor
from jqopt.export import manifest as _manifest
from jqopt.export.checkpoint import Checkpoint
from jqopt.formats import Format


@dataclasses.dataclass(frozen=True)
class Packed:
    """What is known of a packed parameter without reading it; `leaves` are the arrays it has."""

    format: Format
    granularity: str
    layout: Layout
    rotation: int
    leaves: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One leaf of the tree: shape and dtype, and its packing."""

    shape: tuple[int, ...]
    dtype: str
    packed: Packed | None


Scales = dict[str, dict[str, np.ndarray]]
"""{attention: {"k_scale": [*layers], ...}}"""


class Parameters(Protocol):
    """`leaves` by parameter path; `rest` names other state; the plan, attention's scales; arrays are read singly."""

    leaves: dict[str, Parameter]
    rest: tuple[str, ...]
    plan: Plan
    attention: Scales

    def read(self, path: str, leaf: str = "") -> np.ndarray:
        """An array of a parameter: a leaf of a packed one, or "" for a plain one."""
        ...

    def fingerprint(self) -> str:
        """sha256 of all that is read: equal fingerprints give equal exports."""
        ...


class InMemory:
    """The parameters of a QuantizedModel."""

    def __init__(self, qm: Any):
        flat, _ = jax.tree_util.tree_flatten_with_path(qm.params, is_leaf=is_qtensor)
        paths = [(qm.plan.function.path_of(key), jax.tree_util.keystr(key), leaf) for key, leaf in flat]
        self._arrays = {path: leaf for path, _, leaf in paths if path is not None}
        self.rest = tuple(name for path, name, _ in paths if path is None)
        self.plan: Plan = qm.plan
        self.leaves: dict[str, Parameter] = {path: _described(leaf) for path, leaf in self._arrays.items()}
        self.attention: Scales = {k: {f: np.asarray(x) for f, x in s.items()} for k, s in qm.quant.attention.items()}

    def read(self, path: str, leaf: str = "") -> np.ndarray:
        found = self._arrays[path]
        return np.asarray(getattr(found, leaf) if leaf else found)

    def fingerprint(self) -> str:
        parts = (
            f"{path}/{leaf} {_manifest.digest(self.read(path, leaf))}"
            for path, p in self.leaves.items()
            for leaf in (p.packed.leaves if p.packed is not None else ("",))
        )
        scales = (f"{k}/{f} {_manifest.digest(x)}" for k, s in self.attention.items() for f, x in s.items())
        return _hashed((*parts, *scales))


class OnDisk:
    """The parameters of a checkpoint; each array is read, and compared with its sha256, when it is asked for."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint, found = checkpoint, checkpoint.manifest
        self._names = {t.parameter: name for name, t in found.tensors.items() if t.parameter is not None}
        self.rest = tuple(name for name, t in found.tensors.items() if t.parameter is None)
        self.plan = checkpoint.plan()
        self.leaves: dict[str, Parameter] = {path: _of_manifest(name, found) for path, name in self._names.items()}
        self.attention: Scales = {
            k: {f: np.asarray(x) for f, x in s.items()} for k, s in checkpoint.attention().items()
        }

    def read(self, path: str, leaf: str = "") -> np.ndarray:
        name = self._names[path]
        return self._checkpoint.array(f"{name}/{leaf}" if leaf else name)

    def fingerprint(self) -> str:
        return _hashed(f"{name} {leaf.sha256}" for name, leaf in self._checkpoint.manifest.leaves.items())


def _described(leaf: Any) -> Parameter:
    if not isinstance(leaf, QTensor):
        return Parameter(tuple(leaf.shape), str(leaf.dtype), None)
    has = tuple(f for f in _manifest.FIELDS if getattr(leaf, f) is not None)
    packed = Packed(leaf.format, leaf.granularity, leaf.layout, leaf.rotation, has)
    return Parameter(tuple(leaf.shape), leaf.dtype, packed)


def _of_manifest(name: str, found: _manifest.Manifest) -> Parameter:
    packing = found.tensors[name].packing
    if packing is None:
        return Parameter(tuple(found.leaves[name].shape), found.leaves[name].dtype, None)
    format, layout = _manifest.unpacked(name, packing)
    packed = Packed(format, packing.granularity, layout, packing.rotation, tuple(packing.leaves))
    return Parameter(layout.shape, packing.dtype, packed)


def _hashed(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
