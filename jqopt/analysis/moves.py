"""Moves: which positions of which parameters remain, and in what order, when an axis class is pruned or permuted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jqopt.analysis.axes import find, leaves, select
from jqopt.analysis.classes import AxisClass, AxisGraph
from jqopt.errors import PlanError

Moves = Mapping[str, Mapping[int, np.ndarray]]
"""{leaf of the tree: {axis: positions to take, in order}}."""


def moves(graph: AxisGraph, chosen: Mapping[str, np.ndarray]) -> Moves:
    """What taking the positions `chosen` of classes, by their names, means for every leaf that holds them."""
    taken = {find(graph.leaf_of[name]): positions for name, positions in chosen.items()}
    out: dict[str, dict[int, np.ndarray]] = {}
    for symbol in graph.symbols:
        node = graph.nodes[symbol.name]
        if any(leaf in taken for leaf in leaves(node)):
            out.setdefault(symbol.path, {})[symbol.axis] = select(node, taken.get)
    return out


def checked_keep(cls: AxisClass, keep: Sequence[int] | np.ndarray) -> np.ndarray:
    """`keep` as sorted positions of the class.

    Raises:
        PlanError: the class is pinned; `keep` is empty, repeats a position, or names one that isn't there.
    """
    if cls.pinned is not None:
        raise PlanError(f"{cls.name} can't be pruned: {cls.pinned}")
    given = np.asarray(keep)
    found = _positions(cls, np.flatnonzero(given) if given.dtype == bool and given.shape == (cls.size,) else given)
    if found.size == 0:
        raise PlanError(f"{cls.name}: nothing is kept of its {cls.size} positions; name at least one")
    return np.sort(found)


def checked_order(cls: AxisClass, order: Sequence[int] | np.ndarray) -> np.ndarray:
    """`order` as a permutation of the class.

    Raises:
        PlanError: the class is pinned or its order matters; `order` is no permutation.
    """
    if not cls.permutable:
        raise PlanError(f"{cls.name} can't be permuted: {cls.pinned or '; '.join(cls.notes)}")
    found = _positions(cls, np.asarray(order))
    if found.size != cls.size:
        raise PlanError(f"{cls.name}: found {found.size} positions, expected each of its {cls.size} once")
    return found


def _positions(cls: AxisClass, found: np.ndarray) -> np.ndarray:
    if found.ndim != 1 or (found.size and not np.issubdtype(found.dtype, np.integer)):
        raise PlanError(
            f"{cls.name}: found {found.dtype}{list(found.shape)}, expected whole numbers [n] (for what is kept also "
            f"booleans [{cls.size}])"
        )
    wrong = [int(i) for i in found if not 0 <= i < cls.size]
    if wrong:
        raise PlanError(f"{cls.name}: there is no position {wrong[0]}; it has {cls.size}, numbered from 0")
    if len(np.unique(found)) != found.size:
        raise PlanError(f"{cls.name}: a position is named twice: {sorted(found.tolist())}")
    return found.astype(np.int64)
