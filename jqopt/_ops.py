"""The quantized operations (dot, convolution, ragged dot, table lookup) and the one door to jqopt_kernels."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jqopt_kernels as kernels
from jqopt import _feedback, _numerics
from jqopt._qtensor import QTensor
from jqopt.formats import Format

NoKernel = kernels.NoKernelError
BACKENDS = kernels.backends()
"""What a recipe may call the kernels it wants: families, and kernels by their names."""

asked, here = kernels.asked, kernels.here


class InputFormat(NamedTuple):
    """How a site quantizes its activation: the format, which values share a scale, and whether calibration gave it.

    `feedback`: channels that are rounded together, each making up for the errors of those before it; 0: none are.
    """

    format: Format
    granularity: str  # tensor | token | block
    static: bool
    feedback: int = 0


class Weight(NamedTuple):
    """Static facts of a quantized weight matrix [n, k]."""

    format: Format
    granularity: str
    n: int
    k: int


def quantize_input(
    x: jax.Array, spec: InputFormat, scale: jax.Array | None, factors: jax.Array | None = None
) -> jax.Array:
    """Quantize-dequantize of activations [*stack, m, k], float32; straight-through gradient.

    A dynamic scale of the whole tensor is found for each matrix [m, k]. `factors`: as `_feedback.factors` gives them,
    where the spec says feedback.
    """
    return _qdq_traced_once(x, scale, spec) if factors is None else _fed_traced_once(x, scale, factors, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _qdq(x: jax.Array, scale: jax.Array | None, spec: InputFormat) -> jax.Array:
    return _qdq_rows(spec, x, scale)


# jitted so that JAX traces it once for all sites of one shape; inline, since what calls it is lowered once for them
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _qdq_rows(spec: InputFormat, rows: jax.Array, scale: jax.Array | None) -> jax.Array:
    if spec.granularity == "block":
        rows = _numerics.written(rows)
    values = _numerics.qdq_matrix(rows, spec.format, exact=False, **_scaling(spec, scale))
    if spec.format.element.kind == "float":  # rounding floats keeps NaN
        return values
    # no code stands for NaN: it must not be lost
    return lax.select_n(lax.ne(rows, rows), values, lax.full_like(values, np.nan))


def _qdq_fwd(x, scale, spec):
    return _qdq(x, scale, spec), (jnp.zeros((0,), x.dtype), scale)


def _qdq_bwd(spec, kept, g):
    like, scale = kept
    return g.astype(like.dtype), None if scale is None else jnp.zeros_like(scale)


_qdq.defvjp(_qdq_fwd, _qdq_bwd)
_qdq_traced_once = jax.jit(lambda *args: _qdq(*args), static_argnums=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fed(x: jax.Array, scale: jax.Array | None, factors: jax.Array, spec: InputFormat) -> jax.Array:
    """Rounded with feedback."""
    codes = _numerics.quantize_matrix(x, spec.format, packed=False, **_scaling(spec, scale))
    values = _feedback.rounded(x.astype(jnp.float32), codes, spec.format, factors)
    # no code stands for NaN: it must not be lost
    return lax.select_n(lax.ne(x, x), values, lax.full_like(values, np.nan))


def _fed_fwd(x, scale, factors, spec):
    return _fed(x, scale, factors, spec), (jnp.zeros((0,), x.dtype), scale, factors)


def _fed_bwd(spec, kept, g):
    like, scale, factors = kept
    return g.astype(like.dtype), None if scale is None else jnp.zeros_like(scale), jnp.zeros_like(factors)


_fed.defvjp(_fed_fwd, _fed_bwd)
_fed_traced_once = jax.jit(lambda *args: _fed(*args), static_argnums=3)


def _scaling(spec: InputFormat, scale: jax.Array | None) -> dict:
    return {"granularity": _rows(spec), "tensor_scale": scale if spec.static else None}


def _rows(spec: InputFormat) -> str:
    return _rows_of(spec.granularity)


def _rows_of(granularity: str) -> str:
    """The granularity in a matrix's words: a token is a row, as an output channel is."""
    return "channel" if granularity == "token" else granularity


