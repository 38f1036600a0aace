"""Cases of the ops that are no plain product: quantizers, the largest value, grouped products, decode attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import jqopt_kernels as kernels
from benchmarks.kernel_cases import FLOAT, FORMATS, Case, operand, qdot
from jqopt_kernels import Attention, Operand, Packed, Shapes, Way
from jqopt_kernels.quantize_way import SIGNS

# rows and columns of activations: a prompt of Llama 70B and of a 5B model; on a CPU what is done in a blink
MATRICES = {True: ((8192, 8192), (8192, 5120), (64, 8192)), False: ((256, 1024),)}
TARGETS = {
    "nvfp4": (FORMATS["nvfp4"], Way()),
    "nvfp4, Hadamard": (FORMATS["nvfp4"], Way(encode=True, hadamard=SIGNS)),
    "mxfp8": (FORMATS["mxfp8"], Way()),
    "fp8 by token": (Operand("e4m3", None, "float32", "channel"), Way()),
    "fp8, given scale": (FORMATS["fp8"], Way()),
    "fp8 1x128": (Operand("e4m3", (1, 128), "float32", "block"), Way()),
}


def quantizers(op: str) -> Callable[..., Iterator[Case]]:
    """Cases of an op that makes codes of one matrix (quantize), of it and its transpose, or of a norm or SwiGLU."""

    def cases(is_gpu: bool, shapes: tuple | None = None, rows: tuple | None = None) -> Iterator[Case]:
        for m, k in shapes or MATRICES[is_gpu]:
            for label, (spec, way) in TARGETS.items():
                # scales of whole rows and whole columns at once: no kernel reads x once for that
                if op != "quantize_both" or spec.granularity != "channel":
                    yield _quantizer(op, label, spec, way, m, k)

    return cases


def _quantizer(op: str, label: str, spec: Operand, way: Way, m: int, k: int) -> Case:
    whole = (
        jnp.float32(0.01 if not way.encode else 100.0) if spec.global_scale or spec.granularity == "tensor" else None
    )
    own = {"spec": spec, "way": way, "scale": whole, "packed": True}

    def call(kernel: kernels.Kernel) -> Callable[[Any, Any], Any]:
        if op == "quantize_both":
            return lambda _, x: kernel.run(x, **own, column_way=way, column_scale=whole)
        if op == "norm_quantize":
            return lambda gain, x: kernel.run(x, gain, **own)
        if op == "swiglu_quantize":
            return lambda gate, x: kernel.run(gate, x, **own)
        return lambda _, x: kernel.run(x, **own)

    def arrays(copy: int, rows: Any) -> tuple[Any, jax.Array]:
        x = jax.random.normal(jax.random.key(1 + copy), (m, k), jnp.bfloat16)
        stays = {"norm_quantize": (k,), "swiglu_quantize": (m, k)}.get(op)
        return (() if stays is None else jnp.ones(stays, jnp.bfloat16)), x

    return Case(
        op, label, FLOAT, spec, Shapes(m, 0, k), arrays, lambda copy: arrays(copy, None),
        lambda _, x: x.astype(jnp.float8_e4m3fn), jnp.bfloat16, call, 0.0,
    )  # fmt: skip


def amax(is_gpu: bool, shapes: tuple | None = None, rows: tuple | None = None) -> Iterator[Case]:
    """The largest value of the matrix and of its rows, before and after the Hadamard transform."""
    token = Operand("e4m3", None, "float32", "channel")
    for m, k in shapes or MATRICES[is_gpu]:
        for label, spec, way in (
            ("tensor", FORMATS["fp8"], Way()),
            ("rows", token, Way()),
            ("tensor, Hadamard", FORMATS["nvfp4"], Way(encode=True, hadamard=SIGNS)),
        ):
            base = _quantizer("quantize", label, spec, way, m, k)
            yield base._replace(
                op="amax", plain=lambda _, x: jnp.abs(x).max(),
                call=lambda kernel, spec=spec, way=way: lambda _, x: kernel.run(x, spec=spec, way=way),
            )  # fmt: skip


def ragged(is_gpu: bool, shapes: tuple | None = None, rows: tuple | None = None) -> Iterator[Case]:
    """Mixtral's up projection: eight experts, two for each token; on a CPU a small one."""
    dtype = jnp.bfloat16 if is_gpu else jnp.float32
    for n, k in shapes or (((14336, 4096),) if is_gpu else ((512, 512),)):
        for m in rows or ((16, 512, 4096) if is_gpu else (32,)):
            for label in ("nvfp4", "fp8_block"):
                yield _ragged(label, Shapes(m, n, k, 8), dtype)


