"""Quantizing: solves every weight of the plan, one at a time, and puts QTensors where arrays stood."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jqopt import _attention_ops, _numerics, _trace, _view, algorithms
from jqopt._apply import Quantized, check_paths
from jqopt._calibrate import Stats, algorithm_of, check_stats
from jqopt._jaxpr import QView, leaf_specs
from jqopt._numerics import amax_of
from jqopt._plan import Decision, Plan
from jqopt._qtensor import QTensor
from jqopt.algorithms import Problem
from jqopt.errors import CalibrationError, UnsupportedError

Tracer = jax.core.Tracer  # pyright: ignore[reportAttributeAccessIssue] (public, but not in the stubs)


def quantize(
    plan: Plan, params: Any, stats: Stats | None = None, *, donate: bool = False, progress: Callable | None = None
) -> Quantized:
    """Packs the weights that the plan quantizes; other leaves are handed on as they are.

    One parameter is worked on at a time, so beside the model and the result at most one float parameter is held.

    Args:
        params: the tree the plan was made for (float); of an NNX model, the module.
        stats: from `calibrate`; not needed when every activation is dynamic (`plan.needs_data` is empty).
        donate: delete each float weight once it is packed. The caller's tree can't be used afterwards.
        progress: called with the path of each packed parameter.

    Raises:
        CalibrationError: the plan needs statistics and got none (or not of every site).
        UnsupportedError: a weight holds NaN or inf; the message names it.
        PlanError: params aren't those of the plan.
    """
    params = plan.function.tree(params)
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, QTensor))
    paths = [_trace.parameter_path(plan.function, key, leaf) for key, leaf in flat]
    leaves = [leaf for _, leaf in flat]
    found = {p: leaf for p, leaf in zip(paths, leaves, strict=True) if p is not None}
    check_paths(plan, found)
    _check_input(plan, found, stats)
    attention = _attention_ops.solve(plan.attention, stats)
    shared, inputs = group_amax(plan, found), input_amax(plan, stats or {})
    uses = collections.Counter(id(leaf) for leaf in leaves)  # one array may stand at several paths
    for i, path in enumerate(paths):
        d = plan.quantized.get(path) if path is not None else None
        if d is None or path is None:
            continue
        state = None if stats is None or path not in plan.needs_data else stats[path]
        packed = solve(d, leaves[i], state, shared.get(path), inputs.get(path))
        uses[id(leaves[i])] -= 1
        if donate and isinstance(leaves[i], jax.Array) and not uses[id(leaves[i])]:
            jax.block_until_ready(packed)
            leaves[i].delete()
        leaves[i] = packed
        if progress is not None:
            progress(path)
    return Quantized(treedef.unflatten(leaves), attention)


def _check_input(plan: Plan, found: Mapping[str, Any], stats: Stats | None) -> None:
    again = [p for p, leaf in found.items() if isinstance(leaf, QTensor)]
    if again:
        raise UnsupportedError(f"{again[0]} is quantized already ({found[again[0]]!r}); quantize the float model.")
    if plan.needs_data and stats is None:
        raise CalibrationError(
            f"{len(plan.needs_data)} sites need statistics of their activations (first: {plan.needs_data[0]}). "
            "Call stats = jqopt.calibrate(plan, params, batches) and pass it, or use dynamic inputs."
        )
    if plan.needs_data and not _traced((stats, found)):
        check_stats(plan, stats or {})


def _traced(tree: Any) -> bool:
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def group_amax(plan: Plan, found: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Largest |weight| of those that share a tensor-level scale, by path: [*stack] float32.

    Fused sites (q, k, v; gate, up) share the global scale of nvfp4 and the per-tensor scale of fp8, since serving
    engines run them as one matrix product.
    """
    amax: dict[str, jax.Array] = {}
    for path, d in plan.quantized.items():
        amax[path] = _amax(found[path], d.layout)
        if not isinstance(amax[path], Tracer) and not np.all(np.isfinite(np.asarray(amax[path]))):
            raise UnsupportedError(f"{path}: the weight holds NaN or inf; it can't be quantized to {d.format.name}.")
    groups: dict[str, list[str]] = {}
    for path, d in plan.quantized.items():
        if d.format.global_scale or d.granularity == "tensor":
            groups.setdefault(d.fused or d.key, []).append(path)
    out = {}
    for members in groups.values():
        shapes = {amax[p].shape for p in members}
        whole = functools.reduce(jnp.maximum, [amax[p] for p in members]) if len(shapes) == 1 else None
        out.update({p: amax[p] if whole is None else whole for p in members})
    return out