# --------------------------------------------------------------------------------------------- matrices


def takes_codes(
    spec: InputFormat | None, weight: QTensor, m: int, simulate: bool, backend: str | None, device: str | None = None
) -> bool:
    """Will a product with m rows multiply the activation's codes, rather than the values they stand for?"""
    if spec is None or simulate or weight.format.then is not None:
        return False
    if any(kernel.name == backend for kernel in kernels.KERNELS):
        return True  # one kernel by name: it is run as it is
    try:
        return _find(operand(spec.format, _rows(spec)), _facts(weight), m, backend, device).low_precision
    except NoKernel:  # what was asked for may take the values yet; if not, `matmul` says why
        return False


class Activation(NamedTuple):
    """Activations [*stack, m, k] as products take them; one can serve a whole group of products.

    `x`: what is multiplied, or, beside codes, only what the gradient goes to. `lost` [*stack, m, 1]: NaN for rows
    that hold NaN, else 0, where neither codes nor scales can say so.
    """

    x: jax.Array
    codes: kernels.Packed | None = None
    lost: jax.Array | None = None


def activation(
    x: jax.Array,
    spec: InputFormat | None,
    scale: jax.Array | None,
    codes: bool,
    backend: str | None = None,
    device: str | None = None,
    factors: jax.Array | None = None,
) -> Activation:
    """Quantizes activations [*stack, m, k] to codes, or to the values they stand for; `spec` None: not at all."""
    if spec is None:
        return Activation(x)
    if not codes:
        return Activation(quantize_input(x, spec, scale, factors))
    kernel = None if factors is not None else quantizer(x, spec, backend, device)
    return Activation(x, *_encoded(spec, kernel, lax.stop_gradient(x), scale, factors))


def quantizer(x: jax.Array, spec: InputFormat, backend: str | None, device: str | None) -> kernels.Kernel | None:
    """The kernel that makes the codes of activations [*stack, m, k], with the bits of `_numerics`; None: that itself.

    Only where scales are found from rows or blocks: under one scale for the tensor rounding is elementwise, and XLA
    fuses it into what made x. And not with several devices in this process: XLA cannot partition a kernel, and would
    gather what it reads.
    """
    plain = len(spec.format.ranges) == 1 and spec.format.then is None and spec.granularity != "tensor"
    if backend not in (None, "pallas") or not plain or not all(isinstance(size, int) for size in x.shape):
        return None
    if device is None and jax.device_count() > 1:
        return None
    try:
        shapes, described = kernels.Shapes(x.shape[-2], 0, x.shape[-1]), operand(spec.format, _rows(spec))
        return kernels.find("quantize", FLOAT, described, device or kernels.here(), shapes, backend="pallas")
    except kernels.NoKernelError:
        return None


# jitted so that JAX traces and lowers it once for all sites of one shape
@functools.partial(jax.jit, static_argnums=(0, 1))
def _encoded(
    spec: InputFormat,
    kernel: kernels.Kernel | None,
    x: jax.Array,
    scale: jax.Array | None,
    factors: jax.Array | None = None,
) -> tuple[kernels.Packed, jax.Array | None]:
    if kernel is not None:
        codes = _by_kernel(spec, kernel, x, scale)
    else:
        nearest = _numerics.quantize_matrix(x, spec.format, packed=False, **_scaling(spec, scale))
        codes = kernels.Packed(*(nearest if factors is None else _fed_codes(x, nearest, spec.format, factors)))
    if spec.format.element.nan is not None:
        if kernel is not None:  # which gives NaN its code
            return codes, None
        nan = jnp.asarray(spec.format.element.nan, codes.data.dtype)
        return codes._replace(data=jnp.where(jnp.isnan(x), nan, codes.data)), None
    if not spec.static and spec.granularity != "block":  # the scale, found from the row or the tensor, is NaN itself
        return codes, None
    return codes, jnp.sum(jnp.where(x != x, jnp.float32(jnp.nan), 0), axis=-1, keepdims=True)


