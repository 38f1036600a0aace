"""One evaluator for jaxprs: walks the equations with a rule at each site, through every control-flow primitive.

State (statistics) travels as arguments and results, never in Python containers that outlive a trace: a side
effect inside remat or scan would leak tracers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from jax.extend import core as jex_core

from jqopt import _view
from jqopt._qtensor import QTensor

Address = tuple[int, ...]
"""Where an equation stands: its index in the outermost jaxpr, then, for each call it sits in, (branch, index)."""

State = dict[str, Any]
"""What a rule keeps between equations and batches: {parameter path: pytree of arrays}."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tensor"], meta_fields=["view"])
@dataclasses.dataclass(frozen=True)
class QView:
    """A quantized parameter under a `View`; `tensor` has lost the leading axes that scans have sliced off."""

    tensor: QTensor
    view: _view.View

    def dense(self) -> jax.Array:
        return self.view.materialize(self.tensor.dequantize())


@functools.partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["axis"])
@dataclasses.dataclass(frozen=True)
class QConcat:
    """Several operands, at least one of them quantized, concatenated along `axis`."""

    parts: tuple[Any, ...]
    axis: int

    def dense(self) -> jax.Array:
        return jax.lax.concatenate([dense(p) for p in self.parts], self.axis)


def dense(value: Any) -> Any:
    """The plain array behind a value of the evaluator."""
    return value.dense() if isinstance(value, QView | QConcat) else value


def is_quantized(value: Any) -> bool:
    return isinstance(value, QView | QConcat)


class Rule(Protocol):
    """What the evaluator asks at each equation that is a site."""

    def sites_below(self, address: Address) -> bool:
        """Is there a site inside this equation's sub-jaxprs?"""
        ...

    def is_site(self, address: Address) -> bool: ...

    def stacked_at(self, address: Address) -> frozenset[str]:
        """Paths whose state has a leading axis that the scan at `address` iterates over."""
        ...

    def state_below(self, address: Address) -> frozenset[str]:
        """Paths whose state sites inside this equation read or change."""
        ...

    def __call__(self, address: Address, eqn: Any, values: Sequence[Any], state: State) -> tuple[list, State]: ...


