"""Rotations: which axis classes may be multiplied by an orthogonal matrix so that the float function stays the same.

The parameters that hold the class are turned, and every equation must then give what it gave, turned or not at all:
products contract two turned axes or let one pass, sums add what turns alike, a norm sums squares over the whole axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jqopt._view import SAME
from jqopt.analysis import turns
from jqopt.analysis.classes import AxisGraph
from jqopt.analysis.flow import ENTER, LEAVE, SLICE, STACK, Equation, Value
from jqopt.analysis.fold_rules import (
    CONTRACTIONS,
    PARALLEL,
    RULES,
    Axes,
    Stop,
    contracted,
    described,
    number,
)
from jqopt.analysis.fold_search import Program
from jqopt.analysis.still import is_still
from jqopt.analysis.turns import Labels, Turned


@dataclasses.dataclass(frozen=True, eq=False)
class Rotatable:
    """What turning an axis class means; `reason` says why it can't be, and is empty where it can."""

    name: str
    size: int
    turned: Mapping[str, Turned]  # leaf of the tree -> what turns of it
    constant: Mapping[str, tuple[int, ...]]  # leaf -> axes along which all its entries must be the same
    reason: str = ""
    means: bool = False  # does something sum along it, so that the matrix must keep the mean?
    adds: bool = False  # are two activations that hold it added? Then it is a residual stream
    mixes: bool = False  # does it pass a product of two activations as a free axis? As attention's values do


class _State(NamedTuple):
    """How a value turns. `product`: it is an elementwise product of two turned values, whose sum stays the same."""

    axes: Turned
    product: bool = False


class _Again(Exception):
    """Something was learnt that the walk must begin with."""


def rotatable(program: Program, axes: AxisGraph, name: str, keep_mean: bool = False) -> Rotatable:
    """Can the class `name` of `axes` be turned?

    Args:
        keep_mean: the matrix has row sums of one, so that sums along the axis stay and constants do too.
    """
    leaf = axes.leaf_of[name]
    turned: dict[str, dict[int, Labels]] = {}
    try:
        for symbol in axes.symbols:
            labels = turns.of_node(axes.nodes[symbol.name], leaf)
            if labels is not None:
                turned.setdefault(symbol.path, {})[symbol.axis] = labels
    except Stop as stop:
        return Rotatable(name, leaf.size, {}, {}, stop.text())
    for path in turned:
        dtype = program.flow.leaves[program.leaf[path]].dtype
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            return Rotatable(name, leaf.size, {}, {}, f"{path} is {dtype}, not floating point")
    walk = _Walk(program, leaf.size, keep_mean, turned)
    while True:
        try:
            walk.run()
        except _Again:
            continue
        break
    reason = walk.failed.text() if walk.failed else "" if walk.turned else "nothing turns along it"
    return Rotatable(name, leaf.size, walk.turned, walk.constant, reason, walk.means, walk.adds, walk.mixes)


