"""Calibration: one pass, any split of the data, stacked layers apart, unreached sites named; and quantizing."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt
from jqopt.hf.llama import LlamaConfig, LlamaForCausalLM
from tests import arrays, zoo

INT8 = {"schema": 1, "name": "t", "rules": [{"match": "*", "weight": "int8", "input": "int8"}]}
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 64, (12, 8)).astype(np.int32)


def llama(scan: bool):
    model = LlamaForCausalLM(CONFIG, scan_layers=scan)
    return model, model.init(jax.random.key(0), TOKENS[:1])


def test_statistics_are_the_largest_absolute_inputs():
    x = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
    params = {"a": jnp.eye(16), "b": jnp.eye(16)}
    plan = jqopt.plan(INT8, jqopt.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, x))
    stats = jqopt.calibrate(plan, params, [x])
    assert stats["a"]["amax"].amax == np.abs(x).max() and stats["b"]["amax"].amax == x.max()


@pytest.mark.parametrize("scan", [False, True])
def test_any_split_of_the_data_gives_the_same_statistics(scan):
    model, variables = llama(scan)
    plan = jqopt.plan("fp8", jqopt.trace(model, variables, TOKENS[:4]))
    whole = jqopt.calibrate(plan, variables, [TOKENS])
    for cuts in ([4, 8], [1], [11], [2, 3, 9]):
        split = jqopt.calibrate(plan, variables, np.split(TOKENS, cuts))
        # the statistic is exact; a matmul of another height may round its sums differently
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), split, whole)
    assert jax.tree.all(jax.tree.map(np.array_equal, jqopt.calibrate(plan, variables, [TOKENS[::-1]]), whole))


def test_continuing_equals_one_go():
    model, variables = llama(True)
    plan = jqopt.plan("fp8", jqopt.trace(model, variables, TOKENS[:4]))
    parts = [TOKENS[:4], TOKENS[4:8], TOKENS[8:]]
    half = jqopt.calibrate(plan, variables, parts[:1])
    assert jax.tree.all(
        jax.tree.map(
            np.array_equal,
            jqopt.calibrate(plan, variables, parts[1:], stats=half),
            jqopt.calibrate(plan, variables, parts),
        )
    )


def test_scanned_layers_keep_their_own_statistics_and_equal_the_unrolled_ones():
    (scanned, stacked), (unrolled, _) = llama(True), llama(False)
    layers = stacked["params"]["layers"]
    flat = {k: v for k, v in stacked["params"].items() if k != "layers"}
    flat |= {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(3)}
    results = []
    for model, variables in ((scanned, stacked), (unrolled, {"params": flat})):
        plan = jqopt.plan("fp8", jqopt.trace(model, variables, TOKENS))
        results.append(jqopt.calibrate(plan, variables, [TOKENS]))
    for path, state in results[0].items():
        assert state["amax"].amax.shape == (3,), path
        rest = path.removeprefix("layers/")
        each = [results[1][f"layers_{i}/{rest}"]["amax"].amax for i in range(3)]
        np.testing.assert_allclose(state["amax"].amax, each, rtol=1e-5)


def test_group_members_share_scales():
    model, variables = llama(True)
    qm = jqopt.quantize_model(model, "fp8", params=variables, batches=[TOKENS])
    attention = qm.params["params"]["layers"]["self_attn"]
    q, k, v, o = (attention[f"{n}_proj"]["kernel"] for n in "qkvo")
    for other in (k, v):
        np.testing.assert_array_equal(q.input_scale, other.input_scale)
        np.testing.assert_array_equal(q.scale[:, 0, 0], other.scale[:, 0, 0])
    weights = [np.abs(variables["params"]["layers"]["self_attn"][f"{n}_proj"]["kernel"]).max((1, 2)) for n in "qkv"]
    np.testing.assert_array_equal(q.scale[:, 0, 0], np.max(weights, axis=0) / np.float32(448))
    assert not np.array_equal(q.input_scale, o.input_scale)
    nv = jqopt.quantize_model(model, "nvfp4", params=variables, batches=[TOKENS]).params["params"]["layers"]["mlp"]
    np.testing.assert_array_equal(nv["gate_proj"]["kernel"].global_scale, nv["up_proj"]["kernel"].global_scale)


def branches(params, x):
    return jax.lax.cond(x[0, 0] > 1e9, lambda x: x @ params["never"], lambda x: x @ params["taken"], x)


def test_a_site_that_no_data_reached_is_named():
    params = {"never": jnp.ones((8, 8)), "taken": jnp.ones((8, 8))}
    x = jnp.ones((2, 8))
    plan = jqopt.plan(INT8, jqopt.trace(branches, params, x))
    with pytest.raises(jqopt.CalibrationError, match="no data reached these sites: never"):
        jqopt.calibrate(plan, params, [x])


def test_nan_activations_name_site_and_layer():
    def model(p, x):
        def layer(x, w):
            return jnp.where(jnp.sum(w) > 100, jnp.nan, 1.0) * (x @ w), None

        return jax.lax.scan(layer, x, p["w"])[0]

    w = jnp.stack([jnp.eye(8), jnp.eye(8) * 100, jnp.eye(8)])
    plan = jqopt.plan(INT8, jqopt.trace(model, {"w": w}, jnp.ones((2, 8))))
    with pytest.raises(jqopt.CalibrationError, match=r"NaN or inf: w \(layers \[2\]\)"):
        jqopt.calibrate(plan, {"w": w}, [jnp.ones((2, 8))])


def test_no_batches_and_used_up_generators():
    model, variables, x = zoo.build(zoo.Dense)
    plan = jqopt.plan(INT8, jqopt.trace(model, variables, x))
    feed = iter([x])
    jqopt.calibrate(plan, variables, feed)
    with pytest.raises(jqopt.CalibrationError, match="already used up"):
        jqopt.calibrate(plan, variables, feed)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_with_nan_or_inf_is_named(bad):
    model, variables, x = zoo.build(zoo.MHA)
    kernel = variables["params"]["MultiHeadDotProductAttention_0"]["key"]["kernel"]
    variables["params"]["MultiHeadDotProductAttention_0"]["key"]["kernel"] = kernel.at[0, 0, 0].set(bad)
    plan = jqopt.plan("int8_weight_only", jqopt.trace(model, variables, x))
    with pytest.raises(jqopt.UnsupportedError, match="MultiHeadDotProductAttention_0/key/kernel: .*NaN or inf"):
        jqopt.quantize(plan, variables)


def test_zero_weights_and_zero_inputs_give_zeros():
    params = {"a": jnp.zeros((32, 16)), "b": arrays.normal(0, (16, 8))}
    static = ("int8", "fp8", "nvfp4")
    for recipe in (*static, "mxfp4", "int4_block_weight_only"):
        told = pytest.warns(UserWarning, match="zero in all batches: b, a")
        with told if recipe in static else contextlib.nullcontext():
            qm = jqopt.quantize_model(
                lambda p, x: (x @ p["a"]) @ p["b"], recipe, params=params, batches=[jnp.zeros((2, 32))]
            )
        np.testing.assert_array_equal(qm(jnp.ones((2, 32))), jnp.zeros((2, 8)), err_msg=recipe)


def test_donate_frees_each_float_weight():
    params = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 64)), "bias": jnp.ones(64)}
    plan = jqopt.plan(
        "int8_weight_only", jqopt.trace(lambda p, x: x @ p["a"] @ p["b"] + p["bias"], params, jnp.ones((1, 64)))
    )
    quant = jqopt.quantize(plan, params, donate=True)
    assert params["a"].is_deleted() and params["b"].is_deleted() and not params["bias"].is_deleted()
    assert quant.params["bias"] is params["bias"]


def test_quantize_is_the_same_under_jit():
    params = {"a": arrays.normal(0, (64, 48))}
    plan = jqopt.plan("nvfp4_weight_only", jqopt.trace(lambda p, x: x @ p["a"], params, jnp.ones((1, 64))))
    eager, jitted = jqopt.quantize(plan, params), jax.jit(lambda p: jqopt.quantize(plan, p))(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, eager, jitted))


def test_other_collections_pass_through():
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.Dense(16)(x)
            return nn.Dense(4)(nn.BatchNorm(use_running_average=not train)(x))

    x = arrays.normal(0, (8, 16))
    variables = Net().init(jax.random.key(1), x, train=False)
    qm = jqopt.quantize_model(Net(), INT8, params=variables, batches=[x], train=False)
    out, updates = jqopt.apply(jqopt.plan(INT8, jqopt.trace(Net(), variables, x, train=True, mutable=["batch_stats"])))(
        qm.quant, x, train=True, mutable=["batch_stats"]
    )
    want, want_updates = Net().apply(variables, x, train=True, mutable=["batch_stats"])
    assert out.shape == want.shape
    mean = updates["batch_stats"]["BatchNorm_0"]["mean"]
    assert float(jnp.abs(mean - want_updates["batch_stats"]["BatchNorm_0"]["mean"]).max()) < 0.05
    np.testing.assert_array_equal(qm.variables["batch_stats"]["BatchNorm_0"]["mean"], jnp.zeros(16))
