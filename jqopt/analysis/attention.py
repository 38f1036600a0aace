"""Attention: which products of two activations are q . k and p . v, read off the dataflow between them.

A product A is scores and a product B mixes values if an operand p of B is an `exp` of A's result that is summed over
the axis which B contracts. That axis belongs to one operand of A: the keys; the other one holds the queries. Names of
modules, shapes and the order of operands say nothing here.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jqopt._jaxpr import Address
from jqopt._view import SAME
from jqopt.analysis.axis_paths import Axes, Label, operand_axes, output_axes, through
from jqopt.analysis.flow import SHARD, UNSHARD, Equation, Flow, Value, line
from jqopt.analysis.groups import origin

ROLES = ("q", "k", "v", "p")
"""The operands of attention: queries, keys, values, and probabilities (softmax of the scores)."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """One operand of attention's products.

    Attributes:
        address, operand: the product that reads it, and as which of its two operands.
        channels: its axes that quantization runs along: the head's channels of q, k and v; of p the keys.
        heads: its other axes that come out of a weight (the same for every input); the rest are batch and tokens.
    """

    role: str
    address: Address
    operand: int
    shape: tuple[int, ...]
    channels: tuple[int, ...]
    heads: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One attention: softmax(q . k) . v.

    Attributes:
        key: the path of the module whose weights make q, k and v (`layers_0/attn`), with `#2` for further ones.
        operands: q, k, v, p.
        scans: the scans that iterate over those weights' layers, outermost first; `outer`: their lengths.
        bounded: does p reach its product as the softmax made it, so that no value is above 1?
        weights: (role, parameters that q, k or v comes from without passing others).
        sharded: is it inside a shard_map, where each device may hold other heads?
    """

    key: str
    address_qk: Address
    address_pv: Address
    operands: tuple[Operand, ...]
    scans: tuple[Address, ...] = ()
    outer: tuple[int, ...] = ()
    bounded: bool = False
    sharded: bool = False
    weights: tuple[tuple[str, frozenset[str]], ...] = ()
    scope: str = ""
    where: str = ""

    def __getitem__(self, role: str) -> Operand:
        """The operand with this role: q, k, v or p."""
        return self.operands[ROLES.index(role)]


class Attention(NamedTuple):
    """What a program holds: its attentions, and why each other product of two activations is none, by address."""

    sites: tuple[AttentionSite, ...]
    others: Mapping[Address, str]


def attention(flow: Flow, sites: Iterable[Any]) -> Attention:
    """The attentions of a traced model, in the order of the program.

    Args:
        sites: as `jqopt._trace.walk` gives them; those that read a parameter are where a search for q, k, v ends.
    """
    found = list(sites)
    weights = {s.address: s for s in found if s.path is not None and s.view is not None}
    products = [e for e in _active(flow) if e.address not in weights]
    if not products:
        return Attention((), {})
    search = _Search(products, weights)
    for equation in flow.equations:
        search.equation(equation)
    pairs, others = search.result()
    parts = {e.address for e in flow.equations if e.op in (SHARD, UNSHARD)}
    made = [
        dataclasses.replace(s, sharded=any(s.address_qk[: len(a)] == a for a in parts))
        for s in (_site(a, b, side, search, weights) for a, b, side in pairs)
    ]
    named = _named(made, {s.path for s in found})
    alone = {s.address for s in found if s.path is None}
    return Attention(tuple(named), {a: why for a, why in others.items() if a in alone})


def _active(flow: Flow) -> list[Equation]:
    """The dot_generals both of whose operands depend on the model's inputs or state."""
    moving: set[Value] = {v for v in (*flow.inputs, *flow.leaves) if v.kind in ("input", "state")}
    out = []
    for e in flow.equations:
        if any(v in moving for v in e.inputs):
            moving.update(e.outputs)
            if e.op == "dot_general" and all(v in moving for v in e.inputs[:2]):
                out.append(e)
    return out


class _Scores(NamedTuple):
    """A value made of a product's result: where its axes come from, and whether it has been through an exp."""

    axes: Axes
    exponential: bool


