"""Quantizing: solves the weights of the plan, those that read one activation together, and packs them."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jqopt import (
    _attention_ops,
    _calibrate,
    _distill,
    _feedback,
    _layerwise,
    _leaves,
    _numerics,
    _program,
    _stage,
    _view,
    algorithms,
)
from jqopt._apply import Quantized, check_paths, check_values, on_explicit_axes
from jqopt._calibrate import Stats, check_stats
from jqopt._jaxpr import QView, leaf_specs
from jqopt._numerics import amax_of
from jqopt._plan import FOLDED, Decision, Plan, Unit, fold_of, local_ties, solver
from jqopt._qtensor import Layout, QTensor
from jqopt.algorithms import Algorithm, InputQuantizer, Problem
from jqopt.analysis.folds import Fold
from jqopt.errors import CalibrationError, PlanError, UnsupportedError

Tracer = jax.core.Tracer  # pyright: ignore[reportAttributeAccessIssue] (public, but not in the stubs)


def quantize(
    plan: Plan,
    params: Any,
    stats: Stats | None = None,
    *,
    batches: Iterable[Any] | None = None,
    memory: int | None = None,
    donate: bool = False,
    progress: Callable | None = None,
    calibrating: Callable[[int], Any] | None = None,
    **kwargs: Any,
) -> Quantized:
    """Packs the weights that the plan quantizes; other leaves are handed on as they are.

    The weights that read one activation are worked on together, the last of the model first, so beside the model and
    the result at most those are held. Scales that the plan folds go into parameters before them.

    Args:
        params: the tree the plan was made for (float); of an NNX model, the module.
        stats: from `calibrate`; not needed when every activation is dynamic (`plan.needs_data` is empty).
        batches: instead of `stats`: calibrates by itself, in as many passes over the batches as `memory` asks for.
        memory: most bytes of statistics to hold at a time.
        donate: delete each float weight once it is packed. The caller's tree can't be used afterwards.
        progress: called with the path of each packed parameter.
        calibrating: called with each batch's number, with `batches`.
        kwargs: keywords for every call of the model, with `batches`.

    Raises:
        CalibrationError: the plan needs statistics and got none (or not of every site), or batches and got none.
        UnsupportedError: a weight holds NaN or inf; the message names it.
        PlanError: params aren't those of the plan.
    """
    params = plan.function.tree(params)
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, QTensor))
    paths = [_stage.parameter_path(plan.function, key, leaf) for key, leaf in flat]
    leaves = [leaf for _, leaf in flat]
    found = {p: leaf for p, leaf in zip(paths, leaves, strict=True) if p is not None}
    check_paths(plan, found)
    check_values(found)
    if plan.recipe.layerwise and plan.needs_data and batches is None:
        raise CalibrationError(
            f"recipe {plan.recipe.name!r} says `layerwise: true`: statistics are of what quantized layers give, so "
            "jqopt.quantize gathers them itself; write jqopt.quantize(plan, params, batches=batches)"
        )
    trains = _distill.training_of(plan) is not None
    if trains and batches is None:
        raise CalibrationError(
            f"recipe {plan.recipe.name!r} has the step `distill`, which trains on the batches themselves; write "
            "jqopt.quantize(plan, params, batches=batches)"
        )
    _check_input(plan, found, stats, batches)
    work, done = _Work(plan, found), []
    batches = list(batches) if trains and batches is not None and iter(batches) is batches else batches
    if plan.recipe.layerwise and plan.needs_data:
        quant = _layer_by_layer(plan, params, work, batches, memory, progress, kwargs)
        return quant if not trains or batches is None else _distill.distill(plan, quant, params, batches, **kwargs)
    free = [u for u in plan.units if not u.needs_data]
    rounds = _calibrate.passes(plan, memory) if batches is not None else [tuple(u for u in plan.units if u.needs_data)]
    rounds, attention = rounds or [()], {} if batches is not None else _attention_ops.solve(plan.attention, stats)
    again = _repeatable(batches, len(rounds))
    uses = collections.Counter(id(leaf) for leaf in leaves)  # one array may stand at several paths
    for number, units in enumerate(rounds):
        here = stats
        if batches is not None and (units or plan.needs_batches):
            here = _calibrate.calibrate(
                plan, params, again, units=units, attention=not number, progress=calibrating, **kwargs
            )
            attention = attention if number else _attention_ops.solve(plan.attention, here)
        last = number == len(rounds) - 1
        for unit in _ordered(plan, (*units, *free) if last else units):
            work.pack(unit, None if here is None else here.get(unit.name))
            done += unit.paths
            for path in unit.paths:
                before = found[path]
                uses[id(before)] -= 1
                if donate and last and not trains and isinstance(before, jax.Array) and not uses[id(before)]:
                    jax.block_until_ready(work.leaves[path])
                    before.delete()
                if progress is not None:
                    progress(path)
    now = [leaf if p is None else work.leaves[p] for p, leaf in zip(paths, leaves, strict=True)]
    if batches is not None and not plan.needs_batches:
        attention = _attention_ops.solve(plan.attention, None)
    quant = Quantized(with_feedback(plan, treedef.unflatten(work.shared_inputs(paths, now))), attention)
    if trains and batches is not None:
        quant = _distill.distill(plan, quant, params, batches, **kwargs)
    if donate:
        _delete([found[p] for p in done], uses)
    return quant


def _layer_by_layer(
    plan: Plan, params: Any, work: _Work, batches: Any, memory: int | None, progress: Callable | None, kwargs: dict
) -> Quantized:
    """First the scales of inputs, from the float model; then layer after layer; then what stands in no layer."""
    batches = list(batches) if iter(batches) is batches else batches
    scaling = [dataclasses.replace(u, algorithm=u.scaling) for u in plan.units if u.scaling is not None]
    kept: dict[str, jax.Array] = {}
    for units in _calibrate.passes(plan, memory, scaling):
        stats = _calibrate.calibrate(plan, params, batches, units=units, **kwargs)
        for unit in _ordered(plan, units):
            work.scale(unit, stats[unit.name], kept)
    waiting = [u for u in plan.units if u.needs_data]
    solver = _Layers(plan, work, kept)
    left = _layerwise.run(plan, work.tree(params), batches, waiting, kept, solver.solve, **kwargs)
    for unit in waiting:
        if unit not in left:
            got = tuple(g._replace(pre_scale=kept.get(unit.name)) for g in solver.stacked(unit))
            work.put(unit, got, unit.name in kept)
    later = [u for u in plan.units if not u.needs_data]
    for units in _calibrate.passes(plan, memory, left):
        stats = _calibrate.calibrate(plan, params, batches, units=units, **kwargs)
        for unit in _ordered(plan, units):
            work.pack(unit, stats[unit.name])
    for unit in _ordered(plan, later):
        work.pack(unit, None)
    for path in plan.quantized if progress is not None else ():
        assert progress is not None
        progress(path)
    return Quantized(with_feedback(plan, work.finished(params)), _attention(plan, params, batches, kwargs))


def _attention(plan: Plan, params: Any, batches: Any, kwargs: dict) -> dict[str, Any]:
    """Scales of attention's operands, from the float model."""
    needs = any(d.needs_data for d in plan.attention)
    stats = _calibrate.calibrate(plan, params, batches, units=(), attention=True, **kwargs) if needs else None
    return _attention_ops.solve(plan.attention, stats)


