"""Random operands of every format, and their exact product in numpy float64, decoded by ml_dtypes."""

import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jqopt_kernels import Operand, Packed

BITS = {"int8": 8, "e4m3": 8, "e5m2": 8, "e3m2": 6, "e2m3": 6, "int4": 4, "uint4": 4, "e2m1": 4, "nf4": 4}
ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e8m0": ml_dtypes.float8_e8m0fnu,
}
FLOAT = Operand("float")

WEIGHTS = {
    "int8": Operand("int8", None, "float32", "channel"),
    "int8_tensor": Operand("int8", None, "float32", "tensor"),
    "fp8": Operand("e4m3", None, "float32", "tensor"),
    "fp8_channel": Operand("e4m3", None, "float32", "channel"),
    "fp8_e5m2": Operand("e5m2", None, "float32", "tensor"),
    "fp8_unscaled": Operand("e4m3", None, None, "tensor"),
    "int4": Operand("int4", 32, "float32", "block"),
    "int4_channel": Operand("int4", None, "float32", "channel"),
    "uint4": Operand("uint4", 32, "float32", "block", zero_point=True),
    "uint4_channel": Operand("uint4", None, "float32", "channel", zero_point=True),
    "nvfp4": Operand("e2m1", 16, "e4m3", "block", global_scale=True),
    "fp8_block": Operand("e4m3", (128, 32), "float32", "block"),
    "mxfp8": Operand("e4m3", 32, "e8m0", "block"),
    "mxfp6": Operand("e3m2", 32, "e8m0", "block"),
    "mxfp6_e2m3": Operand("e2m3", 32, "e8m0", "block"),
    "mxfp4": Operand("e2m1", 32, "e8m0", "block"),
    "mxint8": Operand("int8", 32, "e8m0", "block"),
    "nf4": Operand("nf4", 64, "float32", "block"),
}
# (lhs, rhs) by name of the weight formats; "float" is a float lhs. A token is a row: granularity "channel".
PAIRS = {
    **{name: ("float", name) for name in WEIGHTS},
    "int8 x int8": ("int8", "int8"),
    "int8_tensor x int8_tensor": ("int8_tensor", "int8_tensor"),
    "fp8 x fp8": ("fp8", "fp8"),
    "fp8_channel x fp8_channel": ("fp8_channel", "fp8_channel"),
    "fp8_e5m2 x fp8": ("fp8_e5m2", "fp8"),
    "fp8_block x fp8_block": ("fp8_rows", "fp8_block"),
    "nvfp4 x nvfp4": ("nvfp4", "nvfp4"),
    "mxfp8 x mxfp4": ("mxfp8", "mxfp4"),
    "int8 x int4": ("int8", "int4"),
    "uint4 x uint4": ("uint4", "uint4"),
}
OPERANDS = WEIGHTS | {"float": FLOAT, "fp8_rows": Operand("e4m3", (1, 32), "float32", "block")}


class Case(NamedTuple):
    """One product: what a kernel takes, and what the numbers are."""

    lhs: jax.Array | Packed
    rhs: Packed
    specs: dict  # lhs_spec, rhs_spec, n, k
    y: np.ndarray  # [m, n] float64
    bound: np.ndarray  # [m, n] what f32 rounding in any order may change


def case(pair: str, m: int, n: int, k: int, *, seed: int = 0, float_dtype=jnp.float32) -> Case:
    rng = np.random.default_rng([seed, m, n, k])
    lhs_spec, rhs_spec = (OPERANDS[name] for name in PAIRS[pair])
    rhs, w = operand(rng, rhs_spec, n, k, is_packed=True)
    if lhs_spec == FLOAT:
        lhs = jnp.asarray(rng.normal(size=(m, k)), float_dtype)
        x = np.asarray(lhs.astype(jnp.float32), np.float64)
    else:
        lhs, x = operand(rng, lhs_spec, m, k, is_packed=False)
    return Case(lhs, rhs, {"lhs_spec": lhs_spec, "rhs_spec": rhs_spec, "n": n, "k": k}, x @ w.T, bound(x, w))


