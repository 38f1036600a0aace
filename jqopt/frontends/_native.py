"""One module's method on packed weights, run by the evaluator that runs whole models: the two agree to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqopt import _apply, _jaxpr, _stage, _trace
from jqopt._jaxpr import QView
from jqopt._plan import Decision, Plan
from jqopt._qtensor import Layout, QTensor
from jqopt._stage import Function
from jqopt._trace import Site
from jqopt.errors import PlanError, UnsupportedError
from jqopt.frontends import path_name

Decisions = Mapping[tuple[str, str], Decision]
"""What each parameter's sites ask: {(parameter path, op): decision}."""


def decisions(plan: Plan) -> dict[tuple[str, str], Decision]:
    """The plan's decisions by parameter and op, without what only reports need: hashable, equal if they run equally."""
    found: dict[tuple[str, str], Decision] = {}
    quantized = plan.quantized
    for d in plan.decisions:
        if d.path is not None and d.weight is not None:
            packed = quantized[d.path]
            slim = Decision(
                d.path,
                d.op,
                d.path,
                d.weight,
                d.input,
                group=d.path,
                backend=d.backend,
                layout=packed.layout,
                outer=packed.outer,
            )
            found.setdefault((d.path, d.op), slim)
    return found


def run(
    call: Callable[..., Any],
    packed: Mapping[str, QTensor],
    decisions: Decisions,
    args: tuple,
    kwargs: dict,
    *,
    simulate: bool = False,
) -> Any:
    """`call({path: array}, *args, **kwargs)` with packed weights in place of the arrays.

    Args:
        call: a pure function of float weights; it may close over anything else, traced values too.
        packed: weights by parameter path. Scans and vmaps may have sliced their leading axes off.

    Raises:
        UnsupportedError: a weight was sliced along an axis that doesn't lead its packed form.
        PlanError: the call uses a weight in a way that the plan doesn't know.
    """
    local = {path: sliced(path, tensor, decisions) for path, tensor in packed.items()}
    shapes = {path: jax.ShapeDtypeStruct(t.shape, np.dtype(t.dtype)) for path, t in local.items()}
    closed, out, views = _stage.stage(_function(call), shapes, args, kwargs)
    sites, _ = _trace.walk(closed, views, {})
    rule = _Rule(_decided(sites, decisions), simulate)
    weights = [QView(local[v.path], v) for v in views if v is not None]
    outs, _ = _jaxpr.evaluate(closed, [*weights, *_stage.split_static((args, kwargs))[0]], rule, {})
    return jax.tree.unflatten(jax.tree.structure(out), [_jaxpr.dense(o) for o in outs])


def _function(call: Callable[..., Any]) -> Function:
    return Function(call, None, path_name, _never, "function", "")


def _never() -> Any:
    raise AssertionError("a single layer is staged, never traced as a model")


class _Rule(_apply.Executor):
    """The executor of whole models, for sites that were decided without a plan at hand."""

    def __init__(self, sites: Sequence[tuple[Site, Decision]], simulate: bool):
        super().__init__(sites, simulate, None)


def _decided(sites: Sequence[Site], decisions: Decisions) -> list[tuple[Site, Decision]]:
    found = []
    for site in sites:
        if site.path is None or site.reason is not None:
            continue
        decision = decisions.get((site.path, site.op))
        if decision is None:
            raise PlanError(
                f"{site.path}: a {site.op} reads it, and the plan knows no such use: the model runs differently here "
                "than where it was traced. Trace with inputs (and keywords) that reach every use."
            )
        found.append((site, decision))
    return found


# ------------------------------------------------------------------------------------------ sliced weights


def leads(layout: Layout, count: int) -> bool:
    """Are the first `count` stacked axes of the packed data the first axes of the parameter, in order?"""
    whole = [atoms == [i] for atoms, i in zip(layout.axes(), layout.stack[:count], strict=False)]
    return len(whole) == count and all(whole)


def sliceable(tensor: QTensor) -> QTensor:
    """The same weight with as many of the parameter's first axes as possible in front of every leaf.

    A scan or vmap that Flax lifts slices axis 0 of each leaf. Experts that share their input are rows of one matrix
    to the evaluator, so that their axis leads no leaf.
    """
    layout = tensor.layout
    order, count = (*layout.stack, *layout.rows), len(layout.stack)
    if not leads(layout, count):
        return tensor
    while count < len(order) - 1 and layout.axes()[count] == [order[count]]:
        count += 1
    return regrouped(tensor, count)


