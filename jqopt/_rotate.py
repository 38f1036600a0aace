"""Rotations of parameter trees: axis classes times orthogonal matrices, folded into the weights that hold them.

The float function stays the same; outliers of single channels are spread over all of them. Sources: QuaRot
(arXiv 2404.00456), SpinQuant (arXiv 2405.16406).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jqopt import _hadamard, _leaves
from jqopt._trace import Graph
from jqopt.analysis.classes import AxisClass
from jqopt.analysis.fold_search import Program
from jqopt.analysis.rotations import Rotatable, rotatable
from jqopt.analysis.turns import Labels, positions
from jqopt.errors import PlanError

_CHUNK = 2**22  # elements that are turned at a time in float64

Matrices = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """An orthogonal matrix, by which rows are multiplied: blocks of `signs` and Hadamard, or any `matrix`."""

    size: int
    block: int = 1
    signs: np.ndarray | None = None
    keep_mean: bool = False
    matrix: Any = None

    def rows(self, x: np.ndarray) -> np.ndarray:
        """x [..., size] times the matrix, in float64."""
        if self.signs is None:
            return x @ np.asarray(self.matrix, np.float64)
        if not self.keep_mean:
            return _hadamard.host(x * self.signs, self.block)
        # With its first column made positive the Hadamard matrix N has a mean for its first coordinate: in
        # N signs N^T the ones stay as they are, because the first sign of each block is +1.
        first = np.tile(np.sign(_hadamard.host(np.eye(1, self.block), self.block)[0]), self.size // self.block)
        return _hadamard.host(_hadamard.host(x * first, self.block) * self.signs, self.block) * first

    @property
    def whole(self) -> np.ndarray:
        """The matrix [size, size] in float32."""
        return self.rows(np.eye(self.size)).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Rotation:
    """A function `params -> params` that multiplies axis classes by orthogonal matrices: the model stays the same.

    Weights are turned in float64 and rounded to their own type once. Under `jax.jit` and other transformations they are
    turned in float32, and gains that must be constant, which can't be looked at there, are taken to be so.
    """

    graph: Graph = dataclasses.field(repr=False)
    classes: tuple[str, ...]  # those that turn
    left: Mapping[str, str]  # classes of the same kind that don't -> why
    found: tuple[Rotatable, ...] = dataclasses.field(repr=False)
    turns: tuple[Turn, ...] = dataclasses.field(repr=False)

    @property
    def matrices(self) -> dict[str, np.ndarray]:
        """The matrix of each class, [size, size] in float32."""
        return {name: turn.whole for name, turn in zip(self.classes, self.turns)}

    @property
    def turned(self) -> dict[str, tuple[int, ...]]:
        """The leaves that change, with the axes along which they do."""
        out: dict[str, tuple[int, ...]] = {}
        for found in self.found:
            for path, axes in found.turned.items():
                out[path] = tuple(sorted({*out.get(path, ()), *axes}))
        return out

    def __call__(self, params: Any) -> Any:
        return _leaves.change(self.graph, params, self._new)

    def with_matrices(self, matrices: Matrices) -> Rotation:
        """The same with other matrices, {class: [size, size]}, which may be traced.

        They are taken as they are: orthogonal, and under `keep_mean` with rows that sum to 1.
        """
        turns = tuple(
            Turn(t.size, matrix=matrices[name]) if name in matrices else t for name, t in zip(self.classes, self.turns)
        )
        return dataclasses.replace(self, turns=turns)

    def _new(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for found in self.found:
            for path, axes in found.constant.items():
                self._check(found, path, axes, leaves[path])
        for path in self.turned:
            parts = [
                (axis, labels, turn)
                for found, turn in zip(self.found, self.turns)
                for axis, labels in found.turned.get(path, {}).items()
            ]
            out[path] = _turned(leaves[path], parts)
        return out

    def _check(self, found: Rotatable, path: str, axes: Sequence[int], leaf: Any) -> None:
        if isinstance(leaf, Tracer):
            return
        gain = np.asarray(leaf)
        for axis in axes:
            if (gain != gain.take([0], axis)).any():
                raise PlanError(
                    f"{found.name} can't be rotated with these parameters: {path} multiplies it, and its entries "
                    f"aren't the same along axis {axis}. Fold the gains into the weights first: "
                    "params = transforms.fold_norms(graph)(params). fold_norms(graph).left says which stay and why: "
                    "a head that shares the embedding's table needs one of its own (jqopt.hf.llama.untie)"
                )


def _turned(leaf: Any, parts: Sequence[tuple[int, Labels, Turn]]) -> Any:
    matrices = [t.matrix for _, _, t in parts]
    if any(isinstance(x, Tracer) for x in (leaf, *matrices)):
        return _traced(leaf, parts)
    host = np.asarray(leaf)
    if len(parts) == 1:
        return _like(leaf, _along(host, *parts[0], host.dtype))
    wide = host.astype(np.float64)
    for part in parts:
        wide = _along(wide, *part, np.dtype(np.float64))
    return _like(leaf, wide.astype(host.dtype))


def _like(leaf: Any, found: np.ndarray) -> Any:
    if isinstance(leaf, np.ndarray):
        return found
    return jax.device_put(found, leaf.sharding) if isinstance(leaf, jax.Array) else jnp.asarray(found)


def _along(leaf: np.ndarray, axis: int, labels: Labels, turn: Turn, dtype: np.dtype) -> np.ndarray:
    """The leaf turned along one axis, some rows at a time."""
    at = positions(labels, turn.size)
    last = np.moveaxis(leaf, axis, -1)
    rows = last.reshape(-1, labels.size).astype(dtype)  # a copy
    step = max(1, _CHUNK // labels.size)
    for i in range(0, len(rows), step):
        part = rows[i : i + step]
        part[:, at] = turn.rows(part[:, at].astype(np.float64)).astype(dtype)
    return np.ascontiguousarray(np.moveaxis(rows.reshape(last.shape), -1, axis))


def _traced(leaf: Any, parts: Sequence[tuple[int, Labels, Turn]]) -> jax.Array:
    wide = jnp.asarray(leaf).astype(jnp.float32)
    for axis, labels, turn in parts:
        at = positions(labels, turn.size)
        matrix = jnp.asarray(turn.whole if turn.signs is not None else turn.matrix).astype(jnp.float32)
        last = jnp.moveaxis(wide, axis, -1)
        new = jnp.matmul(last[..., at], matrix, precision="highest")
        wide = jnp.moveaxis(last.at[..., at].set(new), -1, axis)
    return wide.astype(leaf.dtype)


# ------------------------------------------------------------------------------------------- the transforms


def rotate_residual(graph: Graph, seed: int = 0, *, block: int | None = None, keep_mean: bool = False) -> Rotation:
    """R1: turns every residual stream by signs times a Hadamard matrix, folded into the weights around it.

    Fold the norms' gains first: `fold_norms(graph)(params)`.

    Args:
        seed: of the signs; class number i takes seed + i.
        block: turns the stream in blocks of so many channels, for scales that belong to blocks (MXFP4: 32), or where
            there is no matrix of the whole size; None: the whole stream.
        keep_mean: the matrix leaves the mean over channels as it is, so that LayerNorms stay what they are.

    Raises:
        PlanError: no residual stream can be turned (the message says why, and where), or there is no such matrix.
    """
    return _all(graph, seed, block, keep_mean, "residual stream", lambda found: found.adds)


def rotate_values(graph: Graph, seed: int = 0, *, block: int | None = None) -> Rotation:
    """R2: turns the width of attention's value heads, folded into the value and output projections.

    All heads of a layer get one matrix. Layers that a scan stacks do too.

    Args:
        seed, block: as in `rotate_residual`.

    Raises:
        PlanError: there are no value heads that can be turned, or there is no such matrix.
    """
    return _all(graph, seed, block, False, "width of value heads", lambda found: found.mixes and not found.adds)


def rotate(
    graph: Graph,
    classes: AxisClass | str | Sequence[AxisClass | str],
    seed: int = 0,
    *,
    block: int | None = None,
    keep_mean: bool = False,
    matrices: Matrices | None = None,
) -> Rotation:
    """Turns the axis classes that are named, whatever they are.

    Args:
        matrices: {class: orthogonal matrix [size, size]} in place of signs times Hadamard; x becomes `x @ matrix`.
        seed, block, keep_mean: as in `rotate_residual`.

    Raises:
        PlanError: a class can't be turned, there is no Hadamard matrix of the size, or a matrix isn't orthogonal.
        TraceError: there is no such class.
    """
    asked = [classes] if isinstance(classes, str | AxisClass) else list(classes)
    program = Program(graph.flow, {})
    names = list(dict.fromkeys(graph.class_of(c if isinstance(c, str) else c.name).name for c in asked))
    found = [rotatable(program, graph.axes, name, keep_mean) for name in names]
    for f in found:
        if f.reason:
            raise PlanError(f"{f.name} can't be rotated: {f.reason}")
    given = {k: _orthogonal(k, m, keep_mean) for k, m in _known(matrices or {}, names).items()}
    turns = [
        Turn(f.size, matrix=given[f.name]) if f.name in given else _hadamard_turn(f, seed + i, block, keep_mean)
        for i, f in enumerate(found)
    ]
    for f, turn in zip(found, turns):
        if turn.matrix is not None and np.shape(turn.matrix) != (f.size, f.size):
            raise PlanError(f"{f.name}: found a matrix {list(np.shape(turn.matrix))}, expected {[f.size, f.size]}")
    return Rotation(graph, tuple(names), {}, tuple(found), tuple(turns))


def _known(matrices: Matrices, names: Sequence[str]) -> Matrices:
    for name in matrices:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1) or names
            raise PlanError(f"matrices: {name!r} is none of the classes that turn; write {near[0]!r}")
    return matrices


def _orthogonal(name: str, matrix: Any, keep_mean: bool) -> np.ndarray:
    found = np.asarray(matrix, np.float64)
    if found.ndim == 2 and found.shape[0] == found.shape[1]:
        off = float(np.abs(found @ found.T - np.eye(len(found))).max())
        if not off < 1e-4:
            raise PlanError(f"{name}: the matrix isn't orthogonal: M @ M.T is off the unit matrix by {off:.2g}")
        sums = float(np.abs(found.sum(1) - 1).max())
        if keep_mean and not sums < 1e-4:
            raise PlanError(f"{name}: keep_mean needs a matrix whose rows sum to 1; they are off by {sums:.2g}")
    return found


def _hadamard_turn(found: Rotatable, seed: int, block: int | None, keep_mean: bool) -> Turn:
    size = found.size if block is None else block
    try:
        _hadamard.check(found.size, size)
    except PlanError as e:
        raise PlanError(f"{found.name}: {e}") from None
    signs = _hadamard.signs(found.size, seed)
    if keep_mean:
        signs[::size] = 1
    return Turn(found.size, size, signs, keep_mean)


def _all(
    graph: Graph, seed: int, block: int | None, keep_mean: bool, what: str, wanted: Callable[[Rotatable], bool]
) -> Rotation:
    program = Program(graph.flow, {})
    able = (rotatable(program, graph.axes, c.name, keep_mean) for c in graph.classes if c.size > 1)
    found = [f for f in able if wanted(f)]
    chosen = [f for f in found if not f.reason]
    left = {f.name: f.reason for f in found if f.reason}
    if not chosen:
        few = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3])
        raise PlanError(
            f"{graph.function.name} has no {what} that can be rotated: "
            + (few or f"none of its {len(graph.classes)} axis classes is one")
        )
    turns = tuple(_hadamard_turn(f, seed + i, block, keep_mean) for i, f in enumerate(chosen))
    return Rotation(graph, tuple(f.name for f in chosen), left, tuple(chosen), turns)
