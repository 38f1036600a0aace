"""The table of kernels: what is chosen, what is refused and why, and that every kernel lowers for CUDA."""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import pytest

import jqopt_kernels as kernels
from jqopt_kernels import NoKernelError, Operand, Shapes
from tests.kernels.cases import FLOAT, OPERANDS, PAIRS, case
from tests.kernels.lowering import for_cuda

INT8, FP8, NVFP4 = OPERANDS["int8"], OPERANDS["fp8"], OPERANDS["nvfp4"]
BIG = Shapes(64, 256, 256)


@pytest.mark.parametrize(
    ("lhs", "rhs", "device", "m", "name"),
    [
        (INT8, INT8, "cpu", 64, "xla_int8"),
        (INT8, INT8, "cpu", 1, "xla_int8_row"),
        (INT8, INT8, "gpu", 1, "xla_int8"),
        (FP8, FP8, "gpu", 64, "xla_fp8"),
        (FP8, FP8, "cuda", 64, "xla_fp8"),
        (FP8, FP8, "cpu", 64, "xla_fp8_dot"),
        (FP8, FP8, "cpu", 1, "xla_tiled"),
        (NVFP4, NVFP4, "cpu", 512, "xla_lookup"),
        (FP8, FP8, "tpu", 64, "xla_fp8_dot"),
        (FLOAT, NVFP4, "cpu", 1, "xla_tiled"),
        (NVFP4, NVFP4, "cpu", 64, "xla_tiled_bf16"),
        (NVFP4, NVFP4, "cpu", 1, "xla_tiled"),
        (FLOAT, Operand("e2m1", 5, "e4m3", "block"), "cpu", 1, "xla_lookup"),
        (FLOAT, Operand("e2m3", 32, "e8m0", "block"), "cpu", 512, "xla_decode"),
        (FLOAT, NVFP4, "cuda:90", 1, "pallas_gemv"),
        (FLOAT, NVFP4, "cuda", 16, "pallas_skinny"),
        (NVFP4, NVFP4, "gpu", 512, "pallas_gemm"),
        (FLOAT, Operand("e2m1", 5, "e4m3", "block"), "cuda:90", 1, "xla_decode"),
    ],
)
def test_first_that_can(lhs, rhs, device, m, name):
    assert kernels.find("qdot", lhs, rhs, device, Shapes(m, 256, 256)).name == name


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("device", ["cpu", "gpu", "tpu"])
def test_every_pair_has_a_kernel_on_every_device(pair, device):
    lhs, rhs = (OPERANDS[name] for name in PAIRS[pair])
    for m in (0, 1, 64):
        kernels.find("qdot", lhs, rhs, device, Shapes(m, 130, 70))


@pytest.mark.parametrize(
    ("lhs", "rhs", "device", "k", "why"),
    [
        (NVFP4, NVFP4, "cuda:100", 256, None),
        (OPERANDS["mxfp8"], OPERANDS["mxfp8"], "cuda:103", 256, None),
        (FLOAT, NVFP4, "cuda:100", 256, "lhs is float"),
        (OPERANDS["mxfp4"], OPERANDS["mxfp4"], "cuda:100", 256, "lhs is e2m1 with e8m0 scales"),
        (NVFP4, OPERANDS["mxfp8"], "cuda:100", 256, "one side has e4m3 scales, the other e8m0"),
        (NVFP4, NVFP4, "cuda:100", 250, "k=250 is not a multiple of the block 16"),
        (NVFP4, NVFP4, "cuda:90", 256, "compute capability 9.0"),
        (NVFP4, NVFP4, "cuda:120", 256, "compute capability 12.0"),
        (NVFP4, NVFP4, "cuda", 256, "does not say its compute capability"),
        (NVFP4, NVFP4, "cpu", 256, "not for cpu"),
    ],
)
def test_block_scales_of_blackwell(lhs, rhs, device, k, why):
    said = dict(kernels.explain("qdot", lhs, rhs, device, Shapes(64, 256, k)))["xla_scaled"]
    assert said is None if why is None else why in said