class _Search:
    """Follows the results of products, and the axes that weights make, through everything but products."""

    def __init__(self, products: Sequence[Equation], weights: Mapping[Address, Any]):
        self.products = {e.address: e for e in products}
        self.weights = weights
        self.scores: dict[Value, dict[Equation, _Scores]] = {}
        self.made: dict[Value, Axes] = {}  # origin 1: an axis of a weight's outputs; 0: of its inputs
        self.summed: dict[Equation, set[int]] = collections.defaultdict(set)
        self.met: dict[Equation, list[tuple[Equation, int, _Scores]]] = collections.defaultdict(list)

    def equation(self, e: Equation) -> None:
        if "." not in e.op and e.address in self.products and e.op == "dot_general":
            for side, value in enumerate(e.inputs[:2]):
                for product, scores in self.scores.get(value, {}).items():
                    self.met[e].append((product, side, scores))
            self.scores[e.outputs[0]] = {e: _Scores(_own(e.outputs[0]), False)}
        elif "." not in e.op and e.address in self.weights:
            self._weight(e)
        else:
            self._follow(e)

    def _weight(self, e: Equation) -> None:
        out = e.outputs[0]
        if e.op == "dot_general":
            features = set(output_axes(e, self.weights[e.address].operand))
            self.made[out] = tuple(((int(i in features), n),) for i, n in enumerate(out.shape))

    def _follow(self, e: Equation) -> None:
        for value, axes in zip(e.outputs, through(e, [self.made.get(v) for v in e.inputs]), strict=True):
            if axes is not None:
                self.made[value] = axes
        sources = {a: None for v in e.inputs for a in self.scores.get(v, ())}
        for source in sources:
            labels = [self.scores.get(v, {}).get(source) for v in e.inputs]
            exponential = e.op in ("exp", "exp2") or any(s is not None and s.exponential for s in labels)
            axes = [None if s is None else s.axes for s in labels]
            if e.op == "reduce_sum" and exponential and axes[0] is not None:
                self.summed[source] |= {o for i in e.params["axes"] for o, _ in axes[0][i]}
            for value, found in zip(e.outputs, through(e, axes), strict=True):
                if found is not None:
                    self.scores.setdefault(value, {})[source] = _Scores(found, exponential)

    def result(self) -> tuple[list[tuple[Equation, Equation, int]], dict[Address, str]]:
        """((q . k, p . v, which operand of it is p), ...), and why each other product is part of no attention."""
        pairs: list[tuple[Equation, Equation, int]] = []
        why: dict[Address, str] = {}
        for b, met in self.met.items():
            sides = [[m for m in met if m[1] == side] for side in (0, 1)]
            reasons = [self._refused(b, found, [a for a, _, _ in pairs]) for found in sides if found]
            if "" in reasons:
                a, side, _ = [found for found in sides if found][reasons.index("")][0]
                pairs.append((a, b, side))
                continue
            for e in (b, *(a for a, _, _ in met)):
                why.setdefault(e.address, reasons[0])
        used = {e.address for a, b, _ in pairs for e in (a, b)}
        alone = "its result reaches no other product through a softmax, and neither operand is a softmax of another's"
        return pairs, {a: why.get(a, alone) for a in self.products if a not in used}

    def _refused(self, b: Equation, met: Sequence[tuple[Equation, int, _Scores]], known: Sequence[Equation]) -> str:
        """Why an operand of `b` isn't the softmax of another product's result; "" if it is."""
        if len(met) > 1:
            return f"its operand is made of {len(met)} products' results at once (scores that are a sum?)"
        [(a, side, scores)] = met
        if not scores.exponential:
            return "no softmax stands between two products (linear attention, a state space model?)"
        keys = _origins(scores.axes, b, side)
        free = [set(output_axes(a, i)) for i in (0, 1)]
        if not keys or not (keys <= free[0] or keys <= free[1]):
            return "it contracts axes of the scores that are not those of one operand's positions"
        if not keys <= self.summed[a]:
            return "what comes out of exp is not summed over the axis that is contracted: no softmax"
        if any(a is e for e in known) and not _is_softmax(b.inputs[side]):
            return "its operand is computed from the probabilities of an attention (a gradient?)"
        return ""


def _own(value: Value) -> Axes:
    return tuple(((i, n),) for i, n in enumerate(value.shape))


def _origins(axes: Label, b: Equation, side: int) -> set[int]:
    """The axes of the scores that `b` contracts."""
    contracted = operand_axes(b, side)[1]
    return set() if axes is None else {o for d in contracted for o, _ in axes[d] if o >= 0}


