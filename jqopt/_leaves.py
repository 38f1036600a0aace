"""Leaves of a parameter tree by name: reads what a user passes as `params`, gives the same kind back; scales leaves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqopt._trace import Graph
from jqopt.analysis.folds import Absorber
from jqopt.errors import PlanError


def change(
    graph: Graph,
    params: Any,
    new: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    touched: Mapping[str, Collection[int]] | None = None,
) -> Any:
    """The tree with the leaves that `new` gives, by name, in place of the old ones.

    Args:
        params: what was traced: Linen's variables, a function's tree of parameters, an NNX module or its state.
        new: {name: leaf} of the whole tree -> {name: leaf} of those that change.
        touched: {name: axes} that must be as long as they were traced (None: all axes of all leaves); others may have
            been pruned since.

    Returns:
        The same kind of tree; of an NNX module its state, for `nnx.update(module, state)`.

    Raises:
        PlanError: it isn't the tree that was traced.
    """
    flat, treedef = jax.tree.flatten(graph.function.tree(params))
    names = [leaf[1] for leaf in graph.leaves if leaf is not None]
    if len(flat) != len(names):
        raise PlanError(
            f"the tree holds {len(flat)} arrays, {graph.function.name} was traced with {len(names)}; pass what was "
            "traced (for Linen the whole variables, `{'params': ...}`)"
        )
    found = dict(zip(names, flat, strict=True))
    for value in graph.flow.leaves:
        now, axes = (
            tuple(found[value.name].shape),
            range(value.ndim) if touched is None else touched.get(value.name, ()),
        )
        if len(now) != value.ndim or any(now[i] != value.shape[i] for i in axes):
            raise PlanError(
                f"{value.name}: found {list(now)}, {graph.function.name} was traced with {list(value.shape)}"
            )
    changed = new(found)
    return graph.function.untree(treedef.unflatten([changed.get(name, leaf) for name, leaf in found.items()]))


def scaled(leaf: Any, absorber: Absorber, scale: Any) -> jax.Array:
    """The parameter with the scale taken up, computed in float32 at least."""
    before = wide(leaf)
    labels = np.maximum(absorber.labels, 0)
    factor = jnp.asarray(scale).reshape(-1)[labels].astype(before.dtype)
    offset = jnp.asarray(absorber.offset, before.dtype)
    moved = before + offset if absorber.offset else before
    moved = moved * factor if absorber.power > 0 else moved / factor
    moved = moved - offset if absorber.offset else moved
    touched = absorber.labels >= 0
    return (moved if touched.all() else jnp.where(touched, moved, before)).astype(leaf.dtype)


def wide(leaf: Any) -> jax.Array:
    """The same in float32, or in what it is where that is wider."""
    return jnp.asarray(leaf).astype(leaf.dtype if leaf.dtype.itemsize > 4 else jnp.float32)
