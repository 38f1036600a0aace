"""Low-precision training of whole models: unmodified, under jit, scan and remat, with keys, state and resumption."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from orbax.checkpoint import v1 as ocp

import jqopt
from jqopt import train
from jqopt.train import _linear, _low
from tests import zoo

KEY = jax.random.key(7)
SMALL = {"rules": [{"match": "*", "weight": "nvfp4"}], "name": "small"}


def numbers(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def section(name: str, **more) -> dict:
    """A recipe that trains everything as a shipped one does."""
    return {**SMALL, "train": {**jqopt.load_recipe(f"train/{name}").train.to_dict(), **more}}


def equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def stacked(p, x, *, scan: bool, remat: bool, policy=None):
    """Three layers with tanh between: what comes before a quantizer is computed in excess precision, if anything is."""

    def body(h, w):
        return jnp.tanh(h @ w), None

    if remat:
        body = jax.checkpoint(body, policy=policy, prevent_cse=not scan)
    if scan:
        return jax.lax.scan(body, x, p["w"])[0]
    for i in range(3):
        x, _ = body(x, p["w"][i])
    return x


def square(prepared, x, key=KEY):
    return lambda p, k=key: jnp.mean(jnp.square(prepared.apply(p, x, quant_key=k).astype(jnp.float32)))


@pytest.fixture(scope="module")
def layers():
    return {"w": numbers(0, 3, 64, 64, dtype=jnp.bfloat16) / 8}, numbers(1, 32, 64, dtype=jnp.bfloat16)


@pytest.fixture(scope="module")
def ways(layers):
    """(gradient, prepared) of the same scanned model without and with remat."""
    params, x = layers
    out = {}
    for scan, remat in ((True, False), (True, True)):
        model = lambda p, x, s=scan, r=remat: stacked(p, x, scan=s, remat=r)  # noqa: E731
        prepared = train.prepare(model, section("nvfp4"), params, x)
        out[scan, remat] = jax.jit(jax.grad(square(prepared, x)))(params), prepared
    return out


def test_remat_gives_the_same_bits(ways):
    equal(ways[True, False][0], ways[True, True][0])


def test_layers_have_their_own_random_numbers(ways):
    """S3 in a scan: a layer's key is its own, so equal layers on equal data still round differently."""
    plan = ways[True, False][1].plan
    assert plan["w"].outer == (3,)
    sites, seen = {"w": (3,), "one": (), "v": (2, 2)}, set()
    for step in range(50):  # `jax.random.key(step)`: keys that differ in few bits
        for name, outer in sites.items():
            keys = np.asarray(_low.layer_keys(_low.key_data(jax.random.key(step)), outer))
            assert keys.shape == (*outer, 2)
            how = plan[name].gemms if name == "w" else _linear.gemms(jqopt.load_recipe("train/nvfp4").train, name=name)
            for use in range(3):  # in a loop that isn't over layers
                for key in keys.reshape(-1, 2):
                    both = _linear.copy_keys(how, key + np.asarray([use << 16, 0], np.uint32), (-1, -2))
                    seen |= {tuple(k) for k in np.asarray(both).tolist()}
    assert len(seen) == 50 * 8 * 3 * 2


@pytest.mark.slow
def test_unrolled_layers_differ_only_in_their_names(layers):
    """Nearest rounding: scan and unrolled give the same bits; no excess precision anywhere."""
    params, x = layers
    recipe = section("nvfp4", grad={"format": "nvfp4", "hadamard": True})
    grads = []
    for scan in (True, False):
        model = lambda p, x, s=scan: stacked(p, x, scan=s, remat=False)  # noqa: E731
        grads.append(jax.jit(jax.grad(square(train.prepare(model, recipe, params, x), x, None)))(params))
    equal(*grads)


def test_the_step_key_decides(ways, layers):
    params, x = layers
    grad, prepared = ways[True, False]
    again = jax.jit(jax.grad(square(prepared, x)))
    equal(again(params), grad)
    assert bool((again(params, jax.random.key(8))["w"] != grad["w"]).any())
    assert bool((again(params, jax.random.key_data(KEY))["w"] == grad["w"]).all())


