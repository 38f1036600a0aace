"""Formats and matrices for the quantizers' tests: every kind of scale, ragged sizes, numbers that break code."""

import jax.numpy as jnp
import numpy as np

from jqopt import formats
from jqopt_kernels import Operand

# name: (as the kernels call it, jqopt's format, granularity of its matrix)
FORMATS = {
    "nvfp4": (Operand("e2m1", 16, "e4m3", "block", global_scale=True), formats.get("nvfp4"), "block"),
    "mxfp8": (Operand("e4m3", 32, "e8m0", "block"), formats.get("mxfp8"), "block"),
    "mxfp6": (Operand("e3m2", 32, "e8m0", "block"), formats.get("mxfp6"), "block"),
    "mxfp6_e2m3": (Operand("e2m3", 32, "e8m0", "block"), formats.get("mxfp6_e2m3"), "block"),
    "mxfp4": (Operand("e2m1", 32, "e8m0", "block"), formats.get("mxfp4"), "block"),
    "fp8": (Operand("e4m3", None, "float32", "tensor"), formats.get("fp8"), "tensor"),
    "fp8_e5m2": (Operand("e5m2", None, "float32", "tensor"), formats.get("fp8_e5m2"), "tensor"),
    "fp8_token": (Operand("e4m3", None, "float32", "channel"), formats.get("fp8"), "channel"),
    "fp8_1x128": (Operand("e4m3", (1, 128), "float32", "block"), formats.get("fp8").with_block((1, 128)), "block"),
    "fp8_8x16": (Operand("e4m3", (8, 16), "float32", "block"), formats.get("fp8").with_block((8, 16)), "block"),
    "int8": (Operand("int8", None, "float32", "tensor"), formats.get("int8"), "tensor"),
    "int8_token": (Operand("int8", None, "float32", "channel"), formats.get("int8"), "channel"),
}


def matrix(m: int, k: int, seed: int = 0, dtype=jnp.float32):
    """Normal numbers of widely different blocks; then zeros, both signs of zero, ties, tiny and huge numbers."""
    rng = np.random.default_rng([seed, m, k])
    x = rng.normal(size=(m, k)) * np.exp2(rng.integers(-12, 12, (m, -(-k // 8))).repeat(8, axis=1)[:, :k])
    x[0, : min(k, 32)] = 0
    x[-1, ::3] = -0.0
    if m > 2 and k >= 16:
        x[1, :16] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, -6.0]
        x[2, :16] = 2.0 ** rng.integers(-110, -60, 16)
    return jnp.asarray(x.astype(np.float32)).astype(dtype)


def hostile(m: int, k: int):
    """`matrix` with NaN, infinities and the largest and the smallest normal number."""
    x = np.asarray(matrix(m, k)).copy()
    x[1, 20], x[2, 5], x[3, 7] = np.nan, np.inf, -np.inf
    x[4, :4] = np.finfo(np.float32).max, -np.finfo(np.float32).max, 2.0**-126, -(2.0**-126)
    return jnp.asarray(x)