def sliced(path: str, tensor: QTensor, decisions: Decisions) -> QTensor:
    """A weight as a layer inside scans and vmaps has it: as the plan groups its axes, without those sliced off.

    Raises:
        UnsupportedError: what was sliced off isn't the first axes of the parameter, or not those of the packed data.
        PlanError: it is packed in another format than the plan says.
    """
    planned = next(d for (p, _), d in decisions.items() if p == path)
    assert planned.layout is not None, path
    if tensor.format != planned.format:
        raise PlanError(f"{path}: found {tensor.format.name}, but the plan quantizes it to {planned.format.name}.")
    whole, missing = tensor.layout, len(tensor.layout.stack) - (tensor.data.ndim - 2)
    if not 0 <= missing <= len(whole.stack) or not leads(whole, missing):
        raise UnsupportedError(unsliceable(path, whole))
    inner = whole.sliced(missing)
    if tensor.data.shape[:-1] != (*(inner.atoms[i] for i in inner.stack), inner.n):
        raise UnsupportedError(unsliceable(path, whole))
    stack, outer = (max(len(axes) - missing, 0) for axes in (planned.layout.stack, planned.outer))
    found = regrouped(tensor.replace(layout=inner, input_scale=None), stack)
    return found.replace(input_scale=_lead(tensor.input_scale, (), outer))


def regrouped(tensor: QTensor, count: int) -> QTensor:
    """The same weight with `count` stacked axes: rows become stacked axes, or stacked axes rows."""
    layout = tensor.layout
    order = (*layout.stack, *layout.rows)
    if count == len(layout.stack) and (tensor.input_scale is None or tensor.input_scale.ndim == count):
        return tensor
    new = Layout(layout.shape, layout.atoms, order[:count], order[count:], layout.cols)
    stack = tuple(layout.atoms[i] for i in new.stack)
    tile = tensor.format.tile if tensor.granularity == "block" else None
    if tile is not None and tile[0] > 1 and new.n % tile[0]:
        return tensor  # a block of rows would belong to two matrices

    def rows(leaf: jax.Array | None) -> jax.Array | None:
        if leaf is None:
            return None
        if leaf.shape[-2] == 1 and layout.n > 1:
            return _lead(leaf, stack, count, trailing=2)
        return leaf.reshape(*stack, -1, leaf.shape[-1])

    return tensor.replace(
        layout=new, data=rows(tensor.data), scale=rows(tensor.scale), zero_point=rows(tensor.zero_point),
        global_scale=_lead(tensor.global_scale, stack, count), input_scale=_lead(tensor.input_scale, stack, count),
        pre_scale=_lead(tensor.pre_scale, stack, count, trailing=1),
        low_a=_lead(tensor.low_a, stack, count, trailing=2), low_b=rows(tensor.low_b),
        feedback=_lead(tensor.feedback, stack, count, trailing=3),
    )  # fmt: skip


def _lead(leaf: jax.Array | None, stack: tuple[int, ...], count: int, trailing: int = 0) -> jax.Array | None:
    """`leaf` with `count` stacked axes before its trailing ones: new ones repeat it, old ones held equal values."""
    if leaf is None:
        return None
    have = leaf.ndim - trailing
    if have > count:
        return leaf[(*[slice(None)] * count, *[0] * (have - count))]
    last = leaf.shape[have:]
    return jnp.broadcast_to(leaf.reshape(*leaf.shape[:have], *[1] * (count - have), *last), (*stack, *last))


# ------------------------------------------------------------------------------------------------- refusals


INSTEAD = "use `qm(...)` or `jqopt.apply(plan)`, which handle any use of a parameter"


def unsliceable(path: str, layout: Layout) -> str:
    """Why a scan or vmap can't slice this weight."""
    axes = ", ".join([*(str(layout.atoms[i]) for i in layout.stack), "n", "k"])
    return (
        f"{path}: Flax slices the same axis off every leaf of a packed weight, and this one of shape {layout.shape} is "
        f"packed as [{axes}]: only axes that come first in both can be sliced. Stack layers along axis 0 "
        f"(`variable_axes={{'params': 0}}` in Linen, `in_axes=0` in NNX), or {INSTEAD}."
    )


def no_attention(plan: Plan, native: str) -> None:
    """Refuses plans that quantize attention's operands: native layers run on packed weights only.

    Raises:
        UnsupportedError: naming the first attention.
    """
    if plan.attention:
        d = plan.attention[0]
        raise UnsupportedError(
            f"{d.key}: recipe {plan.recipe.name!r} quantizes {d.role} of this attention (kv_cache, attention), and "
            f"{native} runs the model's own attention, which nothing quantizes. Use `qm(...)` or `jqopt.apply(plan)`, "
            "or a recipe without kv_cache and attention; jqopt.kv_cache holds packed keys and values in your own loop."
        )


def used_raw(path: str, format: str, owner: str, instead: str) -> str:
    """Why a packed weight that the user's code reads itself can't be handled."""
    return f"{path}: {owner} reads this weight itself, and it is packed ({format}). Either {INSTEAD}, or {instead}."
