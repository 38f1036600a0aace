"""Folds: a scale of a group's input goes where it should, and no transform changes what the float model computes.

A scale that is a power of two only moves exponents, so a model must give the very same bits after it is folded; a
general one the same numbers up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import jqopt
from jqopt import transforms
from jqopt.analysis.folds import Fold
from jqopt.errors import PlanError, TraceError
from jqopt.hf.llama import LlamaConfig, LlamaForCausalLM
from tests import arrays

TOKENS = jnp.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], jnp.int32)
WORDS = jax.ShapeDtypeStruct((11, 6), jnp.float32)  # an embedding table


class Made(NamedTuple):
    """A traced model, its parameters and the compiled call."""

    graph: Any
    params: Any
    run: Callable[[Any], jax.Array]


def fill(shapes: Any, seed: int = 0) -> Any:
    """Random parameters: gains of both signs, kernels that keep values near one, positive statistics."""
    draw = np.random.default_rng(seed)

    def one(key: tuple, leaf: Any) -> jax.Array:
        if "var" in jax.tree_util.keystr(key):
            return jnp.asarray(draw.uniform(0.5, 2.0, leaf.shape), leaf.dtype)
        fan_in = np.prod(leaf.shape[-2:-1]) if len(leaf.shape) > 1 else 1
        return jnp.asarray(draw.normal(size=leaf.shape) / np.sqrt(fan_in), leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def make(model: Any, *inputs: Any, params: Any = None) -> Made:
    """Traces a Linen module, or a function of {name: shape} given as `params`."""
    if params is None:
        params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    params = fill(params)
    call = model.apply if isinstance(model, nn.Module) else model
    run = jax.jit(lambda p: call(p, *inputs), compiler_options={"xla_backend_optimization_level": 0})
    return Made(jqopt.trace(model, params, *inputs), params, run)


def shapes(**sizes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}


def distance(new: jax.Array, old: jax.Array) -> float:
    return float(jnp.abs(new - old).max() / jnp.abs(old).max())


def powers_of_two(fold: Fold, seed: int = 1) -> np.ndarray:
    """Random powers of two, the same one over tied channels."""
    power = np.random.default_rng(seed).integers(-3, 4, fold.shape)
    power = power if fold.ties is None else power.ravel()[fold.ties]
    return (2.0**power).astype(np.float32)


def expect(made: Made, **targets: str) -> None:
    """Checks where each group's scale goes (`nowhere: ` and a part of the reason), and that folding it changes nothing.

    The keys of `targets` are sites' keys with `__` for `/`; groups that aren't named must go nowhere.
    """
    wanted = {key.replace("__", "/"): word for key, word in targets.items()}
    before = made.run(made.params)
    assert float(jnp.abs(before).max()) > 0
    for group in made.graph.groups:
        fold = made.graph.folds[group.name]
        word = wanted.pop(group.name, "nowhere: ")
        if word.startswith("nowhere"):
            assert fold.describe().startswith("nowhere: ") and word.removeprefix("nowhere: ") in fold.reason
            continue
        assert fold.describe() == word
        exact = transforms.fold_scale(made.graph, group, powers_of_two(fold))(made.params)
        if not any(a.offset for a in fold.absorbers):
            np.testing.assert_array_equal(made.run(exact), before)
        assert distance(made.run(exact), before) <= 1e-5
        scale = fold.project(np.exp(np.random.default_rng(2).normal(size=fold.shape)).astype(np.float32))
        assert distance(made.run(transforms.fold_scale(made.graph, group.name, scale)(made.params)), before) <= 1e-5
    assert not wanted, f"no such groups: {list(wanted)}"


def expect_norms(made: Made, folded: dict[str, float], left: dict[str, str] | None = None) -> Any:
    """Checks which gains become the given number, and that nothing else changes; the new parameters."""
    norms = transforms.fold_norms(made.graph)
    assert set(norms.folded) == set(folded)
    assert set(norms.left) == set(left or {})
    for path, why in (left or {}).items():
        assert why in norms.left[path]
    new = norms(made.params)
    for path, number in folded.items():
        assert (leaf(new, path) == number).all(), path
    for path in left or {}:
        np.testing.assert_array_equal(leaf(new, path), leaf(made.params, path))
    assert distance(made.run(new), made.run(made.params)) <= 1e-5
    return new


def leaf(params: Any, path: str) -> Any:
    found = params.get("params", params)
    for name in path.split("/"):
        found = found[name]
    return found


# ------------------------------------------------------------------------------------------------- LLaMA

CONFIG = LlamaConfig(
    vocab_size=19, hidden_size=12, intermediate_size=14, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=6,
)  # fmt: skip
TIED = LlamaConfig(19, 12, 14, 2, 4, 2, 6, tie_word_embeddings=True)
LAYER = {
    "self_attn__q_proj__kernel": "input_layernorm/scale (gain)",
    "self_attn__o_proj__kernel": "v_proj/kernel (rows)",
    "mlp__gate_proj__kernel": "post_attention_layernorm/scale (gain)",
    "mlp__down_proj__kernel": "up_proj/kernel (rows)",
}


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_llama(scan, remat):
    made = make(LlamaForCausalLM(CONFIG, scan_layers=scan, remat=remat), TOKENS)
    layers = ["layers"] if scan else [f"layers_{i}" for i in range(3)]
    expect(made, lm_head__kernel="norm/scale (gain)", **{f"{x}__{k}": w for x in layers for k, w in LAYER.items()})
    norms = [f"{x}/{n}/scale" for x in layers for n in ("input_layernorm", "post_attention_layernorm")]
    expect_norms(made, dict.fromkeys(["norm/scale", *norms], 1.0))


def test_scanned_layers_have_scales_of_their_own():
    made = make(LlamaForCausalLM(CONFIG, scan_layers=True), TOKENS)
    fold = made.graph.folds["layers/self_attn/q_proj/kernel"]
    assert fold.shape == (3, 12) and fold.ties is None and fold.free == 36
    [gain] = fold.absorbers
    np.testing.assert_array_equal(gain.labels, np.arange(36).reshape(3, 12))
    scale = np.exp(np.random.default_rng(0).normal(size=(3, 12))).astype(np.float32)
    new = transforms.fold_scale(made.graph, "layers/self_attn/q_proj/kernel", scale)(made.params)
    for name in "qkv":
        path = f"layers/self_attn/{name}_proj/kernel"
        np.testing.assert_allclose(leaf(new, path), leaf(made.params, path) * scale[:, :, None], rtol=1e-6)
    path = "layers/input_layernorm/scale"
    np.testing.assert_allclose(leaf(new, path), leaf(made.params, path) / scale, rtol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_query_heads_share_the_scales_of_their_value_head(scan):
    made = make(LlamaForCausalLM(CONFIG, scan_layers=scan), TOKENS)
    fold = made.graph.folds["layers/self_attn/o_proj/kernel" if scan else "layers_1/self_attn/o_proj/kernel"]
    # four query heads of six channels; 0 and 1 read value head 0, 2 and 3 read value head 1
    head = np.concatenate([np.arange(6), np.arange(6), 12 + np.arange(6), 12 + np.arange(6)])
    np.testing.assert_array_equal(fold.ties, 24 * np.arange(3)[:, None] + head if scan else head)
    assert fold.free == (36 if scan else 12)


def test_a_tied_head_holds_the_last_gain_where_it_is():
    made = make(LlamaForCausalLM(TIED), TOKENS)
    layers = {f"layers_{i}__{k}": w for i in range(2) for k, w in LAYER.items()}
    head = "nowhere: embed_tokens/embedding is also read by gather"
    expect(made, **{"embed_tokens__embedding#2": head}, **layers)
    norms = [f"layers_{i}/{n}/scale" for i in range(2) for n in ("input_layernorm", "post_attention_layernorm")]
    expect_norms(made, dict.fromkeys(norms, 1.0), {"norm/scale": "embed_tokens/embedding is also read by gather"})


# --------------------------------------------------------------------------------------------- attention


def rms(x: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + jnp.float32(1e-5))


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention over [batch, tokens, heads, depth], heads merged."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k)
    visible = np.tril(np.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.float32(-jnp.inf)), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(*q.shape[:2], -1)


def test_values_repeated_for_their_query_heads():
    def model(p, x):
        e = p["table"][x]
        y = rms(e) * p["gain"]
        q, k, v = ((y @ p[n]).reshape(2, 5, -1, 3) for n in "qkv")
        k, v = (jnp.repeat(a, 2, axis=2) for a in (k, v))
        return e + attend(q, k, v) @ p["o"]

    made = make(model, TOKENS, params={"table": WORDS, **shapes(gain=(6,), q=(6, 12), k=(6, 6), v=(6, 6), o=(12, 6))})
    expect(made, q="gain (gain)", o="v (rows)")
    np.testing.assert_array_equal(made.graph.folds["o"].ties, [0, 1, 2, 0, 1, 2, 6, 7, 8, 6, 7, 8])
    expect_norms(made, {"gain": 1.0})


@pytest.mark.parametrize("split", [True, False])
def test_a_fused_qkv_kernel_takes_the_scale_in_the_columns_of_v(split):
    def model(p, x):
        e = p["table"][x]
        y = (rms(e) * p["gain"]) @ p["qkv"] + p["bias"]
        q, k, v = jnp.split(y, 3, axis=-1) if split else (y[..., :6], y[..., 6:12], y[..., 12:])
        return e + attend(*(a.reshape(2, 5, 2, 3) for a in (q, k, v))) @ p["o"]

    params = {"table": WORDS, **shapes(gain=(6,), qkv=(6, 18), bias=(18,), o=(6, 6))}
    made = make(model, TOKENS, params=params)
    expect(made, qkv="gain (gain)", o="qkv (rows), bias (bias)")
    [rows, _] = made.graph.folds["o"].absorbers
    assert (rows.labels[:, :12] < 0).all()
    np.testing.assert_array_equal(rows.labels[:, 12:], np.arange(6)[None])
    scale = np.full(6, 2.0, np.float32)
    new = transforms.fold_scale(made.graph, "o", scale)(made.params)
    np.testing.assert_array_equal(new["qkv"][:, :12], made.params["qkv"][:, :12])
    np.testing.assert_array_equal(new["qkv"][:, 12:], made.params["qkv"][:, 12:] / 2)


def test_cross_attention_folds_into_the_norm_of_the_source():
    def model(p, x):
        e = p["table"][x]
        source = rms(e) * p["source_gain"]
        y = rms(e) * p["gain"]
        q, k, v = y @ p["q"], source @ p["k"], source @ p["v"]
        return e + attend(*(a.reshape(2, 5, 2, 3) for a in (q, k, v))) @ p["o"]

    params = {"table": WORDS, **shapes(gain=(6,), source_gain=(6,), q=(6, 6), k=(6, 6), v=(6, 6), o=(6, 6))}
    made = make(model, TOKENS, params=params)
    expect(made, q="gain (gain)", k="source_gain (gain)", o="v (rows)")
    assert [s.key for s in made.graph.groups[1]] == ["k", "v"]


def test_norms_of_queries_and_keys_stay():
    def model(p, x):
        e = p["table"][x]
        y = rms(e) * p["gain"]
        q, k, v = ((y @ p[n]).reshape(2, 5, 2, 3) for n in "qkv")
        return e + attend(rms(q) * p["q_gain"], rms(k) * p["k_gain"], v) @ p["o"]

    params = {"table": WORDS, **shapes(gain=(6,), q_gain=(3,), k_gain=(3,), q=(6, 6), k=(6, 6), v=(6, 6), o=(6, 6))}
    made = make(model, TOKENS, params=params)
    expect(made, q="gain (gain)", o="v (rows)")
    why = "it is read by dot_general (test_folds.py:"
    expect_norms(made, {"gain": 1.0}, {"q_gain": why, "k_gain": why})


def test_attention_and_mlp_side_by_side():
    def model(p, x):
        e = p["table"][x]
        y = rms(e) * p["gain"]
        q, k, v = ((y @ p[n]).reshape(2, 5, 2, 3) for n in "qkv")
        mlp = (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
        return e + attend(q, k, v) @ p["o"] + mlp

    sizes = shapes(gain=(6,), q=(6, 6), k=(6, 6), v=(6, 6), o=(6, 6), gate=(6, 8), up=(6, 8), down=(8, 6))
    made = make(model, TOKENS, params={"table": WORDS, **sizes})
    expect(made, q="gain (gain)", o="v (rows)", down="up (rows)")
    assert [s.key for s in made.graph.groups[0]] == ["q", "k", "v", "gate", "up"]
    expect_norms(made, {"gain": 1.0})


# -------------------------------------------------------------------------------------------------- norms


def test_a_norm_that_adds_one_to_its_gain():
    def model(p, x):
        e = p["table"][x]
        y = rms(e) * (1 + p["gain"])
        return e + jax.nn.silu(y @ p["gate"]) @ p["down"]

    made = make(model, TOKENS, params={"table": WORDS, **shapes(gain=(6,), gate=(6, 8), down=(8, 6))})
    expect(made, gate="gain (1 + gain)", down="nowhere: the output of gate is also read by logistic")
    scale = np.asarray([1, 2, 4, 0.5, 3, 0.1], np.float32)
    new = transforms.fold_scale(made.graph, "gate", scale)(made.params)
    np.testing.assert_allclose(1 + new["gain"], (1 + made.params["gain"]) / scale, rtol=1e-6)
    expect_norms(made, {"gain": 0.0})


class LayerNormMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        e = nn.Embed(11, 6, name="embed")(x)
        return e + nn.Dense(6, name="down")(nn.gelu(nn.Dense(8, name="up")(nn.LayerNorm(name="norm")(e))))


def test_a_layer_norm_with_bias():
    made = make(LayerNormMlp(), TOKENS)
    expect(made, up__kernel="norm/scale (gain), norm/bias (bias)", down__kernel="nowhere: the output of add")
    new = expect_norms(made, {"norm/scale": 1.0})
    gain, bias = leaf(made.params, "norm/scale"), leaf(made.params, "norm/bias")
    np.testing.assert_allclose(leaf(new, "norm/bias"), bias / gain, rtol=1e-6)


def test_gains_of_zero():
    def plain(p, x):
        return (rms(p["table"][x]) * p["gain"]) @ p["w"]

    def biased(p, x):
        return (rms(p["table"][x]) * p["gain"] + p["bias"]) @ p["w"]

    gain = jnp.asarray([0, -1.5, 2, 0, 1, 3], jnp.float32)
    made = make(plain, TOKENS, params={"table": WORDS, **shapes(gain=(6,), w=(6, 4))})
    made = made._replace(params={**made.params, "gain": gain})
    new = expect_norms(made, {"gain": 1.0})
    np.testing.assert_array_equal(new["w"], made.params["w"] * gain[:, None])
    made = make(biased, TOKENS, params={"table": WORDS, **shapes(gain=(6,), bias=(6,), w=(6, 4))})
    made = made._replace(params={**made.params, "gain": gain})
    new = transforms.fold_norms(made.graph)(made.params)
    np.testing.assert_array_equal(new["gain"], [0, 1, 1, 0, 1, 1])
    np.testing.assert_array_equal(new["bias"][jnp.asarray([0, 3])], made.params["bias"][jnp.asarray([0, 3])])
    assert distance(made.run(new), made.run(made.params)) <= 1e-5


def test_norms_stacked_by_hand_fold_layer_by_layer():
    def model(p, x):
        e = p["table"][x]
        for i in range(3):
            e = e + jax.nn.relu((rms(e) * p["gains"][i]) @ p["up"][i]) @ p["down"][i]
        return e

    params = {"table": WORDS, **shapes(gains=(3, 6), up=(3, 6, 8), down=(3, 8, 6))}
    made = make(model, TOKENS, params=params)
    expect(
        made, up="gains (gain)", down="up (rows)",
        **{"up#2": "gains (gain)", "up#3": "gains (gain)", "down#2": "up (rows)", "down#3": "up (rows)"},
    )  # fmt: skip
    scale = np.full((3, 6), 2, np.float32)
    new = transforms.fold_scale(made.graph, "up#2", scale)(made.params)
    np.testing.assert_array_equal(new["gains"], made.params["gains"] / jnp.asarray([[1.0], [2.0], [1.0]]))
    np.testing.assert_array_equal(new["up"], made.params["up"] * jnp.asarray([1.0, 2.0, 1.0])[:, None, None])
    expect_norms(made, {"gains": 1.0})


def test_a_gain_that_only_some_layers_fold_is_left_and_said_so():
    def model(p, x):
        e = p["table"][x]
        first = (rms(e) * p["gains"][0]) @ p["w"]
        return jnp.tanh(first) + rms(e) * p["gains"][1]

    made = make(model, TOKENS, params={"table": WORDS, **shapes(gains=(2, 6), w=(6, 6))})
    norms = transforms.fold_norms(made.graph)
    assert norms.left == {"gains": "only a part of it is read by weights"} and norms.folded == ()
    new = norms(made.params)
    np.testing.assert_array_equal(new["gains"], made.params["gains"].at[0].set(1))
    assert distance(made.run(new), made.run(made.params)) <= 1e-5


def test_one_gain_and_one_weight_for_all_layers():
    def model(p, x):
        def layer(e, up):
            return e + jnp.tanh((rms(e) * p["gain"]) @ up), None

        return lax.scan(layer, p["table"][x], p["up"])[0]

    made = make(model, TOKENS, params={"table": WORDS, **shapes(gain=(6,), up=(3, 6, 6))})
    expect(made, up="gain (gain)")
    fold = made.graph.folds["up"]
    assert fold.shape == (3, 6)
    np.testing.assert_array_equal(fold.ties, np.tile(np.arange(6), (3, 1)))
    expect_norms(made, {"gain": 1.0})


# ------------------------------------------------------------------------------------------------ MLPs

ACTIVATIONS: dict[str, tuple[Callable, str]] = {
    "relu": (jax.nn.relu, "up (rows), bias (bias)"),
    "maximum": (lambda x: jnp.maximum(x, jnp.float32(0)), "up (rows), bias (bias)"),
    "where": (lambda x: jnp.where(x > 0, x, jnp.float32(0)), "up (rows), bias (bias)"),
    "leaky_relu": (jax.nn.leaky_relu, "up (rows), bias (bias)"),
    "abs": (jnp.abs, "up (rows), bias (bias)"),
    "identity": (lambda x: x, "up (rows), bias (bias)"),
    "gelu": (jax.nn.gelu, "nowhere: the output of add (test_folds.py:"),
    "silu": (jax.nn.silu, "nowhere: the output of add (test_folds.py:"),
    "tanh": (jnp.tanh, "nowhere: tanh (test_folds.py:"),
    "relu6": (jax.nn.relu6, "nowhere: min (test_folds.py:"),
    "squared": (lambda x: x * x, "nowhere: the output of add (test_folds.py:"),
    "threshold": (lambda x: jnp.where(x > 1, x, jnp.float32(0)), "nowhere: the output of add (test_folds.py:"),
    "whole": (lambda x: jnp.round(x), "nowhere: round (test_folds.py:"),
    "shifted": (lambda x: x + jnp.float32(1), "nowhere: add (test_folds.py:"),
    "sorted": (lambda x: jnp.sort(x, axis=-1), "nowhere: sort (test_folds.py:"),
    "softmax": (lambda x: jax.nn.softmax(x, axis=-1), "nowhere: exp (test_folds.py:"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_between_two_dense_layers(name):
    activation, target = ACTIVATIONS[name]

    def model(p, x):
        return activation(x @ p["up"] + p["bias"]) @ p["down"]

    x = arrays.normal(0, (7, 6))
    expect(
        make(model, x, params=shapes(up=(6, 8), bias=(8,), down=(8, 5))), up="nowhere: the model's input 0", down=target
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_gate_leaves_the_scale_to_the_other_branch(fused, swapped):
    def model(p, x):
        gate, up = jnp.split(x @ p["gate_up"], 2, axis=-1) if fused else (x @ p["gate"], x @ p["up"])
        gate = jax.nn.silu(gate)
        return (up * gate if swapped else gate * up) @ p["down"]

    sizes = {"gate_up": (6, 16)} if fused else {"gate": (6, 8), "up": (6, 8)}
    made = make(model, arrays.normal(0, (7, 6)), params=shapes(**sizes, down=(8, 5)))
    expect(made, down="gate_up (rows)" if fused else "up (rows)")
    if fused:
        [rows] = made.graph.folds["down"].absorbers
        np.testing.assert_array_equal(rows.labels, [[*([-1] * 8), *range(8)]])


def test_a_residual_stream_without_norm():
    def model(p, x):
        e = p["table"][x]
        return (e + jax.nn.relu(e @ p["up"]) @ p["down"]) @ p["head"]

    made = make(model, TOKENS, params={"table": WORDS, **shapes(up=(6, 8), down=(8, 6), head=(6, 5))})
    also = "the output of gather (test_folds.py:"
    expect(made, up=f"nowhere: {also}", down="up (rows)", head="down (rows), table (table)")
    assert "is also read by add (test_folds.py:" in made.graph.folds["up"].reason
    # the head reads the stream: the table and `down` can be divided, when `up` is multiplied
    assert made.graph.folds["head"].also == ("up",)


def test_a_layer_inside_the_stream_is_divided_and_multiplied():
    def model(p, x):
        e = p["table"][x]
        return (e + e @ p["w"]) @ p["head"]

    made = make(model, TOKENS, params={"table": WORDS, **shapes(w=(6, 6), head=(6, 5))})
    expect(made, head="table (table), w (rows)")
    scale = powers_of_two(made.graph.folds["head"])
    new = transforms.fold_scale(made.graph, "head", scale)(made.params)
    np.testing.assert_array_equal(new["w"], made.params["w"] * scale[:, None] / scale)


def test_an_embedding_straight_into_a_dense_layer():
    made = make(lambda p, x: p["table"][x] @ p["w"], TOKENS, params={"table": WORDS, **shapes(w=(6, 4))})
    expect(made, w="table (table)")


def test_channels_in_the_order_of_a_contraction_over_two_axes():
    def model(p, x):
        return jnp.einsum("thk,hkd->td", jnp.einsum("td,dhk->thk", x, p["up"]), p["down"])

    made = make(model, jnp.ones((5, 6)), params=shapes(up=(6, 2, 3), down=(2, 3, 4)))
    expect(made, down="up (rows)")
    [rows] = made.graph.folds["down"].absorbers
    np.testing.assert_array_equal(rows.labels, np.arange(6).reshape(1, 2, 3))


def test_a_weight_made_of_two_takes_the_scale_in_both():
    def model(p, x):
        y = jax.nn.relu(x @ p["up"])
        return y @ p["v"] + y @ (p["w"] + p["a"] @ p["b"])  # the sum is no site, but reads what `v` reads

    sizes = shapes(up=(6, 8), v=(8, 4), w=(8, 4), a=(8, 2), b=(2, 4))
    made = make(model, arrays.normal(0, (5, 6)), params=sizes)
    expect(made, v="up (rows)")
    assert {a.path for a in made.graph.folds["v"].consumers} == {"v", "w", "a"}


def test_padding_concatenation_and_reversal_move_channels():
    def model(p, x):
        a, b = x @ p["a"], x @ p["b"]
        y = jnp.concatenate([jnp.flip(a, -1), b], axis=-1)
        y = jnp.pad(y, ((0, 0), (1, 2)))
        return jax.nn.relu(y) @ p["down"]

    made = make(model, arrays.normal(0, (5, 6)), params=shapes(a=(6, 3), b=(6, 2), down=(8, 4)))
    expect(made, down="a (rows), b (rows)")
    labels = {a.path: a.labels for a in made.graph.folds["down"].absorbers}
    np.testing.assert_array_equal(labels["a"], [[3, 2, 1]])
    np.testing.assert_array_equal(labels["b"], [[4, 5]])


def test_branches_of_a_cond_must_all_take_the_scale():
    def model(p, x, wide):
        y = lax.cond(wide, lambda: x @ p["a"], lambda: jax.nn.relu(x @ p["b"]))
        return y @ p["down"]

    params = shapes(a=(6, 3), b=(6, 3), down=(3, 4))
    expect(make(model, jnp.ones((5, 6)), jnp.asarray(True), params=params), down="a (rows), b (rows)")


# ----------------------------------------------------------------------------------------- readers of values


def test_a_value_that_is_returned_stays():
    def model(p, x):
        y = jax.nn.relu(x @ p["up"])
        return jnp.concatenate([y, y @ p["down"]], axis=-1)

    def both(p, x):
        y = x @ p["up"]
        return y, y @ p["down"]

    x, params = jnp.ones((5, 6)), shapes(up=(6, 8), down=(8, 4))
    made = make(model, x, params=params)
    expect(made, down="nowhere: the output of max (test_folds.py:")
    assert "is also read by concatenate (test_folds.py:" in made.graph.folds["down"].reason
    assert made.graph.folds["down"].reason.endswith(", which the model returns")
    graph = jqopt.trace(both, fill(params), x)
    assert graph.folds["down"].reason == "the output of up is returned by the model"


def test_a_weight_that_is_used_elsewhere_stays():
    def model(p, x):
        return jax.nn.relu(x @ p["up"]) @ p["down"] + jnp.sum(p["up"])

    made = make(model, jnp.ones((5, 6)), params=shapes(up=(6, 8), down=(8, 4)))
    expect(made, down="nowhere: up is also read by reduce_sum")


def test_a_gain_of_two_norms_stays():
    def model(p, x):
        e = p["table"][x]
        e = e + (rms(e) * p["gain"]) @ p["first"]
        return e + (rms(e) * p["gain"]) @ p["second"]

    made = make(model, TOKENS, params={"table": WORDS, **shapes(gain=(6,), first=(6, 6), second=(6, 6))})
    expect(made, first="nowhere: gain is also read by mul", second="nowhere: gain is also read by mul")
    expect_norms(made, {}, {"gain": "gain is also read by mul"})


def test_what_nobody_reads_does_not_count():
    def model(p, x):
        y = x @ p["up"]
        _ = jnp.tanh(y)
        return y @ p["down"]

    made = make(model, jnp.ones((5, 6)), params=shapes(up=(6, 8), down=(8, 4)))
    expect(made, down="up (rows)")


def test_the_best_channel_is_the_same_only_under_one_scale():
    def rows(p, x):
        y = x @ p["up"]
        return (y @ p["down"]) * jnp.argmax(y, axis=0).sum().astype(jnp.float32)

    def channels(p, x):
        y = x @ p["up"]
        return (y @ p["down"]) * jnp.argmax(y, axis=-1).sum().astype(jnp.float32)

    x, params = arrays.normal(0, (5, 6)), shapes(up=(6, 8), down=(8, 4))
    expect(make(rows, x, params=params), down="up (rows)")
    expect(make(channels, x, params=params), down="nowhere: the output of up is also read by argmax")


# ------------------------------------------------------------------------------------------- convolutions

IMAGE = arrays.normal(0, (2, 8, 8, 3))


class Cnn(nn.Module):
    """conv, BatchNorm, relu, pool, conv, and what `last` does."""

    groups: int = 1
    relu: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="first")(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2)) if self.relu else nn.pool(x, 0.0, lax.add, (2, 2), (2, 2), "VALID")
        x = nn.Conv(8, (3, 3), feature_group_count=self.groups, name="second")(x)
        x = nn.relu(x)
        x = nn.Conv(5, (1, 1), name="third")(x)
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(groups):
    made = make(Cnn(groups), IMAGE)
    expect(
        made,
        first__kernel="nowhere: the model's input 0",
        second__kernel="norm/scale (gain), norm/bias (bias)",
        third__kernel="second/kernel (rows), second/bias (bias)",
        head__kernel="third/kernel (rows), third/bias (bias)",
    )
    assert made.graph.folds["second/kernel"].shape == (4,)
    assert made.graph.folds["head/kernel"].free == 5  # 4 x 4 positions of 5 channels
    [weight] = made.graph.folds["second/kernel"].consumers
    inner, outs = 4 // groups, 8 // groups
    wanted = [[(o // outs) * inner + i for o in range(8)] for i in range(inner)]
    np.testing.assert_array_equal(np.broadcast_to(weight.labels, (3, 3, inner, 8))[0, 0], wanted)
    expect_norms(made, {}, {"norm/scale": "only positive factors pass reduce_window_max"})


def test_a_batch_norm_before_a_convolution():
    made = make(Cnn(relu=False), IMAGE)
    expect(
        made,
        second__kernel="norm/scale (gain), norm/bias (bias)",
        third__kernel="second/kernel (rows), second/bias (bias)",
        head__kernel="third/kernel (rows), third/bias (bias)",
    )
    expect_norms(made, {"norm/scale": 1.0})


def test_a_convolution_beside_what_it_reads():
    class Beside(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(4, (3, 3), name="first")(x))
            x = jnp.concatenate([x, nn.Conv(2, (1, 1), name="side")(x)], axis=-1)
            return nn.Conv(3, (1, 1), name="last")(x)

    made = make(Beside(), IMAGE)
    expect(
        made,
        side__kernel="first/kernel (rows), first/bias (bias)",
        last__kernel="first/kernel (rows), side/kernel (rows), first/bias (bias), side/bias (bias)",
    )
    assert made.graph.folds["last/kernel"].free == 6
    # what `side` reads is scaled, and so is what it makes
    assert made.graph.folds["side/kernel"].also == ("last/kernel",)
    assert made.graph.folds["last/kernel"].also == ("side/kernel",)


# ---------------------------------------------------------------------------------------------------- MoE


def einsum_experts(p, y):
    """Every expert on every token, weighed by the router."""
    weights = jax.nn.softmax(y @ p["router"], axis=-1)
    hidden = jax.nn.silu(jnp.einsum("td,edf->etf", y, p["gate"])) * jnp.einsum("td,edf->etf", y, p["up"])
    return jnp.einsum("etd,te->td", jnp.einsum("etf,efd->etd", hidden, p["down"]), weights)


def dispatched_experts(p, y):
    """Tokens sent to the two best experts by one-hot einsums."""
    scores, chosen = lax.top_k(jax.nn.softmax(y @ p["router"], axis=-1), 2)
    mask = jax.nn.one_hot(chosen, 3, dtype=y.dtype).sum(1)
    sent = jnp.einsum("te,td->etd", mask, y)
    hidden = jax.nn.silu(jnp.einsum("etd,edf->etf", sent, p["gate"])) * jnp.einsum("etd,edf->etf", sent, p["up"])
    return jnp.einsum("etd,te->td", jnp.einsum("etf,efd->etd", hidden, p["down"]), mask) * scores.sum(-1, keepdims=True)


def ragged_experts(p, y):
    """Tokens sorted by their best expert, ragged dots, and rows put back."""
    best = jnp.argmax(y @ p["router"], axis=-1)
    order = jnp.argsort(best)
    sizes = jnp.bincount(best, length=3).astype(jnp.int32)
    sent = y[order]
    hidden = jax.nn.silu(lax.ragged_dot(sent, p["gate"], sizes)) * lax.ragged_dot(sent, p["up"], sizes)
    return jnp.zeros_like(y).at[order].set(lax.ragged_dot(hidden, p["down"], sizes))


@pytest.mark.parametrize("experts", [einsum_experts, dispatched_experts, ragged_experts])
def test_mixtures_of_experts(experts):
    def model(p, x):
        e = p["table"][x.ravel()]
        return e + experts(p, rms(e) * p["gain"])

    sizes = shapes(gain=(6,), router=(6, 3), gate=(3, 6, 8), up=(3, 6, 8), down=(3, 8, 6))
    made = make(model, TOKENS, params={"table": WORDS, **sizes})
    groups = {"gate": "gain (gain)"} if len(made.graph.groups) == 3 else {}
    expect(made, router="gain (gain)", down="up (rows)", **groups)
    for fold in (made.graph.folds[name] for name in ("router", *groups)):
        assert {a.path for a in fold.consumers} == {"router", "gate", "up"}
    if groups:  # the experts read dispatched rows of what the router reads
        assert made.graph.folds["router"].also == ("gate", "up") and made.graph.folds["gate"].also == ("router",)
    expect_norms(made, {"gain": 1.0})


def test_experts_written_to_a_buffer():
    def model(p, x):
        e = p["table"][x.ravel()]
        y = rms(e) * p["gain"]
        buffer = jnp.zeros((12, 6), y.dtype).at[jnp.arange(10) + 1].set(y)
        return jnp.tanh(buffer @ p["w"])[1:11] + e

    made = make(model, TOKENS, params={"table": WORDS, **shapes(gain=(6,), w=(6, 6))})
    expect(made, w="gain (gain)")
    expect_norms(made, {"gain": 1.0})


# --------------------------------------------------------------------------------------------- NNX and dtypes


class NnxMlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.up, self.down = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        e = self.embed(x)
        return e + self.down(nnx.relu(self.up(self.norm(e))))


def test_nnx_modules_are_updated_with_the_state():
    module = NnxMlp(nnx.Rngs(0))
    nnx.update(module, fill(nnx.state(module, nnx.Param)))
    graph = jqopt.trace(module, TOKENS)
    before = module(TOKENS)
    fold = graph.folds["down/kernel"]
    assert fold.describe() == "up/kernel (rows), up/bias (bias)"
    assert graph.folds["up/kernel"].describe() == "norm/scale (gain), norm/bias (bias)"
    nnx.update(module, transforms.fold_scale(graph, "down/kernel", powers_of_two(fold))(module))
    np.testing.assert_array_equal(module(TOKENS), before)
    nnx.update(module, transforms.fold_norms(graph)(module))
    assert (module.norm.scale[...] == 1).all()
    assert distance(module(TOKENS), before) <= 1e-5


def test_parameters_keep_their_dtype_and_transforms_can_be_compiled():
    def model(p, x):
        return (rms(x) * p["gain"]) @ p["w"].astype(jnp.float32)

    params = {"gain": jnp.ones(6, jnp.float32), "w": jnp.ones((6, 4), jnp.bfloat16)}
    graph = jqopt.trace(model, params, jnp.ones((5, 6)))
    scale = np.asarray([1, 2, 3, 4, 5, 6], np.float32)
    change = transforms.fold_scale(graph, "w", scale)
    new = jax.jit(change)(params)
    assert new["w"].dtype == jnp.bfloat16 and new["gain"].dtype == jnp.float32
    np.testing.assert_array_equal(new["w"][:, 0].astype(jnp.float32), scale)
    np.testing.assert_allclose(new["gain"], 1 / scale, rtol=1e-7)
    jax.tree.map(np.testing.assert_array_equal, new, change(params))
    assert jax.eval_shape(transforms.fold_norms(graph), params)["w"].shape == (6, 4)


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.fixture(scope="module")
def attention() -> Made:
    def model(p, x):
        y = rms(p["table"][x]) * p["gain"]
        q, k, v = ((y @ p[n]).reshape(2, 5, -1, 3) for n in "qkv")
        return jnp.tanh(attend(q, *(jnp.repeat(a, 2, axis=2) for a in (k, v))) @ p["o"]) @ p["head"]

    sizes = shapes(gain=(6,), q=(6, 12), k=(6, 6), v=(6, 6), o=(12, 6), head=(6, 5))
    return make(model, TOKENS, params={"table": WORDS, **sizes})


def test_a_group_without_a_target(attention):
    with pytest.raises(PlanError, match=r"^head: no parameter can take up .*: tanh \(test_folds.py:\d+ .* scale"):
        transforms.fold_scale(attention.graph, "head", np.ones(6))


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (np.ones(5), r"^q: the scale has shape \[5\], expected \[6\]: one for each channel"),
        (np.asarray([1, 1, 0, 1, 1, 1]), r"^q: scales must be positive and finite, and 1 of 6 aren't: 0.0 at \[2\]"),
        (np.asarray([1, -1, np.nan, 1, np.inf, 1]), r"^q: .*, and 3 of 6 aren't: -1.0 at \[1\].*Write 1 for a channel"),
    ],
)
def test_scales_that_are_none(attention, scale, message):
    with pytest.raises(PlanError, match=message):
        transforms.fold_scale(attention.graph, "q", scale)


def test_tied_channels_need_one_scale(attention):
    scale = np.arange(1, 13, dtype=np.float32)
    with pytest.raises(PlanError, match=r"^o: channels 0, 3 must have one scale, since v \(rows\).*project\(scale\)"):
        transforms.fold_scale(attention.graph, "o", scale)
    nearest = attention.graph.folds["o"].project(scale)
    np.testing.assert_allclose(nearest[[0, 3]], np.sqrt(1.0 * 4.0), rtol=1e-6)
    np.testing.assert_allclose(nearest[[8, 11]], np.sqrt(9.0 * 12.0), rtol=1e-6)
    transforms.fold_scale(attention.graph, "o", nearest)
    with pytest.raises(PlanError, match=r"^o: the scale has shape \[3\], expected \[12\]"):
        attention.graph.folds["o"].project(np.ones(3))
    np.testing.assert_array_equal(attention.graph.folds["o"].project(nearest), nearest)


def test_a_group_that_isnt_there(attention):
    with pytest.raises(TraceError, match=r"no group 'heat'.*Did you mean head"):
        transforms.fold_scale(attention.graph, "heat", np.ones(6))


def test_a_site_names_its_group(attention):
    np.testing.assert_array_equal(
        transforms.fold_scale(attention.graph, "v", np.full(6, 2))(attention.params)["k"], attention.params["k"] * 2
    )


def test_other_parameters(attention):
    change = transforms.fold_scale(attention.graph, "q", np.ones(6))
    with pytest.raises(PlanError, match="holds 6 arrays.*traced with 7"):
        change({k: v for k, v in attention.params.items() if k != "head"})
    with pytest.raises(PlanError, match=r"o: found \[6, 6\]"):
        change({**attention.params, "o": jnp.ones((6, 6))})


# ---------------------------------------------------------------------------------- what has gone wrong before


def test_a_scalar_on_the_way():
    def model(p, x):
        return ((x @ p["up"]) * p["temperature"]) @ p["down"]

    made = make(model, jnp.ones((5, 6)), params=shapes(up=(6, 8), temperature=(), down=(8, 4)))
    expect(made, down="up (rows)")


def test_a_long_chain_of_readers():
    def model(p, x):
        y = h = x @ p["up"]
        for _ in range(1200):
            y = jnp.abs(y)
        return h @ p["down"] + y @ p["other"]

    graph = jqopt.trace(model, fill(shapes(up=(6, 8), down=(8, 4), other=(8, 4))), jnp.ones((5, 6)))
    assert graph.folds["down"].describe() == "up (rows)" and graph.folds["down"].also == ("other",)