class _Layers:
    """Solves units layer by layer, and keeps what each layer gave."""

    def __init__(self, plan: Plan, work: _Work, kept: Mapping[str, jax.Array]):
        self.plan, self.work, self.kept = plan, work, kept
        self.solved: dict[str, dict[_program.Layer, tuple[Solved, ...]]] = {}

    def solve(self, unit: Unit, layer: _program.Layer, stats: dict[str, Any]) -> _layerwise.Done:
        """One layer of a unit, from statistics of its scaled input."""
        weights = tuple(self.work.leaves[p] for p in unit.paths)
        shared = tuple(self.work.shared(p) for p in unit.paths)
        pre = self.kept[unit.name][layer] if unit.name in self.kept else None
        got = _solve_layer(weights, shared, stats, pre, static=(*_static(self.plan, unit), unit.steps, layer))
        self.solved.setdefault(unit.name, {})[layer] = got
        d = unit.decision
        scale = None
        if d.has_static_input and d.input is not None:
            scale = _numerics.scale_from_amax(got[0].input_amax, d.input.element_format())
        codes, low, seen = {}, {}, []
        for path, result in zip(unit.paths, got, strict=True):
            one = _packed(self.plan.quantized[path], result._replace(pre_scale=pre), True, jnp.float32)
            codes[path] = one.replace(low_a=None, low_b=None).whole()
            if result.low_rank is not None:
                low[path] = one.whole() - codes[path]
            seen.append(one.matrix())
        block = 0 if d.input is None else d.input.feedback or 0
        factors = _feedback.factors(seen, block) if block else None
        return _layerwise.Done(codes, low, _layerwise.Seen(d.input_format, d.rotation, scale, pre, factors))

    def stacked(self, unit: Unit) -> tuple[Solved, ...]:
        """All layers of a unit.

        Raises:
            CalibrationError: no data reached some of them.
        """
        outer = unit.decision.outer
        found = self.solved[unit.name]
        missing = [i for i in np.ndindex(*outer) if i not in found]
        if missing:
            raise CalibrationError(
                f"no data reached layers {[i[0] if len(i) == 1 else i for i in missing]} of {unit.name}; calibrate "
                "with batches that do, or keep it with `keep: true`"
            )
        layers = [found[i] for i in np.ndindex(*outer)]
        return tuple(
            layers[0][m]
            if not outer
            else jax.tree.map(lambda *x: jnp.stack(x).reshape(*outer, *x[0].shape), *(layer[m] for layer in layers))
            for m in range(len(unit.paths))
        )


