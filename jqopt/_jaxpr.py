"""One evaluator for jaxprs: walks the equations with a rule at each site, through every control-flow primitive.

State (statistics) travels as arguments and results, never in Python containers that outlive a trace: a side
effect inside remat or scan would leak tracers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.extend import core as jex_core
from jax.sharding import PartitionSpec

from jqopt import _compat, _view
from jqopt._qtensor import Layout, QTensor
from jqopt.errors import UnsupportedError

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


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array", "input_scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class QDense:
    """A quantized parameter that had to be decoded on its way (a shard_map would cut its blocks)."""

    array: jax.Array
    input_scale: jax.Array | None

    def dense(self) -> jax.Array:
        return self.array


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
    return value.dense() if isinstance(value, QView | QConcat | QDense) else value


def is_quantized(value: Any) -> bool:
    return isinstance(value, QView | QConcat | QDense)


class Rule(Protocol):
    """What the evaluator asks at each equation that is a site.

    `unrolls`: are scans with sites inside opened into their steps?
    """

    unrolls: bool

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

    def allreduce(self, before: State, after: State, axes: tuple[str, ...]) -> State:
        """State that devices of a shard_map have updated each on its own data, made the same on all of them."""
        ...

    def __call__(self, address: Address, eqn: Any, values: Sequence[Any], state: State) -> tuple[list, State]: ...


def open_jaxpr(jaxpr: Any) -> tuple[Any, list]:
    """(jaxpr, consts) of a Jaxpr or ClosedJaxpr: JAX 0.12 merges the two classes."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()) or ())


def inner_jaxpr(eqn: Any) -> Any | None:
    """The jaxpr of a call-like equation that maps operands one to one (jit, remat, custom_jvp, ...), or None."""
    if eqn.primitive.name in OPAQUE | COMBINERS:
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        found = eqn.params.get(name)
        if found is not None and hasattr(found, "eqns"):
            inner, _ = open_jaxpr(found)
            return found if len(inner.invars) == len(eqn.invars) else None
    return None


OPAQUE = frozenset({"pallas_call", "custom_call", "ffi_call", "triton_kernel_call", "mosaic_gpu", "pure_callback"})
_SCATTERS = {f"scatter{how}" for how in ("", *(f"{s}{w}" for s in "-_" for w in ("add", "mul", "min", "max", "sub")))}
COMBINERS = frozenset({"reduce", "reduce_window", *_SCATTERS})
"""Their jaxpr is of scalars: it says how two elements become one."""
REMAT = frozenset({"remat", "remat2", "checkpoint"})