def test_one_long_row_of_four_bits_on_a_cpu():
    assert kernels.find("qdot", FLOAT, NVFP4, "cpu", Shapes(1, 256, 512)).name == "xla_row"
    assert kernels.find("qdot", NVFP4, NVFP4, "cpu", Shapes(1, 256, 512)).name == "xla_row"
    assert kernels.find("qdot", FLOAT, FP8, "cpu", Shapes(1, 256, 512)).name == "xla_tiled"
    assert (
        kernels.find("qdot", FLOAT, Operand("int4", 512, "float32", "block"), "cpu", Shapes(1, 8, 1024)).name
        != "xla_row"
    )


def test_explain_gives_every_kernel_in_order():
    rows = kernels.explain("qdot", FLOAT, NVFP4, "cpu", BIG)
    assert [name for name, _ in rows] == [k.name for k in kernels.KERNELS if k.op == "qdot"]
    assert dict(rows)["xla_tiled"] is None
    assert dict(rows)["xla_int8"] == "lhs is float, not int8"


def test_names_are_unique():
    assert len({(k.op, k.name) for k in kernels.KERNELS}) == len(kernels.KERNELS)


def test_a_named_backend_is_taken():
    assert kernels.find("qdot", FLOAT, NVFP4, "cpu", BIG, backend="reference").name == "reference"


def test_a_named_family_gives_its_first_that_can():
    assert kernels.find("qdot", FLOAT, NVFP4, "cpu", BIG, backend="xla").name == "xla_tiled"
    rows = kernels.explain("qdot", FLOAT, NVFP4, "cpu", BIG, backend="xla")
    assert {name for name, _ in rows} == {k.name for k in kernels.KERNELS if (k.op, k.backend) == ("qdot", "xla")}


def test_refusals_are_a_group_of_exceptions():
    with pytest.raises(NoKernelError) as error:
        kernels.find("qdot", FLOAT, Operand("int3", 32, "float32", "block"), "cuda:90", BIG)
    refusals = error.value.exceptions
    assert [r.kernel for r in refusals] == [k.name for k in kernels.KERNELS if k.op == "qdot"]
    assert all(r.reason in str(error.value) for r in refusals)
    only, rest = error.value.split(lambda r: getattr(r, "kernel", "") == "reference")
    assert isinstance(only, NoKernelError) and isinstance(rest, NoKernelError)


def test_a_device_may_say_its_capability():
    for lhs, rhs, m in ((FP8, FP8, 64), (FLOAT, NVFP4, 1), (INT8, INT8, 1)):
        named = {
            d: kernels.find("qdot", lhs, rhs, d, Shapes(m, 256, 256), backend="xla").name for d in ("gpu", "cuda:90")
        }
        assert len(set(named.values())) == 1
    assert kernels.here() == "cpu"


def test_a_named_backend_that_cannot_says_why():
    with pytest.raises(NoKernelError) as error:
        kernels.find("qdot", FLOAT, NVFP4, "cpu", BIG, backend="xla_int8")
    text = str(error.value)
    assert "lhs is float, not int8" in text
    assert "m=64 n=256 k=256" in text
    assert "element=e2m1, block=16, scale=e4m3, granularity=block, global_scale=True" in text
    assert "xla_tiled" not in text  # only the one that was asked for


def test_an_unknown_backend_lists_those_there_are():
    with pytest.raises(
        NoKernelError, match=r"no kernel named 'cuda'.*xla_tiled.*reference; families: .*xla.*reference"
    ):
        kernels.find("qdot", FLOAT, NVFP4, "cpu", BIG, backend="cuda")


def test_an_unknown_op_lists_those_there_are():
    with pytest.raises(NoKernelError, match=r"'qconv'.*ops are .*qdot"):
        kernels.find("qconv", FLOAT, NVFP4, "cpu", BIG)
    with pytest.raises(NoKernelError, match="ops are .*qdot"):
        kernels.find("qconv", FLOAT, NVFP4, "cpu", BIG, backend="xla_tiled")


