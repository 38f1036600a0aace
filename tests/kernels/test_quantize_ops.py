"""The ops around quantize: both copies in one pass, amax, norms and SwiGLU before it, swizzles; transformations."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jqopt_kernels as kernels
from jqopt import _numerics, formats
from jqopt.train import _dither
from jqopt.train._operand import COLUMNS, Quantizer, codes, measure, pinned
from jqopt.train.quantizers import encode_scale
from jqopt_kernels import Shapes, reference
from jqopt_kernels.quantize_way import NEAREST, SIGNS, Random, Way, needs_scale
from tests.kernels.cases import FLOAT
from tests.kernels.quantize_cases import FORMATS, hostile, matrix

NVFP4 = FORMATS["nvfp4"][0]
KEYS = jnp.asarray([[1, 2], [3, 4]], jnp.uint32)
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "te_golden.npz")


slow = pytest.mark.slow


def run_of(op: str, family: str):
    return next(k for k in kernels.KERNELS if (k.op, k.backend) == (op, family)).run


def same(a, b) -> None:
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert p.dtype == q.dtype and p.shape == q.shape
        np.testing.assert_array_equal(p, q)


# ------------------------------------------------------------------------------------------------------ both copies

# What quantize_both claims: scales of rows are refused.
TILED = [
    name
    for name, (spec, *_) in FORMATS.items()
    if kernels.explain("quantize_both", FLOAT, spec, "cpu", Shapes(8, 0, 8), "xla") == [("xla_quantize_both", None)]
]

COLUMN = Way(encode=True, hadamard=SIGNS, stochastic=True)


@functools.cache
def both(family: str):
    """Training's gradient: rows rounded stochastically, columns transformed first; 48 x 80, ragged in 64."""
    run = run_of("quantize_both", family)
    options = {"spec": NVFP4, "way": Way(encode=True, stochastic=True), "column_way": COLUMN, "packed": True}
    given = (matrix(48, 80, dtype=jnp.bfloat16), jnp.float32(0.5), jnp.float32(0.3), KEYS)

    @jax.jit
    def made(x, a, b, keys):
        return run(x, scale=a, column_scale=b, random=Random(keys[0]), column_random=Random(keys[1]), **options)

    return made(*given)


@slow
@pytest.mark.parametrize("family", ["pallas", "xla"])
def test_both_copies_equal_the_oracle(family):
    same(both(family), both("reference"))


@slow
def test_the_column_copy_equals_trainings():
    """Training keeps it in x's own layout, [m, k]; for the GEMM it is turned."""
    q = Quantizer(formats.get("nvfp4"), (1, 16), hadamard=True, stochastic=True)

    @jax.jit
    def trained(x):
        m = measure(pinned(x), q, COLUMNS)
        largest = jnp.float32(6 * 448 / 0.3)  # the amax whose encode scale is 0.3, as near as float32 has it
        return codes(m._replace(whole=largest.reshape(1, 1)), q, COLUMNS, None, _dither.uniform(KEYS[1], (48, 80)))

    want, (_, got) = trained(matrix(48, 80, dtype=jnp.bfloat16)), both("pallas")
    np.testing.assert_array_equal(got.scale, want.scale.T)
    np.testing.assert_array_equal(reference.unpack(got.data, "e2m1", 48), _numerics.unpack(want.data, 4, 80).T)


def test_both_copies_equal_transformer_engines():
    """Its golden arrays of a normal matrix: rows as they are, columns with the random Hadamard transform."""
    golden = {name: GOLDEN[f"q/randn/1d_rht/{name}"] for name in ("data", "scale", "data_t", "scale_t")}
    x = jnp.asarray(GOLDEN["in/randn"].view(ml_dtypes.bfloat16))
    amax = [jnp.asarray(GOLDEN[f"q/randn/1d_rht/amax_{side}"])[0] for side in ("row", "col")]
    run = functools.partial(
        run_of("quantize_both", "pallas"), spec=NVFP4, way=Way(encode=True), packed=True,
        column_way=Way(encode=True, hadamard=SIGNS),
    )  # fmt: skip
    scale, column = (encode_scale(a, 6 * 448) for a in amax)
    rows, columns = jax.jit(lambda x, a, b: run(x, scale=a, column_scale=b))(x, scale, column)
    for got, name in ((rows, ""), (columns, "_t")):
        np.testing.assert_array_equal(got.data, golden["data" + name])
        np.testing.assert_array_equal(got.scale, golden["scale" + name])


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(f, n, marks=() if (f, n) in (("xla", "mxfp8"), ("pallas", "fp8_8x16")) else slow)
        for f in ("pallas", "xla")
        for n in TILED
    ],
)
def test_both_copies_of_every_format(family, name):
    """The oracle's bits, 70 x 40: ragged along both sides."""
    spec, x = FORMATS[name][0], jnp.nan_to_num(hostile(70, 40), nan=1.0, posinf=1e30, neginf=-1e30)
    scales = {"scale": jnp.float32(0.02), "column_scale": jnp.float32(0.05)} if needs_scale(spec) else {}
    run, oracle = (functools.partial(run_of("quantize_both", f), spec=spec, packed=True) for f in (family, "reference"))
    same(jax.jit(lambda x, s: run(x, **s))(x, scales), jax.jit(lambda x, s: oracle(x, **s))(x, scales))


