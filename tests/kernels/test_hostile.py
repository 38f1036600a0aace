"""Operands as nobody means them: NaN and zero scales, no rows, sums that 32 bits do not hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt_kernels as kernels
from jqopt_kernels import Operand, Packed, Shapes
from tests.kernels.cases import FLOAT, OPERANDS, PAIRS, case
from tests.kernels.test_contract import able, assert_within, kernel_named, runner

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


@pytest.mark.parametrize("pair", ["nvfp4", "uint4", "mxfp6", "int8 x int8", "fp8 x fp8", "fp8_block x fp8_block"])
def test_no_rows(pair):
    c = case(pair, 2, 5, 64)
    lhs, rhs = (OPERANDS[name] for name in PAIRS[pair])
    x = c.lhs[:0] if rhs is c.lhs or lhs == FLOAT else c.lhs._replace(data=c.lhs.data[:0], scale=_no_rows(c.lhs.scale))
    for kernel in able(pair, 0, 5, 64):
        if kernel.backend != "xla":  # Triton's and C++'s have theirs in test_triton.py and test_ffi.py
            continue
        y = jax.eval_shape(runner(kernel.name, c.specs), x, c.rhs)
        assert (y.shape, y.dtype) == ((0, 5), jnp.float32), kernel.name
    y = kernels.find("qdot", lhs, rhs, "cpu", Shapes(0, 5, 64)).run(x, c.rhs, **c.specs)
    assert y.shape == (0, 5)


def _no_rows(scale):
    return scale if scale is None or scale.shape[0] == 1 else scale[:0]


def test_pallas_launches_nothing_for_no_rows():
    c = case("nvfp4", 2, 5, 64)
    for name in ("pallas_gemv", "pallas_skinny"):
        text = jax.jit(runner(name, c.specs)).trace(c.lhs[:0], c.rhs).lower(lowering_platforms=("cuda",)).as_text()
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
