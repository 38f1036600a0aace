"""Tracing: finds every site of a model (dot, convolution, ragged dot, lookup) in its jaxpr, from shapes only."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core as jex_core

from jqopt import _compat, _view
from jqopt._jaxpr import COMBINERS, OPAQUE, Address, inner_jaxpr, open_jaxpr
from jqopt._qtensor import Layout
from jqopt._stage import Function, parameter_path, stage
from jqopt._view import Atom, View
from jqopt.analysis.attention import Attention, attention
from jqopt.analysis.axis_rules import Rule
from jqopt.analysis.classes import AxisClass, AxisGraph, Symbol, Unknown, analyse
from jqopt.analysis.flow import Flow, flow
from jqopt.analysis.folds import Fold, folds
from jqopt.analysis.groups import Group, groups
from jqopt.errors import JqoptError, TraceError

DOTS = {
    "dot_general": "dot_general",
    "conv_general_dilated": "conv",
    "ragged_dot_general": "ragged_dot",
    "ragged_dot": "ragged_dot",
    "gather": "gather",
}
"""Primitives that are sites, and the word recipes use for each."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One operation that reads a parameter (or, with `path` None, multiplies two activations)."""

    key: str  # the parameter's path, with `#2`, `#3` for further uses; unique in a graph
    op: str  # dot_general | conv | ragged_dot | gather
    address: Address
    path: str | None = None
    shape: tuple[int, ...] = ()  # the parameter's
    dtype: str = ""
    module_path: str = ""
    module: str | None = None  # class name of the Flax module that owns the parameter
    view: View | None = None
    operand: int = 1  # which operand is the parameter
    part: int = 0  # which part of a concatenated operand
    stack: tuple[Atom, ...] = ()
    rows: tuple[Atom, ...] = ()
    cols: tuple[Atom, ...] = ()
    activation: int = -1  # sites with the same number read the same activation
    input_shape: tuple[int, ...] = ()
    input_axes: tuple[int, ...] = ()  # those of the activation that are contracted
    branch: Address = ()  # of the innermost cond around it, which its data may never take
    used_by: frozenset[str] = frozenset()  # every op that reads the parameter anywhere
    scope: str = ""
    reason: str | None = None  # why this site can't be quantized, if it can't

    @property
    def scans(self) -> tuple[Address, ...]:
        """The scans that iterate over the parameter's leading axes, outermost first."""
        return self.view.scans if self.view is not None else ()

    @property
    def outer(self) -> tuple[int, ...]:
        """Sizes of the axes that scans iterate over or that a layer number picks from: one statistic for each."""
        assert self.view is not None, self.key
        return tuple(a.full for a in (*self.view.scanned, *self.view.fixed))

    @property
    def contracted(self) -> int:
        """k: how many products are summed for one output."""
        return math.prod(a.size for a in self.cols)

    @property
    def layout(self) -> Layout:
        """How the parameter becomes matrices [*stack, n, k] for this site."""
        assert self.view is not None, self.key
        atoms = self.view.atoms()
        at = {a: i for i, a in enumerate(atoms)}
        stack = tuple(at[a.whole] for a in self.stack)
        cols = tuple(at[a.whole] for a in self.cols)
        rows = tuple(at[a.whole] for a in self.rows if at[a.whole] not in (*stack, *cols))
        rows += tuple(i for i in range(len(atoms)) if i not in (*stack, *rows, *cols))
        return Layout(self.shape, tuple(a.size for a in atoms), stack, rows, cols)


