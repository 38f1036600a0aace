"""Gradients: of float operands against float64; packed arrays have none in any kernel; quantizers refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt_kernels as kernels
from jqopt_kernels import Shapes
from jqopt_kernels.quantize_way import needs_scale
from tests.kernels import test_attend as attend
from tests.kernels import test_grouped as grouped
from tests.kernels.cases import FLOAT, OPERANDS, PAIRS, case, operand
from tests.kernels.quantize_cases import FORMATS, matrix
from tests.kernels.test_contract import CLAIMS, runner

# kernel: rows; every one that takes a float left operand here. Triton's are in test_triton.py.
ROWS = {
    "reference": 3,
    "xla_decode": 3,
    "xla_lookup": 3,
    "xla_tiled": 3,
    "xla_row": 1,
    "ffi_gemm": 3,
    "pallas_gemv": 3,
    "pallas_skinny": 5,
    "pallas_gemm": 65,
}


@pytest.fixture(autouse=True)
def installed(request):
    if "ffi" in request.node.name:
        request.getfixturevalue("library")


def test_all_kernels_of_a_float_operand_are_here():
    shapes = [Shapes(m, 300, k) for m in (1, 5, 65) for k in (40, 1024)]
    taking = {
        name
        for name, claims in CLAIMS.items()
        for s in shapes
        for d in ("cpu", "cuda")
        if claims(FLOAT, OPERANDS["nvfp4"], d, s) is None
    }
    assert {name for name in taking if not name.startswith("triton")} == set(ROWS)


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "m"), ROWS.items())
def test_of_the_float_side(name, m, dtype):
    """g @ w: sums of n products, rounded to the operand's dtype at the end."""
    n, k = 300, 40
    c = case("nvfp4", m, n, k, float_dtype=dtype)
    _, w = operand(np.random.default_rng([0, m, n, k]), OPERANDS["nvfp4"], n, k, is_packed=True)
    g = np.random.default_rng(1).normal(size=(m, n)).astype(np.float32)
    grad = jax.jit(jax.grad(lambda x: (runner(name, c.specs)(x, c.rhs) * g).sum()))(c.lhs)
    assert grad.dtype == dtype
    want, size = np.float64(g) @ w, np.abs(g) @ np.abs(w)
    last = 2.0**-8 * np.abs(want) if dtype == jnp.bfloat16 else 0
    assert np.all(np.abs(np.asarray(grad.astype(jnp.float32)) - want) <= 2 * (n + 8) * 2.0**-24 * size + last)


# One product of each kernel that multiplies codes, with what scales it has.
OF_CODES = {
    "xla_int8": ("int8 x int8", 3),
    "xla_int8_row": ("int8 x int8", 1),
    "xla_fp8": ("fp8 x fp8", 3),
    "xla_fp8_dot": ("fp8_channel x fp8_channel", 3),
    "xla_tiled_bf16": ("nvfp4 x nvfp4", 3),
    "xla_scaled": ("nvfp4 x nvfp4", 3),
}


def zero(tree) -> None:
    leaves = jax.tree.leaves(tree)
    assert leaves
    for leaf in leaves:
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def floats(packed):
    """(the float arrays of a Packed by name, what puts others in their place)"""
    given = {name: a for name, a in packed._asdict().items() if a is not None and jnp.issubdtype(a.dtype, jnp.floating)}
    return given, lambda arrays: packed._replace(**arrays)


@pytest.mark.parametrize(
    ("name", "pair", "m"),
    [
        *((name, pair, m) for name, m in ROWS.items() for pair in ("nvfp4", "int4")),
        *((name, *of) for name, of in OF_CODES.items()),
    ],
)
def test_packed_arrays_of_products_have_none(name, pair, m):
    c = case(pair, m, 12, 64)
    given, put = floats(c.rhs)
    run = runner(name, c.specs)
    zero(jax.grad(lambda arrays: run(c.lhs, put(arrays)).sum())(given))
    if PAIRS[pair][0] != "float":
        given, put = floats(c.lhs)
        zero(jax.grad(lambda arrays: run(put(arrays), c.rhs).sum())(given))


@pytest.mark.parametrize("name", grouped.NAMES)
def test_packed_arrays_of_experts_have_none(name):
    given, put = floats(grouped.experts("nvfp4")[0])
    call = functools.partial(
        grouped.kernel(name).run, lhs_spec=FLOAT, rhs_spec=OPERANDS["nvfp4"], n=grouped.N, k=grouped.K
    )
    x, sizes = grouped.lhs(40), jnp.asarray([3, 0, 30, 5])
    zero(jax.grad(lambda arrays: call(x, put(arrays), sizes).sum())(given))


# ------------------------------------------------------------------------------------------------- decode attention


