"""jqopt's activations on CUDA: quantized by the Pallas kernel, with the bits that they have on CPU without it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt
import jqopt_kernels as kernels
from jqopt import _ops, formats
from jqopt._ops import InputFormat
from tests.kernels.lowering import for_cuda
from tests.kernels.quantize_cases import hostile

SPECS = {
    "nvfp4": InputFormat(formats.get("nvfp4"), "block", False),
    "nvfp4_static": InputFormat(formats.get("nvfp4"), "block", True),
    "mxfp8": InputFormat(formats.get("mxfp8"), "block", False),
    "fp8_token": InputFormat(formats.get("fp8"), "token", False),
    "int8_token": InputFormat(formats.get("int8"), "token", False),
}
X = jax.ShapeDtypeStruct((2, 9, 150), jnp.float32)
CUDA = "cuda:90"


@pytest.mark.parametrize(
    "name", ["nvfp4", "mxfp8", "fp8_token", "int8_token", pytest.param("nvfp4_static", marks=pytest.mark.slow)]
)
def test_the_bits_of_numerics(name):
    """Stacked, ragged, NaN and infinity: the kernel, interpreted, in place of jqopt._numerics."""
    spec = SPECS[name]
    x = jnp.stack([hostile(9, 150), 3 * hostile(9, 150)])
    x = jnp.nan_to_num(x, nan=1.0, posinf=1e30, neginf=-1e30) if name.startswith("int8") else x
    scale = jnp.float32(0.01) if spec.static else None
    kernel = _ops.quantizer(X, spec, None, CUDA)
    assert kernel is not None and kernel.name == "pallas_quantize"
    got, want = _ops._encoded(spec, kernel, x, scale), _ops._encoded(spec, None, x, scale)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_only_where_it_is_more_than_xla_gives(monkeypatch):
    nvfp4 = SPECS["nvfp4"]
    assert _ops.quantizer(X, nvfp4, None, "cpu") is None
    assert _ops.quantizer(X, nvfp4, None, "tpu") is None
    assert _ops.quantizer(X, nvfp4, None, "cuda") is None  # an exported program, for any chip
    assert _ops.quantizer(X, nvfp4, "xla", CUDA) is None
    assert _ops.quantizer(X, nvfp4, "pallas", CUDA) is not None
    assert _ops.quantizer(X, InputFormat(formats.get("fp8"), "tensor", True), None, CUDA) is None
    assert _ops.quantizer(X, InputFormat(formats.get("nvfp4_four_over_six"), "block", False), None, CUDA) is None
    assert _ops.quantizer(X, InputFormat(formats.get("mxint8"), "block", False), None, CUDA) is None
    batch = jax.export.symbolic_shape("b")[0]
    assert _ops.quantizer(jax.ShapeDtypeStruct((batch, 64), jnp.float32), nvfp4, None, CUDA) is None
    monkeypatch.setattr(kernels, "here", lambda: CUDA)
    assert jax.device_count() > 1 and _ops.quantizer(X, nvfp4, None, None) is None


@pytest.mark.parametrize("backend", [None, "xla"])
def test_a_model_lowered_for_cuda_calls_it(backend):
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)}
    x = jnp.ones((4, 64), jnp.float32)
    qm = jqopt.quantize_model(lambda p, x: x @ p["w"], "fp8_per_channel_per_token", params=params, inputs=x)
    run = jqopt.apply(qm.plan, device=CUDA, backend=backend)
    text = for_cuda(run, qm.quant, x).as_text()
    assert text.count("__gpu$xla.gpu.triton") == (backend is None)
    assert "__gpu$xla.gpu.triton" not in jax.jit(jqopt.apply(qm.plan)).lower(qm.quant, x).as_text()
    grad = for_cuda(jax.grad(lambda x: run(qm.quant, x).sum()), x)
    assert "dot_general" in grad.as_text()  # straight through


def test_a_gradient_of_a_static_scale_is_none():
    spec, x = SPECS["nvfp4_static"], jnp.ones((2, 32), jnp.float32)
    kernel = _ops.quantizer(x, spec, None, CUDA)
    grad = jax.grad(lambda scale: _ops._encoded(spec, kernel, x, scale)[0].global_scale)(jnp.float32(0.5))
    assert grad == 0
