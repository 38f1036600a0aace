"""One module's method on packed weights, run by the evaluator that runs whole models: the two agree to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jqopt import _apply, _jaxpr, _trace
from jqopt._jaxpr import QView
from jqopt._plan import Decision, Plan
from jqopt._qtensor import Layout, QTensor
from jqopt._trace import Function, Site
from jqopt.errors import PlanError, UnsupportedError
from jqopt.frontends import path_name

Decisions = Mapping[tuple[str, str], Decision]
"""What each parameter's sites ask: {(parameter path, op): decision}."""


def decisions(plan: Plan) -> dict[tuple[str, str], Decision]:
    """The plan's decisions by parameter and op, without what only reports need: hashable, equal if they run equally."""
    found: dict[tuple[str, str], Decision] = {}
    for d in plan.decisions:
        if d.path is not None and d.weight is not None:
            slim = Decision(d.path, d.op, d.path, d.weight, d.input, outer=d.outer)
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
    closed, out, views = _trace.stage(_function(call), shapes, args, kwargs)
    sites, _ = _trace.walk(closed, views, {})
    rule = _Rule(_decided(sites, decisions), simulate)
    weights = [QView(local[v.path], v) for v in views if v is not None]
    outs, _ = _jaxpr.evaluate(closed, [*weights, *_trace.split_static((args, kwargs))[0]], rule, {})
    return jax.tree.unflatten(jax.tree.structure(out), [_jaxpr.dense(o) for o in outs])


def _function(call: Callable[..., Any]) -> Function:
    return Function(call, None, path_name, _never, "function", "")


def _never() -> Any:
    raise AssertionError("a single layer is staged, never traced as a model")


class _Rule(_apply.Executor):
    """The executor of whole models, for sites that were decided without a plan at hand."""

    def __init__(self, sites: Sequence[tuple[Site, Decision]], simulate: bool):
        super().__init__(None, sites, simulate, None)  # type: ignore[arg-type]  # it doesn't look at the plan


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


def sliced(path: str, tensor: QTensor, decisions: Decisions) -> QTensor:
    """A weight as a layer inside scans and vmaps has it: its layout without the axes that they have sliced off.

    Raises:
        UnsupportedError: what was sliced off isn't the first axes of the parameter, or not those of the packed data.
    """
    missing = len(tensor.layout.stack) - (tensor.data.ndim - 2)
    if not 0 <= missing <= len(tensor.layout.stack) or not leads(tensor.layout, missing):
        raise UnsupportedError(unsliceable(path, tensor.layout))
    layout = tensor.layout.sliced(missing)
    if tensor.data.shape[:-1] != (*(layout.atoms[i] for i in layout.stack), layout.n):
        raise UnsupportedError(unsliceable(path, tensor.layout))
    outer = next((d.outer for (p, _), d in decisions.items() if p == path), ())
    scale, kept = tensor.input_scale, max(len(outer) - missing, 0)
    if scale is not None and scale.ndim > kept:  # `sliceable` has repeated it
        scale = scale[(..., *(0,) * (scale.ndim - kept))]
    return tensor.replace(layout=layout, input_scale=scale)


def leads(layout: Layout, count: int) -> bool:
    """Are the first `count` stacked axes of the packed data the first axes of the parameter, in order?"""
    return all(atoms == [i] for atoms, i in zip(layout.axes()[:count], layout.stack[:count], strict=True))


def sliceable(tensor: QTensor) -> QTensor:
    """The same weight with the stacked axes in front of every leaf, as a vmap over them needs it."""
    scale, stack = tensor.input_scale, tensor.data.shape[:-2]
    if scale is None or scale.ndim >= len(stack):
        return tensor
    shape = (*scale.shape, *(1,) * (len(stack) - scale.ndim))
    return tensor.replace(input_scale=jax.numpy.broadcast_to(scale.reshape(shape), stack))


# ------------------------------------------------------------------------------------------------- refusals


INSTEAD = "use `qm(...)` or `jqopt.apply(plan)`, which handle any use of a parameter"


def unsliceable(path: str, layout: Layout) -> str:
    """Why a scan or vmap can't slice this weight."""
    axes = [layout.atoms[i] for i in layout.stack]
    found = f"its packed data [{', '.join(map(str, axes))}{', ' if axes else ''}n, k] has" if axes else "it has"
    return (
        f"{path}: a scan or vmap slices one axis off this weight of shape {layout.shape}, but {found} not this axis "
        "in front. Stack layers along axis 0 (`variable_axes={'params': 0}`) and give each its own input, or "
        f"{INSTEAD}."
    )


def used_raw(path: str, format: str, owner: str, instead: str) -> str:
    """Why a packed weight that the user's code reads itself can't be handled."""
    return f"{path}: {owner} reads this weight itself, and it is packed ({format}). Either {INSTEAD}, or {instead}."
