"""Native NNX: `quantize` gives an ordinary module with the evaluator's bits; `qm(...)` keeps state as nnx does."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jqopt
from tests import arrays

X = arrays.normal(0, (4, 64))
TOKENS = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
ASKS = {
    "int8": {"weight": "int8", "input": {"format": "int8", "scaling": "dynamic"}},
    "nvfp4": {"weight": "nvfp4", "input": {"format": "nvfp4", "scaling": "dynamic"}},
    "int4": {"weight": "int4"},
    "static": {"weight": "int8", "input": {"format": "int8", "scaling": "static"}},
    "int8_weight": {"weight": "int8"},
}


class Block(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(64, 128, rngs=rngs), nnx.Linear(128, 64, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.drop(self.b(nnx.relu(self.a(x))))


class Unrolled(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def stacked(rngs, axis=0):
    axes = nnx.StateAxes({nnx.Param: axis, ...: 0})
    return nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=0, out_axes=axes))(rngs)


class Scan(nnx.Module):
    def __init__(self, rngs, axis=0):
        self.layers, self.axis = stacked(rngs, axis), axis

    def __call__(self, x):
        axes = nnx.StateAxes({(nnx.Param, jqopt.nnx.QuantizedParam): self.axis, ...: 0})
        step = nnx.remat(lambda x, layer: layer(x))
        return nnx.scan(step, in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)(x, self.layers)


class Experts(nnx.Module):
    """Stacked blocks that share their input."""

    def __init__(self, rngs):
        self.experts = stacked(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(self.experts, x).sum(0)


class Shared(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.twice = nnx.List([self.first, self.first])

    def __call__(self, x):
        for layer in self.twice:
            x = jnp.tanh(layer(x))
        return self.first(x)


class ConvNorm(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.back = nnx.Conv(16, 16, (3,), rngs=rngs), nnx.ConvTranspose(16, 16, (3,), rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        return self.back(nnx.relu(self.norm(self.conv(x.reshape(4, 4, 16)))))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.mix = nnx.Embed(50, 64, rngs=rngs), nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, tokens):
        return self.embed.attend(self.mix(self.embed(tokens)))


class Attention(nnx.Module):
    def __init__(self, rngs, decode=False):
        self.heads = nnx.MultiHeadAttention(num_heads=4, in_features=64, decode=decode, rngs=rngs)
        if decode:
            self.heads.init_cache((1, 5, 64))

    def __call__(self, x):
        return self.heads(x[None, :1] if self.heads.decode else x[None])[0]


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(64, 64, rngs=rngs))
        self.gru = nnx.RNN(nnx.GRUCell(64, 64, rngs=rngs))

    def __call__(self, x):
        return self.gru(self.lstm(x[:, None, :].repeat(3, 1)))[:, -1]


class Others(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Einsum("bd,edf->bef", (4, 64, 8), (4, 8), rngs=rngs)
        self.down = nnx.LinearGeneral((4, 8), (64,), axis=(-2, -1), rngs=rngs)
        self.lora = nnx.LoRALinear(64, 64, lora_rank=4, b_initializer=nnx.initializers.lecun_normal(), rngs=rngs)

    def __call__(self, x):
        return self.lora(self.down(self.up(x)))


ZOO = (Unrolled, Scan, Experts, Shared, ConvNorm, Tied, Attention, Recurrent, Others)


def made(cls, ask="int8", mode="eval", **more):
    """(float model, its qm, an input)"""
    model, x = cls(nnx.Rngs(0), **more), TOKENS if cls in (Tied, RawTied) else X
    getattr(model, mode)()
    rules = [{"match": "*", **ASKS[ask]}]
    return model, jqopt.quantize_model(model, {"schema": 1, "name": ask, "rules": rules}, batches=[x]), x


@nnx.jit
def run(model, x):
    """Jitted once for all tests of this file, as a user's evaluation step is."""
    return model(x)


# ----------------------------------------------------------------------------------------------- equal bits


@pytest.mark.parametrize("ask", ["int8", "nvfp4", "int4"])
@pytest.mark.parametrize("cls", ZOO, ids=lambda c: c.__name__)
def test_the_module_gives_the_evaluators_bits(cls, ask):
    model, qm, x = made(cls, ask)
    np.testing.assert_array_equal(run(jqopt.nnx.quantize(model, qm), x), qm(x))


@pytest.mark.parametrize("cls", [Scan, Experts, Attention], ids=lambda c: c.__name__)
def test_calibrated_inputs(cls):
    model, qm, x = made(cls, "static")
    np.testing.assert_array_equal(run(jqopt.nnx.quantize(model, qm), x), qm(x))


