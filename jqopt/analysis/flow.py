"""The flow of a jaxpr: one flat list of equations over values, every call, loop and branch opened."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np
from jax.extend import core as jex_core

from jqopt import _compat
from jqopt._jaxpr import Address, inner_jaxpr, open_jaxpr

ENTER, LEAVE, SLICE, STACK = "loop.enter", "loop.leave", "loop.slice", "loop.stack"
JOIN = "branch.join"
SHARD, UNSHARD = "shard.enter", "shard.leave"
"""Operations that stand for what control flow does to values; every other `op` is a primitive's name.

    loop.enter   (first,) -> (carried,)             a loop's carried value, as the body sees it
    loop.leave   (carried, last) -> (result,)       what the body makes of it, and what the loop returns
    loop.slice   (stacked,) -> (layer,)             a scan iterates over the leading axis
    loop.stack   (layer,) -> (stacked,)             a scan collects along a new leading axis
    branch.join  (one, other, ...) -> (value,)      the branches of a cond give the value
    shard.enter  (whole,) -> (part,)                what one device of a shard_map holds; params["parts"]: by axis
    shard.leave  (part,) -> (whole,)                the inverse
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """A scan or while loop: `length` is None where it is known only at run time."""

    address: Address
    length: int | None
    carries: bool  # does an iteration depend on the one before?


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """An array in the flow.

    kind: parameter | state (another leaf of the parameter tree) | input | constant | literal | computed.
    """

    shape: tuple[int, ...]
    dtype: Any
    kind: str
    name: str = ""  # path of a parameter or state leaf, or the input's number
    literal: Any = None  # a literal's number
    loops: tuple[Loop, ...] = ()  # those it stands in, outermost first
    maker: Equation | None = None
    uses: list[tuple[Equation, int]] = dataclasses.field(default_factory=list)  # (equation, operand number)
    returned: bool = False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __repr__(self) -> str:
        what = self.name or (str(self.literal) if self.kind == "literal" else self.maker.op if self.maker else "")
        return f"<{self.kind} {what} {list(self.shape)}>"


