"""Native Linen: `intercept` gives the evaluator's bits, or says which parameter it can't handle and what to write."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.errors import ScopeParamShapeError

import jqopt
from tests import zoo

ASKS = {
    "int8": {"weight": "int8", "input": {"format": "int8", "scaling": "dynamic"}},
    "nvfp4": {"weight": "nvfp4", "input": {"format": "nvfp4", "scaling": "dynamic"}},
    "int4": {"weight": "int4"},
    "static": {"weight": "int8", "input": {"format": "int8", "scaling": "static"}},
    "int8_weight": {"weight": "int8"},
    "fp8_block": {"weight": "fp8_block"},
    "per_tensor": {"weight": {"format": "int8", "granularity": "tensor"}},
}
UNQUANTIZABLE = {zoo.TwoSame, zoo.WeightNorm}  # their weights are products of parameters: no rule finds a site
RAW = {
    zoo.Matmul, zoo.JnpMatmul, zoo.Tensordot, zoo.JitInside, zoo.CustomVjp, zoo.MoE, zoo.MoEBatched, zoo.Einsum3,
    zoo.EinsumOptimized, zoo.EinsumWeightFirst, zoo.Ragged, zoo.Split, zoo.ActivationShapedLikeWeight,
    zoo.WhileDense, zoo.StackedByHand, zoo.FusedHeads,
}  # fmt: skip
NATIVE = [c for c in (*zoo.PEERS_25, *zoo.MORE) if c not in RAW | UNQUANTIZABLE]


def recipe(ask):
    return {"schema": 1, "name": ask, "rules": [{"match": "*", **ASKS[ask]}]}


def quantized(model, variables, x, ask="int8", **kwargs):
    return jqopt.quantize_model(model, recipe(ask), params=variables, batches=[x], **kwargs)


def intercepted(model, qm, variables, *inputs, modules=(), simulate=False, **kwargs):
    """`model.apply` under intercept, all of it inside jit."""

    @jax.jit
    def run(variables, inputs):
        with jqopt.linen.intercept(qm, modules=modules, simulate=simulate):
            return model.apply(variables, *inputs, **kwargs)

    return run(variables, inputs)


def agree(model, variables, x, ask, modules=()):
    qm = quantized(model, variables, x, ask)
    got = intercepted(model, qm, qm.variables, x, modules=modules)
    np.testing.assert_array_equal(got, qm(x))
    return qm


# ----------------------------------------------------------------------------------------------- equal bits


@pytest.mark.parametrize("ask", ["int8", "nvfp4", "int4"])
@pytest.mark.parametrize("cls", NATIVE, ids=lambda c: c.__name__)
def test_flax_layers_give_the_evaluators_bits(cls, ask):
    agree(*zoo.build(cls), ask)


@pytest.mark.parametrize("cls", sorted(RAW, key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_raw_parameters_are_refused_by_name_and_run_when_their_class_is_passed(cls):
    model, variables, x = zoo.build(cls)
    qm = agree(model, variables, x, "int8", modules=(cls,))
    with pytest.raises(jqopt.UnsupportedError) as error:
        intercepted(model, qm, qm.variables, x)
    path = str(error.value).split(":")[0]
    assert path in qm.plan.quantized
    assert f"modules=({cls.__name__},)" in str(error.value)
    assert "jqopt.apply(plan)" in str(error.value)


@pytest.mark.parametrize("cls", sorted(UNQUANTIZABLE, key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_products_of_parameters_never_reach_the_interceptor(cls):
    with pytest.raises(jqopt.PlanError):
        quantized(*zoo.build(cls))


class Layers(nn.Module):
    """Every way in which Flax slices a stack of blocks."""

    lift: str
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        axes, split = {"params": self.axis}, {"params": True}
        if self.lift == "scan":
            return nn.scan(zoo.Block, variable_axes=axes, split_rngs=split, length=3)()(x, None)[0]
        own = self.lift == "vmap"
        x = jnp.stack([x * (i + 1) for i in range(3)]) if own else x
        lifted = nn.vmap(zoo.Block, variable_axes=axes, split_rngs=split, in_axes=0 if own else None, axis_size=3)
        return lifted()(x)[0].sum(0)


class ScannedExperts(nn.Module):
    """A scan over layers of experts that share their input."""

    @nn.compact
    def __call__(self, x):
        def layer(module, x):
            return nn.LayerNorm()(Layers("experts")(x)), None

        scan = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan(self, x)[0]


@pytest.mark.parametrize(
    ("model", "ask"),
    [
        *((Layers(lift), ask) for lift in ("vmap", "experts") for ask in ("static", "nvfp4", "per_tensor")),
        (ScannedExperts(), "static"),
    ],
    ids=lambda v: v if isinstance(v, str) else getattr(v, "lift", "both"),
)
def test_lifted_stacks_are_sliced_as_the_evaluator_slices_them(model, ask):
    agree(model, model.init(jax.random.key(1), zoo.X), zoo.X, ask)


@pytest.mark.parametrize("ask", ["nvfp4", "int4"])
@pytest.mark.parametrize("lift", ["scan", "vmap", "experts"])
def test_layers_stacked_along_another_axis_are_refused_by_name(lift, ask):
    model = Layers(lift, axis=1)
    variables = model.init(jax.random.key(1), zoo.X)
    qm = quantized(model, variables, zoo.X, ask)
    with pytest.raises(jqopt.UnsupportedError, match=r"Block_0/Dense_\d/kernel: .*variable_axes={'params': 0}"):
        intercepted(model, qm, qm.variables, zoo.X)


def test_a_wrong_slice_of_the_right_size_is_refused():
    """Scanned along axis 1 with as many layers as outputs: every leaf could be sliced, but along the wrong axis."""

    class Square(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return nn.Dense(4, use_bias=False)(x), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Square, variable_axes={"params": 1}, split_rngs={"params": True}, length=4)
            return scan()(x, None)[0]

    x = jnp.ones((2, 4))
    model = Model()
    qm = quantized(model, model.init(jax.random.key(0), x), x, "int8_weight")
    with pytest.raises(jqopt.UnsupportedError, match="ScanSquare_0/Dense_0/kernel"):
        intercepted(model, qm, qm.variables, x)


def test_blocks_of_rows_that_belong_to_two_experts_are_refused():
    model, variables, x = zoo.build(zoo.Vmapped)
    qm = quantized(model, variables, x, "fp8_block")  # 64 rows an expert, 128 rows a block
    with pytest.raises(jqopt.UnsupportedError, match="VmapDense_0/kernel"):
        intercepted(model, qm, qm.variables, x)


class OtherLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Einsum((4, 64, 8), "bd,edf->bef")(x)
        x = nn.Einsum((4, 8, 64), "bef,efd->bed", use_bias=False)(x).sum(1)[:, :, None]
        x = nn.ConvTranspose(4, (3,))(nn.relu(nn.ConvLocal(4, (3,))(x)))
        return nn.DenseGeneral((2, 8), axis=(-2, -1))(x)


@pytest.mark.parametrize("ask", ["int8", "int4"])
def test_further_layers(ask):
    model = OtherLayers()
    agree(model, model.init(jax.random.key(1), zoo.X), zoo.X, ask)


def test_simulation():
    model, variables, x = zoo.build(zoo.MHA)
    qm = quantized(model, variables, x, "nvfp4")
    want = jqopt.apply(qm.plan, simulate=True)(qm.quant, x)
    np.testing.assert_array_equal(intercepted(model, qm, qm.variables, x, simulate=True), want)


def test_outside_jit_it_runs_as_well():
    model, variables, x = zoo.build(zoo.Tied)
    qm = quantized(model, variables, x)
    with jqopt.linen.intercept(qm):
        np.testing.assert_allclose(model.apply(qm.variables, x), qm(x), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------ collections and calls


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(64)(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return self.head(x)

    @nn.compact_name_scope
    def head(self, x):
        return nn.Dense(8)(x)


@pytest.fixture(scope="module")
def net():
    model = Net()
    return model, model.init(jax.random.key(1), zoo.X)


def test_mutable_collections_and_random_numbers(net):
    model, variables = net
    call = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(7)}}
    qm = quantized(model, variables, zoo.X, **call)
    want, stats = qm(zoo.X, **call)
    got, mine = intercepted(model, qm, qm.variables, zoo.X, **call)
    np.testing.assert_array_equal(got, want)
    jax.tree.map(np.testing.assert_array_equal, mine, stats)
    assert not np.array_equal(stats["batch_stats"]["BatchNorm_0"]["mean"], np.zeros(64))


def test_method(net):
    model, variables = net
    h = zoo.X[:, :64]
    qm = quantized(model, variables, h, method="head")
    np.testing.assert_array_equal(intercepted(model, qm, qm.variables, h, method="head"), qm(h, method="head"))
    part = {"params": qm.variables["params"]["head"]["Dense_0"]}
    with pytest.raises(jqopt.UnsupportedError, match=r"^kernel: .*the whole model"):
        intercepted(nn.Dense(8), qm, part, h)


def test_captured_intermediates_are_there_once(net):
    model, variables = net
    qm = quantized(model, variables, zoo.X)
    _, kept = intercepted(model, qm, qm.variables, zoo.X, capture_intermediates=True, mutable=["intermediates"])
    (out,) = kept["intermediates"]["Dense_0"]["__call__"]
    assert out.shape == (4, 64)


def split(variables):
    """(what is trained, the rest): packed weights and other collections aren't trained."""
    packed = lambda x: isinstance(x, jqopt.QTensor)  # noqa: E731
    floats = jax.tree.map(lambda x: None if packed(x) else x, variables["params"], is_leaf=packed)
    return floats, variables