class Opaque(NamedTuple):
    """A call that tracing can't look into, with what it reads."""

    primitive: str
    scope: str
    params: tuple[str, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Graph:
    """A traced model. `print(graph)` is a table of its sites."""

    function: Function
    sites: tuple[Site, ...]
    opaque: tuple[Opaque, ...]
    parameters: Mapping[str, jax.ShapeDtypeStruct]
    jaxpr: Any = dataclasses.field(default=None, compare=False, repr=False)  # without its constants
    leaves: tuple[tuple[str, str] | None, ...] = dataclasses.field(default=(), compare=False, repr=False)
    rules: tuple[tuple[str, Rule], ...] = ()

    @functools.cached_property
    def flow(self) -> Flow:
        """The flat dataflow: what every analysis of the graph reads."""
        return flow(self.jaxpr, self.leaves)

    @functools.cached_property
    def axes(self) -> AxisGraph:
        """What the program says about axes: `symbols`, `classes` and `unknown` are its parts."""
        return analyse(self.flow, self.sites, dict(self.rules))

    @property
    def symbols(self) -> tuple[Symbol, ...]:
        """Every axis of every leaf of the parameter tree."""
        return self.axes.symbols

    @property
    def classes(self) -> tuple[AxisClass, ...]:
        """Axes that are one: they can only be pruned or permuted together."""
        return self.axes.classes

    @property
    def unknown(self) -> tuple[Unknown, ...]:
        """Primitives without a rule; what they touch is pinned."""
        return self.axes.unknown

    def with_rules(self, rules: Mapping[str, Rule]) -> Graph:
        """The same graph with axis rules for further primitives, by name (see `jqopt.axis_rules`)."""
        return dataclasses.replace(self, rules=tuple({**dict(self.rules), **rules}.items()))

    def class_of(self, symbol: str) -> AxisClass:
        """The class of an axis, `mlp/up_proj/kernel[1]`, or of a part of one, by the class' name.

        Raises:
            TraceError: there is no such axis, or it is made of several classes (the message names them).
        """
        named = [c for c in self.classes if c.name == symbol and symbol not in self.axes.nodes]
        found = named or [c for c in self.classes if symbol in c.symbols]
        if len(found) == 1:
            return found[0]
        if found:
            raise TraceError(
                f"{symbol} is made of several classes, {self.parts(symbol)}: "
                f"write one of {', '.join(c.name for c in found)}"
            )
        if symbol in self.axes.nodes:
            raise TraceError(f"{symbol} has {self.parts(symbol)} positions: it belongs to no class")
        near = difflib.get_close_matches(symbol, [*self.axes.nodes, *(c.name for c in self.classes)], 3)
        raise TraceError(
            f"{self.function.name} has no axis {symbol!r}: write a parameter's path and its axis, `q_proj/kernel[1]`"
            + (f". Did you mean {', '.join(near)}?" if near else "")
        )

    def parts(self, symbol: str) -> str:
        """What an axis is made of: `2 x 4 x 8`, `[32 | 16 | 16]`."""
        return self.axes.parts(symbol)

    def is_failed(self, path: str) -> bool:
        """Is there, under this parameter's or module's path, something that tracing could not look into?"""
        return self.failure_msg(path) is not None

    def failure_msg(self, path: str) -> str | None:
        """Why tracing could not look into something under this parameter's or module's path; None if it could."""
        for u in self.unknown:
            inside = f"/{u.scope}/".find(f"/{path}/") >= 0
            if not path or inside or any(p == path or p.startswith(path + "/") for p in u.params):
                return f"{u.reason} ({u.where or u.scope})"
        return None

    def __str__(self) -> str:
        from jqopt._table import table

        rows = [
            (s.key, s.op, _dims(s), s.module or "", f"a{s.activation}" if s.activation >= 0 else "", s.reason or "")
            for s in self.sites
        ]
        text = table(("site", "op", "shape", "module", "input", "note"), rows)
        for o in self.opaque:
            text += f"\nopaque: {o.primitive} in {o.scope or 'the function'}: {o.reason}"
        return text

    @functools.cached_property
    def groups(self) -> tuple[Group, ...]:
        """Sites that read the same activation."""
        return groups(self.flow, self.sites)

    @functools.cached_property
    def attention(self) -> Attention:
        """The model's attentions, and why each other product of two activations is none."""
        return attention(self.flow, self.sites)

    @functools.cached_property
    def folds(self) -> Mapping[str, Fold]:
        """Where a scale on each group's input can be absorbed, by the group's name."""
        return folds(self.flow, self.groups)


def _dims(site: Site) -> str:
    stack = f"{math.prod(a.size for a in site.stack)}x" if site.stack else ""
    return f"{stack}[{math.prod(a.size for a in site.rows)}, {site.contracted}]" if site.view else ""


# ---------------------------------------------------------------------------------------- abstract values


class Act(NamedTuple):
    """A value that depends on the inputs; equal numbers mean the same values up to layout and dtype.

    `mixed`: parameters of the value's own shape that went into it elementwise (`where(x > 0, a, b)`, a masked
    weight, a weight that a loop carries): as the operand of a product it is no activation but a computed weight.
    """

    id: int
    mixed: frozenset[str] = frozenset()
    by: str = ""


class Derived(NamedTuple):
    """Computed from parameters in a way that isn't a rearrangement of one of them."""

    params: frozenset[str]
    by: str


class Joined(NamedTuple):
    """Values concatenated along one axis, at least one a View."""

    parts: tuple[Any, ...]
    axis: int


CONST = "const"  # depends on neither inputs nor parameters


def params_of(value: Any) -> frozenset[str]:
    """Paths of the parameters in a value."""
    if isinstance(value, View):
        return frozenset({value.path})
    if isinstance(value, Derived):
        return value.params
    if isinstance(value, Joined):
        return frozenset().union(*(params_of(p) for p in value.parts))
    return frozenset()


INDEXED = frozenset({"gather", "dynamic_slice", "dynamic_gather", "take_along_axis"})


class _Walk:
    """Accumulates sites while it follows abstract values through a jaxpr."""

    def __init__(self, modules: Mapping[str, str]):
        self.modules = modules
        self.sites: list[Site] = []
        self.opaque: list[Opaque] = []
        self.ids = itertools.count()
        self.pairs = itertools.count(1)
        self.branch: Address = ()

    def fresh(self) -> Act:
        return Act(next(self.ids))

    def run(self, jaxpr: Any, values: Sequence, address: Address, scope: str) -> list:
        jaxpr, _ = open_jaxpr(jaxpr)
        env = dict.fromkeys(jaxpr.constvars, CONST)
        env.update(zip(jaxpr.invars, values, strict=True))
        for i, eqn in enumerate(jaxpr.eqns):
            ins = [CONST if isinstance(a, jex_core.Literal) else env[a] for a in eqn.invars]
            inside = "/".join(s for s in (scope, str(eqn.source_info.name_stack)) if s)
            env.update(zip(eqn.outvars, self.equation(eqn, ins, (*address, i), inside), strict=True))
        return [CONST if isinstance(v, jex_core.Literal) else env[v] for v in jaxpr.outvars]

    def equation(self, eqn: Any, ins: list, address: Address, scope: str) -> list:
        name = eqn.primitive.name
        if name in ("scan", "while", "cond", "shard_map"):
            return getattr(self, "_" + name)(eqn, ins, address, scope)
        inner = inner_jaxpr(eqn)
        if inner is not None:
            return self.run(inner, ins, (*address, 0), scope)
        if name in OPAQUE or (name not in COMBINERS and any(map(_holds_jaxpr, eqn.params.values()))):
            self._opaque(eqn, ins, scope)
        elif name in DOTS and self._site(eqn, ins, address, scope):
            return [self.fresh() for _ in eqn.outvars]
        return self.propagate(eqn, ins)

    def propagate(self, eqn: Any, ins: list) -> list:
        """What an equation that is no site makes of its operands."""
        name = eqn.primitive.name
        params = frozenset().union(*map(params_of, ins)) if ins else frozenset()
        acts = [v for v in ins if isinstance(v, Act)]
        if name in _view.SAME and len(ins) == len(eqn.outvars):
            return list(ins)
        if params and not acts:
            if name == "concatenate":
                return [Joined(tuple(ins), eqn.params["dimension"])]
            views = [v if isinstance(v, View) else None for v in ins]
            found = _view.through(name, eqn.params, views, [o.aval for o in eqn.outvars])
            by = next((v.by for v in ins if isinstance(v, Derived)), name)
            return [Derived(params, by) if v is None else v for v in found]
        if params and name in INDEXED and not isinstance(ins[0], Act):
            return [Derived(params, f"{name} at positions known only at run time") for _ in eqn.outvars]
        if not acts:
            return [CONST for _ in eqn.outvars]
        if len(acts) == 1 and not params and name in TRANSPARENT:
            return [acts[0] for _ in eqn.outvars]
        if name == "gather" and not params and isinstance(ins[0], Act) and _picks_rows(eqn):
            return [ins[0]]
        return [self._mixed(eqn, ins, o.aval) for o in eqn.outvars]

    def _mixed(self, eqn: Any, ins: list, out: Any) -> Act:
        """A new activation, with the parameters that went into it elementwise."""
        pairs = zip(ins, eqn.invars, strict=True)
        same = [v for v, a in pairs if v != CONST and a.aval.shape == out.shape and out.ndim > 1]
        mixed = frozenset().union(*(params_of(v) | (v.mixed if isinstance(v, Act) else frozenset()) for v in same))
        by = next((v.by for v in same if isinstance(v, Act) and v.by), eqn.primitive.name)
        return Act(next(self.ids), mixed, by if mixed else "")

    def _opaque(self, eqn: Any, ins: list, scope: str) -> None:
        params = tuple(sorted(frozenset().union(*map(params_of, ins)) if ins else ()))
        reason = f"tracing can't look into {eqn.primitive.name}"
        reason += f"; it reads {', '.join(params)} unquantized" if params else "; it reads activations only"
        self.opaque.append(Opaque(eqn.primitive.name, scope, params, reason))

    # ------------------------------------------------------------------------------------ control flow

    def _scan(self, eqn: Any, ins: list, address: Address, scope: str) -> list:
        p = eqn.params
        body, _ = open_jaxpr(p["jaxpr"])
        n_const, n_carry = _compat.scan_sizes(p)
        carry = self._carry(body, ins[n_const : n_const + n_carry], n_const)
        xs = [self._layer(v, address) for v in ins[n_const + n_carry :]]
        outs = self.run(body, [*ins[:n_const], *carry, *xs], (*address, 0), scope)
        echo = {v: i for i, v in enumerate(body.invars)}
        result = [carry[i] if carry[i] is ins[n_const + i] else self._blur(outs[i]) for i in range(n_carry)]
        for v, out in zip(body.outvars[n_carry:], outs[n_carry:], strict=True):
            source = None if isinstance(v, jex_core.Literal) else echo.get(v)
            result.append(ins[source] if source is not None and source >= n_const + n_carry else self._blur(out))
        return result

    def _carry(self, body: Any, init: list, offset: int) -> list:
        """Carried values inside a loop: one the body hands on unchanged stays what it was."""
        same = [body.outvars[i] is body.invars[offset + i] for i in range(len(init))]
        moving = [Act(next(self.ids), params_of(v), "a loop that carries it") for v in init]
        return [v if keep else m for v, m, keep in zip(init, moving, same, strict=True)]

    def _layer(self, value: Any, address: Address) -> Any:
        """What the body of the scan at `address` sees of a value that the scan iterates over."""
        if isinstance(value, View):
            layer = _view.scan_over(value)
            if layer is None:
                return Derived(frozenset({value.path}), "scan over part of an axis")
            return dataclasses.replace(layer, scans=(*layer.scans, address))
        if isinstance(value, Joined):
            return Derived(params_of(value), "concatenate")
        return self.fresh() if isinstance(value, Act) else value

    def _blur(self, value: Any) -> Any:
        params = params_of(value)
        return Derived(params, "scan") if params else self.fresh() if isinstance(value, Act) else value

    def _while(self, eqn: Any, ins: list, address: Address, scope: str) -> list:
        p = eqn.params
        n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
        body, _ = open_jaxpr(p["body_jaxpr"])
        init = ins[n_cond + n_body :]
        carry = self._carry(body, init, n_body)
        before = len(self.sites)
        self.run(p["cond_jaxpr"], [*ins[:n_cond], *carry], (*address, 0), scope)
        why = "it stands in the condition of a while loop, which can hand on no statistics"
        self.sites[before:] = [dataclasses.replace(s, reason=s.reason or why) for s in self.sites[before:]]
        self.run(body, [*ins[n_cond : n_cond + n_body], *carry], (*address, 1), scope)
        return [c if c is v else self.fresh() for c, v in zip(carry, init, strict=True)]

    def _cond(self, eqn: Any, ins: list, address: Address, scope: str) -> list:
        branches = eqn.params["branches"]
        outs, around = [], self.branch
        for i, b in enumerate(branches):
            self.branch = (*address, i)
            outs.append(self.run(b, ins[1:], (*address, i), scope))
        self.branch = around
        return [self._meet(values) for values in zip(*outs, strict=True)]

    def _meet(self, values: Sequence) -> Any:
        params = frozenset().union(*map(params_of, values))
        if any(isinstance(v, Act) for v in values):
            return Act(next(self.ids), params, "cond" if params else "")
        return values[0] if all(v == values[0] for v in values) else Derived(params, "cond") if params else CONST

    def _shard_map(self, eqn: Any, ins: list, address: Address, scope: str) -> list:
        inner, _ = open_jaxpr(eqn.params["jaxpr"])
        local = [_local(v, a.aval.shape) for v, a in zip(ins, inner.invars, strict=True)]
        return self.run(inner, local, (*address, 0), scope)

    # ------------------------------------------------------------------------------------------- sites

    def _site(self, eqn: Any, ins: list, address: Address, scope: str) -> bool:
        op = DOTS[eqn.primitive.name]
        sides = [0] if op == "gather" else [1, 0]
        weight = next((i for i in sides if params_of(ins[i]) and isinstance(ins[1 - i], Act)), None)
        if weight is None:
            return (
                self._fixed_rows(eqn, ins, address, scope)
                if op == "gather"
                else self._no_weight(op, ins[:2], address, scope)
            )
        value, other = ins[weight], ins[1 - weight]
        parts, axis = (value.parts, value.axis) if isinstance(value, Joined) else ((value,), None)
        for part, v in enumerate(parts):
            if params_of(v):
                site = self._describe(eqn, op, weight, v, axis, address, scope)
                shape = tuple(eqn.invars[1 - weight].aval.shape)
                act = other.id if isinstance(other, Act) and op != "gather" else -1
                axes = _contracted(eqn, op, weight, v)
                found = dataclasses.replace(site, part=part, activation=act, input_shape=shape, input_axes=axes)
                self.sites.append(found)
        return True

    def _fixed_rows(self, eqn: Any, ins: list, address: Address, scope: str) -> bool:
        """Records a lookup at positions that don't depend on the inputs (a table of positions); it is no site."""
        params = params_of(ins[0])
        if params and ins[1] == CONST and not isinstance(self.propagate(eqn, ins)[0], View):
            self._refuse("gather", params, address, scope, "its rows are picked at constant positions")
        return False

    def _no_weight(self, op: str, ins: list, address: Address, scope: str) -> bool:
        """Records a product neither of whose operands is a rearranged parameter; False if only parameters meet."""
        if not any(isinstance(v, Act) for v in ins):
            params = frozenset().union(*map(params_of, ins))
            if CONST in ins and params:
                self._refuse(op, params, address, scope, "it is multiplied by a constant, not by an activation")
            return False
        mixed = [v for v in ins if isinstance(v, Act) and v.mixed]
        if mixed:
            names = ", ".join(sorted(mixed[0].mixed))
            why = f"the operand is computed from {names} together with activations by {mixed[0].by}"
            self._refuse(op, mixed[0].mixed, address, scope, why)
        else:
            key = f"activations#{next(self.pairs)}"
            self.sites.append(Site(key, op, address, scope=scope, reason="multiplies two activations"))
        return True

    def _refuse(self, op: str, params: frozenset[str], address: Address, scope: str, why: str) -> None:
        for path in sorted(params):
            owner, _, _ = path.rpartition("/")
            module = self.modules.get(owner)
            self.sites.append(Site(path, op, address, path, module_path=owner, module=module, scope=scope, reason=why))

    def _describe(
        self, eqn: Any, op: str, weight: int, value: Any, joined: int | None, address: Address, scope: str
    ) -> Site:
        path = sorted(params_of(value))[0]
        owner, _, _ = path.rpartition("/")
        base = Site(path, op, address, path, operand=weight, module_path=owner, scope=scope, branch=self.branch)
        base = dataclasses.replace(base, module=self.modules.get(owner))
        if isinstance(value, Derived):
            names = ", ".join(sorted(value.params))
            why = f"the operand is computed from {names} by {value.by}, it isn't a rearrangement of one parameter"
            return dataclasses.replace(base, reason=why)
        view: View = value
        base = dataclasses.replace(base, view=view, shape=view.origin, dtype=str(view.dtype))
        if 0 in view.origin:
            return dataclasses.replace(base, reason="the parameter is empty")
        if not np.issubdtype(view.dtype, np.floating) and "float" not in str(view.dtype):
            return dataclasses.replace(base, reason=f"the parameter is {view.dtype}, not floating point")
        roles = ROLES[op](eqn, weight, view)
        if isinstance(roles, str):
            return dataclasses.replace(base, reason=roles)
        stack, rows, cols = ([a for d in dims for a in view.axes[d]] for dims in roles)
        if joined is not None and joined not in roles[1]:
            return dataclasses.replace(base, reason="concatenated along the contracted axis")
        stack = (*view.scanned, *view.fixed, *stack)
        return dataclasses.replace(base, stack=stack, rows=tuple(rows), cols=tuple(cols))


def _contracted(eqn: Any, op: str, weight: int, value: Any) -> tuple[int, ...]:
    """The axes of the activation that a site contracts, in the order of its k; a convolution's feature axis."""
    if op == "dot_general":
        return tuple(pair[1 - weight] for pair in _pairs(eqn, weight, value))
    if op == "conv":
        return (int(eqn.params["dimension_numbers"].lhs_spec[1]),)
    return () if op == "gather" else (eqn.invars[1 - weight].aval.ndim - 1,)


def _pairs(eqn: Any, weight: int, value: Any) -> list[tuple[int, int]]:
    """(left axis, right axis) that a product contracts, in the order in which the parameter holds them.

    An equation may list them in any order (einsum reverses them); k, hence blocks, follow the parameter's memory.
    """
    pairs = [(int(a), int(b)) for a, b in zip(*eqn.params["dimension_numbers"][0], strict=True)]
    if not isinstance(value, View):
        return pairs
    return sorted(pairs, key=lambda pair: [(a.axis, -a.stride) for a in value.axes[pair[weight]]])


TRANSPARENT = _view.SAME | {
    "convert_element_type",
    "reshape",
    "transpose",
    "squeeze",
    "broadcast_in_dim",
    "expand_dims",
}


def _picks_rows(eqn: Any) -> bool:
    """Does a gather pick whole rows (tokens sent to experts), so that each channel keeps its values?"""
    last = eqn.invars[0].aval.ndim - 1
    return last not in eqn.params["dimension_numbers"].start_index_map and last >= 1


def _local(value: Any, shape: tuple[int, ...]) -> Any:
    """A view as one device of a shard_map sees it, None of whose axes are sharded; else it is derived."""
    if isinstance(value, View) and value.shape != tuple(shape):
        return _view.shard(value, shape) or Derived(frozenset({value.path}), "shard_map of part of an axis")
    return value


def _dot_roles(eqn: Any, weight: int, view: View) -> tuple | str:
    contract = tuple(pair[weight] for pair in _pairs(eqn, weight, view))
    batch = tuple(map(int, eqn.params["dimension_numbers"][1][weight]))
    if not contract:
        return "an outer product: nothing is contracted"
    free = tuple(d for d in range(len(view.shape)) if d not in (*contract, *batch))
    return batch, free, contract


def _conv_roles(eqn: Any, weight: int, view: View) -> tuple | str:
    if weight != 1:
        return "the parameter is the convolution's left operand"
    out, *rest = eqn.params["dimension_numbers"].rhs_spec
    return (), (out,), tuple(sorted(rest))


def _ragged_roles(eqn: Any, weight: int, view: View) -> tuple | str:
    if weight != 1:
        return "the parameter is the ragged dot's left operand"
    if eqn.primitive.name == "ragged_dot":
        return (0,), (2,), (1,)
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contract), (_, batch) = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    if len(groups) != 1:
        return "a ragged dot whose contracted or batch dimension is ragged"
    used = (*contract, *batch, *groups)
    return (*groups, *batch), tuple(d for d in range(len(view.shape)) if d not in used), tuple(contract)


