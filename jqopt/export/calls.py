"""The inputs of an exported program: a name for each, and names and bounds for those of their axes that may vary."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export as jax_export

from jqopt import _stage
from jqopt._calibrate import as_call
from jqopt.errors import UnsupportedError
from jqopt.export.artifact import Input

Bounds = int | tuple[int, int]
"""Sizes of an axis: one, or the least and the most."""

DIMS: dict[str, Bounds] = {"batch": (1, 8), "length": (1, 512)}
"""Bounds where none are given."""


class Call(NamedTuple):
    """The call that is exported: its arrays with their axes, and how arguments come from them."""

    inputs: list[Input]
    dims: dict[str, tuple[int, int]]
    rebuild: Callable[[list], Any]


def given(batch: Bounds | None, length: Bounds | None, dims: Mapping[str, Bounds]) -> dict[str, Bounds]:
    """{name: bounds} of what was asked for.

    Raises:
        UnsupportedError: no size from 1 on, or no (least, most).
    """
    both = {"batch": batch, "length": length}
    found = {**{n: b for n, b in both.items() if b is not None}, **dims}
    for name, bounds in found.items():
        pair = (bounds, bounds) if isinstance(bounds, int) else tuple(bounds)
        sizes = len(pair) == 2 and all(type(x) is int for x in pair)
        if not name.isidentifier() or not sizes or not 1 <= pair[0] <= pair[1]:
            raise UnsupportedError(f"{name}={bounds!r}: expected a size from 1 on, or (least, most)")
    return found


def call_of(qm: Any, inputs: Any, axes: Mapping[str, Sequence[Any]], asked: Mapping[str, Bounds]) -> Call:
    """The call of a model with names for its inputs, and names and bounds for their axes.

    Args:
        inputs: one batch of arrays or shapes; None: what the model was quantized with.
        axes: {input: a name, a size or None for each axis}. `asked`: {name: bounds}, as `given` returns.

    Raises:
        UnsupportedError: the inputs are unknown, or `axes` and bounds don't fit them.
    """
    known = {**DIMS, **asked}
    call = as_call(inputs, {}) if inputs is not None else getattr(qm, "inputs", None)
    if call is None:
        raise UnsupportedError("nothing says what the model takes: pass inputs=, one batch of arrays or shapes")
    arrays, rebuild, _ = _stage.split_static(call)
    names = _names(qm.model, call)
    if unknown := sorted(set(axes) - set(names)):
        raise UnsupportedError(f"axes={{{unknown[0]!r}: ...}}: no such input; there are {', '.join(names)}")
    found = [_input(n, x, axes.get(n), known) for n, x in zip(names, arrays, strict=True)]
    used = {axis for x in found for axis in x.shape if isinstance(axis, str)}
    if idle := sorted(set(asked) - used):
        raise UnsupportedError(
            f"{idle[0]}={asked[idle[0]]!r}: no axis is called so. Inputs: {_listed(found)}. Name them with "
            "axes={input: (name, size or None, ...)}"
        )
    bounds = {n: b if isinstance(b := known[n], tuple) else (b, b) for n in sorted(used)}
    fixed = {n: b[0] for n, b in bounds.items() if b[0] == b[1]}
    still = [
        x.model_copy(update={"shape": [fixed.get(a, a) if isinstance(a, str) else a for a in x.shape]}) for x in found
    ]
    return Call(still, {n: (int(b[0]), int(b[1])) for n, b in bounds.items() if n not in fixed}, rebuild)


def _input(name: str, x: Any, asked: Sequence[Any] | None, bounds: Mapping[str, Bounds]) -> Input:
    shape: tuple[int, ...] = tuple(x.shape)
    if asked is None:
        tokens = len(shape) == 2 and jnp.issubdtype(x.dtype, jnp.integer)
        asked = ("batch", "length") if tokens else ("batch", *shape[1:]) if shape else ()
    if len(asked) != len(shape):
        raise UnsupportedError(f"axes: {name} has {len(shape)} axes, {list(shape)}; found {list(asked)}")
    if missing := [a for a in asked if isinstance(a, str) and a not in bounds]:
        raise UnsupportedError(
            f"axes: {name} has an axis {missing[0]!r} without bounds; write dims={{{missing[0]!r}: (1, 8)}}"
        )
    return Input(
        name=name, dtype=str(x.dtype), shape=[s if a is None else a for a, s in zip(asked, shape, strict=True)]
    )


def _names(model: Any, call: tuple[tuple, dict]) -> list[str]:
    """A name for each array of a call: its parameter's, with a path where that holds several."""
    names = _parameters(model)
    flat, _ = jax.tree_util.tree_flatten_with_path(call)
    found = []
    for key, x in flat:
        if hasattr(x, "dtype") and hasattr(x, "shape"):
            place, first, *rest = (jax.tree_util.keystr((k,), simple=True) for k in key)
            name = first if place == "1" else names[int(first)] if int(first) < len(names) else f"input_{first}"
            found.append("/".join([name, *rest]))
    return found


def _parameters(model: Any) -> list[str]:
    """The names of the positional inputs of a Linen module, an NNX module, or a function of (params, *inputs)."""
    call = model if inspect.isfunction(model) else type(model).__call__  # the first parameter is params, or self
    try:
        found = list(inspect.signature(call).parameters.values())[1:]
    except (TypeError, ValueError):
        return []
    return [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _listed(inputs: Sequence[Input]) -> str:
    return ", ".join(f"{x.name} {x.dtype}{x.shape}" for x in inputs)


def symbolic(call: Call) -> list[jax.ShapeDtypeStruct]:
    """Shapes of the inputs, in one scope of symbols with their bounds."""
    scope = jax_export.SymbolicScope([f for n, (a, b) in call.dims.items() for f in (f"{n} >= {a}", f"{n} <= {b}")])
    made = [jax_export.symbolic_shape(",".join(map(str, x.shape)), scope=scope) for x in call.inputs]
    return [jax.ShapeDtypeStruct(shape, jnp.dtype(x.dtype)) for shape, x in zip(made, call.inputs, strict=True)]
