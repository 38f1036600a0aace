"""Where the axes of a value come from: origins of axes followed through elementwise and rearranging equations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from jqopt._view import SAME
from jqopt.analysis.axis_rules import RULES, elementwise
from jqopt.analysis.flow import ENTER, JOIN, LEAVE, SLICE, STACK, Equation

Axis = tuple[tuple[int, int], ...]
"""(origin, size) of the factors an axis runs through, outermost first; () for one that comes from elsewhere.

A factor that comes from elsewhere, beside others that are known, has the origin -1.
"""

Axes = tuple[Axis, ...]
Label = Axes | None


def operand_axes(e: Equation, side: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(batch, contracted, free) axes of one operand of a dot_general."""
    contract, batch = (tuple(map(int, dims[side])) for dims in e.params["dimension_numbers"])
    return batch, contract, tuple(d for d in range(e.inputs[side].ndim) if d not in (*contract, *batch))


def output_axes(e: Equation, side: int) -> range:
    """Where the free axes of one operand of a dot_general stand in its result, in their order."""
    batch, _, free = operand_axes(e, side)
    start = len(batch) + (len(operand_axes(e, 0)[2]) if side else 0)
    return range(start, start + len(free))


def through(e: Equation, labels: Sequence[Label]) -> Sequence[Label]:
    """The axes of an equation's results, from those of its operands (None: nothing is known of them)."""
    if all(label is None for label in labels):
        return [None] * len(e.outputs)
    if e.op in SAME and len(labels) == len(e.outputs):
        return labels
    if RULES.get(e.op) is elementwise or e.op in _KEEPING:
        return [_meet(labels, v.shape) for v in e.outputs]
    if e.op.startswith("reduce_") and e.op != "reduce_precision" and "axes" in e.params:
        return [_without(labels[0], e.params["axes"])]
    rule = _RULES.get(e.op)
    return [None] * len(e.outputs) if rule is None else rule(e, labels)


_KEEPING = frozenset({"cumsum", "cummax", "cumlogsumexp", "rev", "sort", JOIN, "clamp", "dynamic_update_slice"})
"""Further operations whose result has the axes of its operands of the same rank."""


def _meet(labels: Sequence[Label], shape: tuple[int, ...]) -> Label:
    """For each axis the first operand's that knows it."""
    out: list[Axis] = [()] * len(shape)
    for label in labels:
        if label is not None and len(label) == len(shape):
            out = [mine or _resized(its, n) for mine, its, n in zip(out, label, shape, strict=True)]
    return tuple(out)


def _resized(axis: Axis, size: int) -> Axis:
    """The axis, cut or padded to another size: still of its origin, if that is one."""
    whole = 1
    for _, n in axis:
        whole *= n
    origins = {o for o, _ in axis}
    return axis if whole == size else ((origins.pop(), size),) if len(origins) == 1 else ()


def _without(label: Label, axes: Sequence[int]) -> Label:
    return None if label is None else tuple(a for i, a in enumerate(label) if i not in axes)


def _first(e: Equation, labels: Sequence[Label]) -> Sequence[Label]:
    """Slices, pads: every axis keeps its origin."""
    label = labels[0]
    if label is None:
        return [None] * len(e.outputs)
    return [tuple(_resized(a, n) for a, n in zip(label, v.shape, strict=True)) for v in e.outputs]


def _concatenate(e: Equation, labels: Sequence[Label]) -> Sequence[Label]:
    return [_meet(labels, e.outputs[0].shape)]


def _stack(e: Equation, labels: Sequence[Label]) -> Sequence[Label]:
    at = e.params["axis"] % e.outputs[0].ndim
    axes = _meet(labels, e.inputs[0].shape) or ()
    return [(*axes[:at], (), *axes[at:])]


def _unstack(e: Equation, labels: Sequence[Label]) -> Sequence[Label]:
    return [_without(labels[0], [e.params["axis"] % e.inputs[0].ndim])] * len(e.outputs)


def _transpose(e: Equation, labels: Sequence[Label]) -> Sequence[Label]:
    label = labels[0]
    return [None if label is None else tuple(label[i] for i in e.params["permutation"])]


def _broadcast_in_dim(e: Equation, labels: Sequence[Label]) -> Sequence[Label]:
    label, shape = labels[0], e.outputs[0].shape
    if label is None:
        return [None]
    out: list[Axis] = [()] * len(shape)
    for axis, n, d in zip(label, e.inputs[0].shape, e.params["broadcast_dimensions"], strict=True):
        out[d] = axis if n == shape[d] else ()
    return [tuple(out)]


def _squeeze(e: Equation, labels: Sequence[Label]) -> Sequence[Label]:
    return [_without(labels[0], [d % e.inputs[0].ndim for d in e.params["dimensions"]])]


def _reshape(e: Equation, labels: Sequence[Label]) -> Sequence[Label]:
    """Factors are dealt out in order; one that straddles a border is split, if it divides.

    Sizes may be symbolic, where `<` has no answer: what divides decides.
    """
    if labels[0] is None:
        return [None]
    known = [a or ((-1, n),) for a, n in zip(labels[0], e.inputs[0].shape, strict=True)]
    left = [factor for axis in known for factor in axis][::-1]
    out: list[Axis] = []
    for size in e.outputs[0].shape:
        axis: list[tuple[int, int]] = []
        got = 1
        while _below(got, size) or (size == 1 and not axis and left and left[-1][1] == 1):
            while _below(got, size) and left and left[-1][1] == 1:
                left.pop()
            if not left:
                return [None]
            origin, n = left.pop()
            need = size // got
            if need % n != 0:
                if n % need != 0:
                    return [None]
                left.append((origin, n // need))
                n = need
            axis.append((origin, n))
            got *= n
        out.append(() if all(o < 0 for o, _ in axis) else tuple(axis))
    return [tuple(out)]


def _below(got: int, size: int) -> bool:
    """got < size, where got divides size."""
    return got < size if isinstance(got, int) and isinstance(size, int) else got != size


def _gather(e: Equation, labels: Sequence[Label]) -> Sequence[Label]:
    """Axes that are taken whole keep their origin; so does one that is picked from along one axis of indices."""
    label, numbers, out = labels[0], e.params["dimension_numbers"], e.outputs[0]
    if label is None or numbers.operand_batching_dims:
        return [None]
    kept = [d for d in range(e.inputs[0].ndim) if d not in numbers.collapsed_slice_dims]
    axes: list[Axis] = [()] * out.ndim
    for d, position in zip(kept, numbers.offset_dims, strict=True):
        axes[position] = _resized(label[d], out.shape[position])
    picked = [i for i in range(out.ndim) if i not in numbers.offset_dims]
    if len(picked) == len(numbers.collapsed_slice_dims) == 1:
        axes[picked[0]] = _resized(label[numbers.collapsed_slice_dims[0]], out.shape[picked[0]])
    return [tuple(axes)]


_RULES: Mapping[str, Callable[[Equation, Sequence[Label]], Sequence[Label]]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast_in_dim,
    "squeeze": _squeeze,
    "slice": _first,
    "dynamic_slice": _first,
    "pad": _first,
    "split": _first,
    "concatenate": _concatenate,
    "gather": _gather,
    "stack": _stack,
    "unstack": _unstack,
    ENTER: lambda e, labels: [labels[0]],
    LEAVE: lambda e, labels: [labels[1] if labels[1] is not None else labels[0]],
    SLICE: lambda e, labels: [None if labels[0] is None else labels[0][1:]],
    STACK: lambda e, labels: [None if labels[0] is None else ((), *labels[0])],
}
