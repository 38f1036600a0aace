"""What `benchmarks.kernels` measures: for each op, the products a model has, most telling first, and their arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jqopt_kernels as kernels
from jqopt_kernels import Operand, Packed, Shapes, reference

FLOAT = Operand("float")
FORMATS = {
    "nvfp4": Operand("e2m1", 16, "e4m3", "block", global_scale=True),
    "fp8": Operand("e4m3", None, "float32", "tensor"),
    "fp8_block": Operand("e4m3", (128, 128), "float32", "block"),
    "mxfp4": Operand("e2m1", 32, "e8m0", "block"),
    "int4": Operand("int4", 128, "float32", "block"),
    "int8": Operand("int8", None, "float32", "channel"),
    "mxfp8": Operand("e4m3", 32, "e8m0", "block"),
    "uint4": Operand("uint4", 128, "float32", "block", zero_point=True),
    "mxint8": Operand("int8", 32, "e8m0", "block"),
    "nf4": Operand("nf4", 64, "float32", "block"),
    "mxfp6": Operand("e3m2", 32, "e8m0", "block"),
}
LHS = {**FORMATS, "fp8_block": Operand("e4m3", 128, "float32", "block"), "float": FLOAT}
# (lhs, rhs): weights alone first, then both sides
PAIRS = (
    ("float", "nvfp4"), ("fp8", "fp8"), ("nvfp4", "nvfp4"), ("fp8_block", "fp8_block"), ("float", "mxfp4"),
    ("float", "int4"), ("float", "fp8"), ("int8", "int8"), ("fp8", "nvfp4"), ("float", "int8"),
    ("mxfp8", "mxfp8"), ("mxfp4", "mxfp4"), ("float", "mxfp8"), ("float", "fp8_block"), ("float", "uint4"),
    ("float", "mxint8"), ("float", "nf4"), ("float", "mxfp6"),
)  # fmt: skip
BITS = {"e2m1": 4, "int4": 4, "uint4": 4, "nf4": 4, "e3m2": 6}

# (n, k) of Llama 3's projections: gate and up, q k and v, down, output; of 8B and of 70B
LLAMA = (
    *((28672, 4096), (6144, 4096), (4096, 14336), (4096, 4096)),
    *((57344, 8192), (10240, 8192), (8192, 28672), (8192, 8192)),
)
GPU_ROWS = (1, 16, 4096, 4, 64, 256, 8, 32, 2)
CPU_SHAPES = ((4096, 4096), (1024, 1024))
CPU_ROWS = (1, 16, 4, 64)
# Share of codes that may be their neighbours: the root and the exponential before the quantizer round in their own way.
MOVED = {"norm_quantize": 1e-3, "swiglu_quantize": 1e-3}
PART = 256  # rows of a matrix whose codes are compared: a multiple of every block
TOLERANCE = 1e-5  # of the largest value of the result: float32 sums in another order
# Tensor cores for fp8 keep about 14 bits of a sum (docs/kernels.md): each of the up to 32 additions to a sum of 128
# products or more may lose 2^-14 of it. Of the largest value of the result, a sum of random signs, that is 2e-3.
FP8_TOLERANCE = 2e-3
FP8_CORES = ("xla_fp8", "cublaslt", "triton_fp8_block", "xla_scaled", "triton_scaled")


class Case(NamedTuple):
    """One op on one set of sizes and formats.

    arrays(copy, rows) -> (what stays, what is rotated): the arguments of a kernel's `run`; for products the activation
        and the weight. `rows`: these of the activation's only (products only).
    baseline(copy) -> arguments of `plain`, what a user without quantization would run.
    call(kernel) -> the kernel as a function of `arrays`; None: a product's.
    arithmetic: operations that the limit counts; None: a product's.
    slack: what a result may differ from the oracle's beside the rounding of float32 sums and of the result, of the
        oracle's shape; None: nothing.
    """

    op: str
    label: str
    lhs: Operand
    rhs: Operand
    shapes: Shapes
    arrays: Callable[[int, Any], tuple[Any, Any]]
    baseline: Callable[[int], tuple[Any, Any]]
    plain: Callable[[Any, Any], Any]
    dtype: Any
    call: Callable[[kernels.Kernel], Callable[[Any, Any], Any]] | None = None
    arithmetic: float | None = None
    slack: Callable[[], jax.Array] | None = None

    @property
    def flops(self) -> float:
        return 2.0 * self.shapes.m * self.shapes.n * self.shapes.k if self.arithmetic is None else self.arithmetic

    def run(self, kernel: kernels.Kernel) -> Callable[[Any, Any], Any]:
        """The kernel as a function of (lhs, rhs)."""
        if self.call is not None:
            return self.call(kernel)
        static = {"lhs_spec": self.lhs, "rhs_spec": self.rhs, "n": self.shapes.n, "k": self.shapes.k}
        return lambda x, w: kernel.run(x, w, **static, out_dtype=self.dtype)


def order(shapes: tuple, rows: tuple) -> list[tuple[tuple[str, str], tuple[int, int], int]]:
    """(formats, (n, k), m), those first that are near the head of all three lists."""
    every = [
        (3 * i + 4 * j + 2 * h, pair, shape, m)
        for i, pair in enumerate(PAIRS)
        for j, shape in enumerate(shapes)
        for h, m in enumerate(rows)
    ]
    return [(pair, shape, m) for _, pair, shape, m in sorted(every, key=lambda one: one[0])]


# Of a GPU's cases, those for one call: at seven seconds each (a guess: none was timed) they take nine minutes.
TELLING = {
    "float x nvfp4": {(28672, 4096): GPU_ROWS, **dict.fromkeys(LLAMA[1:], (1, 16))},
    "fp8 x fp8": {(28672, 4096): (16, 256, 4096), (8192, 8192): (4096,), (57344, 8192): (4096,)},
    "nvfp4 x nvfp4": {(28672, 4096): (1, 16, 256, 4096)},
    "fp8_block x fp8_block": {(28672, 4096): (16, 4096), (8192, 8192): (4096,)},
    "": {(28672, 4096): (16,)},
}


TELLING_QUANTIZERS = ("nvfp4", "mxfp8", "fp8 by token")


def targeted(case: Case) -> bool:
    """Whether one of the targets (`benchmarks.kernel_targets`) is about this case: those come first."""
    m, n, k, _ = case.shapes
    if case.op == "quantize":
        return (m, k) == (8192, 8192)
    if case.op != "qdot":
        return False
    if case.label == "float x nvfp4":
        return m <= 16 and (n, k) in (LLAMA[0], LLAMA[4])
    return case.label in ("fp8 x fp8", "fp8_block x fp8_block") and m >= 4096 and min(n, k) >= 8192


def telling(case: Case) -> bool:
    """Whether a case is part of the table of one call (`--full` has all)."""
    m, n, k, _ = case.shapes
    if jax.default_backend() == "cpu":
        return True
    if case.op == "qdot":
        return m in TELLING.get(case.label, TELLING[""]).get((n, k), ())
    if case.op == "ragged":
        return m != 512
    if case.op == "attend":
        return n > 1024
    return (m, k) == (8192, 8192) and (
        case.op in ("quantize", "amax", "swizzle", "unswizzle") or case.label in TELLING_QUANTIZERS
    )


def qdot(is_gpu: bool, shapes: tuple | None = None, rows: tuple | None = None) -> Iterator[Case]:
    """Products of a model's projections: Llama's on a GPU, two square ones on a CPU."""
    dtype = jnp.bfloat16 if is_gpu else jnp.float32
    for (left, right), (n, k), m in order(
        shapes or (LLAMA if is_gpu else CPU_SHAPES), rows or (GPU_ROWS if is_gpu else CPU_ROWS)
    ):
        lhs, rhs = LHS[left], FORMATS[right]
        yield Case(
            "qdot", f"{left} x {right}", lhs, rhs, Shapes(m, n, k),
            _arrays(lhs, rhs, m, n, k, dtype), _floats(m, n, k, dtype), dot, dtype,
        )  # fmt: skip


def _arrays(lhs: Operand, rhs: Operand, m: int, n: int, k: int, dtype: Any) -> Callable:
    def make(copy: int, rows: Any) -> tuple[Any, Any]:
        x = _x(m, k, dtype) if lhs == FLOAT else operand(lhs, m, k, is_packed=False)
        if rows is not None and isinstance(x, Packed):
            tall = x.scale is not None and x.scale.shape[0] == m
            x = x._replace(data=x.data[rows], scale=x.scale[rows] if tall and x.scale is not None else x.scale)
        elif rows is not None:
            x = x[rows]
        return x, operand(rhs, n, k, is_packed=True, seed=1 + copy)

    return make


def _floats(m: int, n: int, k: int, dtype: Any) -> Callable:
    return lambda copy: (_x(m, k, dtype), jax.random.normal(jax.random.key(1 + copy), (n, k), dtype))


def _x(m: int, k: int, dtype: Any) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (m, k), dtype)


def dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [m, k] times w [n, k], transposed: what a user without quantization runs."""
    out = jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return out.astype(x.dtype)


