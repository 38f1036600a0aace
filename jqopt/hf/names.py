"""A name map: how the parameters of anyone's Flax model and the tensors of a Hugging Face folder belong together.

It is data, read in both directions, and checked: every parameter is mapped once, and every tensor is used.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jqopt._qtensor import Layout
from jqopt.errors import CheckpointError, UnsupportedError
from jqopt.hf.axes import Pattern, parse
from jqopt.hf.safetensors import Entry, open_folder


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of parameter and the tensors that it is made of.

    Attributes:
        path: of the parameter, with `{name}` for numbers: `layers/{layer}/attn/q_proj/w`.
        tensor: name of the tensor, with the same `{name}`s, and those of axes that only the parameter has (a stacked
            parameter's `{layer}`). Several names: parts of a fused parameter.
        axes: from the tensor's axes to the parameter's, as `jqopt.hf.axes` reads it: "(n h) d -> d n h".
        join: of fused parameters: the name of the axis along which the tensors lie one after another. None: `part` is
            an axis of the parameter, of one index a tensor.
        parts: their sizes along `join`: numbers, or names of `sizes`.
        optional: may match no parameter (the head of a model that may be tied).
    """

    path: str
    tensor: str | tuple[str, ...]
    axes: str
    join: str | None = None
    parts: tuple[str | int, ...] = ()
    optional: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.tensor,) if isinstance(self.tensor, str) else self.tensor

    @property
    def pattern(self) -> Pattern:
        return parse(self.axes)


class Piece(NamedTuple):
    """One tensor within a parameter: its name and shape, and where it lies along stacked and joined names."""

    tensor: str
    shape: tuple[int, ...]
    at: Mapping[str, slice]


class Source(NamedTuple):
    """One tensor [out, in] within a parameter whose matrices are [*stack, n, k], as packed weights hold them.

    `stack`: which of the matrices. `rows` [out]: in which row of it each row of the tensor lies; `cols` [in] likewise.
    """

    tensor: str
    stack: tuple[int, ...]
    rows: np.ndarray
    cols: np.ndarray


@dataclasses.dataclass(frozen=True)
class Mapped:
    """A parameter with its rule, the sizes of its axes' names, and its tensors."""

    path: str
    shape: tuple[int, ...]
    rule: Rule
    sizes: Mapping[str, int]
    pieces: tuple[Piece, ...]

    def sources(self, layout: Layout) -> tuple[Source, ...]:
        """Where the rows and columns of each tensor [out, in] lie in the matrices of a packed weight.

        Raises:
            UnsupportedError: the tensor isn't a matrix, or its rows aren't the packed matrices' rows: blocks of packed
                weights run along the contraction, which has to be the tensor's `in` axis.
        """
        return tuple(self._source(piece, layout) for piece in self.pieces)

    def _source(self, piece: Piece, layout: Layout) -> Source:
        if len(piece.shape) != 2:
            raise UnsupportedError(f"{self.path}: {piece.tensor} has shape {list(piece.shape)}; expected [out, in]")
        flat = [self.rule.pattern.places(self.sizes, piece.at, axis, piece.shape[axis]) for axis in (0, 1)]
        rows, cols = (_matrix_places(layout, places) for places in flat)
        if any(np.ptp(x) for x in (rows[0], cols[0], rows[2], cols[1])):
            raise UnsupportedError(
                f"{self.path}: contracts other axes than the rows of {piece.tensor} hold: the weight is packed as "
                f"[{layout.n}, {layout.k}] matrices, and {self.rule.axes!r} spreads the tensor otherwise over them"
            )
        stack = [layout.atoms[i] for i in layout.stack]
        index = np.unravel_index(int(rows[0][0]), stack) if stack else ()
        return Source(piece.tensor, tuple(int(i) for i in index), rows[1], cols[2])