def test_steps_are_traced_once(layers):
    """P1: what `prepare` found are static values, equal if made again: no step compiles anew."""
    params, x = layers
    traced = []
    prepared = train.prepare(lambda p, x: x @ p["w"][0], "train/nvfp4", params, x)

    @jax.jit
    def step(p, key):
        traced.append(1)
        return jax.grad(square(prepared, x, key))(p)

    for number in range(3):
        params = step(params, jax.random.key(number))
    again = train.prepare(lambda p, x: x @ p["w"][0], "train/nvfp4", params, x)
    assert len(traced) == 1
    assert [s.gemms for s in again.plan.trained] == [s.gemms for s in prepared.plan.trained]
    assert len({s.gemms for s in (*again.plan.trained, *prepared.plan.trained)}) == 1


def test_evaluation_needs_no_key(ways, layers):
    params, x = layers
    prepared = ways[True, False][1]
    equal(prepared.apply(params, x), prepared.apply(params, x, quant_key=KEY))
    with pytest.raises(jqopt.UnsupportedError, match=r"w \(.*\): its recipe rounds gradients stochastically"):
        jax.grad(square(prepared, x, None))(params)


# ---- what is kept, and how often it is quantized


@pytest.mark.slow
def test_nothing_is_quantized_twice_under_the_policy(layers):
    """D2: with `remat_policy` the compiled program rounds as often as without remat; with plain remat more often."""
    params, x = layers
    rounds = {}
    for name, remat, policy in (("none", False, None), ("policy", True, train.remat_policy), ("plain", True, None)):
        model = lambda p, x, r=remat, o=policy: stacked(p, x, scan=True, remat=r, policy=o)  # noqa: E731
        prepared = train.prepare(model, section("nvfp4"), params, x)
        text = jax.jit(jax.grad(square(prepared, x))).lower(params).compile().as_text()
        rounds[name] = text.count(" round-nearest-even(")
    assert rounds["none"] == rounds["policy"] < rounds["plain"]


def test_what_is_kept_is_packed(layers):
    """0.5625 bytes a value of x and, in tiles of 16x16, 0.502 of w."""
    params, x = layers
    prepared = train.prepare(lambda p, x: x @ p["w"][0], section("nvfp4"), params, x)
    _, back = jax.vjp(lambda p, x: prepared.apply(p, x, quant_key=KEY), params, x)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(back) if hasattr(leaf, "nbytes") and leaf.dtype == jnp.uint8]
    assert sorted(sizes) == sorted([32 * 64 // 2, 32 * 64 // 16, 64 * 64 // 2, 64 * 64 // 256])


# ---- models


@pytest.mark.slow
@pytest.mark.parametrize(
    "cls", [zoo.MHA, zoo.Ragged, zoo.MoEBatched, zoo.RematScan, zoo.CondDense], ids=lambda c: c.__name__
)
def test_models(cls):
    """Attention's einsums, experts, scans and branches: near the float gradient, and not equal to it."""
    model, variables, x = zoo.build(cls)
    prepared = train.prepare(model, section("mxfp8"), variables, x)
    assert prepared.plan.trained
    got = jax.jit(jax.grad(square(prepared, x)))(variables)
    want = jax.jit(jax.grad(lambda v: jnp.mean(jnp.square(model.apply(v, x).astype(jnp.float32)))))(variables)
    a, b = (np.concatenate([np.ravel(np.asarray(g, np.float64)) for g in jax.tree.leaves(t)]) for t in (got, want))
    assert 0.001 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.2


def test_blocks_follow_the_parameters_memory():
    """An einsum lists the axes that it contracts in its own order; blocks are neighbours in the weight, as packed."""
    w, x = numbers(0, 4, 8, 32), numbers(1, 16, 4, 8)
    model = lambda p, x: jnp.einsum("mhd,hdn->mn", x, p["w"])  # noqa: E731
    got = train.prepare(model, {**SMALL, "train": {"weight": "nvfp4"}}, {"w": w}, x).apply({"w": w}, x)
    q = train.quantizers.nvfp4(w.reshape(32, 32).T)
    kernel = np.asarray(train.quantizers.nvfp4_values(q), np.float64) * np.float64(q.global_scale)
    np.testing.assert_allclose(got, np.asarray(x, np.float64).reshape(16, 32) @ kernel.T, rtol=0, atol=1e-5)


def test_what_is_left_alone_has_a_reason():
    model, variables, x = zoo.build(zoo.CustomVjp)
    with pytest.raises(jqopt.PlanError, match="its derivative is the model's own"):
        train.prepare(model, section("nvfp4"), variables, x)
    model, variables, x = zoo.build(zoo.Tied)
    plan = train.prepare(model, section("nvfp4"), variables, x).plan
    assert [s.reason for s in plan.sites if s.gemms is None] == ["a lookup multiplies nothing"]
    model, variables, x = zoo.build(zoo.Ragged)
    assert "groups of tokens end anywhere" in str(train.prepare(model, section("nvfp4"), variables, x).plan)
    with pytest.raises(jqopt.PlanError, match="has no section `train`"):
        train.prepare(model, "nvfp4", variables, x)


class Blocks(nn.Module):
    """Four numbered blocks."""

    @nn.compact
    def __call__(self, x):
        for i in range(4):
            x = x + nn.Dense(32, name=f"layers_{i}")(nn.relu(x))
        return x


def test_first_and_last_blocks():
    model, x = Blocks(), numbers(0, 4, 32)
    variables = model.init(jax.random.key(0), x)
    plan = train.prepare(model, section("nvfp4", keep_first_blocks=1, keep_last_blocks=2), variables, x).plan
    assert [s.path for s in plan.trained] == ["layers_1/kernel"]
    assert "block 3: among the first or last" in str(plan)
    with pytest.raises(jqopt.PlanError, match="need blocks with numbers"):
        train.prepare(lambda p, x: x @ p, section("nvfp4", keep_last_blocks=1), numbers(1, 32, 32), x)


# ---- delayed scaling


def delayed(**more) -> dict:
    o = {"format": "fp8", "scaling": "delayed", "history": 3, **more}
    return {**SMALL, "train": {"input": o, "weight": o, "grad": {**o, "format": "fp8_e5m2"}}}


@pytest.mark.parametrize("use", ["max", pytest.param("most_recent", marks=pytest.mark.slow)])
def test_delayed_scaling_is_a_numpy_roll(use):
    """Five steps of two stacked layers: amaxes by numpy, TransformerEngine's order of stage, scale, roll."""
    params = {"w": numbers(0, 2, 32, 32) / 6}

    def model(p, x):
        return jax.lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0]

    prepared = train.prepare(model, delayed(amax=use), params, numbers(1, 16, 32))
    state = prepared.init_state()
    step = jax.jit(jax.value_and_grad(lambda p, s, x: prepared.apply(p, x, quant_state=s).sum(), argnums=(0, 1)))
    history, scale = np.zeros((3,)), 1.0
    for i in range(5):
        x = numbers(i, 16, 32) * (3.0 if i == 1 else 1.0)
        _, (_, seen) = step(params, state, x)
        np.testing.assert_array_equal(seen["w"]["scale"][0, 0], jnp.abs(x).max())
        np.testing.assert_array_equal(seen["w"]["scale"][:, 1], jnp.abs(params["w"]).max((1, 2)))
        np.testing.assert_array_equal(seen["w"]["scale"][1, 2], 1.0)  # of the gradient of a sum
        state = prepared.next_state(state, seen)
        history[0] = np.abs(np.asarray(x)).max()
        scale = np.float32(448) / np.float32(history.max() if use == "max" else history[0])
        history = np.roll(history, -1)
        history[0] = 0
        np.testing.assert_array_equal(state["w"]["history"][0, :, 0], history.astype(np.float32))
        np.testing.assert_array_equal(state["w"]["scale"][0, 0], scale)
    with pytest.raises(jqopt.UnsupportedError, match="quant_state=prepared.init_state"):
        prepared.apply(params, numbers(1, 16, 32))


def test_scales_are_kept_where_nothing_was_seen():
    old = jnp.asarray([2.0, 2.0, 2.0, 2.0])
    got = _low.delayed_scale(jnp.asarray([0.0, jnp.inf, jnp.nan, 7.0]), old, 448.0, 2)
    np.testing.assert_array_equal(got, [2.0, 2.0, 2.0, 16.0])


# ---- a loop as users write it


def test_a_train_state_and_its_resumption(tmp_path):
    """Linen, optax, delayed scaling: six steps are three, a checkpoint, and three more, bit for bit."""
    model, variables, x = zoo.build(zoo.Dense)
    prepared = train.prepare(model, delayed(), variables, x)
    state = TrainState.create(apply_fn=prepared.apply, params=variables["params"], tx=optax.sgd(0.1, momentum=0.9))

    @jax.jit
    def step(state, quant):
        def loss(params, quant):
            return jnp.mean(jnp.square(state.apply_fn({"params": params}, x, quant_state=quant)))

        grads, seen = jax.grad(loss, argnums=(0, 1))(state.params, quant)
        return state.apply_gradients(grads=grads), prepared.next_state(quant, seen)

    def tree(state, quant):
        return {"step": state.step, "params": state.params, "opt": state.opt_state, "quant": quant}

    straight, quant = state, prepared.init_state()
    for _ in range(6):
        straight, quant = step(straight, quant)
    half, its = state, prepared.init_state()
    for _ in range(3):
        half, its = step(half, its)
    ocp.save(tmp_path / "half", tree(half, its))
    read = ocp.load(tmp_path / "half", tree(half, its))
    half = state.replace(step=read["step"], params=read["params"], opt_state=read["opt"])
    for _ in range(3):
        half, its = step(half, read["quant"] if int(half.step) == 3 else its)
    equal((straight.params, straight.opt_state, quant), (half.params, half.opt_state, its))


class Net(nnx.Module):
    """Two layers with dropout and batch statistics."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 32, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(64, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.relu(self.norm(self.up(x)))))


@pytest.mark.slow
def test_nnx():
    model, x = Net(nnx.Rngs(0)), numbers(0, 16, 32)
    prepared = train.prepare(model, section("nvfp4"), x)
    module = train.LowPrecision(model, prepared, nnx.Rngs(quant=1))
    optimizer = nnx.Optimizer(module, optax.sgd(0.05), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        value, grads = nnx.value_and_grad(lambda m: jnp.mean(jnp.square(m(x) - x)))(module)
        optimizer.update(module, grads)
        return value

    before = np.asarray(model.up.kernel[...])
    losses = [float(step(module, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(model.up.kernel[...], before)
    assert bool((module.model.norm.mean[...] != model.norm.mean[...]).any())
    module.eval()
    equal(module(x), module(x))
    with pytest.raises(jqopt.UnsupportedError, match="rngs=nnx.Rngs"):
        train.LowPrecision(model, prepared)
    linen, variables, y = zoo.build(zoo.Dense)
    other = train.prepare(linen, section("mxfp8"), variables, y)
    with pytest.raises(jqopt.UnsupportedError, match="is no NNX module"):
        train.LowPrecision(model, other)


# ---- to serving


@pytest.mark.parametrize("name", [pytest.param("nvfp4", marks=pytest.mark.slow), "fp8_current"])
def test_from_training_to_serving(name, tmp_path):
    """The recipe that trained a model packs it, without data, and the checkpoint gives the same outputs."""
    model, x = Blocks(), numbers(0, 16, 32)
    variables = model.init(jax.random.key(0), x)
    prepared = train.prepare(model, f"train/{name}", variables, x)
    grads = jax.jit(jax.grad(square(prepared, x)))(variables)
    trained = jax.tree.map(lambda p, g: p - 0.1 * g, variables, grads)
    qm = jqopt.quantize_model(model, f"train/{name}", params=trained, inputs=x)
    assert set(qm.plan.quantized) == {s.path for s in prepared.plan.trained}
    jqopt.save(tmp_path / "packed", qm)
    equal(jqopt.load(tmp_path / "packed", model)(x), qm(x))
    plain = model.apply(trained, x)
    for out in (qm(x), prepared.apply(trained, x)):  # four layers of 13 % (NVFP4) or 4 % of noise, in a residual stream
        assert float(jnp.linalg.norm(out - plain) / jnp.linalg.norm(plain)) < 0.25