def _ordered(plan: Plan, units: Iterable[Unit]) -> list[Unit]:
    """The last of the model first: a scale of an input goes into parameters that are still float."""
    place = {u.name: i for i, u in enumerate(plan.units)}
    return sorted(units, key=lambda u: -place[u.name])


def _delete(arrays: list[Any], uses: Mapping[int, int]) -> None:
    for x in arrays:
        if isinstance(x, jax.Array) and not uses[id(x)] and not x.is_deleted():
            x.delete()


def _repeatable(batches: Iterable[Any] | None, times: int) -> Any:
    """The batches, kept in a list if they can be gone through only once and that isn't enough."""
    return list(batches) if batches is not None and times > 1 and iter(batches) is batches else batches


def _check_input(plan: Plan, found: Mapping[str, Any], stats: Stats | None, batches: Any) -> None:
    again = [p for p, leaf in found.items() if isinstance(leaf, QTensor)]
    if again:
        raise UnsupportedError(f"{again[0]} is quantized already ({found[again[0]]!r}); quantize the float model.")
    folds = [d.key for d in plan.decisions if d.scaled == FOLDED]
    if folds and plan.graph is None:
        raise PlanError(
            f"this plan folds the input scale of {folds[0]} into parameters before it, and it was read from a file, "
            "without the model's dataflow; make it anew with jqopt.plan(recipe, graph)"
        )
    if batches is not None:
        return
    if plan.needs_data and stats is None:
        raise CalibrationError(
            f"{len(plan.needs_data)} sites need statistics of their activations (first: {plan.needs_data[0]}). "
            "Call stats = jqopt.calibrate(plan, params, batches) and pass it, or use dynamic inputs."
        )
    if plan.needs_data and not _traced((stats, found)):
        check_stats(plan, stats or {})