def _gather_roles(eqn: Any, weight: int, view: View) -> tuple | str:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    rows = tuple(numbers.start_index_map)
    whole = all(sizes[d] == n for d, n in enumerate(view.shape) if d not in rows)
    simple = rows == tuple(numbers.collapsed_slice_dims) and rows == (0,) and not numbers.operand_batching_dims
    if not simple or not whole or len(view.shape) < 2:
        return "a gather that doesn't pick whole rows of a table"
    return (), rows, tuple(d for d in range(len(view.shape)) if d not in rows)


ROLES: Mapping[str, Callable] = {
    "dot_general": _dot_roles,
    "conv": _conv_roles,
    "ragged_dot": _ragged_roles,
    "gather": _gather_roles,
}
"""(stack, rows, cols): which axes of the weight operand are batch, output and contracted; or why not."""


def _holds_jaxpr(value: Any) -> bool:
    """Does an equation's parameter hold a jaxpr, perhaps inside a tuple (as custom_linear_solve's do)?"""
    if isinstance(value, tuple | list):
        return any(map(_holds_jaxpr, value))
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def walk(jaxpr: Any, leaves: Sequence[Any], modules: Mapping[str, str]) -> tuple[list[Site], list[Opaque]]:
    """The sites of `jaxpr`; `leaves` holds a View for each invar that is a parameter, None for inputs."""
    walker = _Walk(modules)
    walker.run(jaxpr, [walker.fresh() if v is None else v for v in leaves], (), "")
    return _name(walker.sites), walker.opaque


