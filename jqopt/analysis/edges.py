"""How sites hang together: which site's output reaches which site's activation, as a graph small enough to draw."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

from jqopt._jaxpr import Address
from jqopt.analysis.flow import ENTER, LEAVE, Equation, Flow, line


class Place(Protocol):
    """What is asked of a site."""

    @property
    def key(self) -> str: ...

    @property
    def address(self) -> Address: ...


@dataclasses.dataclass(frozen=True)
class Node:
    """A site, the model's inputs or outputs, or a place where values meet (`+1`: a residual stream's addition).

    kind: site | input | output | join (an equation reads several of them) | loop (a value that a loop carries).
    """

    name: str
    kind: str
    op: str = ""  # of a join: the primitive
    where: str = ""  # of a join: the user's line


@dataclasses.dataclass(frozen=True)
class Edge:
    """What `source` gives reaches `target` without passing another site; `loop`: in the next round of a loop."""

    source: str
    target: str
    loop: bool = False


@dataclasses.dataclass(frozen=True)
class Edges:
    """The sites of a model and what flows between them.

    A join stands for all that meets in it: were every addition of a residual stream left out, each site that reads
    the stream would have an edge from each site that ever wrote to it. `between` leaves them out.

    Attributes:
        nodes: in the order of the program; without the loops' edges every edge runs from an earlier to a later one.
        before: parameters that change what some nodes read (the gain of a norm), and those nodes.
        after: parameters that change all that anything reads of a site (its bias), and those sites.
    """

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    before: Mapping[str, tuple[str, ...]]
    after: Mapping[str, tuple[str, ...]]

    def between(self, source: str) -> frozenset[str]:
        """The sites (and `output`) that `source`'s output reaches without passing another site."""
        targets: dict[str, list[str]] = {}
        for e in self.edges:
            targets.setdefault(e.source, []).append(e.target)
        pseudo = {n.name for n in self.nodes if n.kind in ("join", "loop")}
        found: set[str] = set()
        todo = list(targets.get(source, ()))
        while todo:
            name = todo.pop()
            if name not in found:
                found.add(name)
                todo += targets.get(name, ()) if name in pseudo else ()
        return frozenset(found - pseudo)


def edges(flow: Flow, sites: Iterable[Place]) -> Edges:
    """The edges between `sites`, in time proportional to the program's length.

    Every value is labelled with the one node that it comes from; an equation whose operands carry several labels is a
    join, which is a node of its own. Joins that say nothing are taken out again: those of one node, and those that one
    node reads, unless it reads a stream of joins there.
    """
    at: dict[Address, list[str]] = {}
    for site in sites:
        at.setdefault(site.address, []).append(site.key)
    build = _Build(at)
    build.run(flow)
    return build.finish()


@dataclasses.dataclass(eq=False)
class _Point:
    """A node that is being made: who it reads and who reads it, with whether only in a loop's next round."""

    kind: str
    key: str = ""
    equation: Equation | None = None
    sources: dict[int, bool] = dataclasses.field(default_factory=dict)
    targets: dict[int, bool] = dataclasses.field(default_factory=dict)
    params: dict[str, set[int]] = dataclasses.field(default_factory=dict)  # what acted on what it reads, from where


_NONE: frozenset[str] = frozenset()


