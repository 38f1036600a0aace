"""The algebra of axes: atoms that are made one (union-find), split into factors, cut into segments, and pinned.

An axis of an array is a `Node`. A node is a leaf; or a product of nodes, outermost first (`heads x head_dim`); or a
concatenation of nodes (`[q | k | v]`). Structure is found while the program is followed: a reshape splits a leaf into
factors, a slice cuts it into segments, and since a node is shared by all the axes that were made one with it, all of
them learn it. Two structures that can't be brought together are pinned: nothing may change there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jqopt.analysis.flow import Equation, line

LEAF, PRODUCT, CONCAT = "leaf", "product", "concat"
_MOST = 8  # pins and notes of one leaf that are kept


class Pin(NamedTuple):
    """Why an axis must stay as it is, and the line of the program that says so."""

    reason: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.reason} ({self.where})" if self.where else self.reason


class Mark(NamedTuple):
    """A pin or note as it is gathered: its source line is looked up only when someone asks."""

    reason: str
    equation: Equation | None = None

    def pin(self) -> Pin:
        return Pin(self.reason, "" if self.equation is None else line(self.equation) or self.equation.scope)


class Node:
    """An axis, or a part of one. Its content changes as more is learnt: read it through this module's functions."""

    __slots__ = ("kind", "notes", "order", "parent", "parts", "pins", "size")

    def __init__(self, size: int, kind: str = LEAF, parts: Sequence[Node] = ()):
        self.size = int(size)
        self.kind = kind
        self.parts = tuple(parts)
        self.parent: Node | None = None
        self.pins: list[Mark] = []  # of leaves only
        self.notes: list[Mark] = []  # of leaves only: it may change, but something depends on its size
        self.order: list[Mark] = []  # of leaves only: it may be pruned, but not permuted

    def __repr__(self) -> str:
        return text(self)


Axes = tuple[Node, ...]
"""One node for each axis of an array."""


def find(node: Node) -> Node:
    """The node that stands for all those it was made one with."""
    root = node
    while root.parent is not None:
        root = root.parent
    while node.parent is not None:
        node.parent, node = root, node.parent
    return root


def fresh(size: int) -> Node:
    """An axis of which nothing is known."""
    return Node(size)


def axes(shape: Sequence[int]) -> Axes:
    """Fresh axes of an array."""
    return tuple(map(Node, shape))


def leaves(node: Node) -> Iterator[Node]:
    """The leaves below a node; one may come more than once."""
    node = find(node)
    if node.kind == LEAF:
        yield node
    for part in node.parts:
        yield from leaves(part)


def factors(node: Node) -> list[Node]:
    """The factors of a node, outermost first, products of products opened; itself if it is no product."""
    node = find(node)
    if node.kind != PRODUCT:
        return [node]
    return [f for part in node.parts for f in factors(part)]


def segments(node: Node) -> list[Node]:
    """The segments of a node, concatenations of concatenations opened; itself if it is none."""
    node = find(node)
    if node.kind != CONCAT:
        return [node]
    return [s for part in node.parts for s in segments(part)]


def product(parts: Sequence[Node]) -> Node:
    """An axis that runs through `parts`, outermost first."""
    parts = [p for part in parts for p in factors(part) if find(p).size != 1]
    if len(parts) == 1:
        return parts[0]
    return Node(math.prod(p.size for p in parts), PRODUCT, parts) if parts else Node(1)


def concat(parts: Sequence[Node]) -> Node:
    """An axis that is `parts`, one after the other."""
    parts = [p for part in parts for p in segments(part) if find(p).size != 0]
    if len(parts) == 1:
        return parts[0]
    if len(parts) > 1 and all(p.size == 1 for p in parts):
        return pinned(len(parts), "the program stacks it")
    return Node(sum(p.size for p in parts), CONCAT, parts) if parts else Node(0)


def pin(node: Node, reason: str, equation: Equation | None = None) -> None:
    """Says of every leaf below that it must stay as it is."""
    for leaf in leaves(node):
        _add(leaf.pins, Mark(reason, equation))