def _traced(tree: Any) -> bool:
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def with_feedback(plan: Plan, params: Any) -> Any:
    """The packed tree with the factors of feedback beside the weights whose input is rounded so; they aren't stored."""
    blocks = [(u.paths, u.decision.input.feedback) for u in plan.units if u.decision.input is not None]
    blocks = [(paths, block) for paths, block in blocks if block]
    if not blocks:
        return params
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, QTensor))
    paths = [_stage.parameter_path(plan.function, key, leaf) for key, leaf in flat]
    found = {p: leaf for p, (_, leaf) in zip(paths, flat, strict=True) if p is not None}
    for of, block in blocks:
        factors = _factors([found[p] for p in of], block)
        found |= {p: found[p].replace(feedback=factors) for p in of}
    return treedef.unflatten([leaf if p is None else found[p] for p, (_, leaf) in zip(paths, flat, strict=True)])


def _factors(members: list[QTensor], block: int) -> jax.Array:
    """What `_feedback.factors` makes of packed weights; on a mesh with Explicit axes every device holds all of it.

    Of stacked layers one is decoded at a time.
    """
    beside = ("input_scale", "pre_scale", "low_a", "low_b", "feedback")
    members = [t.replace(**dict.fromkeys(beside)) for t in members]

    def run(members: list[QTensor]) -> jax.Array:
        if members[0].data.ndim > 2:
            return jax.lax.map(run, members)
        return _feedback.factors([t.matrix() for t in members], block)

    explicit = [x for x in map(jax.typeof, jax.tree.leaves(members)) if on_explicit_axes(x)]
    if not explicit:
        return jax.jit(run)(members)
    whole = jax.sharding.NamedSharding(explicit[0].sharding.mesh, jax.sharding.PartitionSpec())
    placed: Any = jax.sharding.auto_axes(run, out_sharding=whole)
    return placed(members)


