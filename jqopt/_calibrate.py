"""Calibration: one jitted pass over the batches that gathers what the plan's algorithms need."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqopt import _attention_ops, _jaxpr, _trace
from jqopt._apply import Sited, check_paths, decided_sites
from jqopt._attention import Product, products
from jqopt._jaxpr import Address, State
from jqopt._plan import Decision, Plan, solver
from jqopt._trace import Site
from jqopt.algorithms import Algorithm
from jqopt.errors import CalibrationError

Tracer = jax.core.Tracer  # pyright: ignore[reportAttributeAccessIssue] (public, but not in the stubs)
Stats = dict[str, Any]
"""Statistics by parameter path: a pytree of arrays, with the stacked layers' axes first. Save it, merge it, plot it."""


def algorithm_of(decision: Decision) -> Algorithm:
    """The algorithm that solves a site."""
    return solver(decision.algorithm)


def initial(plan: Plan) -> Stats:
    """Statistics before any data."""
    weights = {path: _initial(plan.quantized[path]) for path in plan.needs_data}
    return {**weights, **_attention_ops.initial(plan.attention)}


def _initial(d: Decision) -> Any:
    assert d.layout is not None, d.key
    state = algorithm_of(d).init(d.layout.k)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*d.outer, *x.shape)), state)


class Observer(Sited):
    """The observing rule: at each site, update the statistics of its activation, then run the op as it stands."""

    def __call__(self, address: Address, eqn: Any, values: Sequence[Any], state: State) -> tuple[list, State]:
        for site, decision in self.at[address]:
            if isinstance(site, Product):
                seen = _attention_ops.observe(site, decision, values, state.get(site.key, {}))
                state = {**state, site.key: seen} if site.key in state else state
                continue
            assert site.path is not None, site.key
            x = _matrix(values[1 - site.operand], eqn, site)
            algorithm = algorithm_of(decision)
            index = tuple(a.start for a in site.view.fixed) if site.view is not None else ()
            state = {
                **state,
                site.path: _update_at(state[site.path], index, lambda s, a=algorithm, x=x: a.update(s, x)),
            }
        return _jaxpr.bind(eqn, values), state

    def allreduce(self, before: State, after: State, axes: tuple[str, ...]) -> State:
        by_path = {s.path: d for found in self.at.values() for s, d in found}
        attention = {s.key for found in self.at.values() for s, _ in found if isinstance(s, Product)}
        return {
            p: _attention_ops.allreduce(before[p], after[p], axes) if p in attention
            else algorithm_of(by_path[p]).allreduce(before[p], after[p], axes)
            for p in after
        }  # fmt: skip


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
    **kwargs: Any,
) -> Stats:
    """Runs the float model over the batches and gathers statistics of activations.

    Args:
        params: the tree the plan was made for; of an NNX model, the module.
        batches: an iterable of inputs, each an array, a tuple of positional inputs, or a dict of keyword inputs.
        stats: statistics of earlier batches, to go on from. Any split into batches gives the same result.
        progress: called with each finished batch's number, e.g. to move a progress bar.
        kwargs: keywords for every call of the model (`train=False`).

    Raises:
        CalibrationError: no batches, a site that no data reached, or NaN or inf at a site (which it names).
        PlanError: params aren't those of the plan.
    """
    # a copy: each step takes over the buffers of the last; the caller's own stay, and no two leaves share one
    state: Stats = jax.tree.map(jnp.copy, initial(plan) if stats is None else stats)
    if batches is None:
        raise CalibrationError("calibrate needs batches: an iterable of inputs (arrays, tuples, or dicts of keywords).")
    if not plan.needs_batches:
        return state
    params = plan.function.tree(params)
    _check(plan, params)
    steps = plan.compiled
    n = 0
    for n, batch in enumerate(batches, 1):
        arrays, rebuild, key = _trace.split_static(as_call(batch, kwargs))
        key = ("calibrate", key)
        if key not in steps:
            steps[key] = jax.jit(functools.partial(_step, plan, rebuild), donate_argnums=(0,))
        state = jax.block_until_ready(steps[key](state, params, arrays))  # one batch in flight, progress that is true
        if progress is not None:
            progress(n)
    if n == 0:
        raise CalibrationError(
            "calibrate got no batches: the iterable is empty (a generator that was already used up?). "
            f"Sites that wait for data: {', '.join([*plan.needs_data, *_attention_ops.initial(plan.attention)][:6])}"
        )
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves(state)):
        check_stats(plan, state)
        _attention_ops.check(plan.attention, state)
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
    check_paths(
        plan, {p: leaf for key, leaf in flat if (p := _trace.parameter_path(plan.function, key, leaf)) is not None}
    )


def _step(plan: Plan, rebuild: Callable, stats: Stats, params: Any, arrays: list) -> Stats:
    inputs, kwargs = rebuild(arrays)
    closed, _, views = _trace.stage(plan.function, params, inputs, kwargs)
    wanted = set(plan.needs_data)
    sites = [(s, d) for s, d in decided_sites(plan, closed, views) if s.path in wanted and s.op != "gather"]
    leaves = [*jax.tree.leaves(params), *arrays]
    observed = [(p, roles) for p, roles in products(plan.attention, closed, views) if p.key in stats]
    _, after = _jaxpr.evaluate(closed, leaves, Observer([*sites, *observed]), stats)
    return after


def check_stats(plan: Plan, stats: Mapping[str, Any]) -> None:
    """Every site that needs data must have seen some, all of it finite.

    Raises:
        CalibrationError: naming the sites.
    """
    host = jax.device_get({p: (stats[p].seen, stats[p].amax) for p in plan.needs_data if p in stats})
    missing = [p for p in plan.needs_data if p not in host]
    dead = [p for p, (seen, _) in host.items() if not np.all(seen > 0)]
    if missing or dead:
        names = ", ".join(_layers(p, host[p][0] > 0) if p in host else p for p in (*missing, *dead))
        raise CalibrationError(
            f"no data reached these sites: {names}. A branch that the batches never take? Calibrate with data that "
            "takes it, or write `input: {scaling: dynamic}` or `keep: true` for them."
        )
    bad = [p for p, (_, amax) in host.items() if not np.all(np.isfinite(amax))]
    if bad:
        names = ", ".join(_layers(p, np.isfinite(host[p][1])) for p in bad)
        raise CalibrationError(f"the activations at these sites hold NaN or inf: {names}. Look at the batches.")


def _layers(path: str, good: np.ndarray) -> str:
    """The path, with the layers that are concerned if it is stacked."""
    return path if good.ndim == 0 else f"{path} (layers {np.argwhere(~good).squeeze(-1).tolist()})"
