"""Labels of turned axes: which positions of an axis are multiplied by the rotation together, and where they go.

The labels of an axis are int32 [n]: `group * size + digit`, where the `size` positions of a group, in the order of
their digits, are multiplied by the matrix; -1 stays as it is. Groups are numbered in the order of their first
positions, so that two axes turn alike exactly where their labels are equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from jqopt.analysis.axes import CONCAT, LEAF, Node, factors, find, segments
from jqopt.analysis.fold_rules import Stop, reshape_runs

Labels = np.ndarray
Turned = Mapping[int, Labels]
"""{axis: labels} of the axes of an array that turn."""

_MOST = 2**24  # elements of a run of axes that a reshape is followed through


def of_node(node: Node, leaf: Node) -> Labels | None:
    """Labels of an axis in which the positions of `leaf` turn; None if it doesn't hold the leaf.

    Raises:
        Stop: the axis is a product that holds the leaf twice.
    """
    node = find(node)
    if node.kind == LEAF:
        return np.arange(node.size, dtype=np.int32) if node is leaf else None
    if node.kind == CONCAT:
        parts = segments(node)
        return joined([of_node(p, leaf) for p in parts], [p.size for p in parts], leaf.size)
    parts = factors(node)
    found = [(i, labels) for i, p in enumerate(parts) if (labels := of_node(p, leaf)) is not None]
    if len(found) > 1:
        raise Stop("an axis is a product of the class with itself")
    for i, labels in found:
        outer, inner = (math.prod(p.size for p in side) for side in (parts[:i], parts[i + 1 :]))
        wide = _spread(labels, leaf.size, [outer, labels.size, inner], 1)
        return canonical(wide.reshape(-1), leaf.size)
    return None


def joined(parts: Sequence[Labels | None], lengths: Sequence[int], size: int) -> Labels | None:
    """Labels of axes one after the other."""
    out, groups = [], 0
    for labels, n in zip(parts, lengths, strict=True):
        here = np.full(n, -1, np.int32) if labels is None else np.where(labels < 0, -1, labels + groups * size)
        out.append(here.astype(np.int32))
        groups += 0 if labels is None else int(labels.max()) // size + 1
    return np.concatenate(out) if groups else None


def canonical(labels: Labels, size: int) -> Labels | None:
    """The labels with their groups numbered anew; None where nothing turns.

    Raises:
        Stop: a group isn't whole.
    """
    live = labels >= 0
    if not live.any():
        return None
    group, digit = labels[live] // size, labels[live] % size
    _, first, place, count = np.unique(group, return_index=True, return_inverse=True, return_counts=True)
    if (count != size).any() or np.unique(labels[live]).size != digit.size:
        raise Stop("cut")
    rank = np.empty(first.size, np.int64)
    rank[np.argsort(first)] = np.arange(first.size)
    out = np.full(labels.shape, -1, np.int32)
    out[live] = rank[place] * size + digit
    return out


def positions(labels: Labels, size: int) -> np.ndarray:
    """[groups, size]: where the digits of each group stand."""
    live = np.flatnonzero(labels >= 0)
    out = np.empty(live.size, np.int64)
    out[labels[live]] = live
    return out.reshape(-1, size)


def same(one: Turned, other: Turned) -> bool:
    """Do the same axes turn in the same way?"""
    return one.keys() == other.keys() and all(np.array_equal(one[a], other[a]) for a in one)


def reshaped(turned: Turned, old: Sequence[int], new: Sequence[int], size: int) -> Turned:
    """What turns after a reshape.

    Raises:
        Stop: it takes the positions of a group apart.
    """
    out: dict[int, Labels] = {}
    for before, after in reshape_runs(old, new):
        here = [a for a in before if a in turned]
        for axis in here:
            wide = [a for a in after if new[a] != 1]
            if [old[a] for a in before if old[a] != 1] == [new[a] for a in wide]:
                target = wide[[a for a in before if old[a] != 1].index(axis)]
                found: tuple[int, Labels] = (target, turned[axis])
            elif len(here) > 1:
                raise Stop("two turned axes are reshaped into each other")
            else:
                place, labels = _regrouped(turned[axis], [old[a] for a in before], before.index(axis),
                                           [new[a] for a in after], size)  # fmt: skip
                found = after[place], labels
            out[found[0]] = found[1]
    return out


def _regrouped(labels: Labels, old: list[int], axis: int, new: list[int], size: int) -> tuple[int, Labels]:
    if math.prod(old) > _MOST:
        raise Stop("too many elements to follow")
    wide = _spread(labels, size, old, axis).reshape(new)
    digit = np.where(wide < 0, -1, wide % size)
    varies = [a for a in range(len(new)) if (digit != digit.take([0], a)).any()]
    if len(varies) != 1:
        raise Stop("cut")
    rows = np.moveaxis(wide, varies[0], -1).reshape(-1, new[varies[0]])
    found = [canonical(row, size) for row in rows]
    first = found[0]
    if first is None or any(f is None or not np.array_equal(f, first) for f in found):
        raise Stop("cut")
    return varies[0], first


def _spread(labels: Labels, size: int, shape: Sequence[int], axis: int) -> np.ndarray:
    """Labels of a whole array of this shape, of whose axes one turns: int64, a group of its own for all others."""
    others = np.arange(math.prod(shape) // shape[axis]).reshape([1 if a == axis else n for a, n in enumerate(shape)])
    along = labels.astype(np.int64).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    groups = int(labels.max()) // size + 1
    return np.where(along < 0, -1, (others * groups + along // size) * size + along % size)