class _Work:
    """The parameters while they are packed: floats, folded floats and QTensors, by path."""

    def __init__(self, plan: Plan, found: Mapping[str, Any]):
        self.plan, self.leaves = plan, dict(found)
        self.amax: dict[str, jax.Array] = {}  # of the packed ones, before
        self.inputs: dict[str, jax.Array] = {}
        self.mates: dict[str, list[str]] = {}
        for path, d in plan.quantized.items():
            amax = _amax(found[path], d.layout)
            if not isinstance(amax, Tracer) and not np.all(np.isfinite(np.asarray(amax))):
                raise UnsupportedError(
                    f"{path}: the weight holds NaN or inf; it can't be quantized to {d.format.name}."
                )
            self.mates.setdefault(d.fused or d.key, []).append(path)

    def shared(self, path: str) -> jax.Array | None:
        """Largest |weight| [*stack] of those that share a tensor-level scale with this one.

        Fused sites (q, k, v; gate, up) share the global scale of nvfp4 and the per-tensor scale of fp8, since serving
        engines run them as one matrix product.
        """
        d = self.plan.quantized[path]
        if not (d.format.global_scale or d.granularity == "tensor") or d.format.zero_point:
            return None
        mates = self.mates[d.fused or d.key]
        for p in mates:
            if not isinstance(self.leaves[p], QTensor):
                self.amax[p] = _amax(self.leaves[p], self.plan.quantized[p].layout)
        found = [self.amax[p] for p in mates]
        return functools.reduce(jnp.maximum, found) if len({a.shape for a in found}) == 1 else self.amax[path]

    def pack(self, unit: Unit, state: Any) -> None:
        """Packs the parameters of a unit, and lets those before it take up the scale of its input."""
        fold = self._fold_of(unit)
        got = self._solved(unit, state if unit.needs_data else None, fold)
        if fold is not None:
            self._fold(fold, unit, got[0].pre_scale, others=True)
        self.put(unit, got, fold is None)

    def scale(self, unit: Unit, state: Any, kept: dict[str, jax.Array]) -> None:
        """Finds the scale of a unit's input; folds it into all parameters it touches, or adds it to `kept`."""
        fold = self._fold_of(unit)
        pre = self._solved(unit, state, fold)[0].pre_scale
        if fold is None:
            kept[unit.name] = pre
        else:
            self._fold(fold, unit, pre, others=False)

    def _solved(self, unit: Unit, state: Any, fold: Fold | None) -> tuple[Solved, ...]:
        ties = None if fold is None or fold.ties is None else jnp.asarray(local_ties(fold))
        weights = tuple(self.leaves[p] for p in unit.paths)
        shared = tuple(self.shared(p) for p in unit.paths)
        return solve_unit(self.plan, unit, weights, shared, state, ties, powers=self._coarse(fold))

    def _fold_of(self, unit: Unit) -> Fold | None:
        folds = unit.decision.scaled == FOLDED and self.plan.graph is not None
        return fold_of(self.plan.graph, unit) if folds and self.plan.graph is not None else None

    def put(self, unit: Unit, got: tuple[Solved, ...], scaled: bool) -> None:
        """QTensors in place of the unit's weights; `scaled`: the scale of the input stays beside them."""
        amax = got[0].input_amax
        for path, result in zip(unit.paths, got, strict=True):
            self.leaves[path] = _packed(self.plan.quantized[path], result, scaled, self.leaves[path].dtype)
            if unit.decision.has_static_input and amax is not None:
                self.inputs[path] = amax

    def tree(self, params: Any) -> Any:
        """The parameter tree as it is now."""
        flat, treedef = jax.tree_util.tree_flatten_with_path(params)
        paths = [_stage.parameter_path(self.plan.function, key, leaf) for key, leaf in flat]
        return treedef.unflatten(
            [leaf if p is None else self.leaves[p] for p, (_, leaf) in zip(paths, flat, strict=True)]
        )

    def finished(self, params: Any) -> Any:
        """The parameter tree with QTensors, and static input scales in them."""
        _, treedef, paths, now = self._unflattened(params)
        return treedef.unflatten(self.shared_inputs(paths, now))

    def _unflattened(self, params: Any) -> tuple[Any, Any, list[str | None], list[Any]]:
        """(the tree as it is now, its treedef, the path of each leaf, the leaves)"""
        flat, treedef = jax.tree_util.tree_flatten_with_path(params)
        paths = [_stage.parameter_path(self.plan.function, key, leaf) for key, leaf in flat]
        now = [leaf if p is None else self.leaves[p] for p, (_, leaf) in zip(paths, flat, strict=True)]
        return treedef.unflatten(now), treedef, paths, now

    def _coarse(self, fold: Fold | None) -> bool:
        """Would parameters that take up a scale round it?"""
        if fold is None:
            return False
        taking = [a.path for a in fold.absorbers] + [c.path for c in fold.consumers]
        return any(jnp.finfo(self.leaves[p].dtype).nmant < 23 for p in taking if hasattr(self.leaves[p], "dtype"))

    def _fold(self, fold: Fold, unit: Unit, pre_scale: jax.Array, others: bool) -> None:
        """Multiplies the input with a scale: what takes it up, and the weights that read it (`others`: only those that
        aren't packed with it)."""
        scale = _numerics.divide(jnp.float32(1), pre_scale)
        readers = [c for c in fold.consumers if not others or c.path not in unit.paths]
        for a in (*fold.absorbers, *readers):
            self.leaves[a.path] = _leaves.scaled(self.leaves[a.path], a, scale)

    def shared_inputs(self, paths: list[str | None], leaves: list[Any]) -> list[Any]:
        """The leaves with their static input scales: one for all parameters that read one activation."""
        scales = _input_scales(self.plan, self.inputs)
        return [
            leaf.replace(input_scale=scales[p]) if p is not None and p in scales and isinstance(leaf, QTensor) else leaf
            for p, leaf in zip(paths, leaves, strict=True)
        ]


