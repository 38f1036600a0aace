"""Grouped products: every kernel of the op "ragged" x formats and group sizes equals float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt
import jqopt_kernels as kernels
from jqopt import _ops
from jqopt_kernels import Shapes
from jqopt_kernels._groups import tiled
from tests.kernels.cases import FLOAT, OPERANDS, WEIGHTS, bound, operand
from tests.kernels.lowering import for_cuda
from tests.kernels.test_contract import assert_within

NAMES = [k.name for k in kernels.KERNELS if k.op == "ragged"]
OFTEN = {
    "pallas_ragged": {"nvfp4", "uint4"},
    "xla_ragged": {"nvfp4", "int8", "uint4", "fp8_block", "mxfp4", "mxfp6", "nf4"},
    "reference": set(WEIGHTS),
}
N, K, EXPERTS = 20, 70, 4


def kernel(name: str) -> kernels.Kernel:
    return next(k for k in kernels.KERNELS if (k.op, k.name) == ("ragged", name))


@functools.cache
def experts(format: str):
    """(Packed with experts in front, [e, n, k] float64)."""
    rng = np.random.default_rng(0)
    both = [operand(rng, OPERANDS[format], N, K, is_packed=True) for _ in range(EXPERTS)]
    return jax.tree.map(lambda *a: jnp.stack(a), *(p for p, _ in both)), np.stack([w for _, w in both])


def lhs(m: int, dtype=jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(m).normal(size=(m, K)), dtype)


def exact(x: jax.Array, w: np.ndarray, sizes) -> tuple[np.ndarray, np.ndarray]:
    """([m, n], its bound), a row at a time from the definition."""
    x = np.asarray(x.astype(jnp.float32), np.float64)
    owner = np.repeat(np.arange(EXPERTS), sizes)
    y, error = np.zeros((2, len(x), N))
    for i, e in enumerate(owner):
        y[i], error[i] = x[i] @ w[e].T, bound(x[i : i + 1], w[e])[0]
    return y, error


def run(name: str, format: str, x: jax.Array, sizes) -> jax.Array:
    call = functools.partial(kernel(name).run, lhs_spec=FLOAT, rhs_spec=OPERANDS[format], n=N, k=K)
    return jax.jit(call)(x, experts(format)[0], jnp.asarray(sizes, jnp.int32))


def check(name: str, format: str, x: jax.Array, sizes) -> None:
    y = run(name, format, x, sizes)
    assert y.dtype == jnp.float32
    assert_within(y, *exact(x, experts(format)[1], sizes))


@pytest.mark.parametrize(
    ("name", "format"),
    [
        pytest.param(n, f, marks=[] if f in OFTEN[n] else [pytest.mark.slow])
        for n in NAMES
        for f in WEIGHTS
        if kernel(n).supports(FLOAT, OPERANDS[f], "cuda:90", Shapes(40, N, K, EXPERTS)) is None
    ],
)
def test_equals_exact_numpy(name, format):
    check(name, format, lhs(40), [3, 0, 30, 5])  # an empty group, one over several tiles, and two rows in no group


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("m", "sizes"), [(1, [0, 0, 1, 0]), (130, [0, 129, 0, 1])])
def test_few_rows_and_many(name, m, sizes):
    check(name, "nvfp4", lhs(m, jnp.float32), sizes)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_results(name):
    """The float32 result, rounded once."""
    x, sizes = lhs(40), [3, 0, 30, 5]
    call = functools.partial(kernel(name).run, lhs_spec=FLOAT, rhs_spec=OPERANDS["nvfp4"], n=N, k=K)
    y = jax.jit(functools.partial(call, out_dtype=jnp.bfloat16))(x, experts("nvfp4")[0], jnp.asarray(sizes, jnp.int32))
    assert y.dtype == jnp.bfloat16
    want, error = exact(x, experts("nvfp4")[1], sizes)
    assert_within(y.astype(jnp.float32), want, error + 2.0**-8 * (np.abs(want) + error))


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name):
    assert run(name, "nvfp4", lhs(0), [0, 0, 0, 0]).shape == (0, N)
    np.testing.assert_array_equal(run(name, "nvfp4", lhs(40), [0, 0, 0, 0]), np.zeros((40, N)))


@pytest.mark.parametrize("name", ["xla_ragged", "pallas_ragged"])
def test_sizes_beyond_the_rows_read_and_write_nothing_else(name):
    """Sizes are data: a router's mistake must reach no other memory. Beyond them is cut off, below 0 is none."""
    x = lhs(40)
    y = run(name, "nvfp4", x, [30, 2**30, 2**30, 2**30])
    assert_within(y, *exact(x, experts("nvfp4")[1], [30, 10, 0, 0]))
    y = run(name, "nvfp4", x, [30, -5, 4, 0])
    assert_within(y, *exact(x, experts("nvfp4")[1], [30, 0, 4, 0]))