def joined(floats, variables):
    absent = lambda x: x is None or isinstance(x, jqopt.QTensor)  # noqa: E731
    params = jax.tree.map(lambda f, q: q if f is None else f, floats, variables["params"], is_leaf=absent)
    return {**variables, "params": params}


def test_a_train_step_trains_what_is_left_in_float(net):
    model, variables = net
    qm = quantized(model, variables, zoo.X)
    tx = optax.sgd(0.1, momentum=0.9)  # adam promotes int32 steps, which the tests forbid
    floats, frozen = split(qm.variables)

    def loss(floats, run):
        return jnp.mean((run(joined(floats, frozen)) - 1.0) ** 2)

    @jax.jit
    def step(floats, state):
        with jqopt.linen.intercept(qm):
            value, grads = jax.value_and_grad(loss)(floats, lambda v: model.apply(v, zoo.X))
        updates, state = tx.update(grads, state)
        return optax.apply_updates(floats, updates), state, value, grads

    state, values = tx.init(floats), []
    apply = jqopt.apply(qm.plan)
    want = jax.jit(jax.grad(functools.partial(loss, run=lambda v: apply(v, zoo.X))))(floats)
    for i in range(5):
        floats, state, value, grads = step(floats, state)
        values.append(float(value))
        if i == 0:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), grads, want)
    assert values[-1] < values[0]
    assert float(jnp.abs(want["Dense_0"]["bias"]).max()) > 0  # through the packed head


