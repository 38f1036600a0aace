"""How a scale passes an operation: labels of its operands from those of its outputs, and the other way.

Labels say which channel of a scale each element of a value takes. Those of a value are int32, with an axis for each
loop that the value stands in and then one for each of its own axes; an axis along which nothing changes has size 1. So
labels stay small however large the value is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jqopt._view import SAME
from jqopt.analysis.flow import ENTER, JOIN, LEAVE, SHARD, SLICE, STACK, UNSHARD, Equation, Value, line

FREE, NONE = -2, -1
"""Labels that are no channel: FREE is not read on this way, NONE must stay as it is."""


class Stop(Exception):
    """A way that leads nowhere; the text is made only when someone reads it."""

    def __init__(self, form: str, *about: Any):
        self.form, self.about = form, about
        self.late = False  # did all activations get through?

    def text(self) -> str:
        return self.form.format(*(a() if callable(a) else a for a in self.about))


def described(equation: Equation) -> str:
    """`add (model.py:12 (Block.__call__))`."""
    where = line(equation) or equation.scope
    name = _LOOP_WORDS.get(equation.op, equation.op)
    return f"{name} ({where})" if where else name


_LOOP_WORDS = {
    ENTER: "a loop's carry",
    LEAVE: "a loop's carry",
    SLICE: "a scan",
    STACK: "a scan",
    JOIN: "a cond",
    SHARD: "a shard_map",
    UNSHARD: "a shard_map",
}


def number(value: Value) -> float | None:
    """The number of which a value is full, where it is written in the program; None if it isn't known."""
    while value.literal is None:
        maker = value.maker
        if maker is None or maker.op not in (*SAME, "convert_element_type", "broadcast_in_dim", "reshape"):
            return None
        value = maker.inputs[maker.outputs.index(value)]
    real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    return float(np.asarray(value.literal)) if real else None


def is_fixed(value: Value) -> bool:
    """Is it full of a number that no positive factor changes: 0, an infinity, NaN?"""
    found = number(value)
    return found is not None and (found == 0 or not math.isfinite(found))


