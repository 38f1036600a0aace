"""What each primitive says about axes: one small function each, in a table.

A rule gets the equation and the axes of each operand, unifies what the primitive makes one, and returns the axes of
each result. Primitives without a rule pin everything they touch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from jqopt.analysis import flow as _flow
from jqopt.analysis.axes import (
    Axes,
    Node,
    axes,
    concat,
    find,
    fresh,
    keep_order,
    note,
    piece,
    pin,
    pinned,
    product,
    reshape,
    split,
    unify,
)
from jqopt.analysis.flow import Equation

Rule = Callable[[Equation, Sequence[Axes]], Sequence[Axes]]
"""rule(equation, axes of each operand) -> axes of each result."""


def elementwise(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    """Results and operands have the same axes; an operand's axis of length one, and a scalar, say nothing."""
    shape = eqn.outputs[0].shape
    out = list(axes(shape))
    for operand in operands:
        if len(operand) == len(shape):
            for i, axis in enumerate(operand):
                if find(axis).size == shape[i]:
                    unify(axis, out[i], eqn)
    return [tuple(out) for _ in eqn.outputs]


def same(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    """Results are the operands, one for one."""
    return list(operands[: len(eqn.outputs)])


def unknown(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    """Nothing is known of the primitive: all that it touches must stay as it is."""
    reason = f"{eqn.op}, of which nothing is known, reads or makes it"
    for axis in (a for operand in operands for a in operand):
        pin(axis, reason, eqn)
    return [tuple(pinned(n, reason, eqn) for n in v.shape) for v in eqn.outputs]


def source(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    """Made from nothing (random bits): the axes are free, but other positions draw other numbers."""
    out = [axes(v.shape) for v in eqn.outputs]
    for axis in (a for row in out for a in row):
        keep_order(axis, f"{eqn.op} draws along it: other positions draw other numbers", eqn)
    return out


# ------------------------------------------------------------------------------------------- rearrangements


def _iota(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    out = list(axes(eqn.outputs[0].shape))
    pin(out[eqn.params["dimension"]], "its positions are counted", eqn)
    return [tuple(out)]


def _broadcast_in_dim(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    shape, dims = eqn.outputs[0].shape, eqn.params["broadcast_dimensions"]
    out = list(axes(shape))
    for axis, d in zip(operands[0], dims, strict=True):
        if find(axis).size == shape[d]:
            out[d] = axis
    return [tuple(out)]


def _transpose(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    return [tuple(operands[0][i] for i in eqn.params["permutation"])]


def _reshape(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    return [reshape(operands[0], eqn.outputs[0].shape, eqn)]


def _squeeze(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    gone = {d % len(operands[0]) for d in eqn.params["dimensions"]}
    return [tuple(a for i, a in enumerate(operands[0]) if i not in gone)]


def _part(axis: Node, start: int, size: int, eqn: Equation) -> Node:
    """A part of an axis, or a pinned one where the axis' structure doesn't allow it."""
    found = piece(axis, start, size)
    if found is not None:
        return found
    reason = f"positions {start} to {start + size} are cut out of {axis}"
    pin(axis, reason, eqn)
    return pinned(size, reason, eqn)


def _slice(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    out = []
    for axis, start, limit, stride in zip(operands[0], starts, limits, strides, strict=True):
        out.append(_part(axis, start, limit - start, eqn) if stride == 1 else _strided(axis, start, limit, stride, eqn))
    return [tuple(out)]


def _strided(axis: Node, start: int, limit: int, stride: int, eqn: Equation) -> Node:
    """x[start::stride]: one position of the inner factor, if the axis is a whole number of strides."""
    size = -(-(limit - start) // stride)
    two = split(axis, stride) if find(axis).size == size * stride and start < stride else None
    if two is not None:
        pin(two[1], f"every {stride}th position is taken", eqn)
        return two[0]
    pin(axis, f"every {stride}th position is taken", eqn)
    return pinned(size, f"every {stride}th position is taken", eqn)


def _split(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    at, start, out = eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        whole = list(operands[0])
        whole[at] = _part(whole[at], start, size, eqn)
        out.append(tuple(whole))
        start += size
    return out


def _concatenate(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    at = eqn.params["dimension"]
    out = list(operands[0])
    for operand in operands[1:]:
        for i, axis in enumerate(operand):
            if i != at:
                unify(axis, out[i], eqn)
    out[at] = concat([operand[at] for operand in operands])
    return [tuple(out)]


def _pad(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    out = []
    for axis, n, (low, high, inner) in zip(
        operands[0], eqn.outputs[0].shape, eqn.params["padding_config"], strict=True
    ):
        if low == high == inner == 0:
            out.append(axis)
        elif inner or low < 0 or high < 0:
            pin(axis, "it is padded", eqn)
            out.append(pinned(n, "it is padded", eqn))
        else:
            ends = [pinned(size, "padding", eqn) for size in (low, high)]
            out.append(concat([ends[0], axis, ends[1]]))
    return [tuple(out)]


def _touch(eqn: Equation, operands: Sequence[Axes], touched: Sequence[int], reason: str) -> list[Axes]:
    """Results of the first operand's rank: `touched` axes are pinned on both sides, the others pass."""
    out = []
    for value in eqn.outputs:
        row = list(operands[0])
        for d in touched:
            pin(row[d], reason, eqn)
            if find(row[d]).size != value.shape[d]:
                row[d] = pinned(value.shape[d], reason, eqn)
        out.append(tuple(row))
    return out


def _rev(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    return _touch(eqn, operands, eqn.params["dimensions"], "its order is reversed")


def _cumulative(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    return _touch(eqn, operands, [eqn.params["axis"]], f"{eqn.op} runs along it")


def _sort(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    for operand in operands[1:]:
        for a, b in zip(operand, operands[0], strict=True):
            unify(a, b, eqn)
    return _touch(eqn, operands, [eqn.params["dimension"]], "it is sorted")


def _top_k(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    at = eqn.params.get("axis", -1) % len(operands[0])
    return _touch(eqn, operands, [at], "top_k numbers its positions")


# ------------------------------------------------------------------------------------------------ reductions


def _one(eqn: Equation, operands: Sequence[Axes]) -> None:
    """The operands of a reduction of several arrays have the same axes; the values it starts from have none."""
    for operand in operands[1 : len(eqn.outputs)]:
        for a, b in zip(operand, operands[0], strict=True):
            unify(a, b, eqn)


def _reduce(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    named = eqn.params["dimensions"] if eqn.op == "reduce" else eqn.params["axes"]
    gone = {d % len(operands[0]) for d in named}
    _one(eqn, operands)
    for d in gone:
        note(operands[0][d], f"{eqn.op} goes over it: a mean, a norm or a softmax depends on its size", eqn)
    out = tuple(a for i, a in enumerate(operands[0]) if i not in gone)
    return [out for _ in eqn.outputs]


def _arg_reduce(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    for d in eqn.params["axes"]:
        pin(operands[0][d], f"{eqn.op} numbers its positions", eqn)
    return [tuple(a for i, a in enumerate(operands[0]) if i not in set(eqn.params["axes"])) for _ in eqn.outputs]


def _window(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    """Pooling: an axis with a window of one passes."""
    _one(eqn, operands)
    sizes = eqn.params["window_dimensions"]
    before, after = eqn.inputs[0].shape, eqn.outputs[0].shape
    moved = [d for d, n in enumerate(sizes) if n != 1 or before[d] != after[d]]
    return _touch(eqn, operands, moved, "a window moves along it")


# -------------------------------------------------------------------------------------------------- products


def _dot_general(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    left, right = operands
    for i, j in (*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)):
        unify(left[i], right[j], eqn)
    free = [a for i, a in enumerate(left) if i not in {*lc, *lb}]
    free += [a for i, a in enumerate(right) if i not in {*rc, *rb}]
    return [(*(left[i] for i in lb), *free)]


def _ragged_dot_general(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
    groups, ragged = tuple(numbers.rhs_group_dimensions), set(numbers.lhs_ragged_dimensions)
    left, right, sizes = operands[:3]
    for i, j in (*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)):
        unify(left[i], right[j], eqn)
    for d in groups:
        unify(right[d], sizes[-1], eqn)
        keep_order(right[d], "the groups' sizes name it in order", eqn)
    free = [a for i, a in enumerate(left) if i not in {*lc, *lb}]
    free += [a for i, a in enumerate(right) if i not in {*rc, *rb, *groups}]
    lead = [sizes[-1]] if ragged & set(lc) else []
    return [(*lead, *(left[i] for i in lb), *free)]


def _ragged_dot(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    left, right, sizes = operands[:3]
    unify(left[1], right[1], eqn)
    unify(right[0], sizes[0], eqn)
    keep_order(right[0], "the groups' sizes name it in order", eqn)
    return [(left[0], right[2])]


def _conv(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    """Grouped: input features are groups x inner, output features groups x their own."""
    lhs, rhs = operands
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    (batch, feature, *space), (out_feature, in_feature, *window) = numbers.lhs_spec, numbers.rhs_spec
    if eqn.params.get("batch_group_count", 1) != 1:
        return unknown(eqn, operands)
    for axis in (*(lhs[d] for d in space), *(rhs[d] for d in window)):
        pin(axis, "a convolution moves along it", eqn)
    if groups == 1:
        unify(lhs[feature], rhs[in_feature], eqn)
    else:
        mine, its = split(lhs[feature], find(rhs[in_feature]).size), split(rhs[out_feature], _per_group(eqn))
        if mine is None or its is None:
            for axis in (lhs[feature], rhs[in_feature], rhs[out_feature]):
                pin(axis, f"a convolution of {groups} groups doesn't divide it", eqn)
        else:
            unify(mine[0], its[0], eqn)
            unify(mine[1], rhs[in_feature], eqn)
    shape = eqn.outputs[0].shape
    out = [pinned(n, "a convolution moves along it", eqn) for n in shape]
    out[numbers.out_spec[0]], out[numbers.out_spec[1]] = lhs[batch], rhs[out_feature]
    return [tuple(out)]


def _per_group(eqn: Equation) -> int:
    out_feature = eqn.params["dimension_numbers"].rhs_spec[0]
    return eqn.inputs[1].shape[out_feature] // eqn.params["feature_group_count"]


# -------------------------------------------------------------------------------------------------- indexing


def _window_axes(eqn: Equation, operand: Axes, kept: Sequence[int], sizes: Sequence[int]) -> list[Node]:
    """The operand's axes that a gather's windows run along: whole ones pass, others are pinned."""
    out = []
    for d in kept:
        axis = operand[d]
        if find(axis).size != sizes[d]:
            pin(axis, "a window of it is picked at run time", eqn)
            axis = pinned(sizes[d], "a window of it is picked at run time", eqn)
        out.append(axis)
    return out


def _gather(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    operand, indices = operands
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    for d, i in zip(batching, getattr(numbers, "start_indices_batching_dims", ()), strict=True):
        unify(operand[d], indices[i], eqn)
    pin(indices[-1], "its positions name different axes of what is looked up", eqn)
    for d in numbers.start_index_map:
        if find(operand[d]).size != sizes[d]:
            pin(operand[d], "its positions are looked up by number", eqn)
    gone = {*numbers.collapsed_slice_dims, *batching}
    windows = _window_axes(eqn, operand, [d for d in range(len(operand)) if d not in gone], sizes)
    rest = iter(indices[:-1])
    inside = iter(windows)
    offsets = set(numbers.offset_dims)
    return [tuple(next(inside) if i in offsets else next(rest) for i in range(eqn.outputs[0].ndim))]


def _scatter(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    operand, indices, updates = operands
    numbers = eqn.params["dimension_numbers"]
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    for d, i in zip(batching, getattr(numbers, "scatter_indices_batching_dims", ()), strict=True):
        unify(operand[d], indices[i], eqn)
    pin(indices[-1], "its positions name different axes of what is written", eqn)
    gone = {*numbers.inserted_window_dims, *batching}
    windows = iter([d for d in range(len(operand)) if d not in gone])
    rest = iter(indices[:-1])
    for i, axis in enumerate(updates):
        if i not in numbers.update_window_dims:
            unify(axis, next(rest), eqn)
            continue
        d = next(windows)
        if find(axis).size == find(operand[d]).size:
            unify(axis, operand[d], eqn)
        else:
            pin(axis, "it is written at places known at run time", eqn)
            pin(operand[d], "it is written at places known at run time", eqn)
    for d in numbers.scatter_dims_to_operand_dims:
        if d in numbers.inserted_window_dims:
            pin(operand[d], "its positions are written by number", eqn)
    return [tuple(operand)]


def _dynamic_slice(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    starts = [v.literal for v in eqn.inputs[1:]]
    out = []
    for d, (axis, n) in enumerate(zip(operands[0], eqn.outputs[0].shape, strict=True)):
        if find(axis).size == n:
            out.append(axis)
        elif starts[d] is not None and 0 <= starts[d] <= find(axis).size - n:
            out.append(_part(axis, int(starts[d]), n, eqn))
        else:
            pin(axis, "a part of it is picked at run time", eqn)
            out.append(pinned(n, "a part of it is picked at run time", eqn))
    return [tuple(out)]


def _dynamic_update_slice(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    operand, update = operands[:2]
    for mine, its in zip(operand, update, strict=True):
        if find(mine).size == find(its).size:
            unify(mine, its, eqn)
        else:
            pin(mine, "a part of it is written at run time", eqn)
            pin(its, "it is written into a part of another axis at run time", eqn)
    return [tuple(operand)]


# ---------------------------------------------------------------------------------------------- control flow


def _slice_layer(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    return [operands[0][1:]]


def _enter(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    return [operands[0]]


def _meet(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    """All operands are one value: what a loop carries, what branches give."""
    for operand in operands[1:]:
        for mine, its in zip(operands[0], operand, strict=True):
            unify(mine, its, eqn)
    return [operands[0]]


def _shard(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    out = list(operands[0])
    for d, times in eqn.params["parts"].items():
        two = split(out[d], find(out[d]).size // times)
        if two is None:
            pin(out[d], "it is sharded over devices", eqn)
            out[d] = pinned(find(out[d]).size // times, "it is sharded over devices", eqn)
        else:
            pin(two[0], "devices hold its parts", eqn)
            out[d] = two[1]
    return [tuple(out)]


def _unshard(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    out = list(operands[0])
    for d, times in eqn.params["parts"].items():
        out[d] = product([pinned(times, "devices hold its parts", eqn), out[d]])
    return [tuple(out)]


def _collective(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    """psum and the like: axes of unchanged length pass, unless the parameters name them; others are pinned."""
    reason = f"{eqn.op} moves its parts between devices"
    named = ("split_axis", "concat_axis", "all_gather_dimension", "scatter_dimension", "axis")
    moved = {d for key in named if isinstance(d := eqn.params.get(key), int)}
    out = []
    for operand, value in zip(operands, eqn.outputs, strict=False):
        if len(operand) != value.ndim:
            return unknown(eqn, operands)
        row = []
        for d, (axis, n) in enumerate(zip(operand, value.shape, strict=True)):
            if find(axis).size != n or d in moved:
                pin(axis, reason, eqn)
                axis = pinned(n, reason, eqn)
            row.append(axis)
        out.append(tuple(row))
    return out


def _bitcast(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    return elementwise(eqn, operands) if eqn.inputs[0].shape == eqn.outputs[0].shape else unknown(eqn, operands)


def _tile(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    return [tuple(product([fresh(r), a]) for r, a in zip(eqn.params["reps"], operands[0], strict=True))]


def _stack(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    (out,) = _meet(eqn, operands)
    at = eqn.params["axis"] % (len(out) + 1)
    return [(*out[:at], pinned(len(operands), "the program stacks it", eqn), *out[at:])]


def _unstack(eqn: Equation, operands: Sequence[Axes]) -> list[Axes]:
    at = eqn.params["axis"] % len(operands[0])
    pin(operands[0][at], "the program picks one position of it", eqn)
    return [tuple(a for i, a in enumerate(operands[0]) if i != at) for _ in eqn.outputs]


_ELEMENTWISE = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex conj "
    "convert_element_type copy cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma "
    "igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max min mul mulhi "
    "ne neg nextafter not or polygamma population_count pow random_gamma_grad real reduce_precision "
    "regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign "
    "sin sinh sqrt square stop_gradient sub tan tanh xor zeta"
)
_SAME = (
    "copy_p device_put layout_constraint mesh_cast name optimization_barrier pbroadcast pcast pvary reshard "
    "sharding_constraint"
)
_REDUCE = "reduce reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor"
_WINDOW = "reduce_window reduce_window_max reduce_window_min reduce_window_sum"
_CUMULATIVE = "cumlogsumexp cummax cummin cumprod cumsum"
_SOURCE = (
    "axis_index empty empty2 random_bits random_clone random_fold_in random_seed random_split random_unwrap "
    "random_wrap rng_bit_generator rng_uniform"
)
_COLLECTIVE = (
    "all_gather all_gather_invariant all_to_all pmax pmin ppermute psum psum2 psum_invariant psum_scatter "
    "reduce_scatter"
)
_SCATTER = (
    "scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub "
    "scatter_add scatter_max scatter_min scatter_mul scatter_sub"
)


def _each(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: Mapping[str, Rule] = {
    **_each(_ELEMENTWISE, elementwise),
    **_each(_SAME, same),
    **_each(_REDUCE, _reduce),
    **_each(_WINDOW, _window),
    **_each(_CUMULATIVE, _cumulative),
    **_each(_SOURCE, source),
    **_each(_COLLECTIVE, _collective),
    **_each(_SCATTER, _scatter),
    "argmax": _arg_reduce,
    "argmin": _arg_reduce,
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot_general,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "approx_top_k": _top_k,
    "top_k": _top_k,
    "transpose": _transpose,
    "unstack": _unstack,
    _flow.ENTER: _enter,
    _flow.JOIN: _meet,
    _flow.LEAVE: _meet,
    _flow.SHARD: _shard,
    _flow.SLICE: _slice_layer,
    _flow.UNSHARD: _unshard,
}
"""The rule of each primitive. `loop.stack` isn't here: it needs the loop's own axis (classes.py)."""
