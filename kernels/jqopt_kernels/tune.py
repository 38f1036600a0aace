"""Search for the best tile of a Triton kernel on the GPU at hand, by time, and keep it where `_tiles` looks first.

A coordinate descent: from the shipped tile, each number is halved and doubled in turn, as long as that helps. A tile
whose product differs from the oracle's is an error, one that does not compile is left out and counted.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _tiles, decode, reference, triton_call, triton_dot
from ._device import capability, here, platform
from ._tiles import Tile
from ._types import Kernel, Operand, Packed, Shapes

NAMED = (
    triton_dot.triton_scaled_gemm,
    triton_dot.triton_fp8_block,
    triton_dot.triton_gemv,
    triton_dot.triton_skinny,
    triton_dot.triton_gemm,
)
CACHE_BYTES = 256 << 20  # weights are rotated through more memory than any second-level cache holds
MOST_COPIES, REPEATS = 64, 5
# Of the largest value: far more than float32 sums differ by, far less than a wrong tile does. Tensor cores for fp8 keep
# about 14 bits of a sum, and lose 2e-3 in one of 4096 products (docs/kernels.md).
CLOSE, CLOSE_FP8 = 1e-4, 5e-3
LIMITS = {
    "bn": (1, 256), "bk": (32, 2048), "bm": (8, 256), "warps": (1, 8), "stages": (1, 6), "split": (1, 32),
    "group": (1, 64),
}  # fmt: skip
UNUSED = {  # numbers that a kernel does not read
    "triton_gemv": {"bm", "split", "group", "halves"},
    "triton_fp8_block": {"halves"},
    "triton_scaled": {"split", "halves"},
}


class Result(NamedTuple):
    """The fastest tile of one product; failed: how many tiles did not compile or run."""

    kernel: str
    key: str
    tile: Tile
    microseconds: float
    tried: int
    failed: int


def gpu() -> str:
    """This process's CUDA device, as kernels are found for. Raises RuntimeError where there is none to time on."""
    device = here()
    if platform(device) != "cuda":
        raise RuntimeError(f"tuning times kernels on a CUDA GPU, and JAX's default device here is {device!r}")
    if why := triton_call.missing():
        raise RuntimeError(why)
    return device


def search(lhs: Operand, rhs: Operand, shapes: Shapes, device: str, dtype=jnp.bfloat16) -> list[Result]:
    """The best tile of each Triton kernel for activations `lhs` times weights `rhs`; dtype: of float activations.

    Raises ValueError if no Triton kernel takes this product, or one gives other numbers than the oracle.
    """
    reasons = {kernel: kernel.supports(lhs, rhs, device, shapes) for kernel in NAMED}
    able = [kernel for kernel, why in reasons.items() if why is None]
    if not able:
        every = "; ".join(f"{kernel.name}: {why}" for kernel, why in reasons.items())
        raise ValueError(f"no Triton kernel takes {lhs} x {rhs} at {shapes} on {device}: {every}")
    number = capability(device)
    assert number is not None, device
    x, weights = _operands(lhs, rhs, shapes, dtype)
    return [_best(kernel, x, weights, lhs, rhs, shapes, number) for kernel in able]


def keep(found: list[Result], device: str) -> os.PathLike:
    """Adds tiles to this device's file (`_tiles.tuned_path`), which is replaced at once; other entries stay."""
    path = _tiles.tuned_path(capability(device) or 0)
    tables = json.loads(path.read_text())["tiles"] if path.exists() else {}
    for result in found:
        tables.setdefault(result.kernel, {})[result.key] = result.tile._asdict()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps({"device": device, "tiles": tables}, indent=1))
    fresh.replace(path)
    return path


