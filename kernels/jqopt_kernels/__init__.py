"""Quantized matrix products for JAX: a table of kernels and the oracle each must equal. Imports jax only."""

from ._device import here
from ._types import Kernel, Operand, Packed, Shapes
from .attend import Attention
from .epilogue import Epilogue
from .ffi_build import BuildError, build
from .quantize_way import Random, Way
from .table import FAMILIES, KERNELS, KernelRefusal, NoKernelError, asked, backends, explain, find, using

__all__ = [
    "FAMILIES",
    "KERNELS",
    "Attention",
    "BuildError",
    "Epilogue",
    "Kernel",
    "KernelRefusal",
    "NoKernelError",
    "Operand",
    "Packed",
    "Random",
    "Shapes",
    "Way",
    "asked",
    "backends",
    "build",
    "explain",
    "find",
    "here",
    "using",
]
