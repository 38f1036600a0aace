"""Views: how an array inside a jaxpr is a rearrangement (reshape, transpose, slice, cast) of one parameter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Atom(NamedTuple):
    """A factor of one parameter axis: positions `start .. start + size` of the factor with this stride.

    `stride` counts elements along the parameter's own axis; `full` is the factor's size before slicing.
    """

    axis: int
    stride: int
    size: int
    start: int = 0
    full: int = 0

    @property
    def whole(self) -> Atom:
        """The same factor before slicing."""
        return Atom(self.axis, self.stride, self.full, 0, self.full)

    @property
    def is_whole(self) -> bool:
        return self.size == self.full


@dataclasses.dataclass(frozen=True)
class View:
    """An array of shape `shape` whose elements are elements of the parameter at `path`, rearranged.

    `axes` lists, for every axis of the array, the atoms it runs through, outermost first. `scanned` are the
    atoms that enclosing scans iterate over, `fixed` those at which one position was picked (`w[3]`).
    """

    path: str
    origin: tuple[int, ...]  # the parameter's shape
    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[tuple[Atom, ...], ...]
    scanned: tuple[Atom, ...] = ()
    fixed: tuple[Atom, ...] = ()
    scans: tuple[tuple[int, ...], ...] = ()  # addresses of those scans, outermost first

    def atoms(self) -> tuple[Atom, ...]:
        """Every atom of the parameter, in the parameter's own (row-major) order, slices undone."""
        found = {a.whole for axis in self.axes for a in axis} | {a.whole for a in (*self.scanned, *self.fixed)}
        found |= {Atom(i, 1, 1, 0, 1) for i, n in enumerate(self.origin) if n == 1}
        return tuple(sorted(found, key=lambda a: (a.axis, -a.stride)))

    def materialize(self, parameter: jax.Array) -> jax.Array:
        """The array itself. `parameter` has the parameter's shape without the scanned axes."""
        scanned = {a.axis for a in self.scanned}
        atoms = [a for a in self.atoms() if a.axis not in scanned]
        out = parameter.reshape([a.size for a in atoms])
        cut = {a.whole: a for axis in (*self.axes, self.fixed) for a in axis}
        for i, atom in enumerate(atoms):
            used = cut[atom]
            if not used.is_whole:
                out = jax.lax.slice_in_dim(out, used.start, used.start + used.size, axis=i)
        order = [atoms.index(a.whole) for axis in (*self.axes, self.fixed) for a in axis]
        order += [i for i in range(len(atoms)) if i not in order]
        return out.transpose(order).reshape(self.shape).astype(self.dtype)


def whole(path: str, shape: Sequence[int], dtype) -> View:
    """The parameter itself as a view."""
    axes = tuple((Atom(i, 1, n, 0, n),) for i, n in enumerate(shape))
    return View(path, tuple(shape), tuple(shape), np.dtype(dtype), axes)


def _split(atom: Atom, outer: int) -> tuple[Atom, Atom] | None:
    if not atom.is_whole or atom.size % outer:
        return None
    inner = atom.size // outer
    return (
        Atom(atom.axis, atom.stride * inner, outer, 0, outer),
        Atom(atom.axis, atom.stride, inner, 0, inner),
    )


def reshape(view: View, shape: Sequence[int]) -> View | None:
    """Regroups the atoms to `shape`, splitting them where needed; None if the sizes don't factor."""
    todo = [a for axis in view.axes for a in axis if a.size > 1]
    picked = tuple(a for axis in view.axes for a in axis if a.size == 1 < a.full)
    axes = []
    for n in shape:
        axis, left = [], n
        while left > 1:
            if not todo:
                return None
            atom = todo.pop(0)
            if left % atom.size:
                parts = _split(atom, left)
                if parts is None:
                    return None
                atom, rest = parts
                todo.insert(0, rest)
            axis.append(atom)
            left //= atom.size
        axes.append(tuple(axis))
    if todo:
        return None
    return dataclasses.replace(view, shape=tuple(shape), axes=tuple(axes), fixed=(*view.fixed, *picked))


def transpose(view: View, order: Sequence[int]) -> View:
    return dataclasses.replace(view, shape=tuple(view.shape[i] for i in order), axes=tuple(view.axes[i] for i in order))