def neighbours(tile: Tile, unused: Collection[str] = ()) -> Iterator[Tile]:
    """Tiles with one number halved or doubled, or the other way to split an activation."""
    for field, (least, most) in LIMITS.items():
        for value in (getattr(tile, field) // 2, max(1, getattr(tile, field) * 2)):
            if least <= value <= most and field not in unused:
                yield tile._replace(**{field: value})
    if "halves" not in unused:
        yield tile._replace(halves=not tile.halves)


def descend(
    start: Tile, seconds: Callable[[Tile], float], unused: Collection[str] = ()
) -> tuple[Tile, float, int, int]:
    """(best tile, its time, tiles tried, tiles whose time is infinite): moves to a better neighbour until none is.

    unused: numbers of a tile that do not matter.
    """
    times = {start: seconds(start)}
    best, moved = start, True
    while moved:
        moved = False
        for tile in neighbours(best, unused):
            if tile not in times:
                times[tile] = seconds(tile)
            if times[tile] < times[best]:
                best, moved = tile, True
                break
    return best, times[best], len(times), sum(math.isinf(t) for t in times.values())


def _best(
    kernel: Kernel,
    x: jax.Array | Packed,
    weights: list[Packed],
    lhs: Operand,
    rhs: Operand,
    shapes: Shapes,
    number: int,
) -> Result:
    name, bits = kernel.name, decode.CODINGS[rhs.element].bits
    activation_bits = 8 * (x.data if isinstance(x, Packed) else x).dtype.itemsize
    start = _tiles.find(name, bits, activation_bits, shapes, number)
    expected = reference.qdot(x, weights[0], lhs_spec=lhs, rhs_spec=rhs, n=shapes.n, k=shapes.k)
    close = CLOSE_FP8 if name in ("triton_fp8_block", "triton_scaled") else CLOSE
    prepared = [kernel.prepare(w) for w in weights]

    def seconds(tile: Tile) -> float:
        @jax.jit
        def run(x, weights):
            def one(w):
                launch, after = triton_dot.launches()[name](x, w, lhs, rhs, shapes, jnp.float32, number, tile=tile)
                return after(triton_call.call(launch, number))

            return [one(w) for w in weights]

        try:
            ys = jax.block_until_ready(run(x, prepared))
        except Exception:  # whatever compiler and driver raise for a tile that is too large: counted as failed
            return float("inf")
        error = float(jnp.max(jnp.abs(ys[0] - expected)) / jnp.max(jnp.abs(expected)))
        if not error <= close:
            raise ValueError(f"{name} with {tile} is off by {error:.2g} of the largest value; please report this")
        return min(_timed(run, x, prepared) for _ in range(REPEATS)) / len(prepared)

    tile, best, tried, failed = descend(start, seconds, UNUSED.get(name, ()))
    if math.isinf(best):
        raise ValueError(f"{name}: none of {tried} tiles compiled and ran, not even the shipped {start}")
    return Result(name, _tiles.exact_key(bits, activation_bits, shapes), tile, best * 1e6, tried, failed)


def _timed(run: Callable, *arguments) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return time.perf_counter() - start


def _operands(lhs: Operand, rhs: Operand, shapes: Shapes, dtype) -> tuple[jax.Array | Packed, list[Packed]]:
    """Random activations, and as many random weights as outgrow the cache."""
    rng = np.random.default_rng(0)
    m, n, k, _ = shapes
    width = -(-k * decode.CODINGS[rhs.element].bits // 8)
    copies = min(MOST_COPIES, max(2, -(-CACHE_BYTES // max(1, n * width))))
    if lhs.element == "float":
        x = jnp.asarray(rng.normal(size=(m, k)), dtype)
    else:
        x = _scaled(rng, lhs, rng.integers(0, 1 << decode.CODINGS[lhs.element].bits, (m, k)), k)
    return x, [_scaled(rng, rhs, rng.integers(0, 256, (n, width)), k) for _ in range(copies)]


def _scaled(rng: np.random.Generator, spec: Operand, data: np.ndarray, k: int) -> Packed:
    """Codes without NaN, random scales about 1."""
    codes, n = data.astype(np.uint8), data.shape[0]
    if decode.CODINGS[spec.element].bits == 8:
        codes &= 0xBF  # no NaN and no inf
    bn, bk = spec.block if isinstance(spec.block, tuple) else (1, spec.block or k)
    shape = (1, 1) if spec.granularity == "tensor" else (-(-n // bn), -(-k // bk))
    low, high = {"e4m3": (0x30, 0x40), "e8m0": (125, 129)}.get(str(spec.scale), (0, 0))
    scale = rng.integers(low, high, shape).astype(np.uint8) if high else rng.uniform(0.5, 1, shape).astype(np.float32)
    whole = jnp.float32(1) if spec.global_scale else None
    return Packed(jnp.asarray(codes.view(np.int8) if spec.element == "int8" else codes), jnp.asarray(scale), whole)