def test_simulation():
    model, qm, x = made(Attention, "nvfp4")
    want = jqopt.apply(qm.plan, simulate=True)(qm.quant, x)
    np.testing.assert_array_equal(run(jqopt.nnx.quantize(model, qm, simulate=True), x), want)


def test_order_of_float_and_quantized_calls_makes_no_difference():
    """Also for two plans whose packed trees look the same."""
    model, one, x = made(Scan, "int8")
    _, two, _ = made(Scan, "int8_weight")
    want = run(model, x)
    first, second = (jqopt.nnx.quantize(model, qm) for qm in (one, two))
    for _ in range(2):
        np.testing.assert_array_equal(run(first, x), one(x))
        np.testing.assert_array_equal(run(model, x), want)
        np.testing.assert_array_equal(run(second, x), two(x))
    assert jnp.abs(one(x) - two(x)).max() > 1e-4


# ------------------------------------------------------------------------------------------ ordinary modules


def test_the_float_model_stays_and_shared_layers_are_shared():
    model, qm, _ = made(Shared)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    quantized = jqopt.nnx.quantize(model, qm)
    assert quantized.first is quantized.twice[0] is quantized.twice[1]
    assert isinstance(quantized.first, nnx.Linear)
    assert isinstance(quantized.first.kernel.get_value(), jqopt.QTensor)
    assert type(model.first) is nnx.Linear
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))
    assert quantized.first.kernel is not model.first.kernel


def test_split_merge_clone_and_eval_shape():
    model, qm, x = made(Scan)
    quantized = jqopt.nnx.quantize(nnx.eval_shape(lambda: model), qm)  # the float weights aren't needed
    want = run(quantized, x)
    assert quantized.layers.a.kernel.get_value().data.shape == (3, 128, 64)
    np.testing.assert_array_equal(run(nnx.merge(*nnx.split(quantized)), x), want)
    np.testing.assert_array_equal(run(nnx.clone(quantized), x), want)
    np.testing.assert_array_equal(jax.jit(lambda m, x: m(x))(quantized, x), want)
    packed = nnx.to_pure_dict(nnx.state(quantized, jqopt.nnx.QuantizedParam))
    assert set(packed["layers"]) == {"a", "b"}


def test_gradients_reach_the_float_parameters():
    model, qm, x = made(Attention)
    quantized = jqopt.nnx.quantize(model, qm)
    optimizer = nnx.Optimizer(quantized, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        value, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1.0) ** 2))(model)
        optimizer.update(model, grads)
        return value, grads

    value, grads = step(quantized, optimizer, x)
    assert set(grads["heads"]["query"]) == {"bias"}  # packed weights aren't nnx.Params
    assert float(jnp.abs(grads["heads"]["value"]["bias"][...]).max()) > 0  # straight through the packed output layer
    assert [float(step(quantized, optimizer, x)[0]) for _ in range(5)][-1] < float(value)


# -------------------------------------------------------------------------------------------------- refusals


class Raw(nnx.Module):
    def __init__(self, rngs):
        self.w, self.lin = nnx.Param(jax.random.normal(rngs(), (64, 64)) / 8), nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, x):
        return self.lin(x @ self.w)


class RawInDict(nnx.Module):
    def __init__(self, rngs):
        self.ws = nnx.Dict(w=nnx.Param(jax.random.normal(rngs(), (64, 64)) / 8))

    def __call__(self, x):
        return x @ self.ws["w"]


class RawTied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 64, rngs=rngs)

    def __call__(self, tokens):
        return self.embed(tokens) @ self.embed.embedding[...].T


@pytest.mark.parametrize(("cls", "path"), [(Raw, "w: Raw reads"), (RawInDict, "ws/w: ")])
def test_raw_parameters_are_refused_by_name(cls, path):
    model, qm, x = made(cls)
    assert qm(x).shape == (4, 64)
    with pytest.raises(jqopt.UnsupportedError, match=rf"^{path}.*jqopt.apply\(plan\).*keep: true"):
        jqopt.nnx.quantize(model, qm)


def test_a_layers_weight_read_from_outside_is_refused_by_name():
    model, qm, x = made(RawTied, "int8_weight")
    quantized = jqopt.nnx.quantize(model, qm)
    with pytest.raises(jqopt.UnsupportedError, match="^embed/embedding: your code reads this weight"):
        run(quantized, x)
    table = quantized.embed.embedding
    for use in (lambda: x @ table, lambda: table.T, lambda: table * 2, lambda: jnp.asarray(table)):
        with pytest.raises(jqopt.UnsupportedError, match="embed/embedding"):
            use()


