"""Triton kernels without a GPU: numbers in Triton's interpreter, and lowering; see also `test_triton_compiled`.

All but the first part needs the packages of `make cuda`.
"""

import functools
import importlib
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jqopt
import jqopt_kernels as kernels
from jqopt_kernels import Operand, Shapes
from tests.kernels import ptx
from tests.kernels import triton_tools as tools
from tests.kernels.cases import FLOAT, ML_DTYPES, OPERANDS, PAIRS, decode
from tests.kernels.lowering import for_cuda
from tests.kernels.triton_aot import cuda_folder

HOPPER = "cuda:90"
cuda = pytest.mark.cuda
pytestmark = pytest.mark.usefixtures("shipped_tiles")


# ---- numbers


def interpreted(jobs: list[dict]) -> list[dict]:
    """What `triton_interpret` says of each job, in a process of its own."""
    return tools.subprocess_json("tests.kernels.triton_interpret", json.dumps(jobs), TRITON_INTERPRET="1")


def claimed(name: str, pair: str, shape: tuple[int, int, int]) -> bool:
    lhs, rhs = (OPERANDS[x] for x in PAIRS[pair])
    kernel = next(k for k in kernels.KERNELS if k.name == name)
    return kernel.supports(lhs, rhs, HOPPER, Shapes(*shape)) is None


# less than a tile and than a block; a rest in every direction; whole blocks of k with a rest; several parts of k
ODD = {
    "triton_gemv": [(1, 70, 40), (3, 9, 513), (4, 33, 7), (2, 16, 1024)],
    "triton_skinny": [(1, 70, 40), (17, 66, 1061), (5, 1, 7), (33, 66, 288)],
    "triton_gemm": [(65, 70, 72), (17, 130, 135)],
    "triton_fp8_block": [(1, 70, 40), (65, 130, 300), (5, 1, 7)],
}


@cuda
@pytest.mark.parametrize("name", ODD)
def test_numbers_in_the_interpreter(name):
    jobs = [  # two shapes a pair, the next pair the others
        {"kernel": name, "pair": pair, "shape": shape}
        for i, pair in enumerate(p for p in PAIRS if claimed(name, p, ODD[name][0]))
        for shape in ODD[name][i % 2 :: 2]
    ]
    assert len(jobs) > 2 or name == "triton_fp8_block"
    for job, found in zip(jobs, interpreted(jobs), strict=True):
        m, n, _ = job["shape"]
        assert found["shape"] == [m, n], job
        assert found["bound"] <= 1, (job, found)
        assert found["relative"] <= 1e-5, (job, found)


@cuda
def test_bfloat16_results_in_the_interpreter():
    """Within one unit in the last place; and rounded to the nearest by the instruction that a GPU has for it."""
    jobs: list[dict] = [
        {"kernel": name, "pair": pair, "shape": shape, "out_dtype": "bfloat16"} | more
        for name, pair, shape, more in [
            ("triton_gemv", "nvfp4", (3, 9, 513), {}),
            ("triton_skinny", "nvfp4", (17, 66, 1061), {}),
            ("triton_gemm", "int4", (65, 70, 72), {"activation": "silu"}),
            ("triton_fp8_block", "fp8_block x fp8_block", (65, 130, 300), {}),
            ("triton_scaled", "nvfp4 x nvfp4", (130, 150, 304), {"capability": 100}),
        ]
    ]
    for one, found in zip(jobs, interpreted(jobs), strict=True):
        assert found["bound"] <= 1 and found["shape"] == list(one["shape"][:2]), (one, found)
    launch = tools.launch("triton_gemv", FLOAT, OPERANDS["nvfp4"], Shapes(1, 256, 256), 90)
    launch = launch._replace(out=jax.ShapeDtypeStruct(launch.out.shape, jnp.bfloat16))
    assert "cvt.rn.bf16" in tools.compiled(launch, 90).ptx


@cuda
def test_mixed_formats_in_the_interpreter():
    """W4A8 and what else a kernel decodes on both sides; scales that vary along k on one side only."""
    mixed = {
        "fp8_channel x nvfp4": "triton_skinny",
        "int8 x nvfp4": "triton_gemm",
        "mxfp8 x mxfp8": "triton_skinny",
        "nvfp4 x int4": "triton_skinny",
        "fp8_channel x fp8_block": "triton_fp8_block",
        "fp8_rows x fp8_channel": "triton_fp8_block",
    }
    jobs = [{"kernel": name, "pair": pair, "shape": (5, 70, 135)} for pair, name in mixed.items()]
    assert all(found["bound"] <= 1 and found["relative"] <= 1e-5 for found in interpreted(jobs))


