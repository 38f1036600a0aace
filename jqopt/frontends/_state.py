"""Which parts of its state a model's call leaves as they were: read off the jaxpr, through calls and loops."""

from __future__ import annotations

from typing import Any

from jax.extend import core as jex_core

from jqopt import _compat
from jqopt._jaxpr import inner_jaxpr, open_jaxpr
from jqopt._view import SAME


def handed_on(jaxpr: Any) -> list[int | None]:
    """For each output of a jaxpr the number of the input that it is, unchanged; None for what is computed."""
    jaxpr, _ = open_jaxpr(jaxpr)
    source = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        for out, operand in zip(eqn.outvars, _operands(eqn), strict=True):
            atom = None if operand is None else eqn.invars[operand]
            if atom is not None and not isinstance(atom, jex_core.Literal) and atom in source:
                source[out] = source[atom]
    return [None if isinstance(v, jex_core.Literal) else source.get(v) for v in jaxpr.outvars]


def _operands(eqn: Any) -> list[int | None]:
    """For each output of an equation the number of the operand that it is, unchanged."""
    name = eqn.primitive.name
    if name in CONTROL:
        return CONTROL[name](eqn)
    inner = inner_jaxpr(eqn)
    if inner is not None:
        return handed_on(inner)
    return [i if name in SAME else None for i in range(len(eqn.outvars))]


def _scan(eqn: Any) -> list[int | None]:
    """A carry that every step hands on, and a slice of xs that comes out as it went in."""
    n_const, n_carry = _compat.scan_sizes(eqn.params)
    out: list[int | None] = []
    for i, source in enumerate(handed_on(eqn.params["jaxpr"])):
        same = source == n_const + i if i < n_carry else source is not None and source >= n_const + n_carry
        out.append(source if same else None)
    return out


def _while(eqn: Any) -> list[int | None]:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    sources = handed_on(eqn.params["body_jaxpr"])
    return [n_cond + n_body + i if s == n_body + i else None for i, s in enumerate(sources)]


def _cond(eqn: Any) -> list[int | None]:
    branches = [handed_on(b) for b in eqn.params["branches"]]
    return [s[0] + 1 if s[0] is not None and len(set(s)) == 1 else None for s in zip(*branches, strict=True)]


CONTROL = {"scan": _scan, "while": _while, "cond": _cond}