def group_amax(plan: Plan, found: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Largest |weight| [*stack] of those that share a tensor-level scale, by the path of each that has one."""
    work = _Work(plan, found)
    return {p: amax for p in plan.quantized if (amax := work.shared(p)) is not None}


def input_amax(plan: Plan, stats: Stats) -> dict[str, jax.Array]:
    """What the static input scale of each parameter is made from, by path: [*outer] float32; inputs aren't scaled."""
    found = {}
    for unit in plan.units:
        if unit.decision.has_static_input and unit.name in stats:
            state = stats[unit.name]
            amax = state["amax"].amax
            if unit.calibrator is not None:
                find = unit.calibrator.amax
                for _ in unit.decision.outer:
                    find = jax.vmap(find)
                amax = find(state["range"])
            found.update(dict.fromkeys(unit.paths, amax))
    return _merged(plan, found)


def solve(d: Decision, w: jax.Array, tensor_amax: jax.Array | None) -> QTensor:
    """One parameter as an algorithm that needs no data packs it. `tensor_amax` [*stack], where it has one."""
    problem = Problem(d.format, d.granularity)
    static = ((_layout(d),), problem, solver(d.algorithm), None, 0)
    (got,) = _solve((w,), (tensor_amax,), None, None, static=static)
    return _packed(d, got, False, w.dtype)


def _input_scales(plan: Plan, amax: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The static input scale of each parameter, [*outer] float32."""
    inputs = {p: plan.quantized[p].input for p in amax}
    merged = _merged(plan, amax)
    return {p: _numerics.scale_from_amax(a, i.element_format()) for p, a in merged.items() if (i := inputs[p])}


def _merged(plan: Plan, amax: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Parameters that read one activation (q, k, v) get one range, also where one of them reads another one besides."""
    amax = dict(amax)
    groups: dict[str, set[str]] = {}
    for d in plan.decisions:
        if d.group and d.path in amax and not d.scaled:
            groups.setdefault(d.group, set()).add(d.path)
    for members in _components(list(groups.values())):
        whole = functools.reduce(jnp.maximum, [amax[p] for p in sorted(members)])
        amax.update(dict.fromkeys(members, whole))
    return amax


def _components(groups: list[set[str]]) -> list[set[str]]:
    """Groups with a common member, joined."""
    out: list[set[str]] = []
    for group in groups:
        touching = [g for g in out if g & group]
        out = [g for g in out if not g & group] + [set().union(group, *touching)]
    return out


@functools.partial(jax.jit, static_argnums=1)
def _amax(w: jax.Array, layout: Any) -> jax.Array:
    axes = layout.axes()
    stack = [next(i for i, atoms in enumerate(axes) if s in atoms) for s in layout.stack]
    if all(axes[i] == [s] for i, s in zip(stack, layout.stack, strict=True)):
        out = amax_of(w, tuple(i for i in range(w.ndim) if i not in stack))
        return out.transpose([sorted(stack).index(i) for i in stack]).astype(jnp.float32)
    return amax_of(layout.to_matrix(w), (-2, -1)).astype(jnp.float32)


# ------------------------------------------------------------------------------------------------ one unit


class Solved(NamedTuple):
    """What solving gives for one weight: codes [*stack, ..], pre_scale [*outer, k], low-rank factors, input amax."""

    codes: Any
    pre_scale: Any
    low_rank: Any
    input_amax: Any


def solve_unit(
    plan: Plan,
    unit: Unit,
    weights: tuple[jax.Array, ...],
    shared: tuple[jax.Array | None, ...],
    state: Any,
    ties: jax.Array | None,
    powers: bool = False,
) -> tuple[Solved, ...]:
    """The unit's weights, solved. `shared` [*stack] and `state` have their stacked axes first."""
    layouts, problem, find = _static(plan, unit, powers)
    run = functools.partial(_solve, static=(layouts, problem, unit.algorithm, find, len(unit.decision.outer)))
    run = _explicit([plan.quantized[p] for p in unit.paths], weights, run, (shared, state, ties))
    return run(weights, shared, state, ties)


def _static(plan: Plan, unit: Unit, powers: bool = False) -> tuple[tuple[Layout, ...], Problem, Callable | None]:
    """What a jitted solver must know of a unit: nothing by which equal layers would differ."""
    d = unit.decision
    decisions = [plan.quantized[p] for p in unit.paths]
    own = [x.fused or x.key for x in decisions]
    everywhere = [x.fused or x.key for x in plan.quantized.values()]
    together = {
        key: i if own.count(key) == everywhere.count(key) else -1 - i for i, key in enumerate(dict.fromkeys(own))
    }
    spec = d.input_format
    problem = Problem(
        d.format, d.granularity, None if spec is None else InputQuantizer(*spec[:3]),
        tuple(together[x.fused or x.key] for x in decisions), powers,
        any(a.stage in ("range", "rounding") and a.name != "max" for a in solver(d.algorithm, plan.algorithms).parts),
    )  # fmt: skip
    return tuple(_layout(x) for x in decisions), problem, None if unit.calibrator is None else unit.calibrator.amax


@functools.partial(jax.jit, static_argnames="static")
def _solve_layer(weights: tuple, shared: tuple, state: Any, pre: Any, *, static: tuple) -> tuple[Solved, ...]:
    """One layer of the weights, given what its input is multiplied with; `state` is of the input after that."""
    layouts, problem, find, (first, rest), layer = static
    rotations = [a for a in first if a.stage == "rotation"]
    pick = lambda x: x[layer]  # noqa: E731
    matrices = tuple(_layered(pick(x.to_matrix(w)), 0, 2) for w, x in zip(weights, layouts, strict=True))
    amax = tuple(None if a is None else pick(a).reshape(-1) for a in shared)
    task = algorithms.task(matrices, problem, state, amax)
    for a in rotations:
        task = a.solve(task)
    if pre is not None:
        task = algorithms.scaled(task, pre).replace(pre_scale=None)
    for a in rest:
        task = a.solve(task)
    got = _results(algorithms.rounded(task), find)
    return tuple(_restacked(g, x.sliced(len(layer)), 0) for g, x in zip(got, layouts, strict=True))


def _layout(d: Decision) -> Layout:
    assert d.layout is not None and d.weight is not None, d.key
    return d.layout


def _packed(d: Decision, got: Solved, scaled: bool, dtype: Any) -> QTensor:
    """The QTensor of a solved weight; `scaled`: does the scale of its input stay beside it?"""
    layout = _layout(d)
    stack = got.codes.data.shape[:-2]
    pre = got.pre_scale if scaled else None
    if pre is not None:
        inner = len(stack) - (pre.ndim - 1)
        pre = jnp.broadcast_to(pre.reshape(*pre.shape[:-1], *[1] * inner, pre.shape[-1]), (*stack, pre.shape[-1]))
    low_a, low_b = (None, None) if got.low_rank is None else got.low_rank
    data, scale, global_scale, zero_point = got.codes
    return QTensor(
        data, scale, global_scale, zero_point, None, pre, d.format, d.granularity, layout, np.dtype(dtype).name,
        low_a, low_b, d.rotation,
    )  # fmt: skip


def _explicit(decisions: list[Decision], weights: tuple, solve: Callable, rest: tuple) -> Callable:
    """On a mesh with Explicit axes: `solve` with the compiler placing what is inside, its leaves as the weights are."""
    shardings: list[Any] = [getattr(jax.typeof(w), "sharding", None) for w in weights]
    meshes = [getattr(s, "mesh", None) for s in shardings]
    explicit = jax.sharding.AxisType.Explicit
    if any(m is None or m.empty or explicit not in m.axis_types for m in meshes):
        return solve
    shape_of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    shapes = jax.eval_shape(solve, *jax.tree.map(shape_of, (weights, *rest)))
    placed = tuple(_placed(d, got, w, s) for d, got, w, s in zip(decisions, shapes, weights, shardings, strict=True))
    return jax.sharding.auto_axes(solve, out_sharding=placed)  # pyright: ignore[reportReturnType]


def _placed(d: Decision, got: Solved, w: Any, sharding: Any) -> Solved:
    """Where the leaves of a solved weight go."""
    mesh, layout = sharding.mesh, _layout(d)
    data, scale, global_scale, zero_point = got.codes
    packed = QTensor(data, scale, global_scale, zero_point, None, None, d.format, d.granularity, layout, "")
    spec = PartitionSpec(*sharding.spec, *([None] * (w.ndim - len(sharding.spec))))
    found = leaf_specs(QView(packed, _view.whole(d.key, w.shape, w.dtype)), spec, mesh)

    def place(name: str) -> NamedSharding | None:  # where a block would be cut: whole on every device
        if getattr(packed, name) is None:
            return None
        return NamedSharding(mesh, PartitionSpec() if found is None else getattr(found.tensor, name))

    everywhere = lambda tree: jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)  # noqa: E731
    codes = _numerics.Codes(*map(place, _numerics.Codes._fields))  # pyright: ignore[reportArgumentType]
    return Solved(codes, everywhere(got.pre_scale), everywhere(got.low_rank), everywhere(got.input_amax))


@functools.partial(jax.jit, static_argnames="static")
def _solve(weights: tuple, shared: tuple, state: Any, ties: Any, *, static: tuple) -> tuple[Solved, ...]:
    layouts, problem, algorithm, find, outer = static
    matrices = tuple(_layered(x.to_matrix(w), outer, 2) for w, x in zip(weights, layouts, strict=True))
    amax = tuple(None if a is None else _layered(a, outer, 0) for a in shared)
    run = functools.partial(_layer, problem, algorithm, find)
    if not outer:
        got = run(matrices, amax, state, ties)
    else:
        feed = jax.tree.map(lambda x: x.reshape(-1, *x.shape[outer:]), (matrices, amax, state, ties))
        # layer after layer where a layer is much work, so that only one layer's matrices are held
        got = jax.lax.map(lambda x: run(*x), feed) if algorithm.uses_data else jax.vmap(run)(*feed)
    return tuple(_restacked(g, layout, outer) for g, layout in zip(got, layouts, strict=True))


def _restacked(got: Solved, layout: Layout, outer: int) -> Solved:
    """[layers, e, ...] (or [e, ...]) -> [*stack, ...]; what belongs to the input: [layers, ...] -> [*outer, ...]."""
    stack = tuple(layout.atoms[i] for i in layout.stack)
    lead = int(outer > 0)
    whole = lambda tree: jax.tree.map(lambda x: x.reshape(*stack, *x.shape[lead + 1 :]), tree)  # noqa: E731
    own = lambda tree: jax.tree.map(lambda x: x.reshape(*stack[:outer], *x.shape[lead:]), tree)  # noqa: E731
    return Solved(whole(got.codes), own(got.pre_scale), whole(got.low_rank), own(got.input_amax))


def _layered(x: jax.Array, outer: int, trailing: int) -> jax.Array:
    """[*outer, *inner, ...] -> [*outer, e, ...] with the inner stacked axes as one."""
    inner = math.prod(x.shape[outer : x.ndim - trailing])
    return x.reshape(*x.shape[:outer], inner, *x.shape[x.ndim - trailing :])


def _layer(
    problem: Problem, algorithm: Algorithm, find: Callable | None, weights: tuple, amax: tuple, state: Any, ties: Any
) -> tuple[Solved, ...]:
    """One layer: weights [e, n, k]; `find` makes the range of the input from its statistic."""
    task = algorithms.task(weights, problem, state, amax, ties)
    return _results(algorithms.rounded(algorithm.solve(task)), find)


def _results(task: algorithms.Task, find: Callable | None) -> tuple[Solved, ...]:
    seen, quantizer = task.input_amax, task.problem.input
    if seen is None and quantizer is not None and quantizer.static:
        stats = task.stats
        if task.pre_scale is not None:
            seen = jnp.max(stats["channels"].amax * task.pre_scale)
        else:
            seen = stats["amax"].amax if find is None else find(stats["range"])
    return tuple(Solved(c, task.pre_scale, low, seen) for c, low in zip(task.codes, task.low_rank, strict=True))