class Scale(nn.Module):
    """A user's own layer: raw parameter, a sown value, and (asked for) random numbers."""

    noise: bool = False

    @nn.compact
    def __call__(self, x):
        self.sow("intermediates", "seen", x.sum())
        if self.noise:
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        return x @ self.param("w", zoo.INIT, (64, 32))


def test_a_class_of_ones_own_may_write_variables():
    model = nn.Sequential([nn.Dense(64), Scale()])
    variables = {"params": model.init(jax.random.key(0), zoo.X)["params"]}
    call = {"mutable": ["intermediates"]}
    qm = quantized(model, variables, zoo.X, **call)
    want, _ = qm(zoo.X, **call)
    got, kept = intercepted(model, qm, qm.variables, zoo.X, modules=(Scale,), **call)
    np.testing.assert_array_equal(got, want)
    assert len(kept["intermediates"]["layers_1"]["seen"]) == 1


class Mixed(nn.Module):
    """Raw parameter, submodules and their statistics in one class."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(64)(x))
        return x @ self.param("w", zoo.INIT, (64, 32))


def test_a_class_of_ones_own_may_hold_other_modules():
    model = nn.Sequential([nn.Dense(64), Mixed()])
    variables, call = model.init(jax.random.key(0), zoo.X), {"mutable": ["batch_stats"]}
    qm = quantized(model, variables, zoo.X, **call)
    with pytest.raises(jqopt.UnsupportedError, match="layers_1/w: Mixed reads"):
        intercepted(model, qm, qm.variables, zoo.X, **call)
    got = intercepted(model, qm, qm.variables, zoo.X, modules=(Mixed,), **call)
    jax.tree.map(np.testing.assert_array_equal, got, qm(zoo.X, **call))


def test_a_class_of_ones_own_may_not_draw_random_numbers():
    model = Scale(noise=True)
    rngs = {"noise": jax.random.key(0)}
    variables = {"params": model.init({"params": jax.random.key(0), **rngs}, zoo.X)["params"]}
    qm = quantized(model, variables, zoo.X, rngs=rngs)
    with pytest.raises(jqopt.UnsupportedError, match="w: Scale.__call__ draws random numbers"):
        intercepted(model, qm, qm.variables, zoo.X, modules=(Scale,), rngs=rngs)


# ------------------------------------------------------------------------------- what must not go unnoticed


class RawTied(nn.Module):
    """Reads the table itself instead of calling `attend`."""

    def setup(self):
        self.embed = nn.Embed(50, 64)

    def __call__(self, tokens):
        return self.embed(tokens) @ self.embed.embedding.T


def test_a_layers_weight_read_from_outside_is_refused_by_name():
    model = RawTied()
    qm = quantized(model, model.init(jax.random.key(0), zoo.TOKENS), zoo.TOKENS, "int8_weight")
    with pytest.raises(jqopt.UnsupportedError, match="embed/embedding"):
        intercepted(model, qm, qm.variables, zoo.TOKENS)


@pytest.mark.parametrize("cls", [zoo.Dense, zoo.Matmul, zoo.Tied, zoo.Scan], ids=lambda c: c.__name__)
def test_packed_variables_without_intercept_fail(cls):
    model, variables, x = zoo.build(cls)
    qm = quantized(model, variables, x, "int8_weight")
    apply = jax.jit(model.apply)
    apply(variables, x)
    with pytest.raises((TypeError, ValueError, ScopeParamShapeError)):
        apply(qm.variables, x)


@jax.jit
def model_apply(variables, x):
    """Jitted once for all tests of this file, as a user's evaluation step is."""
    return zoo.Scan().apply(variables, x)