class _Build:
    """Accumulates nodes. `label[value]`: the node it comes from; `held[value]`: parameters since that node."""

    def __init__(self, at: Mapping[Address, Sequence[str]]):
        self.at = at
        self.points: list[_Point] = [_Point("input")]
        self.label: dict[object, int] = {}
        self.held: dict[object, frozenset[str]] = {}
        self.joins: dict[frozenset[int], int] = {}
        self.after: dict[str, list[str]] = {}

    def run(self, flow: Flow) -> None:
        self.label |= dict.fromkeys(flow.inputs, 0)
        self.held |= {v: frozenset({v.name}) for v in flow.leaves}
        for equation in flow.equations:
            self._equation(equation)
        out = self._point("output")
        for value in flow.outputs:
            self._read(out, value)

    def _equation(self, e: Equation) -> None:
        if e.op == ENTER:
            node = self._point("loop", e)
            self._read(node, e.inputs[0])
            self.label[e.outputs[0]] = node
        elif e.op == LEAVE:
            self._leave(e)
        elif "." not in e.op and e.address in self.at:
            self._site(e, self.at[e.address])
        else:
            self._give(e, e.inputs)

    def _leave(self, e: Equation) -> None:
        """What the body makes of a carried value is what the next round carries, and what the loop returns."""
        carried, last = e.inputs
        if last in self.label:
            self._link(self.label[last], self.label[carried], loop=True)
        sometimes = not (carried.loops and carried.loops[-1].length)  # it may run no round at all
        self._give(e, (last, carried) if sometimes else (last,))

    def _site(self, e: Equation, keys: Sequence[str]) -> None:
        nodes = [self._point("site", key=key) for key in keys]
        for node in nodes:
            for value in e.inputs:
                self._read(node, value)
        label = nodes[0] if len(nodes) == 1 else self._join(nodes, e)
        self.label |= dict.fromkeys(e.outputs, label)

    def _give(self, e: Equation, values: Sequence[object]) -> None:
        """Labels what an equation makes of these values, unless they are parameters and constants only."""
        labels = {self.label[v] for v in values if v in self.label}
        held = [self.held[v] for v in values if v in self.held]
        params = held[0] if len(held) == 1 else _NONE.union(*held)
        if len(labels) > 1:
            label = self._join(labels, e)
            for value in values:
                self._act(label, value)
        else:
            label = next(iter(labels), None)
            self.held |= dict.fromkeys(e.outputs, params) if params else {}
        if label is not None:
            self.label |= dict.fromkeys(e.outputs, label)

    def _join(self, labels: Collection[int], e: Equation) -> int:
        inside = {s for n in labels if self.points[n].kind in ("join", "loop") for s in self.points[n].sources}
        parts = frozenset(labels) - inside or frozenset({max(labels)})
        if len(parts) == 1:
            return next(iter(parts))
        if parts not in self.joins:
            self.joins[parts] = node = self._point("join", e)
            for part in sorted(parts):
                self._link(part, node)
        return self.joins[parts]

    def _point(self, kind: str, equation: Equation | None = None, key: str = "") -> int:
        self.points.append(_Point(kind, key, equation))
        return len(self.points) - 1

    def _link(self, source: int, target: int, loop: bool = False) -> None:
        """An edge; of two that differ in the loop the one without stays."""
        loop = loop and self.points[source].targets.get(target, True)
        self.points[source].targets[target] = self.points[target].sources[source] = loop

    def _read(self, node: int, value: object) -> None:
        """`node` reads `value`. A site's own parameter carries no label: it isn't one that acts before the site."""
        if value in self.label:
            self._link(self.label[value], node)
            self._act(node, value)

    def _act(self, node: int, value: object) -> None:
        """The parameters that acted on `value` act before `node`."""
        for name in sorted(self.held.get(value, ())):
            self.points[node].params.setdefault(name, set()).add(self.label.get(value, node))

    # --------------------------------------------------------------------------------------------- taking out

    def finish(self) -> Edges:
        """Without the joins and loops that say nothing."""
        real = [i for i, p in enumerate(self.points) if p.kind not in ("join", "loop")]
        alive = self._reached(real, "targets") & self._reached(real, "sources")
        for i, point in enumerate(self.points):
            if i not in alive or point.kind in ("join", "loop"):
                self._unlink(i, i)
            if i not in alive:
                for s in list(point.sources):
                    self._unlink(s, i)
                for t in list(point.targets):
                    self._unlink(i, t)
        self._assign(alive)
        gone = self._splice(i for i in sorted(alive, reverse=True) if self.points[i].kind in ("join", "loop"))
        return self._result([i for i in sorted(alive) if i not in gone])

    def _reached(self, roots: Sequence[int], way: str) -> set[int]:
        found, todo = set(roots), list(roots)
        while todo:
            fresh = [n for n in getattr(self.points[todo.pop()], way) if n not in found]
            found.update(fresh)
            todo += fresh
        return found

    def _unlink(self, source: int, target: int) -> None:
        self.points[source].targets.pop(target, None)
        self.points[target].sources.pop(source, None)

    def _assign(self, alive: set[int]) -> None:
        """A parameter that acted on all that is read of a site stands after the site, not before its readers."""
        acts: dict[tuple[str, int], set[int]] = {}
        for i in alive:
            for name, sources in self.points[i].params.items():
                for source in sources:
                    acts.setdefault((name, source), set()).add(i)
        for (name, source), readers in sorted(acts.items()):
            if self.points[source].kind == "site" and readers == set(self.points[source].targets):
                self.after.setdefault(name, []).append(self.points[source].key)
                for i in readers:
                    self.points[i].params[name].discard(source)

    def _says_nothing(self, point: _Point) -> bool:
        """Is a join or loop no more than a bend in an edge?"""
        if len(point.sources) < 2 or len(point.targets) != 1:
            return len(point.sources) < 2 or not point.targets
        [target] = point.targets
        stream = any(self.points[i].kind in ("join", "loop") for i in point.sources)
        return not stream or self.points[target].kind in ("join", "loop")

    def _splice(self, nodes: Iterable[int]) -> set[int]:
        """Takes out the joins and loops that say nothing; those."""
        gone: set[int] = set()
        todo = collections.deque(nodes)
        while todo:
            i = todo.popleft()
            point = self.points[i]
            if i in gone or not self._says_nothing(point):
                continue
            gone.add(i)
            near = [*point.sources, *point.targets]
            for s, back in point.sources.items():
                for t, again in point.targets.items():
                    if s != t or self.points[s].kind == "site":
                        self._link(s, t, back or again)
            for t in point.targets:
                for name, sources in point.params.items():
                    self.points[t].params.setdefault(name, set()).update(sources)
            for n in near:
                self._unlink(n, i)
                self._unlink(i, n)
            todo += [n for n in near if self.points[n].kind in ("join", "loop")]
        return gone

    def _result(self, kept: Sequence[int]) -> Edges:
        names = self._names(kept)
        nodes = [_node(names[i], self.points[i]) for i in kept]
        links = [
            Edge(names[i], names[t], self.points[i].targets[t]) for i in kept for t in sorted(self.points[i].targets)
        ]
        before: dict[str, list[str]] = {}
        for i in kept:
            for name in (n for n, sources in self.points[i].params.items() if sources):
                before.setdefault(name, []).append(names[i])
        return Edges(
            tuple(nodes), tuple(links), {n: tuple(b) for n, b in before.items()},
            {n: tuple(a) for n, a in self.after.items()},
        )  # fmt: skip

    def _names(self, kept: Sequence[int]) -> dict[int, str]:
        """Sites have their keys; the others names that no site has, even where a parameter is called `input`."""
        taken = {self.points[i].key for i in kept}
        names: dict[int, str] = {}
        count = 0
        for i in kept:
            point = self.points[i]
            count += point.kind in ("join", "loop")
            name = point.key or (f"+{count}" if point.kind in ("join", "loop") else point.kind)
            while point.kind != "site" and name in taken:
                name = f"({name})"
            names[i] = name
        return names


def _node(name: str, point: _Point) -> Node:
    e = point.equation
    return Node(name, point.kind) if e is None else Node(name, point.kind, e.op, line(e))
