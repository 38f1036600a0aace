"""Triton kernels without a GPU: numbers in Triton's interpreter, registers and instructions by its compiler, lowering.

All but the first part needs the packages of `make cuda`.
"""

import functools
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import jqopt
import jqopt_kernels as kernels
from jqopt_kernels import Operand, Shapes, _tiles, triton_call, triton_dot
from tests.kernels import triton_tools as tools
from tests.kernels.cases import FLOAT, OPERANDS, PAIRS
from tests.kernels.lowering import for_cuda
from tests.kernels.triton_aot import cuda_folder

HOPPER = "cuda:90"
cuda = pytest.mark.cuda


@pytest.fixture(autouse=True, scope="module")
def fresh_caches(tmp_path_factory):
    """Shipped tiles only, whatever this machine's user has tuned; and a folder for Triton, which jax-triton unsets."""
    assert triton_call.missing() is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


# ---- numbers


def interpreted(jobs: list[dict]) -> list[dict]:
    """What `triton_interpret` says of each job, in a process of its own."""
    return subprocess_json("tests.kernels.triton_interpret", json.dumps(jobs), TRITON_INTERPRET="1")


def subprocess_json(module: str, text: str, **variables: str):
    """What a module prints, run as a program in a process of its own with this one's imports and no GPU."""
    path = os.pathsep.join(p for p in sys.path if p)
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | variables
    done = subprocess.run(
        [sys.executable, "-m", module], input=text, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


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
@pytest.mark.parametrize("m", [256, 4096])
@pytest.mark.parametrize("spec", ["nvfp4", "mxfp4", "mxfp8"])
@pytest.mark.parametrize("capability", [100, 120])
def test_block_scaled_products_use_blackwells_tensor_cores(spec, capability, m):
    """Every shipped tile; with scales as they are stored and, prepared, straight from shared memory."""
    shapes, copies = Shapes(m, 4096, 4096), []
    for prepare in (False, True):
        launch = tools.launch("triton_scaled", OPERANDS[spec], OPERANDS[spec], shapes, capability, prepare=prepare)
        made = tools.compiled(launch, capability)
        kind = {"nvfp4": "mxf4nvf4", "mxfp4": "mxf4", "mxfp8": "mxf8f6f4"}[spec]
        if capability == 100:
            assert f"tcgen05.mma.cta_group::1.kind::{kind}.block_scale" in made.ptx
            copies.append(made.ptx.count("tcgen05.cp.cta_group::1.warpx4.32x128b"))
        else:
            kind = "mxf4nvf4" if kind == "mxf4" else kind  # where one kind serves both formats of 4 bits
            assert re.search(rf"mma\.sync\.aligned\.\S+\.kind::{kind}\.block_scale", made.ptx)
        assert made.stack == 0 and made.count("STL") == made.count("LDL") == 0
        assert made.registers <= REGISTERS and made.shared <= SHARED[capability]
    assert capability != 100 or 0 < copies[0] < copies[1]  # of the activation's scales, and the weight's too


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


# ---- what the compiler makes of them

MORE = OPERANDS | {
    "int4_g128": Operand("int4", 128, "float32", "block"),
    "fp8_128": Operand("e4m3", (128, 128), "float32", "block"),
    "fp8_1x128": Operand("e4m3", (1, 128), "float32", "block"),
}
# (kernel, lhs, rhs, dtype of a float lhs, rows): each kernel at each end of its rows, with each kind of operand
COMPILED = [
    *[("triton_gemv", "float", "nvfp4", "bfloat16", m) for m in (1, 4)],
    ("triton_gemv", "float", "int8", "bfloat16", 1),
    ("triton_gemv", "float", "int4_g128", "float32", 4),
    *[("triton_skinny", "float", "nvfp4", "bfloat16", m) for m in (16, 64)],
    ("triton_skinny", "float", "nvfp4", "float32", 64),
    ("triton_skinny", "float", "int4_g128", "bfloat16", 64),
    ("triton_skinny", "nvfp4", "nvfp4", None, 64),
    ("triton_skinny", "mxfp8", "mxfp8", None, 32),
    ("triton_gemm", "float", "nvfp4", "bfloat16", 256),
    ("triton_gemm", "float", "int8", "float32", 256),
    ("triton_gemm", "float", "int4_g128", "bfloat16", 256),
    ("triton_gemm", "nvfp4", "nvfp4", None, 256),
    *[("triton_fp8_block", "fp8_1x128", "fp8_128", None, m) for m in (16, 256)],
]
TENSOR_CORES = {90: "[HQ]GMMA", 100: "UTC[HQ]MMA", 120: "[HQ]MMA"}
REGISTERS = 255  # a thread has no more: beyond it, they spill
SHARED = {90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes a program may have (CUDA programming guide, table 30)


def is_weight_bound(name: str, m: int) -> bool:
    return name == "triton_gemv" or (name == "triton_skinny" and m <= 16)


@cuda
@pytest.mark.parametrize("capability", _tiles.CAPABILITIES)
@pytest.mark.parametrize(("name", "lhs", "rhs", "dtype", "m"), COMPILED)
def test_shipped_tiles_compile_without_spilling(name, lhs, rhs, dtype, m, capability):
    compiles_well(name, lhs, rhs, dtype, m, capability)


@cuda
@pytest.mark.long
@pytest.mark.parametrize("capability", _tiles.CAPABILITIES)
@pytest.mark.parametrize("name", triton_dot.LAUNCHES)
def test_every_shipped_tile_compiles_without_spilling(name, capability):
    """Each tile that a file holds, with the operands that ask most of it."""
    formats = {"w4": ("nvfp4", "int4_g128"), "w8": ("mxfp8", "fp8_128")}
    floats = {"x16": "bfloat16", "x32": "float32"}
    seen = set()
    for key, tile in json.loads((_tiles.FOLDER / f"sm_{capability}.json").read_text())["tiles"][name].items():
        weight, x, rows = key.split()
        m = 4096 if rows == "many" else int(rows[1:])
        for rhs in formats[weight] if x == "x16" else formats[weight][:1]:
            lhs = "float" if x in floats else {"w4": "nvfp4", "w8": "mxfp8"}[weight]
            if name == "triton_fp8_block":
                lhs, rhs = "fp8_1x128", "fp8_128"
            one = (lhs, rhs, x, str(tile), name == "triton_gemv" and m)
            if one not in seen:
                compiles_well(name, lhs, rhs, floats.get(x), m, capability)
            seen.add(one)
    assert len(seen) > 2


def compiles_well(
    name: str, lhs: str, rhs: str, dtype: str | None, m: int, capability: int, activation: str | None = None
) -> None:
    shapes, dtype = Shapes(m, 4096, 4096), jnp.dtype(dtype or "float32")
    launch = tools.launch(name, MORE[lhs], MORE[rhs], shapes, capability, dtype=dtype, activation=activation)
    made = tools.compiled(launch, capability)
    assert made.stack == 0 and made.count("STL") == made.count("LDL") == 0, (
        launch.constants,
        made.registers,
        made.stack,
    )
    assert made.registers * 32 * launch.warps <= 65536 and made.registers <= REGISTERS
    assert made.shared <= SHARED[capability]
    if name != "triton_gemv":
        assert made.count(TENSOR_CORES[capability]) > 0
    if name == "triton_fp8_block":
        assert "e4m3.e4m3" in made.ptx or "kind::f8f6f4" in made.ptx
    if is_weight_bound(name, m):  # 16 bytes at a time, straight into shared memory or through registers
        assert made.count(r"LDGSTS\.E.*\.128") + made.count(r"LDG\.E.*\.128") > 0


@cuda
@pytest.mark.parametrize("capability", _tiles.CAPABILITIES)
@pytest.mark.parametrize(
    ("name", "m", "activation"),
    [("triton_gemv", 4, "gelu"), ("triton_gemm", 256, "gelu"), ("triton_gemm", 256, "silu")],
)
def test_epilogues_do_not_spill(name, m, activation, capability):
    compiles_well(name, "float", "nvfp4", "bfloat16", m, capability, activation)


@cuda
def test_hardware_decodes_e4m3():
    """Its NaN is kept then (PTX ISA, cvt): the interpreter's e4m3, which has none, cannot show it."""
    launch = tools.launch("triton_gemv", FLOAT, OPERANDS["fp8"], Shapes(1, 256, 256), 90)
    ptx = tools.compiled(launch, 90).ptx
    assert "cvt.rn.f16x2.e4m3x2" in ptx


@cuda
@pytest.mark.parametrize(
    ("name", "lhs", "rhs", "m"),
    [
        ("triton_gemv", "float", "nvfp4", 2),
        ("triton_skinny", "float", "nvfp4", 2),
        ("triton_gemm", "float", "int8", 256),
        ("triton_fp8_block", "fp8_1x128", "fp8_128", 16),
        ("triton_scaled", "nvfp4", "nvfp4", 256),
    ],
)
def test_offsets_beyond_int32(name, lhs, rhs, m):
    """A weight of 2^33 bytes and more: whatever is as long as a row multiplies row numbers as int64, never as int32."""
    n, k = 1 << 18, 1 << 16
    capability = 100 if name == "triton_scaled" else 90
    launch = tools.launch(name, MORE[lhs], MORE[rhs], Shapes(m, n, k), capability, prepare=False)
    ttir = tools.compiled(launch, capability).ttir
    spec = MORE[rhs]
    lengths = {"weight": k * tools.BITS[spec.element] // 8} | ({} if name == "triton_gemv" else {"result": n})
    if spec.granularity == "block":
        lengths["scales"] = k // (spec.block[1] if isinstance(spec.block, tuple) else spec.block)
    if name == "triton_scaled":
        lengths["scales in tiles"] = k // 16 // 4 * 512
    for what, length in lengths.items():
        assert re.search(rf"dense<{length}> : tensor<[0-9x]*i64>|constant {length} : i64", ttir), what
    for length in set(lengths.values()) - {n}:
        assert not re.search(rf"dense<{length}> : tensor<[0-9x]*i32>", ttir), length


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
    run, x, w = bound(name, MORE[lhs], MORE[rhs], Shapes(m, 256, 512), out_dtype=jnp.bfloat16)
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
    facts = subprocess_json("tests.kernels.triton_aot", "", XLA_FLAGS=flags)
    assert sum(c.startswith("triton_kernel_call") for c in facts["calls"]) == 2  # jax-triton 0.4 adds `_ffi`
    assert facts["temporary"] < 512 * 1024 * 2
