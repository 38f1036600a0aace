"""The quantizers of the table: for each op the Pallas kernel, where it can, then XLA's form, then the oracle."""

from __future__ import annotations

from . import quantize_amax, quantize_both, quantize_pallas, quantize_swizzle, quantize_xla, reference_quantize
from ._types import Kernel

QUANTIZERS: tuple[Kernel, ...] = (
    quantize_pallas.pallas_quantize,
    quantize_xla.xla_quantize,
    reference_quantize.reference_quantize,
    quantize_both.pallas_quantize_both,
    quantize_both.xla_quantize_both,
    reference_quantize.reference_quantize_both,
    quantize_pallas.pallas_norm_quantize,
    quantize_xla.xla_norm_quantize,
    reference_quantize.reference_norm_quantize,
    quantize_pallas.pallas_swiglu_quantize,
    quantize_xla.xla_swiglu_quantize,
    reference_quantize.reference_swiglu_quantize,
    quantize_amax.pallas_amax,
    quantize_amax.xla_amax,
    reference_quantize.reference_amax,
    *quantize_swizzle.swizzles,
    *reference_quantize.reference_swizzles,
)