class _Walk:
    """Follows what turns through the flow."""

    def __init__(self, program: Program, size: int, keep_mean: bool, turned: Mapping[str, Turned]):
        self.program, self.size, self.keep_mean = program, size, keep_mean
        self.turned = dict(turned)
        self.constant: dict[str, tuple[int, ...]] = {}
        self.assumed: dict[Equation, _State | None] = {}  # of what a loop carries that starts as zeros

    def run(self) -> None:
        self.failed: Stop | None = None
        self.means = self.adds = self.mixes = False
        self.state: dict[Value, _State] = {}
        self.lost: set[Value] = set()  # made of what could not be followed
        self.zero: set[Value] = set()  # carried, zeros at first: how it turns is seen when it comes back
        for value in self.program.flow.leaves:
            if value.name in self.turned:
                self.state[value] = _State(self.turned[value.name])
        for e in self.program.flow.equations:
            if e in self.program.dead:
                continue
            made: Mapping[Value, _State | None] = {}
            lost = any(v in self.lost for v in e.inputs)
            try:
                made = self.equation(e)
            except Stop as stop:  # to go on shows what else the class is: a residual stream, perhaps
                self.failed, lost = self.failed or stop, True
            found = {v: s for v, s in made.items() if s is not None and s.axes}
            self.state.update(found)
            self.lost.update(v for v in e.outputs if lost and v not in found)
        for value in self.program.flow.outputs:
            if value in self.state and self.failed is None:
                axis = min(self.state[value].axes)
                self.failed = Stop("it is axis {0} of the model's output", axis)

    # ------------------------------------------------------------------------------------- one equation

    def equation(self, e: Equation) -> dict[Value, _State | None]:
        states = [self.state.get(v) for v in e.inputs]
        op = e.op
        if op == LEAVE and e.inputs[0] in self.zero and e.inputs[0].maker is not None:
            self.assumed[e.inputs[0].maker] = states[1]
            raise _Again
        if not any(states):
            if op == ENTER and e not in self.assumed and number(e.inputs[0]) == 0:
                self.zero.add(e.outputs[0])
            elif self.stays_zero(e):
                self.zero.update(e.outputs)
            return {e.outputs[0]: self.assumed[e]} if e in self.assumed else {}
        if op in (ENTER, LEAVE):
            return {e.outputs[0]: states[0] if op == ENTER else self.leave(e)}
        if op in PARALLEL:
            return dict(zip(e.outputs, states))
        if op == "square" or (op == "integer_pow" and e.params["y"] == 2):
            return {e.outputs[0]: self.product(e, states[0], states[0])}
        rule = RULES.get(op)
        if rule is None or rule.positive or (op == "convert_element_type" and not _floats(e)):
            raise self.stop("{0} is not linear in it", e)
        if op in CONTRACTIONS:
            return {e.outputs[0]: self.contraction(e, states)}
        if op in ("mul", "div"):
            return {e.outputs[0]: self.scaled(e, states)}
        if op in _PLACES:
            if any(states[1:]) and op != "concatenate":
                raise self.stop("{0} is not linear in it", e)
            return self.moved(e, states)
        if rule.how == "move" or op in ("reduce_sum", "cumsum", "reduce_window_sum"):
            if any(states[1:]):
                raise self.stop("{0} is not linear in it", e)
            return {e.outputs[0]: self.mapped(e, 0, self.maps(e))}
        return {e.outputs[0]: self.together(e)}

    def stays_zero(self, e: Equation) -> bool:
        if e.op in ("mul", "div"):
            return e.inputs[0] in self.zero or (e.op == "mul" and e.inputs[1] in self.zero)
        rule = RULES.get(e.op)
        return rule is not None and rule.how == "move" and e.op != "concatenate" and e.inputs[0] in self.zero

    def stop(self, form: str, e: Equation, *more: Any) -> Stop:
        return Stop(form, lambda: described(e), *(self.words(m) if isinstance(m, Value) else m for m in more))

    def words(self, value: Value) -> Any:
        return lambda: self.program.name(value)

    def maps(self, e: Equation) -> Sequence[Axes | None]:
        try:
            return RULES[e.op].maps(e)
        except Stop:
            raise self.stop("{0} is not linear in it", e) from None

    def mapped(self, e: Equation, operand: int, maps: Sequence[Axes | None]) -> _State:
        """What an operand's turned axes are in the result, where it is moved, or summed along other axes."""
        state, axes = self.state[e.inputs[operand]], maps[operand]
        if axes is None:
            raise self.stop("{0} is not linear in it", e)
        out: dict[int, Labels] = {}
        for a, labels in state.axes.items():
            b = axes[a]
            if b is not None:
                out[b] = labels
            elif e.op != "reduce_sum":
                raise self.stop("{0} takes its positions apart", e)
            elif not state.product:
                self.mean(e)
        return _State(out, state.product)

    def mean(self, e: Equation) -> None:
        """A sum along the axis: it stays where the matrix has row sums of one."""
        self.means = True
        if not self.keep_mean:
            raise self.stop(
                "{0} sums along it (the mean of a LayerNorm, which an RMSNorm doesn't have); a rotation that keeps the "
                "mean passes: keep_mean=True",
                e,
            )

    # ------------------------------------------------------------------------------------ sums, choices

    def together(self, e: Equation) -> _State:
        """Of a sum or a choice of values, all of which must turn alike."""
        maps = self.maps(e)
        able = [i for i, m in enumerate(maps) if m is not None]
        if any(v in self.state for i, v in enumerate(e.inputs) if i not in able):
            raise self.stop("{0} is not linear in it", e)
        first = next(i for i in able if e.inputs[i] in self.state)
        target = self.mapped(e, first, maps)
        if e.op in ("add", "sub", "add_any") and len(able) == 2 and not target.product:
            terms = [e.inputs[i] for i in able if not self.still_in(e.inputs[i], maps[i] or (), target)]
            moving = [v for v in terms if self.program.moves(v) and v not in self.lost]
            self.adds |= len(moving) == 2 and any(map(self.branches, moving))
        for i in able:
            if e.inputs[i] in self.state:
                found = self.mapped(e, i, maps)
                ok = found.product == target.product and turns.same(found.axes, target.axes)
            else:
                ok = self.fits(e, e.inputs[i], maps[i] or (), target)
            if not ok:
                self.shifted(e, maps, target)
                raise self.stop("{0} takes it together with {1}, which does not turn with it", e, e.inputs[i])
        if e.op == "select_n" and not all(self.still(e.inputs[0], a) for a in target.axes if e.inputs[0].ndim):
            raise self.stop("{0} chooses differently along it", e)
        return target

    def branches(self, value: Value) -> bool:
        """Is a value read by more than one equation, as what goes around a block is?"""
        while len(value.uses) == 1 and value.maker is not None and value.maker.op in _SAME_VALUE:
            value = value.maker.inputs[value.maker.outputs.index(value)]
        return len({e for e, _ in value.uses if e not in self.program.dead}) > 1

    def shifted(self, e: Equation, maps: Sequence[Axes | None], target: _State) -> None:
        """`1 + gain`: a parameter to which a number is added is a gain, too."""
        still = [self.still_in(v, m or (), target) for v, m in zip(e.inputs, maps) if v not in self.state]
        if e.op in ("add", "sub") and still and all(still) and not any(map(self.program.moves, e.inputs)):
            self.demote(e)

    def fits(self, e: Equation, value: Value, axes: Axes, target: _State) -> bool:
        """Is a value that doesn't turn the same after it is turned? `axes`: those of the result that its are."""
        if e.op in _UPDATES and any(b not in axes for b in target.axes):  # it goes to a part of the turned axis
            return False
        fixed = 0 if value in self.zero else number(value)
        if fixed is not None and (fixed == 0 or not math.isfinite(fixed)):
            return fixed == 0
        still = self.still_in(value, axes, target)
        self.means |= still and not target.product
        return still and self.keep_mean and not target.product

    def still_in(self, value: Value, axes: Axes, target: _State) -> bool:
        """Is it constant along the turned axes of a result? `axes`: those of the result that its are."""
        return all(b not in axes or self.still(value, axes.index(b)) for b in target.axes)

    def still(self, value: Value, axis: int) -> bool:
        return is_still(value, axis, self.constant)

    def leave(self, e: Equation) -> _State | None:
        """A loop's result: what it carries must turn as it did when it entered."""
        carried, last = e.inputs
        before, after = self.state.get(carried), self.state.get(last)
        alike = before is not None and after is not None and before.product == after.product
        if alike and before is not None and after is not None and turns.same(before.axes, after.axes):
            return before
        if before is not None and after is None and self.fits(e, last, tuple(range(last.ndim)), before):
            return before
        raise self.stop("{0} does not come back as it went in", e)

    # ---------------------------------------------------------------------------------------- products

    def product(self, e: Equation, one: _State | None, other: _State | None) -> _State:
        """Of two values elementwise: its sum over the turned axes is their inner product, which stays."""
        alike = one is not None and other is not None and turns.same(one.axes, other.axes)
        if one is None or other is None or not alike or one.product or other.product:
            raise self.stop("{0} is not linear in it", e)
        return _State(one.axes, True)

    def scaled(self, e: Equation, states: Sequence[_State | None]) -> _State:
        left, right = states
        if left is not None and right is not None:
            if e.op == "mul" and e.inputs[0] is not e.inputs[1]:
                self.demote(e)
            if e.op == "mul":
                return self.product(e, left, right)
        if e.op == "div" and right is not None:
            raise self.stop("{0} is not linear in it", e)
        operand = 0 if left is not None else 1
        out = self.mapped(e, operand, self.maps(e))
        other = e.inputs[1 - operand]
        if other.ndim and not all(self.still(other, a) for a in out.axes):
            raise self.stop("{0} multiplies it by {1}, which is not the same all along it", e, other)
        return out

    def demote(self, e: Equation) -> None:
        """A parameter that multiplies elementwise is a gain: it doesn't turn, but must be constant along the axis."""
        gains = [paths for v in e.inputs if (paths := self.gain(v))]
        if gains and gains[1:] != gains[:1]:  # two rows of one table are an inner product
            least = min(gains, key=lambda paths: max(len(self.shape(p)) for p in paths))
            for path in least:
                self.constant[path] = tuple(self.turned.pop(path))
            raise _Again

    def gain(self, value: Value) -> list[str]:
        """The leaves that turn in a value that is made of parameters, times what doesn't turn."""
        while self.program.moves(value) and value.maker is not None:
            e = value.maker
            turned = [v for v in e.inputs if v in self.state]
            if len(turned) != 1 or not (e.op in ("mul", "div") or RULES.get(e.op, RULES["add"]).how == "move"):
                return []
            value = turned[0]
        found, todo = [], [value]
        while todo:
            v = todo.pop()
            found += [v.name] if v.kind in ("parameter", "state") and v.name in self.turned else []
            todo += v.maker.inputs if v.maker is not None and v in self.state else ()
        return list(dict.fromkeys(found))

    def shape(self, path: str) -> tuple[int, ...]:
        return self.program.flow.leaves[self.program.leaf[path]].shape

    def contraction(self, e: Equation, states: Sequence[_State | None]) -> _State:
        """Two turned axes that are contracted give what they gave; any other one passes to the result."""
        pairs, maps = contracted(e), self.maps(e)
        grouped = e.op == "conv_general_dilated" and (e.params["feature_group_count"], e.params["batch_group_count"])
        out: dict[int, Labels] = {}
        for i in (0, 1):
            state, other = states[i], states[1 - i]
            if state is None:
                continue
            if state.product or (grouped and grouped != (1, 1)):
                raise self.stop("{0} is not linear in it", e)
            for a, labels in state.axes.items():
                if a in pairs[i]:
                    b = pairs[1 - i][pairs[i].index(a)]
                    facing = None if other is None else other.axes.get(b)
                    if facing is None or not np.array_equal(facing, labels):
                        raise self.stop("{0} contracts it with {1}, which does not turn with it", e, e.inputs[1 - i])
                    continue
                b = (maps[i] or ())[a]
                batch = b in (maps[1 - i] or ())
                if b is None or batch or ("ragged" in e.op and i == 0):
                    raise self.stop("{0} takes its positions apart", e)
                out[b] = labels
                self.mixes |= all(map(self.program.moves, e.inputs[:2]))
        if any(states[2:]):
            raise self.stop("{0} is not linear in it", e)
        return _State(out)

    # ------------------------------------------------------------------------------------------ places

    def moved(self, e: Equation, states: Sequence[_State | None]) -> dict[Value, _State | None]:
        """Of what moves elements in a way that labels must follow."""
        try:
            return _PLACES[e.op](self, e, states)
        except Stop as stop:
            if stop.about:
                raise
            raise self.stop("{0} takes its positions apart", e) from None


