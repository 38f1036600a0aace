"""The one door to jax-triton: whether it is there, and one launch of a kernel of `MODULES`.

jax-triton 0.3 and 0.4 differ in names, in how they read Python floats and in when they look for a GPU. What is written
here holds for both: operands by position, the output last, sizes as compile-time constants, no float scalars.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any, NamedTuple

import jax

NEEDED = "pip install 'jqopt[cuda]'"
MODULES = ("triton_code", "triton_words")


class Launch(NamedTuple):
    """One launch, as data: tests compile and interpret the same that jax-triton is given.

    kernel: name of a function in `MODULES`; operands: its first arguments, arrays or ints; out: what it writes, as
    its next argument; constants: all its other arguments, compile-time constants.
    """

    kernel: str
    operands: tuple[Any, ...]
    out: jax.ShapeDtypeStruct
    grid: tuple[int, int]
    constants: dict[str, Any]
    warps: int
    stages: int


@functools.cache
def missing() -> str | None:
    """Why jax-triton cannot be used in this process, or None."""
    try:
        importlib.import_module("triton")
        jax_triton = importlib.import_module("jax_triton")
    except Exception as error:  # ImportError, and whatever a version that fits another JAX raises
        return f"jax-triton cannot be imported ({error}); {NEEDED}"
    return None if hasattr(jax_triton, "triton_call") else f"this jax_triton has no triton_call; {NEEDED}"


def source(kernel: str) -> Any:
    """The Triton function of that name; imports triton."""
    modules = [importlib.import_module(f"jqopt_kernels.{name}") for name in MODULES]
    return next(getattr(module, kernel) for module in modules if hasattr(module, kernel))


def call(launch: Launch, capability: int) -> jax.Array:
    """What the kernel writes. `capability`: of the device, times ten; it need not be there when this is lowered."""
    triton_call = importlib.import_module("jax_triton").triton_call
    return triton_call(
        *launch.operands,
        kernel=source(launch.kernel),
        grid=launch.grid,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **_spelled(inspect.signature(triton_call).parameters, launch.out, capability),
        **launch.constants,
    )


def _spelled(accepted: Any, out: jax.ShapeDtypeStruct, capability: int) -> dict[str, Any]:
    """The arguments that the two generations of jax-triton call differently."""
    words: dict[str, Any] = {"out_type" if "out_type" in accepted else "out_shape": out}
    if "compute_capability" in accepted:
        words["compute_capability"] = capability
    if "enable_fp_fusion" in accepted:
        words["enable_fp_fusion"] = True
    elif "backend_options" in accepted:
        words["backend_options"] = {"enable_fp_fusion": True}
    return words
