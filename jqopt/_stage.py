"""A model as a function of its parameters, and its program at given shapes; one that was made is made once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jqopt import _compat, _view
from jqopt._view import View


class Function(NamedTuple):
    """What every frontend makes of a model: a function of a parameter tree, and names for its leaves."""

    call: Callable[..., Any]  # call(params, *inputs, **kwargs)
    params: Any  # the tree of arrays or shapes
    path_of: Callable[[tuple], str | None]  # key path of a leaf -> parameter path; None: not a parameter
    watch: Callable[[], AbstractContextManager[Mapping[str, str]]]  # while tracing: module path -> class name
    kind: str  # linen | nnx | function
    name: str
    tree: Callable[[Any], Any] = lambda params: params  # what a user passes as `params` -> the tree
    untree: Callable[[Any], Any] = lambda tree: tree  # the tree -> what a user gets back


def split_static(tree: Any) -> tuple[list, Callable[[list], Any], Any]:
    """(arrays, rebuild, key): the array leaves, how to put them back, and a hashable key of all that is static."""
    leaves, treedef = jax.tree.flatten(tree)
    dynamic = [hasattr(x, "dtype") and hasattr(x, "shape") for x in leaves]
    arrays = [x for x, d in zip(leaves, dynamic, strict=True) if d]
    still = tuple(None if d else x for x, d in zip(leaves, dynamic, strict=True))

    def rebuild(arrays: list) -> Any:
        left = iter(arrays)
        return treedef.unflatten([next(left) if d else s for s, d in zip(still, dynamic, strict=True)])

    return arrays, rebuild, (treedef, tuple(dynamic), tuple(map(_static_key, still)))


def _static_key(value: Any) -> tuple:
    """Tells static values apart: 1, 1.0 and True, 0.0 and -0.0; what can't be hashed by its identity."""
    try:
        hash(value)
    except TypeError:
        return (type(value), id(value))  # `rebuild` keeps it alive, so that its id stays its own
    return (type(value), repr(value)) if isinstance(value, float) else (type(value), value)


def parameter_path(function: Function, key: tuple, leaf: Any) -> str | None:
    """The path of a leaf that is a parameter; None for other collections, Python numbers and random keys."""
    dtype = getattr(leaf, "dtype", None)
    if getattr(leaf, "weak_type", False):  # a Python number that jit has made an array
        return None
    if dtype is None or (not isinstance(dtype, str) and jnp.issubdtype(dtype, jax.dtypes.extended)):
        return None
    return function.path_of(key)


def stage(
    function: Function, params: Any, inputs: tuple, kwargs: dict, *, anew: bool = False
) -> tuple[Any, Any, list[View | None]]:
    """(closed jaxpr, output tree, a View or None for each invar) of the model at these shapes.

    As `jax.jit` does, it takes the model for a pure function of its arguments, and traces it once for each kind of
    them: shapes and dtypes, static values, and JAX's own settings (mesh, precision, x64). `anew` traces it again.
    """
    arrays, rebuild, still = split_static((inputs, kwargs))

    def call(params: Any, arrays: list) -> Any:
        args, keywords = rebuild(arrays)
        return function.call(params, *args, **keywords)

    closed, out = _kept(function.call, (params, arrays), still, lambda: _program(call, params, arrays), anew)
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    rest = len(closed.in_avals) - len(flat)
    views: list[View | None] = [
        None if (p := parameter_path(function, path, leaf)) is None else _view.whole(p, leaf.shape, leaf.dtype)
        for path, leaf in flat
    ]
    return closed, out, [*views, *([None] * rest)]


def _program(call: Callable, params: Any, arrays: list) -> tuple[Any, Any]:
    return jax.make_jaxpr(call, return_shape=True)(*jax.tree.map(_held, (params, arrays)))


def _held(leaf: Any) -> Any:
    """A shape with the dtype that JAX will hold it in: without x64 an int64 becomes an int32 (since 0.12 it warns)."""
    if not isinstance(leaf, jax.ShapeDtypeStruct) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return leaf
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    return leaf if dtype == leaf.dtype else leaf.update(dtype=dtype)


_MOST = 8  # programs kept of one model: a prompt's and a token's shapes, in training and in evaluation
_programs: weakref.WeakKeyDictionary[Any, dict[Any, tuple[Any, Any]]] = weakref.WeakKeyDictionary()


def _kept(
    call: Callable, arguments: Any, still: Any, make: Callable[[], tuple[Any, Any]], anew: bool
) -> tuple[Any, Any]:
    """What `make` gives, or, unless `anew`, gave before for the same kind of arguments under the same settings."""
    leaves, tree = jax.tree.flatten(arguments)
    key = (tree, tuple(map(_kind, leaves)), still, _compat.settings())
    try:
        hash(key)
        known = _programs.setdefault(call, {})
    except TypeError:  # a leaf that is no array, or a model that can't be referred to weakly
        return make()
    if key in known and not anew:
        known[key] = known.pop(key)  # the latest used stands last
        return known[key]
    made = make()
    if not any(isinstance(c, Tracer) for c in made[0].consts):  # which would outlive its own trace
        known[key] = made
        for oldest in [*known][:-_MOST]:
            del known[oldest]
    return made


def _kind(leaf: Any) -> Any:
    """What tracing sees of an argument: its type, be it an array, a tracer or a shape."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf if leaf.sharding is not None else _compat.aval(leaf.shape, leaf.dtype, leaf.weak_type)
    return jax.typeof(leaf)