def bind(eqn: Any, values: Sequence[Any]) -> list:
    """The equation as it stands."""
    got = eqn.primitive.get_bind_params(eqn.params)
    subfuns, params = got if isinstance(got, tuple) else ((), got)
    out = eqn.primitive.bind(*subfuns, *map(dense, values), **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def evaluate(jaxpr: Any, values: Sequence[Any], rule: Rule, state: State, address: Address = ()) -> tuple[list, State]:
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
        if name in REMAT and not rule.unrolls:
            run = jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
        return run(values, state)
    return (_rearranged(eqn, values) if quantized else bind(eqn, values)), state


def _call(inner: Any, rule: Rule, address: Address, values: list, state: State) -> tuple[list, State]:
    return evaluate(inner, values, rule, state, (*address, 0))


def _rearranged(eqn: Any, values: list) -> list:
    """Follows quantized parameters through casts, reshapes, transposes and slices without touching their data."""
    if eqn.primitive.name in _view.SAME and len(values) > 1:  # a barrier: packed operands need none
        return [v if is_quantized(v) else dense(v) for v in values]
    if eqn.primitive.name == "concatenate":
        return [QConcat(tuple(values), eqn.params["dimension"])]
    if len(values) == 1 and isinstance(values[0], QDense):
        return [QDense(out, values[0].input_scale) for out in bind(eqn, values)]
    views = [v.view if isinstance(v, QView) else None for v in values]
    found = _view.through(eqn.primitive.name, eqn.params, views, [o.aval for o in eqn.outvars])
    if any(v is None for v in found):
        return bind(eqn, values)
    sources = values if eqn.primitive.name in _view.SAME else [values[0]] * len(found)
    return [QView(s.tensor, v) for s, v in zip(sources, found, strict=True) if v is not None]


# ------------------------------------------------------------------------------------------ control flow


def _unrolled(eqn: Any, values: list, rule: Rule, state: State, address: Address) -> tuple[list, State]:
    """A scan as its steps, one after the other."""
    p = eqn.params
    (n_const, n_carry), length = _compat.scan_sizes(p), p["length"]
    consts, carry, xs = values[:n_const], values[n_const : n_const + n_carry], values[n_const + n_carry :]
    ys: dict[int, list] = {}
    for i in reversed(range(length)) if p["reverse"] else range(length):
        layer = [jax.lax.index_in_dim(x, i, 0, keepdims=False) for x in xs]
        outs, state = evaluate(p["jaxpr"], [*consts, *carry, *layer], rule, state, (*address, 0))
        carry, ys[i] = outs[:n_carry], outs[n_carry:]
    each = [ys[i] for i in range(length)]
    return [*carry, *(jnp.stack(y) for y in zip(*each, strict=True))], state


def _scan(eqn: Any, values: list, rule: Rule, state: State, address: Address) -> tuple[list, State]:
    if rule.unrolls and eqn.params["length"]:
        return _unrolled(eqn, values, rule, state, address)
    p = eqn.params
    body, body_consts = open_jaxpr(p["jaxpr"])
    n_const, n_carry = _compat.scan_sizes(p)
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
            jex_core.ClosedJaxpr(body, body_consts),
            [*consts, *full, *layer],
            rule,
            {**carried, **sliced},
            (*address, 0),
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


def _shard_map(eqn: Any, values: list, rule: Rule, state: State, address: Address) -> tuple[list, State]:
    p = eqn.params
    mesh, specs = p["mesh"], tuple(p["in_specs"])
    feed, placed = zip(*(_placed(v, s, mesh) for v, s in zip(values, specs, strict=True)), strict=True)
    inner, _ = open_jaxpr(p["jaxpr"])
    mine = rule.state_below(address)
    kept, seen = ({k: v for k, v in state.items() if (k in mine) is here} for here in (False, True))
    axes = tuple(p["newly_manual_axes"])

    def body(args: tuple, seen: State) -> tuple[list, State]:
        local = [_localized(a, v.aval.shape) for a, v in zip(args, inner.invars, strict=True)]
        outs, after = evaluate(p["jaxpr"], local, rule, seen, (*address, 0))
        return [dense(o) for o in outs], rule.allreduce(seen, after, axes)

    run = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(placed, PartitionSpec()),
        out_specs=(list(p["out_specs"]), PartitionSpec()),
        check_vma=p["check_vma"],
        axis_names=set(axes),
    )
    outs, seen = run(feed, seen)
    return outs, {**kept, **seen}


def _placed(value: Any, spec: PartitionSpec, mesh: Any) -> tuple[Any, Any]:
    """(value, its partition specs): packed leaves are sharded as the parameter is, where its layout allows it."""
    if not isinstance(value, QView):
        return dense(value), spec
    specs = leaf_specs(value, spec, mesh)
    if specs is not None:
        return value, specs
    if not value.tensor.is_plain:
        raise UnsupportedError(
            f"{value.view.path}: a shard_map would cut its blocks, and its input is rotated or scaled before it is "
            "quantized, which only packed weights do; shard another axis, or use an algorithm without such a step"
        )
    scale = value.tensor.input_scale
    return QDense(value.dense(), scale), QDense(spec, None if scale is None else PartitionSpec())  # type: ignore[arg-type]