@pytest.mark.parametrize("sizes", [[3, 0, 30, 5], [0, 0, 0, 0], [40, 0, 0, 0], [0, 0, 0, 40], [10, 10, 10, 10]])
def test_tiles_cover_each_row_once_and_stay_in_their_group(sizes):
    t = jax.tree.map(np.asarray, tiled(jnp.asarray(sizes, jnp.int32), 40, 16))
    owner = np.full(40, -1)
    for group, first, end in zip(t.group, t.first, t.end, strict=True):
        assert end - first <= 16 and (owner[first:end] == -1).all()
        owner[first:end] = group
    expected = np.full(40, -1)
    expected[: sum(sizes)] = np.repeat(np.arange(4), sizes)
    np.testing.assert_array_equal(owner, expected)
    assert int(t.count) == np.sum(t.end > t.first) <= len(t.group)


@pytest.mark.parametrize("name", ["xla_ragged", "pallas_ragged"])
def test_gradient_of_the_rows(name):
    sizes, x = [3, 0, 30, 5], lhs(40, jnp.float32)
    grad = jax.grad(lambda x: run(name, "nvfp4", x, sizes).sum())(x)
    w = experts("nvfp4")[1]
    expected = np.zeros((40, K))
    expected[:38] = w.sum(axis=1)[np.repeat(np.arange(EXPERTS), sizes)]
    np.testing.assert_allclose(grad, expected, rtol=0, atol=N * 2.0**-22 * np.abs(w).sum(1).max())


def test_lowers_for_cuda():
    shapes = Shapes(40, N, K, EXPERTS)
    chosen = kernels.find("ragged", FLOAT, OPERANDS["nvfp4"], "cuda:90", shapes)
    assert chosen.name == "pallas_ragged"
    arrays = (lhs(40), experts("nvfp4")[0], jnp.asarray([3, 0, 30, 5], jnp.int32))
    call = functools.partial(chosen.run, lhs_spec=FLOAT, rhs_spec=OPERANDS["nvfp4"], n=N, k=K)
    text = for_cuda(call, *arrays).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 1


def test_what_is_chosen_and_why_not():
    shapes = Shapes(40, N, K, EXPERTS)
    assert kernels.find("ragged", FLOAT, OPERANDS["nvfp4"], "cpu", shapes).name == "xla_ragged"
    reasons = dict(kernels.explain("ragged", OPERANDS["nvfp4"], OPERANDS["nvfp4"], "cuda", shapes))
    assert all("grouped products take float activations" in why for why in reasons.values())
    big = dict(kernels.explain("ragged", FLOAT, OPERANDS["nvfp4"], "cuda", Shapes(8, 1 << 13, 1 << 13, 128)))
    assert "signed 32 bits" in big["pallas_ragged"]


# ------------------------------------------------------------------------------------------------- a model


def mixture(params, x):
    """Two layers in a scan, each a grouped product; sizes leave the last row to nobody."""

    def layer(x, w):
        return x + jax.lax.ragged_dot(x, w, jnp.asarray([5, 0, 6], jnp.int32)), None

    return jax.lax.scan(layer, x, params["experts"])[0]


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    params = {"experts": jnp.asarray(rng.normal(size=(2, 3, 32, 32)) / 6, jnp.float32)}
    x = jnp.asarray(rng.normal(size=(12, 32)), jnp.float32)
    recipe = {"schema": 1, "name": "experts", "rules": [{"match": "*", "weight": "nvfp4"}]}
    return jqopt.quantize_model(mixture, recipe, params=params, inputs=(x,)), x


@pytest.mark.parametrize(("backend", "device"), [(None, None), ("pallas", "cpu:interpret"), ("xla_tiled", None)])
def test_a_model_multiplies_packed_experts(model, backend, device, monkeypatch):
    """As with decoded ones, which is what `simulate` does; the weight goes to the kernel as it is packed."""
    qm, x = model
    seen, grouped = [], _ops.grouped
    monkeypatch.setattr(_ops, "grouped", lambda x, w, *a, **b: seen.append(w.data.shape) or grouped(x, w, *a, **b))
    y = jqopt.apply(qm.plan, backend=backend, device=device)(qm.quant, x)
    np.testing.assert_allclose(y, jqopt.apply(qm.plan, simulate=True)(qm.quant, x), rtol=0, atol=1e-5)
    assert seen == [(3, 32, 16)]
    np.testing.assert_array_equal(y[-1], x[-1])


def test_a_model_lowers_for_cuda(model):
    qm, x = model
    run = jqopt.apply(qm.plan, device="cuda:90")
    text = for_cuda(run, qm.quant, x).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 1 and "pallas_ragged" in text
