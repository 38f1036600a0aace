"""Quantized matrix products for JAX: a table of kernels and the oracle each must equal. Imports jax only."""

from ._device import here
from ._types import Kernel, Operand, Packed, Shapes
from .ffi_build import BuildError, build
from .table import KERNELS, KernelRefusal, NoKernelError, explain, find

__all__ = [
    "KERNELS",
    "BuildError",
    "Kernel",
    "KernelRefusal",
    "NoKernelError",
    "Operand",
    "Packed",
    "Shapes",
    "build",
    "explain",
    "find",
    "here",
]
