"""Quantized matrix products for JAX: a table of kernels and the oracle each must equal. Imports jax only."""

from ._types import Kernel, Operand, Packed, Shapes
from .table import KERNELS, NoKernelError, explain, find

__all__ = ["KERNELS", "Kernel", "NoKernelError", "Operand", "Packed", "Shapes", "explain", "find"]
