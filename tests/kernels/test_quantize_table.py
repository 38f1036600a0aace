"""The quantizer ops in the table: what is chosen, what is refused and why, and that all of it lowers for CUDA."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jqopt_kernels as kernels
from jqopt_kernels import NoKernelError, Operand, Shapes
from jqopt_kernels.quantize_way import NEAREST, SIGNS, Random, Way, needs_scale
from tests.kernels import lowering
from tests.kernels.lowering import for_cuda
from tests.kernels.quantize_cases import FORMATS

FLOAT = Operand("float")
NVFP4 = FORMATS["nvfp4"][0]
COLUMN = Way(encode=True, hadamard=SIGNS, stochastic=True)
KEYS = jnp.asarray([[1, 2], [3, 4]], jnp.uint32)


def run_of(op: str, family: str):
    return next(k for k in kernels.KERNELS if (k.op, k.backend) == (op, family)).run


def quantize(x, way=NEAREST, **options):
    return run_of("quantize", "pallas")(x, spec=NVFP4, way=way, scale=jnp.float32(0.01), **options)


@pytest.mark.parametrize(
    ("op", "spec", "device", "shapes", "reason"),
    [
        ("quantize", NVFP4, "cpu", (4, 64), "compiles for CUDA"),
        ("quantize", NVFP4, "cuda", (4, 64), "names none"),  # of an exported program, say
        ("quantize", NVFP4, "cuda:90", (1 << 16, 1 << 15), "32-bit"),
        ("quantize", NVFP4._replace(block=24), "cuda:90", (4, 64), "not a power of two"),
        ("quantize", FORMATS["fp8_token"][0], "cuda:90", (4, 1 << 15), "one program holds a row"),
        ("norm_quantize", NVFP4, "cuda:90", (4, 1 << 15), "one program holds a row"),
        ("quantize_both", FORMATS["fp8_token"][0], "cuda:90", (64, 64), "one pass"),
        ("quantize", Operand("nf4", 64, "float32", "block"), "cuda:90", (4, 64), "'nf4' has no quantizer"),
    ],
)
def test_refusals(op, spec, device, shapes, reason):
    m, k = shapes
    with pytest.raises(NoKernelError, match=reason):
        kernels.find(op, FLOAT, spec, device, Shapes(m, 0, k), backend="pallas")
    if "nf4" not in reason and op != "quantize_both":
        assert kernels.find(op, FLOAT, spec, device, Shapes(m, 0, k)).backend == "xla"


def test_pallas_is_preferred_on_cuda():
    assert kernels.find("quantize", FLOAT, NVFP4, "cuda:90", Shapes(64, 0, 64)).name == "pallas_quantize"
    assert kernels.find("quantize", FLOAT, NVFP4, "cpu", Shapes(64, 0, 64)).name == "xla_quantize"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"spec": NVFP4}, "needs `scale`"),
        ({"spec": FORMATS["mxfp8"][0], "scale": 1.0}, "leave `scale` out"),
        ({"spec": FORMATS["mxfp8"][0], "way": Way(stochastic=True)}, "go together"),
        ({"spec": FORMATS["mxfp8"][0], "way": Way(hadamard=SIGNS)}, "multiple of 16"),
        ({"spec": FORMATS["mxfp8"][0], "way": Way(power_of_two=True)}, "of encode scales"),
    ],
)
def test_contradictions_are_told(options, reason):
    with pytest.raises(ValueError, match=reason):
        run_of("quantize", "pallas")(jnp.zeros((2, 40)), **options)


# ----------------------------------------------------------------------------------------- lowering for CUDA, no GPU

CALL = "__gpu$xla.gpu.triton"


def cuda_text(function, *shapes) -> str:
    arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
    return for_cuda(function, *arrays).as_text()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp6", "fp8_token", "fp8_8x16", "int8"])
def test_formats_lower_for_cuda(name):
    spec = FORMATS[name][0]
    run = functools.partial(run_of("quantize", "pallas"), spec=spec, packed=True)
    given = {"scale": jnp.float32(1)} if needs_scale(spec) else {}
    assert cuda_text(lambda x: run(x, **given), (70, 150)).count(CALL) == 1


def test_every_op_lowers_for_cuda():
    one = jnp.float32(1)
    stochastic = Way(encode=True, stochastic=True)
    for function, shapes in (
        (lambda x: quantize(x, stochastic, random=Random(KEYS[0])), [(64, 80)]),
        (lambda x: run_of("quantize_both", "pallas")(
            x, spec=NVFP4, way=stochastic, column_way=COLUMN, scale=one, column_scale=one,
            random=Random(KEYS[0]), column_random=Random(KEYS[1]), packed=True), [(48, 80)]),
        (lambda x, w: run_of("norm_quantize", "pallas")(x, w, spec=NVFP4, scale=one), [(5, 80), (80,)]),
        (lambda x, y: run_of("swiglu_quantize", "pallas")(x, y, spec=NVFP4, scale=one), [(5, 80), (5, 80)]),
        (lambda x: run_of("amax", "pallas")(x, spec=NVFP4, way=Way(hadamard=SIGNS)), [(5, 80)]),
        (lambda x: run_of("swizzle", "pallas")(x.astype(jnp.uint8)), [(130, 20)]),
        (lambda x: run_of("unswizzle", "pallas")(x.astype(jnp.uint8), 130, 18), [(256, 20)]),
        (jax.vmap(quantize), [(3, 5, 48)]),
        (lambda x: jax.lax.scan(lambda c, a: (c, quantize(a)), None, x), [(3, 5, 48)]),
    ):  # fmt: skip
        assert cuda_text(function, *shapes).count(CALL) == 1


@pytest.mark.skipif(lowering.NEEDS_DEVICE, reason="JAX 0.11 lowers Pallas under a mesh of CPUs only where a GPU is")
def test_lowers_inside_a_shard_map_that_checks():
    """With check_vma=True, JAX's default, outputs say over which axes of the mesh they differ."""
    mesh = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))

    def part(x):
        return quantize(x, packed=True).data

    text = cuda_text(jax.shard_map(part, mesh=mesh, in_specs=P("a"), out_specs=P("a")), (8, 64))
    assert text.count(CALL) == 1
