"""Frontends: Flax Linen, Flax NNX and plain functions as functions of a parameter tree, and back."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as flax_linen
from flax import nnx as flax_nnx

from jqopt._stage import Function
from jqopt.errors import TraceError


def function_of(model: Any, params: Any) -> Function:
    """What tracing needs of a model.

    Args:
        model: a Linen module (params: its whole variables dict), an NNX module (params: None), or a function whose
            first argument is a tree of parameters.

    Raises:
        TraceError: params are missing, or aren't what this kind of model takes.
    """
    from jqopt.frontends import linen, nnx

    if isinstance(model, flax_linen.Module):
        return linen.function_of(model, params)
    if isinstance(model, flax_nnx.Module):
        return nnx.function_of(model, params)
    if isinstance(model, type) and issubclass(model, flax_linen.Module | flax_nnx.Module):
        raise TraceError(f"found the class {model.__name__}, expected an instance of it: write {model.__name__}(...)")
    if callable(model):
        return _plain(model, params)
    raise TraceError(
        "expected a Flax Linen module, a Flax NNX module or a function of (params, *inputs), "
        f"found {type(model).__name__}"
    )


def _plain(fn: Callable[..., Any], params: Any) -> Function:
    if params is None:
        raise TraceError("a function needs its parameter tree: write jqopt.trace(fn, params, *inputs)")
    if not jax.tree.leaves(params):
        raise TraceError(f"the parameter tree of {_name(fn)} holds no array")
    return Function(fn, params, path_name, functools.partial(contextlib.nullcontext, {}), "function", _name(fn))


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def path_name(key: tuple) -> str:
    """A key path as recipes spell it: `layers/0/q/kernel`."""
    return jax.tree_util.keystr(key, simple=True, separator="/")