def _name(sites: list[Site]) -> list[Site]:
    """Gives further uses of a parameter their own keys, and every site what else reads its parameter."""
    used: dict[str, set[str]] = {}
    for s in sites:
        if s.path is not None:
            used.setdefault(s.path, set()).add(s.op)
    count: dict[str, int] = {}
    named: dict[int, Site] = {}
    # those that can't be quantized come last: which there are may depend on the shapes, and keys must not
    for i, s in sorted(enumerate(sites), key=lambda pair: (pair[1].reason is not None, pair[0])):
        count[s.key] = count.get(s.key, 0) + 1
        key = s.key if count[s.key] == 1 else f"{s.key}#{count[s.key]}"
        named[i] = dataclasses.replace(s, key=key, used_by=frozenset(used.get(s.path or "", ())))
    return [named[i] for i in range(len(sites))]


def _shapes(inputs: tuple, kwargs: dict) -> str:
    """Inputs in a few words: `float32[4, 64], train=True`."""

    def word(x: Any) -> str:
        return f"{x.dtype}{list(x.shape)}" if hasattr(x, "shape") and hasattr(x, "dtype") else repr(x)

    args = [str(jax.tree.map(word, x)).replace("'", "") for x in inputs]
    text = ", ".join([*args, *(f"{k}={jax.tree.map(word, v)}" for k, v in kwargs.items())]) or "none"
    return text if len(text) <= 300 else f"{text[:297]}..."


