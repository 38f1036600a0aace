"""Where the nodes of a directed graph stand: layers from top to bottom, few crossings, nothing on top of another."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence

GAP = 26  # between neighbours in a layer
LANE = 16  # between the lines that run along the outside
SWEEPS = 8
STRAIGHT = 1000  # how much more a long line wants to be straight than a node wants to stand below another
SMALL = 30  # narrower nodes (joins) are part of a line


@dataclasses.dataclass(frozen=True)
class Box:
    """A node to place. `near`: it stands directly above what it leads to (a norm's gain above its reader)."""

    width: float
    height: float
    near: bool = False


@dataclasses.dataclass(frozen=True)
class Trunk:
    """The line that leaves a node: through `points`, then from each branch's point on to the branch's target.

    branches: (target, number of points before it leaves the trunk).
    """

    source: int
    points: tuple[tuple[float, float], ...]
    branches: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Placed:
    """Centres of the boxes, the layer of each, the (top, bottom) of each layer, and the lines.

    lanes: (source, target, x) of each edge that runs upwards, along the outside of the drawing.
    """

    centres: tuple[tuple[float, float], ...]
    layers: tuple[int, ...]
    rows: tuple[tuple[float, float], ...]
    trunks: tuple[Trunk, ...]
    lanes: tuple[tuple[int, int, float], ...]
    width: float
    height: float


def place(boxes: Sequence[Box], edges: Sequence[tuple[int, int]], upward: Sequence[tuple[int, int]] = ()) -> Placed:
    """Places `boxes`. The same graph always gets the same drawing.

    Args:
        edges: (source, target) with source < target; they run downwards.
        upward: edges that run the other way; they don't decide what stands where.
    """
    layers = _layers(boxes, edges)
    grid = _Grid(boxes, edges, layers)
    grid.order()
    x = grid.positions()
    left = min((x[i] - b.width / 2 for i, b in enumerate(boxes)), default=0.0)
    x = [round(v - left, 1) for v in x]
    rows = _rows(boxes, layers)
    centres = tuple((x[i], round(sum(rows[layers[i]]) / 2, 1)) for i in range(len(boxes)))
    right = max((x[i] + grid.widths[i] / 2 for i in range(len(x))), default=0.0)
    lanes = _lanes(boxes, centres, upward)
    return Placed(
        centres=centres,
        layers=tuple(layers),
        rows=rows,
        trunks=tuple(_trunk(s, chain, grid.targets[s], layers, x, rows) for s, chain in grid.chains.items()),
        lanes=lanes,
        width=max([right, *(at for *_, at in lanes)]),
        height=rows[-1][1] if rows else 0.0,
    )


def _layers(boxes: Sequence[Box], edges: Sequence[tuple[int, int]]) -> list[int]:
    """Every node below all that lead to it; a node that is to stand near its target right above it."""
    layers, first = [0] * len(boxes), [len(boxes)] * len(boxes)
    for s, t in sorted(edges):
        layers[t] = max(layers[t], layers[s] + 1)
    for s, t in edges:
        first[s] = min(first[s], layers[t])
    return [max(first[i] - 1, 0) if b.near and first[i] < len(boxes) else layers[i] for i, b in enumerate(boxes)]


def _rows(boxes: Sequence[Box], layers: Sequence[int]) -> tuple[tuple[float, float], ...]:
    heights = [0.0] * (max(layers, default=-1) + 1)
    for box, layer in zip(boxes, layers, strict=True):
        heights[layer] = max(heights[layer], box.height)
    rows: list[tuple[float, float]] = []
    for height in heights:
        top = rows[-1][1] + 38 if rows else 0.0
        rows.append((top, top + height))
    return tuple(rows)


def _trunk(
    source: int, chain: Sequence[int], targets: Iterable[int], layers: Sequence[int], x: Sequence[float], rows: Sequence
) -> Trunk:
    points = []
    for n, i in enumerate(chain, 1):
        top, bottom = rows[layers[source] + n]
        points += [(x[i], top), (x[i], bottom)]
    branches = tuple((t, 2 * (layers[t] - layers[source] - 1)) for t in targets)
    return Trunk(source, tuple(points), branches)


def _lanes(
    boxes: Sequence[Box], centres: Sequence[tuple[float, float]], upward: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int, float], ...]:
    """One lane for each source, to the right of everything that it passes."""
    lanes: dict[int, float] = {}
    taken: list[tuple[float, float, float]] = []  # (top, bottom, x)
    for s in sorted({s for s, _ in upward}):
        ys = [centres[i][1] for i in (s, *(t for source, t in upward if source == s))]
        top, bottom = min(ys), max(ys)
        passed = [c[0] + b.width / 2 for b, c in zip(boxes, centres, strict=True) if top <= c[1] <= bottom]
        at = max([*passed, *(x for a, b, x in taken if a <= bottom and b >= top)]) + LANE
        taken.append((top, bottom, at))
        lanes[s] = at
    return tuple((s, t, round(lanes[s], 1)) for s, t in upward)