def test_both_copies_of_square_tiles_are_each_others_transpose():
    spec = NVFP4._replace(block=(16, 16))
    x = matrix(32, 48)
    one = jnp.float32(1)
    way = {"way": Way(encode=True), "column_way": Way(encode=True)}
    rows, columns = jax.jit(
        lambda x: run_of("quantize_both", "pallas")(x, spec=spec, scale=one, column_scale=one, **way)
    )(x)
    np.testing.assert_array_equal(rows.data, columns.data.T)
    np.testing.assert_array_equal(rows.scale, columns.scale.T)


# -------------------------------------------------------------------------------------------------------------- amax


@pytest.mark.parametrize(
    ("name", "signs"),
    [
        ("fp8_token", None),
        ("fp8", SIGNS),
        pytest.param("fp8_token", SIGNS, marks=slow),
        *(pytest.param(name, None, marks=slow) for name in FORMATS if name != "fp8_token"),
    ],
)
def test_amax(name, signs):
    """Several tiles, ragged; NaN of one row. Transformed: the same bits as the oracle's sums."""
    spec, way, x = FORMATS[name][0], Way(hadamard=signs), hostile(40, 528)
    x = x if signs is None else jnp.nan_to_num(x, posinf=1.0, neginf=1.0).clip(-1e30, 1e30)
    got, same_by_xla, want = (
        jax.jit(functools.partial(run_of("amax", f), spec=spec, way=way))(x) for f in ("pallas", "xla", "reference")
    )
    per_row = name.endswith("token")
    assert got.shape == ((40, 1) if per_row else ())
    same((got, same_by_xla), (want, want))
    if signs is None:
        exact = np.abs(np.asarray(x)).max(axis=1, keepdims=True) if per_row else np.abs(x).max()
        np.testing.assert_array_equal(got, exact)


# -------------------------------------------------------------------------------------------------------------- fused


OFTEN = (("norm_quantize", "fp8_token"), ("swiglu_quantize", "nvfp4"))


def steps_apart(a, b, element: str) -> np.ndarray:
    """How many values of the element lie between two arrays of codes."""
    values = reference.element_table(element)
    rank = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return np.abs(rank[np.asarray(a, np.int64)] - rank[np.asarray(b, np.int64)])


@pytest.mark.parametrize(
    ("op", "name"),
    [
        pytest.param(op, name, marks=() if (op, name) in OFTEN else slow)
        for op in ("norm_quantize", "swiglu_quantize")
        for name in FORMATS
    ],
)
def test_fused_equals_the_oracle(op, name):
    """A norm's sum may be rounded differently: a code may be the neighbour where its value lies between two."""
    spec = FORMATS[name][0]
    rng = np.random.default_rng(5)
    x, other = (jnp.asarray(rng.normal(size=(6, 208)), jnp.bfloat16) for _ in range(2))
    second = jnp.abs(other[0]) + 0.5 if op == "norm_quantize" else other
    options = {"spec": spec, "scale": jnp.float32(0.01) if needs_scale(spec) else None}
    want, *found = (
        jax.jit(functools.partial(run_of(op, f), **options))(x, second) for f in ("reference", "pallas", "xla")
    )
    for got in found:
        far = steps_apart(got.data, want.data, spec.element)
        assert far.max() <= 1 and (far > 0).mean() < 0.01
        np.testing.assert_allclose(got.scale.astype(jnp.float32), want.scale.astype(jnp.float32), rtol=1e-2)


def test_the_norm_is_the_norm():
    """Against numpy in float64: within half a step of e4m3, and bfloat16's rounding before it."""
    rng = np.random.default_rng(6)
    x, w = rng.normal(size=(3, 100)).astype(np.float32), rng.uniform(0.5, 2, 100).astype(np.float32)
    run = functools.partial(run_of("norm_quantize", "pallas"), eps=1e-3, spec=FORMATS["fp8_token"][0])
    got = jax.jit(run)(jnp.asarray(x), jnp.asarray(w))
    exact = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=1, keepdims=True) + 1e-3) * w
    values = np.asarray(reference.element_table("e4m3"))[np.asarray(got.data)] * np.asarray(got.scale)
    assert np.all(np.abs(values - exact) <= np.abs(exact) * 2.0**-4 + np.asarray(got.scale) * 2.0**-10 + 1e-6)


# ----------------------------------------------------------------------------------------------------------- swizzles


