"""The contract of qdot: every kernel, the oracle among them, x every format x odd shapes equals float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt_kernels as kernels
from jqopt_kernels import decode, ffi_gemm, reference, xla_row
from tests.kernels.cases import ML_DTYPES, OPERANDS, PAIRS, bound, case, nf4, operand
from tests.kernels.lowering import for_cuda

# m: one row, few, many. n: one, and more than one tile with a rest. k: less than a block, whole blocks with a rest, and
# whole blocks that are no whole tiles.
SHAPES = [(1, 300, 70), (64, 257, 40), (5, 1, 7), (5, 37, 192)]
LONG = (1, 21, 1065)  # half a byte, less than a block and less than a segment at the end
# For kernels that claim none of those: long rows, whole blocks.
OTHERS = {
    "xla_row": [LONG],
    "xla_scaled": [(5, 37, 96), (1, 9, 32), (5, 37, 192)],
    "pallas_gemm": [(65, 37, 192), (130, 20, 70)],
}
DEVICES = ("cpu", "cuda")
PALLAS = ("pallas_gemv", "pallas_skinny")
# An interpreted Pallas kernel takes a while to compile: of the pairs, those that are decoded differently run always.
ALWAYS = ("nvfp4", "int4", "uint4", "fp8_block", "mxfp8", "int8", "nvfp4 x nvfp4")
GEMM_ALWAYS = ("fp8_block", "nvfp4 x nvfp4")


# What a kernel claims where what it needs is installed: tests are collected before that is built.
CLAIMS = {k.name: k.supports for k in kernels.KERNELS if k.op == "qdot"} | {"ffi_gemm": ffi_gemm.refuses}


def able(pair: str, m: int, n: int, k: int) -> list[kernels.Kernel]:
    """The kernels that claim this product on any device. All of them run on CPU, fast or not."""
    lhs, rhs = (OPERANDS[name] for name in PAIRS[pair])
    shapes = kernels.Shapes(m, n, k)
    qdots = [x for x in kernels.KERNELS if x.op == "qdot"]
    devices = {"xla_scaled": ("cuda:100",)}
    return [x for x in qdots if any(CLAIMS[x.name](lhs, rhs, d, shapes) is None for d in devices.get(x.name, DEVICES))]


def marks(name: str, pair: str, always=ALWAYS) -> list:
    always = GEMM_ALWAYS if name == "pallas_gemm" else always
    return [pytest.mark.slow] if name.startswith("pallas") and pair not in always else []


@pytest.fixture(autouse=True)
def installed(request):
    """Where a test runs a kernel in C++: its library, built once for all tests."""
    if "ffi" in request.node.name:
        request.getfixturevalue("library")


def checks() -> list:
    """(kernel, pair, shapes it claims) for every kernel that claims any."""
    claims: dict[tuple[str, str], list] = {}
    for pair in PAIRS:
        for shape in SHAPES:
            for kernel in able(pair, *shape):
                claims.setdefault((kernel.name, pair), []).append(shape)
        for name, shapes in OTHERS.items():
            if any(kernel.name == name for kernel in able(pair, *shapes[0])):
                claims[name, pair] = shapes
    return [
        pytest.param(name, pair, shapes, id=f"{name}-{pair}", marks=marks(name, pair))
        for (name, pair), shapes in claims.items()
    ]


def kernel_named(name: str) -> kernels.Kernel:
    return next(k for k in kernels.KERNELS if k.name == name and k.op == "qdot")


def runner(name: str, specs: dict):
    kernel = kernel_named(name)
    return lambda lhs, rhs: kernel.run(lhs, kernel.prepare(rhs), **specs)


def assert_within(y, expected, bound) -> None:
    error = np.abs(np.asarray(y, np.float64) - expected)
    assert np.all(error <= bound), f"error is {np.max(error / np.maximum(bound, 1e-300)):.3g} times the bound"


@pytest.mark.parametrize(("name", "pair", "shapes"), checks())
def test_equals_exact_numpy(name, pair, shapes):
    for m, n, k in shapes:
        c = case(pair, m, n, k)
        y = jax.jit(runner(name, c.specs))(c.lhs, c.rhs)
        assert y.shape == (m, n)
        assert y.dtype == jnp.float32
        assert_within(y, c.y, c.bound)
        assert np.abs(y - c.y).max() <= 1e-5 * np.abs(c.y).max()


@pytest.mark.parametrize(("element", "block", "scale"), [("e2m1", (16, 16), "e4m3"), ("int4", (4, 64), "float32")])
def test_one_row_in_passes_that_cut_blocks(element, block, scale, monkeypatch):
    """Rows of a block that end up in different passes; the passes of a large weight are as few rows here."""
    monkeypatch.setattr(xla_row, "CHUNK_BYTES", 1)
    spec, (n, k) = kernels.Operand(element, block, scale, "block"), (43, 1065)
    assert xla_row._chunk(spec, n, k) == 6
    rng = np.random.default_rng(0)
    rhs, w = operand(rng, spec, n, k, is_packed=True)
    x = rng.normal(size=(1, k)).astype(np.float32)
    y = jax.jit(runner("xla_row", {"lhs_spec": OPERANDS["float"], "rhs_spec": spec, "n": n, "k": k}))(x, rhs)
    assert_within(y, np.float64(x) @ w.T, bound(np.float64(x), w))


def test_mxfp8_on_both_sides_through_scaled_dot(monkeypatch):
    monkeypatch.setitem(PAIRS, "both", ("mxfp8", "mxfp8"))
    c = case("both", 5, 37, 96)
    assert_within(jax.jit(runner("xla_scaled", c.specs))(c.lhs, c.rhs), c.y, c.bound)


@pytest.mark.parametrize("under", ["vmap", "scan"])
def test_scaled_products_lower_for_blackwell_from_a_cpu(under):
    lhs, rhs, cases = stacked("nvfp4 x nvfp4", 5, 37, 96)
    x, run = jax.tree.map(lambda a: a[0], lhs), runner("xla_scaled", cases[0].specs)
    many = {
        "vmap": jax.vmap(run, in_axes=(None, 0)),
        "scan": lambda x, ws: jax.lax.scan(lambda carry, w: (carry, run(x, w)), 0, ws)[1],
    }
    text = for_cuda(many[under], x, rhs).as_text()
    assert text.count("__op$block_scaled_dot") == 1
    assert "dot_general" not in text


def test_one_row_sliced_by_scan_and_mapped():
    lhs, rhs, cases = stacked("nvfp4", *LONG)
    run = runner("xla_row", cases[0].specs)
    _, scanned = jax.jit(lambda a, b: jax.lax.scan(lambda carry, ab: (carry, run(*ab)), None, (a, b)))(lhs, rhs)
    mapped = jax.jit(jax.vmap(run))(lhs, rhs)
    for ys in (scanned, mapped):
        for y, c in zip(ys, cases, strict=True):
            assert_within(y, c.y, c.bound)


# One format of each kind of packing and scale, for what multiplies the number of compilations.
KINDS = ["fp8_block", "nvfp4", "uint4", "mxfp6", "int8 x int8", "fp8 x fp8", "nvfp4 x nvfp4"]


def kinds(m: int, n: int, k: int) -> list:
    return [
        pytest.param(p, kn.name, id=f"{kn.name}-{p}", marks=marks(kn.name, p, ("nvfp4",)))
        for p in KINDS
        for kn in able(p, m, n, k)
    ]


@pytest.mark.parametrize(("pair", "name"), kinds(5, 3, 40))
def test_without_jit(pair, name):
    c = case(pair, 5, 3, 40)
    assert_within(runner(name, c.specs)(c.lhs, c.rhs), c.y, c.bound)


def stacked(pair: str, m: int, n: int, k: int, count: int = 3):
    cases = [case(pair, m, n, k, seed=i) for i in range(count)]
    lhs, rhs = (jax.tree.map(lambda *a: jnp.stack(a), *(c[i] for c in cases)) for i in (0, 1))
    return lhs, rhs, cases


@pytest.mark.parametrize(("pair", "name"), kinds(1, 300, 40))
def test_one_row_under_vmap(pair, name):
    lhs, rhs, cases = stacked(pair, 1, 300, 40)
    ys = jax.jit(jax.vmap(runner(name, cases[0].specs)))(lhs, rhs)
    for y, c in zip(ys, cases, strict=True):
        assert_within(y, c.y, c.bound)


@pytest.mark.parametrize(("pair", "name"), kinds(5, 300, 70))
def test_many_experts_one_lhs_under_vmap(pair, name):
    lhs, rhs, cases = stacked(pair, 5, 300, 70)
    first = jax.tree.map(lambda a: a[0], lhs)
    oracle = jax.jit(jax.vmap(runner("reference", cases[0].specs), in_axes=(None, 0)))(first, rhs)
    ys = jax.jit(jax.vmap(runner(name, cases[0].specs), in_axes=(None, 0)))(first, rhs)
    assert_within(ys, np.asarray(oracle, np.float64), 4 * max(c.bound.max() for c in cases))


@pytest.mark.parametrize(("pair", "name"), kinds(2, 300, 40))
def test_weights_sliced_by_scan(pair, name):
    lhs, rhs, cases = stacked(pair, 2, 300, 40)
    run = runner(name, cases[0].specs)
    _, ys = jax.jit(lambda a, b: jax.lax.scan(lambda carry, ab: (carry, run(*ab)), None, (a, b)))(lhs, rhs)
    for y, c in zip(ys, cases, strict=True):
        assert_within(y, c.y, c.bound)


@pytest.mark.parametrize("pair", ["int8", "fp8", "nvfp4", "mxfp4", "int4"])
def test_bfloat16_activations_lose_nothing(pair):
    c = case(pair, 5, 130, 70, float_dtype=jnp.bfloat16)
    for name in ("xla_tiled", "xla_decode", "reference"):
        assert_within(jax.jit(runner(name, c.specs))(c.lhs, c.rhs), c.y, c.bound)


# One product of every kernel that runs here.
EACH = {
    "reference": ("nvfp4", 3, 5, 40),
    "xla_int8": ("int8 x int8", 3, 5, 40),
    "xla_int8_row": ("int8 x int8", 1, 5, 40),
    "xla_fp8": ("fp8 x fp8", 3, 5, 40),
    "xla_fp8_dot": ("fp8_channel x fp8_channel", 3, 5, 40),
    "xla_scaled": ("nvfp4 x nvfp4", 3, 5, 48),
    "ffi_gemm": ("int4", 3, 5, 40),
    "xla_tiled_bf16": ("nvfp4 x nvfp4", 3, 5, 40),
    "xla_row": ("nvfp4", *LONG),
    "xla_tiled": ("nvfp4", 3, 5, 40),
    "pallas_gemv": ("nvfp4", 3, 5, 40),
    "pallas_skinny": ("int8 x int8", 6, 5, 40),
    "pallas_gemm": ("nvfp4 x nvfp4", 65, 5, 40),
    "xla_lookup": ("nvfp4", 3, 5, 40),
    "xla_decode": ("nvfp4", 3, 5, 40),
}


def test_each_is_every_kernel():
    assert set(EACH) == {k.name for k in kernels.KERNELS if k.op == "qdot" and k.backend != "triton"}


@pytest.mark.parametrize("name", EACH)
def test_bfloat16_results(name):
    """The float32 result, rounded once: by half a unit in the last place, at most 2^-8 of it."""
    c = case(*EACH[name])
    y = kernel_named(name).run(c.lhs, c.rhs, **c.specs, out_dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    assert_within(y.astype(jnp.float32), c.y, c.bound + 2.0**-8 * (np.abs(c.y) + c.bound))


@pytest.mark.parametrize("name", ["xla_tiled", "xla_decode", "ffi_gemm", *PALLAS, "reference"])
@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
def test_nan_codes_reach_the_result(name, element):
    c = case("fp8" if element == "e4m3" else "fp8_e5m2", 1, 4, 40)
    broken = c.rhs._replace(data=c.rhs.data.at[2, 5].set(0x7F))
    y = jax.jit(runner(name, c.specs))(c.lhs, broken)[0]
    np.testing.assert_array_equal(np.isnan(y), [False, False, True, False])


def test_int8_sums_are_exact():
    """k = 4000 largest products: f32 sums would round, int32 sums do not."""
    k = 4000
    x = jnp.full((2, k), 127, jnp.int8).at[:, 0].set(1)
    one, spec = jnp.ones((1, 1), jnp.float32), kernels.Operand("int8", None, "float32", "tensor")
    packed = kernels.Packed(x, one)
    y = kernel_named("xla_int8").run(packed, packed, lhs_spec=spec, rhs_spec=spec, n=2, k=k)
    assert float(y[0, 0]) == np.float32(127**2 * (k - 1) + 1)


@functools.cache
def tables() -> dict[str, np.ndarray]:
    bits = {"e2m1": 4, "e2m3": 6, "e3m2": 6, "e4m3": 8, "e5m2": 8}
    known = {e: np.arange(1 << b, dtype=np.uint8).view(ML_DTYPES[e]).astype(np.float32) for e, b in bits.items()}
    known["nf4"] = nf4().astype(np.float32)
    known["int4"] = np.array([*range(8), *range(-8, 0)], np.float32)
    known["int8"] = np.arange(256).astype(np.uint8).view(np.int8).astype(np.float32)
    known["uint4"] = np.arange(16, dtype=np.float32)
    return known


@pytest.mark.parametrize("element", sorted(tables()))
def test_every_code_of_every_element(element):
    expected = tables()[element]
    # nf4's published values were computed in float32
    np.testing.assert_allclose(reference.element_table(element), expected, rtol=1e-6 * (element == "nf4"))
    codes = jnp.arange(len(expected)).astype(jnp.uint8)
    decoded = jax.jit(decode.values, static_argnums=1)(codes, element)
    np.testing.assert_array_equal(decoded, reference.element_table(element))


@pytest.mark.parametrize("kind", ["e4m3", "e8m0"])
def test_every_scale_byte(kind):
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ML_DTYPES[kind]).astype(np.float32)
    np.testing.assert_array_equal(reference.scale_table(kind), expected)
    np.testing.assert_array_equal(jax.jit(decode.scales, static_argnums=1)(jnp.asarray(codes), kind), expected)


@pytest.mark.parametrize("element", ["e2m1", "e3m2"])
def test_oracle_and_kernels_unpack_alike(element):
    data = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 12)).astype(np.uint8))
    for k in {"e2m1": (23, 24), "e3m2": (13, 16)}[element]:
        np.testing.assert_array_equal(decode.unpack(data, element, k), reference.unpack(data, element, k))
