"""TransformerEngine's quantizers and linear layer in NumPy, from their formulas: an oracle without code of jqopt.

`test_te_numpy.py` holds it to TransformerEngine's own vectors, then jqopt to it, on other numbers and shapes.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

MOST = np.finfo(np.float32).max
ONE = np.float32(1)
SIGNS = np.asarray([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1], np.float64)


class Quantized(NamedTuple):
    """codes e2m1 [m, k] and scales e4m3 [m, k / 16] as ml_dtypes' numbers; the amax of the whole."""

    codes: np.ndarray
    scales: np.ndarray
    amax: np.float32

    @property
    def packed(self) -> np.ndarray:
        """uint8 [m, k / 2]: the low half of a byte is the even column."""
        bits = self.codes.view(np.uint8)
        return bits[:, ::2] | bits[:, 1::2] << 4

    def values(self) -> np.ndarray:
        """codes * scales, float32: the amax is left to the product."""
        return self.codes.astype(np.float32) * np.repeat(self.scales.astype(np.float32), 16, axis=1)


def nvfp4(x: np.ndarray, square: bool = False) -> Quantized:
    """Blocks of 1x16 of the last axis, or `square`: tiles of 16x16, whose scale is repeated for each row."""
    x = np.ascontiguousarray(x).astype(np.float32) + np.float32(0)  # -0 has the code of 0
    m, k = x.shape
    high = 16 if square else 1
    tiles = x.reshape(m // high, high, k // 16, 16)
    amax = np.abs(x).max()
    with np.errstate(divide="ignore", over="ignore"):
        whole = np.minimum(np.float32(448 * 6) / amax, MOST) if amax else ONE
        block = np.abs(tiles).max(axis=(1, 3), keepdims=True)
        exact = np.minimum(block * (whole * (ONE / np.float32(6))), MOST)
        scale = np.minimum(exact, np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
        encode = np.minimum(ONE / (scale.astype(np.float32) * (ONE / whole)), MOST)
        codes = np.clip(tiles * encode, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    return Quantized(codes.reshape(m, k), np.repeat(scale[:, 0, :, 0], high, axis=0), amax)


def transformed(x: np.ndarray, signs: np.ndarray = SIGNS) -> np.ndarray:
    """Each 16 values of the last axis times (1/4) diag(signs) H16, Sylvester's, in bfloat16."""
    matrix = np.ones((1, 1))
    for _ in range(4):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    out = np.ascontiguousarray(x).astype(np.float64).reshape(-1, 16) @ (signs[:, None] * matrix / 4)
    return out.reshape(x.shape).astype(np.float32).astype(ml_dtypes.bfloat16)


def fp8(x: np.ndarray, tile: tuple[int, int], dtype: type, power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
    """(codes, what they are multiplied with to give x back: float32, one for each tile)."""
    m, k = x.shape
    tiles = x.astype(np.float32).reshape(m // tile[0], tile[0], k // tile[1], tile[1])
    amax = np.abs(tiles).max(axis=(1, 3), keepdims=True)
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    with np.errstate(divide="ignore"):
        scale = np.where(amax > 0, np.minimum(largest / amax, MOST), ONE)
    if power_of_two:
        scale = np.ldexp(ONE, np.frexp(scale)[1] - 1).astype(np.float32)
    codes = np.clip(tiles * scale, -largest, largest).astype(dtype)
    return codes.reshape(m, k), (ONE / scale)[:, 0, :, 0]


def mxfp8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes e4m3, exponents e8m0 as uint8 [m, k / 32]): the least power of two under which the amax is within 448."""
    m, k = x.shape
    tiles = x.astype(np.float32).reshape(m, k // 32, 32)
    mantissa, exponent = np.frexp(np.abs(tiles).max(axis=-1) / np.float64(448))
    exponent = np.where(mantissa == 0.5, exponent - 1, exponent)  # ceil of log2
    exponent = np.where(mantissa == 0, -127, np.clip(exponent, -127, 127))
    codes = np.clip(np.ldexp(tiles.astype(np.float64), -exponent[..., None]), -448, 448)
    return codes.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).reshape(m, k), (exponent + 127).astype(np.uint8)


def product(a: Quantized, b: Quantized) -> np.ndarray:
    """a b^T of what both stand for, float64."""
    alpha = np.float64(a.amax) * np.float64(b.amax) / (36.0 * 448.0**2)
    return a.values().astype(np.float64) @ b.values().astype(np.float64).T * alpha


def linear(x, w, dy, hadamard: bool, square: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(y, dx, dw) of a layer, float64, everything rounded to nearest."""
    turned = transformed if hadamard else lambda x: x
    y = product(nvfp4(x), nvfp4(w, square))
    dx = product(nvfp4(dy), nvfp4(w.T, square))
    dw = product(nvfp4(turned(dy.T)), nvfp4(turned(x.T)))
    return y, dx, dw


def swizzled(scale: np.ndarray) -> np.ndarray:
    """Bytes where Blackwell reads them, one by one: [rows up to 128s, columns up to 4s], padded with zeros."""
    rows, cols = scale.shape
    wide = -(-cols // 4)
    out = np.zeros((-(-rows // 128) * 128, wide * 4), scale.dtype)
    flat = out.reshape(-1)
    for r in range(rows):
        for c in range(cols):
            flat[((r // 128) * wide + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4] = scale[r, c]
    return out
