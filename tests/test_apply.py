"""Running plans: every module of the zoo is quantized right or refused with a reason; packed equals simulated."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jqopt
from tests import arrays, zoo

REFUSED = {zoo.TwoSame: "computed from a by mul", zoo.WeightNorm: "by mul"}
SITES = {zoo.MHA: 4, zoo.LSTM: 8, zoo.GRU: 6, zoo.Remat: 4, zoo.Scan: 2, zoo.RematScan: 2, zoo.Einsum3: 2, zoo.Tied: 2}

FED = {"rules": [{"match": "*", "weight": "nvfp4", "input": {"format": "nvfp4", "feedback": 16}}]}


def rules(weight, activation=None, **more) -> dict:
    rule = {"match": "*", "weight": weight, **({"input": activation} if activation else {}), **more}
    return {"schema": 1, "name": "test", "rules": [rule]}


FORMATS = {  # rules, and how far one layer of unit-variance data may be from float (half a step over rms, twice over)
    "int8": (rules("int8", "int8"), 0.03),
    "nvfp4": (rules("nvfp4", "nvfp4"), 0.35),
    "int4": (rules("int4"), 0.25),
}


def two_weights() -> dict:
    a, b = jax.random.split(jax.random.key(0))
    return {"a": jax.random.normal(a, (64, 128)), "b": jax.random.normal(b, (128, 64))}


def relative(got, want) -> float:
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@pytest.mark.parametrize("cls", [*zoo.PEERS_25, *zoo.MORE], ids=lambda c: c.__name__)
def test_zoo(cls):
    model, variables, x = zoo.build(cls)
    graph = jqopt.trace(model, variables, x)
    want = model.apply(variables, x)
    for name, (recipe, most) in FORMATS.items():
        if cls in REFUSED:
            with pytest.raises(jqopt.PlanError, match=REFUSED[cls]):
                jqopt.plan(recipe, graph)
            continue
        plan = jqopt.plan(recipe, graph)
        assert len(plan.quantized) == SITES.get(cls, 1), name
        quant = jqopt.quantize(plan, variables, jqopt.calibrate(plan, variables, [x]))
        got = jqopt.apply(plan)(quant, x)
        assert got.dtype == want.dtype and got.shape == want.shape
        assert 0 < relative(got, want) < most, name
        simulated = jqopt.apply(plan, simulate=True)(quant, x)
        np.testing.assert_allclose(got, simulated, rtol=0, atol=3e-5 * float(jnp.abs(want).max()), err_msg=name)


ALL_FORMATS = [
    ("int8", "int8"), ("int8", {"format": "int8", "granularity": "token"}),
    ({"format": "int8", "granularity": "tensor"}, None), ({"format": "int4", "block": 32}, "int8"),
    ("int4", None), ("uint4", None), ("fp8", "fp8"), ("fp8_e5m2", "fp8_e5m2"),
    ({"format": "fp8", "granularity": "channel"}, {"format": "fp8", "granularity": "token"}),
    ("fp8_block", {"format": "fp8", "block": 128}),
    ("nvfp4", "nvfp4"), ("nvfp4", {"format": "nvfp4", "scaling": "dynamic"}),
    ("nvfp4", "fp8"), ("mxfp8", "mxfp8"), ("mxfp6", "mxfp6"), ("mxfp6_e2m3", "mxfp6_e2m3"), ("mxfp4", "mxfp4"),
    ("mxfp4", {"format": "fp8", "scaling": "dynamic"}), ("mxint8", "mxint8"), ("nf4", None),
]  # fmt: skip


@pytest.mark.parametrize(("weight", "activation"), ALL_FORMATS, ids=str)
def test_every_format_packed_equals_simulated(weight, activation):
    """Odd sizes: k = 70 leaves a short block, n = 33 a short tile, 5 rows."""
    params = {"w": arrays.normal(0, (70, 33))}
    x = arrays.normal(1, (5, 70))

    def linear(p, x):
        return x @ p["w"]

    qm = jqopt.quantize_model(linear, rules(weight, activation), params=params, batches=[x])
    got = qm(x)
    simulated = jqopt.apply(qm.plan, simulate=True)(qm.quant, x)
    bound = 70 * 2.0**-23 * (np.abs(x) @ np.abs(params["w"])).max() * 4  # accumulation in float32, either order
    np.testing.assert_allclose(got, simulated, rtol=0, atol=float(bound))
    assert 0 < relative(got, linear(params, x)) < 0.35


def test_int8_equals_a_numpy_computation():
    """Static per-tensor input, per-channel weight, all in numpy."""
    w = np.random.default_rng(0).normal(size=(64, 24)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(7, 64)).astype(np.float32)
    qm = jqopt.quantize_model(lambda p, x: x @ p, rules("int8", "int8"), params=w, batches=[x])
    sw, sx = np.abs(w).max(0) / np.float32(127), np.abs(x).max() / np.float32(127)
    qw, qx = np.rint(w / sw).astype(np.int32), np.rint(x / sx).astype(np.int32)
    want = (qx @ qw).astype(np.float32) * sx * sw
    np.testing.assert_allclose(qm(x), want, rtol=3e-7)


def test_nvfp4_equals_a_numpy_computation():
    """W4A4 with the calibrated global scale, decoded with ml_dtypes."""

    def qdq(m):
        g = np.abs(m).max() / np.float32(2688)
        b = m.reshape(m.shape[0], -1, 16)
        s = (np.abs(b).max(-1, keepdims=True) / (6 * g)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * g
        return ((b / s).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * s).reshape(m.shape)

    w = np.random.default_rng(0).normal(size=(64, 24)).astype(np.float32)
    x = np.random.default_rng(1).normal(size=(7, 64)).astype(np.float32)
    qm = jqopt.quantize_model(lambda p, x: x @ p, rules("nvfp4", "nvfp4"), params=w, batches=[x])
    want = qdq(x).astype(np.float64) @ qdq(w.T.copy()).T.astype(np.float64)
    np.testing.assert_allclose(qm(x), want, rtol=0, atol=2e-5)


def test_real_low_precision_dots():
    """int8 x int8 and fp8 x fp8 sites multiply codes: the dots in the jaxpr have 8-bit operands."""

    def dots(recipe):
        w, x = jnp.ones((64, 32)), jnp.ones((16, 64))
        qm = jqopt.quantize_model(lambda p, x: x @ p, recipe, params=w, batches=[x])
        text = str(jax.make_jaxpr(jqopt.apply(qm.plan))(qm.quant, x))
        return [line for line in text.splitlines() if "dot_general" in line], text

    _, text = dots(rules("int8", "int8"))
    assert "i32[16,32] = dot_general" in text
    _, text = dots(rules("fp8", "fp8"))
    assert "f8_e4m3fn[16,64]" in text


def test_weights_stay_packed():
    w, x = arrays.normal(0, (256, 128)), jnp.ones((2, 256))
    qm = jqopt.quantize_model(lambda p, x: x @ p, "nvfp4_weight_only", params=w, batches=[x])
    leaves = jax.tree.leaves(qm.params)
    assert {str(leaf.dtype) for leaf in leaves} == {"uint8", "float32"}
    assert sum(leaf.nbytes for leaf in leaves) == 256 * 128 // 2 + 256 * 128 // 16 + 4


@pytest.mark.parametrize("recipe", ["int8", "nvfp4", "fp8", "nvfp4_weight_only"])
def test_gradients_go_straight_through(recipe):
    """dx is dy @ dequantized(w); the gradients of unquantized parameters are those of the simulated model."""
    params = {"w": arrays.normal(0, (64, 32)), "b": jnp.zeros(32)}
    x = arrays.normal(1, (4, 64))
    qm = jqopt.quantize_model(lambda p, x: x @ p["w"] + p["b"], recipe, params=params, batches=[x])
    run = jqopt.apply(qm.plan)
    dx = jax.jit(jax.grad(lambda x: run(qm.quant, x).sum()))(x)
    want = jnp.ones((4, 32)) @ qm.params["w"].dequantize().T
    np.testing.assert_allclose(dx, want, rtol=1e-5, atol=1e-5)

    def loss(b):
        return (run({"w": qm.params["w"], "b": b}, x) ** 2).sum()

    y = qm(x)
    np.testing.assert_allclose(jax.grad(loss)(params["b"]), 2 * y.sum(0), rtol=1e-4, atol=1e-3)


def test_vmap_over_inputs_and_over_models():
    w = arrays.normal(0, (3, 64, 32))
    x = arrays.normal(1, (3, 4, 64))
    recipe = rules("int8", {"format": "int8", "granularity": "token"})
    plan = jqopt.plan(recipe, jqopt.trace(lambda p, x: x @ p, w[0], x[0]))
    run = jqopt.apply(plan)
    quants = [jqopt.quantize(plan, w[i]) for i in range(3)]
    one_by_one = jnp.stack([run(q, x[i]) for i, q in enumerate(quants)])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *quants)
    np.testing.assert_array_equal(jax.vmap(run)(stacked, x), one_by_one)
    np.testing.assert_array_equal(jax.vmap(run, in_axes=(None, 0))(quants[0], x)[0], one_by_one[0])


def test_other_shapes_after_planning():
    model, variables, _ = zoo.build(zoo.MHA)
    qm = jqopt.quantize_model(model, "int8_per_token", params=variables, batches=[zoo.X])
    for rows in (1, 3, 9):
        x = arrays.normal(rows, (rows, 64))
        assert relative(qm(x), model.apply(variables, x)) < 0.05


def test_float_and_quantized_models_interleaved():
    """The peers' jit-cache poisoning: neither order of calls may change either result."""
    model, variables, x = zoo.build(zoo.JitInside)
    plain = jax.jit(model.apply)
    first = plain(variables, x)
    qm8 = jqopt.quantize_model(model, FORMATS["int8"][0], params=variables, batches=[x])
    y8 = qm8(x)
    qm4 = jqopt.quantize_model(model, FORMATS["nvfp4"][0], params=variables, batches=[x])
    y4 = qm4(x)
    for _ in range(2):
        np.testing.assert_array_equal(plain(variables, x), first)
        np.testing.assert_array_equal(qm8(x), y8)
        np.testing.assert_array_equal(qm4(x), y4)
        np.testing.assert_array_equal(jax.jit(lambda v, x: model.apply(v, x))(variables, x), first)
    assert relative(y8, first) < relative(y4, first)


