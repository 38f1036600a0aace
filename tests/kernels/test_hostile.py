"""Operands as nobody means them: NaN and zero scales, no rows, sums that 32 bits do not hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt_kernels as kernels
from jqopt_kernels import Operand, Packed, Shapes
from tests.kernels.cases import OPERANDS, PAIRS, case
from tests.kernels.lowering import for_cuda
from tests.kernels.test_contract import assert_within, kernel_named, runner
from tests.kernels.test_empty import no_rows

# (kernel, rows) that decode block scales on a CPU; for the others test_pallas.py and test_triton.py have the same
DECODERS = [("reference", 2), ("xla_decode", 2), ("xla_lookup", 2), ("xla_tiled", 2), ("xla_row", 1), ("ffi_gemm", 2)]


@pytest.fixture(autouse=True)
def installed(request):
    if "ffi" in request.node.name:
        request.getfixturevalue("library")


@pytest.mark.parametrize(("name", "m"), DECODERS)
def test_a_nan_scale_stays_in_its_column_and_a_zero_scale_is_zero(name, m):
    """Row 2 of the weight has a NaN among its scales; of row 3 all are zero (e4m3), or next to nothing (e8m0)."""
    for pair, nan in (("mxfp4", 0xFF), ("nvfp4", 0x7F)):
        c = case(pair, m, 5, 136)
        scale = c.rhs.scale.at[2, 1].set(nan).at[3].set(0)
        y = np.asarray(jax.jit(runner(name, c.specs))(c.lhs, c.rhs._replace(scale=scale)))
        np.testing.assert_array_equal(np.isnan(y), np.tile([False, False, True, False, False], (m, 1)))
        assert np.all(np.abs(y[:, 3]) <= 2.0**-110)
        keep = [0, 1, 4]
        assert_within(y[:, keep], c.y[:, keep], c.bound[:, keep])


# (kernel, pair, rows): products of codes, and one each of the kernels that decode them
OF_CODES = [
    ("xla_fp8", "fp8 x fp8", 5),
    ("xla_fp8_dot", "fp8_channel x fp8_channel", 5),
    ("xla_tiled_bf16", "fp8 x fp8", 5),
    ("xla_tiled", "fp8_block x fp8_block", 5),
    ("xla_decode", "fp8 x fp8", 5),
    ("reference", "fp8_block x fp8_block", 5),
    ("ffi_gemm", "fp8_block x fp8_block", 5),
    ("pallas_gemv", "fp8 x fp8", 3),
    ("pallas_skinny", "fp8_block x fp8_block", 5),
    ("pallas_gemm", "fp8 x fp8", 65),
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "pair", "m"), OF_CODES)
def test_a_nan_code_stays_in_its_row_or_column(name, pair, m, side):
    """Also where the other operand is zero, as row 0 of the weight and of the left operand are."""
    c, nan = case(pair, m, 7, 40), np.zeros((m, 7), bool)
    lhs, rhs = c.lhs, c.rhs
    if side == "left":
        lhs, nan[1] = lhs._replace(data=lhs.data.at[1, 5].set(0xFF)), True
    else:
        rhs, nan[:, 2] = rhs._replace(data=rhs.data.at[2, 5].set(0x7F)), True
    y = np.asarray(jax.jit(runner(name, c.specs))(lhs, rhs))
    np.testing.assert_array_equal(np.isnan(y), nan)
    assert_within(y[~nan], c.y[~nan], c.bound[~nan])


FLOAT32_SCALES = [
    *((name, pair, m) for name, m in DECODERS for pair in ("int4", "int4_channel")),
    ("pallas_gemv", "int4", 3),
    ("pallas_skinny", "fp8_block x fp8_block", 5),
    ("pallas_gemm", "int8 x int8", 65),
    ("xla_int8", "int8 x int8", 5),
    ("xla_int8_row", "int8 x int8", 1),
    ("xla_fp8", "fp8_channel x fp8_channel", 5),
    ("xla_fp8_dot", "fp8_channel x fp8_channel", 5),
    ("xla_tiled_bf16", "int8 x int8", 5),
]


@pytest.mark.parametrize(("name", "pair", "m"), FLOAT32_SCALES)
def test_zero_float32_scales_are_zeros(name, pair, m):
    """Of the weight's last row, or of its last rows where they share one, and of the last row of the left operand."""
    c = case(pair, m, 133, 136)
    zero = np.zeros((m, 133), bool)
    rhs, rows = c.rhs._replace(scale=c.rhs.scale.at[-1].set(0)), PAIRS[pair][1] == "fp8_block"
    zero[:, 128 if rows else 132 :] = True
    lhs = c.lhs
    if isinstance(lhs, Packed) and m > 1:
        lhs, zero[-1] = lhs._replace(scale=lhs.scale.at[-1].set(0)), True
    y = np.asarray(jax.jit(runner(name, c.specs))(lhs, rhs))
    np.testing.assert_array_equal(y[zero], np.zeros(zero.sum()))
    assert_within(y[~zero], c.y[~zero], c.bound[~zero])


@pytest.mark.parametrize(("name", "m"), [("xla_fp8", 2), ("xla_decode", 2), ("pallas_gemm", 65)])
def test_a_zero_scale_of_the_whole_is_zero(name, m):
    c = case("fp8 x fp8", m, 5, 40)
    y = jax.jit(runner(name, c.specs))(c.lhs, c.rhs._replace(scale=jnp.zeros((1, 1))))
    np.testing.assert_array_equal(y, np.zeros((m, 5)))


@pytest.mark.parametrize("pair", ["nvfp4", "uint4", "mxfp6", "int8 x int8", "fp8 x fp8", "fp8_block x fp8_block"])
def test_what_is_chosen_takes_no_rows(pair):
    """The kernels themselves are run in test_empty.py."""
    c = case(pair, 2, 5, 64)
    lhs, rhs = (OPERANDS[name] for name in PAIRS[pair])
    x = no_rows(c.lhs)
    y = kernels.find("qdot", lhs, rhs, "cpu", Shapes(0, 5, 64)).run(x, c.rhs, **c.specs)
    assert y.shape == (0, 5)


def test_pallas_launches_nothing_for_no_rows():
    c = case("nvfp4", 2, 5, 64)
    for name in ("pallas_gemv", "pallas_skinny"):
        text = for_cuda(runner(name, c.specs), c.lhs[:0], c.rhs).as_text()
        assert "custom_call" not in text and "tensor<0x5xf32>" in text


def test_sums_that_int32_cannot_hold_are_refused():
    """k products of -128 and -128 reach 2^31 at k = 2^17: one less is taken, and right."""
    int8 = Operand("int8", None, "float32", "tensor")
    most = 2**17 - 1
    for name, m in (("xla_int8", 2), ("xla_int8_row", 1)):
        said = kernel_named(name).supports(int8, int8, "cpu", Shapes(m, 2, most + 1))
        assert said is not None and f"k={most + 1} can overflow int32 sums" in said
        assert kernel_named(name).supports(int8, int8, "cpu", Shapes(m, 2, most)) is None
    one = Packed(jnp.full((2, most), -128, jnp.int8), jnp.ones((1, 1), jnp.float32))
    y = kernel_named("xla_int8").run(one, one, lhs_spec=int8, rhs_spec=int8, n=2, k=most)
    assert float(y[0, 0]) == np.float32(most * 128.0**2)