def leaf_specs(value: QView, spec: PartitionSpec, mesh: Any) -> QView | None:
    """The partition specs of a packed parameter's leaves, as a QView of specs; None if a block would be cut."""
    view, tensor = value.view, value.tensor
    layout = tensor.layout
    atoms = layout_atoms(layout)
    where: dict[int, Any] = {}  # dimension of the data -> mesh axes
    ndim = tensor.data.ndim
    for axis, names in zip(view.axes, spec, strict=False):
        if names is None:
            continue
        if tensor.data.ndim - 2 != len(layout.stack) or not axis or axis[0] not in atoms:
            return None
        times = math.prod(mesh.shape[n] for n in ((names,) if isinstance(names, str) else names))
        index = atoms.index(axis[0])
        if index in layout.stack:
            where[layout.stack.index(index)] = names
        elif layout.rows[:1] == (index,) and layout.n % times == 0:
            where[ndim - 2] = names
        elif layout.cols[:1] == (index,) and _divides(tensor, layout.k // times):
            where[ndim - 1] = names
        else:
            return None

    def of(leaf: Any, dims: Sequence[int]) -> PartitionSpec | None:
        """`dims`: which dimension of the data each dimension of this leaf follows; length one is replicated."""
        if leaf is None:
            return None
        return PartitionSpec(*(where.get(d) if n > 1 else None for d, n in zip(dims, leaf.shape, strict=True)))

    if ndim - 2 in where and tensor.scale.shape[-2] not in (1, layout.n):
        return None
    stack = range(ndim - 2)
    fields = {name: of(getattr(tensor, name), range(ndim)) for name in ("data", "scale", "zero_point")}
    fields["global_scale"] = of(tensor.global_scale, stack)
    fields["input_scale"] = (
        None if tensor.input_scale is None else of(tensor.input_scale, stack[: tensor.input_scale.ndim])
    )
    fields["pre_scale"] = of(tensor.pre_scale, [*stack, ndim - 1])
    fields["low_a"], fields["low_b"] = (
        of(tensor.low_a, [*stack, -1, ndim - 1]),
        of(tensor.low_b, [*stack, ndim - 2, -1]),
    )
    fields["feedback"] = of(tensor.feedback, [*stack, ndim - 1, -1, -1])
    leaves = [f.name for f in dataclasses.fields(tensor) if not f.metadata.get("static")]
    if any(getattr(tensor, name) is not None for name in leaves if name not in fields):
        return None  # a kind of tensor with more leaves than these
    return QView(tensor.replace(**fields), view)


def _divides(tensor: QTensor, k: int) -> bool:
    """May the packed columns be cut into pieces of k? Bytes and blocks must stay whole."""
    tile = tensor.format.tile if tensor.granularity == "block" else None
    together = 1 if tensor.feedback is None else tensor.feedback.shape[-1]
    return (
        k % {8: 1, 6: 4, 4: 2}[tensor.format.element.bits] == 0
        and (tile is None or k % tile[1] == 0)
        and not k % together
    )


def _localized(value: Any, shape: Sequence[int]) -> Any:
    """A QView whose leaves are one device's: its layout and view shrink with them."""
    if not isinstance(value, QView) or tuple(value.view.shape) == tuple(shape):
        return value
    view = _view.shard(value.view, shape)
    assert view is not None, "leaf_specs() admits only axes that can be sharded"
    layout = value.tensor.layout
    atoms = list(layout.atoms)
    for axis, indices in enumerate(layout.axes()):
        atoms[indices[0]] = atoms[indices[0]] * view.origin[axis] // layout.shape[axis]
    local = dataclasses.replace(layout, shape=view.origin, atoms=tuple(atoms))
    return QView(value.tensor.replace(layout=local), view)


def layout_atoms(layout: Layout) -> tuple[_view.Atom, ...]:
    """The atoms of a packed layout as views write them."""
    out = []
    for axis, indices in enumerate(layout.axes()):
        sizes = [layout.atoms[i] for i in indices]
        out += [_view.Atom(axis, math.prod(sizes[j + 1 :]), n, 0, n) for j, n in enumerate(sizes)]
    return tuple(out)


CONTROL: Mapping[str, Callable] = {"scan": _scan, "while": _while, "cond": _cond, "shard_map": _shard_map}
