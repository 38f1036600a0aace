"""Tensors of anyone's Flax model as an export sees them: which parts of which parameters they are, by a name map."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jqopt.errors import UnsupportedError
from jqopt.export.parameters import Packed, Parameter, Parameters
from jqopt.hf.families import Place
from jqopt.hf.folder import Identity
from jqopt.hf.names import Mapped, NameMap, Piece, Source

OWN = {"data": 2, "scale": 2, "zero_point": 2, "pre_scale": 1, "global_scale": 0, "input_scale": 0}
"""The axes that each leaf of a packed parameter has for one matrix."""

BY_ROW = ("data", "scale", "zero_point")


class Cut(NamedTuple):
    """One tensor within a parameter; `source`: where it lies in the matrices of a packed one."""

    mapped: Mapped
    piece: Piece
    source: Source | None

    def floats(self, x: np.ndarray) -> np.ndarray:
        """The tensor, of the whole parameter."""
        part = self.mapped.rule.pattern.view(np.ascontiguousarray(x), self.mapped.sizes, self.piece.at)
        return part.reshape(self.piece.shape)

    def leaf(self, x: np.ndarray, leaf: str, packed: Packed) -> np.ndarray:
        """A packed leaf of the tensor's matrix, of the whole parameter's [*stack, ...].

        Raises:
            UnsupportedError: the tensor ends within a tile of rows that share a scale.
        """
        assert self.source is not None
        found = x[self.source.stack[: x.ndim - OWN[leaf]]]
        if leaf not in BY_ROW or found.shape[0] == 1:
            return found
        rows = self.source.rows
        if found.shape[0] == packed.layout.n:
            return found if len(rows) == len(found) and (np.diff(rows) == 1).all() else found[rows]
        tile = packed.format.tile_for(packed.layout.n, packed.layout.k, packed.granularity)[0]
        whole = (len(rows) % tile == 0 or rows[-1] + 1 == packed.layout.n) and rows[0] % tile == 0
        if not whole or not (np.diff(rows) == 1).all():
            raise UnsupportedError(
                f"{self.mapped.path}: {self.piece.tensor} is rows {rows[0]} to {rows[-1]} of a matrix whose scales are "
                f"of {tile} rows each; quantize it with a scale a row, or keep it"
            )
        return found[rows[0] // tile : rows[-1] // tile + 1]


def places_of(model: Identity, names: NameMap, leaves: Mapping[str, Parameter]) -> list[tuple[Place, Cut]]:
    """Every tensor of the model's folder, and where it is in these parameters.

    Raises:
        UnsupportedError: the map and the parameters don't fit, or its tensors aren't those of the folder's model.
    """
    mapped = names.mapped({path: leaf.shape for path, leaf in leaves.items()})
    linear = {t: p.transpose for p in model.family.places(model.parsed, False) for t in p.tensors}
    found = {piece.tensor for m in mapped for piece in m.pieces}
    if found != set(linear):
        missing, extra = sorted(set(linear) - found), sorted(found - set(linear))
        raise UnsupportedError(
            f"the name map's tensors aren't those of the {model.family.name!r} model in {model.folder}. Missing: "
            f"{', '.join(missing[:4]) or 'none'}; unexpected: {', '.join(extra[:4]) or 'none'}"
        )
    return [
        (Place(m.path, (piece.tensor,), linear[piece.tensor]), Cut(m, piece, source))
        for m in mapped
        for piece, source in zip(m.pieces, _sources(m, leaves[m.path].packed), strict=True)
    ]


def _sources(m: Mapped, packed: Packed | None) -> tuple[Source | None, ...]:
    if packed is None:
        return (None,) * len(m.pieces)
    found = m.sources(packed.layout)
    for source in found:
        if not (source.cols == np.arange(packed.layout.k)).all():
            raise UnsupportedError(
                f"{m.path}: the inputs of {source.tensor} stand in another order in the packed weight "
                f"({m.rule.axes!r}, packed as {packed.layout}), so that its blocks are none of the tensor's. Keep it, "
                "or store the parameter with its contracted axes in the tensor's order."
            )
    return found


class LastRead:
    """Parameters that remember the arrays of the one that was read last: its tensors are taken out one by one."""

    def __init__(self, params: Parameters, names: NameMap):
        self._params, self._names = params, names
        self._path, self._held = "", dict[str, np.ndarray]()
        self.leaves, self.rest, self.plan, self.attention = params.leaves, params.rest, params.plan, params.attention

    def read(self, path: str, leaf: str = "") -> np.ndarray:
        if path != self._path:
            self._path, self._held = path, {}
        if leaf not in self._held:
            self._held[leaf] = self._params.read(path, leaf)
        return self._held[leaf]

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._params.fingerprint()} {self._names!r}".encode()).hexdigest()


def shape_of(place: Place, parameter: Parameter, cut: Cut | None) -> tuple[int, ...]:
    """The shape of an unquantized tensor."""
    if cut is not None:
        return cut.piece.shape
    shape: Any = parameter.shape[len(place.stack) :]
    return (*shape[:-2], shape[-1], shape[-2]) if place.transpose else shape


def rank_of(place: Place, parameter: Parameter, cut: Cut | None) -> int:
    """How many axes each tensor has."""
    return len(shape_of(place, parameter, cut))
