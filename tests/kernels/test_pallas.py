"""Pallas kernels, interpreted: what the contract's shapes do not reach, hostile inputs, a model that runs on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt
import jqopt_kernels as kernels
from jqopt_kernels import Operand, Packed, Shapes
from tests.kernels.cases import FLOAT, OPERANDS, case
from tests.kernels.lowering import for_cuda
from tests.kernels.test_contract import assert_within, kernel_named, runner

NVFP4 = OPERANDS["nvfp4"]
INTERPRET = "cpu:interpret"


def name_for(m: int) -> str:
    return "pallas_gemv" if m <= 4 else "pallas_skinny" if m <= 64 else "pallas_gemm"


def check(pair: str, m: int, n: int, k: int, **options) -> None:
    c = case(pair, m, n, k, **options)
    y = jax.jit(runner(name_for(m), c.specs))(c.lhs, c.rhs)
    assert_within(y, c.y, c.bound)


@pytest.mark.parametrize(
    "pair",
    ["nvfp4", "fp8_block x fp8_block", *(pytest.param(p, marks=pytest.mark.slow) for p in ("int4", "int8 x int4"))],
)
def test_many_rows(pair):
    check(pair, 130, 140, 70)


@pytest.mark.parametrize(
    ("pair", "m"),
    [
        ("nvfp4", 17),
        ("nvfp4", 65),
        ("int4", 17),
        *(
            pytest.param(p, m, marks=pytest.mark.slow)
            for p, m in (("nvfp4", 4), ("uint4", 17), ("fp8_block", 17), ("mxfp8", 17))
        ),
    ],
)
def test_bfloat16_activations_lose_nothing(pair, m):
    check(pair, m, 20, 70, float_dtype=jnp.bfloat16)


@pytest.mark.parametrize("m", [3, 5])
def test_a_sum_split_among_programs(m):
    """One tile of results and 16 or more steps of k: several programs add parts of the sum."""
    check("nvfp4", m, 7, 2048 * (4 if m == 3 else 1) + 16, float_dtype=jnp.bfloat16)


def test_the_sum_is_split_until_the_device_is_busy():
    from jqopt_kernels.pallas_dot import GEMM, SKINNY, _split

    assert _split(16, 4096, 4096, SKINNY) == 4  # 64 programs: 4 times as many are 256 of 264
    assert _split(16, 64, 1024, SKINNY) == 2  # 8 steps, at least 4 for each
    assert _split(4096, 4096, 4096, GEMM) == 1


@pytest.mark.parametrize("m", [0, 1, 5, 65])
def test_nothing_to_multiply(m):
    x, w = jnp.zeros((m, 0)), Packed(jnp.zeros((3, 0), jnp.uint8), jnp.zeros((3, 0), jnp.uint8), jnp.float32(1))
    run = kernel_named(name_for(m)).run
    y = run(x, w, lhs_spec=FLOAT, rhs_spec=NVFP4, n=3, k=0, out_dtype=jnp.bfloat16)
    assert y.shape == (m, 3) and y.dtype == jnp.bfloat16 and not np.asarray(y, np.float32).any()


def hostile(data, scale, whole, x=None, m=5):
    """[m, 4] = x [m, 16] @ an NVFP4 weight of four rows of one block each."""
    w = Packed(jnp.asarray(data, jnp.uint8), jnp.asarray(scale, jnp.uint8), jnp.float32(whole))
    x = jnp.ones((m, 16), jnp.bfloat16) if x is None else x
    return kernel_named(name_for(m)).run(x, w, lhs_spec=FLOAT, rhs_spec=NVFP4, n=4, k=16)


@pytest.mark.parametrize("m", [1, 5, 65])
def test_broken_scales_stay_in_their_row(m):
    """Bits 0x7F of an e4m3 scale are NaN, 0 and 0x80 are zeros; 0x38 is 1. Code 2 is 1."""
    y = hostile(np.full((4, 8), 0x22), [[0x38], [0x7F], [0], [0x80]], 1, m=m)
    np.testing.assert_array_equal(y, np.tile([16, np.nan, 0, 0], (m, 1)))


@pytest.mark.parametrize("m", [1, 5])
def test_infinite_activations_stay_in_their_row(m):
    x = jnp.ones((m, 16), jnp.bfloat16).at[0, 3].set(jnp.inf)
    y = hostile(np.full((4, 8), 0x22), np.full((4, 1), 0x38), 1, x=x, m=m)
    np.testing.assert_array_equal(y[0], [np.inf] * 4)
    np.testing.assert_array_equal(y[1:], np.full((m - 1, 4), 16))


@pytest.mark.parametrize("m", [1, 5])
def test_e8m0_scales_at_both_ends(m):
    """Byte 240 is 2^113 (beyond, XLA on CPU regroups products so that they overflow), 255 is NaN, and 1 is 2^-126,
    the smallest that is not subnormal."""
    spec = OPERANDS["mxfp4"]
    w = Packed(jnp.full((3, 16), 0x22, jnp.uint8), jnp.asarray([[240], [255], [1]], jnp.uint8))
    x = jnp.zeros((m, 32), jnp.bfloat16).at[:, 0].set(1)
    y = kernel_named(name_for(m)).run(x, w, lhs_spec=FLOAT, rhs_spec=spec, n=3, k=32)
    np.testing.assert_array_equal(y, np.tile(np.float32([2.0**113, np.nan, 2.0**-126]), (m, 1)))


def test_positions_beyond_int32_are_refused():
    reasons = dict(kernels.explain("qdot", FLOAT, NVFP4, "cuda:90", Shapes(1, 1 << 18, 1 << 15), backend="pallas"))
    assert "signed 32 bits" in reasons["pallas_gemv"]  # 2^32 bytes of codes
    assert kernels.find("qdot", FLOAT, NVFP4, "cuda:90", Shapes(1, 1 << 17, 1 << 15)).name == "pallas_gemv"


@pytest.mark.parametrize(
    ("spec", "device", "reason"),
    [
        (NVFP4, "cpu", "only interpreted on a CPU"),
        (NVFP4, "tpu", "written for CUDA, not for tpu"),
        (OPERANDS["mxfp6"], "cuda:90", "'e3m2' is not written for Pallas"),
        (Operand("int4", 24, "float32", "block"), "cuda:90", "block 24 is not a power of two"),
    ],
)
def test_refusals(spec, device, reason):
    reasons = dict(kernels.explain("qdot", FLOAT, spec, device, Shapes(1, 64, 64)))
    assert reason in reasons["pallas_gemv"]


def test_the_interpreter_is_chosen_only_by_name():
    shapes = Shapes(1, 64, 64)
    assert kernels.find("qdot", FLOAT, NVFP4, INTERPRET, shapes, backend="pallas").name == "pallas_gemv"
    assert kernels.find("qdot", FLOAT, NVFP4, "cpu", shapes).name == "xla_tiled"
    with pytest.raises(kernels.NoKernelError, match='ask for the device "cpu:interpret"'):
        kernels.find("qdot", FLOAT, NVFP4, "cpu", shapes, backend="pallas")


# ------------------------------------------------------------------------------------------------- a model


def mlp(params, x):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return x @ params["head"]


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    params = {
        "layers": jnp.asarray(rng.normal(size=(2, 32, 32)) / 6, jnp.float32),
        "head": jnp.asarray(rng.normal(size=(32, 24)) / 6, jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(3, 32)), jnp.float32)
    recipe = {"schema": 1, "name": "pallas", "rules": [{"match": "*", "weight": "nvfp4"}]}
    qm = jqopt.quantize_model(mlp, recipe, params=params, inputs=(x,))
    return qm, x


def test_a_model_runs_on_pallas_as_on_xla(model):
    qm, x = model
    run = jqopt.apply(qm.plan, backend="pallas", device=INTERPRET)
    np.testing.assert_allclose(run(qm.quant, x), jqopt.apply(qm.plan)(qm.quant, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 40])
def test_a_model_lowers_for_cuda(model, rows):
    qm, x = model
    run = jqopt.apply(qm.plan, backend="pallas", device="cuda:90")
    x = jnp.zeros((rows, 32))
    text = for_cuda(run, qm.quant, x).as_text()
    assert text.count("@__gpu$xla.gpu.triton") == 2  # in the scan's body, and the head
    assert "pallas_gemv" in text if rows == 3 else "pallas_skinny" in text
    assert for_cuda(jax.vmap(run, (None, 0)), qm.quant, x[None])