def _ragged(label: str, shapes: Shapes, dtype: Any) -> Case:
    m, n, k, experts = shapes
    rhs = FORMATS[label]
    sizes = jnp.asarray([m // experts + (i < m % experts) for i in range(experts)], jnp.int32)
    x = jax.random.normal(jax.random.key(0), (m, k), dtype)

    def arrays(copy: int, rows: Any) -> tuple[Any, Packed]:
        each = [operand(rhs, n, k, is_packed=True, seed=experts * copy + e) for e in range(experts)]
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    def call(kernel: kernels.Kernel) -> Callable[[Any, Any], jax.Array]:
        own = {"lhs_spec": FLOAT, "rhs_spec": rhs, "n": n, "k": k, "out_dtype": dtype}
        return lambda x, w: kernel.run(x, w, sizes, **own)

    return Case(
        "ragged", f"float x 8 {label}", FLOAT, rhs, shapes, arrays,
        lambda copy: (x, jax.random.normal(jax.random.key(1 + copy), (experts, k, n), dtype)),
        lambda x, w: jax.lax.ragged_dot(x, w, sizes), dtype, call, 2.0 * m * n * k,
    )  # fmt: skip


def attend(is_gpu: bool, shapes: tuple | None = None, rows: tuple | None = None) -> Iterator[Case]:
    """One token of Llama 8B's attention over a long cache (32 query heads, 8 of keys); on a CPU a short one."""
    for batch, length in ((16, 4096), (1, 16384), (64, 1024)) if is_gpu else ((2, 256),):
        for label in ("fp8", "nvfp4"):
            yield _attend(label, batch, length, jnp.bfloat16 if is_gpu else jnp.float32)


def _attend(label: str, batch: int, length: int, dtype: Any, heads: int = 8, group: int = 4, width: int = 128) -> Case:
    spec, size = FORMATS[label], (batch, heads * group, width)
    facts = Attention(spec, spec, width, width, width**-0.5)
    first, end = jnp.zeros(batch, jnp.int32), jnp.full(batch, length, jnp.int32)
    q = jax.random.normal(jax.random.key(0), size, dtype)

    def cache(seed: int) -> Packed:
        flat = operand(spec, batch * length * heads, width, is_packed=True, seed=seed)
        apart = spec.granularity == "tensor"
        scale = flat.scale if apart or flat.scale is None else flat.scale.reshape(batch, length, heads, -1)
        return flat._replace(data=flat.data.reshape(batch, length, heads, -1), scale=scale)

    def plain(q: jax.Array, kv: tuple[jax.Array, jax.Array]) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):  # JAX 0.10's own attention mixes dtypes
            return jax.nn.dot_product_attention(q[:, None], *kv)[:, 0]

    def slack() -> jax.Array:
        """For bfloat16 queries the softmax's weights are rounded to bfloat16: 2^-8 of weights times |values|."""
        k, v = cache(0), cache(1)
        magnitude = v._replace(data=v.data & (0x77 if spec.element == "e2m1" else 0x7F))
        run = kernels.find("attend", FLOAT, spec, kernels.here(), shapes, backend="reference").run
        return 2.0**-8 * run(q.astype(jnp.float32), k, magnitude, first, end, facts=facts, out_dtype=jnp.float32)

    shapes = Shapes(group, length, width, batch * heads)

    def floats(copy: int) -> tuple[Any, Any]:
        keys = jax.random.split(jax.random.key(1 + copy))
        return q, tuple(jax.random.normal(key, (batch, length, heads, width), dtype) for key in keys)

    return Case(
        "attend", f"{label} cache", FLOAT, spec, shapes,
        lambda copy, rows: (q, (cache(2 * copy), cache(2 * copy + 1))), floats, plain, dtype,
        lambda kernel: lambda q, kv: kernel.run(q, *kv, first, end, facts=facts, out_dtype=dtype),
        4.0 * batch * heads * group * length * width, slack if dtype == jnp.bfloat16 else None,
    )  # fmt: skip


def swizzle(is_gpu: bool, shapes: tuple | None = None, rows: tuple | None = None) -> Iterator[Case]:
    """Block scales of an NVFP4 matrix into tiles of 128x4, beside a copy."""
    for m, k in shapes or MATRICES[is_gpu]:
        base = _quantizer("quantize", "nvfp4 scales", FORMATS["nvfp4"], Way(), m, k)

        def arrays(copy: int, rows: Any, m: int = m, k: int = k) -> tuple[Any, jax.Array]:
            return (), jax.random.bits(jax.random.key(copy), (m, k // 16), jnp.uint8)

        yield base._replace(
            op="swizzle", arrays=arrays, baseline=lambda copy, arrays=arrays: arrays(copy, None),
            plain=lambda _, x: x ^ jnp.uint8(1), call=lambda kernel: lambda _, x: kernel.run(x),
        )  # fmt: skip


def unswizzle(is_gpu: bool, shapes: tuple | None = None, rows: tuple | None = None) -> Iterator[Case]:
    """And back."""
    for case in swizzle(is_gpu, shapes, rows):
        m, k = case.shapes.m, case.shapes.k

        def arrays(copy: int, rows: Any, m: int = m, k: int = k) -> tuple[Any, jax.Array]:
            down, across = -(-m // 128) * 128, -(-k // 64) * 4
            return (), jax.random.bits(jax.random.key(copy), (down, across), jnp.uint8)

        yield case._replace(
            op="unswizzle", arrays=arrays, baseline=lambda copy, arrays=arrays: arrays(copy, None),
            call=lambda kernel, m=m, k=k: lambda _, x: kernel.run(x, m, k // 16),
        )  # fmt: skip


# Ops with a function (is_gpu, shapes, rows) -> cases. An op of the table that is not here is named in the report.
CASES: dict[str, Callable[..., Iterator[Case]]] = {
    "qdot": qdot,
    "ragged": ragged,
    "attend": attend,
    "amax": amax,
    "swizzle": swizzle,
    "unswizzle": unswizzle,
    **{op: quantizers(op) for op in ("quantize", "quantize_both", "norm_quantize", "swiglu_quantize")},
}
