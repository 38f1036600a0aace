"""The normalised Hadamard rotation along an axis: it keeps products of two rotated vectors, and spreads outliers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@functools.cache
def matrix(size: int) -> np.ndarray:
    """The normalised Hadamard matrix of a power of two (Sylvester's), float32 [size, size]: symmetric, orthogonal."""
    out = np.ones((1, 1), np.float64)
    while out.shape[0] < size:
        out = np.block([[out, out], [out, -out]])
    return (out / np.sqrt(size)).astype(np.float32)


def rotate(x: jax.Array) -> jax.Array:
    """x [..., d] times a Hadamard matrix, computed in float32 and returned in x's dtype.

    Where d is no power of two: in blocks of the largest power of two that divides it.
    """
    d = x.shape[-1]
    block = d & -d
    parts = x.astype(jnp.float32).reshape(*x.shape[:-1], d // block, block)
    turned = jnp.matmul(parts, jnp.asarray(matrix(block)), precision=lax.Precision.HIGHEST)
    return turned.reshape(x.shape).astype(x.dtype)