@dataclasses.dataclass(eq=False, slots=True)
class Equation:
    """One primitive, or one of the operations above, applied."""

    op: str
    params: Mapping[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    address: Address
    scope: str
    source: tuple[Any, ...]  # JAX's source information: its own, then that of the calls it stands in, innermost first
    loops: tuple[Loop, ...] = ()

    def __repr__(self) -> str:
        return f"<{self.op} {[list(v.shape) for v in self.inputs]} -> {[list(v.shape) for v in self.outputs]}>"


@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
    """The flat program. Equations stand in an order in which every operand is made before it is read."""

    equations: tuple[Equation, ...]
    leaves: tuple[Value, ...]  # the parameter tree's
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    @property
    def by_address(self) -> dict[Address, Equation]:
        """The primitives by address, as sites have it."""
        return {e.address: e for e in self.equations if "." not in e.op}


def flow(jaxpr: Any, leaves: Sequence[tuple[str, str] | None]) -> Flow:
    """Opens up `jaxpr`.

    Args:
        leaves: (kind, name) of each argument that is a leaf of the parameter tree; None for the model's inputs.
    """
    jaxpr, _ = open_jaxpr(jaxpr)
    build = _Build()
    values, inputs = [], []
    for var, leaf in zip(jaxpr.invars, leaves, strict=True):
        value = Value(*_aval(var), *(leaf or ("input", str(len(inputs)))))
        inputs += [value] if leaf is None else []
        values.append(value)
    outputs = build.run(jaxpr, values, (), "", ())
    for value in outputs:
        value.returned = True
    known = tuple(v for v, leaf in zip(values, leaves, strict=True) if leaf is not None)
    return Flow(tuple(build.equations), known, tuple(inputs), tuple(outputs))


def _aval(atom: Any) -> tuple[tuple[int, ...], Any]:
    aval = atom.aval
    return tuple(getattr(aval, "shape", ())), getattr(aval, "dtype", None)


class _Build:
    """Accumulates equations while it opens jaxprs."""

    def __init__(self) -> None:
        self.equations: list[Equation] = []

    def run(
        self,
        jaxpr: Any,
        values: Sequence[Value],
        address: Address,
        scope: str,
        loops: tuple[Loop, ...],
        callers: tuple[Any, ...] = (),
    ) -> list:
        jaxpr, _ = open_jaxpr(jaxpr)
        env: dict[Any, Value] = {v: Value(*_aval(v), "constant", loops=loops) for v in jaxpr.constvars}
        env.update(zip(jaxpr.invars, values, strict=True))

        def read(atom: Any) -> Value:
            if not isinstance(atom, jex_core.Literal):
                return env[atom]
            number = atom.val if np.ndim(atom.val) == 0 else None
            return Value(*_aval(atom), "literal" if number is not None else "constant", literal=number, loops=loops)

        for i, eqn in enumerate(jaxpr.eqns):
            inside = "/".join(s for s in (scope, str(eqn.source_info.name_stack)) if s)
            at = ((*address, i), inside, (eqn.source_info, *callers))
            outs = self.equation(eqn, [read(a) for a in eqn.invars], at, loops)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def add(
        self,
        op: str,
        params: Mapping[str, Any],
        inputs: Sequence[Value],
        outputs: Sequence[tuple],
        at: tuple[Address, str, tuple[Any, ...]],
        loops: tuple[Loop, ...],
        of_loops: tuple[Loop, ...] | None = None,
    ) -> tuple[Value, ...]:
        """A new equation; `outputs` are (shape, dtype), made in `of_loops` where that isn't `loops`."""
        address, scope, source = at
        made = tuple(Value(s, d, "computed", loops=loops if of_loops is None else of_loops) for s, d in outputs)
        equation = Equation(op, params, tuple(inputs), made, address, scope, source, loops)
        for value in made:
            value.maker = equation
        for i, value in enumerate(inputs):
            value.uses.append((equation, i))
        self.equations.append(equation)
        return made

    def equation(self, eqn: Any, ins: list[Value], at: tuple, loops: tuple[Loop, ...]) -> Sequence:
        name, (address, scope, callers) = eqn.primitive.name, at
        if name in ("scan", "while", "cond", "shard_map"):
            return getattr(self, "_" + name)(eqn, ins, at, loops)
        inner = inner_jaxpr(eqn)
        if inner is not None:
            return self.run(inner, ins, (*address, 0), scope, loops, callers)
        return self.add(name, eqn.params, ins, [_aval(o) for o in eqn.outvars], at, loops)

    def _enter(self, body: Any, init: Sequence[Value], offset: int, at: tuple, inner: tuple[Loop, ...]) -> list[Value]:
        """Carried values as the body sees them; one that the body hands on unchanged is what it was."""
        return [
            v if body.outvars[i] is body.invars[offset + i]
            else self.add(ENTER, {}, [v], [(v.shape, v.dtype)], at, inner)[0]
            for i, v in enumerate(init)
        ]  # fmt: skip

    def _leave(
        self, init: Sequence[Value], carry: Sequence[Value], outs: Sequence[Value], at: tuple, loops: tuple[Loop, ...]
    ) -> list[Value]:
        return [
            v if v is c else self.add(LEAVE, {}, [c, out], [(v.shape, v.dtype)], at, loops)[0]
            for v, c, out in zip(init, carry, outs, strict=True)
        ]

    def _scan(self, eqn: Any, ins: list[Value], at: tuple, loops: tuple[Loop, ...]) -> Sequence:
        p = eqn.params
        body, _ = open_jaxpr(p["jaxpr"])
        n_const, n_carry = _compat.scan_sizes(p)
        init, xs = ins[n_const : n_const + n_carry], ins[n_const + n_carry :]
        inner = (*loops, Loop(at[0], p["length"], n_carry > 0))
        carry = self._enter(body, init, n_const, at, inner)
        layers = [self.add(SLICE, {}, [x], [(x.shape[1:], x.dtype)], at, inner)[0] for x in xs]
        outs = self.run(body, [*ins[:n_const], *carry, *layers], (*at[0], 0), at[1], inner, at[2])
        result = self._leave(init, carry, outs[:n_carry], at, loops)
        echo = dict(zip(layers, xs, strict=True))
        for y, var in zip(outs[n_carry:], eqn.outvars[n_carry:], strict=True):
            result.append(echo.get(y) or self.add(STACK, {}, [y], [_aval(var)], at, inner, loops)[0])
        return result

    def _while(self, eqn: Any, ins: list[Value], at: tuple, loops: tuple[Loop, ...]) -> Sequence:
        p = eqn.params
        n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
        body, _ = open_jaxpr(p["body_jaxpr"])
        init = ins[n_cond + n_body :]
        inner = (*loops, Loop(at[0], None, True))
        carry = self._enter(body, init, n_body, at, inner)
        self.run(p["cond_jaxpr"], [*ins[:n_cond], *carry], (*at[0], 0), at[1], inner, at[2])
        outs = self.run(body, [*ins[n_cond : n_cond + n_body], *carry], (*at[0], 1), at[1], inner, at[2])
        return self._leave(init, carry, outs, at, loops)

    def _cond(self, eqn: Any, ins: list[Value], at: tuple, loops: tuple[Loop, ...]) -> Sequence:
        outs = [self.run(b, ins[1:], (*at[0], i), at[1], loops, at[2]) for i, b in enumerate(eqn.params["branches"])]
        joined = zip(zip(*outs, strict=True), eqn.outvars, strict=True)
        return [
            values[0] if all(v is values[0] for v in values)
            else self.add(JOIN, {}, values, [_aval(var)], at, loops)[0]
            for values, var in joined
        ]  # fmt: skip

    def _shard_map(self, eqn: Any, ins: list[Value], at: tuple, loops: tuple[Loop, ...]) -> Sequence:
        p = eqn.params
        inner, _ = open_jaxpr(p["jaxpr"])
        local = [
            v if tuple(var.aval.shape) == v.shape
            else self.add(SHARD, _parts(p["mesh"], spec), [v], [_aval(var)], at, loops)[0]
            for v, var, spec in zip(ins, inner.invars, p["in_specs"], strict=True)
        ]  # fmt: skip
        outs = self.run(inner, local, (*at[0], 0), at[1], loops, at[2])
        return [
            v if tuple(var.aval.shape) == v.shape
            else self.add(UNSHARD, _parts(p["mesh"], spec), [v], [_aval(var)], at, loops)[0]
            for v, var, spec in zip(outs, eqn.outvars, p["out_specs"], strict=True)
        ]  # fmt: skip


def _parts(mesh: Any, spec: Any) -> dict[str, Any]:
    """{"parts": {axis: in how many}, "names": {axis: mesh axes}} of a partition spec."""
    names = {i: (n,) if isinstance(n, str) else tuple(n) for i, n in enumerate(spec) if n}
    parts = {i: math.prod(mesh.shape[a] for a in axes) for i, axes in names.items()}
    return {"parts": parts, "names": names}


# ------------------------------------------------------------------------------------------- source lines

_LIBRARIES = tuple(str(pathlib.Path(m.__file__ or "").parent) for m in (jax, flax))
_OWN = tuple(str(pathlib.Path(__file__).parents[1] / name) for name in ("frontends", "_trace.py", "_model.py"))


def line(equation: Equation) -> str:
    """The line of the user's program that made an equation: `model.py:12 (Attention.__call__)`; '' if unknown.

    JAX keeps the traceback of a library's jitted function only down to that function: then its caller's line counts.
    """
    for source in equation.source:
        traceback = getattr(source, "traceback", None)
        for frame in [] if traceback is None else traceback.frames:
            if not frame.file_name.startswith((*_LIBRARIES, *_OWN, "<")):
                return f"{pathlib.Path(frame.file_name).name}:{frame.line_num} ({frame.function_name})"
    return ""