class _Grid:
    """The boxes in their layers, with a point in each layer that a long line passes; one line for all of a source."""

    def __init__(self, boxes: Sequence[Box], edges: Sequence[tuple[int, int]], layers: Sequence[int]):
        self.widths = [b.width for b in boxes]
        self.above: list[list[tuple[int, float]]] = [[] for _ in boxes]
        self.below: list[list[tuple[int, float]]] = [[] for _ in boxes]
        self.layer: list[list[int]] = [[] for _ in range(max(layers, default=-1) + 1)]
        self.targets: dict[int, list[int]] = {}
        self.chains: dict[int, list[int]] = {}
        for s, t in sorted(set(edges)):
            self.targets.setdefault(s, []).append(t)
        for i, layer in enumerate(layers):
            self.layer[layer].append(i)
            if i in self.targets:
                self._line(i, layers)

    def _line(self, source: int, layers: Sequence[int]) -> None:
        chain = [source]
        for layer in range(layers[source] + 1, max(layers[t] for t in self.targets[source])):
            point = len(self.widths)
            self.widths.append(10.0)
            self.above.append([])
            self.below.append([])
            self.layer[layer].append(point)
            self._join(chain[-1], point)
            chain.append(point)
        for t in self.targets[source]:
            self._join(chain[layers[t] - layers[source] - 1], t)
        self.chains[source] = chain[1:]

    def _join(self, upper: int, lower: int) -> None:
        """A piece of a line. It wants to be straight between narrow ends: one such piece above a node, one below."""
        straight = max(self.widths[upper], self.widths[lower]) < SMALL and not (
            any(w == STRAIGHT for _, w in self.below[upper]) or any(w == STRAIGHT for _, w in self.above[lower])
        )
        weight = STRAIGHT if straight else 1
        self.below[upper].append((lower, weight))
        self.above[lower].append((upper, weight))

    # ------------------------------------------------------------------------------------------------ order

    def order(self) -> None:
        """Sorts each layer by the means of the neighbours' places, down and up, and keeps the best order seen."""
        best, crossings = self.layer, self._crossings(self.layer)
        current = [list(row) for row in self.layer]
        place = {i: p for row in current for p, i in enumerate(row)}
        for sweep in range(SWEEPS):
            if not crossings:
                break
            down = sweep % 2 == 0
            near = self.above if down else self.below
            for row in current if down else reversed(current):
                mean = {i: sum(place[n] for n, _ in near[i]) / len(near[i]) if near[i] else place[i] for i in row}
                row.sort(key=mean.__getitem__)
                place.update((i, p) for p, i in enumerate(row))
            found = self._crossings(current)
            if found < crossings:
                best, crossings = [list(row) for row in current], found
        self.layer = best

    def _crossings(self, rows: Sequence[Sequence[int]]) -> int:
        count = 0
        for upper, lower in itertools.pairwise(rows):
            place = {i: p for p, i in enumerate(lower)}
            ends: list[int] = []
            for i in upper:
                mine = sorted(place[n] for n, _ in self.below[i])
                count += sum(len(ends) - bisect.bisect_right(ends, p) for p in mine)
                for p in mine:
                    bisect.insort(ends, p)
        return count

    # -------------------------------------------------------------------------------------------- positions

    def positions(self) -> list[float]:
        """The x of every box and point: each as near as it can to its neighbours' mean, none on top of another."""
        x = [0.0] * len(self.widths)
        for row in self.layer:
            self._settle(row, x, lambda i: (0.0, 1.0))
        for sweep in range(2 * SWEEPS):
            sides = ((self.above,), (self.below,), (self.above, self.below))[min(sweep // 2, 2)]
            for row in self.layer if sweep % 2 == 0 else reversed(self.layer):
                self._settle(row, x, self._wish(x, sides))
        return x

    def _wish(self, x: Sequence[float], sides: Sequence) -> Callable[[int], tuple[float, float]]:
        def wish(i: int) -> tuple[float, float]:
            near = [pair for side in sides for pair in side[i]]
            total = sum(w for _, w in near)
            return (sum(x[n] * w for n, w in near) / total, total) if near else (x[i], 0.1)

        return wish

    def _settle(self, row: Sequence[int], x: list[float], wish: Callable[[int], tuple[float, float]]) -> None:
        """The least-squares fit of a layer to its wishes, in order and with gaps: neighbours that touch move as one."""
        offset, offsets = 0.0, []
        for before, i in itertools.zip_longest([None, *row[:-1]], row):
            if before is not None:
                offset += (self.widths[before] + self.widths[i]) / 2 + GAP
            offsets.append(offset)
        pools: list[tuple[float, float, int]] = []  # (where, weight, how many)
        for i, shift in zip(row, offsets, strict=True):
            where, weight = wish(i)
            pool = (where - shift, weight, 1)
            while pools and pools[-1][0] > pool[0]:
                other = pools.pop()
                total = other[1] + pool[1]
                pool = ((other[0] * other[1] + pool[0] * pool[1]) / total, total, other[2] + pool[2])
            pools.append(pool)
        places = [where for where, _, count in pools for _ in range(count)]
        for i, where, shift in zip(row, places, offsets, strict=True):
            x[i] = where + shift
