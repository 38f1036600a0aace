"""Axis classes: which axes of which parameters are one, so that they can only be pruned or permuted together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jqopt.analysis import axis_rules
from jqopt.analysis.axes import (
    Axes,
    Mark,
    Node,
    Pin,
    axes,
    find,
    keep_order,
    pin,
    pinned,
    places,
    text,
    unify,
)
from jqopt.analysis.axis_rules import Rule
from jqopt.analysis.flow import SLICE, STACK, Equation, Flow, Loop, Value, line
from jqopt.errors import TraceError


@dataclasses.dataclass(frozen=True)
class Symbol:
    """One axis of one leaf of the parameter tree.

    kind: parameter | state. roles: what products do with it: incoming (contracted), outgoing, stacked (layers,
    experts, batch axes), indexed (looked up by number), feature (none of these: a bias, a gain).
    """

    path: str
    axis: int
    size: int
    kind: str = "parameter"
    roles: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.path}[{self.axis}]"


@dataclasses.dataclass(frozen=True)
class Member:
    """Where a class sits in one axis: index i at `start + i * stride`, inside `start of the segment .. + length`."""

    symbol: str
    path: str
    axis: int
    stride: int
    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class AxisClass:
    """Axes, or factors and segments of axes, that are one.

    pinned: why nothing may be taken out of it or moved in it; permutable: may its positions change places? ties: what
    one of its positions stands for where that isn't one position of each member. notes: what depends on its size.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    pinned: Pin | None
    permutable: bool
    ties: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def symbols(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(m.symbol for m in self.members))


@dataclasses.dataclass(frozen=True)
class Unknown:
    """A primitive without a rule: everything it touches is pinned."""

    primitive: str
    where: str
    scope: str
    params: tuple[str, ...]

    @property
    def reason(self) -> str:
        reads = f"; it reads {', '.join(self.params)}" if self.params else ""
        return f"nothing is known of what {self.primitive} does to axes{reads}"


@dataclasses.dataclass(frozen=True, eq=False)
class AxisGraph:
    """Everything the program says about axes."""

    symbols: tuple[Symbol, ...]
    nodes: Mapping[str, Node]  # of each symbol, by name
    unknown: tuple[Unknown, ...]

    @functools.cached_property
    def classes(self) -> tuple[AxisClass, ...]:
        """In the order in which the symbols name them."""
        held: dict[Node, list[tuple[Symbol, Any]]] = {}
        for symbol in self.symbols:
            for place in places(self.nodes[symbol.name]):
                held.setdefault(place.leaf, []).append((symbol, place))
        return tuple(_class(leaf, found) for leaf, found in held.items())

    @functools.cached_property
    def leaf_of(self) -> dict[str, Node]:
        """The union-find leaf behind each class, by the class' name."""
        found: dict[Node, str] = {}
        for symbol in self.symbols:
            for place in places(self.nodes[symbol.name]):
                found.setdefault(place.leaf, symbol.name + place.trail)
        return {name: leaf for leaf, name in found.items()}

    def parts(self, symbol: str) -> str:
        """The structure of an axis: `2 x 4 x 8`, `[32 | 16 | 16]`."""
        return text(self.nodes[symbol])


def _class(leaf: Node, found: Sequence[tuple[Symbol, Any]]) -> AxisClass:
    members = tuple(Member(s.name, s.path, s.axis, place.stride, place.start, place.segment[1]) for s, place in found)
    symbol, place = found[0]
    pinned_by = leaf.pins[0].pin() if leaf.pins else None
    return AxisClass(
        name=symbol.name + place.trail,
        size=leaf.size,
        members=members,
        pinned=pinned_by,
        permutable=not leaf.pins and not leaf.order,
        ties=_ties(leaf, found),
        notes=_notes(leaf),
    )


def _notes(leaf: Node) -> tuple[str, ...]:
    return tuple(str(mark.pin()) for mark in (*leaf.notes, *leaf.order, *leaf.pins[1:]))


def _ties(leaf: Node, found: Sequence[tuple[Symbol, Any]]) -> tuple[str, ...]:
    """Where one position of the class is several positions of an axis."""
    out, span = [], {}
    for symbol, place in found:
        span.setdefault(symbol.name, []).append(place)
    for name, where in span.items():
        if len(where) > 1:
            starts = ", ".join(f"{p.start}" for p in where)
            out.append(f"{name} holds it {len(where)} times, from {starts}: they stay alike")
    sizes = {name: where[0].stride * len(where) for name, where in span.items()}
    if len(set(sizes.values())) > 1:
        most = [n for n, size in sizes.items() if size == max(sizes.values())]
        least = [n for n, size in sizes.items() if size == min(sizes.values())]
        out.append(f"one position is {max(sizes.values())} of {most[0]}, {min(sizes.values())} of {least[0]}")
    return tuple(out)


def _roles(flow: Flow, sites: Sequence[Any]) -> dict[tuple[str, int], set[str]]:
    """What the sites do with each axis of each parameter."""
    out: dict[tuple[str, int], set[str]] = {}
    for site in sites:
        if site.path is None or site.reason is not None:
            continue
        rows = "indexed" if site.op == "gather" else "outgoing"
        for role, atoms in (("stacked", site.stack), (rows, site.rows), ("incoming", site.cols)):
            kind = "outgoing" if site.op == "gather" and role == "incoming" else role
            for atom in atoms:
                out.setdefault((site.path, atom.axis), set()).add(kind)
    return out