def bound(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Largest error of sums of k products in f32 (Higham, Accuracy and Stability, 3.1), with 8 more roundings for
    the scales, each at most 2^-24 of the sum of absolute products; twice that, for sums in any grouping."""
    return 2.0 * (x.shape[1] + 8) * 2.0**-24 * (np.abs(x) @ np.abs(w).T)


def operand(rng, spec: Operand, rows: int, k: int, *, is_packed: bool) -> tuple[Packed, np.ndarray]:
    """Random codes and scales, and their values [rows, k] in float64. Row 0 is zero where a code means zero."""
    codes = random_codes(rng, spec.element, rows, k)
    if spec.element != "nf4" and not spec.zero_point:
        codes[0] = 0
    shape = scale_shape(spec, rows, k)
    stored, scale = random_scales(rng, spec.scale, shape)
    zero = rng.integers(0, 16, shape).astype(np.uint8) if spec.zero_point else None
    whole = np.float32(0.37) if spec.global_scale else None
    values = decode(codes, spec.element)
    if zero is not None:
        values = values - spread(zero, spec, rows, k)
    values = values * spread(scale, spec, rows, k) * (1.0 if whole is None else np.float64(whole))
    data = codes if BITS[spec.element] == 8 or not is_packed else pack(codes, BITS[spec.element])
    arrays = (data, stored, whole, zero)
    return Packed(*(None if a is None else jnp.asarray(a) for a in arrays)), values


def random_codes(rng, element: str, rows: int, k: int) -> np.ndarray:
    codes = rng.integers(0, 1 << BITS[element], (rows, k)).astype(np.uint8)
    if element in ("e4m3", "e5m2"):  # small exponents only: products of the largest would drown the rest, or be inf
        codes &= {"e4m3": 0xB7, "e5m2": 0xC3}[element]
    return codes.view(np.int8) if element == "int8" else codes


def random_scales(rng, kind: str | None, shape) -> tuple[np.ndarray | None, np.ndarray]:
    if kind is None:
        return None, np.ones((1, 1))
    if kind == "float32":
        scale = rng.uniform(0.01, 2.0, shape).astype(np.float32)
        return scale, scale.astype(np.float64)
    bits = rng.integers(*{"e4m3": (1, 0x7E), "e8m0": (115, 135)}[kind], shape).astype(np.uint8)
    return bits, bits.view(ML_DTYPES[kind]).astype(np.float64)


def scale_shape(spec: Operand, rows: int, k: int) -> tuple[int, int]:
    if spec.granularity != "block":
        return {"tensor": (1, 1), "channel": (rows, 1)}[spec.granularity]
    bn, bk = spec.block if isinstance(spec.block, tuple) else (1, spec.block)
    return -(-rows // bn), -(-k // bk)


def spread(scale: np.ndarray, spec: Operand, rows: int, k: int) -> np.ndarray:
    if spec.granularity != "block":
        return scale.astype(np.float64)
    bn, bk = spec.block if isinstance(spec.block, tuple) else (1, spec.block)
    return scale.astype(np.float64).repeat(bn, axis=0)[:rows].repeat(bk, axis=1)[:, :k]


def decode(codes: np.ndarray, element: str) -> np.ndarray:
    if element == "nf4":
        return nf4()[codes]
    if element in ("int8", "uint4"):
        return codes.astype(np.float64)
    if element == "int4":
        return np.where(codes < 8, codes.astype(np.float64), codes.astype(np.float64) - 16)
    return codes.view(ML_DTYPES[element]).astype(np.float64)


def nf4() -> np.ndarray:
    """Built from its definition: quantiles of N(0, 1), 8 above zero and 7 below, scaled to [-1, 1]."""
    offset, quantile = 0.9677083, statistics.NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    values = np.sort([*above, 0.0, *below])
    return (values / values.max()).astype(np.float32).astype(np.float64)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Little-endian bit stream of each row: two 4-bit codes a byte, four 6-bit codes in three bytes."""
    per_group = {4: 2, 6: 4}[bits]
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_group)))
    stream = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    return np.packbits(stream.reshape(codes.shape[0], -1), axis=-1, bitorder="little")
