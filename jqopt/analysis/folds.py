"""Folds: where a scale of each input channel of a group of sites can go, so that the float function stays the same.

A group's input is divided by a scale, its weights are multiplied by it. Labels say which channel of the scale an
element of a value takes; they are followed from the group's activation back to the parameters that make it, through
all that commutes with a scale, and every other reader of a scaled value is asked whether it can live with it.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from jqopt._jaxpr import OPAQUE, Address
from jqopt._view import SAME
from jqopt.analysis.flow import ENTER, JOIN, LEAVE, SHARD, SLICE, STACK, UNSHARD, Equation, Flow, Value, line

FREE, NONE = -2, -1
"""Labels that are no channel: FREE is not read on this way, NONE must stay as it is."""

TRIALS = 200  # ways through products that are tried for one group


@dataclasses.dataclass(frozen=True, eq=False)
class Absorber:
    """A parameter that takes part in a fold.

    It becomes `(offset + parameter) * scale[labels] ** power - offset` where labels are channels, and stays where they
    are negative. `labels` broadcast to the parameter's shape.
    """

    path: str
    labels: np.ndarray  # flat positions in the scale
    kind: str  # gain | 1 + gain | bias | rows (of a previous weight) | table | weight (that reads the scaled input)
    power: int = -1  # -1: divided by the scale, 1: multiplied by it
    offset: float = 0.0

    def __str__(self) -> str:
        return f"{'/'.join(self.path.split('/')[-2:])} ({self.kind})"


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
    """Where the scale of a group's input goes; `reason` says why nowhere, and is empty where it can go."""

    group: str
    shape: tuple[int, ...]  # of the scale: (*outer, k)
    absorbers: tuple[Absorber, ...] = ()
    consumers: tuple[Absorber, ...] = ()  # the weights that read the scaled input
    ties: np.ndarray | None = None  # of the scale's shape: channels with the same number must have the same scale
    also: tuple[str, ...] = ()  # weights outside the group that read the same input and are multiplied too
    reason: str = ""
    positive: str = ""  # an operation on the way that only positive scales pass (a relu), if there is one

    @property
    def free(self) -> int:
        """How many scales can be chosen: fewer than there are channels where some must have the same."""
        return math.prod(self.shape) if self.ties is None else np.unique(self.ties).size

    def describe(self) -> str:
        """A few words: `input_layernorm/scale (gain)`, or `nowhere: <reason>`."""
        return f"nowhere: {self.reason}" if self.reason else ", ".join(map(str, self.absorbers))

    def project(self, scale: Any) -> np.ndarray:
        """The allowed scale nearest to `scale`: the geometric mean over channels that must have the same one."""
        found = np.asarray(scale)
        if self.ties is None:
            return found
        _, place, count = np.unique(self.ties.ravel(), return_inverse=True, return_counts=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(found.astype(np.float64).ravel())
        mean = np.exp(np.bincount(place, logs) / count)[place]
        return np.where(count[place] == 1, found.ravel(), mean).astype(found.dtype).reshape(found.shape)


class Group(Protocol):
    """Sites that read one activation: what folds need to know of jqopt.trace's groups."""

    @property
    def name(self) -> str: ...

    @property
    def sites(self) -> Sequence[Any]: ...


def folds(flow: Flow, groups: Sequence[Group]) -> dict[str, Fold]:
    """The fold of each group, by its name."""
    program = _Program(flow, groups)
    return {group.name: _fold(program, group) for group in groups}


def _fold(program: _Program, group: Group) -> Fold:
    first = group.sites[0]
    equation = program.by_address[first.address]
    activation = equation.inputs[1 - first.operand]
    channels = _channels(equation, first.operand)
    shape = (*first.outer, math.prod(channels))
    if channels == () or 0 in shape:
        return Fold(group.name, shape, reason=f"{program.op(equation)} contracts nothing")
    search = _Search(program, math.prod(shape))
    try:
        search.demand(activation, _Ask(_start(equation, first, channels), -1), len(equation.loops), None)
        done = _solve(search)
        missing = [s for s in group.sites if program.by_address[s.address] not in done.consumed]
        if missing:
            raise _Stop("{0} reads the same values in another layout", missing[0].key)
    except _Stop as stop:
        return Fold(group.name, shape, reason=stop.text())
    ties = None if done.tied is None else done.tied.reshape(shape)
    here = {program.by_address[s.address] for s in group.sites}
    also = [key for e in done.consumed if e not in here for key in program.keys_of(e)]
    taken = {word: tuple(a for a in done.absorbers if (a.kind == "weight") == word) for word in (True, False)}
    absorbers = tuple(sorted(taken[False], key=lambda a: a.kind == "bias"))
    return Fold(group.name, shape, absorbers, taken[True], ties, tuple(dict.fromkeys(also)), "", done.positive)


def _channels(equation: Equation, weight: int) -> tuple[int, ...]:
    """Sizes of the axes of the activation that channels run over, in the order of the scale."""
    value = equation.inputs[1 - weight]
    return tuple(value.shape[a] for a in _contracted(equation)[1 - weight])


def _contracted(equation: Equation) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The contracted axes of both operands; of a convolution the feature axes only."""
    p = equation.params
    if equation.op == "conv_general_dilated":
        return (int(p["dimension_numbers"].lhs_spec[1]),), (int(p["dimension_numbers"].rhs_spec[1]),)
    if equation.op == "ragged_dot":
        return (1,), (1,)
    numbers = p["ragged_dot_dimension_numbers"].dot_dimension_numbers if "ragged" in equation.op else None
    (left, right), _ = numbers or p["dimension_numbers"]
    return tuple(map(int, left)), tuple(map(int, right))


def _start(equation: Equation, site: Any, channels: tuple[int, ...]) -> np.ndarray:
    """Labels of a site's activation, with an axis for each loop around the site."""
    value = equation.inputs[1 - site.operand]
    k = math.prod(channels)
    labels = np.arange(k, dtype=np.int32).reshape(channels)
    axes = _contracted(equation)[1 - site.operand]
    place: list[int | None] = [axes.index(a) if a in axes else None for a in range(value.ndim)]
    labels = _arrange(labels, 0, place)
    scans, loops = tuple(site.scans), equation.loops
    stride = k
    picked = [a.start for a in site.view.fixed]
    for number, size in reversed([*enumerate(site.outer)]):
        if number >= len(scans):
            labels = labels + np.int32(picked[number - len(scans)] * stride)
        stride *= size
    labels = labels.reshape((1,) * len(loops) + labels.shape)
    for i, loop in enumerate(loops):
        if loop.address in scans:
            number = scans.index(loop.address)
            step = k * math.prod(site.outer[number + 1 :])
            count = np.arange(site.outer[number], dtype=np.int32) * np.int32(step)
            labels = labels + count.reshape([-1 if a == i else 1 for a in range(labels.ndim)])
    return labels


# ------------------------------------------------------------------------------------------- the program


class _Stop(Exception):
    """A way that leads nowhere; the text is made only when someone reads it."""

    def __init__(self, form: str, *about: Any):
        self.form, self.about = form, about
        self.late = False  # did all activations get through?

    def text(self) -> str:
        return self.form.format(*(a() if callable(a) else a for a in self.about))


_PARAMETER, _INPUT = 1, 2


class _Program:
    """What the searches of all groups share: the order of the equations, and what each value depends on."""

    def __init__(self, flow: Flow, groups: Sequence[Group]):
        self.by_address: dict[Address, Equation] = flow.by_address
        self.keys: dict[Address, list[str]] = {}
        for group in groups:
            for site in group.sites:
                self.keys.setdefault(site.address, []).append(site.key)
        self.place = {e: i for i, e in enumerate(flow.equations)}
        self.needs: dict[Value, int] = {v: _PARAMETER for v in flow.leaves if v.kind == "parameter"}
        self.needs.update(dict.fromkeys(flow.inputs, _INPUT))
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
        read = value.returned or not jnp.issubdtype(value.dtype, jnp.inexact)
        return not read and all(e in self.dead for e, _ in value.uses)

    def moves(self, value: Value) -> bool:
        """Does the value depend on the model's inputs?"""
        return bool(self.needs.get(value, 0) & _INPUT)

    def is_weight(self, value: Value) -> bool:
        """Is it made of parameters alone (and of state and constants)?"""
        return self.needs.get(value, 0) == _PARAMETER

    def op(self, equation: Equation) -> str:
        """`add (model.py:12 (Block.__call__))`."""
        where = line(equation) or equation.scope
        name = _LOOP_WORDS.get(equation.op, equation.op)
        return f"{name} ({where})" if where else name

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
        paths = self.paths(value)
        if not self.moves(value) and paths:
            return f"{paths[0]}, as {self.op(value.maker)} makes it,"
        weights = [v for v in value.maker.inputs if value.maker.op in _CONTRACTIONS and self.is_weight(v)]
        return f"the output of {self.paths(weights[0])[0] if weights else self.op(value.maker)}"

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

    def keys_of(self, equation: Equation) -> list[str]:
        """Keys of an equation's sites; the paths of its weights where it is no site of a group."""
        weights = (v for v in equation.inputs[:2] if self.is_weight(v))
        return self.keys.get(equation.address) or [p for v in weights for p in self.paths(v)]


_LOOP_WORDS = {
    ENTER: "a loop that carries it",
    LEAVE: "a loop that carries it",
    SLICE: "a scan over it",
    STACK: "a scan that collects it",
    JOIN: "a cond",
    SHARD: "a shard_map",
    UNSHARD: "a shard_map",
}


def _is_pure(e: Equation) -> bool:
    """Does an equation do nothing but make its outputs? What a loop carries goes around."""
    return bool(e.outputs) and e.op not in (*OPAQUE, LEAVE, "swap") and "callback" not in e.op


def number(value: Value) -> float | None:
    """The number of which a value is full, where it is written in the program; None if it isn't known."""
    while value.literal is None:
        maker = value.maker
        if maker is None or maker.op not in (*SAME, "convert_element_type", "broadcast_in_dim", "reshape"):
            return None
        value = maker.inputs[maker.outputs.index(value)]
    return float(np.asarray(value.literal))


def _is_fixed(value: Value) -> bool:
    """Is it full of a number that no positive factor changes: 0, an infinity, NaN?"""
    found = number(value)
    return found is not None and (found == 0 or not math.isfinite(found))


# ------------------------------------------------------------------------------------------------ labels
#
# The labels of a value: int32, an axis for each loop that the value stands in and then one for each of its own axes;
# an axis along which nothing changes has size 1. So labels stay small however large the value is.


def _arrange(labels: np.ndarray, lead: int, axes: Sequence[int | None]) -> np.ndarray:
    """Labels whose axes are the old ones named in `axes`; None is a new axis of size 1, axes left out have size 1."""
    kept = [a for a in axes if a is not None]
    left = [a for a in range(labels.ndim - lead) if a not in kept]
    order = [*range(lead), *(lead + a for a in (*kept, *left))]
    moved = labels.transpose(order).reshape([*labels.shape[:lead], *(labels.shape[lead + a] for a in kept)])
    return moved[(slice(None),) * lead + tuple(None if a is None else slice(None) for a in axes)]


def _compress(labels: np.ndarray) -> np.ndarray:
    """The same labels with every axis along which nothing changes cut to size 1."""
    for axis, size in enumerate(labels.shape):
        if size > 1:
            first = labels.take([0], axis)
            if (labels.take([size - 1], axis) == first).all() and (labels == first).all():
                labels = first
    return labels


def _regroup(labels: np.ndarray, lead: int, old: Sequence[int], new: Sequence[int]) -> np.ndarray:
    """Labels of a value of shape `old` after a reshape to `new`."""
    wide, target = list(labels.shape[:lead]), list(labels.shape[:lead])
    for before, after in _factors(old, new):
        varies = any(labels.shape[lead + a] > 1 for a in before)
        wide += [old[a] if varies else 1 for a in before]
        target += [new[a] if varies else 1 for a in after]
    return _compress(np.broadcast_to(labels, wide).reshape(target))


def _factors(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of old and new axes with the same number of elements, as short as they can be."""
    runs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        before, after = [], []
        left = right = 1
        while True:
            if left == right and (before or after):
                break
            if left <= right and i < len(old) and (left < right or j >= len(new) or old[i] == 1 or new[j] != 1):
                left *= old[i]
                before.append(i)
                i += 1
            else:
                right *= new[j]
                after.append(j)
                j += 1
        runs.append((before, after))
    return runs


class _Ask(NamedTuple):
    """What one reader of a value wants of it: the value times scale[labels] ** power."""

    labels: np.ndarray
    power: int
    offset: float = 0.0  # of a parameter in `offset + parameter`, which is what is scaled
    kind: str = ""
    by: frozenset[tuple[Equation, int]] = frozenset()  # (equation, operand) that read the value and want this


# ------------------------------------------------------------------------------------------------- rules
#
# A rule says for each operand which of its axes is which axis of the output: labels follow that map back to operands
# and ahead to outputs. The map of an operand that takes no scale (an index, a predicate) is None.

Axes = tuple[int | None, ...]


class _Rule(NamedTuple):
    """How an operation passes a scale on.

    how: `move`: the elements of its operands, at other places; `sum`: the output is scaled if all operands are;
    `product`: if exactly one operand is.
    """

    how: str
    maps: Callable[[Equation], Sequence[Axes | None]]
    positive: bool = False  # passes positive scales only


def _same_sizes(value: Value, out: Value, axes: Sequence[int | None]) -> Axes:
    return tuple(b if b is not None and value.shape[a] == out.shape[b] else None for a, b in enumerate(axes))


def _elementwise(e: Equation) -> Sequence[Axes]:
    return [_same_sizes(v, e.outputs[0], range(v.ndim)) for v in e.inputs]


def _parallel(e: Equation) -> Sequence[Axes]:
    return [tuple(range(v.ndim)) for v in e.inputs]


def _select(e: Equation) -> Sequence[Axes | None]:
    return [None, *_elementwise(e)[1:]]


def _transpose(e: Equation) -> Sequence[Axes]:
    order = tuple(e.params["permutation"])
    return [tuple(order.index(a) for a in range(len(order)))]


def _broadcast(e: Equation) -> Sequence[Axes | None]:
    first = _same_sizes(e.inputs[0], e.outputs[0], e.params["broadcast_dimensions"])
    return [first, *(None for _ in e.inputs[1:])]


def _squeeze(e: Equation) -> Sequence[Axes]:
    ndim = e.inputs[0].ndim
    gone = {d % ndim for d in e.params["dimensions"]}
    kept = [a for a in range(ndim) if a not in gone]
    return [tuple(kept.index(a) if a in kept else None for a in range(ndim))]


def _reduce(e: Equation) -> Sequence[Axes]:
    ndim = e.inputs[0].ndim
    kept = [a for a in range(ndim) if a not in e.params["axes"]]
    return [tuple(kept.index(a) if a in kept else None for a in range(ndim))]


def _cumulative(e: Equation) -> Sequence[Axes]:
    return [tuple(None if a == e.params["axis"] else a for a in range(e.inputs[0].ndim))]


def _window(e: Equation) -> Sequence[Axes]:
    sizes, strides = e.params["window_dimensions"], e.params["window_strides"]
    plain = [n == 1 == s and tuple(pad) == (0, 0) for n, s, pad in zip(sizes, strides, e.params["padding"])]
    own = [a if ok else None for a, ok in enumerate(plain)]
    return [_same_sizes(e.inputs[0], e.outputs[0], own)]


def _dot(e: Equation) -> Sequence[Axes | None]:
    (contract, batch), _ = _numbers(e)
    taken = len(batch[0])
    maps: list[Axes | None] = []
    groups = _group_axes(e)
    for side in (0, 1):
        found: dict[int, int | None] = dict(zip(batch[side], range(len(batch[side]))))
        for a in range(e.inputs[side].ndim):
            if a in contract[side] or (side == 1 and a in groups):
                found[a] = None
            elif a not in found:
                found[a] = taken
                taken += 1
        maps.append(tuple(found[a] for a in range(e.inputs[side].ndim)))
    return [*maps, *(None for _ in e.inputs[2:])]


def _numbers(e: Equation) -> tuple[tuple, tuple[int, ...]]:
    """((contracted axes of both sides, batch axes of both sides), group axes of the right side)."""
    if e.op == "ragged_dot":
        return (((1,), (1,)), ((), ())), (0,)
    if e.op == "ragged_dot_general":
        numbers = e.params["ragged_dot_dimension_numbers"]
        return numbers.dot_dimension_numbers, tuple(numbers.rhs_group_dimensions)
    return e.params["dimension_numbers"], ()


def _group_axes(e: Equation) -> tuple[int, ...]:
    groups = _numbers(e)[1]
    if e.op == "ragged_dot_general" and len(groups) != 1:
        raise _Stop("a ragged dot whose contracted axis is ragged does not pass a scale on")
    return groups


def _conv(e: Equation) -> Sequence[Axes | None]:
    numbers = e.params["dimension_numbers"]
    left: list[int | None] = [None] * e.inputs[0].ndim
    if e.params["batch_group_count"] == 1:
        left[numbers.lhs_spec[0]] = numbers.out_spec[0]
    right: list[int | None] = [None] * e.inputs[1].ndim
    right[numbers.rhs_spec[0]] = numbers.out_spec[1]
    return [tuple(left), tuple(right)]


def _gather(e: Equation) -> Sequence[Axes | None]:
    numbers, sizes, fill = e.params["dimension_numbers"], e.params["slice_sizes"], e.params.get("fill_value")
    if fill is not None and fill != 0 and math.isfinite(fill):
        raise _Stop("a gather that fills in {0} does not pass a scale on", str(fill))
    table, out = e.inputs[0], e.outputs[0]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    windows = iter(sorted(numbers.offset_dims))
    found = {a: next(windows) for a in range(table.ndim) if a not in gone}
    outer = [a for a in range(out.ndim) if a not in numbers.offset_dims]
    for a, b in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims):
        found[a] = outer[b]
    whole = [found.get(a) if sizes[a] == table.shape[a] or a in numbers.operand_batching_dims else None
             for a in range(table.ndim)]  # fmt: skip
    return [_same_sizes(table, out, whole), None]


def _scatter(e: Equation) -> Sequence[Axes | None]:
    numbers, (base, _, update) = e.params["dimension_numbers"], e.inputs
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    windows = dict(zip(numbers.update_window_dims, (a for a in range(base.ndim) if a not in gone)))
    axes = [windows.get(a) for a in range(update.ndim)]
    return [tuple(range(base.ndim)), None, _same_sizes(update, e.outputs[0], axes)]


def _dynamic_slice(e: Equation) -> Sequence[Axes | None]:
    first = _same_sizes(e.inputs[0], e.outputs[0], range(e.inputs[0].ndim))
    return [first, *(None for _ in e.inputs[1:])]


def _dynamic_update(e: Equation) -> Sequence[Axes | None]:
    return [*_elementwise(e)[:2], *(None for _ in e.inputs[2:])]


def _whole(e: Equation) -> Sequence[Axes]:
    """Of operations that `_Search.back` and `_ahead` treat by themselves: every operand takes the scale."""
    return [(None,) * v.ndim for v in e.inputs]


def _first(e: Equation) -> Sequence[Axes | None]:
    return [_whole(e)[0], *(None for _ in e.inputs[1:])]


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(SAME - {"stop_gradient"}, _Rule("move", _parallel)),
    "stop_gradient": _Rule("move", _parallel),
    "convert_element_type": _Rule("move", _elementwise),
    "reshape": _Rule("move", _first),
    "transpose": _Rule("move", _transpose),
    "squeeze": _Rule("move", _squeeze),
    "broadcast_in_dim": _Rule("move", _broadcast),
    "slice": _Rule("move", _whole),
    "split": _Rule("move", _whole),
    "rev": _Rule("move", _whole),
    "concatenate": _Rule("move", _whole),
    "gather": _Rule("move", _gather),
    "dynamic_slice": _Rule("move", _dynamic_slice),
    SLICE: _Rule("move", _whole),
    STACK: _Rule("move", _whole),
    SHARD: _Rule("move", _elementwise),
    UNSHARD: _Rule("move", _elementwise),
    "pad": _Rule("sum", _first),
    "dynamic_update_slice": _Rule("sum", _dynamic_update),
    "scatter": _Rule("sum", _scatter),
    "scatter-add": _Rule("sum", _scatter),
    "select_n": _Rule("sum", _select),
    JOIN: _Rule("sum", _elementwise),
    "add": _Rule("sum", _elementwise),
    "add_any": _Rule("sum", _elementwise),
    "sub": _Rule("sum", _elementwise),
    "neg": _Rule("sum", _elementwise),
    "abs": _Rule("sum", _elementwise, positive=True),
    "max": _Rule("sum", _elementwise, positive=True),
    "min": _Rule("sum", _elementwise, positive=True),
    "psum": _Rule("sum", _parallel),
    "psum_invariant": _Rule("sum", _parallel),
    "reduce_sum": _Rule("sum", _reduce),
    "reduce_max": _Rule("sum", _reduce, positive=True),
    "reduce_min": _Rule("sum", _reduce, positive=True),
    "cumsum": _Rule("sum", _cumulative),
    "cummax": _Rule("sum", _cumulative, positive=True),
    "cummin": _Rule("sum", _cumulative, positive=True),
    "reduce_window_sum": _Rule("sum", _window),
    "reduce_window_max": _Rule("sum", _window, positive=True),
    "reduce_window_min": _Rule("sum", _window, positive=True),
    "mul": _Rule("product", _elementwise),
    "div": _Rule("product", _elementwise),
    "dot_general": _Rule("product", _dot),
    "ragged_dot": _Rule("product", _dot),
    "ragged_dot_general": _Rule("product", _dot),
    "conv_general_dilated": _Rule("product", _conv),
}

_CONTRACTIONS = ("dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated")
_PARALLEL = (*SAME, "psum", "psum_invariant")  # output i is made of operand i
_COMPARISONS = ("gt", "lt", "ge", "le", "eq", "ne")
_CHOICES = ("argmax", "argmin")  # the same for every positive scale that is one along their axes
_KINDS = {
    **dict.fromkeys(("mul", "div"), "gain"),
    **dict.fromkeys(_CONTRACTIONS, "rows"),
    "gather": "table",
    "add": "bias",
    "sub": "bias",
}


def _floats(e: Equation) -> bool:
    return all(jnp.issubdtype(v.dtype, jnp.inexact) for v in (*e.inputs, *e.outputs))


def _rule(program: _Program, e: Equation) -> _Rule:
    rule = _RULES.get(e.op)
    cast = e.op == "convert_element_type" and not _floats(e)
    if e.op in (ENTER, LEAVE):
        raise _Stop("it passes through {0}", lambda: program.op(e))
    if rule is None or cast:
        raise _Stop("{0} does not pass a scale on", lambda: program.op(e))
    if e.op == "pad" and not _is_fixed(e.inputs[1]):
        raise _Stop("{0} fills in a value of its own", lambda: program.op(e))
    return rule


# ---------------------------------------------------------------------------------- from outputs to operands


def _part(e: Equation, out: int) -> tuple[list[int], list[int], list[int]]:
    """(start, limit, stride) of an output of a slice or split in its operand."""
    shape = e.inputs[0].shape
    if e.op == "slice":
        strides = e.params["strides"] or (1,) * len(shape)
        return list(e.params["start_indices"]), list(e.params["limit_indices"]), list(strides)
    start, limit = [0] * len(shape), list(shape)
    axis, sizes = e.params["axis"], e.params["sizes"]
    start[axis] = sum(sizes[:out])
    limit[axis] = start[axis] + sizes[out]
    return start, limit, [1] * len(shape)


def _embed(labels: np.ndarray, lead: int, e: Equation, out: int, cautious: bool) -> np.ndarray:
    """Labels of the operand of a slice: FREE outside of it. An axis without labels counts as a whole if not cautious,
    which is when nobody else reads the operand."""
    start, limit, stride = _part(e, out)
    shape, where = list(labels.shape), [slice(None)] * labels.ndim
    for a, (full, n) in enumerate(zip(e.inputs[0].shape, e.outputs[out].shape)):
        if n != full and (cautious or labels.shape[lead + a] > 1):
            shape[lead + a] = full
            where[lead + a] = slice(start[a], limit[a], stride[a])
    if shape == list(labels.shape):
        return labels
    wide = np.full(shape, FREE, np.int32)
    wide[tuple(where)] = labels
    return wide


def _pad_places(e: Equation, axis: int) -> np.ndarray:
    """Where each element of a padded axis stands in the result; some may lie outside."""
    low, _, inner = e.params["padding_config"][axis]
    return low + np.arange(e.inputs[0].shape[axis]) * (inner + 1)


def _unpad(labels: np.ndarray, lead: int, e: Equation) -> np.ndarray:
    for a in range(e.inputs[0].ndim):
        size = labels.shape[lead + a]
        if size > 1:
            places = _pad_places(e, a)
            inside = (places >= 0) & (places < size)
            found = labels.take(np.clip(places, 0, size - 1), lead + a)
            mask = inside.reshape([-1 if b == lead + a else 1 for b in range(labels.ndim)])
            labels = np.where(mask, found, np.int32(FREE))
    return labels


def _flip(labels: np.ndarray, lead: int, e: Equation) -> np.ndarray:
    return np.flip(labels, [lead + a for a in e.params["dimensions"]])


def _stretch(e: Equation, operand: int) -> slice:
    """Where an operand of a concatenation stands in the result."""
    axis = e.params["dimension"]
    start = sum(v.shape[axis] for v in e.inputs[:operand])
    return slice(start, start + e.inputs[operand].shape[axis])


# ---------------------------------------------------------------------------------- from operands to outputs


def _ahead(e: Equation, operand: int, labels: np.ndarray, maps: Sequence[Axes | None]) -> dict[int, np.ndarray]:
    """Labels of the outputs when one operand has these; the labels have an axis for each loop of the equation."""
    lead = labels.ndim - e.inputs[operand].ndim
    op, shape = e.op, e.outputs[0].shape
    if op in _PARALLEL:
        return {operand: labels}
    if op in (SLICE, STACK):
        return {0: labels}
    if op == "reshape":
        return {0: _regroup(labels, lead, e.inputs[0].shape, shape)}
    if op in ("slice", "split"):
        return {out: _cut(labels, lead, e, out) for out in range(len(e.outputs))}
    if op == "rev":
        return {0: _flip(labels, lead, e)}
    if op == "pad":
        return {0: _pad(labels, lead, e)}
    if op == "concatenate":
        axis = lead + e.params["dimension"]
        wide = np.full([*labels.shape[:axis], shape[axis - lead], *labels.shape[axis + 1 :]], NONE, np.int32)
        wide[(slice(None),) * axis + (_stretch(e, operand),)] = labels
        return {0: wide}
    axes = maps[operand]
    if axes is None or any(b is None and labels.shape[lead + a] > 1 for a, b in enumerate(axes)):
        raise _Stop("")
    inverse = {b: a for a, b in enumerate(axes) if b is not None}
    return {0: _arrange(labels, lead, [inverse.get(b) for b in range(len(shape))])}


def _cut(labels: np.ndarray, lead: int, e: Equation, out: int) -> np.ndarray:
    where = [slice(None)] * labels.ndim
    for a, (start, limit, stride) in enumerate(zip(*_part(e, out))):
        if labels.shape[lead + a] > 1:
            where[lead + a] = slice(start, limit, stride)
    return labels[tuple(where)]


def _pad(labels: np.ndarray, lead: int, e: Equation) -> np.ndarray:
    for a, size in enumerate(e.outputs[0].shape):
        if labels.shape[lead + a] > 1:
            places = _pad_places(e, a)
            inside = np.flatnonzero((places >= 0) & (places < size))
            wide = np.full([*labels.shape[: lead + a], size, *labels.shape[lead + a + 1 :]], NONE, np.int32)
            index = (slice(None),) * (lead + a)
            wide[(*index, places[inside])] = labels.take(inside, lead + a)
            labels = wide
    return labels


def _weight_labels(e: Equation, operand: int, labels: np.ndarray) -> np.ndarray | None:
    """Labels of the other operand of a contraction that takes up the scale; None if it can't."""
    lead = labels.ndim - e.inputs[operand].ndim
    other = e.inputs[1 - operand]
    contract = _contracted(e)
    if e.op == "conv_general_dilated":
        return _kernel_labels(e, labels, lead) if operand == 0 else None
    batch = _numbers(e)[0][1]
    pairs = [*zip(contract[1 - operand], contract[operand]), *zip(batch[1 - operand], batch[operand])]
    found = {int(a): int(b) for a, b in pairs}
    if any(n > 1 and a not in found.values() for a, n in enumerate(labels.shape[lead:])):
        return None
    return _arrange(labels, lead, [found.get(a) for a in range(other.ndim)])


def _kernel_labels(e: Equation, labels: np.ndarray, lead: int) -> np.ndarray | None:
    """Labels of a convolution's kernel whose input features have these; its groups see different features."""
    numbers, kernel = e.params["dimension_numbers"], e.inputs[1]
    feature = numbers.lhs_spec[1]
    if e.params["batch_group_count"] != 1 or any(n > 1 and a != feature for a, n in enumerate(labels.shape[lead:])):
        return None
    flat = labels.reshape(*labels.shape[:lead], -1)
    out, inner = numbers.rhs_spec[:2]
    groups, outs, ins = e.params["feature_group_count"], kernel.shape[out], kernel.shape[inner]
    if flat.shape[-1] > 1:
        reads = np.arange(ins)[:, None] + (np.arange(outs) // (outs // groups) * ins)[None] if groups > 1 else None
        flat = flat[..., None] if reads is None else flat[..., reads]
    else:
        flat = flat[..., None]
    return _arrange(flat, lead, [{inner: 0, out: 1}.get(a) for a in range(kernel.ndim)])


# ----------------------------------------------------------------------------------------------- the search


class _Search:
    """One group's search: what is asked of which value. Activations are settled first, the last made first.

    So when a value is settled, all that its readers ask of it is known: those that asked for nothing must cope.
    """

    def __init__(self, program: _Program, size: int):
        self.program, self.size = program, size
        self.tied: np.ndarray | None = None  # the smallest channel that each channel is tied to
        self.asks: dict[Value, tuple[_Ask, ...]] = {}
        self.ahead: set[Value] = set()  # scaled since it is made of a scaled value; nobody asked for it
        self.asked: set[tuple[Equation, int, int]] = set()  # (equation, operand, output)
        self.consumed: dict[Equation, None] = {}
        self.absorbers: tuple[Absorber, ...] = ()
        self.heap: list[tuple[bool, int, int, Value]] = []
        self.tasks: list[tuple[Value, _Ask]] = []
        self.positive = ""
        self.trials = [TRIALS]  # shared by all copies

    def copy(self) -> _Search:
        """A search that may take another way from here."""
        twin = _Search.__new__(_Search)
        twin.program, twin.size, twin.tied, twin.trials = self.program, self.size, self.tied, self.trials
        twin.asks, twin.ahead, twin.asked = dict(self.asks), set(self.ahead), set(self.asked)
        twin.consumed, twin.absorbers, twin.positive = dict(self.consumed), self.absorbers, self.positive
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
            raise _Stop("a part of what is one value would be scaled, and a part not")
        apart = real & (labels != most)
        if apart.any():
            self.tie(labels[apart], np.broadcast_to(most, labels.shape)[apart])
        return most

    def merge(self, value: Value, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """What both ask for."""
        if left.shape == right.shape and (left == right).all():
            return left
        if (((left >= 0) & (right == NONE)) | ((left == NONE) & (right >= 0))).any():
            raise _Stop("{0} is read with the scale and without it", lambda: self.program.name(value))
        left, right = np.broadcast_arrays(left, right)
        apart = (left >= 0) & (right >= 0) & (left != right)
        both = np.maximum(left, right)
        if apart.any():
            self.tie(left[apart], right[apart])
            assert self.tied is not None
            both = np.where(both >= 0, self.tied[both], both)
        return _compress(both)

    # ---------------------------------------------------------------------------------------- asking

    def demand(self, value: Value, ask: _Ask, lead: int, reader: tuple[Equation, int] | None) -> None:
        """One reader asks a value to be scaled; the labels have `lead` axes for loops."""
        labels, own = ask.labels, len(value.loops)
        for axis in range(own, lead):  # the value is the same in every iteration of these
            labels = self.tie_along(labels, axis)
        labels = labels.reshape(*labels.shape[:own], *labels.shape[lead:])
        ask = ask._replace(labels=labels, by=frozenset({reader} if reader else ()))
        if value in self.ahead:
            raise _Stop("{0} would be scaled twice", lambda: self.program.name(value))
        before = self.asks.get(value)
        if before is None:
            place = -1 if value.maker is None else self.program.place[value.maker]
            heapq.heappush(self.heap, (not self.program.moves(value), -place, len(self.asks), value))
        found = list(before or ())
        for i, other in enumerate(found):
            if (other.power, other.offset) == (ask.power, ask.offset):
                if other.by & ask.by:
                    raise _Stop("{0} would be scaled twice", lambda: self.program.name(value))
                found[i] = other._replace(labels=self.merge(value, other.labels, labels), by=other.by | ask.by)
                break
        else:
            found.append(ask)
        self.asks[value] = tuple(found)

    def next(self) -> tuple[Value, _Ask] | None:
        """The next thing that is asked of a value which is made of others; None at the end."""
        while not self.tasks and self.heap:
            late, *_, value = heapq.heappop(self.heap)
            try:
                self.settle(value)
            except _Stop as stop:
                stop.late = late
                raise
        return self.tasks.pop() if self.tasks else None

    def settle(self, value: Value) -> None:
        """All is known that is asked of a value: absorbs it, or leaves it to what makes the value."""
        asks, name = self.asks[value], lambda: self.program.name(value)
        if value.returned:
            raise _Stop("{0} is returned by the model", name)
        if self.program.needs.get(value, 0) == 0:
            raise _Stop("it is {0}, which is no parameter", name)
        if value.kind == "input":
            raise _Stop("it is {0}", name)
        asks = self._final(value, asks)
        self.asks[value] = asks
        for ask in asks:
            self._readers(value, value, ask)
            if value.kind == "parameter":
                kind = f"{ask.offset:g} + {ask.kind}" if ask.offset else ask.kind
                self.absorbers += (Absorber(value.name, ask.labels, kind, ask.power, ask.offset),)
            else:
                self.tasks.append((value, ask))

    def _final(self, value: Value, asks: tuple[_Ask, ...]) -> tuple[_Ask, ...]:
        """The asks with NONE where nobody asks for anything."""
        labels = asks[0].labels
        if len(asks) == 1:
            return (asks[0]._replace(labels=np.where(labels == FREE, np.int32(NONE), labels)),)
        if all(a.by == asks[0].by and a.offset == 0 for a in asks):  # all readers want all of it
            return tuple(a._replace(labels=np.where(a.labels == FREE, np.int32(NONE), a.labels)) for a in asks)
        wide = np.broadcast_arrays(*(a.labels for a in asks))
        used = sum((w >= 0).astype(np.int32) for w in wide)
        if (used > 1).any() or any(((w == NONE) & (used > 0)).any() for w in wide):
            raise _Stop("{0} would be scaled in two ways", lambda: self.program.name(value))
        return tuple(
            a._replace(labels=np.where((w == FREE) & (used == 0), np.int32(NONE), w)) for a, w in zip(asks, wide)
        )

    # --------------------------------------------------------------------------------------- readers

    def _readers(self, origin: Value, value: Value, ask: _Ask) -> None:
        """Looks at all readers of a scaled value that did not ask for the scale."""
        for e, operand in value.uses:
            if e in self.program.dead:
                continue
            try:
                outs = self._through(e, operand, value, ask)
            except _Stop:
                raise _Stop("{0} is also read by {1}", *_names(self.program, origin, e)) from None
            for out, labels, power in outs:
                target = e.outputs[out]
                if target in self.asks or target in self.ahead:
                    raise _Stop("{0} is also read by {1}", *_names(self.program, origin, e))
                if target.returned:
                    raise _Stop("{0} is returned by the model", *_names(self.program, target, e)[:1])
                self.ahead.add(target)
                self._readers(origin, target, _Ask(labels, power, ask.offset))

    def _through(self, e: Equation, operand: int, value: Value, ask: _Ask) -> list[tuple[int, np.ndarray, int]]:
        """(output, labels, power) of what a reader makes of a scaled operand, less what is known; raises if it can't."""
        program = self.program
        if all((e, operand, out) in self.asked for out in range(len(e.outputs))):
            return []
        lead = len(e.loops) - (e.op == SLICE)
        own = len(value.loops)
        labels = ask.labels.reshape(*ask.labels.shape[:own], *(1,) * (lead - own), *ask.labels.shape[own:])
        weight = not program.moves(value)
        if e.op in _CONTRACTIONS and not weight and operand < 2 and self._consume(e, operand, labels, ask.power):
            return []
        if not weight and self._sign_only(e, operand, labels):
            self.positive = self.positive or program.op(e)
            return []
        rule = _rule(program, e)
        maps = rule.maps(e)
        outs = _ahead(e, operand, labels, maps)
        outs = {o: x for o, x in outs.items() if (x >= 0).any() and (e, operand, o) not in self.asked}
        if not outs:
            return []
        if weight and (rule.how != "move" or any(program.moves(e.outputs[o]) for o in outs)):
            raise _Stop("")  # a parameter that is scaled may be used nowhere else
        others = [v for i, v in enumerate(e.inputs) if i != operand and maps[i] is not None and e.op not in _PARALLEL]
        if rule.how == "sum" and not all(map(_is_fixed, others)):
            raise _Stop("")
        if rule.positive or (others and rule.how == "sum"):
            self.positive = self.positive or program.op(e)
        power = -ask.power if e.op == "div" and operand == 1 else ask.power
        return [(o, x, power) for o, x in outs.items()]

    def _consume(self, e: Equation, operand: int, labels: np.ndarray, power: int) -> bool:
        """Multiplies the weight that is contracted with a scaled activation; False if there is none."""
        other = e.inputs[1 - operand]
        if not self.program.is_weight(other):
            return False
        found = _weight_labels(e, operand, labels)
        if found is None or e in self.consumed:
            return False
        self.consumed[e] = None
        self.asked.add((e, 1 - operand, 0))
        self.demand(other, _Ask(found, -power, 0.0, "weight"), len(e.loops), (e, 1 - operand))
        return True

    def _sign_only(self, e: Equation, operand: int, labels: np.ndarray) -> bool:
        """Is the result the same for every positive scale?"""
        if e.op in _COMPARISONS:
            return number(e.inputs[1 - operand]) == 0
        if e.op in _CHOICES:
            lead = labels.ndim - e.inputs[operand].ndim
            return all(labels.shape[lead + a] == 1 for a in e.params["axes"])
        return e.op in ("sign", "is_finite")

    # ------------------------------------------------------------------------------------- operands

    def options(self, value: Value, ask: _Ask) -> list[list[tuple[int, _Ask]]]:
        """The ways in which the operands of what makes a value can take the scale, the best one first."""
        e, program = value.maker, self.program
        assert e is not None
        rule = _rule(program, e)
        if ask.offset and rule.how != "move":
            raise _Stop("{0} is no plain gain", lambda: program.name(value))
        if e.op in _PARALLEL:
            return [[(e.outputs.index(value), ask)]]
        maps = rule.maps(e)
        able = [i for i, m in enumerate(maps) if m is not None]
        if rule.how == "product":
            return self._branches(e, maps, [i for i in able if program.needs.get(e.inputs[i], 0)], ask)
        left = [i for i in able if not _is_fixed(e.inputs[i])]
        added = [number(e.inputs[i]) for i in left]
        if e.op in ("add", "sub") and not program.moves(value) and added.count(None) == 1 and len(added) == 2:
            i = added.index(None)
            if e.op == "add" or i == 0:
                offset = added[1 - i]
                assert offset is not None
                return [[(left[i], ask._replace(offset=offset if e.op == "add" else -offset))]]
        if rule.positive or any(not math.isfinite(number(e.inputs[i]) or 0) for i in able):
            self.positive = self.positive or program.op(e)
        return [[(i, ask) for i in left]]

    def _branches(
        self, e: Equation, maps: Sequence[Axes | None], able: list[int], ask: _Ask
    ) -> list[list[tuple[int, _Ask]]]:
        """The operands of a product: parameters first, then those that need the fewest ties."""
        lead = ask.labels.ndim - e.outputs[0].ndim

        def reach(i: int) -> int:
            varies = _varying(e.inputs[i])
            axes = maps[i] or ()
            return math.prod(ask.labels.shape[lead + b] for a, b in enumerate(axes) if b is not None and varies[a])

        order = sorted(able, key=lambda i: (not self.program.is_weight(e.inputs[i]), -reach(i), i))
        flipped = ask._replace(power=-ask.power)
        return [[(i, flipped if e.op == "div" and i == 1 else ask)] for i in order]

    def take(self, value: Value, ask: _Ask, option: list[tuple[int, _Ask]]) -> None:
        """Asks the operands of what makes a value."""
        e = value.maker
        assert e is not None
        out, program = e.outputs.index(value), self.program
        for i, wanted in option:
            labels, lead = self.back(e, out, i, wanted.labels)
            if not (labels >= 0).any():
                continue
            operand = e.inputs[i]
            if not program.needs.get(operand, 0):
                raise _Stop("{0} takes {1}", lambda: program.op(e), lambda v=operand: program.name(v))
            kind = wanted.kind or ("" if program.moves(operand) else _KINDS.get(e.op, "gain"))
            self.asked.add((e, i, out))
            self.demand(operand, wanted._replace(labels=labels, kind=kind), lead, (e, i))

    def back(self, e: Equation, out: int, operand: int, labels: np.ndarray) -> tuple[np.ndarray, int]:
        """(labels of an operand, number of their axes for loops) when the output has these."""
        value, lead = e.inputs[operand], len(e.outputs[out].loops)
        if e.op == SLICE:  # the axis of the loop is the operand's first axis
            return labels, lead - 1
        if e.op == STACK:
            return labels, lead + 1
        if e.op == "reshape":
            return _regroup(labels, lead, e.outputs[0].shape, value.shape), lead
        if e.op in ("slice", "split"):
            others = len(value.uses) > 1 or e.op == "split" or not self.program.moves(value)
            return _embed(labels, lead, e, out, others), lead
        if e.op == "rev":
            return _flip(labels, lead, e), lead
        if e.op == "pad":
            return _unpad(labels, lead, e), lead
        if e.op == "concatenate":
            axis = lead + e.params["dimension"]
            whole = labels.shape[axis] == 1
            return (labels if whole else labels[(slice(None),) * axis + (_stretch(e, operand),)]), lead
        if e.op in _PARALLEL:
            return labels, lead
        axes = _rule(self.program, e).maps(e)[operand]
        assert axes is not None
        for b in range(e.outputs[out].ndim):
            if b not in axes:
                labels = self.tie_along(labels, lead + b)
        return _arrange(labels, lead, axes), lead


def _names(program: _Program, value: Value, e: Equation) -> tuple[Callable[[], str], Callable[[], str]]:
    return (lambda: program.name(value)), (lambda: program.op(e))


def _varying(value: Value) -> list[bool]:
    """Along which axes can a value change? Not along those it was only broadcast to."""
    maker = value.maker
    if maker is not None and maker.op in (*SAME, "convert_element_type"):
        return _varying(maker.inputs[maker.outputs.index(value)])
    if maker is None or maker.op != "broadcast_in_dim":
        return [True] * value.ndim
    inner = _varying(maker.inputs[0])
    kept = {b: inner[a] for a, b in enumerate(_broadcast(maker)[0] or ()) if b is not None}
    return [kept.get(a, False) for a in range(value.ndim)]


def _solve(search: _Search) -> _Search:
    """Follows all asks to parameters; where a product leaves a choice, the first that works."""
    while (task := search.next()) is not None:
        options = search.options(*task)
        failed: _Stop | None = None
        for option in options[:-1]:
            search.trials[0] -= 1
            if search.trials[0] < 0:
                raise failed or _Stop("there are too many products on the way")
            branch = search.copy()
            try:
                branch.take(*task, option)
                return _solve(branch)
            except _Stop as stop:
                failed = _better(failed, stop)
        try:
            if not options:
                raise _Stop("it is {0}, which is no parameter", lambda t=task: search.program.name(t[0]))
            search.take(*task, options[-1])
            if failed is not None:
                return _solve(search)
        except _Stop as stop:
            raise _better(failed, stop) from None
    return search


def _better(one: _Stop | None, other: _Stop) -> _Stop:
    """The reason to tell: a way that ends at a parameter was the right one, else the first."""
    return other if one is None or (other.late and not one.late) else one


# -------------------------------------------------------------------------------------------------- norms


def norm_gains(flow: Flow) -> dict[str, tuple[Equation, ...]]:
    """Parameters that multiply a normalised value, with the products: gains of RMSNorm, LayerNorm, BatchNorm."""
    program = _Program(flow, ())
    found: dict[str, tuple[Equation, ...]] = {}
    for leaf in flow.leaves:
        if leaf.kind == "parameter":
            products = tuple(e for e, i in _multiplied(program, leaf) if _is_normalised(program, e.inputs[1 - i]))
            found.update({leaf.name: products} if products else {})
    return found


def _multiplied(program: _Program, leaf: Value) -> Iterator[tuple[Equation, int]]:
    """The products that read a parameter or `1 + parameter`."""
    todo = [leaf]
    while todo:
        for e, operand in todo.pop().uses:
            shifted = e.op == "add" and number(e.inputs[1 - operand]) is not None
            if e.op == "mul":
                yield e, operand
            elif shifted or (e.op in _RULES and _RULES[e.op].how == "move"):
                todo += [v for v in e.outputs if program.is_weight(v)]


_SEEN_THROUGH = (*SAME, "mul", "div", "sub", "convert_element_type", "broadcast_in_dim", "reshape", "transpose")


def _is_normalised(program: _Program, value: Value) -> bool:
    """Is it a quotient or a product with a root that isn't one of parameters alone?"""
    todo, seen = [value], set()
    while todo:
        v = todo.pop()
        if v in seen or v.maker is None or program.is_weight(v):
            continue
        seen.add(v)
        if v.maker.op in ("rsqrt", "sqrt"):
            return True
        todo += v.maker.inputs if v.maker.op in _SEEN_THROUGH else ()
    return False


def readers(flow: Flow, product: Equation) -> tuple[list[Address], str]:
    """(addresses of the contractions with weights that read a product, what else reads it first, or '')."""
    program = _Program(flow, ())
    found, other, todo, seen = [], "", list(product.outputs), set()
    while todo:
        v = todo.pop()
        if v in seen:
            continue
        seen.add(v)
        other = other or ("it is returned by the model" if v.returned else "")
        for e, i in v.uses:
            rule = _RULES.get(e.op)
            if e.op in _CONTRACTIONS and i < 2 and program.is_weight(e.inputs[1 - i]):
                found.append(e.address)
            elif e.op in _CONTRACTIONS or rule is None:
                other = other or f"it is read by {program.op(e)}"
            elif rule.how == "sum" and sum(program.moves(u) for u in e.inputs) > 1:
                other = other or f"it is added to something else by {program.op(e)}"
            else:
                todo += e.outputs
    return found, other
