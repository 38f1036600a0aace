"""Layer by layer: each weight is solved on what the quantized layers before it give, in one run through the model.

The model's flat program is cut before each group of weights. What later pieces read is kept for every batch, so each
piece runs once on the quantized stream (and once on the float one, where an algorithm compares the two).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jqopt import _feedback, _hadamard, _jaxpr, _numerics, _ops, _program, _stage
from jqopt._calibrate import as_call
from jqopt._plan import Plan, Unit
from jqopt._program import Layer, Piece, Program
from jqopt._trace import Site
from jqopt.algorithms import AMAX, CROSS, MOMENTS
from jqopt.errors import CalibrationError


class Stage(NamedTuple):
    """One unit in one of its stacked layers."""

    unit: str
    layer: Layer


class Seen(NamedTuple):
    """How a solved site sees its activation, and what its weight stands for."""

    spec: _ops.InputFormat | None
    rotation: int
    input_scale: jax.Array | None
    pre_scale: jax.Array | None
    feedback: jax.Array | None = None


@dataclasses.dataclass
class _Batch:
    """One batch on its way through the program, on the quantized stream and, if asked for, the float one."""

    program: Program
    quantized: dict[Any, Any]
    plain: dict[Any, Any] | None
    at: int = 0


class Done(NamedTuple):
    """A solved layer of a unit: matrices [*inner, n, k] by path, of what the codes stand for and of the low-rank parts,
    and how the sites see their input."""

    codes: Mapping[str, jax.Array]
    low: Mapping[str, jax.Array]
    seen: Seen


Solve = Callable[[Unit, Layer, dict[str, Any]], Done]
"""(unit, layer, statistics) -> what its weights have become."""


def run(
    plan: Plan,
    params: Any,
    batches: Iterable[Any],
    units: Sequence[Unit],
    prepared: Mapping[str, Any],
    solve: Solve,
    progress: Callable[[int], Any] | None = None,
    **kwargs: Any,
) -> tuple[Unit, ...]:
    """Runs the batches through the model, solving each layer of each unit where its input is ready.

    Args:
        params: float, with the scales that fold folded.
        prepared: by unit, the scale [*outer, k] that stays beside its packed weights.
        progress: called with the number of each finished stage.

    Returns:
        The units that couldn't be solved here: no site of theirs stands in the program itself, or they read several
        activations.

    Raises:
        CalibrationError: no batches, or batches that run through the layers in different orders.
    """
    leaves, names = _leaves_of(plan, params)
    two = any(u.algorithm.two_streams for u in units)
    feed = [_start(plan, params, batch, kwargs, len(leaves), two) for batch in batches]
    if not feed:
        raise CalibrationError("layerwise calibration got no batches: the iterable is empty")
    orders = [_stages(b.program, units) for b in feed]
    if any(list(o) != list(orders[0]) for o in orders):
        raise CalibrationError("the batches run through the model's layers in different orders: give them one shape")
    by_name = {u.name: u for u in units}
    now = _Now(list(leaves), leaves, {}, {}, {p: u.name for u in units for p in u.paths}, names)
    for number, stage in enumerate(orders[0], 1):
        unit = by_name[stage.unit]
        for b, order in zip(feed, orders, strict=True):
            _advance(b, order[stage], now)
        pre = prepared.get(unit.name)
        pre = None if pre is None else pre[stage.layer]
        factors = _factors(plan, unit, stage.layer, now, pre)
        stats = _gather(plan, unit, feed, [o[stage] for o in orders], pre, factors)
        done = solve(unit, stage.layer, stats)
        now.seen[stage] = done.seen
        for path in unit.paths:
            i, layout = names[path], plan.quantized[path].layout
            now.leaves[i] = _put(now.leaves[i], stage.layer, done.codes[path], layout)
            if path in done.low:
                before = now.low.get(i, jnp.zeros_like(leaves[i]))
                now.low[i] = _put(before, stage.layer, done.low[path], layout)
        if progress is not None:
            progress(number)
    there = {s.unit for s in orders[0]}
    return tuple(u for u in units if u.name not in there)


@dataclasses.dataclass
class _Now:
    """The parameters as far as they are solved, by their place among the leaves.

    leaves: what the codes stand for where solved, floats elsewhere. low: low-rank parts, zero where not solved.
    """

    leaves: list[Any]
    floats: list[Any]
    low: dict[int, Any]
    seen: dict[Stage, Seen]
    whose: Mapping[str, str]
    names: Mapping[str, int]


@functools.partial(jax.jit, static_argnums=(1, 3))
def _put(leaf: Any, layer: Layer, matrix: jax.Array, layout: Any) -> jax.Array:
    """The parameter with one of its stacked layers replaced by a matrix [*inner, n, k]."""
    if not layer:
        return layout.from_matrix(matrix).astype(leaf.dtype)
    whole = layout.to_matrix(leaf).at[layer].set(matrix.astype(leaf.dtype))
    return layout.from_matrix(whole)


def _leaves_of(plan: Plan, params: Any) -> tuple[list[Any], dict[str, int]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    names = {
        p: i for i, (key, leaf) in enumerate(flat) if (p := _stage.parameter_path(plan.function, key, leaf)) is not None
    }
    return [leaf for _, leaf in flat], names


def _start(plan: Plan, params: Any, batch: Any, kwargs: Mapping[str, Any], n_params: int, two: bool) -> _Batch:
    args, keywords = as_call(batch, kwargs)
    arrays, _, key = _stage.split_static((args, keywords))
    shapes = tuple((tuple(np.shape(a)), str(jnp.result_type(a))) for a in arrays)
    cache = plan.compiled
    if ("program", key, shapes) not in cache:
        closed, _, views = _stage.stage(plan.function, params, args, keywords)
        cache["program", key, shapes] = _program.flat(closed, views, n_params)
    program: Program = cache["program", key, shapes]
    inputs = dict(zip(program.jaxpr.invars[n_params:], map(jnp.asarray, arrays), strict=True))
    return _Batch(program, inputs, dict(inputs) if two else None)


def _stages(program: Program, units: Sequence[Unit]) -> dict[Stage, int]:
    """Where each layer of each unit is solved: before the first of its sites; not those that read several inputs."""
    whose = {p: u.name for u in units for p in u.paths}
    found: dict[Stage, int] = {}
    inputs: dict[Stage, set[int]] = {}
    for place, (site, layer) in sorted(program.sites.items()):
        if site.path in whose and site.op != "gather":
            stage = Stage(whose[site.path], layer)
            found.setdefault(stage, place)
            inputs.setdefault(stage, set()).add(site.activation)
    several = {s.unit for s, acts in inputs.items() if len(acts) > 1}
    return {s: place for s, place in found.items() if s.unit not in several}


def _advance(b: _Batch, to: int, now: _Now) -> None:
    """Runs a batch up to a place; forgets what nothing later reads."""
    if to == b.at:
        return
    piece = b.program.piece(b.at, to)
    seen = [now.seen.get(Stage(now.whose.get(s.path or "", ""), layer)) for s, layer in piece.sites.values()]
    low = [_low(b.program, piece, n, s, now) for n, (s, _) in piece.sites.items()]
    b.quantized = _moved(b.program, piece, to, b.quantized, now.leaves, seen, low)
    if b.plain is not None:
        nothing: list[Any] = [None] * len(seen)
        b.plain = _moved(b.program, piece, to, b.plain, now.floats, nothing, nothing)
    b.at = to


def _low(program: Program, piece: Piece, n: int, site: Site, now: _Now) -> Any:
    """The low-rank part of a site's weight as its operand is; None without one."""
    i = now.names.get(site.path or "", -1)
    if i not in now.low:
        return None
    leaves = [now.low[i] if j == i else leaf for j, leaf in enumerate(now.floats)]
    return program.weights([piece.eqns[n].invars[site.operand]], leaves)[0]


