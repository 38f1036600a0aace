"""Decode attention: every kernel of the op "attend" x ways to hold keys and values equals float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt_kernels as kernels
from jqopt import kv_cache
from jqopt_kernels import Attention, Operand, Packed, Shapes
from tests.kernels.cases import FLOAT, OPERANDS, WEIGHTS, operand
from tests.kernels.lowering import for_cuda

NAMES = [k.name for k in kernels.KERNELS if k.op == "attend"]
FORMATS = {
    "fp8": Operand("e4m3", None, "float32", "tensor"),
    "nvfp4": OPERANDS["nvfp4"],
    "int8": Operand("int8", None, "float32", "channel"),  # a scale for each token's head
    "mxfp8": OPERANDS["mxfp8"],
}
# The others that the table claims, whose scales do not span tokens.
RARE = {name: spec for name, spec in WEIGHTS.items() if name not in FORMATS and not isinstance(spec.block, tuple)}
EVERY = FORMATS | RARE
SLOW = {"pallas_attend": {"fp8", "mxfp8", *RARE}, "xla_attend": RARE, "reference": RARE}
BATCH, LENGTH, HEADS, GROUP, WIDTH, VALUE = 3, 270, 2, 3, 96, 32  # in two parts of the length
FIRST, END = [0, 0, 70], [1, 270, 201]  # one position; all; a window whose ends lie within steps of 64


def kernel(name: str) -> kernels.Kernel:
    return next(k for k in kernels.KERNELS if (k.op, k.name) == ("attend", name))


def claims(name: str, format: str) -> bool:
    return kernel(name).supports(FLOAT, EVERY[format], "cuda:90", Shapes(GROUP, LENGTH, WIDTH, BATCH * HEADS)) is None


@functools.cache
def held(format: str, width: int) -> tuple[Packed, np.ndarray]:
    """(packed [batch, length, heads, bytes], its numbers in float64), of size about 1."""
    rng, spec = np.random.default_rng(width), EVERY[format]
    packed, x = operand(rng, spec, BATCH * LENGTH * HEADS, width, is_packed=True)
    shrink = np.float32(1 / np.abs(x).max())
    lead = (BATCH, LENGTH, HEADS)
    data, scale, zero = packed.data.reshape(*lead, -1), packed.scale, packed.zero_point
    if spec.global_scale:
        packed = packed._replace(global_scale=packed.global_scale * shrink)
    elif spec.scale == "float32":
        scale = scale * shrink
    else:
        shrink = 1.0
    scale = scale if spec.granularity == "tensor" else scale.reshape(*lead, -1)
    zero = None if zero is None else zero.reshape(*lead, -1)
    return packed._replace(data=data, scale=scale, zero_point=zero), x.reshape(*lead, width) * np.float64(shrink)


def query(dtype) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, HEADS * GROUP, WIDTH)), dtype)


def exact(q, k: np.ndarray, v: np.ndarray, scale: float, softcap: float | None) -> tuple[np.ndarray, np.ndarray]:
    """([batch, heads, value], the same with |v|: the scale of its errors), position by position."""
    q = np.asarray(q.astype(jnp.float32), np.float64)
    y, size = np.zeros((2, BATCH, HEADS * GROUP, VALUE))
    for b in range(BATCH):
        for h in range(HEADS * GROUP):
            at = slice(FIRST[b], END[b])
            scores = k[b, at, h // GROUP] @ q[b, h] * scale
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            w = np.exp(scores - scores.max())
            y[b, h], size[b, h] = (w / w.sum() @ x for x in (v[b, at, h // GROUP], np.abs(v[b, at, h // GROUP])))
    return y, size


def run(name: str, q, k: Packed, v: Packed, facts: Attention, first=FIRST, end=END) -> jax.Array:
    call = jax.jit(functools.partial(kernel(name).run, facts=facts))
    return call(q, k, v, jnp.asarray(first, jnp.int32), jnp.asarray(end, jnp.int32))


def facts_of(format: str, scale: float, softcap: float | None = None) -> Attention:
    return Attention(EVERY[format], EVERY[format], WIDTH, VALUE, scale, softcap)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        pytest.param(n, f, marks=[pytest.mark.slow] if f in SLOW.get(n, {}) else [])
        for n in NAMES
        for f in EVERY
        if claims(n, f)
    ],
)
def test_float32_queries_lose_nothing(name, format):
    """Scores of size 10: their float32 rounding, about 100 x 2^-24 x |q||k|, moves weights by as much."""
    (k, k64), (v, v64) = held(format, WIDTH), held(format, VALUE)
    q = query(jnp.float32)
    scale = (
        10.0
        / np.abs(np.einsum("blhd,bhgd->blhg", k64, np.asarray(q, np.float64).reshape(BATCH, HEADS, GROUP, -1))).max()
    )
    y = run(name, q, k, v, facts_of(format, scale, 30.0))
    want, size = exact(q, k64, v64, scale, 30.0)
    assert y.shape == (BATCH, HEADS * GROUP, VALUE) and y.dtype == jnp.float32
    assert np.abs(y - want).max() <= 1e-5 * size.max()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_results(name):
    """The float32 result, rounded once."""
    (k, k64), (v, v64) = held("nvfp4", WIDTH), held("nvfp4", VALUE)
    q, sees = query(jnp.float32), (jnp.asarray(FIRST), jnp.asarray(END))
    call = functools.partial(kernel(name).run, facts=facts_of("nvfp4", 0.5), out_dtype=jnp.bfloat16)
    y = jax.jit(call)(q, k, v, *sees)
    want, size = exact(q, k64, v64, 0.5, None)
    assert y.dtype == jnp.bfloat16
    assert (np.abs(np.asarray(y.astype(jnp.float32)) - want) <= 2.0**-8 * np.abs(want) + 1e-5 * size.max()).all()


@pytest.mark.parametrize("format", ["fp8"])
def test_bfloat16_queries_round_only_the_weights(format):
    """Each weight of the softmax is off by at most 2^-9 of itself, relative to their largest."""
    (k, k64), (v, v64) = held(format, WIDTH), held(format, VALUE)
    q = query(jnp.bfloat16)
    y = run("pallas_attend", q, k, v, facts_of(format, 0.5))
    want, size = exact(q, k64, v64, 0.5, None)
    assert (np.abs(y - want) <= 2.0**-8 * size + 1e-5 * size.max()).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_seen_does_not_count(name):
    """NaN codes and scales behind the end; and a sequence that sees nothing gives zeros."""
    (k, _), (v, _) = held("mxfp8", WIDTH), held("mxfp8", VALUE)
    q, facts = query(jnp.float32), facts_of("mxfp8", 0.01)
    end = [1, 270, 0]
    spoil = lambda x: x.at[0, 1:].set(0xFF)  # noqa: E731
    k2, v2 = (p._replace(data=spoil(p.data), scale=spoil(p.scale)) for p in (k, v))
    y, clean = run(name, q, k2, v2, facts, [0, 0, 0], end), run(name, q, k, v, facts, [0, 0, 0], end)
    np.testing.assert_array_equal(y, clean)
    np.testing.assert_array_equal(y[2], np.zeros((HEADS * GROUP, VALUE)))


def test_lowers_for_cuda_also_under_vmap_and_scan():
    (k, _), (v, _) = held("nvfp4", WIDTH), held("nvfp4", VALUE)
    shapes = Shapes(GROUP, LENGTH, WIDTH, BATCH * HEADS)
    chosen = kernels.find("attend", FLOAT, FORMATS["nvfp4"], "cuda:90", shapes)
    assert chosen.name == "pallas_attend"
    call = functools.partial(chosen.run, facts=facts_of("nvfp4", 0.1))
    arrays = (query(jnp.bfloat16), k, v, jnp.asarray(FIRST), jnp.asarray(END))
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), arrays)
    for f, args in (
        (call, arrays),
        (jax.vmap(call), stacked),
        (functools.partial(jax.lax.map, lambda a: call(*a)), (stacked,)),
    ):
        text = for_cuda(f, *args).as_text()
        assert text.count("@__gpu$xla.gpu.triton") == 1


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (OPERANDS["int4"], "float32 scales of blocks"),
        (OPERANDS["mxfp6"], "'e3m2' is not written for Pallas"),
        (Operand("e2m1", 64, "e4m3", "block"), "width 96 is not a multiple of the block, 64"),
    ],
)
def test_refusals(spec, reason):
    reasons = dict(kernels.explain("attend", FLOAT, spec, "cuda:90", Shapes(GROUP, LENGTH, WIDTH, 6)))
    assert reason in reasons["pallas_attend"]


# ------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize(
    "spec",
    [
        {"format": "fp8", "scaling": "cast"},
        pytest.param({"format": "nvfp4", "scaling": "cast", "rotate": True}, marks=pytest.mark.slow),
    ],
)
def test_a_cache_attends_with_it(spec):
    """As the cache does with decoded keys and values, for sequences at different positions and within a window."""
    cache = kv_cache.init((BATCH, 40, HEADS, 32), spec, dtype=jnp.float32)
    k, v = jax.random.normal(jax.random.key(0), (2, BATCH, 40, HEADS, 32))
    cache = kv_cache.append(cache, k, v, 0)
    q = jax.random.normal(jax.random.key(1), (BATCH, 1, HEADS * GROUP, 32))
    position = jnp.asarray([0, 39, 20])
    options = {"window": 7, "softcap": 20.0, "scale": 0.3}
    want = kv_cache.attend(cache, q, position, **options)
    got = kv_cache.attend(cache, q, position, **options, backend="pallas", device="cpu:interpret")
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_a_cache_attends_with_it_on_cuda():
    cache = kv_cache.init((BATCH, 40, HEADS, 32), {"format": "nvfp4", "scaling": "cast"})
    q = jnp.zeros((BATCH, 1, HEADS * GROUP, 32), jnp.bfloat16)
    run = functools.partial(kv_cache.attend, device="cuda:90")

    def lowered(q: jax.Array) -> str:
        return for_cuda(run, cache, q, 3).as_text()

    assert "pallas_attend" in lowered(q)
    assert "pallas_attend" not in lowered(jnp.zeros((BATCH, 2, HEADS * GROUP, 32), jnp.bfloat16))  # two tokens
