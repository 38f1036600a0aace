"""Calibration: one jitted pass over the batches that gathers what the plan's algorithms need."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqopt import _attention_ops, _hadamard, _jaxpr, _stage, _trace
from jqopt._apply import Sited, check_paths, check_values, decided_sites
from jqopt._attention import OperandDecision, Product, products
from jqopt._jaxpr import Address, State
from jqopt._plan import Plan, Unit
from jqopt._trace import Site
from jqopt.errors import CalibrationError, TraceError

Tracer = jax.core.Tracer  # pyright: ignore[reportAttributeAccessIssue] (public, but not in the stubs)
Stats = dict[str, Any]
"""Statistics by unit (the first of the parameters that read one activation) and name: a pytree of arrays, with the
stacked layers' axes first. Save it, merge it, plot it."""


def initial(plan: Plan, units: Sequence[Unit] | None = None, attention: bool | None = None) -> Stats:
    """Statistics before any data, of all units that need some or of these; of attention's operands if all are."""
    chosen = [u for u in plan.units if u.needs_data] if units is None else units
    operands = _operands(plan, units, attention)
    return {**{u.name: _initial(u) for u in chosen}, **_attention_ops.initial(operands)}


def _operands(plan: Plan, units: Sequence[Unit] | None, attention: bool | None) -> tuple[OperandDecision, ...]:
    return plan.attention if (units is None if attention is None else attention) else ()


def _initial(unit: Unit) -> dict[str, Any]:
    d = unit.decision
    assert d.layout is not None, d.key
    state = {s.name: s.init(d.layout.k) for s in unit.statistics}
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*d.outer, *x.shape)), state)


