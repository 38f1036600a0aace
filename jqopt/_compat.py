"""What is private in JAX, or differs between its releases: the one place that knows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
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
