"""Transforms of parameter trees that the dataflow allows: prune and permute axis classes, fold scales and norms.

Each is made from a graph and gives a pure function `params -> params`. It takes what was traced (Linen's variables, a
function's tree, an NNX module or its state) and leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jqopt import _leaves
from jqopt._trace import Graph
from jqopt.analysis.classes import AxisClass
from jqopt.analysis.moves import Moves, checked_keep, checked_order, moves

Transform = Callable[[Any], Any]


def prune(graph: Graph, cls: AxisClass | str, keep: Sequence[int] | np.ndarray) -> Transform:
    """Takes positions of an axis class out of every parameter that holds it.

    The result fits the same model built with the smaller width. Where no statistic goes over the class (`cls.notes`),
    it computes what the whole model computes with the other positions set to zero.

    Args:
        cls: a class of `graph.classes`, its name, or the name of an axis that is one class (`mlp/up/kernel[1]`).
        keep: the positions that stay, as numbers or as booleans [cls.size].

    Raises:
        PlanError: the class is pinned (the message says why), or `keep` doesn't name positions of it.
        TraceError: there is no such class.
    """
    found = _class(graph, cls)
    return _taking(graph, moves(graph.axes, found, checked_keep(found, keep)))


def permute(graph: Graph, cls: AxisClass | str, order: Sequence[int] | np.ndarray) -> Transform:
    """Rearranges an axis class in every parameter that holds it: position i becomes what `order[i]` was.

    The model computes the same function.

    Raises:
        PlanError: the class is pinned or its order matters (the message says why), or `order` is no permutation.
        TraceError: there is no such class.
    """
    found = _class(graph, cls)
    return _taking(graph, moves(graph.axes, found, checked_order(found, order)))


def _class(graph: Graph, cls: AxisClass | str) -> AxisClass:
    return graph.class_of(cls) if isinstance(cls, str) else cls


def _taking(graph: Graph, taken: Moves) -> Transform:
    def new(leaves: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _take(leaves[name], axes) for name, axes in taken.items()}

    return lambda params: _leaves.change(graph, params, new)


def _take(leaf: Any, axes: Mapping[int, np.ndarray]) -> Any:
    for axis, positions in axes.items():
        leaf = jnp.take(leaf, positions, axis=axis)
    return leaf
