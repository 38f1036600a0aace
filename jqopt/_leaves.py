"""Leaves of a parameter tree by name: reads what a user passes as `params`, and gives the same kind of thing back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from jqopt._trace import Graph
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
