"""Groups: sites that read the same activation; and which of them are fusable: their weights may share one scale."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from jqopt._view import SAME
from jqopt.analysis.flow import Equation, Flow, Value, line

_REARRANGED = SAME | {"convert_element_type", "reshape", "transpose", "squeeze", "broadcast_in_dim", "expand_dims"}
_PRODUCTS = frozenset({"mul", "dot_general"})
_INDICES = {"gather": (1,), "dynamic_slice": (1,), "scatter": (1,), "scatter-add": (1,), "select_n": (0,)}
"""Operands that say where, not what: what they hold doesn't go into the result."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Sites that read one activation. One input scale serves them all.

    fused: keys of sites whose outputs meet in a product (query and key in the scores, gate and up in the gating)
    before any other weight: engines run them as one matrix product, with one weight scale. A router that reads what
    the experts read is in their group and in no such set.
    """

    name: str
    sites: tuple[Any, ...]
    reason: str
    fused: tuple[tuple[str, ...], ...] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.sites)


def channels(site: Any, equation: Equation) -> int:
    """How many channels of the activation a site contracts: a convolution's input features, else k."""
    if site.op != "conv":
        return site.contracted
    return equation.inputs[0].shape[equation.params["dimension_numbers"].lhs_spec[1]]


def groups(flow: Flow, sites: Sequence[Any]) -> tuple[Group, ...]:
    """The groups of a traced model, in the order of their first sites."""
    at = flow.by_address
    found: dict[tuple, list[Any]] = {}
    for s in sites:
        if s.path is not None and s.reason is None and s.op != "gather":
            found.setdefault((s.activation, channels(s, at[s.address])), []).append(s)
    meeting = _meetings(flow, [tuple(g) for g in found.values() if len(g) > 1])
    return tuple(_group(tuple(g), at, meeting) for g in found.values())


def _group(sites: tuple[Any, ...], at: dict, meeting: dict[frozenset[str], Equation]) -> Group:
    first = sites[0]
    source = origin(at[first.address].inputs[1 - first.operand])
    reason = f"they read {described(source)}" if len(sites) > 1 else f"it reads {described(source)}"
    sets = _components([s.key for s in sites], meeting)
    for keys in sets:
        where = next(e for pair, e in meeting.items() if pair <= set(keys))
        whose = "their outputs" if len(keys) == len(sites) else f"the outputs of {', '.join(keys)}"
        reason += f"; {whose} meet in {where.op} ({line(where) or where.scope})"
    return Group(first.key, sites, reason, sets)


def _components(keys: Sequence[str], pairs: dict[frozenset[str], Equation]) -> tuple[tuple[str, ...], ...]:
    """Keys joined by pairs, as sets of at least two, in order."""
    sets: list[set[str]] = []
    for pair in pairs:
        if pair <= set(keys):
            touching = [s for s in sets if s & pair]
            sets = [s for s in sets if not s & pair] + [set(pair).union(*touching)]
    ordered = [tuple(k for k in keys if k in s) for s in sets]
    return tuple(sorted(ordered, key=lambda s: keys.index(s[0])))


def origin(value: Value) -> Value:
    """The value before casts, reshapes, transposes and picked rows."""
    while value.maker is not None and (value.maker.op in _REARRANGED or value.maker.op == "gather"):
        value = value.maker.inputs[value.maker.outputs.index(value) if value.maker.op in SAME else 0]
    return value


def described(value: Value) -> str:
    """Where a value comes from, in a few words."""
    if value.maker is None:
        return f"the model's input {value.name}" if value.kind == "input" else f"the {value.kind} {value.name}".rstrip()
    return f"what {value.maker.op} makes ({line(value.maker) or value.maker.scope})"


def _meetings(flow: Flow, candidates: Sequence[tuple[Any, ...]]) -> dict[frozenset[str], Equation]:
    """{two keys of one group: the product in which their outputs meet before they pass another weight}."""
    kind = {s.key: (i, *_form(s)) for i, g in enumerate(candidates) for s in g}
    made: dict[tuple, list[str]] = {}
    for g in candidates:
        for s in g:
            made.setdefault(s.address, []).append(s.key)
    weights = {s.address for g in candidates for s in g}
    labels: dict[Value, frozenset[str]] = {}
    out: dict[frozenset[str], Equation] = {}
    for e in flow.equations:
        if e.address in weights and "." not in e.op:
            labels.update(dict.fromkeys(e.outputs, frozenset(made[e.address])))
            continue
        where = _INDICES.get(e.op, ())
        ins = [labels.get(v, frozenset()) for i, v in enumerate(e.inputs) if i not in where]
        if not any(ins) or _is_weighted(e):
            continue
        if e.op in _PRODUCTS and e.inputs[0] is not e.inputs[1] and not _is_weighting(e):
            for a, b in itertools.product(ins[0], ins[1]):
                if a != b and kind[a] == kind[b]:
                    out.setdefault(frozenset({a, b}), e)
        labels.update(dict.fromkeys(e.outputs, frozenset().union(*ins)))
    return out


def _is_weighting(equation: Equation) -> bool:
    """Is it a product with one number for each token, as a router's probabilities weight what experts say?"""
    return equation.op == "mul" and len({_is_narrow(v) for v in equation.inputs}) == 2


def _is_narrow(value: Value) -> bool:
    """Is it the same along its last axis?"""
    if value.ndim == 0 or value.shape[-1] == 1:
        return True
    if value.maker is None or value.maker.op != "broadcast_in_dim":
        return False
    dims, source = value.maker.params["broadcast_dimensions"], value.maker.inputs[0]
    return value.ndim - 1 not in dims or source.shape[-1] == 1


def _form(site: Any) -> tuple:
    """What weights must have in common to stand beside each other in one matrix: a router stands beside no expert."""
    return site.op, site.outer, tuple(a.size for a in site.stack), len(site.shape), tuple(a.axis for a in site.cols)


def _is_weighted(equation: Equation) -> bool:
    """Is it a product with a rearranged parameter? Such a product starts anew."""
    if equation.op not in ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general"):
        return False
    return any(_is_parameter(v) for v in equation.inputs[:2])


def _is_parameter(value: Value) -> bool:
    while value.maker is not None and value.maker.inputs and len(value.maker.inputs) == 1:
        value = value.maker.inputs[0]
    return value.kind == "parameter"
