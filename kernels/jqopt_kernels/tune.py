"""Search for the best tile of a Triton kernel on the GPU at hand, by time, and keep it where `_tiles` looks first.

A coordinate descent: from the shipped tile, each number is halved and doubled in turn, as long as that helps. A tile
whose product differs from the oracle's is an error, one that does not compile is left out and counted.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _tiles, decode, reference, triton_call, triton_dot
from ._device import capability, here, platform
from ._tiles import Tile
from ._types import Operand, Packed, Shapes

FLOAT = Operand("float")
CACHE_BYTES = 256 << 20  # weights are rotated through more memory than any second-level cache holds
MOST_COPIES, REPEATS = 64, 5
CLOSE = 1e-4  # of the largest value: far more than float32 sums differ by, far less than a wrong tile does
LIMITS = {"bn": (1, 256), "bk": (32, 2048), "bm": (16, 256), "warps": (2, 8), "stages": (1, 6), "split": (1, 32)}


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


def search(rhs: Operand, shapes: Shapes, device: str) -> list[Result]:
    """The best tile of each Triton kernel for bfloat16 activations times weights `rhs`.

    Raises ValueError if no Triton kernel takes this product, or one gives other numbers than the oracle.
    """
    named = [triton_dot.triton_gemv, triton_dot.triton_skinny, triton_dot.triton_gemm]
    able = [k.name for k in named if k.supports(FLOAT, rhs, device, shapes) is None]
    if not able:
        reasons = "; ".join(f"{k.name}: {k.supports(FLOAT, rhs, device, shapes)}" for k in named)
        raise ValueError(f"no Triton kernel takes {rhs} at {shapes} on {device}: {reasons}")
    x, weights = _operands(rhs, shapes)
    number = capability(device)
    assert number is not None, device
    return [_best(name, x, weights, rhs, shapes, number) for name in able]


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


def neighbours(tile: Tile) -> Iterator[Tile]:
    """Tiles with one number halved or doubled, or the other way to split an activation."""
    for field, (least, most) in LIMITS.items():
        for value in (getattr(tile, field) // 2, max(1, getattr(tile, field)) * 2):
            if least <= value <= most:
                yield tile._replace(**{field: value})
    yield tile._replace(halves=not tile.halves)


def descend(start: Tile, seconds: Callable[[Tile], float]) -> tuple[Tile, float, int, int]:
    """(best tile, its time, tiles tried, tiles whose time is infinite): moves to a better neighbour until none is."""
    times = {start: seconds(start)}
    best, moved = start, True
    while moved:
        moved = False
        for tile in neighbours(best):
            if tile not in times:
                times[tile] = seconds(tile)
            if times[tile] < times[best]:
                best, moved = tile, True
                break
    return best, times[best], len(times), sum(np.isinf(t) for t in times.values())


def _best(name: str, x: jax.Array, weights: list[Packed], rhs: Operand, shapes: Shapes, number: int) -> Result:
    bits = decode.CODINGS[rhs.element].bits
    start = _tiles.find(name, bits, 16, shapes, number)
    expected = reference.qdot(x, weights[0], lhs_spec=FLOAT, rhs_spec=rhs, n=shapes.n, k=shapes.k)

    def seconds(tile: Tile) -> float:
        @jax.jit
        def run(x, weights):
            def one(w):
                launch, after = triton_dot.LAUNCHES[name](x, w, FLOAT, rhs, shapes, jnp.float32, number, tile=tile)
                return after(triton_call.call(launch, number))

            return [one(w) for w in weights]

        try:
            ys = jax.block_until_ready(run(x, weights))
        except Exception:  # whatever compiler and driver raise for a tile that is too large: counted as failed
            return float("inf")
        error = float(jnp.max(jnp.abs(ys[0] - expected)) / jnp.max(jnp.abs(expected)))
        if not error <= CLOSE:
            raise ValueError(f"{name} with {tile} is off by {error:.2g} of the largest value; please report this")
        return min(_timed(run, x, weights) for _ in range(REPEATS)) / len(weights)

    tile, best, tried, failed = descend(start, seconds)
    if np.isinf(best):
        raise ValueError(f"{name}: none of {tried} tiles compiled and ran, not even the shipped {start}")
    return Result(name, _tiles.exact_key(bits, 16, shapes), tile, best * 1e6, tried, failed)


def _timed(run: Callable, *arguments) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return time.perf_counter() - start


def _operands(rhs: Operand, shapes: Shapes) -> tuple[jax.Array, list[Packed]]:
    """Random activations, and as many random weights as outgrow the cache."""
    rng = np.random.default_rng(0)
    width = -(-shapes.k * decode.CODINGS[rhs.element].bits // 8)
    copies = min(MOST_COPIES, max(2, -(-CACHE_BYTES // max(1, shapes.n * width))))
    x = jnp.asarray(rng.normal(size=(shapes.m, shapes.k)), jnp.bfloat16)
    return x, [_weight(rng, rhs, shapes.n, shapes.k, width) for _ in range(copies)]


def _weight(rng: np.random.Generator, spec: Operand, n: int, k: int, width: int) -> Packed:
    """Random codes without NaN, scales about 1."""
    data = rng.integers(0, 256, (n, width)).astype(np.uint8)
    if decode.CODINGS[spec.element].bits == 8:
        data &= 0xBF  # no NaN and no inf
    bn, bk = spec.block if isinstance(spec.block, tuple) else (1, spec.block or k)
    shape = (1, 1) if spec.granularity == "tensor" else (-(-n // bn), -(-k // bk))
    low, high = {"e4m3": (0x30, 0x40), "e8m0": (125, 129)}.get(str(spec.scale), (0, 0))
    scale = rng.integers(low, high, shape).astype(np.uint8) if high else rng.uniform(0.5, 1, shape).astype(np.float32)
    codes = data.view(np.int8) if spec.element == "int8" else data
    whole = jnp.float32(1) if spec.global_scale else None
    return Packed(jnp.asarray(codes), jnp.asarray(scale), whole)
