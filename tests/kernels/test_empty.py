"""Sizes of zero: every kernel of every op takes them, and gives what is left of its definition: sums of nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt_kernels as kernels
from jqopt_kernels import Epilogue, Shapes
from jqopt_kernels.quantize_way import needs_scale
from tests.kernels import test_attend as attend
from tests.kernels import test_grouped as grouped
from tests.kernels.cases import FLOAT, OPERANDS, case, operand
from tests.kernels.quantize_cases import FORMATS
from tests.kernels.test_contract import KINDS, able, kernel_named


@pytest.fixture(autouse=True)
def installed(request):
    if "ffi" in request.node.name:
        request.getfixturevalue("library")


def often(format: str) -> list:
    """Some formats are run with every change, the others with all slow tests."""
    return [] if format in ("nvfp4", "uint4", "fp8_token") else [pytest.mark.slow]


def products(shapes) -> list:
    """(kernel, pair, those of the shapes that it takes). Triton's are in test_triton.py."""
    takes: dict[tuple[str, str], list] = {}
    for pair in (*KINDS, "mxfp8", "fp8_block x fp8_block"):
        for shape in shapes:
            for kernel in able(pair, *shape):
                takes.setdefault((kernel.name, pair), []).append(shape)
    return [
        pytest.param(name, pair, some, id=f"{name}-{pair}", marks=often(pair))
        for (name, pair), some in takes.items()
        if not name.startswith("triton")
    ]


def no_rows(lhs):
    if isinstance(lhs, jax.Array):
        return lhs[:0]
    scale = lhs.scale if lhs.scale is None or lhs.scale.shape == (1, 1) else lhs.scale[:0]
    zero = lhs.zero_point if lhs.zero_point is None or lhs.zero_point.shape == (1, 1) else lhs.zero_point[:0]
    return lhs._replace(data=lhs.data[:0], scale=scale, zero_point=zero)


NO_ROWS, NO_COLUMNS = products([(0, 5, 64)]), products([(1, 7, 0), (5, 7, 0), (65, 7, 0)])


@pytest.mark.parametrize(("name", "pair", "shapes"), NO_ROWS)
def test_no_rows(name, pair, shapes):
    for _, n, k in shapes:
        c = case(pair, 2, n, k)
        y = kernel_named(name).run(no_rows(c.lhs), c.rhs, **c.specs)
        assert y.shape == (0, n) and y.dtype == jnp.float32


@pytest.mark.parametrize(("name", "pair", "shapes"), NO_COLUMNS)
def test_nothing_to_add_up(name, pair, shapes):
    """Zeros, and the bias on them."""
    m, n, k = shapes[0]
    c, bias = case(pair, m, n, k), np.arange(n, dtype=np.float32)
    y = kernel_named(name).run(c.lhs, c.rhs, **c.specs, epilogue=Epilogue(jnp.asarray(bias)))
    np.testing.assert_array_equal(y, np.tile(bias, (m, 1)))
    for m, n, k in shapes:
        c = case(pair, m, n, k)
        np.testing.assert_array_equal(kernel_named(name).run(c.lhs, c.rhs, **c.specs), np.zeros((m, n)))


@pytest.mark.parametrize("name", grouped.NAMES)
@pytest.mark.parametrize("format", ["nvfp4", "int8", "uint4"])
def test_groups_of_nothing(name, format):
    rng, spec = np.random.default_rng(0), OPERANDS[format]
    for m, k in ((0, 32), (6, 0), (0, 0)):
        experts = jax.tree.map(lambda a: jnp.stack([a, a]), operand(rng, spec, 5, k, is_packed=True)[0])
        sizes = jnp.asarray([min(m, 4), 0])
        y = grouped.kernel(name).run(jnp.ones((m, k)), experts, sizes, lhs_spec=FLOAT, rhs_spec=spec, n=5, k=k)
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(y, np.zeros((m, 5)))


