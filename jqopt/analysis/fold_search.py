"""The search for a fold: what is asked of which value, from a group's activation back to parameters.

Every other reader of a scaled value is asked whether it can live with it: weights take the scale up, a test of the sign
doesn't see it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jqopt._jaxpr import OPAQUE, Address
from jqopt._view import SAME
from jqopt.analysis.flow import ENTER, LEAVE, SLICE, Equation, Flow, Value
from jqopt.analysis.fold_rules import (
    CHOICES,
    COMPARISONS,
    CONTRACTIONS,
    FREE,
    KINDS,
    NONE,
    PARALLEL,
    Axes,
    Stop,
    ahead,
    back,
    broadcast,
    compress,
    described,
    is_fixed,
    number,
    rule_of,
    weight_labels,
)

TRIALS = 200  # ways through products that are tried for one group


class Ask(NamedTuple):
    """What one reader of a value wants of it: the value times scale[labels] ** power."""

    labels: np.ndarray
    power: int
    offset: float = 0.0  # of a parameter in `offset + parameter`, which is what is scaled
    kind: str = ""
    by: frozenset[tuple[Equation, int]] = frozenset()  # (equation, operand) that read the value and want this


_PARAMETER, _INPUT = 1, 2


class Program:
    """What the searches of all groups share: the order of the equations, and what each value depends on."""

    def __init__(self, flow: Flow, keys: Mapping[Address, Sequence[str]]):
        self.flow, self.by_address, self.keys = flow, flow.by_address, keys
        self.leaf = {v.name: i for i, v in enumerate(flow.leaves)}
        self.place = {e: i for i, e in enumerate(flow.equations)}
        self.needs: dict[Value, int] = {v: _PARAMETER for v in flow.leaves if v.kind == "parameter"}
        self.needs |= dict.fromkeys(flow.inputs, _INPUT)
        for e in flow.equations:
            bits = _INPUT if e.op == ENTER else 0  # what a loop carries may come to depend on anything
            for v in e.inputs:
                bits |= self.needs.get(v, 0)
            self.needs.update(dict.fromkeys(e.outputs, bits))
        self.dead: set[Equation] = set()
        for e in reversed(flow.equations):
            if _is_pure(e) and all(self._is_dead(v) for v in e.outputs):
                self.dead.add(e)

    def _is_dead(self, value: Value) -> bool:
        """Does nobody read it? What isn't a float may decide on a branch or the end of a loop."""
        read = value.returned or value.dtype is None or not jnp.issubdtype(value.dtype, jnp.inexact)
        return not read and all(e in self.dead for e, _ in value.uses)

    def moves(self, value: Value) -> bool:
        """Does the value depend on the model's inputs?"""
        return bool(self.needs.get(value, 0) & _INPUT)

    def is_weight(self, value: Value) -> bool:
        """Is it made of parameters alone (and of state and constants)?"""
        return self.needs.get(value, 0) == _PARAMETER

    def name(self, value: Value) -> str:
        """What a message calls a value."""
        if value.kind == "input":
            return f"the model's input {value.name}"
        if value.name:
            return value.name
        if (fixed := number(value)) is not None:
            return f"the number {fixed:g}"
        if value.maker is None:
            return "a constant"
        if value.maker.op in (ENTER, LEAVE):
            return f"the value in {described(value.maker)}"
        paths = self.paths(value)
        if not self.moves(value) and paths:
            return f"{paths[0]}, as {described(value.maker)} makes it,"
        weights = [v for v in value.maker.inputs if value.maker.op in CONTRACTIONS and self.is_weight(v)]
        return f"the output of {self.paths(weights[0])[0] if weights else described(value.maker)}"

    def paths(self, value: Value) -> list[str]:
        """Paths of the parameters in a value that is made of nothing else."""
        found, todo, seen = [], [value], set()
        while todo:
            v = todo.pop()
            if v in seen or self.moves(v):
                continue
            seen.add(v)
            if v.kind == "parameter":
                found.append(v.name)
            todo += v.maker.inputs if v.maker is not None else ()
        return sorted(set(found))

    def keys_of(self, equation: Equation) -> Sequence[str]:
        """Keys of an equation's sites; the paths of its weights where it is no site of a group."""
        weights = (v for v in equation.inputs[:2] if self.is_weight(v))
        return self.keys.get(equation.address) or [p for v in weights for p in self.paths(v)]