def analyse(flow: Flow, sites: Sequence[Any] = (), rules: Mapping[str, Rule] | None = None) -> AxisGraph:
    """Follows every axis through the flow.

    Args:
        sites: for the symbols' roles.
        rules: of further primitives, by name; they go before the ones that jqopt has.
    """
    walk = _Walk({**axis_rules.RULES, **(rules or {})})
    for value in flow.leaves:
        walk.axes[value] = axes(value.shape)
    for value in flow.inputs:
        walk.axes[value] = tuple(pinned(n, f"axis {i} of the model's input {value.name}") for i, n in _numbered(value))
    for equation in flow.equations:
        walk.equation(equation)
    for value in flow.outputs:
        for i, axis in enumerate(walk.of(value)):
            pin(axis, f"axis {i} of the model's output")
    for value in flow.leaves:
        for axis, read in zip(walk.axes[value], _positions_read(value), strict=True):
            _pin_unread(axis, read)
    roles = _roles(flow, sites)
    symbols, nodes = [], {}
    for value in flow.leaves:
        for i, n in _numbered(value):
            known = tuple(sorted(roles.get((value.name, i), {"feature"})))
            symbol = Symbol(value.name, i, n, value.kind, known)
            symbols.append(symbol)
            nodes[symbol.name] = walk.axes[value][i]
    return AxisGraph(tuple(symbols), nodes, tuple(walk.unknown))


def _positions_read(value: Value) -> list[np.ndarray]:
    """For each axis, which positions are read by anything: a boolean each."""
    read = [np.full(n, value.returned) for n in value.shape]
    for eqn, _ in value.uses:
        if eqn.op == "slice":
            p = eqn.params
            steps = p["strides"] or (1,) * value.ndim
            for mask, start, limit, step in zip(read, p["start_indices"], p["limit_indices"], steps, strict=True):
                mask[start:limit:step] = True
        elif eqn.op == "convert_element_type":
            read = [a | b for a, b in zip(read, _positions_read(eqn.outputs[0]), strict=True)]
        else:
            return [np.full(n, True) for n in value.shape]
    return read


def _pin_unread(axis: Node, read: np.ndarray) -> None:
    """What nothing reads at these shapes may be read at others: positions of longer inputs."""
    for place in places(axis) if not read.all() else ():
        start, length = place.segment
        if not read[start : start + length].any():
            pin(place.leaf, "nothing reads it at these input shapes")


def _numbered(value: Value) -> list[tuple[int, int]]:
    return list(enumerate(value.shape))


class _Walk:
    """Axes of the values seen so far."""

    def __init__(self, rules: Mapping[str, Rule]):
        self.rules = rules
        self.axes: dict[Value, Axes] = {}
        self.loops: dict[Loop, Node] = {}
        self.unknown: list[Unknown] = []

    def of(self, value: Value) -> Axes:
        """A value's axes; those of a constant array are pinned, since its content has an order."""
        if value not in self.axes:
            reason = "a constant of the program runs along it"
            self.axes[value] = tuple(
                Node(n) if n == 1 or value.kind == "literal" else pinned(n, reason) for n in value.shape
            )
        return self.axes[value]

    def equation(self, eqn: Equation) -> None:
        operands = [self.of(v) for v in eqn.inputs]
        self._constants(eqn, operands)
        if eqn.op == STACK:
            results: Sequence[Axes] = [(self._loop(eqn), *operands[0])]
        else:
            if eqn.op == SLICE:
                self._iterate(eqn, operands[0][0])
            results = self._apply(eqn, operands)
        for value, found in zip(eqn.outputs, results, strict=True):
            self.axes[value] = found

    def _constants(self, eqn: Equation, operands: Sequence[Axes]) -> None:
        """A constant's pin gets the line of the first equation that reads it."""
        for value, operand in zip(eqn.inputs, operands, strict=True):
            if value.kind == "constant":
                for axis in operand:
                    axis.pins[:] = [m if m.equation else Mark(m.reason, eqn) for m in axis.pins]

    def _loop(self, eqn: Equation) -> Node:
        """The axis that a loop's iterations run along."""
        return self.loops.setdefault(eqn.loops[-1], Node(eqn.outputs[0].shape[0]))

    def _iterate(self, eqn: Equation, axis: Node) -> None:
        loop = eqn.loops[-1]
        unify(axis, self.loops.setdefault(loop, Node(find(axis).size)), eqn)
        if loop.carries:
            keep_order(axis, "a loop runs along it, each step on the result of the one before", eqn)

    def _apply(self, eqn: Equation, operands: Sequence[Axes]) -> Sequence[Axes]:
        rule = self.rules.get(eqn.op)
        if rule is None:
            return self._unknown(eqn, operands)
        results = rule(eqn, operands)
        made, expected = [len(row) for row in results], [v.ndim for v in eqn.outputs]
        if made != expected:
            raise TraceError(
                f"the axis rule of {eqn.op} gave results of rank {made}, expected {expected}: one tuple of axes for "
                f"each result ({line(eqn) or eqn.scope})"
            )
        return results

    def _unknown(self, eqn: Equation, operands: Sequence[Axes]) -> Sequence[Axes]:
        params = tuple(sorted({v.name for v in ancestors(eqn.inputs) if v.kind == "parameter"}))
        self.unknown.append(Unknown(eqn.op, line(eqn), eqn.scope, params))
        return axis_rules.unknown(eqn, operands)


def ancestors(values: Sequence[Value]) -> set[Value]:
    """The leaves that values are a rearrangement of: not through arithmetic."""
    found: set[Value] = set()
    for value in values:
        while value.maker is not None and len(value.maker.inputs) == 1:
            value = value.maker.inputs[0]
        found.add(value)
    return found