def _fed_codes(x: jax.Array, nearest: _numerics.Codes, format: Format, factors: jax.Array) -> _numerics.Codes:
    """Codes rounded with feedback, one a byte, under the same scales."""
    values = _feedback.rounded(x.astype(jnp.float32), nearest, format, factors)
    each, zero = _numerics.element_scales(nearest, format, *x.shape[-2:])
    return nearest._replace(data=_numerics.grid_codes(values, each, zero, format))


def _by_kernel(spec: InputFormat, kernel: kernels.Kernel, x: jax.Array, scale: jax.Array | None) -> kernels.Packed:
    described = operand(spec.format, _rows(spec))
    whole = None
    if described.global_scale:
        found = scale if spec.static else _numerics.scale_from_amax(_numerics.amax_of(x, (-2, -1)), spec.format)
        assert found is not None, spec
        # products give quantized operands no gradient, and a kernel refuses to be asked for one
        whole = lax.stop_gradient(jnp.broadcast_to(found.astype(jnp.float32), x.shape[:-2]))

    def quantize(x: jax.Array, whole: jax.Array | None) -> Any:
        return kernel.run(x, spec=described, way=kernels.Way(keep_nan=True), scale=whole)

    run: Any = quantize
    for _ in range(x.ndim - 2):
        run = jax.vmap(run)
    return run(x, whole)


def matmul(
    x: Activation,
    weight: QTensor,
    spec: InputFormat | None,
    *,
    simulate: bool = False,
    backend: str | None = None,
    device: str | None = None,
) -> jax.Array:
    """x [*stack, m, k] times a packed weight [*stack, n, k], transposed: float32 [*stack, m, n].

    `spec` says how codes in x were made; `device` for what to choose the kernel, default this process's. The gradient
    goes straight through both quantizers: dx = dy @ dequantized(weight).
    """
    facts = _facts(weight)
    arrays = kernels.Packed(weight.data, weight.scale, weight.global_scale, weight.zero_point)
    lhs = None if x.codes is None else (x.codes, x.lost)

    def run(x: jax.Array, lhs: Any, arrays: kernels.Packed) -> jax.Array:
        return _traced_once(x, lhs, arrays, facts, spec, simulate, backend, device)

    for _ in range(weight.data.ndim - 2):
        run = jax.vmap(run)
    return run(x.x, lhs, arrays)


def grouped(
    x: jax.Array, weight: QTensor, sizes: jax.Array, *, backend: str | None = None, device: str | None = None
) -> jax.Array:
    """Rows x [m, k] in consecutive groups of `sizes` [e], each times its packed expert of [e, n, k]: float32 [m, n].

    A backend without a kernel for groups leaves the choice here open. The gradient goes straight through.
    """
    arrays = kernels.Packed(weight.data, weight.scale, weight.global_scale, weight.zero_point)
    return _grouped_traced_once(x, arrays, sizes, _facts(weight), backend, device)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _grouped_traced_once(
    x: jax.Array, arrays: kernels.Packed, sizes: jax.Array, facts: Weight, backend: str | None, device: str | None
) -> jax.Array:
    if not any(k.op == "ragged" and backend in (k.name, k.backend) for k in kernels.KERNELS):
        backend = None
    backend = _partitioned("ragged", backend, device)
    rhs, shapes = operand(facts.format, facts.granularity), kernels.Shapes(x.shape[0], facts.n, facts.k, sizes.shape[0])
    kernel = kernels.find("ragged", FLOAT, rhs, device or kernels.here(), shapes, backend=backend)
    return kernel.run(x, arrays, sizes, lhs_spec=FLOAT, rhs_spec=rhs, n=facts.n, k=facts.k)


class Cached(NamedTuple):
    """Keys or values of a cache [batch, length, heads, width]: `data` and `scale` as packed, a scale of the tensor."""

    data: jax.Array
    scale: jax.Array | None
    tensor_scale: jax.Array | None
    format: Format
    granularity: str
    width: int