def _matrix_places(layout: Layout, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(matrix, row, column) of flat places in a parameter."""
    index = np.unravel_index(flat, layout.atoms)

    def joined(atoms: tuple[int, ...]) -> np.ndarray:
        out = np.zeros(len(flat), np.int64)
        for i in atoms:
            out = out * layout.atoms[i] + index[i]
        return out

    return joined(layout.stack), joined(layout.rows), joined(layout.cols)


@dataclasses.dataclass(frozen=True)
class NameMap:
    """Rules, and the sizes that patterns name: `NameMap((Rule(...), ...), sizes={"h": 128})`.

    `copies`: tensors that a folder may hold besides, to the ones they must equal (a tied head). `ignored`: endings of
    tensors that hold no parameter.
    """

    rules: tuple[Rule, ...]
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)

    def mapped(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Mapped, ...]:
        """Every parameter with its tensors.

        Args:
            shapes: of all parameters, by path.

        Raises:
            UnsupportedError: a parameter that no rule names, or two do; a rule that names none; a shape that its
                pattern does not give.
        """
        used: set[Rule] = set()
        found = []
        for path, shape in shapes.items():
            fits = [(rule, numbers) for rule in self.rules if (numbers := _matched(rule.path, path)) is not None]
            if len(fits) != 1:
                raise UnsupportedError(self._unmapped(path, [rule for rule, _ in fits]))
            rule, numbers = fits[0]
            used.add(rule)
            found.append(self._mapped(path, tuple(shape), rule, numbers))
        idle = next((rule for rule in self.rules if rule not in used and not rule.optional), None)
        if idle is not None:
            near = difflib.get_close_matches(idle.path, shapes, 1, 0)
            raise UnsupportedError(
                f"the rule for {idle.path!r} names no parameter of the model; the nearest is "
                f"{near[0] if near else None!r}"
            )
        _once(found)
        return tuple(found)

    def _unmapped(self, path: str, fits: Sequence[Rule]) -> str:
        if fits:
            return f"{path}: two rules name it, {fits[0].path!r} and {fits[1].path!r}; a parameter is mapped once"
        near = difflib.get_close_matches(path, [rule.path for rule in self.rules], 1, 0)
        return f"{path}: no rule of the name map names this parameter; the nearest is {near[0] if near else None!r}"

    def _mapped(self, path: str, shape: tuple[int, ...], rule: Rule, numbers: Mapping[str, str]) -> Mapped:
        known = {name: size for name, size in self.sizes.items() if name != rule.join}
        if rule.join is None and len(rule.tensors) > 1:
            known["part"] = len(rule.tensors)
        try:
            sizes = rule.pattern.sizes(shape, known)
            return Mapped(path, shape, rule, sizes, tuple(self._pieces(rule, sizes, numbers)))
        except UnsupportedError as error:
            raise UnsupportedError(f"{path}: {error}") from None

    def _pieces(self, rule: Rule, sizes: Mapping[str, int], numbers: Mapping[str, str]) -> Iterator[Piece]:
        stacked = [n for n in rule.pattern.stacked if n != "part"]
        parts = [self.sizes[p] if isinstance(p, str) else p for p in rule.parts]
        if rule.join is not None and (len(parts) != len(rule.tensors) or sum(parts) != sizes[rule.join]):
            raise UnsupportedError(
                f"parts {parts} of {len(rule.tensors)} tensors do not fill {rule.join!r} of size {sizes[rule.join]}"
            )
        for index in itertools.product(*(range(sizes[n]) for n in stacked)):
            at = {n: slice(i, i + 1) for n, i in zip(stacked, index, strict=True)}
            named = {**numbers, **{n: str(i) for n, i in zip(stacked, index, strict=True)}}
            for number, tensor in enumerate(rule.tensors):
                where, own = dict(at), dict(sizes)
                if rule.join is not None:
                    start = sum(parts[:number])
                    where[rule.join], own[rule.join] = slice(start, start + parts[number]), parts[number]
                elif len(rule.tensors) > 1:
                    where["part"] = slice(number, number + 1)
                yield Piece(_filled(tensor, named), rule.pattern.tensor_shape(own), where)

    # ------------------------------------------------------------------------------------------- both ways

    def load(self, params: Any, folder: str | Path, *, dtype: Any = None) -> Any:
        """The parameters of a folder in a tree like `params`, read tensor by tensor.

        Args:
            params: arrays or shapes: a Linen tree, or `nnx.state(model, nnx.Param)`.
            dtype: of the arrays; default that of `params`.

        Raises:
            UnsupportedError: as `mapped`; quantized tensors.
            CheckpointError: a tensor is missing, unused, or of another shape.
        """
        leaves, treedef = _leaves(params)
        mapped = self.mapped({path: tuple(leaf.shape) for path, leaf in leaves})
        entries = open_folder(Path(folder))
        self._check_used(Path(folder), mapped, entries)
        arrays = [_read(m, entries, dtype or leaf.dtype) for m, (_, leaf) in zip(mapped, leaves, strict=True)]
        return jax.tree.unflatten(treedef, arrays)

    def _check_used(self, folder: Path, mapped: Sequence[Mapped], entries: Mapping[str, Entry]) -> None:
        wanted = [piece.tensor for m in mapped for piece in m.pieces]
        missing = next((name for name in wanted if name not in entries), None)
        spare = [n for n in entries if n not in {*wanted, *self.copies} and not n.endswith(self.ignored)]
        faults = (
            (missing, [*spare, *entries], "asked for by the name map, is missing"),
            (next(iter(spare), None), wanted, "is used by no rule of the name map"),
        )
        for name, others, fault in faults:
            if name is not None:
                near = difflib.get_close_matches(name, others, 1, 0)
                raise CheckpointError(f"{folder}: {name} {fault}; the nearest is {near[0] if near else None!r}")
        for copy, original in self.copies.items():
            if copy in entries and not np.array_equal(entries[copy].read(), entries[original].read()):
                raise CheckpointError(f"{folder}: {copy} differs from {original}, which it should be a copy of")

    def tensors(self, params: Any) -> Iterator[tuple[str, np.ndarray]]:
        """(name, tensor) of everything that a Hugging Face folder of these parameters holds, one after another.

        Raises:
            UnsupportedError: as `mapped`.
        """
        leaves, _ = _leaves(params)
        mapped = self.mapped({path: tuple(leaf.shape) for path, leaf in leaves})
        for m, (_, leaf) in zip(mapped, leaves, strict=True):
            array = np.ascontiguousarray(leaf)
            for piece in m.pieces:
                part = m.rule.pattern.view(array, m.sizes, piece.at)
                yield piece.tensor, np.ascontiguousarray(part).reshape(piece.shape)


def _read(m: Mapped, entries: Mapping[str, Entry], dtype: Any) -> jax.Array:
    filled = np.empty(m.shape, jnp.dtype(dtype))
    for piece in m.pieces:
        entry = entries[piece.tensor]
        if entry.shape != piece.shape:
            raise CheckpointError(
                f"{entry.file}: {entry.name} has shape {list(entry.shape)}; {m.path} of shape {list(m.shape)} with "
                f"{m.rule.axes!r} asks for {list(piece.shape)}"
            )
        if not jnp.issubdtype(entry.dtype, jnp.floating) or entry.dtype.itemsize < 2:
            raise UnsupportedError(
                f"{entry.file}: {entry.name} is stored as {entry.dtype}; expected unquantized floats"
            )
        part = m.rule.pattern.view(filled, m.sizes, piece.at)
        part[...] = entry.read().reshape(part.shape)
    return jnp.asarray(filled)


def _once(found: Sequence[Mapped]) -> None:
    seen: dict[str, str] = {}
    for m in found:
        for piece in m.pieces:
            if piece.tensor in seen:
                raise UnsupportedError(
                    f"{m.path}: {piece.tensor} is also what {seen[piece.tensor]} is made of; a tensor is used once"
                )
            seen[piece.tensor] = m.path


def _leaves(params: Any) -> tuple[list[tuple[str, Any]], Any]:
    """([(path, array)], treedef); the box of an NNX variable is no part of the path."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    boxed = jax.tree_util.GetAttrKey

    def path(key: tuple) -> str:
        return jax.tree_util.keystr(key[:-1] if key and isinstance(key[-1], boxed) else key, simple=True, separator="/")

    return [(path(key), leaf) for key, leaf in flat], treedef


def _matched(pattern: str, path: str) -> dict[str, str] | None:
    """The numbers of a path that a rule names; None where it names another."""
    parts = re.split(r"\{(\w+)\}", pattern)
    text = "".join(f"(?P<{p}>[0-9]+)" if i % 2 else re.escape(p) for i, p in enumerate(parts))
    match = re.fullmatch(text, path)
    return None if match is None else match.groupdict()


def _filled(tensor: str, numbers: Mapping[str, str]) -> str:
    try:
        return tensor.format(**numbers)
    except KeyError as error:
        raise UnsupportedError(
            f"tensor {tensor!r} has {{{error.args[0]}}}, which neither the path has nor the axes that only the "
            "parameter has"
        ) from None
