"""Quantized matrix products for JAX: a table of kernels and the oracle each must equal. Imports jax only."""

from ._device import here
from ._types import Kernel, Operand, Packed, Shapes
from .attend import Attention
from .quantize_way import Random, Way
from .table import KERNELS, KernelRefusal, NoKernelError, explain, find

__all__ = [
    "KERNELS",
    "Attention",
    "Kernel",
    "KernelRefusal",
    "NoKernelError",
    "Operand",
    "Packed",
    "Random",
    "Shapes",
    "Way",
    "explain",
    "find",
    "here",
]
