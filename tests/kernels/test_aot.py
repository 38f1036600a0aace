"""Quantized models compiled for an H100 or B200 without one: the calls that are left, no decoded copy of a weight."""

import json
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cuda
TRITON, FP8 = "__gpu$xla.gpu.triton", "__cublas$lt$matmul$f8"
WORKSPACE = 32 << 20  # bytes that cuBLASLt is given beside its operands


@pytest.fixture(scope="module")
def compiled() -> dict:
    script = pathlib.Path(__file__).with_name("aot.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["fp8", "fp8 token"])
def test_fp8_products_are_cublas_calls(compiled, name):
    """Where XLA makes no kernels of its own."""
    assert compiled[name]["calls"][FP8] == 2
    assert compiled[name]["temp"] - WORKSPACE < compiled[name]["copy"]


@pytest.mark.parametrize("name", ["fp8 by default", "fp8 token by default"])
def test_fp8_products_are_xlas_kernels_on_the_codes_by_default(compiled, name):
    """Without a GPU nothing is timed and XLA takes its own kernels: no float array is as large as a weight."""
    assert compiled[name]["fused"] == 2
    assert compiled[name]["copy"] // 2 not in compiled[name]["floats"] and compiled[name]["floats"]


@pytest.mark.parametrize(("activation", "said"), [(None, "BIAS"), ("relu", "BIAS_RELU"), ("gelu_tanh", "BIAS_GELU")])
def test_cublas_does_the_epilogue_too(compiled, activation, said):
    assert compiled[f"fp8 bias {activation}"]["calls"] == {FP8: 1}
    assert compiled[f"fp8 bias {activation}"]["epilogues"] == [said]


@pytest.mark.parametrize("name", ["blackwell nvfp4", "blackwell mxfp8"])
def test_block_scaled_products_are_cudnn_calls_on_blackwell(compiled, name):
    assert compiled[name]["calls"]["__cudnn$blockScaledDot"] == 2
    assert compiled[name]["temp"] < compiled[name]["copy"]


@pytest.mark.parametrize("name", ["nvfp4 1", "nvfp4 16", "nvfp4 256", "nvfp4 inputs"])
def test_each_nvfp4_product_is_one_kernel(compiled, name):
    """And each quantizer of its input. Temporary bytes hold activations and partial sums: those of 256 rows are wider
    than the weights of this block."""
    assert compiled[name]["calls"][TRITON] == (4 if name == "nvfp4 inputs" else 2)
    if name != "nvfp4 256":
        assert compiled[name]["temp"] < compiled[name]["copy"]


@pytest.mark.parametrize("name", ["experts", "cache fp8", "cache nvfp4"])
def test_experts_and_caches_are_read_as_they_are_packed(compiled, name):
    assert compiled[name]["calls"][TRITON] == 1
    assert compiled[name]["temp"] < compiled[name]["copy"] / 4


def test_kernels_fit_into_registers_and_read_16_bytes_at_a_time(compiled):
    assert {k["name"] for k in compiled["kernels"]} == {
        "pallas_gemv", "pallas_skinny", "pallas_gemm", "pallas_ragged", "pallas_attend"
    }  # fmt: skip
    for kernel in compiled["kernels"]:
        assert kernel["spilled"] == 0, kernel
        assert kernel["wide"] > 0, kernel
        assert (kernel["tensor"] > 0) == (kernel["name"] != "pallas_gemv"), kernel