# what each assembly reads (a scale's format), and the power of two that its values leave out
ASSEMBLIES = {
    "E2M1_SCALED": ("e2m1", "e4m3", 8),
    "E2M1_POWER": ("e2m1", "e8m0", 0),
    "E2M1_PLAIN": ("e2m1", None, 14),
    "INT4": ("int4", None, 0),
    "UINT4": ("uint4", None, 0),
}


@cuda
@pytest.mark.parametrize("name", ASSEMBLIES)
def test_the_assembly_decodes_every_code_in_every_place(name):
    """Its text, run by the manual's rules: each code in each of eight places, beside random ones, with each scale."""
    element, scale, left_out = ASSEMBLIES[name]
    triton_words = importlib.import_module("jqopt_kernels.triton_words")
    codes = np.random.default_rng(0).integers(0, 16, (8, 16, 256, 8))  # place, code, scale
    for place in range(8):
        codes[place, :, :, place] = np.arange(16)[:, None]
    codes = codes.reshape(-1, 8)
    word = np.zeros(len(codes), np.uint32)
    for i in range(8):
        word |= codes[:, i].astype(np.uint32) << np.uint32(4 * i)
    inputs, factor = {"$8": word}, np.ones(len(codes))
    if scale is not None:
        factor = np.tile(np.arange(256, dtype=np.uint8), 8 * 16).view(ML_DTYPES[scale]).astype(np.float64)
        inputs["$9"] = (factor * (2.0**118 if scale == "e4m3" else 1.0)).astype(np.float32)
    found = ptx.run(getattr(triton_words, name).value, inputs)
    for i in range(8):
        want = decode(codes[:, i].astype(np.uint8), element) * factor * 2.0**-left_out
        got = found[f"${i}"].view(ml_dtypes.bfloat16).astype(np.float64)
        want = np.where(np.abs(want) > 3.39e38, np.copysign(np.inf, want), want)  # 6 x 2^127
        np.testing.assert_array_equal(got, want)


@cuda
@pytest.mark.parametrize(("capability", "prepare"), [(100, True), (100, False), (120, True), (120, False)])
def test_block_scaled_products_in_the_interpreter(capability, prepare):
    """More rows than one tile, a rest of every tile; one block alone; with a bias and an activation."""
    jobs: list[dict] = [
        {"kernel": "triton_scaled", "pair": pair, "shape": shape, "capability": capability, "prepare": prepare} | more
        for pair, shape, more in [
            ("mxfp4 x mxfp4", (130, 150, 288), {}),
            ("nvfp4 x nvfp4", (130, 150, 304), {}),
            ("nvfp4 x nvfp4", (65, 7, 16), {"activation": "gelu"}),
            ("mxfp8 x mxfp8", (70, 20, 160), {}),
            ("mxfp4 x mxfp4", (65, 7, 32), {"activation": "silu"}),
        ]
    ]
    for one, found in zip(jobs, interpreted(jobs), strict=True):
        assert found["bound"] <= 1 and found["shape"] == list(one["shape"][:2]), (one, found)


@cuda
@pytest.mark.parametrize("spec", ["nvfp4", "mxfp4", "mxfp8"])
def test_block_scaled_products_lower(spec):
    kernel = kernels.find(
        "qdot", OPERANDS[spec], OPERANDS[spec], "cuda:100", Shapes(65, 64, 64), backend="triton_scaled"
    )
    x, w = (tools.abstract(OPERANDS[spec], rows, 64, is_packed=rows == 64) for rows in (65, 64))
    text = lowered(functools.partial(kernel.run, lhs_spec=OPERANDS[spec], rhs_spec=OPERANDS[spec], n=64, k=64), x, w)
    assert text.count("triton_kernel_call") == 1 and "dot_general" not in text


@cuda
def test_half_precision_activations_lose_nothing():
    """Cut into as many bfloat16 numbers as their type needs: 1 or 2."""
    jobs = [
        {"kernel": name, "pair": "nvfp4", "shape": (3, 40, 72), "dtype": dtype}
        for name in ("triton_gemv", "triton_skinny")
        for dtype in ("bfloat16", "float16")
    ]
    assert all(found["bound"] <= 1 for found in interpreted(jobs))