def operand(spec: Operand, rows: int, k: int, *, is_packed: bool, seed: int = 0) -> Packed:
    """Random codes and scales between 0.5 and 2, made on the device: copying them there would take longer."""
    bits, keys = BITS.get(spec.element, 8), jax.random.split(jax.random.key(seed))
    width = -(-k * bits // 8) if is_packed else k
    data = jax.random.bits(keys[0], (rows, width), jnp.uint8)
    if not is_packed:
        data = data & ((1 << bits) - 1)
    if spec.element == "e4m3":  # exponents of at most 2^-1: no NaN, and sums in which no single product rules
        data = data & 0xB7
    data = jax.lax.bitcast_convert_type(data, jnp.int8) if spec.element == "int8" else data
    shape = {"tensor": (1, 1), "channel": (rows, 1)}.get(spec.granularity or "")
    if shape is None:
        bn, bk = spec.block if isinstance(spec.block, tuple) else (1, spec.block or k)
        shape = (-(-rows // bn), -(-k // bk))
    if spec.scale == "float32":
        scale = jax.random.uniform(keys[1], shape, jnp.float32, 0.5, 2.0)
    else:  # bits of 0.5 to 1.875, of 0.5 to 2
        low, high = {"e4m3": (0x30, 0x40), "e8m0": (126, 129)}[spec.scale or "e4m3"]
        scale = jax.random.randint(keys[1], shape, low, high, jnp.int32).astype(jnp.uint8)
    zero = jnp.full(shape, 8, jnp.uint8) if spec.zero_point else None
    return Packed(data, scale, jnp.float32(1.5) if spec.global_scale else None, zero)


def checked(case: Case, most: int = 16) -> np.ndarray:
    """Rows of a product that are compared: the first, the last, and others evenly between."""
    return np.unique(np.linspace(0, case.shapes.m - 1, most).round().astype(int))


def oracle(case: Case) -> Any:
    """What the oracle gives: some rows of a product (`checked`), the codes of the first PART rows, else all.

    Quantizers' runs on the CPU: on CUDA XLA's division, and so the oracle's, may be wrong by two units.
    """
    if case.call is None:
        static = {"lhs_spec": case.lhs, "rhs_spec": case.rhs, "n": case.shapes.n, "k": case.shapes.k}
        return jax.jit(lambda x, w: reference.qdot(x, w, **static))(*case.arrays(0, checked(case)))
    kernel = kernels.find(case.op, case.lhs, case.rhs, kernels.here(), case.shapes, backend="reference")
    arrays = case.arrays(0, None)
    if not case.arithmetic:
        if case.op.endswith(("quantize", "quantize_both")):  # of a large matrix it would need tens of gigabytes
            arrays = jax.tree.map(lambda a: a[:PART] if a.ndim == 2 else a, arrays)
        arrays = jax.device_put(arrays, jax.devices("cpu")[0])
    return jax.jit(case.run(kernel))(*arrays)


def wrong(case: Case, y: Any, want: Any = None, kernel: kernels.Kernel | None = None) -> str | None:
    """How far a result is from the oracle's (`want`), where that is too far; of a product some rows.

    Codes and scales have to be the oracle's, bit for bit, but see MOVED; XLA's divide by what it calls a division.
    """
    want = oracle(case) if want is None else want
    if case.call is None:
        on_fp8 = kernel is not None and kernel.name in FP8_CORES
        return _far(case, y[checked(case)], want, FP8_TOLERANCE if on_fp8 else TOLERANCE)
    if isinstance(want, jax.Array) and case.arithmetic:
        return _far(case, y, want, TOLERANCE)
    cut = jax.tree.map(lambda a, b: a[tuple(slice(n) for n in b.shape)], y, want)
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(jax.tree.leaves(cut), jax.tree.leaves(want), strict=True)]
    loose = kernel is not None and kernel.backend == "xla" and jax.default_backend() != "cpu"
    differ = sum(int(np.sum(_differ(a, b, loose))) for a, b in pairs)
    allowed = max(MOVED.get(case.op, 0.0), 1e-5 if loose else 0.0) * sum(b.size for _, b in pairs)
    return (
        None if differ <= allowed else f"WRONG: {differ} of {sum(b.size for _, b in pairs)} values are not the oracle's"
    )


def _differ(a: np.ndarray, b: np.ndarray, loose: bool) -> np.ndarray:
    """Where values differ; loose: float32 scales by more than two units."""
    return np.abs(a - b) > 2.0**-22 * np.abs(b) if loose and b.dtype == np.float32 else a != b


def _far(case: Case, y: jax.Array, oracle: jax.Array, tolerance: float) -> str | None:
    want = np.asarray(oracle.astype(jnp.float32), np.float64)
    error = np.abs(np.asarray(y.astype(jnp.float32), np.float64) - want)
    allowed = tolerance * np.abs(want).max() + (2.0**-8 * np.abs(want) if case.dtype == jnp.bfloat16 else 0)
    if case.slack is not None:
        allowed = allowed + np.asarray(case.slack(), np.float64)
    if np.all(error <= allowed):
        return None
    return f"WRONG: {error.max():.3g} from the oracle, whose largest value is {np.abs(want).max():.3g}"