def test_layers_stacked_along_another_axis_are_refused_by_name():
    model, qm, x = made(Scan, axis=1)
    assert qm(x).shape == (4, 64)
    with pytest.raises(jqopt.UnsupportedError, match=r"^layers/a/kernel: .*in_axes=0"):
        jqopt.nnx.quantize(model, qm)


def test_another_model_is_refused():
    _, qm, _ = made(Attention)
    with pytest.raises(jqopt.PlanError, match="Missing: \\['heads/key/bias'"):
        jqopt.nnx.quantize(Unrolled(nnx.Rngs(0)), qm)
    with pytest.raises(jqopt.PlanError, match="only qm .*heads/cache"):
        jqopt.nnx.quantize(Attention(nnx.Rngs(0)), made(Attention, decode=True)[1])
    other = jqopt.quantize_model(
        lambda p, x: x @ p["w"], {"schema": 1, "name": "i", "rules": [{"match": "*", "weight": "int8"}]},
        params={"w": X.T @ X}, inputs=X,
    )  # fmt: skip
    with pytest.raises(jqopt.UnsupportedError, match="NNX model's qm"):
        jqopt.nnx.quantize(Unrolled(nnx.Rngs(0)), other)


# ----------------------------------------------------------------------------------------------------- state


def state_of(qm, *path):
    found = qm.params["state"]
    for name in path:
        found = found[name]
    return np.asarray(found[...])


def test_batch_statistics_live_in_qm_and_in_the_module_not_in_the_float_model():
    model, qm, x = made(ConvNorm, mode="train")
    quantized = jqopt.nnx.quantize(model, qm)
    for _ in range(2):
        np.testing.assert_array_equal(run(quantized, x), qm(x))
        np.testing.assert_array_equal(state_of(qm, "norm", "mean"), quantized.norm.mean[...])
    assert state_of(qm, "norm", "mean").any()
    assert not np.asarray(model.norm.mean[...]).any()
    kept = qm.quant
    jqopt.apply(qm.plan)(kept, x)  # pure
    assert qm.quant is kept
    later = jqopt.nnx.quantize(model, qm)
    np.testing.assert_array_equal(later.norm.mean[...], quantized.norm.mean[...])


def test_caches_and_random_number_streams():
    model, qm, _ = made(Attention, decode=True)
    quantized = jqopt.nnx.quantize(model, qm)
    for i in range(3):
        np.testing.assert_array_equal(run(quantized, X[i:]), qm(X[i:]))
        assert state_of(qm, "heads", "cache_index") == i + 1
    model, qm, x = made(Scan, mode="train")
    quantized = jqopt.nnx.quantize(model, qm)
    first = qm(x)
    np.testing.assert_array_equal(run(quantized, x), first)
    assert not np.array_equal(qm(x), first)  # another draw
    np.testing.assert_array_equal(state_of(qm, "layers", "drop", "rngs", "count"), [2, 2, 2])


def test_state_changes_inside_jit_are_refused_by_name():
    _, qm, x = made(ConvNorm, mode="train")
    with pytest.raises(jqopt.UnsupportedError, match=r"norm/mean, norm/var.*jqopt.nnx.quantize"):
        jax.jit(qm)(x)
    assert not state_of(qm, "norm", "mean").any()
    _, qm, x = made(Scan, mode="train")
    with pytest.raises(jqopt.UnsupportedError, match=r"\(layers/drop/rngs/count\)"):
        jax.jit(qm)(x)


@pytest.mark.parametrize("cls", [ConvNorm, Scan, Attention], ids=lambda c: c.__name__)
def test_calls_that_leave_the_state_alone_may_be_transformed(cls):
    _, qm, x = made(cls)
    np.testing.assert_array_equal(jax.jit(qm)(x), qm(x))


class Counting(nnx.Module):
    """Makes state during the call."""

    def __init__(self, rngs):
        self.lin = nnx.Linear(64, 64, rngs=rngs)
        self.last = nnx.data(None)

    def __call__(self, x):
        x = x if self.last is None else x + self.last[...]
        self.last = nnx.Variable(self.lin(x))
        return self.last[...]


def test_state_that_a_call_makes():
    model, qm, x = made(Counting)
    quantized = jqopt.nnx.quantize(model, qm)
    for _ in range(3):
        np.testing.assert_array_equal(run(quantized, x), qm(x))
    np.testing.assert_array_equal(state_of(qm, "last"), quantized.last[...])
    assert model.last is None
