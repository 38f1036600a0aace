"""Speed of the kernels against a float32 product of the same shape, on the device at hand.

    python -m benchmarks.kernels_cpu [--quick]

All products of one shape run in one process, in turns, and the best time of each counts: on a busy machine only
such ratios mean something, and they still wander by a fifth. Above 1 is faster than float32.
"""

import argparse
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

import jqopt_kernels as kernels
from jqopt_kernels import Operand, Packed, Shapes

FLOAT = Operand("float")
WEIGHTS = {
    "nvfp4": Operand("e2m1", 16, "e4m3", "block", global_scale=True),
    "mxfp4": Operand("e2m1", 32, "e8m0", "block"),
    "int4": Operand("int4", 128, "float32", "block"),
    "uint4": Operand("uint4", 128, "float32", "block", zero_point=True),
    "nf4": Operand("nf4", 64, "float32", "block"),
    "mxfp6": Operand("e3m2", 32, "e8m0", "block"),
    "int8": Operand("int8", None, "float32", "channel"),
    "mxint8": Operand("int8", 32, "e8m0", "block"),
    "fp8": Operand("e4m3", None, "float32", "tensor"),
    "fp8_block": Operand("e4m3", (128, 128), "float32", "block"),
    "mxfp8": Operand("e4m3", 32, "e8m0", "block"),
}
BOTH = ("int8", "fp8", "nvfp4", "mxfp8", "mxfp4")  # also with the left operand in the same format
BITS = {"e2m1": 4, "int4": 4, "uint4": 4, "nf4": 4, "e3m2": 6}


def operand(spec: Operand, rows: int, k: int, *, is_packed: bool, seed: int = 0) -> Packed:
    """Random codes and scales of about 1."""
    rng, bits = np.random.default_rng(seed), BITS.get(spec.element, 8)
    high, width = (256, k * bits // 8) if is_packed else (1 << bits, k)
    data = rng.integers(0, high, (rows, width)).astype(np.uint8)
    data = data & 0xB7 if spec.element == "e4m3" else data.view(np.int8) if spec.element == "int8" else data
    shape = {"tensor": (1, 1), "channel": (rows, 1)}.get(spec.granularity or "")
    if shape is None:
        bn, bk = spec.block if isinstance(spec.block, tuple) else (1, spec.block or k)
        shape = (-(-rows // bn), -(-k // bk))
    one = {"e4m3": np.uint8(0x38), "e8m0": np.uint8(127)}.get(spec.scale or "", np.float32(1))
    zero = jnp.full(shape, 8, jnp.uint8) if spec.zero_point else None
    whole = jnp.float32(1) if spec.global_scale else None
    return Packed(jnp.asarray(data), jnp.asarray(np.full(shape, one)), whole, zero)


def products(m: int, size: int) -> Iterator[tuple[str, str, Callable, tuple]]:
    """(formats, kernel, function, arguments) of every product measured."""
    x = jax.random.normal(jax.random.key(0), (m, size))
    w = jax.random.normal(jax.random.key(1), (size, size))
    shapes = Shapes(m, size, size)
    yield "float32", "dot_general", lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))), (x, w)
    for name, rhs in WEIGHTS.items():
        for lhs in (FLOAT, rhs) if name in BOTH else (FLOAT,):
            kernel = kernels.find("qdot", lhs, rhs, jax.default_backend(), shapes)
            left = x if lhs == FLOAT else operand(lhs, m, size, is_packed=False)
            right = kernel.prepare(operand(rhs, size, size, is_packed=True))
            label = f"{'float' if lhs == FLOAT else name} x {name}"
            yield label, kernel.name, _bound(kernel, lhs, rhs, size), (left, right)


def _bound(kernel: kernels.Kernel, lhs: Operand, rhs: Operand, size: int) -> Callable:
    return lambda x, w: kernel.run(x, w, lhs_spec=lhs, rhs_spec=rhs, n=size, k=size)


def race(runs: list[tuple[Callable, tuple]], rounds: int) -> list[float]:
    """Best seconds of each, run in turns after one warm-up."""
    compiled = [(jax.jit(f).lower(*arguments).compile(), arguments) for f, arguments in runs]
    best = [float("inf")] * len(runs)
    for turn in range(rounds + 1):
        for i, (f, arguments) in enumerate(compiled):
            start = time.perf_counter()
            jax.block_until_ready(f(*arguments))
            if turn:
                best[i] = min(best[i], time.perf_counter() - start)
    return best


def table(m: int, size: int, rounds: int) -> str:
    """Ratios of every product of one shape, as lines of text."""
    labels, names, functions, arguments = zip(*products(m, size), strict=True)
    seconds = race(list(zip(functions, arguments, strict=True)), rounds)
    head = f"{m} x {size} x {size}: float32 {seconds[0] * 1e3:.3f} ms"
    rows = [
        f"  {label:18} {name:16} {seconds[0] / s:5.2f}"
        for label, name, s in zip(labels[1:], names[1:], seconds[1:], strict=True)
    ]
    return "\n".join([head, *rows])


def main(argv: list[str] | None = None) -> None:
    """Print one table a shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="size 1024 and few rounds: some seconds")
    quick = parser.parse_args(argv).quick
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    for size in (1024,) if quick else (1024, 4096):
        for m in (1, 64) if quick else (1, 64, 512):
            print(table(m, size, rounds=5 if quick else 30 if m < 512 else 8), flush=True)


if __name__ == "__main__":
    main()
