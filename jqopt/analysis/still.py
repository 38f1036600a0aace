"""Along which axes a value is known to be constant: it was broadcast along them, or its parameters must be."""

from __future__ import annotations

from collections.abc import Mapping

from jqopt._view import SAME
from jqopt.analysis.flow import SLICE, Value
from jqopt.analysis.fold_rules import RULES, Stop, number, reshape_runs

_ELEMENTWISE = frozenset(
    {"add", "sub", "mul", "div", "rem", "max", "min", "pow", "neg", "abs", "sign", "exp", "exp2", "expm1", "log"}
    | {"log1p", "sqrt", "rsqrt", "cbrt", "square", "integer_pow", "tanh", "logistic", "erf", "sin", "cos", "floor"}
    | {"ceil", "round", "is_finite", "not", "and", "or", "xor", "gt", "lt", "ge", "le", "eq", "ne", "select_n"}
    | {"clamp", "convert_element_type", "add_any"}
)
"""Operations on elements at the same place; their operands have the result's shape, or none."""

_MOVES = ("transpose", "squeeze", "reduce_sum", "reduce_max", "reduce_min", "gather", "dynamic_slice")


def is_still(value: Value, axis: int, constant: Mapping[str, tuple[int, ...]]) -> bool:
    """Are the entries of a value the same all along an axis? False where that isn't known.

    Args:
        constant: leaves of the tree that are so, with the axes along which they are.
    """
    todo, seen = [(value, axis)], set()
    while todo:
        here = todo.pop()
        if here in seen:
            continue
        seen.add(here)
        before = _before(*here, constant)
        if before is None:
            return False
        todo += before
    return True


def _before(value: Value, axis: int, constant: Mapping[str, tuple[int, ...]]) -> list[tuple[Value, int]] | None:
    """The values and axes that must be constant for this one to be; None where it isn't known to be."""
    if value.shape[axis] == 1 or number(value) is not None:
        return []
    if value.name in constant and value.kind in ("parameter", "state"):
        return [] if axis in constant[value.name] else None
    e = value.maker
    if e is None:
        return None
    if e.op == "iota" and not e.inputs:
        return [] if axis != e.params["dimension"] else None
    if not e.inputs:
        return None
    inner = e.inputs[0]
    if e.op in SAME:
        return [(e.inputs[e.outputs.index(value)], axis)]
    if e.op in _ELEMENTWISE:
        return [(v, axis) for v in e.inputs if v.ndim]
    if e.op == SLICE:
        return [(inner, axis + 1)]
    if e.op == "broadcast_in_dim":
        dims = tuple(e.params["broadcast_dimensions"])
        return [(inner, dims.index(axis))] if axis in dims else []
    if e.op in ("slice", "split"):
        return [(inner, axis)]
    if e.op in _MOVES:
        try:
            axes = RULES[e.op].maps(e)[0] or ()
        except Stop:
            return None
        return [(inner, axes.index(axis))] if axis in axes else None
    if e.op == "reshape":
        run = next(before for before, after in reshape_runs(inner.shape, value.shape) if axis in after)
        return [(inner, a) for a in run]
    return None