def test_where_none_can_every_reason_is_told():
    with pytest.raises(NoKernelError) as error:
        kernels.find("qdot", FLOAT, Operand("int3", 32, "float32", "block"), "cpu", BIG)
    lines = str(error.value).splitlines()
    assert {line.split(":")[0].strip() for line in lines} >= {k.name for k in kernels.KERNELS if k.op == "qdot"}
    assert any("'int3' is unknown; known: e2m1" in line for line in lines)


def test_zero_points_of_floats_are_refused():
    odd = Operand("e2m1", 16, "float32", "block", zero_point=True)
    with pytest.raises(NoKernelError, match="only integer elements have"):
        kernels.find("qdot", FLOAT, odd, "cpu", BIG, backend="xla_decode")


def lowered(pair: str, kernel: kernels.Kernel, m: int) -> str:
    c = case(pair, m, 130, 70)
    arrays = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (c.lhs, c.rhs))
    return for_cuda(lambda lhs, rhs: kernel.run(lhs, rhs, **c.specs), *arrays).as_text()


def cuda_checks() -> list:
    return [
        pytest.param(pair, kernel, m, id=f"{kernel.name}-{pair}-m{m}")
        for pair, (lhs, rhs) in PAIRS.items()
        for m in (1, 64)
        for kernel in kernels.KERNELS
        if kernel.op == "qdot" and kernel.supports(OPERANDS[lhs], OPERANDS[rhs], "cuda", Shapes(m, 130, 70)) is None
    ]


@pytest.mark.parametrize(("pair", "kernel", "m"), cuda_checks())
def test_lowers_for_cuda_without_a_gpu(pair, kernel, m):
    assert ("__gpu$xla.gpu.triton" if kernel.backend == "pallas" else "dot_general") in lowered(pair, kernel, m)


NOT_TRITON = "--xla_gpu_enable_triton_gemm=false"


@pytest.mark.parametrize(
    ("flags", "only_cublas"), [("", False), (NOT_TRITON, True), (f"{NOT_TRITON} {NOT_TRITON[:-5]}true", False)]
)
def test_fp8_reaches_the_product_as_fp8(monkeypatch, flags, only_cublas):
    """Or, for scales of tensors where XLA has cuBLASLt only, converted to f32 and scaled, as its rewriter looks for."""
    jax.clear_caches()
    monkeypatch.setenv("XLA_FLAGS", flags)
    kernel = next(k for k in kernels.KERNELS if k.name == "xla_fp8")
    codes = "(tensor<64x70xf8E4M3FN>, tensor<130x70xf8E4M3FN>) -> tensor<64x130xf32>"
    assert codes in lowered("fp8_channel x fp8_channel", kernel, 64)
    whole = lowered("fp8 x fp8", kernel, 64)
    assert (codes in whole) != only_cublas
    assert ("(tensor<64x70xf8E4M3FN>) -> tensor<64x70xf32>" in whole) == only_cublas
    jax.clear_caches()


SOURCE = pathlib.Path(kernels.__file__).parent
TRITON_SOURCE = {"triton_code.py", "triton_words.py"}  # imported by functions that launch it, when triton is there


def test_nothing_but_jax_is_imported():
    known = {"jax", "numpy"} | set(sys.stdlib_module_names)
    for path in SOURCE.glob("*.py"):
        found = set(re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
        assert found <= known | ({"triton"} if path.name in TRITON_SOURCE else set()), path.name


def test_no_module_imports_triton_at_its_top():
    for path in SOURCE.glob("*.py"):
        top = re.findall(r"^(?:from|import) .*", path.read_text(), re.MULTILINE)
        assert path.name in TRITON_SOURCE or not [
            x for x in top if "triton_code" in x or "triton_words" in x or "jax_triton" in x
        ], path.name


def test_float16_activations():
    c = case("nvfp4", 3, 40, 40, float_dtype=jnp.float16)
    kernel = kernels.find("qdot", FLOAT, NVFP4, "cpu", Shapes(3, 40, 40))
    y = kernel.run(c.lhs, c.rhs, **c.specs)
    assert float(abs(y - c.y).max()) <= c.bound.max()