def _reshape(walk: _Walk, e: Equation, states: Sequence[_State | None]) -> dict[Value, _State | None]:
    state = states[0]
    assert state is not None
    axes = turns.reshaped(state.axes, e.inputs[0].shape, e.outputs[0].shape, walk.size)
    return {e.outputs[0]: _State(axes, state.product)}


def _layer(walk: _Walk, e: Equation, states: Sequence[_State | None]) -> dict[Value, _State | None]:
    state, step = states[0], -1 if e.op == SLICE else 1
    assert state is not None
    if e.op == SLICE and 0 in state.axes:
        raise Stop("cut")
    return {e.outputs[0]: _State({a + step: labels for a, labels in state.axes.items()}, state.product)}


def _rev(walk: _Walk, e: Equation, states: Sequence[_State | None]) -> dict[Value, _State | None]:
    def turn(a: int, labels: Labels) -> Labels | None:
        return turns.canonical(labels[::-1], walk.size) if a in e.params["dimensions"] else labels

    return {e.outputs[0]: _each(states[0], turn)}


def _cut(walk: _Walk, e: Equation, states: Sequence[_State | None]) -> dict[Value, _State | None]:
    """Of a slice or a split."""

    def turn(where: slice, labels: Labels) -> Labels | None:
        return turns.canonical(labels[where], walk.size)

    if e.op == "slice":
        p = e.params
        steps = p["strides"] or (1,) * e.inputs[0].ndim
        where = [slice(*s) for s in zip(p["start_indices"], p["limit_indices"], steps)]
        return {e.outputs[0]: _each(states[0], lambda a, labels: turn(where[a], labels))}
    axis, at, out = e.params["axis"], 0, {}
    for value, n in zip(e.outputs, e.params["sizes"]):
        here = slice(at, at + n)
        out[value] = _each(states[0], lambda a, labels, h=here: turn(h, labels) if a == axis else labels)
        at += n
    return out