def note(node: Node, reason: str, equation: Equation | None = None) -> None:
    """Says of every leaf below that something depends on its size."""
    for leaf in leaves(node):
        _add(leaf.notes, Mark(reason, equation))


def keep_order(node: Node, reason: str, equation: Equation | None = None) -> None:
    """Says of every leaf below that it must not be permuted."""
    for leaf in leaves(node):
        _add(leaf.order, Mark(reason, equation))


def is_pinned(node: Node) -> bool:
    """Does every leaf below have to stay as it is?"""
    return all(leaf.pins for leaf in leaves(node))


def pinned(size: int, reason: str, equation: Equation | None = None) -> Node:
    """A fresh axis that must stay as it is."""
    node = Node(size)
    node.pins.append(Mark(reason, equation))
    return node


def _add(marks: list[Mark], mark: Mark) -> None:
    if len(marks) < _MOST and all(m.reason != mark.reason for m in marks):
        marks.append(mark)


def _hand_down(old: Node, new: Node) -> None:
    """What was said of a leaf holds for what it has become one with, or has become."""
    for leaf in leaves(new):
        for name in ("pins", "notes", "order"):
            for mark in getattr(old, name):
                _add(getattr(leaf, name), mark)


def _become(node: Node, kind: str, parts: Sequence[Node]) -> None:
    """Gives a node its structure; what was said of it is said of its parts."""
    node.kind, node.parts = kind, tuple(parts)
    _hand_down(node, node)
    node.pins, node.notes, node.order = [], [], []


# ------------------------------------------------------------------------------------------- split and cut