def test_sharded_weights_and_inputs():
    """Column, row and both: results as on one device; codes and scales bit for bit."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec
    place = lambda x, s: jax.device_put(x, jax.sharding.NamedSharding(mesh, s))  # noqa: E731
    w = arrays.normal(0, (128, 64))
    x = arrays.normal(1, (8, 128))
    for recipe in ("int8_per_token", "nvfp4", FED):
        plan = jqopt.plan(recipe, jqopt.trace(lambda p, x: x @ p, w, x))
        quant = jqopt.quantize(plan, w, jqopt.calibrate(plan, w, [x]))
        want = jqopt.apply(plan)(quant, x)
        for weight_spec, x_spec in (
            (spec(None, "b"), spec("a")),
            (spec("b"), spec(None, "b")),
            (spec("a", "b"), spec()),
        ):
            ws, xs = place(w, weight_spec), place(x, x_spec)
            sharded = jqopt.quantize(plan, ws, jqopt.calibrate(plan, ws, [xs]))
            assert all(map(np.array_equal, jax.tree.leaves(sharded), jax.tree.leaves(quant)))
            np.testing.assert_allclose(jqopt.apply(plan)(sharded, xs), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("recipe", ["int8", "nvfp4", "int4_block_weight_only", "fp8_2d_block_weight_only", FED])
def test_shard_map_equals_the_plain_function(recipe):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def sharded(p, x):
        def body(x, a, b):
            return jax.lax.psum(jax.nn.relu(x @ a) @ b, "x")

        run = jax.shard_map(body, mesh=mesh, in_specs=(spec(), spec(None, "x"), spec("x")), out_specs=spec())
        return run(x, p["a"], p["b"])

    params = {
        "a": arrays.normal(0, (64, 128)),
        "b": arrays.normal(1, (128, 64)),
    }
    x = arrays.normal(2, (4, 64))
    qm = jqopt.quantize_model(sharded, recipe, params=params, batches=[x])
    plain = jqopt.quantize_model(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], recipe, params=params, batches=[x])
    assert all(map(np.array_equal, jax.tree.leaves(qm.quant), jax.tree.leaves(plain.quant)))
    np.testing.assert_allclose(qm(x), plain(x), rtol=0, atol=2e-3)


def test_a_new_site_at_other_inputs_is_an_error():
    def model(p, x, deep=False):
        x = x @ p["a"]
        return x @ p["b"] if deep else x

    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    qm = jqopt.quantize_model(model, rules("int8"), params=params, inputs=jnp.ones((2, 8)))
    with pytest.raises(jqopt.PlanError, match="site b .*the plan doesn't know"):
        qm(jnp.ones((2, 8)), deep=True)


@pytest.mark.parametrize("recipe", ["int8", "nvfp4", "int4_block_weight_only", FED])
def test_meshes_with_explicit_axes(recipe):
    """Column and row parallel products with out_sharding: calibrated, quantized and run as placed by the model."""
    mesh = jax.make_mesh((2, 4), ("d", "t"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    spec, named = jax.sharding.PartitionSpec, jax.sharding.NamedSharding
    params = two_weights()
    x = arrays.normal(2, (8, 64))

    def plain(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    def placed(p, x):
        h = jnp.tanh(jnp.matmul(x, p["a"], out_sharding=spec("d", "t")))
        return jnp.matmul(h, p["b"], out_sharding=spec("d", None))

    want = jqopt.quantize_model(plain, recipe, params=params, batches=[x])(x)
    with jax.set_mesh(mesh):
        specs = {"a": spec(None, "t"), "b": spec("t")}
        ps = {name: jax.device_put(params[name], named(mesh, s)) for name, s in specs.items()}
        xs = jax.device_put(x, named(mesh, spec("d", None)))
        got = jqopt.quantize_model(placed, recipe, params=ps, batches=[xs])(xs)
        assert got.sharding.spec == spec("d", None)
        np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=0.02 * float(jnp.abs(want).max()))