@cuda
def test_epilogues_in_the_interpreter():
    """Inside of the kernel, and after it where k is cut into parts (m=5 of triton_skinny)."""
    jobs = [
        {"kernel": name, "pair": pair, "shape": shape, "activation": activation}
        for name, pair, shape, activation in [
            ("triton_gemv", "nvfp4", (2, 9, 72), "gelu"),
            ("triton_gemv", "int8", (1, 9, 72), "silu"),
            ("triton_skinny", "nvfp4", (5, 20, 1061), "relu"),
            ("triton_gemm", "nvfp4", (17, 33, 72), "gelu_tanh"),
            ("triton_gemm", "nvfp4 x nvfp4", (17, 33, 72), "gelu"),
            ("triton_fp8_block", "fp8_block x fp8_block", (5, 20, 72), "silu"),
        ]
    ]
    for one, found in zip(jobs, interpreted(jobs), strict=True):
        assert found["bound"] <= 1, (one, found)


@cuda
def test_nan_codes_and_nan_and_zero_scales():
    """A NaN in one row of the weight reaches that column of the result and no other; a zero scale gives zeros."""
    breaks = [
        ("fp8_e5m2", "data", 0x7F, [2]),  # a NaN code
        ("mxfp4", "scale", 0xFF, [2]),  # a NaN scale
        ("mxfp4", "scale", 0x00, []),  # 2^-127, next to nothing
        ("nvfp4", "scale", 0x00, []),  # zero
    ]
    jobs = [
        {"kernel": name, "pair": pair, "shape": (1, 4, 64), "broken": (field, 2, 1, byte)}
        for pair, field, byte, _ in breaks
        for name in ("triton_gemv", "triton_skinny")
    ]
    for job, found in zip(jobs, interpreted(jobs), strict=True):
        expected = next(rows for pair, _, byte, rows in breaks if (pair, byte) == (job["pair"], job["broken"][3]))
        assert found["nan_rows"] == expected, (job, found)


# ---- lowering for CUDA from the CPU


def lowered(f, *arrays) -> str:
    return for_cuda(f, *arrays).as_text()


def bound(name: str, lhs: Operand, rhs: Operand, shapes: Shapes, **more):
    """(the kernel's product for Hopper, shapes of its operands)"""
    kernel = kernels.find("qdot", lhs, rhs, HOPPER, shapes, backend=name)
    run = functools.partial(kernel.run, lhs_spec=lhs, rhs_spec=rhs, n=shapes.n, k=shapes.k, **more)
    x = tools.abstract(lhs, shapes.m, shapes.k, is_packed=False)
    return run, x, tools.abstract(rhs, shapes.n, shapes.k, is_packed=True)


LOWERED = [
    ("triton_gemv", "float", "nvfp4", 2),
    ("triton_skinny", "nvfp4", "nvfp4", 16),
    ("triton_skinny", "float", "nvfp4", 1),  # jax-triton makes an argument that is 1 a constant
    ("triton_gemm", "float", "int4_g128", 100),
    ("triton_fp8_block", "fp8_1x128", "fp8_128", 3),
    ("triton_gemm_large", "float", "mxfp8", 1500),
]


@cuda
@pytest.mark.parametrize(("name", "lhs", "rhs", "m"), LOWERED)
def test_lowers_for_cuda_without_a_gpu(name, lhs, rhs, m):
    run, x, w = bound(name, tools.MORE[lhs], tools.MORE[rhs], Shapes(m, 256, 512), out_dtype=jnp.bfloat16)
    text = lowered(run, x, w)
    assert text.count("triton_kernel_call") == 1
    assert f"tensor<{m}x256xbf16>" in text
    assert "dot_general" not in text


@cuda
def test_under_vmap_scan_and_grad():
    run, x, w = bound("triton_gemv", FLOAT, OPERANDS["nvfp4"], Shapes(2, 256, 512))
    many = jax.tree.map(lambda a: jax.ShapeDtypeStruct((3, *a.shape), a.dtype), w)
    assert "triton_kernel_call" in lowered(jax.vmap(run, in_axes=(None, 0)), x, many)
    assert "triton_kernel_call" in lowered(lambda x, ws: jax.lax.scan(lambda c, w: (c, run(x, w)), 0, ws)[1], x, many)
    text = lowered(jax.grad(lambda x, w: run(x, w).sum()), x, w)
    assert "dot_general" in text  # the backward pass: dy times the decoded weight
    mapped = lowered(jax.vmap(jax.grad(lambda x, w: run(x, w).sum()), in_axes=(None, 0)), x, many)
    assert "tensor<3x2x512xbf16>" in mapped