def _moved(program: Program, piece: Piece, to: int, env: dict, leaves: list, seen: list, low: list) -> dict:
    """The values that are kept after a piece."""
    static = tuple(None if s is None else (s.spec, s.rotation) for s in seen)
    arrays = [None if s is None else (s.input_scale, s.pre_scale, s.feedback) for s in seen]
    weights, reads = program.weights(piece.weights, leaves), [env[v] for v in piece.reads]
    outs = _run_piece(_Keyed(piece, static), weights, reads, arrays, low)
    return {v: x for v, x in {**env, **dict(zip(piece.gives, outs, strict=True))}.items() if program.needed(v, to)}


class _Keyed:
    """A piece as a static argument: equal where it computes the same, so that equal layers are compiled once."""

    def __init__(self, piece: Piece, static: tuple):
        self.piece, self.static = piece, static
        self.key = (piece.key, static)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@functools.partial(jax.jit, static_argnums=0)
def _run_piece(keyed: _Keyed, weights: list, reads: list, arrays: list, low: list) -> list:
    piece = keyed.piece
    sites = list(piece.sites.items())

    def hook(i: int, values: Sequence[Any]) -> list | None:
        if keyed.static[i] is None:
            return None
        n, (site, _) = sites[i]
        eqn, (spec, rotation) = piece.eqns[n], keyed.static[i]
        operands = list(values)
        x = values[1 - site.operand]
        operands[1 - site.operand] = seen_as(x, site, Seen(spec, rotation, *arrays[i]))
        (out,) = _jaxpr.bind(eqn, operands)
        if low[i] is not None:
            operands[1 - site.operand], operands[site.operand] = x, low[i]
            out = out + _jaxpr.bind(eqn, operands)[0]
        return [out]

    return piece.run(weights, reads, hook)