def open_jaxpr(jaxpr: Any) -> tuple[Any, list]:
    """(jaxpr, consts) of a Jaxpr or ClosedJaxpr: JAX 0.12 merges the two classes."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()) or ())


def inner_jaxpr(eqn: Any) -> Any | None:
    """The jaxpr of a call-like equation that maps operands one to one (jit, remat, custom_jvp, ...), or None."""
    if eqn.primitive.name in OPAQUE:
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        found = eqn.params.get(name)
        if found is not None and hasattr(found, "eqns"):
            inner, _ = open_jaxpr(found)
            return found if len(inner.invars) == len(eqn.invars) else None
    return None


OPAQUE = frozenset({"pallas_call", "custom_call", "ffi_call", "triton_kernel_call", "mosaic_gpu", "pure_callback"})
REMAT = frozenset({"remat", "remat2", "checkpoint"})


def bind(eqn: Any, values: Sequence[Any]) -> list:
    """The equation as it stands."""
    got = eqn.primitive.get_bind_params(eqn.params)
    subfuns, params = got if isinstance(got, tuple) else ((), got)
    out = eqn.primitive.bind(*subfuns, *map(dense, values), **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def evaluate(
    jaxpr: Any, values: Sequence[Any], rule: Rule, state: State, address: Address = ()
) -> tuple[list, State]:
    """Runs `jaxpr` on `values` (arrays, QViews); at each site `rule` decides. -> (outputs, state)."""
    jaxpr, consts = open_jaxpr(jaxpr)
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, values, strict=True))
    last = _last_uses(jaxpr)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex_core.Literal) else env[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        outs, state = _equation(eqn, [read(v) for v in eqn.invars], rule, state, (*address, i))
        env.update(zip(eqn.outvars, outs, strict=True))
        for v in last.get(i, ()):
            env.pop(v, None)
    return [read(v) for v in jaxpr.outvars], state


def _last_uses(jaxpr: Any) -> dict[int, list]:
    """Variables to forget after each equation, so that eager evaluation frees what it no longer needs."""
    keep = {v for v in jaxpr.outvars if not isinstance(v, jex_core.Literal)}
    seen: dict[Any, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        seen.update({v: i for v in eqn.invars if not isinstance(v, jex_core.Literal)})
    out: dict[int, list] = {}
    for v, i in seen.items():
        if v not in keep:
            out.setdefault(i, []).append(v)
    return out


def _equation(eqn: Any, values: list, rule: Rule, state: State, address: Address) -> tuple[list, State]:
    name = eqn.primitive.name
    if rule.is_site(address):
        return rule(address, eqn, values, state)
    quantized = any(map(is_quantized, values))
    if not quantized and not rule.sites_below(address):
        return bind(eqn, values), state
    if name in CONTROL:
        return CONTROL[name](eqn, values, rule, state, address)
    inner = inner_jaxpr(eqn)
    if inner is not None:
        run: Callable = functools.partial(_call, inner, rule, address)
        if name in REMAT:
            run = jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
        return run(values, state)
    return (_rearranged(eqn, values) if quantized else bind(eqn, values)), state


def _call(inner: Any, rule: Rule, address: Address, values: list, state: State) -> tuple[list, State]:
    return evaluate(inner, values, rule, state, (*address, 0))


def _rearranged(eqn: Any, values: list) -> list:
    """Follows quantized parameters through casts, reshapes, transposes and slices without touching their data."""
    if eqn.primitive.name == "concatenate":
        return [QConcat(tuple(values), eqn.params["dimension"])]
    views = [v.view if isinstance(v, QView) else None for v in values]
    found = _view.through(eqn.primitive.name, eqn.params, views, [o.aval for o in eqn.outvars])
    if any(v is None for v in found):
        return bind(eqn, values)
    sources = values if eqn.primitive.name in _view.SAME else [values[0]] * len(found)
    return [QView(s.tensor, v) for s, v in zip(sources, found, strict=True) if v is not None]


# ------------------------------------------------------------------------------------------ control flow


def _scan(eqn: Any, values: list, rule: Rule, state: State, address: Address) -> tuple[list, State]:
    p = eqn.params
    body, body_consts = open_jaxpr(p["jaxpr"])
    n_const, n_carry = p["num_consts"], p["num_carry"]
    consts, init, xs = values[:n_const], values[n_const : n_const + n_carry], values[n_const + n_carry :]
    mine, stacked = rule.state_below(address), rule.stacked_at(address)
    kept = {k: v for k, v in state.items() if k not in mine}
    carried = {k: v for k, v in state.items() if k in mine and k not in stacked}
    sliced = {k: v for k, v in state.items() if k in mine and k in stacked}
    same = {i for i in range(n_carry) if body.outvars[i] is body.invars[n_const + i]}
    feed = [scannable(x) for x in xs]
    echo = {
        j: body.invars.index(v)
        for j, v in enumerate(body.outvars)
        if j >= n_carry and not isinstance(v, jex_core.Literal) and v in body.invars[n_const + n_carry :]
    }

    def step(carry: tuple, x: tuple) -> tuple:
        moving, carried = carry
        layer, sliced = x
        full = [init[i] if i in same else moving[i] for i in range(n_carry)]
        layer = [_inside(v, x) for v, x in zip(layer, feed, strict=True)]
        outs, after = evaluate(
            jex_core.ClosedJaxpr(body, body_consts), [*consts, *full, *layer], rule, {**carried, **sliced}, (*address, 0)
        )
        moving = {i: dense(outs[i]) for i in moving}
        ys = {j: dense(outs[j]) for j in range(n_carry, len(outs)) if j not in echo}
        return (moving, {k: after[k] for k in carried}), (ys, {k: after[k] for k in sliced})

    moving = {i: dense(v) for i, v in enumerate(init) if i not in same}
    (moving, carried), (ys, sliced) = jax.lax.scan(
        step, (moving, carried), (feed, sliced), length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    outs = [init[i] if i in same else moving[i] for i in range(n_carry)]
    outs += [xs[echo[j] - n_const - n_carry] if j in echo else ys[j] for j in range(n_carry, len(body.outvars))]
    return outs, {**kept, **carried, **sliced}


def scannable(value: Any) -> Any:
    """A value as `lax.scan` may slice it: packed if the scanned axis leads the packed leaves, else decoded."""
    if not isinstance(value, QView):
        return dense(value)
    inner, layout = _view.scan_over(value.view), value.tensor.layout
    done = len(layout.stack) - (value.tensor.data.ndim - 2)
    if inner is None or done >= len(layout.stack):
        return value.dense()
    atom = inner.scanned[-1]
    leads = layout.stack[done]
    return value if _whole_axis(layout, leads) == atom.axis else value.dense()


def _whole_axis(layout: Any, atom: int) -> int | None:
    """The parameter axis that this atom alone makes up, or None."""
    return next((axis for axis, atoms in enumerate(layout.axes()) if atoms == [atom]), None)


def _inside(layer: Any, outer: Any) -> Any:
    """A scanned value as the body sees it: the pytree was sliced, its static view still is the outer one."""
    if not isinstance(layer, QView):
        return layer
    view = _view.scan_over(outer.view)
    assert view is not None, "scannable() admits only views that can be scanned over"
    return QView(layer.tensor, view)


def _while(eqn: Any, values: list, rule: Rule, state: State, address: Address) -> tuple[list, State]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts, init = values[:n_cond], values[n_cond : n_cond + n_body], values[n_cond + n_body :]
    body, _ = open_jaxpr(p["body_jaxpr"])
    same = {i for i in range(len(init)) if body.outvars[i] is body.invars[n_body + i]}
    full = lambda moving: [init[i] if i in same else moving[i] for i in range(len(init))]  # noqa: E731

    def condition(carry: tuple) -> jax.Array:
        outs, _ = evaluate(p["cond_jaxpr"], [*cond_consts, *full(carry[0])], rule, carry[1], (*address, 0))
        return outs[0]

    def step(carry: tuple) -> tuple:
        outs, after = evaluate(p["body_jaxpr"], [*body_consts, *full(carry[0])], rule, carry[1], (*address, 1))
        return {i: dense(outs[i]) for i in carry[0]}, after

    start = {i: dense(v) for i, v in enumerate(init) if i not in same}
    moving, state = jax.lax.while_loop(condition, step, (start, state))
    return full(moving), state


def _cond(eqn: Any, values: list, rule: Rule, state: State, address: Address) -> tuple[list, State]:
    def branch(i: int) -> Callable:
        def run(operands: list, state: State) -> tuple[list, State]:
            outs, after = evaluate(eqn.params["branches"][i], operands, rule, state, (*address, i))
            return [dense(o) for o in outs], after

        return run

    index, *operands = values
    branches = [branch(i) for i in range(len(eqn.params["branches"]))]
    return jax.lax.switch(index, branches, operands, state)


CONTROL: Mapping[str, Callable] = {"scan": _scan, "while": _while, "cond": _cond}