@cuda
def test_gradient_is_that_of_the_decoded_product():
    """The backward pass holds no Triton kernel, and is the one that other kernels share and run: `_gradient`."""
    run, x, w = bound("triton_gemv", FLOAT, OPERANDS["nvfp4"], Shapes(2, 256, 512))
    bias = jax.ShapeDtypeStruct((256,), jnp.float32)

    def total(x, w, bias):
        return run(x, w, epilogue=kernels.Epilogue(bias, "silu")).sum()

    dx, dbias = jax.eval_shape(jax.grad(total, (0, 2)), x, w, bias)
    assert (dx.shape, dx.dtype, dbias.shape) == ((2, 512), jnp.bfloat16, (256,))
    text = lowered(jax.grad(total, (0, 2)), x, w, bias)
    assert text.count("triton_kernel_call") == 1 and text.count("dot_general") == 1


@cuda
def test_nothing_to_do_launches_nothing():
    for m, n, k in ((0, 8, 64), (2, 0, 64)):
        run, x, w = bound("triton_gemv", FLOAT, OPERANDS["nvfp4"], Shapes(m, n, k))
        text = lowered(run, x, w)
        assert "triton_kernel_call" not in text and f"tensor<{m}x{n}xf32>" in text


@cuda
@pytest.mark.parametrize(
    ("kernel", "rule", "m"),
    [
        ("triton", {"weight": "nvfp4"}, 4),
        ("triton", {"weight": "nvfp4", "input": "nvfp4"}, 4),
        ("triton_gemv", {"weight": "int4"}, 4),
        ("triton_skinny", {"weight": "nvfp4", "input": "nvfp4"}, 16),
        ("triton_gemm", {"weight": "nvfp4"}, 100),
        ("triton_gemm_large", {"weight": "int8"}, 1500),
        (
            "triton_fp8_block",
            {"weight": {"format": "fp8", "block": [128, 128]}, "input": {"format": "fp8", "block": 128}},
            16,
        ),
        ("triton_scaled", {"weight": "nvfp4", "input": "nvfp4"}, 100),
        ("triton_scaled", {"weight": "mxfp4", "input": "mxfp4"}, 100),
    ],
)
def test_in_a_quantized_model_with_scanned_layers(kernel, rule, m):
    """A kernel asked for by its name is that kernel or an error."""

    def model(params, x):
        def layer(x, w):
            return jax.nn.silu(x @ w["mlp_up"]) @ w["mlp_down"], None

        return jax.lax.scan(layer, x, params)[0]

    params = {"mlp_up": jnp.ones((3, 128, 256)), "mlp_down": jnp.ones((3, 256, 128))}
    x = jnp.ones((m, 128))
    recipe = {"schema": 1, "name": "t", "rules": [{"match": "*", **rule}]}
    quantized = jqopt.quantize_model(model, recipe, params=params, batches=[x])
    run = jqopt.apply(quantized.plan, backend=kernel, device="cuda:100" if kernel == "triton_scaled" else HOPPER)
    text = lowered(lambda q, x: run(q, x), quantized.params, x)
    assert text.count("stablehlo.custom_call @triton_kernel_call") == 2


@cuda
def test_compiled_by_xla_no_weight_is_decoded_to_memory(tmp_path):
    """XLA's own GPU compiler, for Hopper: the default choice is two Triton calls a layer, and less memory beside
    arguments and results than one decoded weight would take (512 x 1024 bfloat16)."""
    folder = cuda_folder(tmp_path)
    flags = f"--xla_gpu_cuda_data_dir={folder} --xla_gpu_autotune_level=0"
    facts = tools.subprocess_json("tests.kernels.triton_aot", "", XLA_FLAGS=flags)
    assert sum(c.startswith("triton_kernel_call") for c in facts["calls"]) == 2  # jax-triton 0.4 adds `_ffi`
    assert facts["temporary"] < 512 * 1024 * 2
