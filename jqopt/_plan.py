"""The plan: recipe x graph = one decision a site, made before anything runs, with the rule or the reason for each."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jqopt import _attention, _recipe, algorithms
from jqopt._attention import OperandDecision
from jqopt._ops import BY_TABLE, InputFormat
from jqopt._qtensor import Layout
from jqopt._recipe import MAX, AlgorithmSpec, Recipe, TensorSpec
from jqopt._table import table
from jqopt._trace import Graph, Site
from jqopt.algorithms import Algorithm, calibrators
from jqopt.algorithms.calibrators import Calibrator
from jqopt.analysis.folds import Fold
from jqopt.errors import PlanError
from jqopt.formats import Format

# 2: `fused` and `fold` of a decision; 3: `scaled`, `rotation` and `rank`; `attention`; 4: `backend`; 5: an input's
# `feedback`
VERSION = 5


@dataclasses.dataclass(frozen=True)
class Decision:
    """What happens at one site. `weight` None: left alone, for `reason`."""

    key: str
    op: str
    path: str | None
    weight: TensorSpec | None = None
    input: TensorSpec | None = None
    algorithm: tuple[AlgorithmSpec, ...] = ()
    rule: str = ""
    reason: str = ""
    note: str = ""
    group: str = ""  # key of the first site among those that read the same activation in the same way
    fused: str = ""  # key of the first site among those of the group whose weights share one tensor-level scale
    fold: str = ""  # where a scale on the group's input can be absorbed, or why nowhere
    scaled: str = ""  # the algorithm scales the input: FOLDED, or why the scale stays beside the packed weight
    takes: str = ""  # keys of the sites whose input's scale goes into this weight
    rotation: int = 0  # block of the Hadamard transform of the input
    rank: int = 0  # of the low-rank part beside the packed weight
    backend: str = ""  # family or name of the kernels that the recipe asks for; "": the best there are
    layout: Layout | None = None
    outer: tuple[int, ...] = ()  # leading stack axes that have their own input scale
    dtype: str = ""
    bits: float = 0.0

    @property
    def format(self) -> Format:
        assert self.weight is not None, self.key
        return self.weight.element_format()

    @property
    def granularity(self) -> str:
        assert self.weight is not None and self.weight.granularity is not None, self.key
        return self.weight.granularity

    @property
    def has_static_input(self) -> bool:
        """Is the activation's scale found from calibration data?"""
        return self.input is not None and self.input.needs_calibration

    @property
    def input_format(self) -> InputFormat | None:
        """The activation's quantizer, or None if activations stay as they are."""
        if self.input is None:
            return None
        granularity = self.input.granularity or "tensor"
        static = self.input.scaling == "static"
        return InputFormat(self.input.element_format(), granularity, static, self.input.feedback or 0)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What a plan remembers of a parameter: enough to refuse another model."""

    shape: tuple[int, ...]
    dtype: str


FOLDED = "folded"


@dataclasses.dataclass(frozen=True)
class Unit:
    """Parameters that are solved together, since they read one activation. Their statistics go by its name.

    `at`: the sites where these are updated, one for each activation that the parameters read.
    """

    name: str
    paths: tuple[str, ...]
    at: frozenset[str]
    decision: Decision
    algorithm: Algorithm
    needs_data: bool

    @property
    def scaling(self) -> Algorithm | None:
        """The steps that scale the input, with those before them; None where there are none."""
        return algorithms.chain(*self.steps[0]) if any(a.stage == "scale" for a in self.steps[0]) else None

    @property
    def steps(self) -> tuple[tuple[Algorithm, ...], tuple[Algorithm, ...]]:
        """(those that change the input, the others)"""
        parts = self.algorithm.parts
        first = tuple(a for a in parts if a.stage in ("rotation", "scale"))
        return first, tuple(a for a in parts if a not in first)

    @property
    def calibrator(self) -> Calibrator | None:
        """How the range of a static input is found, where it isn't its largest value."""
        return calibrator(self.decision.input)

    @property
    def statistics(self) -> tuple[algorithms.Statistic, ...]:
        """What is gathered: that of the algorithm, and for a static input what its range is found from."""
        found = {s.name: s for s in (algorithms.AMAX, *self.algorithm.statistics)}
        if (c := self.calibrator) is not None:
            found["range"] = algorithms.Statistic("range", c.init, c.update, c.allreduce)
        if self.decision.has_static_input and self.algorithm.scales_input:
            found["channels"] = algorithms.CHANNELS
        return tuple(found.values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """One decision a site. `print(plan)` is the table; `plan.function` is the model it was made for."""

    recipe: Recipe
    decisions: tuple[Decision, ...]
    parameters: Mapping[str, Parameter]
    opaque: tuple[str, ...] = ()
    function: Any = dataclasses.field(default=None, compare=False, repr=False)
    attention: tuple[OperandDecision, ...] = ()
    graph: Graph | None = dataclasses.field(default=None, compare=False, repr=False)  # None: read from a file
    algorithms: algorithms.Table = dataclasses.field(default_factory=dict, compare=False, repr=False)  # a user's own
    compiled: dict = dataclasses.field(default_factory=dict, init=False, compare=False, repr=False)  # a cache

    def __getitem__(self, key: str) -> Decision:
        """The decision for a site, by its key."""
        return self.by_key[key]

    @functools.cached_property
    def by_key(self) -> dict[str, Decision]:
        return {d.key: d for d in self.decisions}

    @functools.cached_property
    def quantized(self) -> dict[str, Decision]:
        """The deciding site of each parameter that is quantized, by parameter path."""
        found: dict[str, Decision] = {}
        for d in self.decisions:
            if d.path is not None and d.weight is not None and (d.path not in found or found[d.path].op == "gather"):
                found[d.path] = d
        return found

    @property
    def needs_data(self) -> tuple[str, ...]:
        """Paths of the parameters whose sites need statistics of their activations."""
        return tuple(p for u in self.units if u.needs_data for p in u.paths)

    @functools.cached_property
    def units(self) -> tuple[Unit, ...]:
        """Parameters that are solved together, in the order of their first sites."""
        members: dict[str, list[str]] = {}
        for path, d in self.quantized.items():
            members.setdefault(d.group or d.key, []).append(path)
        return tuple(_unit(self, tuple(paths)) for paths in members.values())

    @property
    def needs_batches(self) -> bool:
        """Does anything come from calibration data: weights' algorithms, input scales, attention's scales?"""
        return bool(self.needs_data) or any(d.needs_data for d in self.attention)

    @property
    def bits_per_weight(self) -> float:
        """Average over the quantized parameters, scales included."""
        sizes = [(math.prod(self.parameters[p].shape), d.bits) for p, d in self.quantized.items()]
        return sum(n * b for n, b in sizes) / max(sum(n for n, _ in sizes), 1)

    def __str__(self) -> str:
        head = ("site", "op", "weight", "input", "algorithm", "bits", "group", "decided by")
        lines = [table(head, [_row(d) for d in self.decisions])]
        done = self.quantized
        whole = sum(math.prod(p.shape) for p in self.parameters.values())
        part = sum(math.prod(self.parameters[p].shape) for p in done)
        lines.append(
            f"{len(done)} of {len(self.parameters)} parameters quantized ({part / max(whole, 1):.0%} of {whole:,} "
            f"values), {self.bits_per_weight:.2f} bits each; recipe {self.recipe.name!r}"
        )
        if folds := _fold_rows(self.decisions):
            lines += ["", table(("input of", "a scale on it folds into", "the algorithm's scale"), folds)]
        if self.attention:
            lines += ["", table(_attention.HEAD, _attention.rows(self.attention))]
        return "\n".join([*lines, *(f"opaque: {o}" for o in self.opaque)])


def _fold_rows(decisions: Iterable[Decision]) -> list[tuple[str, str, str]]:
    """For each group of quantized sites: its first site, how many more, where a scale on its input can go, and goes."""
    members: dict[tuple[str, str, str], list[str]] = {}
    for d in decisions:
        if d.weight is not None and d.fold:
            members.setdefault((d.group, d.fold, d.scaled), []).append(d.key)
    return [(f"{k[0]} +{len(k) - 1}".removesuffix(" +0"), fold, scaled) for (_, fold, scaled), k in members.items()]


def _unit(plan: Plan, paths: tuple[str, ...]) -> Unit:
    decision = plan.quantized[paths[0]]
    at: dict[str, str] = {}
    for d in plan.decisions:
        if d.path in paths and d.weight is not None and d.op != "gather":
            at.setdefault(d.group or d.key, d.key)
    algorithm = solver(decision.algorithm, plan.algorithms)
    needs = decision.has_static_input or algorithm.uses_data
    return Unit(paths[0], paths, frozenset(at.values()), decision, algorithm, needs)


def _row(d: Decision) -> tuple:
    if d.weight is None:
        return (d.key, d.op, "-", "-", "-", "", "", d.reason)
    names = "+".join(a.name for a in d.algorithm)
    group = "" if d.group in ("", d.key) else f"with {d.group}"
    decided = d.rule + (f"; {d.note}" if d.note else "")
    return (d.key, d.op, describe(d.weight), describe(d.input), names, f"{d.bits:.2f}", group, decided)


def describe(spec: TensorSpec | None) -> str:
    """A quantizer in a word or three: `nvfp4`, `int8/token dynamic`."""
    if spec is None:
        return "-"
    format = spec.element_format()
    block = format.block if spec.granularity == "block" else None
    size = "x".join(map(str, block)) if isinstance(block, tuple) else block
    scale = f"/{size}" if block is not None else f"/{spec.granularity}"
    more = [spec.scaling] if spec.scaling == "dynamic" else []
    more += [] if spec.feedback is None else [f"feedback {spec.feedback}"]
    return " ".join((f"{format.name}{scale}", *more))


def make_plan(recipe: Recipe, graph: Graph, own: algorithms.Table | None = None) -> Plan:
    """Decides every site of the graph.

    Args:
        own: a user's algorithms, by the names that the recipe calls them.

    Raises:
        PlanError: a rule matches nothing (and isn't `optional`), a rule never decides because earlier ones shadow
            it, no weight would be quantized, two sites ask two different things of one parameter, or an
            algorithm's name is unknown.
    """
    chosen = {s.key: _choose(recipe, s) for s in graph.sites}
    partial = _partial(graph)
    decisions = [_decide(recipe, s, chosen[s.key], graph, partial.get(s.path or "", ""), own) for s in graph.sites]
    decisions = _fused(recipe, graph, _grouped(graph, decisions))
    attention = _attention.decide(recipe, graph)
    why = _attention.reasons(graph, attention)
    decisions = [dataclasses.replace(d, reason=why.get(d.key, d.reason)) for d in decisions]
    _check_rules(recipe, graph, chosen)
    _check_parameters(graph, decisions, own)
    parameters = {p: Parameter(tuple(s.shape), str(s.dtype)) for p, s in graph.parameters.items()}
    opaque = tuple(f"{o.primitive} in {o.scope or graph.function.name}: {o.reason}" for o in graph.opaque)
    plan = Plan(recipe, tuple(decisions), parameters, opaque, graph.function, attention, graph, dict(own or {}))
    if not plan.quantized and not (attention and not any(r.weight for r in recipe.rules)):
        raise PlanError(_nothing(recipe, graph, decisions))
    _check_streams(plan)
    return _with_scales(plan, graph)


def _check_streams(plan: Plan) -> None:
    """Algorithms that compare the float model with the quantized layers before need the layerwise mode."""
    two = next((u for u in plan.units if u.algorithm.two_streams), None)
    if two is not None and not plan.recipe.layerwise:
        raise PlanError(
            f"{two.decision.rule}: {two.algorithm.name} compares a layer's float input with what quantized layers give "
            "(site " + two.name + "); write `layerwise: true` beside `algorithm` in the recipe"
        )


def _choose(recipe: Recipe, site: Site) -> _recipe.Rule | None:
    if site.path is None:
        return None
    return next((r for r in recipe.rules if _recipe.matches(r, site)), None)


def _decide(
    recipe: Recipe, site: Site, rule: _recipe.Rule | None, graph: Graph, partial: str, own: algorithms.Table | None
) -> Decision:
    plain = Decision(site.key, site.op, site.path)
    if site.reason is not None:
        return dataclasses.replace(plain, reason=site.reason, rule=rule.where if rule and rule.weight else "")
    if rule is None:
        return dataclasses.replace(plain, reason="no rule matches it")
    if rule.keep:
        return dataclasses.replace(plain, reason=f"kept by {rule.where}", rule=rule.where)
    assert rule.weight is not None, "the recipe admits only rules that keep or quantize"
    whole = tuple(graph.parameters[site.path or ""].shape)
    layout = site.layout if site.shape == whole else globalized(site.layout, whole)
    note, input_spec = "", rule.input
    if site.op == "gather" and input_spec is not None:
        note, input_spec = "input left alone: a lookup multiplies nothing", None
    if input_spec is not None and input_spec.feedback and (why := _no_feedback(site, layout, partial)):
        note, input_spec = f"rounded without feedback: {why}", input_spec.model_copy(update={"feedback": None})
    spec, backend = rule.weight, rule.backend or recipe.backend or ""
    if backend and (site.op not in BY_TABLE or spec.element_format().then is not None):
        told = f"backend {backend} left alone: this {site.op} decodes its weight"
        note, backend = "; ".join(filter(None, (note, told if rule.backend else ""))), ""
    plain = dataclasses.replace(
        plain, weight=spec, input=input_spec, algorithm=_algorithms(rule.algorithm or recipe.algorithm, rule, own),
        rule=rule.where, backend=backend, layout=layout, outer=site.outer,
        dtype=str(graph.parameters[site.path or ""].dtype),
    )  # fmt: skip
    try:
        calibrator(input_spec)
    except PlanError as e:
        raise PlanError(f"{rule.where}: input: {e}") from None
    algorithm, instead = _suited(plain, partial, own)
    if solver(algorithm, own).scales_input and input_spec is not None and input_spec.calibrator is not None:
        instead = "; ".join(
            filter(None, (instead, f"max in place of {input_spec.calibrator.name}: the input is scaled"))
        )
        plain = dataclasses.replace(plain, input=input_spec.model_copy(update={"calibrator": None}))
    whole_step = solver(algorithm, own)
    rank = algorithms.rank_at(whole_step.rank, layout.n, layout.k)
    bits = spec.element_format().bits_per_value(layout.n, layout.k, spec.granularity)
    return dataclasses.replace(
        plain, algorithm=algorithm, note="; ".join(filter(None, (note, instead))),
        rotation=layout.k if whole_step.rotation < 0 else whole_step.rotation, rank=rank,
        bits=bits + 16 * rank * (layout.n + layout.k) / max(layout.n * layout.k, 1),
    )  # fmt: skip


def _no_feedback(site: Site, layout: Layout, partial: str) -> str:
    """Why an activation can't be rounded with the weights in view; '' if it can."""
    if site.op != "dot_general":
        return f"a {site.op} has no one weight matrix for all tokens"
    if partial:
        return f"{partial} reads the weight"
    if len(layout.stack) != len(site.outer):
        return "each of several matrices meets its own part of the activation"
    return ""


def globalized(layout: Layout, whole: tuple[int, ...]) -> Layout:
    """A layout found inside a shard_map, for the whole parameter: the outermost atom of each sharded axis grows."""
    atoms = list(layout.atoms)
    start = 0
    for axis, size in enumerate(layout.shape):
        stop, product = start + 1, layout.atoms[start]
        while product < size:
            product, stop = product * layout.atoms[stop], stop + 1
        atoms[start] *= whole[axis] // size
        start = stop
    return Layout(whole, tuple(atoms), layout.stack, layout.rows, layout.cols)


def solver(specs: tuple[AlgorithmSpec, ...], own: algorithms.Table | None = None) -> Algorithm:
    """The algorithm that solves a site: those of the recipe, chained. Equal specs give the same value.

    Raises:
        PlanError: a name or an option is unknown, or they can't follow each other.
    """
    return _solver(specs, tuple((own or {}).items()))


@functools.lru_cache
def _solver(specs: tuple[AlgorithmSpec, ...], own: tuple) -> Algorithm:
    return algorithms.chain(*(_one(spec, own) for spec in specs))


@functools.lru_cache
def _one(spec: AlgorithmSpec, own: tuple) -> Algorithm:
    return algorithms.get(spec.name, dict(own), **spec.options)


def calibrator(spec: TensorSpec | None) -> Calibrator | None:
    """What finds the range of a static input, where the recipe names one. Equal specs give the same value.

    Raises:
        PlanError: no such calibrator, option or value, or not for this format.
    """
    if spec is None or spec.calibrator is None or spec.calibrator.name == MAX.name:
        return None
    return _calibrator(spec.calibrator, spec.element_format())


@functools.lru_cache
def _calibrator(spec: AlgorithmSpec, format: Format) -> Calibrator:
    return calibrators.get(spec.name, format, **spec.options)


def _partial(graph: Graph) -> dict[str, str]:
    """{path: what reads it otherwise} of parameters that some site doesn't contract as a whole matrix, in words."""
    out: dict[str, str] = {}
    for s in graph.sites:
        if s.path is None or s.reason is not None:
            continue
        if s.op in ("gather", "conv"):
            out.setdefault(s.path, "a lookup" if s.op == "gather" else "a convolution")
        elif s.contracted != s.layout.k:
            out.setdefault(s.path, "a product over a part of it")
    return out


def _suited(d: Decision, partial: str, own: algorithms.Table | None) -> tuple[tuple[AlgorithmSpec, ...], str]:
    """(algorithms, note): without the steps that need a product over all input channels of the parameter's matrix,
    where some site is another, and without those that refuse the format or the size; `max` where none is left.
    """
    assert d.layout is not None
    steps = [(spec, _one(spec, tuple((own or {}).items()))) for spec in d.algorithm]
    kept, notes = [], []
    stuck = [spec for spec, step in steps if partial and (step.uses_data or step.rotation or step.rank)]
    problem = algorithms.Problem(d.format, d.granularity, None)
    for spec, step in steps:
        why = step.refuses(problem, d.layout.n, d.layout.k)
        if spec in stuck:
            continue
        if why:
            notes.append(f"without {step.name}: {why}")
        else:
            kept.append(spec)
    if stuck:
        rest = "+".join(s.name for s in kept) or MAX.name
        notes.insert(0, f"{rest} in place of {'+'.join(s.name for s in stuck)}, which can't solve {partial}")
    return tuple(kept) or (MAX,), "; ".join(notes)


def _algorithms(
    specs: Iterable[AlgorithmSpec], rule: _recipe.Rule, own: algorithms.Table | None
) -> tuple[AlgorithmSpec, ...]:
    try:
        solver(tuple(specs), own)
    except PlanError as e:
        raise PlanError(f"{rule.where}: {e}") from None
    return tuple(specs)


def _with_scales(plan: Plan, graph: Graph) -> Plan:
    """Says of each site whose algorithm scales its input whether a parameter before it takes up the scale."""
    order = {path: i for i, u in enumerate(plan.units) for path in u.paths}
    said: dict[str, str] = {}
    takes: dict[str, str] = {}
    for i, unit in enumerate(plan.units):
        if unit.algorithm.scales_input:
            why = _unfolded(plan, graph, unit, i, order)
            said.update(dict.fromkeys(unit.paths, why or FOLDED))
            taking = () if why else fold_of(graph, unit).absorbers
            takes.update({a.path: ", ".join(filter(None, (takes.get(a.path), unit.decision.key))) for a in taking})
    if not said:
        return plan
    decisions = []
    for d in plan.decisions:
        if d.path in said and d.weight is not None and d.layout is not None:
            stays = said[d.path] != FOLDED
            d = dataclasses.replace(d, scaled=said[d.path], bits=d.bits + stays * 32 / max(d.layout.n, 1))
        if d.path in takes:
            d = dataclasses.replace(d, takes=takes[d.path])
        decisions.append(d)
    return dataclasses.replace(plan, decisions=tuple(decisions))


def _unfolded(plan: Plan, graph: Graph, unit: Unit, number: int, order: Mapping[str, int]) -> str:
    """Why the scale of a unit's input stays beside its packed weights; '' if it folds."""
    fold = fold_of(graph, unit)
    if unit.decision.rotation:
        return "kept: it follows a rotation"
    if fold.reason:
        return f"kept: {fold.reason}"
    if len(unit.at) > 1:
        return "kept: the weights read several activations"
    apart = [c.path for c in fold.consumers if c.path in order and c.path not in unit.paths]
    if apart:
        return f"kept: {apart[0]} reads the same input and is quantized on its own"
    late = [a.path for a in fold.absorbers if order.get(a.path, -1) >= number]
    if late:
        return f"kept: {late[0]} would take it up, and is solved before"
    held = _attention.held(graph, plan.attention)
    changed = [a.path for a in fold.absorbers if a.path in held]
    if changed:
        return f"kept: {changed[0]} would take it up, and {held[changed[0]]} is quantized as it is"
    if local_ties(fold) is None:
        return "kept: layers would have to share it"
    return ""


def fold_of(graph: Graph, unit: Unit) -> Fold:
    """The fold of the input that a unit's weights read."""
    name = next(g.name for g in graph.groups if any(s.key == unit.decision.key for s in g))
    return graph.folds[name]


def local_ties(fold: Fold) -> np.ndarray | None:
    """The fold's ties with each layer's channels counted from 0, [*outer, k] int32; None if they join layers."""
    k = fold.shape[-1]
    flat = np.arange(math.prod(fold.shape)).reshape(-1, k) if fold.ties is None else fold.ties.reshape(-1, k)
    layer = np.arange(len(flat))[:, None]
    return None if np.any(flat // k != layer) else (flat % k).astype(np.int32).reshape(fold.shape)


def _grouped(graph: Graph, decisions: list[Decision]) -> list[Decision]:
    """Marks decisions whose sites read the same activation and ask the same of it."""
    lead: dict[tuple, str] = {}
    out = []
    for site, d in zip(graph.sites, decisions, strict=True):
        if d.weight is not None and site.activation >= 0:
            read = (site.activation, site.branch, site.contracted, site.input_shape, site.input_axes)
            same = (*read, d.op, d.weight, d.input, d.algorithm, d.outer)
            d = dataclasses.replace(d, group=lead.setdefault(same, d.key))
        out.append(d)
    return out


def _fused(recipe: Recipe, graph: Graph, decisions: list[Decision]) -> list[Decision]:
    """Marks weights that share a tensor-level scale, by the dataflow or the recipe's `fuse`; says where scales fold."""
    sets = [keys for g in graph.groups for keys in g.fused] if recipe.fuse is None else _asked(recipe, graph)
    together = {key: keys for keys in sets for key in keys}
    folds = {s.key: graph.folds[g.name].describe() for g in graph.groups for s in g}
    lead: dict[tuple, str] = {}
    out = []
    for d in decisions:
        if d.weight is not None:
            d = dataclasses.replace(d, fold=folds.get(d.key, ""))
        if d.weight is not None and d.key in together:
            same = (together[d.key], d.weight, d.algorithm, d.outer)
            d = dataclasses.replace(d, fused=lead.setdefault(same, d.key))
        out.append(d)
    return out


def _asked(recipe: Recipe, graph: Graph) -> list[tuple[str, ...]]:
    """The sets of site keys that the recipe's `fuse` asks for: within each group, those that its patterns match."""
    out = []
    for patterns in recipe.fuse or ():
        found = [
            tuple(s.key for s in g if any(fnmatch.fnmatchcase(s.path or "", p) for p in patterns)) for g in graph.groups
        ]
        sets = [keys for keys in found if len(keys) > 1]
        if not sets:
            alone = [keys[0] for keys in found if keys]
            raise PlanError(
                f"recipe {recipe.name!r}: fuse {list(patterns)} names no two sites that read the same activation; "
                + (f"it matches {_some(alone)}, which read different ones. " if alone else "it matches no site. ")
                + f"Groups of {graph.function.name}: "
                + "; ".join(_some([s.key for s in g]) for g in graph.groups if len(g.sites) > 1)
            )
        out += sets
    return out


def _check_rules(recipe: Recipe, graph: Graph, chosen: Mapping[str, _recipe.Rule | None]) -> None:
    deciding = {id(r) for r in chosen.values() if r is not None}
    candidates = [s for s in graph.sites if s.path is not None]
    for rule in recipe.rules:
        if id(rule) in deciding or rule.optional:
            continue
        matched = [s for s in candidates if _recipe.matches(rule, s)]
        if not matched:
            raise PlanError(
                f"{rule.where}: the rule matches no site of {graph.function.name}. "
                f"Sites: {_some([s.key for s in candidates])}. {_nearest(rule, candidates)}"
                "Write another pattern (it is a glob over the whole path), or `optional: true` if that is meant."
            )
        winner = chosen[matched[0].key]
        if not rule.inherited and winner is not None:
            raise PlanError(
                f"{rule.where}: the rule never decides: {winner.where} stands before it and matches every site that "
                f"it matches ({_some([s.key for s in matched])}). The first rule that matches decides: "
                "put the specific rule first."
            )


def _nearest(rule: _recipe.Rule, sites: list[Site]) -> str:
    near = _recipe.near_paths(rule, [s.path for s in sites if s.path])
    return f"Did you mean {', '.join(map(repr, near))}? " if near else ""


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "none"


def _check_parameters(graph: Graph, decisions: list[Decision], own: algorithms.Table | None) -> None:
    """Every use of a parameter must ask the same of it: there is one packed copy."""
    first: dict[str, Decision] = {}
    for site, d in zip(graph.sites, decisions, strict=True):
        if d.path is None or site.reason is not None:
            continue
        other = first.setdefault(d.path, d)
        if other.weight != d.weight:
            raise PlanError(
                f"{d.path}: two sites ask two different things of one parameter. {_asks(other)}; {_asks(d)}. "
                "Write one rule that matches both (for an embedding tied to the head: "
                "`match: {path: ..., used_by: gather}`), or `keep: true` for the parameter."
            )
        static = d.input is not None and d.input.needs_calibration
        static = static or (d.weight is not None and solver(d.algorithm, own).uses_data)
        if d.weight is not None and static and other.outer != d.outer:
            raise PlanError(
                f"{d.path}: site {other.key} reads it as layers {list(other.outer)}, site {d.key} as "
                f"{list(d.outer)}; one input scale can't serve both. Keep it with `keep: true`."
            )


def _asks(d: Decision) -> str:
    asked = describe(d.weight) if d.weight is not None else f"left alone ({d.reason})"
    return f"{d.key} ({d.op}): {asked}" + (f", by {d.rule}" if d.weight is not None else "")


def _nothing(recipe: Recipe, graph: Graph, decisions: list[Decision]) -> str:
    reasons = "\n".join(f"  {d.key} ({d.op}): {d.reason}" for d in decisions[:12])
    return (
        f"recipe {recipe.name!r} would quantize no weight of {graph.function.name}. "
        + (f"Its sites and why each is left alone:\n{reasons}" if reasons else "It has no site at all: no dot, ")
        + ("" if reasons else "convolution or lookup reads a parameter. ")
        + "\nWrite a rule with `weight:` that matches one of them."
    )


# ---------------------------------------------------------------------------------------- plans as plain data


def to_dict(plan: Plan) -> dict:
    """The plan as JSON data (without the model)."""
    return {
        "version": VERSION,
        "recipe": plan.recipe.to_dict(),
        "parameters": {p: {"shape": list(v.shape), "dtype": v.dtype} for p, v in plan.parameters.items()},
        "opaque": list(plan.opaque),
        "decisions": [_decision_dict(d) for d in plan.decisions],
        "attention": [d.to_dict() for d in plan.attention],
    }


def _decision_dict(d: Decision) -> dict:
    out = {f.name: getattr(d, f.name) for f in dataclasses.fields(d)}
    out["weight"] = None if d.weight is None else d.weight.to_dict()
    out["input"] = None if d.input is None else d.input.to_dict()
    out["algorithm"] = [a.to_dict() for a in d.algorithm]
    out["layout"] = None if d.layout is None else {k: list(v) for k, v in dataclasses.asdict(d.layout).items()}
    out["outer"] = list(d.outer)
    return out


def from_dict(data: Mapping[str, Any], function: Any = None) -> Plan:
    """The plan that `to_dict` wrote.

    Raises:
        PlanError: it was written by a newer jqopt, or isn't a plan.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("version"), int):
        raise PlanError("this isn't a plan: expected a mapping with an integer `version`")
    if data["version"] > VERSION:
        raise PlanError(f"plan version {data['version']} is newer than {VERSION}, the newest this jqopt reads")
    parameters = {p: Parameter(tuple(v["shape"]), v["dtype"]) for p, v in data["parameters"].items()}
    recipe = _recipe.load_recipe(data["recipe"])
    attention = tuple(map(OperandDecision.from_dict, data.get("attention", ())))
    decisions = tuple(map(_decision, data["decisions"]))
    return Plan(recipe, decisions, parameters, tuple(data["opaque"]), function, attention)


def _decision(data: Mapping[str, Any]) -> Decision:
    fields = dict(data)
    for name in ("weight", "input"):
        fields[name] = None if data[name] is None else TensorSpec.from_dict(data[name])
    fields["algorithm"] = tuple(AlgorithmSpec.from_dict(a) for a in data["algorithm"])
    layout = data["layout"]
    fields["layout"] = None if layout is None else Layout(**{k: tuple(v) for k, v in layout.items()})
    fields["outer"] = tuple(data["outer"])
    return Decision(**fields)