def attend(
    q: jax.Array,
    k: Cached,
    v: Cached,
    first: jax.Array,
    end: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    backend: str | None = None,
    device: str | None = None,
) -> jax.Array | None:
    """One query token q [batch, heads, width] over the positions first <= s < end [batch]: float32, or None.

    None where the kernel for this device is XLA's, which decodes all keys and values first: the caller may as well.
    """
    backend = _partitioned("attend", backend, device)
    specs = [operand(side.format, _rows_of(side.granularity)) for side in (k, v)]
    batch, length, heads, _ = k.data.shape
    shapes = kernels.Shapes(q.shape[1] // heads, length, k.width, batch * heads)
    found = [
        kernels.find("attend", FLOAT, spec, device or kernels.here(), shapes._replace(k=side.width), backend=backend)
        for spec, side in zip(specs, (k, v), strict=True)
    ]
    if found[0] != found[1] or found[0].backend == "xla":
        return None
    facts = kernels.Attention(specs[0], specs[1], k.width, v.width, scale, softcap)
    return found[0].run(q, _cached(k), _cached(v), first, end, facts=facts)


def _cached(side: Cached) -> kernels.Packed:
    if side.scale is None:
        return kernels.Packed(side.data, None if side.tensor_scale is None else side.tensor_scale.reshape(1, 1))
    return kernels.Packed(side.data, side.scale, side.tensor_scale if side.format.global_scale else None)


def _facts(weight: QTensor) -> Weight:
    return Weight(weight.format, weight.granularity, weight.data.shape[-2], weight.layout.k)


MANY = 1 << 20
"""Rows to choose a kernel by where their number is symbolic: XLA's for many rows are right for every number."""


def _find(
    lhs: kernels.Operand, facts: Weight, m: int, backend: str | None, device: str | None = None
) -> kernels.Kernel:
    rows, backend = (m, backend) if isinstance(m, int) else (MANY, backend or "xla")  # others are compiled for sizes
    rhs, shapes = operand(facts.format, facts.granularity), kernels.Shapes(rows, facts.n, facts.k)
    return kernels.find(
        "qdot", lhs, rhs, device or kernels.here(), shapes, backend=_partitioned("qdot", backend, device)
    )


def _partitioned(op: str, backend: str | None, device: str | None) -> str | None:
    """Where nobody asks for a backend and there are several devices: XLA's kernels, which it can partition.

    Of a call into any other it would gather the operands, packed weights among them.
    """
    alone = device is not None or jax.device_count() == 1
    return backend or kernels.asked(op) or (None if alone else "xla")


BY_TABLE = ("dot_general", "ragged_dot")
"""Sites whose products the table of kernels has; others decode their weight."""
TWICE = "float (weights of two formats in sequence have no kernel: they are decoded)"
FLOAT = kernels.Operand("float", None, None, None)
_NT = (((1,), (1,)), ((), ()))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6, 7))
def _product(
    x, lhs, arrays, facts: Weight, spec: InputFormat | None, simulate: bool, backend: str | None, device: str | None
):
    if simulate or facts.format.then is not None:
        return lax.dot_general(x.astype(jnp.float32), _decoded(facts, arrays), _NT)
    if lhs is None or spec is None:
        return _run(_find(FLOAT, facts, x.shape[0], backend, device), FLOAT, facts, x, arrays)
    codes, lost = lhs
    described = operand(spec.format, _rows(spec))
    out = _run(_find(described, facts, x.shape[0], backend, device), described, facts, codes, arrays)
    return out if lost is None else out + lost


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _run(
    kernel: kernels.Kernel, lhs_spec: kernels.Operand, facts: Weight, lhs: Any, arrays: kernels.Packed
) -> jax.Array:
    rhs_spec = operand(facts.format, facts.granularity)
    return kernel.run(lhs, arrays, lhs_spec=lhs_spec, rhs_spec=rhs_spec, n=facts.n, k=facts.k)