def staged(function: Function, params: Any, inputs: tuple, kwargs: dict, *, anew: bool = False) -> tuple:
    """What `stage` gives.

    Raises:
        TraceError: the model can't run with these inputs; with their shapes, and what the model said.
    """
    try:
        return stage(function, params, inputs, kwargs, anew=anew)
    except JqoptError:
        raise
    except Exception as e:
        raise TraceError(
            f"{function.name} can't run with these inputs: {_shapes(inputs, kwargs)}. {type(e).__name__}: {e}"
        ) from e


def trace_function(function: Function, inputs: tuple, kwargs: dict) -> Graph:
    """The graph of a model at the shapes of `inputs`: nothing is computed, no weight needs to be in memory."""
    with function.watch() as modules:
        closed, _, views = staged(function, function.params, inputs, kwargs, anew=True)  # `watch` sees it happen
    sites, opaque = walk(closed, views, modules)
    flat, _ = jax.tree_util.tree_flatten_with_path(function.params)
    parameters = {
        p: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in flat
        if (p := parameter_path(function, path, leaf)) is not None
    }
    shapes = jax.tree.map(_shape, function.params)  # the graph and plans made of it hold no weights
    program, _ = open_jaxpr(closed)
    leaves = leaf_names(function, flat, len(program.invars))
    twice = [n for n, times in collections.Counter(leaf[1] for leaf in leaves if leaf is not None).items() if times > 1]
    if twice:
        raise TraceError(
            f"two leaves of the parameter tree of {function.name} are called {twice[0]!r}: a key holds '/'. Rename it"
        )
    return Graph(function._replace(params=shapes), tuple(sites), tuple(opaque), parameters, program, leaves)


def leaf_names(function: Function, flat: Sequence[tuple[tuple, Any]], count: int) -> tuple[tuple[str, str] | None, ...]:
    """(kind, name) of each of the `count` arguments of a staged model: None for those that aren't leaves of its tree.

    A leaf that is no parameter (batch statistics, a cache) is called after its whole key path.
    """
    found: list[tuple[str, str] | None] = [
        ("state", state_name(key)) if (p := parameter_path(function, key, leaf)) is None else ("parameter", p)
        for key, leaf in flat
    ]
    return (*found, *([None] * (count - len(found))))


def state_name(key: tuple) -> str:
    """`batch_stats/norm/mean`: a leaf's key path, without the box that NNX and `nn.Partitioned` put around it."""
    boxed = key and isinstance(key[-1], jax.tree_util.GetAttrKey)
    return jax.tree_util.keystr(key[:-1] if boxed else key, simple=True, separator="/")


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf
