"""Training through quantizers: values are those of PTQ bit for bit, gradients the papers', by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import jqopt
from jqopt import train
from jqopt.train import _straight
from tests import zoo

pytestmark = pytest.mark.slow  # whole models and their gradients, compiled for each format


def rules(weight, activation=None, **more) -> dict:
    rule = {"match": "*", "weight": weight, **({"input": activation} if activation else {}), **more}
    return {"schema": 1, "name": "test", "rules": [rule]}


def linear(p, x):
    return x @ p["w"]


def numbers(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def planned(model, recipe, params, x):
    """(plan, stats) of a model calibrated on x."""
    plan = jqopt.plan(recipe, jqopt.trace(model, params, x))
    return plan, jqopt.calibrate(plan, params, [x]) if plan.needs_data else None


def ptq(plan, params, stats, x):
    return jqopt.apply(plan, simulate=True)(jqopt.quantize(plan, params, stats), x)


# ---- values


FORMATS = [
    ("int8", "int8"), ("int8", {"format": "int8", "granularity": "token"}), ({"format": "int4", "block": 32}, None),
    ("uint4", None), ("fp8", "fp8"), ("fp8_block", None),
    ("nvfp4", "nvfp4"), ("nvfp4", {"format": "nvfp4", "scaling": "dynamic"}), ("mxfp4", "mxfp8"), ("nf4", None),
]  # fmt: skip


@pytest.mark.parametrize(("weight", "activation"), FORMATS, ids=str)
def test_values_are_those_of_ptq(weight, activation):
    """Odd sizes: k = 70 leaves a short block, n = 33 a short tile. Learned scales start where PTQ's are."""
    params, x = {"w": numbers(0, 70, 33)}, numbers(1, 5, 70)
    plan, stats = planned(linear, rules(weight, activation), params, x)
    want = ptq(plan, params, stats, x)
    for dual in (False, True):
        learn = "weights" if dual and weight != "uint4" else False
        training = train.qat(plan, stats, learn_scales=learn, dual=bool(learn))
        np.testing.assert_array_equal(training.apply(training.init(params), x), want)


@pytest.mark.parametrize("recipe", ["int8", "nvfp4"])
@pytest.mark.parametrize("cls", [zoo.RematScan, zoo.Vmapped, zoo.MHA, zoo.Tied, zoo.Conv], ids=lambda c: c.__name__)
def test_values_and_gradients_in_models(cls, recipe):
    """Whole models: values as PTQ's, and every leaf of the tree, learned scales too, gets a gradient."""
    model, variables, x = zoo.build(cls)
    plan, stats = planned(model, rules(recipe, recipe), variables, x)
    training = train.qat(plan, stats, learn_scales="both" if recipe == "int8" else "weights")
    params = training.init(variables)
    got = training.apply(params, x)
    np.testing.assert_allclose(got, ptq(plan, variables, stats, x), rtol=0, atol=2e-6)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(training.apply(p, x)))))(params)
    assert all(bool(jnp.any(g != 0)) and bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_mse_scales_are_searched_in_every_step():
    params, x = {"w": numbers(0, 64, 32)}, numbers(1, 4, 64)
    plan, _ = planned(linear, {**rules("nvfp4"), "algorithm": "mse"}, params, x)
    training = train.qat(plan)
    for moved in (params, {"w": params["w"] * 1.7 + 0.1}):
        np.testing.assert_array_equal(training.apply(moved, x), ptq(plan, moved, None, x))
    learned = train.qat(plan, learn_scales="weights")
    np.testing.assert_array_equal(learned.apply(learned.init(params), x), ptq(plan, params, None, x))


def test_fused_weights_share_a_scale_while_they_train():
    """q and k read one activation and have one scale: that of the larger."""

    def model(p, x):
        return jnp.sum(jax.nn.softmax((x @ p["q"]) @ (x @ p["k"]).T) @ x)

    params, x = {"q": numbers(0, 16, 16), "k": 3 * numbers(1, 16, 16)}, numbers(2, 4, 16)
    recipe = {**rules("fp8"), "fuse": [["q", "k"]]}
    plan, _ = planned(model, recipe, params, x)
    for learn, count in ((False, 0), ("weights", 1)):
        training = train.qat(plan, learn_scales=learn)
        tree = training.init(params)
        assert len(tree.get("quantizers", {}).get("weights", {})) == count
        np.testing.assert_array_equal(training.apply(tree, x), ptq(plan, params, None, x))
        packed = training.quantize(tree).params
        assert packed["q"].scale == packed["k"].scale == jnp.abs(params["k"]).max() / 448


def test_weights_stay_float32_inside_a_bfloat16_model():
    model, variables, x = zoo.build(zoo.Bf16)
    variables = jax.tree.map(lambda v: v.astype(jnp.bfloat16), variables)
    plan, stats = planned(model, rules("nvfp4", "nvfp4"), variables, x)
    training = train.qat(plan, stats, learn_scales="weights")
    params = training.init(variables)
    np.testing.assert_array_equal(training.apply(params, x), ptq(plan, variables, stats, x))
    grads = jax.grad(lambda p: jnp.sum(jnp.square(training.apply(p, x).astype(jnp.float32))))(params)
    assert jax.tree.map(lambda g: g.dtype, grads) == jax.tree.map(lambda p: p.dtype, params)
    assert grads["params"]["Dense_0"]["kernel"].dtype == jnp.bfloat16


# ---- straight-through gradients, by hand


def test_gradients_go_straight_through():
    """y = x' w' with both quantized, L = sum(c y): dL/dw = x'^T c, dL/dx = c w'^T."""
    params, x, c = {"w": numbers(0, 32, 16)}, numbers(1, 4, 32), numbers(2, 4, 16)
    plan, stats = planned(linear, rules("int8", "int8"), params, x)
    training = train.qat(plan, stats)
    dw, dx = jax.grad(lambda p, x: jnp.sum(c * training.apply(p, x)), argnums=(0, 1))(params, x)
    scale = np.abs(np.asarray(x, np.float64)).max() / 127
    rounded = np.clip(np.round(np.asarray(x, np.float64) / scale), -128, 127) * scale
    w = np.asarray(params["w"], np.float64)
    scales = np.abs(w).max(axis=0) / 127
    np.testing.assert_allclose(dw["w"], rounded.T @ np.asarray(c), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, np.asarray(c) @ (np.round(w / scales) * scales).T, rtol=1e-5, atol=1e-5)


def test_clip_gradient_of_an_input():
    """Calibrated on |x| <= 1: what lies beyond gets no gradient, with clipping; all of it without."""
    params, seen = {"w": numbers(0, 16, 8)}, jnp.linspace(-1, 1, 32).reshape(2, 16)
    x = seen * 1.5
    for format in ("int8", "nvfp4"):
        plan, stats = planned(linear, rules("int8", format), params, seen)
        clipped, straight = (
            jax.grad(lambda x, t=t: jnp.sum(t.apply(params, x)))(x)
            for t in (train.qat(plan, stats, clip_gradient=True), train.qat(plan, stats))
        )
        np.testing.assert_array_equal(clipped, jnp.where(jnp.abs(x) > 1, 0.0, straight))
        assert bool((straight != 0).all())


def test_clip_gradient_of_a_weight():
    """The search by mse may cut the largest weights of a channel off; those get no gradient."""
    w = jnp.asarray(np.random.default_rng(0).laplace(size=(256, 4)), jnp.float32)
    params, x = {"w": w}, jnp.ones((1, 256))
    recipe = {**rules({"format": "int4", "granularity": "channel"}), "algorithm": "mse"}
    plan, _ = planned(linear, recipe, params, x)
    amax = 7 * jqopt.quantize(plan, params, None).params["w"].scale[:, 0]
    grad = jax.grad(lambda p: jnp.sum(train.qat(plan, clip_gradient=True).apply(p, x)))(params)["w"]
    np.testing.assert_array_equal(grad, (jnp.abs(w) <= amax).astype(jnp.float32))
    assert 0 < int((grad == 0).sum()) < 40


# ---- learned scales


def lsq(w, s, low, high):
    """(dy/dw, dy/ds) of y = s round(clip(w / s)): equations 3 and 5 of Esser et al. 2020."""
    u = w / s
    inside = (u > low) & (u < high)
    return inside.astype(float), np.where(inside, np.round(u) - u, np.where(u <= low, low, high))


def test_learned_scales_have_lsq_gradients():
    """int4, one scale a channel. The amax is 7 s, so LSQ's step g dL/ds on s is a step of 7 g dL/ds on the amax."""
    w, c = numbers(0, 24, 3), numbers(1, 24, 3)
    plan, _ = planned(linear, rules({"format": "int4", "granularity": "channel"}), {"w": w}, numbers(2, 1, 24))
    training = train.qat(plan, learn_scales="weights")
    params = training.init({"w": w})
    amax = jnp.asarray([[1.2], [0.4], [2.9]])  # some weights beyond it, some scales larger than any weight
    params = {**params, "quantizers": {"weights": {"w": amax}}}
    grads = jax.grad(lambda p: jnp.sum(c * training.apply(p, jnp.eye(24))))(params)
    s = np.asarray(amax, np.float64)[:, 0] / 7
    dw, ds = lsq(np.asarray(w, np.float64), s, -8, 7)
    np.testing.assert_allclose(grads["w"], dw * np.asarray(c), rtol=1e-6)
    want = 7 / np.sqrt(24 * 7) * np.sum(ds * np.asarray(c), axis=0)
    np.testing.assert_allclose(grads["quantizers"]["weights"]["w"][:, 0], want, rtol=1e-4)
    assert 0 < dw.mean() < 1


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("format", ["int4", "fp8", "nvfp4"])
def test_gradients_are_those_of_the_smooth_surrogate(format, dual):
    """Rounding as adding a constant: y = s_post clip(w / s_pre + const). Its central differences, in float64.

    For nvfp4 the scales at which the differences are taken are as e4m3 rounds them.
    """
    fmt = jqopt.formats.get(format)
    how = _straight.Quantizer(fmt, "block" if format == "nvfp4" else "channel")
    n, k, tile = 3, 32, 16 if format == "nvfp4" else 32
    w, c, high, low = numbers(3, n, k), numbers(4, n, k), fmt.element.max, fmt.element.min
    own = jnp.abs(w).reshape(n, -1, tile).max(-1)
    pre, post = own * 0.8, own * 0.7 if dual else None
    whole = jnp.float32(4.0) if format == "nvfp4" else None

    def loss(w, pre, post):
        return jnp.sum(c * _straight.learned(w, pre, post, whole, how))

    got = jax.grad(loss, argnums=(0, 1, 2) if dual else (0, 1))(w, pre, post)

    def scale(amax):
        codes, _ = _straight.stored(w, amax, None, whole, how)
        return np.repeat(np.asarray(_straight.tile_scales(codes, fmt), np.float64), tile, axis=-1)

    s_pre = scale(pre)
    s_post = scale(post) if dual else s_pre
    v, weight = np.asarray(w, np.float64), np.asarray(c, np.float64)
    level = np.asarray(_straight.stored(w, pre, post, whole, how)[1], np.float64) / s_post
    inside = (v / s_pre > low) & (v / s_pre < high)
    offset = np.where(inside, level - v / s_pre, 0.0)
    # the clip acts on w / s, before the rounding: where that is inside, codes move with it
    smooth = lambda v, a, b: np.where(inside, b * (v / a + offset), b * np.clip(v / a, low, high))  # noqa: E731

    def slope(direction, h=1e-6):
        dv, da, db = (h * d for d in direction)
        change = smooth(v + dv, s_pre + da, s_post + db) - smooth(v - dv, s_pre - da, s_post - db)
        return weight * change / (2 * h)

    per_tile = lambda x: x.reshape(n, -1, tile).sum(-1) * np.sqrt(high / tile)  # noqa: E731  (Q g = sqrt(Q / N))
    np.testing.assert_allclose(got[0], slope((1, 0, 0)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got[1], per_tile(slope((0, 1, 0 if dual else 1))), rtol=1e-3, atol=1e-4)
    if dual:
        np.testing.assert_allclose(got[2], per_tile(slope((0, 0, 1))), rtol=1e-3, atol=1e-4)
    assert 0 < inside.mean() < 1


def test_learned_input_scales_have_lsq_gradients():
    """One int8 scale for an activation of 8 features: N is 8, and the clip cuts both ends."""
    x, c = numbers(0, 6, 8), numbers(1, 6, 8)
    params = {"w": jnp.eye(8)}
    plan, stats = planned(linear, rules("int8", "int8"), params, 0.7 * x)
    training = train.qat(plan, stats, learn_scales="inputs")
    tree = training.init(params)
    assert set(tree["quantizers"]) == {"inputs"}
    tree_grad, dx = jax.grad(lambda p, x: jnp.sum(c * training.apply(p, x)), argnums=(0, 1))(tree, x)
    s = float(tree["quantizers"]["inputs"]["w"]) / 127
    dy, ds = lsq(np.asarray(x, np.float64), s, -128, 127)
    one = np.asarray(jqopt.quantize(plan, params, stats).params["w"].dequantize())
    np.testing.assert_allclose(dx, dy * (np.asarray(c) @ one.T), rtol=1e-5)
    want = 127 / np.sqrt(8 * 127) * np.sum(ds * (np.asarray(c) @ one.T))
    np.testing.assert_allclose(tree_grad["quantizers"]["inputs"]["w"], want, rtol=1e-3)
    assert 0 < dy.mean() < 1


@pytest.mark.parametrize("case", ["int8 both", "nvfp4 dual"])
def test_what_was_trained_is_what_runs(case):
    """Weights and scales moved at random: the packed model gives what training saw, bit for bit where simulated."""
    format, learn = case.split()
    model, variables, x = zoo.build(zoo.RematScan)
    plan, stats = planned(model, rules(format, format), variables, x)
    dual = learn == "dual"
    training = train.qat(plan, stats, learn_scales="weights" if dual else "both", dual=dual)
    key = jax.random.key(7)
    params = jax.tree.map(lambda p: p * jax.random.uniform(key, p.shape, p.dtype, 0.8, 1.2), training.init(variables))
    want = training.apply(params, x)
    assert float(jnp.abs(want - training.apply(training.init(variables), x)).max()) > 1e-2
    quant = training.quantize(params)
    np.testing.assert_allclose(jqopt.apply(plan, simulate=True)(quant, x), want, rtol=0, atol=2e-6)
    qm = training.convert(model, params)
    np.testing.assert_allclose(qm(x), want, rtol=0, atol=3e-5 * float(jnp.abs(want).max()))


# ---- models and loops


def test_scanned_layers_get_the_gradients_of_a_python_loop():
    params, x = {"layers": numbers(0, 3, 16, 16) / 4}, numbers(1, 4, 16)

    def scan(p, x):
        step = jax.checkpoint(lambda x, w: (x + jnp.tanh(x @ w), None))
        return jax.lax.scan(step, x, p["layers"])[0]

    def loop(p, x):
        for i in range(3):
            x = x + jnp.tanh(x @ p[f"w{i}"])
        return x

    def grads(model, params):
        plan, stats = planned(model, rules("int8", "int8"), params, x)
        training = train.qat(plan, stats, learn_scales="both")
        return jax.grad(lambda p: jnp.sum(jnp.square(training.apply(p, x))))(training.init(params))

    stacked, apart = grads(scan, params), grads(loop, {f"w{i}": w for i, w in enumerate(params["layers"])})
    for i in range(3):
        np.testing.assert_allclose(stacked["layers"][i], apart[f"w{i}"], rtol=1e-4, atol=1e-5)
        for kind in ("weights", "inputs"):
            one, other = stacked["quantizers"][kind]["layers"][i], apart["quantizers"][kind][f"w{i}"]
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_a_train_state_trains_it():
    """The user's loop: only apply_fn and the parameters are others. The loss after training is less than PTQ's."""
    model, variables, x = zoo.build(zoo.Scan)
    target = model.apply(variables, x)
    recipe = rules({"format": "int4", "granularity": "channel"}, "int8")
    plan, stats = planned(model, recipe, variables, x)
    training = train.qat(plan, stats, learn_scales="both")
    with jax.numpy_dtype_promotion("standard"):  # optax.adam wants it
        state = TrainState.create(
            apply_fn=training.apply, params=training.init(variables)["params"], tx=optax.adam(1e-3)
        )

        @jax.jit
        def step(state):
            def loss(params):
                return jnp.mean(jnp.square(state.apply_fn({"params": params}, x) - target))

            value, grads = jax.value_and_grad(loss)(state.params)
            return state.apply_gradients(grads=grads), value

        losses = []
        for _ in range(20):
            state, value = step(state)
            losses.append(float(value))
    assert losses[0] == pytest.approx(float(jnp.mean(jnp.square(ptq(plan, variables, stats, x) - target))), rel=1e-5)
    after = jqopt.apply(plan)(training.quantize({"params": state.params}), x)
    assert float(jnp.mean(jnp.square(after - target))) < 0.5 * losses[0]


@pytest.mark.parametrize("recipe", ["nvfp4", "int8"])
def test_inside_a_shard_map(recipe):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def sharded(p, x):
        body = lambda x, a, b: jax.lax.psum(jax.nn.relu(x @ a) @ b, "x")  # noqa: E731
        run = jax.shard_map(body, mesh=mesh, in_specs=(spec(), spec(None, "x"), spec("x")), out_specs=spec())
        return run(x, p["a"], p["b"])

    def plain(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    params, x = {"a": numbers(0, 32, 64), "b": numbers(1, 64, 16)}, numbers(2, 4, 32)
    out = []
    for model in (sharded, plain):
        plan, stats = planned(model, rules(recipe), params, x)
        training = train.qat(plan, stats)
        loss = lambda p, t=training: jnp.mean(t.apply(p, x))  # noqa: E731
        out.append(jax.value_and_grad(loss)(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *out)


# ---- refusals


def test_refusals():
    params, x = {"w": numbers(0, 32, 16)}, numbers(1, 4, 32)
    plan, stats = planned(linear, rules("int8", "int8"), params, x)
    with pytest.raises(jqopt.CalibrationError, match=r"1 activations have static scales \(first: that of w\)"):
        train.qat(plan)
    with pytest.raises(jqopt.UnsupportedError, match="write learn_scales=False, 'weights'"):
        train.qat(plan, stats, learn_scales=True)
    with pytest.raises(jqopt.UnsupportedError, match="`dual` is for learned scales of weights"):
        train.qat(plan, stats, dual=True)
    with pytest.raises(jqopt.PlanError, match="holds no learned scales"):
        train.qat(plan, stats, learn_scales="weights").apply(params, x)
    with pytest.raises(jqopt.PlanError, match=r"these parameters aren't those.*unexpected: \['v'\]"):
        train.qat(plan, stats).init({"v": params["w"]})
    plan, stats = planned(linear, rules("nvfp4", "nvfp4"), params, x)
    with pytest.raises(jqopt.UnsupportedError, match="write learn_scales='weights'"):
        train.qat(plan, stats, learn_scales="both")
    plan, stats = planned(linear, rules("uint4"), params, x)
    with pytest.raises(jqopt.UnsupportedError, match="w: uint4 has zero points"):
        train.qat(plan, learn_scales="weights")
    plan, stats = planned(linear, {**rules("int4"), "algorithm": "gptq"}, params, x)
    with pytest.raises(jqopt.PlanError, match="w: training quantizes anew in every step, which gptq can't do"):
        train.qat(plan, stats)
    plan, _ = planned(lambda p, x: x @ p[0], rules("int4"), [params["w"]], x)
    with pytest.raises(jqopt.PlanError, match="must be a dict without such a key; found list"):
        train.qat(plan, learn_scales="weights").init([params["w"]])