JitBlock = nn.jit(zoo.Block)


class JitInside(nn.Module):
    @nn.compact
    def __call__(self, x):
        return JitBlock()(x)[0]


@pytest.mark.parametrize(("model", "run"), [(zoo.Scan(), model_apply), (JitInside(), JitInside().apply)])
def test_order_of_float_and_quantized_calls_makes_no_difference(model, run):
    """Also for two plans whose packed trees look the same, and for functions that were jitted before."""
    variables = model.init(jax.random.key(0), zoo.X)
    want = np.asarray(run(variables, zoo.X))
    both = [quantized(model, variables, zoo.X, ask) for ask in ("int8", "int8_weight")]
    outs = []
    for qm in (*both, *both):
        with jqopt.linen.intercept(qm):
            outs.append(np.asarray(run(qm.variables, zoo.X)))
        np.testing.assert_array_equal(run(variables, zoo.X), want)
    for got, again, qm in zip(outs[:2], outs[2:], both, strict=True):
        np.testing.assert_array_equal(got, again)
        np.testing.assert_allclose(got, qm(zoo.X), rtol=1e-5, atol=1e-6)
    assert np.abs(outs[0] - outs[1]).max() > 1e-4


def test_variables_of_another_qm_or_in_float_are_refused():
    model, variables, x = zoo.build(zoo.MHA)
    qm, other = quantized(model, variables, x), quantized(model, variables, x, "int4")
    with pytest.raises(jqopt.PlanError, match=r"MHA ran .* unquantized. Pass qm.variables"):
        intercepted(model, qm, variables, x)
    with pytest.raises(jqopt.PlanError, match="kernel: found int4, but the plan quantizes it to int8"):
        intercepted(model, qm, other.variables, x)
    attention = qm.variables["params"]["MultiHeadDotProductAttention_0"]
    some = {**attention, "out": variables["params"]["MultiHeadDotProductAttention_0"]["out"]}
    with pytest.raises(jqopt.PlanError, match="_0/out/kernel: the plan quantizes it, but it isn't packed"):
        intercepted(model, qm, {"params": {"MultiHeadDotProductAttention_0": some}}, x)
    with jqopt.linen.intercept(qm):  # a float model beside it, and making parameters, are fine
        assert model.apply(qm.variables, x).shape == model.apply(variables, x).shape
        model.init(jax.random.key(0), x)


def test_partitioned_weights():
    model = nn.Dense(64, kernel_init=nn.with_partitioning(zoo.INIT, (None, "model")))
    variables = model.init(jax.random.key(0), zoo.X)
    qm = quantized(model, variables, zoo.X)
    assert isinstance(qm.variables["params"]["kernel"], nn.Partitioned)
    np.testing.assert_array_equal(intercepted(model, qm, qm.variables, zoo.X), qm(zoo.X))


def test_a_use_that_the_plan_does_not_know():
    embed = nn.Embed(50, 64)
    variables = embed.init(jax.random.key(0), zoo.TOKENS)
    qm = quantized(embed, variables, zoo.TOKENS, "int8_weight")
    with pytest.raises(jqopt.PlanError, match="embedding: a dot_general reads it"):
        intercepted(embed, qm, qm.variables, zoo.X, method="attend")


def test_only_linen_models():
    qm = quantized(lambda p, x: x @ p["w"], {"w": jnp.ones((64, 64))}, zoo.X)
    with pytest.raises(jqopt.UnsupportedError, match="no Linen model"), jqopt.linen.intercept(qm):
        pass