def _pad(walk: _Walk, e: Equation, states: Sequence[_State | None]) -> dict[Value, _State | None]:
    if number(e.inputs[1]) != 0:
        raise Stop("cut")

    def turn(a: int, labels: Labels) -> Labels | None:
        low, _, inner = e.params["padding_config"][a]
        wide = np.full(e.outputs[0].shape[a], -1, np.int32)
        place = low + np.arange(labels.size) * (inner + 1)
        inside = (place >= 0) & (place < wide.size)
        wide[place[inside]] = labels[inside]
        return turns.canonical(wide, walk.size)

    return {e.outputs[0]: _each(states[0], turn)}


def _concatenate(walk: _Walk, e: Equation, states: Sequence[_State | None]) -> dict[Value, _State | None]:
    along = e.params["dimension"]
    kinds = {s.product for s in states if s is not None}
    if len(kinds) > 1:
        raise Stop("cut")
    rests = [{a: x for a, x in (s.axes if s else {}).items() if a != along} for s in states]
    target = next((r for r in rests if r), {})
    for value, rest in zip(e.inputs, rests):
        if turns.same(rest, target):
            continue
        if rest or not walk.fits(e, value, tuple(range(value.ndim)), _State(target, kinds == {True})):
            raise walk.stop("{0} takes it together with {1}, which does not turn with it", e, value)
    parts = [None if s is None else s.axes.get(along) for s in states]
    own = turns.joined(parts, [v.shape[along] for v in e.inputs], walk.size)
    return {e.outputs[0]: _State(target if own is None else {**target, along: own}, kinds == {True})}


def _each(state: _State | None, turn: Any) -> _State:
    assert state is not None
    found = {a: turn(a, labels) for a, labels in state.axes.items()}
    if state.product and any(x is None for x in found.values()):
        raise Stop("cut")  # a part of a product along one turned axis has no sum that stays
    return _State({a: x for a, x in found.items() if x is not None}, state.product)


def _floats(e: Equation) -> bool:
    return all(jnp.issubdtype(v.dtype, jnp.floating) for v in (*e.inputs, *e.outputs))


_UPDATES = ("dynamic_update_slice", "scatter", "scatter-add")
_SAME_VALUE = (*SAME, "convert_element_type")
_PLACES: Mapping[str, Any] = {
    "reshape": _reshape,
    SLICE: _layer,
    STACK: _layer,
    "rev": _rev,
    "slice": _cut,
    "split": _cut,
    "pad": _pad,
    "concatenate": _concatenate,
}
