"""Flax Linen: a module as a function of its variables, and native interception of its layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn

from jqopt._trace import Function
from jqopt.errors import TraceError
from jqopt.frontends import path_name


def function_of(model: nn.Module, variables: Any) -> Function:
    """A Linen module as `apply(variables, *inputs, **kwargs)`; only the collection `params` holds parameters.

    Raises:
        TraceError: `variables` isn't the whole dict that `model.init` returns.
    """
    if not isinstance(variables, Mapping) or "params" not in variables:
        found = list(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise TraceError(
            f"{type(model).__name__}: expected the whole variables dict that init returns, with a 'params' "
            f"collection; found {found}. Write {{'params': params}}."
        )

    def call(variables: Any, *inputs: Any, **kwargs: Any) -> Any:
        return model.apply(variables, *inputs, **kwargs)

    return Function(call, variables, path_of, watch, "linen", type(model).__name__)


def path_of(key: tuple) -> str | None:
    """`('params', 'q', 'kernel')` -> `q/kernel`; None for other collections. The box of `nn.Partitioned` is skipped."""
    collection, *rest = key
    if getattr(collection, "key", None) != "params":
        return None
    if rest and isinstance(rest[-1], jax.tree_util.GetAttrKey):
        rest = rest[:-1]
    return path_name(tuple(rest))


@contextlib.contextmanager
def watch() -> Iterator[dict[str, str]]:
    """While active, notes the class of every module that is called: {module path: class name}."""
    modules: dict[str, str] = {}

    def note(call: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        modules.setdefault("/".join(context.module.path), type(context.module).__name__)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        yield modules