def _site(a: Equation, b: Equation, side: int, search: _Search, weights: Mapping[Address, Any]) -> AttentionSite:
    keys = _origins(search.scores[b.inputs[side]][a].axes, b, side)
    k = 0 if keys <= set(output_axes(a, 0)) else 1
    _, _, free = operand_axes(b, 1 - side)
    shape = {
        "q": (a, 1 - k, operand_axes(a, 1 - k)[1]),
        "k": (a, k, operand_axes(a, k)[1]),
        "v": (b, 1 - side, tuple(d for d in free if b.inputs[1 - side].shape[d] != 1) or free),
        "p": (b, side, operand_axes(b, side)[1]),
    }
    operands = tuple(_operand(role, *shape[role], search.made) for role in ROLES)
    by_role = {r: _nearest(e.inputs[i], weights) for r, (e, i, _) in shape.items() if r != "p"}
    near = [s for found in by_role.values() for s in found]
    layers = {scan for s in near for scan in s.scans}
    inside = {loop.address for loop in b.loops}
    loops = [x for x in a.loops if x.address in layers and x.address in inside and x.length is not None]
    return AttentionSite(
        _module({s.path for s in near}), a.address, b.address, operands, tuple(x.address for x in loops),
        tuple(x.length or 0 for x in loops), _is_softmax(b.inputs[side]), False,
        tuple((r, frozenset(s.path for s in found)) for r, found in by_role.items()), a.scope, line(a),
    )  # fmt: skip


def _operand(
    role: str, equation: Equation, side: int, channels: tuple[int, ...], made: Mapping[Value, Axes]
) -> Operand:
    value = equation.inputs[side]
    axes = made.get(value) if role != "p" else None
    heads = tuple(i for i, axis in enumerate(axes or ()) if i not in channels and axis and all(o for o, _ in axis))
    return Operand(role, equation.address, side, value.shape, channels, heads)


def _nearest(value: Value, weights: Mapping[Address, Any]) -> list[Any]:
    """The sites that read a parameter from which a value comes without passing another."""
    found, seen, todo = [], {value}, [value]
    while todo:
        maker = todo.pop().maker
        if maker is None:
            continue
        if "." not in maker.op and maker.address in weights:
            found.append(weights[maker.address])
            continue
        fresh = [v for v in maker.inputs if v not in seen]
        seen.update(fresh)
        todo += fresh
    return found


_LEAVES = ("kernel", "embedding", "weight", "w")


def _module(paths: set[str]) -> str:
    """The module that holds all these parameters: `attn` for `attn/q/kernel` and `attn/k/kernel`."""
    parts = [p.split("/") for p in sorted(paths)]
    if len(parts) == 1:  # one fused weight: the module around the layer that holds it
        return "/".join(parts[0][: -2 if parts[0][-1] in _LEAVES else -1]) or "attention"
    common = []
    for words in zip(*(p[:-1] for p in parts), strict=False):
        if len(set(words)) > 1:
            break
        common.append(words[0])
    return "/".join(common) or "attention"


def _named(sites: Sequence[AttentionSite], paths: set[str | None]) -> list[AttentionSite]:
    """The same with keys that are unique, and no parameter's path."""
    count: dict[str, int] = {}
    out = []
    for s in sites:
        base = f"{s.key}/attention" if s.key in paths else s.key
        count[base] = count.get(base, 0) + 1
        out.append(dataclasses.replace(s, key=base if count[base] == 1 else f"{base}#{count[base]}"))
    return out


_HARMLESS = SAME | {"select_n", "stop_gradient", "slice"}  # besides casts and rearrangements: none makes |p| larger


def _is_softmax(value: Value) -> bool:
    """Is it a quotient with a sum of the numerator itself, but for casts, rearrangements and masks?"""
    seen: set[Value] = set()
    todo = [value]
    while todo:
        v = origin(todo.pop())
        if v in seen or v.maker is None:
            continue
        seen.add(v)
        if v.maker.op == "div":
            return _sums(v.maker.inputs[1], origin(v.maker.inputs[0]))
        if v.maker.op in _HARMLESS:
            todo += [x for x in v.maker.inputs if x.kind == "computed"]
    return False


def _sums(value: Value, numerator: Value) -> bool:
    """Is it a sum of the numerator, perhaps with something positive added to it?"""
    v = origin(value)
    while v.maker is not None and v.maker.op in ("add", "max", *_HARMLESS):
        v = origin(next((x for x in v.maker.inputs if x.kind == "computed"), v.maker.inputs[0]))
    return v.maker is not None and v.maker.op == "reduce_sum" and origin(v.maker.inputs[0]) is numerator