@pytest.mark.parametrize("family", ["pallas", "xla", "reference"])
def test_swizzle_equals_the_golden_vectors(family):
    linear = jnp.asarray(GOLDEN["swizzle/linear"])
    swizzled = run_of("swizzle", family)(linear)
    np.testing.assert_array_equal(swizzled, GOLDEN["swizzle/swizzled"])
    np.testing.assert_array_equal(run_of("unswizzle", family)(swizzled, *linear.shape), linear)


@pytest.mark.parametrize("shape", [(1, 1), (130, 70)])
def test_unswizzle_undoes_swizzle(shape):
    scale = jnp.asarray(np.random.default_rng(0).integers(1, 256, shape), jnp.uint8)
    swizzled = jax.jit(run_of("swizzle", "pallas"))(scale)
    same(swizzled, run_of("swizzle", "xla")(scale))
    assert int((swizzled == 0).sum()) == swizzled.size - scale.size  # padded with zeros
    same(jax.jit(run_of("unswizzle", "pallas"), static_argnums=(1, 2))(swizzled, *shape), scale)


# ---------------------------------------------------------------------------------------------------- transformations


def quantize(x, way=NEAREST, **options):
    return run_of("quantize", "pallas")(x, spec=NVFP4, way=way, scale=jnp.float32(0.01), **options)


def test_under_vmap_and_scan():
    x = jnp.stack([matrix(5, 48, seed) for seed in range(3)])
    one = jax.jit(quantize)
    want = [one(a) for a in x]
    both = jax.jit(lambda x: (jax.vmap(quantize)(x), jax.lax.scan(lambda c, a: (c, quantize(a)), None, x)[1]))
    mapped, scanned = both(x)
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *want)
    same(mapped, stacked)
    same(scanned, stacked)


@pytest.mark.parametrize("op", ["quantize", pytest.param("quantize_both", marks=slow)])
def test_random_bits_do_not_depend_on_sharding(op):
    """Eight devices, each with its part and the part's place: the bits of one device."""
    x, way = matrix(64, 64), Way(encode=True, stochastic=True)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    run, whole = run_of(op, "pallas"), jnp.float32(3)
    more = {"column_way": way, "column_scale": whole} if op == "quantize_both" else {}

    def part(x, key):
        m, k = x.shape
        size = jnp.asarray([m, k], jnp.uint32)
        place = jnp.stack([jax.lax.axis_index("a"), jax.lax.axis_index("b")]).astype(jnp.uint32) * size
        keys = {"column_random": Random(key[1], place)} if more else {}
        return run(x, spec=NVFP4, way=way, scale=whole, random=Random(key[0], place), packed=True, **more, **keys)

    def shapes(spec):
        return kernels.Packed(spec, spec, P(), None)

    specs = (shapes(P("a", "b")), shapes(P("b", "a"))) if more else shapes(P("a", "b"))
    sharded = jax.shard_map(part, mesh=mesh, in_specs=(P("a", "b"), P()), out_specs=specs, check_vma=False)
    keys = {"column_random": Random(KEYS[1])} if more else {}
    options = {"spec": NVFP4, "way": way, "scale": whole, "random": Random(KEYS[0]), "packed": True, **more, **keys}
    same(jax.jit(sharded)(x, KEYS), jax.jit(lambda x: run(x, **options))(x))


def test_rounding_up_is_as_likely_as_the_place_between_two_values():
    """1.5 steps of e2m1's [2, 3] quarter: 2.25 goes to 3 a quarter of the time; 64 x 256 draws, 5 sigma."""
    x = jnp.full((64, 256), 2.25).at[:, ::16].set(6.0)
    way, scale = Way(encode=True, stochastic=True), jnp.float32(448)
    got = jax.jit(lambda x: run_of("quantize", "pallas")(x, spec=NVFP4, way=way, scale=scale, random=Random(KEYS[0])))(
        x
    ).data
    up = np.mean(np.asarray(got)[:, 1::16] == 5)  # code 5 is 3
    assert abs(up - 0.25) < 5 * np.sqrt(0.25 * 0.75 / (64 * 16))
    assert set(np.unique(np.asarray(got)[:, 1::16])) == {4, 5}


def test_a_gradient_is_refused():
    with pytest.raises(TypeError, match="stop_gradient"):
        jax.grad(lambda x: quantize(x).global_scale + x[0, 0])(matrix(2, 16))
    grad = jax.grad(lambda x: jnp.sum(x) + quantize(jax.lax.stop_gradient(x)).global_scale)(matrix(2, 16))
    np.testing.assert_array_equal(grad, np.ones((2, 16)))


def test_nothing_to_quantize():
    for shape in ((0, 32), (3, 0)):
        got = quantize(jnp.zeros(shape), packed=True)
        assert got.data.shape == (shape[0], shape[1] // 2) and got.scale.shape == (shape[0], shape[1] // 16)