@pytest.mark.parametrize("name", attend.NAMES)
@pytest.mark.parametrize(("batch", "length"), [(0, 8), (2, 0)])
@pytest.mark.parametrize("format", [pytest.param(f, marks=often(f)) for f in attend.FORMATS])
def test_attention_to_nothing(name, batch, length, format):
    facts = attend.facts_of(format, 0.1)
    k, v = (
        jax.tree.map(lambda a: a[:batch, :length] if a.ndim == 4 else a, attend.held(format, width)[0])
        for width in (attend.WIDTH, attend.VALUE)
    )
    q, none = attend.query(jnp.float32)[:batch], jnp.zeros((batch,), jnp.int32)
    y = attend.kernel(name).run(q, k, v, none, none, facts=facts)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, np.zeros((batch, attend.HEADS * attend.GROUP, attend.VALUE)))


# ------------------------------------------------------------------------------------------------------- quantizers

EMPTY = [(0, 32), (3, 0), (0, 0)]
BITS = {"e2m1": 4, "e3m2": 6, "e2m3": 6, "e4m3": 8, "e5m2": 8, "int8": 8}


def taken(op: str) -> list:
    return [
        pytest.param(kernel, name, id=f"{kernel.name}-{name}", marks=often(name))
        for kernel in kernels.KERNELS
        if kernel.op == op
        for name in FORMATS
        if kernel.supports(FLOAT, FORMATS[name][0], "cuda:90", Shapes(0, 0, 32)) is None
    ]


def empty(packed, spec, m: int, k: int) -> None:
    """Shapes by the contract of `Packed`: whole bytes of codes, a scale for each row or block, and no value."""
    assert packed.data.shape == (m, -(-k * BITS[spec.element] // 8))
    assert packed.data.dtype == (jnp.int8 if spec.element == "int8" else jnp.uint8)
    rows, columns = spec.block if isinstance(spec.block, tuple) else (1, spec.block)
    block = {"tensor": (1, 1), "channel": (m, 1)}.get(spec.granularity) or (-(-m // rows), -(-k // columns))
    assert packed.scale.shape == block
    assert packed.scale.dtype == (jnp.float32 if spec.scale == "float32" else jnp.uint8)
    assert (packed.global_scale is not None) == spec.global_scale


@pytest.mark.parametrize(
    ("kernel", "name"),
    [*taken("quantize"), *taken("norm_quantize"), *taken("swiglu_quantize"), *taken("quantize_both")],
)
def test_nothing_to_quantize(kernel, name):
    spec = FORMATS[name][0]
    scale = jnp.float32(0.5) if needs_scale(spec) else None
    for m, k in EMPTY:
        x, options = jnp.zeros((m, k)), {"spec": spec, "scale": scale, "packed": True}
        if kernel.op == "quantize_both":
            rows, columns = kernel.run(x, column_scale=scale, **options)
            empty(columns, spec, k, m)
        else:
            others = {"norm_quantize": (jnp.ones(k),), "swiglu_quantize": (x,)}.get(kernel.op, ())
            rows = kernel.run(x, *others, **options)
        empty(rows, spec, m, k)


@pytest.mark.parametrize(("kernel", "name"), taken("amax"))
def test_the_largest_of_nothing_is_zero(kernel, name):
    spec = FORMATS[name][0]
    for m, k in EMPTY:
        found = kernel.run(jnp.zeros((m, k)), spec=spec)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, np.zeros((m, 1) if spec.granularity == "channel" else ()))


@pytest.mark.parametrize("family", ["pallas", "xla", "reference"])
def test_no_scales_to_swizzle(family):
    """Rows are padded to 128, columns to 4: nothing stays nothing, along either side."""
    swizzle, unswizzle = (
        next(k for k in kernels.KERNELS if (k.op, k.backend) == (op, family)) for op in ("swizzle", "unswizzle")
    )
    for (rows, columns), padded in (((0, 5), (0, 8)), ((130, 0), (256, 0)), ((0, 0), (0, 0))):
        assert swizzle.supports(FLOAT, FLOAT, "cuda:90", Shapes(rows, 0, columns)) is None
        y = swizzle.run(jnp.zeros((rows, columns), jnp.uint8))
        assert y.shape == padded and y.dtype == jnp.uint8
        back = unswizzle.run(y, rows, columns)
        assert back.shape == (rows, columns) and back.dtype == jnp.uint8


def test_every_kernel_was_given_nothing():
    """But xla_row, which takes one row of 512 values and more."""
    given = {p.values[0] for p in (*NO_ROWS, *NO_COLUMNS)}
    assert {k.name for k in kernels.KERNELS if k.op == "qdot" and k.backend != "triton"} - given == {"xla_row"}