def _is_pure(e: Equation) -> bool:
    """Does an equation do nothing but make its outputs? What a loop carries goes around."""
    return bool(e.outputs) and e.op not in (*OPAQUE, LEAVE, "swap") and "callback" not in e.op


# ----------------------------------------------------------------------------------------------- the search


class Search:
    """One group's search: what is asked of which value. Activations are settled first, the last made first.

    So when a value is settled, all that its readers ask of it is known: those that asked for nothing must cope.
    """

    def __init__(self, program: Program, size: int):
        self.program, self.size = program, size
        self.tied: np.ndarray | None = None  # the smallest channel that each channel is tied to
        self.asks: dict[Value, tuple[Ask, ...]] = {}
        self.ahead: set[Value] = set()  # scaled since it is made of a scaled value; nobody asked for it
        self.asked: set[tuple[Equation, int, int]] = set()  # (equation, operand, output)
        self.consumed: dict[Equation, None] = {}
        self.found: tuple[tuple[str, Ask], ...] = ()  # (path of a parameter, what becomes of it)
        self.heap: list[tuple[bool, int, int, Value]] = []
        self.tasks: list[tuple[Value, Ask]] = []
        self.positive = ""
        self.trials = [TRIALS]  # shared by all copies

    def copy(self) -> Search:
        """A search that may take another way from here."""
        twin = Search.__new__(Search)
        twin.program, twin.size, twin.tied, twin.trials = self.program, self.size, self.tied, self.trials
        twin.asks, twin.ahead, twin.asked = dict(self.asks), set(self.ahead), set(self.asked)
        twin.consumed, twin.found, twin.positive = dict(self.consumed), self.found, self.positive
        twin.heap, twin.tasks = list(self.heap), list(self.tasks)
        return twin

    # ------------------------------------------------------------------------------------------ ties

    def tie(self, left: np.ndarray, right: np.ndarray) -> None:
        """The channels `left` and `right`, pair by pair, must have the same scale."""
        tied = np.arange(self.size, dtype=np.int32) if self.tied is None else self.tied.copy()
        while True:
            a, b = tied[left], tied[right]
            apart = a != b
            if not apart.any():
                break
            a, b = a[apart], b[apart]
            np.minimum.at(tied, np.maximum(a, b), np.minimum(a, b))
            while not np.array_equal(further := tied[tied], tied):
                tied = further
        self.tied = tied

    def tie_along(self, labels: np.ndarray, axis: int) -> np.ndarray:
        """Labels that are one along an axis, since what they stand for is."""
        if labels.shape[axis] == 1:
            return labels
        most = labels.max(axis, keepdims=True)
        real = labels >= 0
        if ((labels == NONE) & (most >= 0)).any():
            raise Stop("a part of what is one value would be scaled, and a part not")
        apart = real & (labels != most)
        if apart.any():
            self.tie(labels[apart], np.broadcast_to(most, labels.shape)[apart])
        return most

    def merge(self, value: Value, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """What both ask for."""
        if left.shape == right.shape and (left == right).all():
            return left
        if (((left >= 0) & (right == NONE)) | ((left == NONE) & (right >= 0))).any():
            raise Stop("{0} is read with the scale and without it", lambda: self.program.name(value))
        left, right = np.broadcast_arrays(left, right)
        apart = (left >= 0) & (right >= 0) & (left != right)
        both = np.maximum(left, right)
        if apart.any():
            self.tie(left[apart], right[apart])
            assert self.tied is not None
            both = np.where(both >= 0, self.tied[both], both)
        return compress(both)

    # ---------------------------------------------------------------------------------------- asking

    def demand(self, value: Value, ask: Ask, lead: int, reader: tuple[Equation, int] | None) -> None:
        """One reader asks a value to be scaled; the labels have `lead` axes for loops."""
        labels, own = ask.labels, len(value.loops)
        for axis in range(own, lead):  # the value is the same in every iteration of these
            labels = self.tie_along(labels, axis)
        labels = labels.reshape((*labels.shape[:own], *labels.shape[lead:]))
        ask = ask._replace(labels=labels, by=frozenset({reader} if reader else ()))
        if value in self.ahead:
            raise Stop("{0} would be scaled twice", lambda: self.program.name(value))
        before = self.asks.get(value)
        if before is None:
            place = -1 if value.maker is None else self.program.place[value.maker]
            heapq.heappush(self.heap, (not self.program.moves(value), -place, len(self.asks), value))
        found = list(before or ())
        for i, other in enumerate(found):
            if (other.power, other.offset) == (ask.power, ask.offset):
                if other.by & ask.by:
                    raise Stop("{0} would be scaled twice", lambda: self.program.name(value))
                found[i] = other._replace(labels=self.merge(value, other.labels, labels), by=other.by | ask.by)
                break
        else:
            found.append(ask)
        self.asks[value] = tuple(found)

    def next(self) -> tuple[Value, Ask] | None:
        """The next thing that is asked of a value which is made of others; None at the end."""
        while not self.tasks and self.heap:
            late, *_, value = heapq.heappop(self.heap)
            try:
                self.settle(value)
            except Stop as stop:
                stop.late = late
                raise
        return self.tasks.pop() if self.tasks else None

    def settle(self, value: Value) -> None:
        """All is known that is asked of a value: absorbs it, or leaves it to what makes the value."""
        asks, name = self.asks[value], lambda: self.program.name(value)
        if value.returned:
            raise Stop("{0} is returned by the model", name)
        if self.program.needs.get(value, 0) == 0:
            raise Stop("it is {0}, which is no parameter", name)
        if value.kind == "input":
            raise Stop("it is {0}", name)
        asks = self._final(value, asks)
        self.asks[value] = asks
        for ask in asks:
            self._readers(value, value, ask)
            if value.kind == "parameter":
                self.found += ((value.name, ask),)
            else:
                self.tasks.append((value, ask))

    def _final(self, value: Value, asks: tuple[Ask, ...]) -> tuple[Ask, ...]:
        """The asks with NONE where nobody asks for anything."""
        if not any((a.labels == FREE).any() for a in asks) and len(asks) == 1:
            return asks
        if len(asks) == 1 or all(a.by == asks[0].by and a.offset == 0 for a in asks):  # all readers want all of it
            return tuple(a._replace(labels=np.where(a.labels == FREE, np.int32(NONE), a.labels)) for a in asks)
        wide = np.broadcast_arrays(*(a.labels for a in asks))
        used = np.sum([w >= 0 for w in wide], axis=0)
        if (used > 1).any() or any(((w == NONE) & (used > 0)).any() for w in wide):
            raise Stop("{0} would be scaled in two ways", lambda: self.program.name(value))
        return tuple(
            a._replace(labels=np.where((w == FREE) & (used == 0), np.int32(NONE), w)) for a, w in zip(asks, wide)
        )

    # --------------------------------------------------------------------------------------- readers

    def _readers(self, origin: Value, value: Value, ask: Ask) -> None:
        """Looks at all readers of a scaled value that did not ask for the scale."""
        todo = [(value, ask)]
        for value, ask, e, operand in ((v, a, e, i) for v, a in todo for e, i in v.uses):  # todo grows on the way
            if e in self.program.dead:
                continue
            try:
                outs = self._through(e, operand, value, ask)
            except Stop:
                raise Stop("{0} is also read by {1}", *_names(self.program, origin, e)) from None
            for out, labels, power in outs:
                target = e.outputs[out]
                if target in self.asks or target in self.ahead:
                    raise Stop("{0} is also read by {1}", *_names(self.program, origin, e))
                if target.returned:
                    raise Stop("{0} is also read by {1}, which the model returns", *_names(self.program, origin, e))
                self.ahead.add(target)
                todo.append((target, Ask(labels, power, ask.offset)))

    def _through(self, e: Equation, operand: int, value: Value, ask: Ask) -> list[tuple[int, np.ndarray, int]]:
        """(output, labels, power) of what a reader newly makes of a scaled operand; raises if it can't."""
        program = self.program
        if all((e, operand, out) in self.asked for out in range(len(e.outputs))):
            return []
        lead = len(e.loops) - (e.op == SLICE)
        own = len(value.loops)
        labels = ask.labels.reshape((*ask.labels.shape[:own], *(1,) * (lead - own), *ask.labels.shape[own:]))
        weight = not program.moves(value)
        if e.op in CONTRACTIONS and not weight and operand < 2 and self._consume(e, operand, labels, ask.power):
            return []
        if not weight and self._sign_only(e, operand, labels):
            self.positive = self.positive or described(e)
            return []
        rule = rule_of(e)
        maps = rule.maps(e)
        outs = ahead(e, operand, labels, maps)
        outs = {o: x for o, x in outs.items() if (x >= 0).any() and (e, operand, o) not in self.asked}
        if not outs:
            return []
        if weight and (rule.how != "move" or any(program.moves(e.outputs[o]) for o in outs)):
            raise Stop("")  # a parameter that is scaled may be used nowhere else
        others = [v for i, v in enumerate(e.inputs) if i != operand and maps[i] is not None and e.op not in PARALLEL]
        if rule.how == "sum" and not all(map(is_fixed, others)):
            raise Stop("")
        if rule.positive or (others and rule.how == "sum"):
            self.positive = self.positive or described(e)
        power = -ask.power if e.op == "div" and operand == 1 else ask.power
        return [(o, x, power) for o, x in outs.items()]

    def _consume(self, e: Equation, operand: int, labels: np.ndarray, power: int) -> bool:
        """Multiplies the weight that is contracted with a scaled activation; False if there is none."""
        other = e.inputs[1 - operand]
        if not self.program.is_weight(other):
            return False
        found = weight_labels(e, operand, labels)
        if found is None or e in self.consumed:
            return False
        self.consumed[e] = None
        self.asked.add((e, 1 - operand, 0))
        self.demand(other, Ask(found, -power, 0.0, "weight"), len(e.loops), (e, 1 - operand))
        return True

    def _sign_only(self, e: Equation, operand: int, labels: np.ndarray) -> bool:
        """Is the result the same for every positive scale?"""
        if e.op in COMPARISONS:
            return number(e.inputs[1 - operand]) == 0
        if e.op in CHOICES:
            lead = labels.ndim - e.inputs[operand].ndim
            return all(labels.shape[lead + a] == 1 for a in e.params["axes"])
        return e.op in ("sign", "is_finite")

    # ------------------------------------------------------------------------------------- operands

    def options(self, value: Value, ask: Ask) -> list[list[tuple[int, Ask]]]:
        """The ways in which the operands of what makes a value can take the scale, the best one first."""
        e, program = value.maker, self.program
        assert e is not None
        rule = rule_of(e)
        if ask.offset and rule.how != "move":
            raise Stop("{0} is no plain gain", lambda: program.name(value))
        if e.op in PARALLEL:
            return [[(e.outputs.index(value), ask)]]
        maps = rule.maps(e)
        able = [i for i, m in enumerate(maps) if m is not None]
        if rule.how == "product":
            return self._branches(e, maps, [i for i in able if program.needs.get(e.inputs[i], 0)], ask)
        left = [i for i in able if not is_fixed(e.inputs[i])]
        added = [number(e.inputs[i]) for i in left]
        if e.op in ("add", "sub") and not program.moves(value) and added.count(None) == 1 and len(added) == 2:
            i = added.index(None)
            if e.op == "add" or i == 0:
                offset = added[1 - i]
                assert offset is not None
                return [[(left[i], ask._replace(offset=offset if e.op == "add" else -offset))]]
        if rule.positive or any(not math.isfinite(number(e.inputs[i]) or 0) for i in able):
            self.positive = self.positive or described(e)
        return [[(i, ask) for i in left]]

    def _branches(
        self, e: Equation, maps: Sequence[Axes | None], able: list[int], ask: Ask
    ) -> list[list[tuple[int, Ask]]]:
        """The operands of a product: those that need the fewest ties first, among them parameters."""
        lead = ask.labels.ndim - e.outputs[0].ndim

        def reach(i: int) -> int:
            varies = _varying(e.inputs[i])
            axes = maps[i] or ()
            return math.prod(ask.labels.shape[lead + b] for a, b in enumerate(axes) if b is not None and varies[a])

        order = sorted(able, key=lambda i: (-reach(i), not self.program.is_weight(e.inputs[i]), i))
        flipped = ask._replace(power=-ask.power)
        return [[(i, flipped if e.op == "div" and i == 1 else ask)] for i in order]

    def take(self, value: Value, ask: Ask, option: list[tuple[int, Ask]]) -> None:
        """Asks the operands of what makes a value."""
        e = value.maker
        assert e is not None
        out, program = e.outputs.index(value), self.program
        for i, wanted in option:
            operand = e.inputs[i]
            alone = len(operand.uses) == 1 and program.moves(operand)
            labels, lead = back(e, out, i, wanted.labels, self.tie_along, alone)
            if not (labels >= 0).any():
                continue
            if not program.needs.get(operand, 0):
                raise Stop("{0} takes {1}", lambda: described(e), lambda v=operand: program.name(v))
            kind = wanted.kind or ("" if program.moves(operand) else KINDS.get(e.op, "gain"))
            self.asked.add((e, i, out))
            self.demand(operand, wanted._replace(labels=labels, kind=kind), lead, (e, i))


def _names(program: Program, value: Value, e: Equation) -> tuple[Callable[[], str], Callable[[], str]]:
    return (lambda: program.name(value)), (lambda: described(e))


def _varying(value: Value) -> list[bool]:
    """Along which axes can a value change? Not along those it was only broadcast to."""
    maker = value.maker
    if maker is not None and maker.op in (*SAME, "convert_element_type"):
        return _varying(maker.inputs[maker.outputs.index(value)])
    if maker is None or maker.op != "broadcast_in_dim":
        return [True] * value.ndim
    inner = _varying(maker.inputs[0])
    kept = {b: inner[a] for a, b in enumerate(broadcast(maker)[0] or ()) if b is not None}
    return [kept.get(a, False) for a in range(value.ndim)]


def solve(search: Search) -> Search:
    """Follows all asks to parameters; where a product leaves a choice, the first that works."""
    while (task := search.next()) is not None:
        options = search.options(*task)
        failed: Stop | None = None
        for option in options[:-1]:
            search.trials[0] -= 1
            if search.trials[0] < 0:
                raise failed or Stop("there are too many products on the way")
            branch = search.copy()
            try:
                branch.take(*task, option)
                return solve(branch)
            except Stop as stop:
                failed = _better(failed, stop)
        try:
            if not options:
                raise Stop("it is {0}, which is no parameter", lambda t=task: search.program.name(t[0]))
            search.take(*task, options[-1])
            if failed is not None:
                return solve(search)
        except Stop as stop:
            raise _better(failed, stop) from None
    return search


def _better(one: Stop | None, other: Stop) -> Stop:
    """The reason to tell: a way that ends at a parameter was the right one, else the first."""
    return other if one is None or (other.late and not one.late) else one