@functools.partial(jax.jit, static_argnums=1)
def _amax(w: jax.Array, layout: Any) -> jax.Array:
    axes = layout.axes()
    stack = [next(i for i, atoms in enumerate(axes) if s in atoms) for s in layout.stack]
    if all(axes[i] == [s] for i, s in zip(stack, layout.stack, strict=True)):
        out = amax_of(w, tuple(i for i in range(w.ndim) if i not in stack))
        return out.transpose([sorted(stack).index(i) for i in stack]).astype(jnp.float32)
    return amax_of(layout.to_matrix(w), (-2, -1)).astype(jnp.float32)


def input_amax(plan: Plan, stats: Stats) -> dict[str, jax.Array]:
    """Largest |activation| that the static input scale of each parameter is made from, by path: [*outer] float32.

    Parameters that read one activation (q, k, v) get one scale, also where one of them reads another one besides.
    """
    amax = {
        p: algorithm_of(plan.quantized[p]).input_amax(stats[p])
        for p in plan.needs_data
        if p in stats and plan.quantized[p].has_static_input
    }
    groups: dict[str, set[str]] = {}
    for d in plan.decisions:
        if d.group and d.path in amax:
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


def solve(
    d: Decision, w: jax.Array, state: Any, tensor_amax: jax.Array | None, input_amax: jax.Array | None = None
) -> QTensor:
    """One parameter, packed. `state`, `tensor_amax` and `input_amax` have its stacked axes first."""
    assert d.layout is not None and d.weight is not None, d.key
    static = (d.layout, d.format, d.granularity, d.algorithm[-1], d.input_format, len(d.outer))
    place = _explicit(d, w, functools.partial(_solve, static=static), state, tensor_amax)
    codes = place(w, state, tensor_amax)
    input_scale = None
    if d.input is not None and d.input.needs_calibration:
        assert input_amax is not None, d.key
        input_scale = _numerics.scale_from_amax(input_amax, d.input.element_format())
    data, scale, global_scale, zero_point = codes
    dtype = np.dtype(w.dtype).name
    return QTensor(data, scale, global_scale, zero_point, input_scale, None, d.format, d.granularity, d.layout, dtype)


def _explicit(d: Decision, w: jax.Array, solve: Callable, state: Any, tensor_amax: Any) -> Callable:
    """On a mesh with Explicit axes: `solve` with the compiler placing what is inside, its leaves as the weight is."""
    sharding: Any = getattr(jax.typeof(w), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or jax.sharding.AxisType.Explicit not in mesh.axis_types or d.layout is None:
        return solve
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, tensor_amax))
    shapes = jax.eval_shape(solve, jax.ShapeDtypeStruct(w.shape, w.dtype), *plain)
    data, scale, global_scale, zero_point = shapes
    packed = QTensor(data, scale, global_scale, zero_point, None, None, d.format, d.granularity, d.layout, "")
    spec = PartitionSpec(*sharding.spec, *([None] * (w.ndim - len(sharding.spec))))
    found = leaf_specs(QView(packed, _view.whole(d.key, w.shape, w.dtype)), spec, mesh)

    def place(name: str) -> NamedSharding | None:  # where a block would be cut: whole on every device
        if getattr(packed, name) is None:
            return None
        return NamedSharding(mesh, PartitionSpec() if found is None else getattr(found.tensor, name))

    placed = _numerics.Codes(*map(place, _numerics.Codes._fields))  # pyright: ignore[reportArgumentType]
    return jax.sharding.auto_axes(solve, out_sharding=placed)


@functools.partial(jax.jit, static_argnames="static")
def _solve(w: jax.Array, state: Any, tensor_amax: jax.Array | None, *, static: tuple) -> _numerics.Codes:
    layout, format, granularity, spec, input_format, outer = static
    algorithm = algorithms.get(spec.name, **spec.options)

    def run(matrix: jax.Array, state: Any, amax: jax.Array | None):
        return algorithm.solve(matrix, state, Problem(format, granularity, amax, input_format))

    for axis in reversed(range(len(layout.stack))):  # innermost first; statistics belong to the outer axes only
        has = state is not None and axis < outer
        run = jax.vmap(run, in_axes=(0, 0 if has else None, None if tensor_amax is None else 0))
    return run(layout.to_matrix(w), state, tensor_amax)
