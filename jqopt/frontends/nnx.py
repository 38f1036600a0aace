"""Flax NNX: a module as a function of its state, and replacement of its layers by quantized ones."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
from flax import nnx

from jqopt._trace import Function
from jqopt.errors import TraceError
from jqopt.frontends import path_name


def function_of(model: nnx.Module, params: Any = None) -> Function:
    """An NNX module as a function of {"params": its nnx.Param state, "state": everything else}.

    The pure function returns the module's output; what the call writes to its state (batch statistics, caches) is
    dropped. `jqopt.nnx.quantize(model, qm)` gives a module that keeps its state as nnx does.

    Raises:
        TraceError: params were given: an NNX module holds its own.
    """
    if params is not None:
        raise TraceError(
            f"{type(model).__name__} is an NNX module and holds its own parameters: write jqopt.trace(model, *inputs)"
        )
    graphdef, weights, rest = nnx.split(model, nnx.Param, ...)

    def call(tree: Any, *inputs: Any, **kwargs: Any) -> Any:
        return nnx.merge(graphdef, tree["params"], tree["state"])(*inputs, **kwargs)

    classes = {"/".join(map(str, p)): type(m).__name__ for p, m in nnx.iter_modules(model)}
    tree = {"params": weights, "state": rest}
    watch = functools.partial(contextlib.nullcontext, classes)
    return Function(call, tree, path_of, watch, "nnx", type(model).__name__)


def path_of(key: tuple) -> str | None:
    """`("params", "q", "kernel", .value)` -> `q/kernel`; None for other state."""
    collection, *rest = key
    if collection.key != "params":
        return None
    if rest and isinstance(rest[-1], jax.tree_util.GetAttrKey):
        rest = rest[:-1]
    return path_name(tuple(rest))