@functools.partial(jax.jit, static_argnums=0)
def _decoded(facts: Weight, arrays: kernels.Packed) -> jax.Array:
    return _dequantize(arrays, facts)


# jitted so that JAX traces and lowers it once for all sites of one shape
_traced_once = jax.jit(lambda *args: _product(*args), static_argnums=(3, 4, 5, 6, 7))


def _product_fwd(x, lhs, arrays, facts, spec, simulate, backend, device):
    out = _product(x, lhs, arrays, facts, spec, simulate, backend, device)
    return out, (arrays, jnp.zeros((0,), x.dtype))


def _product_bwd(facts, spec, simulate, backend, device, kept, g):
    arrays, like = kept
    dx = lax.dot_general(g.astype(jnp.float32), _decoded(facts, arrays), (((1,), (0,)), ((), ())))
    return dx.astype(like.dtype), None, None


_product.defvjp(_product_fwd, _product_bwd)


def _dequantize(arrays, facts: Weight) -> jax.Array:
    return _numerics.dequantize_matrix(
        arrays.data, arrays.scale, arrays.global_scale, arrays.zero_point, facts.format, facts.k
    )


def operand(format: Format, granularity: str) -> kernels.Operand:
    """A format as the kernels' table describes operands."""
    element = "int8" if format.element.name.startswith("int8") else format.element.name
    block = format.block if granularity == "block" else None
    return kernels.Operand(element, block, format.scale.name, granularity, format.global_scale, format.zero_point)


def explain(
    weight: Weight, spec: InputFormat | None, m: int, device: str | None = None, backend: str | None = None
) -> list[tuple[str, str | None]]:
    """For one product: every kernel of the table with None (it can) or the reason why not, in order of preference."""
    if weight.format.then is not None:
        return [(TWICE, None)]
    lhs = FLOAT if spec is None else operand(spec.format, _rows(spec))
    rhs, shapes = operand(weight.format, weight.granularity), kernels.Shapes(m, weight.n, weight.k)
    device = device or kernels.here()
    wanted = {name for name, _ in kernels.explain("qdot", lhs, rhs, device, shapes, backend)}
    rows = [(k.name, k.supports(lhs, rhs, device, shapes)) for k in kernels.KERNELS if k.op == "qdot"]
    return [(name, why if name in wanted else f"not what was asked for, {backend or asked()}") for name, why in rows]


def chosen(
    weight: Weight, spec: InputFormat | None, m: int, device: str | None = None, backend: str | None = None
) -> str:
    """The kernel that `matmul` runs such a product with; where none multiplies codes, the activation is decoded.

    Raises:
        NoKernel: what was asked for by `backend` cannot.
    """
    if weight.format.then is not None:
        return TWICE
    if spec is not None:
        try:
            kernel = _find(operand(spec.format, _rows(spec)), weight, m, backend, device)
        except NoKernel:
            kernel = None
        if kernel is not None and kernel.low_precision:
            return kernel.name
    return _find(FLOAT, weight, m, backend, device).name


def qtake(weight: QTensor, indices: jax.Array) -> jax.Array:
    """Rows of a packed table [n, k] by index (any shape; already in range): float32 [*indices, k]."""
    k = weight.layout.k
    pick = functools.partial(jnp.take, indices=indices.reshape(-1), axis=0, mode="clip")
    tall = weight.scale.shape[-2] == weight.data.shape[-2]
    tile = weight.format.tile if weight.granularity == "block" else None
    scale, zero = weight.scale, weight.zero_point
    if tall:
        scale, zero = pick(scale), None if zero is None else pick(zero)
    elif tile is not None:  # blocks of several rows
        spread = functools.partial(jnp.take, indices=indices.reshape(-1) // tile[0], axis=0, mode="clip")
        scale, zero = spread(scale), None if zero is None else spread(zero)
    format = weight.format.with_block(tile[1]) if tile is not None and tile[0] > 1 else weight.format
    rows = _numerics.dequantize_matrix(pick(weight.data), scale, weight.global_scale, zero, format, k)
    return rows.reshape(*indices.shape, k)