def slice_axis(view: View, axis: int, start: int, size: int) -> View | None:
    """Positions `start .. start + size` of one axis; None if they don't align with the axis' factors."""
    if size == view.shape[axis]:
        return view
    if size == 0 or not view.axes[axis]:
        return None
    first, *rest = view.axes[axis]
    inner = math.prod(a.size for a in rest)
    if start % inner or size % inner:
        return None
    cut = first._replace(start=first.start + start // inner, size=size // inner)
    shape = (*view.shape[:axis], size, *view.shape[axis + 1 :])
    return dataclasses.replace(view, shape=shape, axes=(*view.axes[:axis], (cut, *rest), *view.axes[axis + 1 :]))


def drop(view: View, dims: Sequence[int]) -> View:
    """Removes axes of length one; a position picked from a longer axis is remembered in `fixed`."""
    fixed = tuple(a for d in dims for a in view.axes[d] if a.full > 1)
    keep = [i for i in range(len(view.shape)) if i not in set(dims)]
    out = transpose(view, keep)
    return dataclasses.replace(out, fixed=(*view.fixed, *fixed))


def scan_over(view: View) -> View | None:
    """What a scan body sees of a view that the scan iterates over; None if axis 0 is no axis of the parameter."""
    if len(view.axes[0]) != 1 or not view.axes[0][0].is_whole:
        return None
    atom = view.axes[0][0]
    if atom.stride != 1 or any(a.axis == atom.axis for axis in view.axes[1:] for a in axis):
        return None
    return dataclasses.replace(view, shape=view.shape[1:], axes=view.axes[1:], scanned=(*view.scanned, atom))


SAME = frozenset(
    {"copy", "copy_p", "sharding_constraint", "optimization_barrier", "name", "mesh_cast", "reshard"}
    | {"pvary", "pcast", "device_put", "reduce_precision", "stop_gradient"}
)
"""Primitives whose outputs are their inputs, one for one."""


def through(name: str, params: dict, views: Sequence[View | None], out_avals: Sequence) -> list[View | None]:
    """The views that one equation hands on, given its operands' views (None: not a view of a parameter)."""
    none: list[View | None] = [None] * len(out_avals)
    if name in SAME:
        return list(views[: len(out_avals)])
    view = views[0]
    if view is None:
        return none
    if name == "convert_element_type":
        if jnp.issubdtype(view.dtype, jnp.floating) and jnp.issubdtype(params["new_dtype"], jnp.floating):
            return [dataclasses.replace(view, dtype=np.dtype(params["new_dtype"]))]
        return none
    if name == "transpose":
        return [transpose(view, params["permutation"])]
    if name == "reshape":
        return [reshape(view, out_avals[0].shape) if params.get("dimensions") is None else None]
    if name == "squeeze":
        return [drop(view, [d % len(view.shape) for d in params["dimensions"]])]
    if name in ("broadcast_in_dim", "expand_dims"):
        same = math.prod(view.shape) == math.prod(out_avals[0].shape)
        ordered = list(params.get("broadcast_dimensions", ())) == sorted(params.get("broadcast_dimensions", ()))
        return [reshape(view, out_avals[0].shape) if same and ordered else None]
    if name == "slice":
        return [_slice(view, params)]
    if name == "split":
        return _pieces(view, params["axis"], params["sizes"])
    return none


def _slice(view: View, params: dict) -> View | None:
    if params["strides"] is not None and any(s != 1 for s in params["strides"]):
        return None
    out: View | None = view
    for axis, (start, limit) in enumerate(zip(params["start_indices"], params["limit_indices"], strict=True)):
        out = None if out is None else slice_axis(out, axis, start, limit - start)
    return out


def _pieces(view: View, axis: int, sizes: Sequence[int]) -> list[View | None]:
    starts = np.cumsum([0, *sizes])[:-1]
    return [slice_axis(view, axis, int(s), n) for s, n in zip(starts, sizes, strict=True)]


def common_refinement(left: Sequence[Atom], right: Sequence[Atom]) -> dict[Atom, tuple[Atom, ...]] | None:
    """Splits two tilings of the same axes until both use the same atoms: {atom: its parts, outermost first}.

    None if some boundary of one falls inside an atom of the other in a way that doesn't divide.
    """
    parts: dict[Atom, tuple[Atom, ...]] = {}
    for atom in {*left, *right}:
        span = atom.stride * atom.size
        cuts = {a.stride for a in (*left, *right) if a.axis == atom.axis and atom.stride <= a.stride < span}
        strides = sorted(cuts | {atom.stride}, reverse=True)
        sizes = [o // i for o, i in zip([span, *strides], strides, strict=False)]
        exact = all(o % i == 0 for o, i in zip([span, *strides], strides, strict=False))
        if not exact:
            return None
        found = (Atom(atom.axis, s, n, 0, n) for s, n in zip(strides, sizes, strict=True))
        parts[atom] = tuple(a for a in found if a.size > 1)
    return parts


def shard(view: View, shape: Sequence[int]) -> View | None:
    """The view of the part of the parameter that one device holds, when `shape` is the part's shape."""
    axes, origin = [], list(view.origin)
    for axis, old, new in zip(view.axes, view.shape, shape, strict=True):
        if old == new:
            axes.append(axis)
            continue
        first, *rest = axis
        times = old // new
        outermost = first.is_whole and first.stride * first.size == view.origin[first.axis]
        if old % new or not outermost or first.size % times:
            return None
        origin[first.axis] //= times
        size = first.size // times
        axes.append((Atom(first.axis, first.stride, size, 0, size), *rest))
    return dataclasses.replace(view, origin=tuple(origin), shape=tuple(shape), axes=tuple(axes))