def split(node: Node, inner: int) -> tuple[Node, Node] | None:
    """(outer, inner) factors of an axis, the inner one of size `inner`; None if its structure doesn't allow it."""
    node = find(node)
    if inner == 1:
        return node, Node(1)
    if inner == node.size:
        return Node(1), node
    if inner == 0 or node.size % inner:
        return None
    if node.kind == LEAF:
        outer, rest = Node(node.size // inner), Node(inner)
        _become(node, PRODUCT, (outer, rest))
        return outer, rest
    return _split_product(node, inner) if node.kind == PRODUCT else _split_concat(node, inner)


def _split_product(node: Node, inner: int) -> tuple[Node, Node] | None:
    parts, right = factors(node), []
    while inner > 1:
        part = parts.pop()
        if inner % part.size == 0:
            inner //= part.size
            right.insert(0, part)
            continue
        two = split(part, inner)
        if two is None:
            return None
        parts.append(two[0])
        right.insert(0, two[1])
        inner = 1
    return product(parts), product(right)


def _split_concat(node: Node, inner: int) -> tuple[Node, Node] | None:
    """[a | b] as (outer a | outer b) x inner: the segments' inner factors are one axis."""
    parts = segments(node)
    if any(p.size % inner for p in parts):
        return None
    twos = [split(p, inner) for p in parts]
    found = [two for two in twos if two is not None]
    if len(found) < len(twos):
        return None
    rest = found[0][1]
    for _, other in found[1:]:
        unify(rest, other)
    outer = concat([o for o, _ in found])
    node = find(node)
    if node.kind == CONCAT:
        node.kind, node.parts = PRODUCT, (*factors(outer), *factors(rest))
    return outer, find(rest)


def piece(node: Node, start: int, size: int) -> Node | None:
    """Positions `start .. start + size` of an axis; None if its structure doesn't allow it."""
    node = find(node)
    if size == node.size:
        return node
    if size == 0:
        return Node(0)
    if node.kind == LEAF:
        return _piece_leaf(node, start, size)
    if node.kind == CONCAT:
        found, at = [], 0
        for part in segments(node):
            low, high = max(start, at), min(start + size, at + part.size)
            if low < high:
                found.append(piece(part, low - at, high - low))
            at += part.size
        good = [p for p in found if p is not None]
        return concat(good) if len(good) == len(found) else None
    first, *rest = factors(node)
    inner = math.prod(p.size for p in rest)
    if start % inner == 0 and size % inner == 0:
        outer = piece(first, start // inner, size // inner)
        return None if outer is None else product([outer, *rest])
    if start // inner == (start + size - 1) // inner:  # within one position of the outermost factor
        outer = piece(first, start // inner, 1)
        return None if outer is None else piece(product(rest), start % inner, size)
    return None


def _piece_leaf(node: Node, start: int, size: int) -> Node:
    if node.pins:  # nothing may change here anyway: no need to know its segments
        out = Node(size)
        _hand_down(node, out)
        return out
    if size == 1:
        pin(node, "the program picks one position of it")
        return Node(1)
    sizes = [n for n in (start, size, node.size - start - size) if n]
    parts = [Node(n) for n in sizes]
    _become(node, CONCAT, parts)
    return parts[1] if start else parts[0]


# --------------------------------------------------------------------------------------------------- unify


def unify(one: Node, other: Node, equation: Equation | None = None) -> None:
    """Makes two axes of one size the same axis; where their structures can't be brought together, pins both."""
    one, other = find(one), find(other)
    if one is other:
        return
    if one.size != other.size:
        _clash(one, other, f"axes of {one.size} and {other.size} positions meet", equation)
    elif one.kind == LEAF or other.kind == LEAF:
        leaf, kept = (one, other) if one.kind == LEAF else (other, one)
        leaf.parent = kept
        _hand_down(leaf, kept)
    elif _bring_together(one, other, equation):
        one, other = find(one), find(other)
        if one is not other:
            one.parent = other
    else:
        _clash(one, other, f"{text(one)} and {text(other)} meet, which have no common parts", equation)


def _clash(one: Node, other: Node, reason: str, equation: Equation | None) -> None:
    pin(one, reason, equation)
    pin(other, reason, equation)


def _bring_together(one: Node, other: Node, equation: Equation | None) -> bool:
    if one.kind == other.kind:
        merge = _products if one.kind == PRODUCT else _concats
        return merge(one, other, equation)
    whole, cut = (one, other) if one.kind == PRODUCT else (other, one)
    first, *rest = factors(whole)
    inner = product(rest)
    two = split(cut, inner.size)
    if two is not None:
        unify(two[0], first, equation)
        unify(two[1], inner, equation)
        return True
    parts = segments(cut)
    starts = itertools.accumulate((p.size for p in parts), initial=0)
    found = [piece(whole, start, p.size) for start, p in zip(starts, parts, strict=False)]
    for mine, its in zip(parts, found, strict=True):
        if its is None:
            return False
        unify(mine, its, equation)
    return True


def _products(one: Node, other: Node, equation: Equation | None) -> bool:
    mine, its = factors(one), factors(other)
    while mine and its:
        a, b = mine.pop(), its.pop()
        if a.size < b.size:
            a, b, mine, its = b, a, its, mine
        two = split(a, b.size)
        if two is None:
            return False
        unify(two[1], b, equation)
        if find(two[0]).size > 1:
            mine.append(find(two[0]))
        mine = [f for p in mine for f in factors(p)]
        its = [f for p in its for f in factors(p)]
    return True


def _starts(parts: Sequence[Node]) -> dict[Node, int]:
    return dict(zip(parts, itertools.accumulate((p.size for p in parts), initial=0), strict=False))


def _concats(one: Node, other: Node, equation: Equation | None) -> bool:
    mine, its = segments(one), segments(other)
    first, second = _starts(mine), _starts(its)
    if any(second.get(p, at) != at for p, at in first.items()):
        return False  # an axis against itself, shifted: cutting would not end
    ends = {*itertools.accumulate(p.size for p in mine), *itertools.accumulate(p.size for p in its)}
    cuts = sorted(ends | {0})
    for start, stop in itertools.pairwise(cuts):
        a, b = piece(one, start, stop - start), piece(other, start, stop - start)
        if a is None or b is None:
            return False
        unify(a, b, equation)
    return True


# ------------------------------------------------------------------------------------------------- reshape


def reshape(old: Axes, shape: Sequence[int], equation: Equation | None = None) -> Axes:
    """The axes after a reshape. Where sizes don't factor, the axes concerned are pinned, and only those."""
    if 0 in shape:
        return axes(shape)
    out: list[Node] = []
    todo = [n for n in map(find, old) if n.size != 1]
    wanted = list(shape)
    while wanted:
        if wanted[0] == 1:
            out.append(Node(wanted.pop(0)))
            continue
        mine, sizes = [todo.pop(0)], [wanted.pop(0)]
        while (n := math.prod(p.size for p in mine)) != (m := math.prod(sizes)):  # the smallest block that matches
            if n < m:
                mine.append(todo.pop(0))
            else:
                sizes.append(wanted.pop(0))
        out += _regroup(mine, sizes, equation)
    return tuple(out)


def _regroup(parts: Sequence[Node], sizes: Sequence[int], equation: Equation | None) -> list[Node]:
    rest, out = product(parts), []
    for n in reversed(sizes):
        two = split(rest, n)
        if two is None:
            reason = f"reshaped from {[p.size for p in parts]} to {list(sizes)}, which have no common factors"
            for part in parts:
                pin(part, reason, equation)
            return [pinned(n, reason, equation) for n in sizes]
        rest, last = two
        out.insert(0, last)
    return out


# --------------------------------------------------------------------------------------------- reading out


class Place(NamedTuple):
    """Where a leaf sits in an axis: index i at `start + i * stride` (and the positions inside a stride).

    `segment` is the smallest concatenated part it belongs to: (first position, length). `trail` tells two places of one
    axis apart: `.1` the second factor, `:0` the first segment.
    """

    leaf: Node
    stride: int
    start: int
    segment: tuple[int, int]
    trail: str


def places(node: Node) -> list[Place]:
    """Every leaf of an axis that is longer than one, in order."""
    return list(_places(find(node), 1, 0, None, ""))


def _places(node: Node, stride: int, start: int, segment: tuple[int, int] | None, trail: str) -> Iterator[Place]:
    if segment is None:
        segment = (start, node.size * stride)
    if node.kind == LEAF:
        if node.size > 1:
            yield Place(node, stride, start, segment, trail)
    elif node.kind == PRODUCT:
        parts = factors(node)
        for i, part in enumerate(parts):
            inner = stride * math.prod(int(p.size) for p in parts[i + 1 :])
            yield from _places(part, inner, start, segment, f"{trail}.{i}")
    else:
        at = start
        for i, part in enumerate(segments(node)):
            yield from _places(part, stride, at, (at, part.size * stride), f"{trail}:{i}")
            at += part.size * stride


def select(node: Node, choose: Callable[[Node], np.ndarray | None]) -> np.ndarray:
    """Positions of an axis that remain, in their new order, when `choose` gives those of each leaf (None: all)."""
    node = find(node)
    if node.kind == LEAF:
        chosen = choose(node)
        return np.arange(node.size) if chosen is None else np.asarray(chosen)
    if node.kind == CONCAT:
        parts = segments(node)
        starts = itertools.accumulate((p.size for p in parts), initial=0)
        return np.concatenate([select(p, choose) + s for p, s in zip(parts, starts, strict=False)])
    out = np.zeros(1, np.int64)
    for part in factors(node):
        out = (out[:, None] * part.size + select(part, choose)[None, :]).reshape(-1)
    return out


def text(node: Node) -> str:
    """`4 x 8`, `[32 | 16 | 16]`."""
    node = find(node)
    if node.kind == PRODUCT:
        return " x ".join(map(text, factors(node)))
    if node.kind == CONCAT:
        return f"[{' | '.join(map(text, segments(node)))}]"
    return str(node.size)