def rows_of(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The activation as [tokens, k], contracted axes last."""
    keep = [i for i in range(x.ndim) if i not in axes]
    return x.transpose([*keep, *axes]).reshape(-1, int(np.prod([x.shape[i] for i in axes])))


def prepared_rows(rows: jax.Array, rotation: int, pre: jax.Array | None) -> jax.Array:
    """Rotated, then scaled, float32."""
    rows = rows.astype(jnp.float32)
    rows = _hadamard.transform(rows, rotation) if rotation else rows
    return rows if pre is None else rows * pre


def seen_as(x: jax.Array, site: Site, seen: Seen) -> jax.Array:
    """The activation as if the quantizer's rounding had been done to it, in its own shape and dtype."""
    if seen.spec is None:
        return x
    axes = site.input_axes
    keep = [i for i in range(x.ndim) if i not in axes]
    order = [*keep, *axes]
    rows = prepared_rows(rows_of(x, axes), seen.rotation, seen.pre_scale)
    rows = _ops.quantize_input(rows, seen.spec, seen.input_scale, seen.feedback)
    if seen.pre_scale is not None:
        rows = rows / seen.pre_scale
    rows = _hadamard.inverse(rows, seen.rotation) if seen.rotation else rows
    back = sorted(range(x.ndim), key=order.__getitem__)
    return rows.reshape([x.shape[i] for i in order]).transpose(back).astype(x.dtype)


# -------------------------------------------------------------------------------------------- statistics


def _factors(plan: Plan, unit: Unit, layer: Layer, now: _Now, pre: Any) -> jax.Array | None:
    """How the input of weights that are still float is rounded with feedback; None where it isn't."""
    d = unit.decision
    if d.input is None or not d.input.feedback:
        return None
    found = []
    for path in unit.paths:
        layout = plan.quantized[path].layout
        assert layout is not None, path
        w = prepared_rows(layout.to_matrix(now.leaves[now.names[path]])[layer], d.rotation, None)
        found.append(w if pre is None else w / pre)
    return _feedback.factors(found, d.input.feedback)


def _gather(
    plan: Plan, unit: Unit, feed: Sequence[_Batch], places: Sequence[int], pre: Any, factors: jax.Array | None
) -> dict[str, Any]:
    """The statistics of a unit's input in one layer, over all batches: second moments of it as it is quantized."""
    d = unit.decision
    assert d.layout is not None
    first = tuple(s for s in unit.statistics if s.name != MOMENTS.name)
    state = {s.name: s.init(d.layout.k) for s in first}
    site = feed[0].program.sites[places[0]][0]
    xs = [_activation(b, place) for b, place in zip(feed, places, strict=True)]
    for x in xs:
        state = _updated(_Static((first, site.input_axes, d.rotation)), state, x, pre)
    amax = np.asarray(state[AMAX.name].amax)
    if not np.isfinite(amax):
        raise CalibrationError(
            f"the activations at {unit.name} hold NaN or inf behind quantized layers. Look at the batches."
        )
    if MOMENTS.name not in {s.name for s in unit.statistics}:
        return state
    scale = None
    if d.has_static_input and d.input is not None:
        whole = state[AMAX.name].amax if unit.calibrator is None else unit.calibrator.amax(state["range"])
        scale = _numerics.scale_from_amax(whole, d.input.element_format())
    moments = {MOMENTS.name: MOMENTS.init(d.layout.k)}
    cross = jnp.zeros((d.layout.k, d.layout.k), jnp.float32) if unit.algorithm.two_streams else None
    for b, place, x in zip(feed, places, xs, strict=True):
        moments, cross = _moments(
            _Static((site.input_axes, d.rotation, d.input_format)), moments, cross, x,
            None if b.plain is None or cross is None else _activation(b, place, plain=True), pre, scale, factors,
        )  # fmt: skip
    return {**state, **moments, **({} if cross is None else {CROSS: cross})}


def _activation(b: _Batch, place: int, plain: bool = False) -> jax.Array:
    site, _ = b.program.sites[place]
    var = b.program.eqns[place].invars[1 - site.operand]
    env = b.plain if plain and b.plain is not None else b.quantized
    return env[var]


class _Static(tuple):
    """Static facts of a jitted function."""


@functools.partial(jax.jit, static_argnums=0)
def _updated(static: _Static, state: dict, x: jax.Array, pre: Any) -> dict:
    statistics, axes, rotation = static
    rows = prepared_rows(rows_of(x, axes), rotation, pre)
    return {s.name: s.update(state[s.name], rows) for s in statistics}


@functools.partial(jax.jit, static_argnums=0)
def _moments(
    static: _Static, moments: dict, cross: Any, x: jax.Array, plain: Any, pre: Any, scale: Any, factors: Any
) -> tuple:
    axes, rotation, spec = static
    rows = prepared_rows(rows_of(x, axes), rotation, pre)
    seen = rows if spec is None else _ops.quantize_input(rows, spec, scale, factors)
    moments = {MOMENTS.name: MOMENTS.update(moments[MOMENTS.name], seen)}
    if cross is not None and plain is not None:
        there = prepared_rows(rows_of(plain, axes), rotation, pre)
        more = jax.lax.dot_general(there - seen, seen, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
        cross = cross + more
    return moments, cross