def contracted(equation: Equation) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The contracted axes of both operands; of a convolution the feature axes only."""
    p = equation.params
    if equation.op == "conv_general_dilated":
        return (int(p["dimension_numbers"].lhs_spec[1]),), (int(p["dimension_numbers"].rhs_spec[1]),)
    if equation.op == "ragged_dot":
        return (1,), (1,)
    numbers = p["ragged_dot_dimension_numbers"].dot_dimension_numbers if "ragged" in equation.op else None
    (left, right), _ = numbers or p["dimension_numbers"]
    return tuple(map(int, left)), tuple(map(int, right))


# ------------------------------------------------------------------------------------------------ labels


def arrange(labels: np.ndarray, lead: int, axes: Sequence[int | None]) -> np.ndarray:
    """Labels whose axes are the old ones named in `axes`; None is a new axis of size 1, axes left out have size 1."""
    kept = [a for a in axes if a is not None]
    left = [a for a in range(labels.ndim - lead) if a not in kept]
    order = [*range(lead), *(lead + a for a in (*kept, *left))]
    moved = labels.transpose(order).reshape([*labels.shape[:lead], *(labels.shape[lead + a] for a in kept)])
    return moved[(slice(None),) * lead + tuple(None if a is None else slice(None) for a in axes)]


def compress(labels: np.ndarray) -> np.ndarray:
    """The same labels with every axis along which nothing changes cut to size 1."""
    for axis, size in enumerate(labels.shape):
        if size > 1:
            first = labels.take([0], axis)
            if (labels.take([size - 1], axis) == first).all() and (labels == first).all():
                labels = first
    return labels


def _regroup(labels: np.ndarray, lead: int, old: Sequence[int], new: Sequence[int]) -> np.ndarray:
    """Labels of a value of shape `old` after a reshape to `new`."""
    if 0 in old:
        raise Stop("a value without elements is reshaped")
    wide, target = list(labels.shape[:lead]), list(labels.shape[:lead])
    for before, after in reshape_runs(old, new):
        varies = any(labels.shape[lead + a] > 1 for a in before)
        wide += [old[a] if varies else 1 for a in before]
        target += [new[a] if varies else 1 for a in after]
    return compress(np.broadcast_to(labels, wide).reshape(target))


def reshape_runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
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


# ------------------------------------------------------------------------------------------------- rules
#
# A rule says for each operand which of its axes is which axis of the output: labels follow that map back to operands
# and ahead to outputs. The map of an operand that takes no scale (an index, a predicate) is None.

Axes = tuple[int | None, ...]


class Rule(NamedTuple):
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


def broadcast(e: Equation) -> Sequence[Axes | None]:
    """Of `broadcast_in_dim`."""
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
        raise Stop("a ragged dot whose contracted axis is ragged does not pass a scale on")
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
        raise Stop("a gather that fills in {0} does not pass a scale on", fill)
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
    """Of operations that `Search.back` and `ahead` treat by themselves: every operand takes the scale."""
    return [(None,) * v.ndim for v in e.inputs]


def _first(e: Equation) -> Sequence[Axes | None]:
    return [_whole(e)[0], *(None for _ in e.inputs[1:])]


RULES: dict[str, Rule] = {
    **dict.fromkeys(SAME - {"stop_gradient"}, Rule("move", _parallel)),
    "stop_gradient": Rule("move", _parallel),
    "convert_element_type": Rule("move", _elementwise),
    "reshape": Rule("move", _first),
    "transpose": Rule("move", _transpose),
    "squeeze": Rule("move", _squeeze),
    "broadcast_in_dim": Rule("move", broadcast),
    "slice": Rule("move", _whole),
    "split": Rule("move", _whole),
    "rev": Rule("move", _whole),
    "concatenate": Rule("move", _whole),
    "gather": Rule("move", _gather),
    "dynamic_slice": Rule("move", _dynamic_slice),
    SLICE: Rule("move", _whole),
    STACK: Rule("move", _whole),
    SHARD: Rule("move", _elementwise),
    UNSHARD: Rule("move", _elementwise),
    "pad": Rule("sum", _first),
    "dynamic_update_slice": Rule("sum", _dynamic_update),
    "scatter": Rule("sum", _scatter),
    "scatter-add": Rule("sum", _scatter),
    "select_n": Rule("sum", _select),
    JOIN: Rule("sum", _elementwise),
    "add": Rule("sum", _elementwise),
    "add_any": Rule("sum", _elementwise),
    "sub": Rule("sum", _elementwise),
    "neg": Rule("sum", _elementwise),
    "abs": Rule("sum", _elementwise, positive=True),
    "max": Rule("sum", _elementwise, positive=True),
    "min": Rule("sum", _elementwise, positive=True),
    "psum": Rule("sum", _parallel),
    "psum_invariant": Rule("sum", _parallel),
    "reduce_sum": Rule("sum", _reduce),
    "reduce_max": Rule("sum", _reduce, positive=True),
    "reduce_min": Rule("sum", _reduce, positive=True),
    "cumsum": Rule("sum", _cumulative),
    "cummax": Rule("sum", _cumulative, positive=True),
    "cummin": Rule("sum", _cumulative, positive=True),
    "reduce_window_sum": Rule("sum", _window),
    "reduce_window_max": Rule("sum", _window, positive=True),
    "reduce_window_min": Rule("sum", _window, positive=True),
    "mul": Rule("product", _elementwise),
    "div": Rule("product", _elementwise),
    "dot_general": Rule("product", _dot),
    "ragged_dot": Rule("product", _dot),
    "ragged_dot_general": Rule("product", _dot),
    "conv_general_dilated": Rule("product", _conv),
}

CONTRACTIONS = ("dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated")
PARALLEL = (*SAME, "psum", "psum_invariant")  # output i is made of operand i
COMPARISONS = ("gt", "lt", "ge", "le", "eq", "ne")
CHOICES = ("argmax", "argmin")  # the same for every positive scale that is one along their axes
KINDS = {
    **dict.fromkeys(("mul", "div"), "gain"),
    **dict.fromkeys(CONTRACTIONS, "rows"),
    "gather": "table",
    "add": "bias",
    "sub": "bias",
}


def _floats(e: Equation) -> bool:
    return all(jnp.issubdtype(v.dtype, jnp.floating) for v in (*e.inputs, *e.outputs))


def rule_of(e: Equation) -> Rule:
    """The rule of an equation's operation; raises Stop where a scale doesn't pass it."""
    rule = RULES.get(e.op)
    cast = e.op == "convert_element_type" and not _floats(e)
    if e.op in (ENTER, LEAVE):
        raise Stop("it passes through {0}", lambda: described(e))
    if rule is None or cast:
        raise Stop("{0} does not pass a scale on", lambda: described(e))
    if e.op == "pad" and not is_fixed(e.inputs[1]):
        raise Stop("{0} fills in a value of its own", lambda: described(e))
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
    return np.flip(labels, tuple(lead + a for a in e.params["dimensions"]))


def _stretch(e: Equation, operand: int) -> slice:
    """Where an operand of a concatenation stands in the result."""
    axis = e.params["dimension"]
    start = sum(v.shape[axis] for v in e.inputs[:operand])
    return slice(start, start + e.inputs[operand].shape[axis])


def back(
    e: Equation, out: int, operand: int, labels: np.ndarray, tie: Callable[[np.ndarray, int], np.ndarray], alone: bool
) -> tuple[np.ndarray, int]:
    """(labels of an operand, number of their axes for loops) when the output has these.

    tie(labels, axis) makes labels one along an axis; `alone`: nobody else reads the operand.
    """
    value, lead = e.inputs[operand], len(e.outputs[out].loops)
    if e.op == SLICE:  # the axis of the loop is the operand's first axis
        return labels, lead - 1
    if e.op == STACK:
        return labels, lead + 1
    if e.op == "reshape":
        return _regroup(labels, lead, e.outputs[0].shape, value.shape), lead
    if e.op in ("slice", "split"):
        return _embed(labels, lead, e, out, cautious=not alone or e.op == "split"), lead
    if e.op == "rev":
        return _flip(labels, lead, e), lead
    if e.op == "pad":
        return _unpad(labels, lead, e), lead
    if e.op == "concatenate":
        axis = lead + e.params["dimension"]
        whole = labels.shape[axis] == 1
        return (labels if whole else labels[(slice(None),) * axis + (_stretch(e, operand),)]), lead
    if e.op in PARALLEL:
        return labels, lead
    axes = rule_of(e).maps(e)[operand]
    assert axes is not None
    for b in range(e.outputs[out].ndim):
        if b not in axes:
            labels = tie(labels, lead + b)
    return arrange(labels, lead, axes), lead


# ---------------------------------------------------------------------------------- from operands to outputs


def ahead(e: Equation, operand: int, labels: np.ndarray, maps: Sequence[Axes | None]) -> dict[int, np.ndarray]:
    """Labels of the outputs when one operand has these; the labels have an axis for each loop of the equation."""
    lead = labels.ndim - e.inputs[operand].ndim
    op, shape = e.op, e.outputs[0].shape
    if op in PARALLEL:
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
        raise Stop("")
    inverse = {b: a for a, b in enumerate(axes) if b is not None}
    return {0: arrange(labels, lead, [inverse.get(b) for b in range(len(shape))])}


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


def weight_labels(e: Equation, operand: int, labels: np.ndarray) -> np.ndarray | None:
    """Labels of the other operand of a contraction that takes up the scale; None if it can't."""
    lead = labels.ndim - e.inputs[operand].ndim
    other = e.inputs[1 - operand]
    contract = contracted(e)
    if e.op == "conv_general_dilated":
        return _kernel_labels(e, labels, lead) if operand == 0 else None
    batch = _numbers(e)[0][1]
    pairs = [*zip(contract[1 - operand], contract[operand]), *zip(batch[1 - operand], batch[operand])]
    found = {int(a): int(b) for a, b in pairs}
    if any(n > 1 and a not in found.values() for a, n in enumerate(labels.shape[lead:])):
        return None
    return arrange(labels, lead, [found.get(a) for a in range(other.ndim)])


def _kernel_labels(e: Equation, labels: np.ndarray, lead: int) -> np.ndarray | None:
    """Labels of a convolution's kernel whose input features have these; its groups see different features."""
    numbers, kernel = e.params["dimension_numbers"], e.inputs[1]
    feature = numbers.lhs_spec[1]
    if e.params["batch_group_count"] != 1 or any(n > 1 and a != feature for a, n in enumerate(labels.shape[lead:])):
        return None
    flat = labels.reshape((*labels.shape[:lead], -1))
    out, inner = numbers.rhs_spec[:2]
    groups, outs, ins = e.params["feature_group_count"], kernel.shape[out], kernel.shape[inner]
    if flat.shape[-1] > 1:
        reads = np.arange(ins)[:, None] + (np.arange(outs) // (outs // groups) * ins)[None] if groups > 1 else None
        flat = flat[..., None] if reads is None else flat[..., reads]
    else:
        flat = flat[..., None]
    return arrange(flat, lead, [{inner: 0, out: 1}.get(a) for a in range(kernel.ndim)])