def nbytes(unit: Unit) -> int:
    """Bytes of a unit's statistics."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda: _initial(unit))))


def passes(plan: Plan, memory: int | None = None, units: Iterable[Unit] | None = None) -> list[tuple[Unit, ...]]:
    """The units whose statistics are gathered together, pass by pass over the data, the last units of the model first.

    Args:
        memory: most bytes of statistics held at a time; None: no limit.
        units: those to gather statistics of; all that need some unless given.

    Raises:
        CalibrationError: the statistics of one unit alone take more.
    """
    out: list[tuple[Unit, ...]] = []
    used = 0
    for unit in reversed([u for u in plan.units if u.needs_data] if units is None else list(units)):
        size = nbytes(unit)
        if memory is not None and size > memory:
            raise CalibrationError(
                f"{unit.name}: its statistics alone take {size:,} bytes, and {memory:,} are allowed. Allow more, or "
                "give it an algorithm without second moments (max, mse)"
            )
        if not out or (memory is not None and used + size > memory):
            out.append(())
            used = 0
        out[-1], used = (*out[-1], unit), used + size
    return out


def described(plan: Plan, memory: int | None = None) -> str:
    """How the statistics are gathered, in words: how many passes over the data, and how much they hold.

    Raises:
        CalibrationError: as `passes` does.
    """
    if not plan.needs_batches:
        return "needs no data"
    rounds = passes(plan, memory)
    whole, most = (f(sum(map(nbytes, units)) for units in rounds or [()]) for f in (sum, max))
    training = next((u.algorithm.training for u in plan.units if u.algorithm.training is not None), None)
    then = "" if training is None else f"; then {training.steps} steps of training on the batches"
    if plan.recipe.layerwise:
        return f"layer by layer, in one run through the model, after the scales of inputs{then}"
    held = "" if len(rounds) < 2 else f", at most {most:,} at a time"
    count = f"{max(len(rounds), 1)} pass{'es' * (len(rounds) > 1)}"
    return f"{count} over the data; statistics of {whole:,} bytes{held}{then}"


class Observer(Sited):
    """The observing rule: at each site, update the statistics of its activation, then run the op as it stands."""

    def __init__(self, sites: Sequence[tuple[Any, Any]], units: Sequence[Unit]):
        self.units = {key: u for u in units for key in u.at}
        super().__init__([(s, d) for s, d in sites if s.key in self.units or isinstance(s, Product)])

    def state_below(self, address: Address) -> frozenset[str]:
        return frozenset(self._name(s) for s in self.below.get(address, ()))

    def stacked_at(self, address: Address) -> frozenset[str]:
        return frozenset(self._name(s) for s in self.below.get(address, ()) if address in s.scans)

    def _name(self, site: Any) -> str:
        """Under which the statistics of a site, or of an attention, stand."""
        return site.key if isinstance(site, Product) else self.units[site.key].name

    def __call__(self, address: Address, eqn: Any, values: Sequence[Any], state: State) -> tuple[list, State]:
        for site, decision in self.at[address]:
            if isinstance(site, Product):
                state = {**state, site.key: _attention_ops.observe(site, decision, values, state[site.key])}
                continue
            unit = self.units[site.key]
            x = _matrix(values[1 - site.operand], eqn, site)
            if decision.rotation:
                x = _hadamard.transform(x, decision.rotation)
            index = tuple(a.start for a in site.view.fixed) if site.view is not None else ()
            update = functools.partial(_updated, unit.statistics, x=x)
            state = {**state, unit.name: _update_at(state[unit.name], index, update)}
        return _jaxpr.bind(eqn, values), state

    def allreduce(self, before: State, after: State, axes: tuple[str, ...]) -> State:
        kinds = {u.name: u.statistics for u in self.units.values()}
        return {
            name: {s.name: s.allreduce(before[name][s.name], after[name][s.name], axes) for s in kinds[name]}
            if name in kinds
            else _attention_ops.allreduce(before[name], after[name], axes)
            for name in after
        }


def _updated(statistics: Sequence[Any], state: Any, *, x: jax.Array) -> dict[str, Any]:
    return {s.name: s.update(state[s.name], x) for s in statistics}


def _update_at(state: Any, index: tuple[int, ...], update: Callable[[Any], Any]) -> Any:
    if not index:
        return update(state)
    after = update(jax.tree.map(lambda s: s[index], state))
    return jax.tree.map(lambda s, a: s.at[index].set(a), state, after)


def _matrix(x: jax.Array, eqn: Any, site: Site) -> jax.Array:
    """The activation as [tokens, k], contracted axes last."""
    if site.op == "dot_general":
        axes = list(map(int, eqn.params["dimension_numbers"][0][1 - site.operand]))
    elif site.op == "conv":
        axes = [eqn.params["dimension_numbers"].lhs_spec[1]]
    else:
        axes = [x.ndim - 1]
    keep = [i for i in range(x.ndim) if i not in axes]
    moved = x.transpose([*keep, *axes])
    return moved.reshape(-1, int(np.prod([x.shape[i] for i in axes])))


def calibrate(
    plan: Plan,
    params: Any,
    batches: Iterable[Any],
    *,
    stats: Stats | None = None,
    progress: Callable[[int], Any] | None = None,
    units: Sequence[Unit] | None = None,
    attention: bool | None = None,
    **kwargs: Any,
) -> Stats:
    """Runs the float model over the batches and gathers statistics of activations.

    Args:
        params: the tree the plan was made for; of an NNX model, the module.
        batches: an iterable of inputs, each an array, a tuple of positional inputs, or a dict of keyword inputs.
        stats: statistics of earlier batches, to go on from. Any split into batches gives the same result.
        progress: called with each finished batch's number, e.g. to move a progress bar.
        units: those of `plan.units` to gather statistics of; all unless given.
        attention: gather those of attention's operands? Unless said, if no units are given.
        kwargs: keywords for every call of the model (`train=False`).

    Raises:
        CalibrationError: no batches, one that the model can't run with (it gives its number), a site that no data
            reached, or NaN or inf at a site (which it names).
        PlanError: params aren't those of the plan, or hold no values.

    A site that saw nothing but zeros gets a static scale of 1; a `UserWarning` names it.
    """
    # a copy: each step takes over the buffers of the last; the caller's own stay, and no two leaves share one
    chosen = tuple(u for u in plan.units if u.needs_data) if units is None else tuple(units)
    operands = _operands(plan, units, attention)
    state: Stats = jax.tree.map(jnp.copy, initial(plan, chosen, bool(operands)) if stats is None else stats)
    if batches is None:
        raise CalibrationError("calibrate needs batches: an iterable of inputs (arrays, tuples, or dicts of keywords).")
    if not plan.needs_batches:
        return state
    params = plan.function.tree(params)
    _check(plan, params)
    steps = plan.compiled
    n = 0
    for n, batch in enumerate(batches, 1):
        arrays, rebuild, key = _stage.split_static(as_call(batch, kwargs))
        key = ("calibrate", tuple(u.name for u in chosen), bool(operands), key)
        if key not in steps:
            steps[key] = jax.jit(functools.partial(_step, plan, chosen, operands, rebuild), donate_argnums=(0,))
        try:
            # one batch in flight: progress that is true
            state = jax.block_until_ready(steps[key](state, params, arrays))
        except TraceError as e:
            raise CalibrationError(f"batch {n}: {e}") from e
        if progress is not None:
            progress(n)
    if n == 0:
        raise CalibrationError(
            "calibrate got no batches: the iterable is empty (a generator that was already used up?). "
            f"Sites that wait for data: {', '.join([*plan.needs_data, *_attention_ops.initial(plan.attention)][:6])}"
        )
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves(state)):
        check_stats(plan, state, chosen)
        _warn_of_zeros(state, chosen)
        _attention_ops.check(operands, state)
    return state


def as_call(batch: Any, kwargs: Mapping[str, Any]) -> tuple[tuple, dict]:
    """(args, kwargs) of one batch: an array, a tuple or list of inputs, or a dict of keywords."""
    if isinstance(batch, dict):
        return (), {**batch, **kwargs}
    if isinstance(batch, tuple | list):
        return tuple(batch), dict(kwargs)
    return (batch,), dict(kwargs)


def _check(plan: Plan, params: Any) -> None:
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    found = {p: leaf for key, leaf in flat if (p := _stage.parameter_path(plan.function, key, leaf)) is not None}
    check_paths(plan, found)
    check_values(found)


def _step(
    plan: Plan,
    units: Sequence[Unit],
    operands: Sequence[OperandDecision],
    rebuild: Callable,
    stats: Stats,
    params: Any,
    arrays: list,
) -> Stats:
    inputs, kwargs = rebuild(arrays)
    closed, _, views = _trace.staged(plan.function, params, inputs, kwargs)
    leaves = [*jax.tree.leaves(params), *arrays]
    sites = [*decided_sites(plan, closed, views), *(p for p in products(operands, closed, views) if p[0].key in stats)]
    _, after = _jaxpr.evaluate(closed, leaves, Observer(sites, units), stats)
    return after


def check_stats(plan: Plan, stats: Mapping[str, Any], units: Sequence[Unit] | None = None) -> None:
    """Every unit that needs data must have seen some, all of it finite.

    Raises:
        CalibrationError: naming the sites.
    """
    wanted = [u for u in plan.units if u.needs_data] if units is None else units
    amax = {u.name: stats[u.name]["amax"] for u in wanted if u.name in stats}
    host = jax.device_get({name: (a.seen, a.amax) for name, a in amax.items()})
    members = {u.name: u.paths for u in wanted}
    missing = [p for name in members if name not in host for p in members[name]]
    dead = [_layers(p, seen > 0) for name, (seen, _) in host.items() if not np.all(seen > 0) for p in members[name]]
    if missing or dead:
        raise CalibrationError(
            f"no data reached these sites: {', '.join((*missing, *dead))}. A branch that the batches never take? "
            "Calibrate with data that takes it, or write `input: {scaling: dynamic}` or `keep: true` for them."
        )
    bad = [(name, np.isfinite(a)) for name, (_, a) in host.items() if not np.all(np.isfinite(a))]
    if bad:
        names = ", ".join(_layers(p, good) for name, good in bad for p in members[name])
        raise CalibrationError(f"the activations at these sites hold NaN or inf: {names}. Look at the batches.")


def _warn_of_zeros(stats: Mapping[str, Any], units: Sequence[Unit]) -> None:
    """Zeros say nothing of the range that a static scale is for."""
    static = [u for u in units if u.decision.has_static_input]
    host = jax.device_get({u.name: stats[u.name]["amax"].amax for u in static})
    named = [_layers(p, host[u.name] != 0) for u in static if not np.all(host[u.name]) for p in u.paths]
    if named:
        warnings.warn(
            f"the activations at these sites were zero in all batches: {', '.join(named)}. Their static scale is 1, a "
            "guess. Calibrate with other data, or write `input: {scaling: dynamic}` or `keep: true` for them.",
            stacklevel=3,
        )


def _layers(path: str, good: np.ndarray) -> str:
    """The path, with the layers that are concerned if it is stacked."""
    return path if good.ndim == 0 else f"{path} (layers {np.argwhere(~good).squeeze(-1).tolist()})"
