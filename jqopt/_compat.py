"""What is private in JAX, or differs between its releases: the one place that knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax._src import config as jax_config
from jax.core import ShapedArray


def varying(x: Any) -> frozenset[str]:
    """The axes of a shard_map over which a value differs from device to device; none outside of one."""
    aval: Any = x if isinstance(x, ShapedArray) else jax.typeof(x)
    found = getattr(aval, "manual_axis_type", None)  # before JAX 0.10: `vma`
    return frozenset(found.varying if found is not None else getattr(aval, "vma", ()))


def vary(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """x as a value that differs over these axes of a shard_map too."""
    missing = tuple(a for a in axes if a not in varying(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def aval(shape: tuple[int, ...], dtype: Any, weak_type: bool = False) -> ShapedArray:
    """The type of an array that lies nowhere in particular."""
    return ShapedArray(shape, dtype, weak_type)


def settings() -> Any:
    """Whatever of JAX's state a trace depends on (mesh, x64, precision, ...), as jax.jit knows it; hashable.

    Where JAX does not say, a value that equals no other.
    """
    context = getattr(jax_config, "trace_context", None)
    return object() if context is None else context()


def scan_sizes(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many operands of a scan's equation are constants, and how many after them are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # from JAX 0.12 on: a tree of the three
    return len(list(consts)), len(list(carry))
