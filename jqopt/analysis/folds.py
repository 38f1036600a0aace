"""Folds: where a scale of each input channel of a group of sites can go, so that the float function stays the same.

A group's input is divided by a scale, its weights are multiplied by it; a parameter before it takes up the division.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from jqopt._jaxpr import Address
from jqopt._view import SAME
from jqopt.analysis.flow import Equation, Flow, Value
from jqopt.analysis.fold_rules import CONTRACTIONS, RULES, Stop, arrange, contracted, described, number
from jqopt.analysis.fold_search import Ask, Program, Search, solve
from jqopt.errors import PlanError


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
        found = self.shaped(scale)
        if self.ties is None:
            return found
        _, place, count = np.unique(self.ties.ravel(), return_inverse=True, return_counts=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(found.astype(np.float64).ravel())
        mean = np.exp(np.bincount(place, logs) / count)[place]
        return np.where(count[place] == 1, found.ravel(), mean).astype(np.float32).reshape(found.shape)

    def shaped(self, scale: Any) -> np.ndarray:
        """The scale in float32; raises PlanError where it doesn't have the fold's shape."""
        found = np.asarray(scale).astype(np.float32)
        if found.shape != self.shape:
            raise PlanError(
                f"{self.group}: the scale has shape {list(found.shape)}, expected {list(self.shape)}: one for each "
                + ("channel of the input" if len(self.shape) == 1 else "layer and channel of the input")
            )
        return found


class Group(Protocol):
    """Sites that read one activation: what folds need to know of jqopt.trace's groups."""

    @property
    def name(self) -> str: ...

    @property
    def sites(self) -> Sequence[Any]: ...


def folds(flow: Flow, groups: Sequence[Group]) -> dict[str, Fold]:
    """The fold of each group, by its name."""
    keys: dict[Address, list[str]] = {}
    for site in (s for group in groups for s in group.sites):
        keys.setdefault(site.address, []).append(site.key)
    program = Program(flow, keys)
    return {group.name: _fold(program, group) for group in groups}


def _fold(program: Program, group: Group) -> Fold:
    first = group.sites[0]
    equation = program.by_address[first.address]
    channels = _channels(equation, first.operand)
    shape = (*first.outer, math.prod(channels))
    here = {program.by_address[s.address] for s in group.sites}
    try:
        if channels == () or 0 in shape:
            raise Stop("{0} contracts nothing", lambda: described(equation))
        search = Search(program, math.prod(shape))
        start = Ask(_start(equation, first, channels), -1)
        search.demand(equation.inputs[1 - first.operand], start, len(equation.loops), None)
        done = solve(search)
        for other in here - done.consumed.keys() - program.dead:
            raise Stop("{0} reads the same values in another layout", lambda e=other: program.keys_of(e)[0])
    except Stop as stop:
        return Fold(group.name, shape, reason=stop.text())
    changed = sorted((_absorber(p, ask) for p, ask in done.found), key=lambda a: program.leaf[a.path])
    absorbers = sorted((a for a in changed if a.kind != "weight"), key=lambda a: a.kind == "bias")
    return Fold(
        group.name,
        shape,
        tuple(absorbers),
        tuple(a for a in changed if a.kind == "weight"),
        None if done.tied is None else done.tied.reshape(shape),
        tuple(dict.fromkeys(k for e in done.consumed if e not in here for k in program.keys_of(e))),
        positive=done.positive,
    )


def _absorber(path: str, ask: Ask) -> Absorber:
    kind = f"{ask.offset:g} + {ask.kind}" if ask.offset else ask.kind
    return Absorber(path, ask.labels, kind, ask.power, ask.offset)


def _channels(equation: Equation, weight: int) -> tuple[int, ...]:
    """Sizes of the axes of the activation that channels run over, in the order of the scale."""
    value = equation.inputs[1 - weight]
    return tuple(value.shape[a] for a in contracted(equation)[1 - weight])


def _start(equation: Equation, site: Any, channels: tuple[int, ...]) -> np.ndarray:
    """Labels of a site's activation, with an axis for each loop around the site."""
    value = equation.inputs[1 - site.operand]
    k = math.prod(channels)
    labels = np.arange(k, dtype=np.int32).reshape(channels)
    axes = contracted(equation)[1 - site.operand]
    place: list[int | None] = [axes.index(a) if a in axes else None for a in range(value.ndim)]
    labels = arrange(labels, 0, place)
    scans, loops = tuple(site.scans), equation.loops
    stride = k
    picked = [a.start for a in site.view.fixed]
    for i, size in reversed([*enumerate(site.outer)]):
        if i >= len(scans):
            labels = labels + np.int32(picked[i - len(scans)] * stride)
        stride *= size
    labels = labels.reshape((1,) * len(loops) + labels.shape)
    for i, loop in enumerate(loops):
        if loop.address in scans:
            scan = scans.index(loop.address)
            step = k * math.prod(site.outer[scan + 1 :])
            count = np.arange(site.outer[scan], dtype=np.int32) * np.int32(step)
            labels = labels + count.reshape([-1 if a == i else 1 for a in range(labels.ndim)])
    return labels


# -------------------------------------------------------------------------------------------------- norms


@dataclasses.dataclass(frozen=True)
class NormGain:
    """A parameter that multiplies a normalised value: the gain of an RMSNorm, LayerNorm or BatchNorm."""

    path: str
    readers: tuple[Address, ...]  # the contractions with weights that read the product
    other: str  # what else reads it first, in words; '' if nothing does


def norm_gains(flow: Flow) -> dict[str, NormGain]:
    """The gains of a model's norms, by path."""
    program = Program(flow, {})
    found: dict[str, NormGain] = {}
    for leaf in flow.leaves:
        products = list(_normalising(program, leaf)) if leaf.kind == "parameter" else []
        if products:
            found[leaf.name] = NormGain(leaf.name, *_readers(program, products))
    return found


def _normalising(program: Program, leaf: Value) -> Iterator[Equation]:
    """The products of a normalised value and a parameter, or 1 + a parameter."""
    todo = [leaf]
    while todo:
        for e, operand in todo.pop().uses:
            shifted = e.op == "add" and number(e.inputs[1 - operand]) is not None
            if e.op == "mul" and _is_normalised(program, e.inputs[1 - operand]):
                yield e
            elif shifted or (e.op in RULES and RULES[e.op].how == "move"):
                todo += [v for v in e.outputs if program.is_weight(v)]


_SEEN_THROUGH = (*SAME, "mul", "div", "sub", "convert_element_type", "broadcast_in_dim", "reshape", "transpose")


def _is_normalised(program: Program, value: Value) -> bool:
    """Is it a product or a quotient with a root that isn't made of parameters alone?"""
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


def _readers(program: Program, products: Sequence[Equation]) -> tuple[tuple[Address, ...], str]:
    found, other, seen = [], "", set()
    todo = [v for e in products for v in e.outputs]
    while todo:
        v = todo.pop()
        if v in seen:
            continue
        seen.add(v)
        other = other or ("it is returned by the model" if v.returned else "")
        for e, i in v.uses:
            rule = RULES.get(e.op)
            if e.op in CONTRACTIONS and i < 2 and program.is_weight(e.inputs[1 - i]):
                found.append(e.address)
            elif e.op in CONTRACTIONS or rule is None:
                other = other or f"it is read by {described(e)}"
            elif rule.how == "sum" and sum(program.moves(u) for u in e.inputs) > 1:
                other = other or f"it is added to something else by {described(e)}"
            else:
                todo += e.outputs
    return tuple(found), other
