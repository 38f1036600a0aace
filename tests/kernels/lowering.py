"""Lowering for CUDA on a machine without one: since JAX 0.11 Pallas wants to be told for which GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax

HOPPER = "NVIDIA H100 80GB HBM3"
NEEDS_DEVICE = tuple(int(part) for part in jax.__version__.split(".")[:2]) >= (0, 11)


def hopper() -> contextlib.AbstractContextManager:
    """The context in which Pallas lowers for an H100."""
    if not NEEDS_DEVICE:
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(HOPPER, None, "gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def for_cuda(function: Callable[..., Any], *arrays: Any) -> Any:
    """The function of these arrays (or their shapes), traced and lowered."""
    with hopper():
        return jax.jit(lambda *args: function(*args)).trace(*arrays).lower(lowering_platforms=("cuda",))
