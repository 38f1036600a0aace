"""Transforms of parameter trees that the dataflow allows: axis classes pruned, permuted, rotated; scales, norms folded.

Each is made from a graph and gives a pure function `params -> params`. It takes what was traced (Linen's variables, a
function's tree, an NNX module or its state) and leaves it as it is.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jqopt import _leaves
from jqopt._rotate import Rotation, rotate, rotate_residual, rotate_values
from jqopt._trace import Graph
from jqopt.analysis.classes import AxisClass
from jqopt.analysis.folds import Absorber, Fold, NormGain, norm_gains
from jqopt.analysis.groups import Group
from jqopt.analysis.moves import Moves, checked_keep, checked_order, moves
from jqopt.errors import PlanError, TraceError

__all__ = [
    "NormFold",
    "Rotation",
    "Transform",
    "fold_norms",
    "fold_scale",
    "permute",
    "prune",
    "rotate",
    "rotate_residual",
    "rotate_values",
]

Transform = Callable[[Any], Any]


def prune(
    graph: Graph,
    cls: AxisClass | str | Mapping[str, Sequence[int] | np.ndarray],
    keep: Sequence[int] | np.ndarray | None = None,
) -> Transform:
    """Takes positions of an axis class out of every parameter that holds it.

    The result fits the same model built with the smaller width. It computes what the whole model computes with the
    other positions set to zero, where no statistic goes over the class (`cls.notes`) and what is contracted along it
    vanishes with its parameters (`relu(x @ w)` does, `exp(x @ w)` doesn't). Transforms of one graph can follow
    each other as long as they don't shorten one axis twice; for that, and to be short, give several classes at once.

    Args:
        cls: a class of `graph.classes`, its name, or the name of an axis that is one class (`mlp/up/kernel[1]`); or a
            mapping of such names to the positions that stay.
        keep: the positions that stay, as numbers or as booleans [cls.size]; left out with a mapping.

    Raises:
        PlanError: a class is pinned (the message says why), or `keep` doesn't name positions of it.
        TraceError: there is no such class.
    """
    asked = cls if isinstance(cls, Mapping) else {cls: keep}
    chosen: dict[str, np.ndarray] = {}
    for name, positions in asked.items():
        found = _class(graph, name)
        if positions is None or (keep is not None and isinstance(cls, Mapping)):
            raise PlanError(f"{found.name}: write prune(graph, class, keep), or prune(graph, {{class: keep, ...}})")
        if found.name in chosen:
            raise PlanError(f"{found.name} is named twice, the second time as {name}; say once what is kept of it")
        chosen[found.name] = checked_keep(found, positions)
    return _taking(graph, moves(graph.axes, chosen))


def permute(graph: Graph, cls: AxisClass | str, order: Sequence[int] | np.ndarray) -> Transform:
    """Rearranges an axis class in every parameter that holds it: position i becomes what `order[i]` was.

    The model computes the same function.

    Raises:
        PlanError: the class is pinned or its order matters (the message says why), or `order` is no permutation.
        TraceError: there is no such class.
    """
    found = _class(graph, cls)
    return _taking(graph, moves(graph.axes, {found.name: checked_order(found, order)}))


def _class(graph: Graph, cls: AxisClass | str) -> AxisClass:
    if isinstance(cls, str):
        return graph.class_of(cls)
    if cls not in graph.classes:
        raise TraceError(f"{cls.name} is no class of this graph of {graph.function.name}: take one of `graph.classes`")
    return cls


def _taking(graph: Graph, taken: Moves) -> Transform:
    def new(leaves: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _take(leaves[name], axes) for name, axes in taken.items()}

    return lambda params: _leaves.change(graph, params, new, taken)


def _take(leaf: Any, axes: Mapping[int, np.ndarray]) -> Any:
    for axis, positions in axes.items():
        leaf = np.take(leaf, positions, axis) if isinstance(leaf, np.ndarray) else jnp.take(leaf, positions, axis=axis)
    return leaf


# -------------------------------------------------------------------------------------------------- scales


def fold_scale(graph: Graph, group: Group | str, scale: Any) -> Transform:
    """Divides the input of a group by a scale for each channel and multiplies its weights: the same float function.

    What divides the input is a parameter before it: `graph.folds[group].describe()` says which.

    Args:
        group: a group of `graph.groups`, its name, or the key of one of its sites.
        scale: of the fold's shape, [*outer, k], positive. Where channels must have the same scale (one value head
            serves several query heads), `graph.folds[group].project(scale)` is the nearest that is allowed.

    Raises:
        PlanError: the group's scale can go nowhere (the message says why); the scale has another shape, isn't positive
            and finite, or differs over channels that must have the same one.
        TraceError: there is no such group.
    """
    fold = _fold(graph, group)
    numbers = _checked_scale(fold, scale)
    taken: dict[str, list[Absorber]] = {}
    for a in (*fold.absorbers, *fold.consumers):
        taken.setdefault(a.path, []).append(a)

    def new(leaves: Mapping[str, Any]) -> dict[str, Any]:
        return {
            path: functools.reduce(lambda leaf, a: _leaves.scaled(leaf, a, numbers), parts, leaves[path])
            for path, parts in taken.items()
        }

    return lambda params: _leaves.change(graph, params, new)


def _fold(graph: Graph, group: Group | str) -> Fold:
    name = group if isinstance(group, str) else group.name
    named = {s.key: g.name for g in graph.groups for s in g.sites}
    if name in named:
        return graph.folds[named[name]]
    near = difflib.get_close_matches(name, named, 3)
    raise TraceError(
        f"{graph.function.name} has no group {name!r}: a group is called by the key of a site in it, as "
        "`graph.groups` lists them" + (f". Did you mean {', '.join(near)}?" if near else "")
    )


def _checked_scale(fold: Fold, scale: Any) -> np.ndarray:
    if fold.reason:
        raise PlanError(
            f"{fold.group}: no parameter can take up a scale of its input: {fold.reason}. Leave this input unscaled"
        )
    found = fold.shaped(scale)
    bad = np.argwhere(~(np.isfinite(found) & (found > 0)))
    if bad.size:
        at = tuple(map(int, bad[0]))
        raise PlanError(
            f"{fold.group}: scales must be positive and finite, and {len(bad)} of {found.size} aren't: {found[at]} at "
            f"{list(at)}. Write 1 for a channel that should stay as it is"
        )
    if fold.ties is not None:
        flat, ties = found.ravel(), fold.ties.ravel()
        apart = np.flatnonzero(flat != flat[ties])
        if apart.size:
            one = ties[apart[0]]
            same = np.flatnonzero(ties == one)
            few = [list(map(int, np.unravel_index(i, fold.shape))) for i in same[:6]]
            names = ", ".join(str(c[0] if len(c) == 1 else c) for c in few) + (", ..." if same.size > 6 else "")
            raise PlanError(
                f"{fold.group}: channels {names} must have one scale, since {fold.describe()} holds them once; found "
                f"{flat[one]} and {flat[apart[0]]}. Write graph.folds[{fold.group!r}].project(scale): the nearest "
                "scale that is allowed"
            )
    return found


# --------------------------------------------------------------------------------------------------- norms


@dataclasses.dataclass(frozen=True, eq=False)
class NormFold:
    """A function `params -> params` that multiplies norm gains into the weights that read them."""

    graph: Graph = dataclasses.field(repr=False)
    folded: tuple[str, ...]  # paths of the gains that become one (zero, where the norm adds one)
    left: Mapping[str, str]  # path of a gain that stays -> why
    groups: tuple[str, ...] = dataclasses.field(repr=False)  # those whose folds are applied

    def __call__(self, params: Any) -> Any:
        def new(leaves: Mapping[str, Any]) -> dict[str, Any]:
            changed = dict(leaves)
            for name in self.groups:
                changed.update(_without_gain(self.graph.folds[name], changed))
            return {path: leaf for path, leaf in changed.items() if leaf is not leaves[path]}

        return _leaves.change(self.graph, params, new)


def fold_norms(graph: Graph) -> NormFold:
    """Multiplies the gain of every norm into the weights that read it: the gain becomes one, the function stays.

    A bias beside the gain is divided by it. A channel whose gain is 0 gets weights of 0; with a bias it stays as it
    is. Norms whose gain can't move stay too: `.left` says why.
    """
    left: dict[str, str] = {}
    chosen: list[str] = []
    done: dict[str, np.ndarray] = {}
    gains = norm_gains(graph.flow)
    for name, fold in graph.folds.items():
        gain = _pure_gain(fold)
        if gain is None or gain.path not in gains:
            continue
        here = np.broadcast_to(gain.labels >= 0, graph.parameters[gain.path].shape)
        before = done.get(gain.path, np.zeros(here.shape, bool))
        stuck = _immovable(fold, gain, graph.parameters[gain.path].shape)
        if stuck:
            left.setdefault(gain.path, stuck)
        elif not (here & before).any():
            chosen.append(name)
            done[gain.path] = here | before
    whole = tuple(p for p in gains if p in done and done[p].all())
    stay = {p: left.get(p) or _why_left(graph, g, p in done) for p, g in gains.items() if p not in whole}
    return NormFold(graph, whole, stay, tuple(chosen))


def _pure_gain(fold: Fold) -> Absorber | None:
    """The only gain that takes up a fold's scale, where nothing but biases takes it up too."""
    gains = [a for a in fold.absorbers if a.kind.endswith("gain") and a.power < 0]
    rest = [a for a in fold.absorbers if a.kind != "bias" or a.power > 0]
    return gains[0] if len(gains) == 1 and rest == gains else None