def slope(q, k: np.ndarray, v: np.ndarray, g: np.ndarray, scale: float, cap: float, end) -> np.ndarray:
    """d sum(g y) / d q in float64: y = sum w v, w = softmax(s), s = cap tanh(scale q k / cap)."""
    q, dq = np.asarray(q.astype(jnp.float32), np.float64), np.zeros(q.shape)
    for b in range(attend.BATCH):
        for h in range(q.shape[1]):
            at = slice(attend.FIRST[b], end[b])
            keys, values = k[b, at, h // attend.GROUP], v[b, at, h // attend.GROUP]
            if not len(keys):
                continue
            bent = np.tanh(keys @ q[b, h] * scale / cap)
            w = np.exp(cap * (bent - bent.max()))
            w, along = w / w.sum(), values @ g[b, h]
            dq[b, h] = (w * (along - w @ along) * (1 - bent**2) * scale) @ keys
    return dq


@pytest.mark.parametrize("name", attend.NAMES)
def test_of_queries(name):
    """With NaN among keys and values that are not seen, scores far below zero, and a sequence that sees nothing."""
    (k, k64), (v, v64) = attend.held("nvfp4", attend.WIDTH), attend.held("nvfp4", attend.VALUE)
    spoil = lambda p: p._replace(scale=p.scale.at[0, 1:].set(0x7F))  # noqa: E731
    q, end = attend.query(jnp.float32), [1, 270, 0]
    g = np.random.default_rng(3).normal(size=(attend.BATCH, q.shape[1], attend.VALUE)).astype(np.float32)
    facts = attend.facts_of("nvfp4", 0.5, 30.0)
    arrays = (spoil(k), spoil(v), jnp.asarray(attend.FIRST), jnp.asarray(end))
    grad = jax.jit(jax.grad(lambda q: (attend.kernel(name).run(q, *arrays, facts=facts) * g).sum()))(q)
    want = slope(q, k64, v64, g, 0.5, 30.0, end)
    np.testing.assert_allclose(grad, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", ["reference", "xla_attend"])
def test_of_queries_far_from_what_they_see(name):
    """Scores of -200 seen, 0 behind the end: their exponential must not meet a zero as infinity."""
    spec = kernels.Operand("int8", None, "float32", "tensor")
    data = jnp.zeros((1, 3, 1, 16), jnp.int8).at[0, :2].set(-100).at[0, 1, 0, 0].set(-99)
    keys = kernels.Packed(data, jnp.ones((1, 1), jnp.float32))
    values = keys._replace(data=jnp.zeros_like(data).at[0, 1].set(1))
    facts = kernels.Attention(spec, spec, 16, 16, 1.0)
    run = functools.partial(attend.kernel(name).run, facts=facts)
    sees = (jnp.asarray([0]), jnp.asarray([2]))
    grad = jax.grad(lambda q: run(q, keys, values, *sees)[..., 0].sum())(jnp.full((1, 1, 16), 0.125))
    # the two keys differ by 1 in column 0 alone, their scores by 1/8, their values by 1
    w = 1 / (1 + np.exp(-0.125))
    np.testing.assert_allclose(grad[0, 0], [w * (1 - w), *[0] * 15], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", attend.NAMES)
def test_packed_arrays_of_a_cache_have_none(name):
    k, v = attend.held("nvfp4", attend.WIDTH)[0], attend.held("nvfp4", attend.VALUE)[0]
    q, sees = attend.query(jnp.float32), (jnp.asarray(attend.FIRST), jnp.asarray(attend.END))
    call = functools.partial(attend.kernel(name).run, facts=attend.facts_of("nvfp4", 0.1))
    scales = (k.global_scale, v.global_scale)
    put = lambda s: (k._replace(global_scale=s[0]), v._replace(global_scale=s[1]))  # noqa: E731
    zero(jax.jit(jax.grad(lambda s: call(q, *put(s), *sees).sum()))(scales))


# ------------------------------------------------------------------------------------------------------- quantizers

QUANTIZERS = ("quantize", "quantize_both", "norm_quantize", "swiglu_quantize", "amax")


@pytest.mark.parametrize("kernel", [k for k in kernels.KERNELS if k.op in QUANTIZERS], ids=lambda k: k.name)
def test_quantizers_refuse(kernel):
    spec, x = FORMATS["nvfp4"][0], matrix(2, 16)
    scale = {"scale": jnp.float32(1)} if needs_scale(spec) and kernel.op != "amax" else {}
    more = {"column_scale": jnp.float32(1)} if kernel.op == "quantize_both" else {}
    others = {"norm_quantize": (x[0],), "swiglu_quantize": (x,)}.get(kernel.op, ())

    def total(x):
        found = kernel.run(x, *others, spec=spec, **scale, **more)
        return sum(jnp.sum(a.astype(jnp.float32)) for a in jax.tree.leaves(found))

    with pytest.raises(TypeError, match="stop_gradient"):
        jax.grad(total)(x)
    zero(jax.grad(lambda x: total(jax.lax.stop_gradient(x)))(x))


@pytest.mark.parametrize("family", ["pallas", "xla", "reference"])
def test_swizzles_move_it_back(family):
    """They only move scales: the gradient is the other one's, for scales in float32; those in bits have none."""
    swizzle, unswizzle = (
        next(k for k in kernels.KERNELS if (k.op, k.backend) == (op, family)).run for op in ("swizzle", "unswizzle")
    )
    x, g = jnp.arange(130.0 * 6).reshape(130, 6), jnp.arange(256.0 * 8).reshape(256, 8)
    into = jax.grad(lambda x: (swizzle(x) * g).sum())(x)
    np.testing.assert_array_equal(into, unswizzle(g, 130, 6))
    back = jax.grad(lambda s: (unswizzle(s, 130, 6) * x).sum())(g)
    np.testing.assert_array_equal(back, swizzle(x))
    bits = jax.grad(lambda x: x.sum() + swizzle(jnp.abs(x).astype(jnp.uint8)).astype(jnp.float32).sum())(x)
    np.testing.assert_array_equal(bits, np.ones(x.shape))
