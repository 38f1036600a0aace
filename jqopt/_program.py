"""A model's jaxpr laid out flat, loops over layers unrolled, to run it piece by piece with values kept in between."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core as jex_core

from jqopt import _jaxpr, _trace
from jqopt._jaxpr import Address, State
from jqopt._trace import Site
from jqopt._view import View

Layer = tuple[int, ...]
"""Which of the stacked layers of a parameter a site reads; () where it isn't stacked."""

Hook = Callable[[int, Sequence[Any]], list | None]
"""(place among the sites of a piece, operands) -> the equation's results, or None to run it as it stands."""


class _Unroll:
    """The rule that opens every call and every scan with a site in it, and changes nothing."""

    unrolls = True

    def __init__(self, sites: Iterable[Site]):
        self.below = {s.address[:n] for s in sites for n in range(1, len(s.address))}

    def sites_below(self, address: Address) -> bool:
        return address in self.below

    def is_site(self, address: Address) -> bool:
        return False

    def stacked_at(self, address: Address) -> frozenset[str]:
        return frozenset()

    def state_below(self, address: Address) -> frozenset[str]:
        return frozenset()

    def allreduce(self, before: State, after: State, axes: tuple[str, ...]) -> State:
        return after

    def __call__(self, address: Address, eqn: Any, values: Sequence[Any], state: State) -> tuple[list, State]:
        raise AssertionError("no equation is a site of this rule")


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Flat equations in order. `sites`: (path, layer) of those that read a parameter, by their place in `eqns`."""

    jaxpr: Any
    consts: list[Any]
    eqns: list[Any]
    sites: Mapping[int, tuple[Site, Layer]]
    made: frozenset[Any]  # variables that are made of parameters and constants alone
    maker: Mapping[Any, int]
    last: Mapping[Any, int]  # where each variable is read last; the outputs are after the end

    def is_weight(self, var: Any) -> bool:
        """Is it made of parameters and constants alone?"""
        return var in self.made

    def weights(self, wanted: Sequence[Any], params: Sequence[Any]) -> list[Any]:
        """The values of such variables, for these parameters (in the order of the leaves)."""
        env = dict(zip(self.jaxpr.invars, params, strict=False))
        env.update(zip(self.jaxpr.constvars, self.consts, strict=True))
        todo = [v for v in wanted if v not in env]
        needed: set[int] = set()
        while todo:
            i = self.maker[todo.pop()]
            if i not in needed:
                needed.add(i)
                todo += [v for v in self.eqns[i].invars if not isinstance(v, jex_core.Literal) and v not in env]
        for i in sorted(needed):
            eqn = self.eqns[i]
            ins = [v.val if isinstance(v, jex_core.Literal) else env[v] for v in eqn.invars]
            env.update(zip(eqn.outvars, _jaxpr.bind(eqn, ins), strict=True))
        return [env[v] for v in wanted]

    def piece(self, start: int, stop: int) -> Piece:
        """The equations from `start` to before `stop` that inputs go into."""
        inside = [i for i in range(start, stop) if not all(map(self.is_weight, self.eqns[i].outvars))]
        made = {v for i in inside for v in self.eqns[i].outvars}
        read = [v for i in inside for v in self.eqns[i].invars if not isinstance(v, jex_core.Literal)]
        outside = [v for v in dict.fromkeys(read) if v not in made]
        return Piece(
            [self.eqns[i] for i in inside],
            [v for v in outside if self.is_weight(v)],
            [v for v in outside if not self.is_weight(v)],
            [v for v in dict.fromkeys(v for i in inside for v in self.eqns[i].outvars) if self.last.get(v, -1) >= stop],
            {n: self.sites[i] for n, i in enumerate(inside) if i in self.sites},
        )

    def needed(self, var: Any, after: int) -> bool:
        """Is a value read at or after this place?"""
        return self.last.get(var, -1) >= after


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """Consecutive equations: what they read of weights and of activations, and what later ones read of them."""

    eqns: list[Any]
    weights: list[Any]
    reads: list[Any]
    gives: list[Any]
    sites: dict[int, tuple[Site, Layer]]

    @property
    def key(self) -> str:
        """The same text for pieces that compute the same of their operands: equal layers are compiled once."""
        names: dict[Any, int] = {}

        def name(v: Any) -> str:
            if isinstance(v, jex_core.Literal):
                return f"{v.val}:{v.aval}"
            return f"v{names.setdefault(v, len(names))}:{v.aval}"

        lines = [" ".join(map(name, (*self.weights, *self.reads)))]
        for eqn in self.eqns:
            params = re.sub(r" at 0x[0-9a-f]+", "", str(sorted(eqn.params.items(), key=lambda p: p[0])))
            outs, ins = (" ".join(map(name, vs)) for vs in (eqn.outvars, eqn.invars))
            lines.append(f"{outs} = {eqn.primitive.name}[{params}] {ins}")
        return "\n".join([*lines, " ".join(map(name, self.gives)), str(sorted(self.sites))])

    def run(self, weights: Sequence[Any], reads: Sequence[Any], hook: Hook) -> list[Any]:
        """What the piece gives; `hook` may compute the equations at its sites, which it gets in order."""
        env = dict(zip([*self.weights, *self.reads], [*weights, *reads], strict=True))
        places = {n: i for i, n in enumerate(self.sites)}
        for n, eqn in enumerate(self.eqns):
            values = [v.val if isinstance(v, jex_core.Literal) else env[v] for v in eqn.invars]
            outs = hook(places[n], values) if n in places else None
            env.update(zip(eqn.outvars, _jaxpr.bind(eqn, values) if outs is None else outs, strict=True))
        return [env[v] for v in self.gives]


def flat(closed: Any, views: Sequence[View | None], n_params: int) -> Program:
    """The program of a staged model (`_stage.stage`) whose first `n_params` inputs are the leaves of its parameters."""
    sites, _ = _trace.walk(closed, views, {})
    rule = _Unroll([s for s in sites if s.path is not None and s.reason is None])

    def run(*leaves: Any) -> list:
        outs, _ = _jaxpr.evaluate(closed, list(leaves), rule, {})
        return outs

    opened = jax.make_jaxpr(run)(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in closed.in_avals))
    jaxpr, consts = _jaxpr.open_jaxpr(opened)
    found, _ = _trace.walk(opened, views, {})
    at = {
        s.address[0]: (s, tuple(a.start for a in s.view.fixed) if s.view is not None else ())
        for s in found
        if s.path is not None and s.reason is None and len(s.address) == 1
    }
    made = {*jaxpr.constvars, *jaxpr.invars[:n_params]}
    maker: dict[Any, int] = {}
    last: dict[Any, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        maker.update(dict.fromkeys(eqn.outvars, i))
        if all(isinstance(v, jex_core.Literal) or v in made for v in eqn.invars):
            made.update(eqn.outvars)
        last.update({v: i for v in eqn.invars if not isinstance(v, jex_core.Literal)})
    last.update({v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, jex_core.Literal)})
    return Program(jaxpr, list(consts), list(jaxpr.eqns), at, frozenset(made), maker, last)