def _immovable(fold: Fold, gain: Absorber, shape: tuple[int, ...]) -> str:
    """Why a gain can't move, although a scale could; '' if it can."""
    if fold.positive:
        return f"only positive factors pass {fold.positive}, and a gain may be negative"
    labels = np.broadcast_to(gain.labels, shape)
    used = _tied(fold)[labels[labels >= 0]]
    return "" if np.unique(used).size == used.size else f"several entries scale one channel of {fold.group}"


def _tied(fold: Fold) -> np.ndarray:
    """The channel that stands for each channel."""
    return np.arange(int(np.prod(fold.shape))) if fold.ties is None else fold.ties.ravel()


def _why_left(graph: Graph, gain: NormGain, partly: bool) -> str:
    if partly:
        return "only a part of it is read by weights"
    named = {s.address: g.name for g in graph.groups for s in g.sites}
    for fold in (graph.folds[named[a]] for a in gain.readers if a in named):
        return fold.reason or f"the scale of {fold.group} goes to {fold.describe()}"
    return gain.other or "no weight reads it"


def _without_gain(fold: Fold, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a fold whose gain is taken as the scale."""
    gain = _pure_gain(fold)
    assert gain is not None
    value = jnp.asarray(leaves[gain.path])
    ties = _tied(fold)
    wide = _leaves.wide(value)
    labels = np.broadcast_to(gain.labels, value.shape)
    whole = wide + jnp.asarray(gain.offset, wide.dtype)
    scale = jnp.ones(ties.size, wide.dtype).at[ties[labels[labels >= 0]]].set(whole[labels >= 0])
    stays = ~jnp.isfinite(scale)
    for a in fold.absorbers:
        if a.kind == "bias":  # where it can't be divided by the gain, the channel stays as it is
            bias = jnp.asarray(leaves[a.path])
            at = np.broadcast_to(a.labels, bias.shape)
            quotient = (bias.astype(wide.dtype) / scale[ties[np.maximum(at, 0)]]).astype(bias.dtype)
            stays = stays.at[ties[at[at >= 0]]].max(~jnp.isfinite(quotient)[at >= 0])
    scale = jnp.where(stays, jnp.ones_like(scale), scale)[ties]
    moved = (labels >= 0) & ~stays[ties[np.maximum(labels, 0)]]
    out = {gain.path: jnp.where(moved, jnp.asarray(1 - gain.offset, wide.dtype), wide).astype(value.dtype)}
    for a in (*fold.absorbers, *fold.consumers):
        if a is not gain:
            out[a.path] = _leaves.scaled(out.get(a.path, leaves[a.path]), a, scale)
    return out
