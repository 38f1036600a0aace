"""Every Triton kernel and shipped tile compiled for Hopper and Blackwell: registers, spills, instructions, offsets.

Needs the packages of `make cuda`.
"""

import json
import re
from typing import NamedTuple

import jax.numpy as jnp
import pytest

import jqopt_kernels as kernels
from jqopt_kernels import Shapes, _tiles, triton_dot
from tests.kernels import triton_tools as tools
from tests.kernels.cases import FLOAT, OPERANDS

cuda = pytest.mark.cuda
pytestmark = pytest.mark.usefixtures("shipped_tiles")

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
@pytest.mark.parametrize("capability", _tiles.CAPABILITIES)
@pytest.mark.parametrize("name", triton_dot.LAUNCHES)
def test_every_shipped_tile_compiles_without_spilling(name, capability):
    """Each tile that a file holds, with the operands that ask most of it."""
    formats = {"w4": ("nvfp4", "int4_g128"), "w8": ("mxfp8", "fp8_128", "int8")}
    floats = {"x16": "bfloat16", "x32": "float32"}
    seen = set()
    for key, tile in json.loads((_tiles.FOLDER / f"sm_{capability}.json").read_text())["tiles"][name].items():
        weight, x, rows = key.split()
        m = 4096 if rows == "many" else int(rows[1:])
        for rhs in formats[weight] if x in floats else formats[weight][:1]:
            lhs = "float" if x in floats else {"w4": "nvfp4", "w8": "mxfp8"}[weight]
            if name == "triton_fp8_block":
                lhs, rhs = "fp8_1x128", "fp8_128"
            one = (lhs, rhs, x, str(tile), name == "triton_gemv" and m)
            if one not in seen:
                compiles_well(name, lhs, rhs, floats.get(x), m, capability)
            seen.add(one)
    assert len(seen) > 2


COMPILED_BEFORE: dict[tuple[str, int], tools.Compiled] = {}


def compiled(what: str, launch, capability: int) -> tools.Compiled:
    """Each launch once: tiles of several classes are the same."""
    if (what, capability) not in COMPILED_BEFORE:
        COMPILED_BEFORE[what, capability] = tools.compiled(launch, capability)
    return COMPILED_BEFORE[what, capability]


def compiles_well(
    name: str, lhs: str, rhs: str, dtype: str | None, m: int, capability: int, activation: str | None = None
) -> None:
    shapes, dtype = Shapes(m, 4096, 4096), jnp.dtype(dtype or "float32")
    launch = tools.launch(
        name, tools.MORE[lhs], tools.MORE[rhs], shapes, capability, dtype=dtype, activation=activation
    )
    made = compiled(repr(launch), launch, capability)
    assert made.stack == 0 and made.count("STL") == made.count("LDL") == 0, (
        launch.constants,
        made.registers,
        made.stack,
    )
    assert made.registers * 32 * launch.warps <= 65536 and made.registers <= REGISTERS
    assert made.shared <= SHARED[capability]
    if name != "triton_gemv":
        # four warps make a group: fewer multiply by mma.sync everywhere, and with eight rows so does Triton 3.6
        own = launch.warps >= 4 and launch.constants.get("BM", 16) > 8
        assert made.count(TENSOR_CORES[capability] if own else "[A-Z]*MMA") > 0
    if name == "triton_fp8_block":
        assert "e4m3.e4m3" in made.ptx or "kind::f8f6f4" in made.ptx
    if is_weight_bound(name, m):  # 16 bytes at a time, straight into shared memory or through registers
        assert made.count(r"LDGSTS\.E.*\.128") + made.count(r"LDG\.E.*\.128") > 0


@cuda
def test_powers_of_two_keep_their_ends():
    """255 becomes NaN by 0 times inf, and 2^-127 is a subnormal: neither may be simplified or flushed."""
    ptx = tools.compiled(tools.launch("triton_skinny", FLOAT, OPERANDS["mxfp4"], Shapes(1, 256, 256), 90), 90).ptx
    assert "fma.rn.f32" in ptx and ".ftz" not in ptx


@cuda
@pytest.mark.parametrize("capability", _tiles.CAPABILITIES)
@pytest.mark.parametrize(
    ("name", "m", "activation"),
    [("triton_gemv", 4, "gelu"), ("triton_gemm", 256, "gelu"), ("triton_gemm", 256, "silu")],
)
def test_epilogues_do_not_spill(name, m, activation, capability):
    compiles_well(name, "float", "nvfp4", "bfloat16", m, capability, activation)


class Gpu(NamedTuple):
    """NVIDIA's data sheets: cores (each starts 128 instructions of a thread a clock), clock, bytes a second."""

    cores: int
    clock: float
    memory: float


GPUS = {90: Gpu(132, 1.8e9, 4.8e12), 100: Gpu(148, 1.8e9, 8e12), 120: Gpu(188, 2.3e9, 1.79e12)}  # H200, B200, RTX 6000
WEIGHT_BYTES = {"nvfp4": 9 / 16, "mxfp4": 17 / 32, "int4_g128": 33 / 64, "fp8": 1, "int8": 1, "mxfp8": 33 / 32}


@cuda
@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("rhs", WEIGHT_BYTES)
@pytest.mark.parametrize(("capability", "share"), [(90, 0.7), (100, 0.5), (120, 1)])
def test_instructions_leave_time_to_read_weights(capability, share, rhs, m):
    """The least share of the memory's speed at which the main loop's instructions can be started.

    0.7 is the goal for an H200; a B200, whose memory is faster and whose cores are not, is short of it for NVFP4.
    """
    shapes = Shapes(m, 28672, 4096)
    kernel = kernels.find("qdot", FLOAT, tools.MORE[rhs], f"cuda:{capability}", shapes)
    launch = tools.launch(kernel.name, FLOAT, tools.MORE[rhs], shapes, capability)
    loop = tools.compiled(launch, capability).loop()
    # it is the main one
    assert sum("MMA" in each for each in loop) >= 8 and sum("LDGSTS" in each for each in loop) >= 4
    if (capability, m) == (90, 1):  # nothing is waited for that was not asked for before
        assert not any(re.search(r"\bLDG\b", each) for each in loop)
    weights = launch.constants["BN"] * launch.constants["BK"] / (32 * launch.warps)  # of a thread
    gpu = GPUS[capability]
    budget = gpu.cores * 128 * gpu.clock / (gpu.memory / WEIGHT_BYTES[rhs])
    assert len(loop) / weights <= budget / share, (len(loop) / weights, budget)


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
    launch = tools.launch(name, tools.MORE[lhs], tools.MORE[rhs], Shapes(m, n, k), capability, prepare=False)
    ttir = tools.compiled(launch, capability).ttir
    spec = tools.MORE[rhs]
    width = k // 8 if launch.kernel == "words" else k * tools.BITS[spec.element] // 8  # of a row, in words or bytes
    lengths = {"weight": width} | ({} if name == "triton_gemv" else {"result": n})
    if spec.granularity == "block":
        lengths["scales"] = k // (spec.block[1] if isinstance(spec.block, tuple) else spec.block)
    if name == "triton_scaled":
        lengths["scales in tiles"] = k // 16 // 4 * 512
    for what, length in lengths.items():
        assert re.search(rf"dense<{length}> : tensor<[0-9x]*i64>|constant {length} : i64", ttir), what
    for length in set(lengths.values()) - {n}:
        assert not re.search(rf"dense<{length}> : tensor<[0-9x]*i32>", ttir), length


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
