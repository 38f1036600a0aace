"""Rotations: what the dataflow lets turn, that the float function stays, and what is refused for which reason."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import jqopt
from jqopt import _hadamard, transforms
from jqopt.analysis import turns
from jqopt.analysis.axes import concat, fresh, product
from jqopt.analysis.fold_rules import Stop
from jqopt.analysis.fold_search import Program
from jqopt.analysis.rotations import rotatable
from jqopt.errors import PlanError, TraceError
from jqopt.hf.llama import LlamaConfig, LlamaForCausalLM, untie
from tests import dataflow_zoo as zoo

pytestmark = pytest.mark.quick


WORDS = jnp.asarray(np.random.default_rng(3).integers(0, 32, (2, 7)), jnp.int32)
CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip


def distance(new: jax.Array, old: jax.Array) -> float:
    return float(jnp.abs(new - old).max() / jnp.abs(old).max())


def orthogonal(size: int, keep_mean: bool, seed: int) -> np.ndarray:
    """A dense random orthogonal matrix; with `keep_mean` one whose rows sum to 1."""
    draw = np.random.default_rng(seed)
    if not keep_mean:
        return np.linalg.qr(draw.normal(size=(size, size)))[0]
    basis = np.linalg.qr(np.c_[np.ones(size), draw.normal(size=(size, size - 1))])[0]
    inner = np.eye(size)
    inner[1:, 1:] = np.linalg.qr(draw.normal(size=(size - 1, size - 1)))[0]
    return basis @ inner @ basis.T


@functools.cache
def llama(scan: bool = False, tied: bool = False, dtype: str = "float32"):
    """(graph, random parameters with gains that vary, compiled call) of a small Llama."""
    config = LlamaConfig(**{**CONFIG.__dict__, "tie_word_embeddings": tied})
    model = LlamaForCausalLM(config, scan_layers=scan)
    params = zoo.fill(jax.eval_shape(model.init, jax.random.key(0), WORDS))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    run = jax.jit(lambda p: model.apply(p, WORDS), compiler_options={"xla_backend_optimization_level": 0})
    return jqopt.trace(model, params, WORDS), params, run


# ------------------------------------------------------------------------------------------ all test models

EMBED = "embed/embedding[1]"
RMS = {  # model -> (residual streams, widths of value heads)
    "transformer_rms": (["attn0/k/kernel[0]"], ["attn0/o/kernel[0].1", "attn1/o/kernel[0].1"]),
    "transformer_general": (["attn0/k/kernel[0]"], ["attn0/o/kernel[1]", "attn1/o/kernel[1]"]),
    "general_attention": ([EMBED], ["part/k/bias[1]", "part/o/kernel[1]"][1:]),
    "fused_qkv": ([EMBED], ["part/o/kernel[0].1"]),
    "reshaped_qkv": ([EMBED], ["part/o/kernel[0].1"]),
    "gqa_repeat": ([EMBED], ["part/o/kernel[0].2"]),
    "gqa_einsum": ([EMBED], ["part/o/kernel[0].2"]),
    "rope_pairs": ([EMBED], ["part/o/kernel[0].1"]),
    "gate_up_pairs": ([EMBED], []),
    "llama": (["embed_tokens/embedding[1]"], [f"layers_{i}/self_attn/o_proj/kernel[0].2" for i in range(3)]),
    "llama_scan_remat": (["embed_tokens/embedding[1]"], ["layers/self_attn/o_proj/kernel[1].2"]),
    "moe_top_k": ([EMBED], []),
    "moe_ragged": ([EMBED], []),
    "encoder_decoder": (["cross/k/kernel[0]", "cross/o/bias[0]"], ["cross/o/kernel[0].1"]),
    "nnx_mha": ([EMBED], ["mha/out/kernel[1]"]),
    "pallas": (["after/bias[0]"], []),
}
LAYER = {  # those whose streams a LayerNorm reads
    "transformer_layer": ["attn0/k/kernel[0]"],
    "vit_cls": ["attn/mha/key/kernel[0]"],
    "lm_parallel": ["attn/k/kernel[0]"],
    "nnx_stack": ["block/down/bias[0]"],
}
FAST = ("fused_qkv", "llama_scan_remat", "encoder_decoder", "moe_ragged", "transformer_layer", "nnx_stack")


def all_rotatable(graph, keep_mean):
    program = Program(graph.flow, {})
    return [rotatable(program, graph.axes, c.name, keep_mean) for c in graph.classes if c.size > 1]


def marked(names):
    return [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in names]


@pytest.mark.parametrize("keep_mean", [False, True])
@pytest.mark.parametrize("name", marked(zoo.CASES))
def test_every_class_of_every_model_turns_and_nothing_changes_or_says_why_not(name, keep_mean):
    built = zoo.build(name)
    graph, params, run = jqopt.trace(*built.arguments), zoo.state(built), zoo.runner(built)
    found = all_rotatable(graph, keep_mean)
    able = [f for f in found if not f.reason]
    assert all(len(f.reason) > 10 for f in found if f.reason)
    streams = sorted(f.name for f in able if f.adds)
    expected = [*RMS.get(name, ([], []))[0], *(LAYER.get(name, []) if keep_mean else [])]
    if name in RMS or name in LAYER:
        assert streams == sorted(expected)
        if name in RMS:
            assert [f.name for f in able if f.mixes and not f.adds] == RMS[name][1]
    if not able:
        return
    folded = transforms.fold_norms(graph)(params)
    stuck = [f for f in able if name == "lm_tied" and f.adds]  # the last norm's gain can't go into a tied head
    able = [f for f in able if f not in stuck]
    matrices = {f.name: orthogonal(f.size, keep_mean, i) for i, f in enumerate(able)}
    turn = transforms.rotate(graph, list(matrices), keep_mean=keep_mean, matrices=matrices)
    assert distance(run(turn(folded)), run(params)) < 1e-5
    for f in stuck:
        with pytest.raises(PlanError, match=r"norm/scale multiplies it, .* a head that shares the embedding's table"):
            transforms.rotate(graph, f.name, keep_mean=keep_mean, matrices={f.name: orthogonal(14, True, 0)})(folded)


# ------------------------------------------------------------------------------------------- what it does


def test_the_weights_are_those_of_the_papers():
    graph, params, _ = llama()
    params = transforms.fold_norms(graph)(params)
    one, two = transforms.rotate_residual(graph, seed=5), transforms.rotate_values(graph, seed=9)
    r1 = one.matrices["embed_tokens/embedding[1]"].astype(np.float64)
    np.testing.assert_allclose(r1, np.diag(_hadamard.signs(64, 5)) @ _hadamard.matrix(64), atol=1e-7)
    r2 = two.matrices["layers_1/self_attn/o_proj/kernel[0].2"].astype(np.float64)
    np.testing.assert_allclose(r2, np.diag(_hadamard.signs(16, 10)) @ _hadamard.matrix(16), atol=1e-7)
    new, old = two(one(params))["params"], params["params"]

    def close(found, wanted):
        np.testing.assert_allclose(found, wanted, atol=3e-6)

    close(new["embed_tokens"]["embedding"], old["embed_tokens"]["embedding"] @ r1)
    close(new["lm_head"]["kernel"], r1.T @ old["lm_head"]["kernel"])
    layer, was = new["layers_1"], old["layers_1"]
    for name in ("q_proj", "k_proj"):
        close(layer["self_attn"][name]["kernel"], r1.T @ was["self_attn"][name]["kernel"])
    v = (r1.T @ was["self_attn"]["v_proj"]["kernel"]).reshape(64, 2, 16) @ r2
    close(layer["self_attn"]["v_proj"]["kernel"], v.reshape(64, 32))
    o = (was["self_attn"]["o_proj"]["kernel"] @ r1).reshape(4, 16, 64)
    close(layer["self_attn"]["o_proj"]["kernel"], np.einsum("hde,df->hfe", o, r2).reshape(64, 64))
    for name in ("gate_proj", "up_proj"):
        close(layer["mlp"][name]["kernel"], r1.T @ was["mlp"][name]["kernel"])
    close(layer["mlp"]["down_proj"]["kernel"], was["mlp"]["down_proj"]["kernel"] @ r1)
    np.testing.assert_array_equal(layer["input_layernorm"]["scale"], 1)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("options", [{}, {"block": 32}, {"keep_mean": True}, {"keep_mean": True, "block": 16}])
def test_a_llama_computes_the_same(scan, options):
    graph, params, run = llama(scan)
    folded = transforms.fold_norms(graph)(params)
    one = transforms.rotate_residual(graph, 1, **options)
    two = transforms.rotate_values(graph, 2, block=8 if "block" in options else None)
    assert one.classes == ("embed_tokens/embedding[1]",) and one.left == {}
    before = jax.tree.map(np.array, folded)
    new = two(one(folded))
    assert distance(run(new), run(params)) < 1e-5
    jax.tree.map(np.testing.assert_array_equal, before, folded)  # the caller's tree stays
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), new, before)
    names = {jax.tree_util.keystr(k, simple=True, separator="/") for k, v in
             jax.tree_util.tree_flatten_with_path(moved)[0] if v > 1e-3}  # fmt: skip
    assert names == {f"params/{n}" for n in (*one.turned, *two.turned)}
    (matrix,) = one.matrices.values()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(64), atol=1e-6)
    if "keep_mean" in options:
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
        assert not np.allclose(matrix, np.eye(64), atol=0.3)


def test_r1_alone_leaves_the_inputs_of_o_and_down():
    graph, params, _ = llama()
    folded = transforms.fold_norms(graph)(params)

    @jax.jit
    def inputs(variables):
        seen = {}

        def watch(call, args, kwargs, context):
            if isinstance(context.module, nn.Dense):
                seen["/".join(context.module.path)] = args[0]
            return call(*args, **kwargs)

        with nn.intercept_methods(watch):
            LlamaForCausalLM(CONFIG).apply(variables, WORDS)
        return seen

    before = inputs(folded)
    after = inputs(transforms.rotate_residual(graph)(folded))
    both = inputs(transforms.rotate_values(graph)(folded))
    for name in before:
        last = name.split("/")[-1]
        assert (distance(after[name], before[name]) < 1e-5) == (last in ("o_proj", "down_proj")), name
        assert (distance(both[name], before[name]) < 1e-5) == (last != "o_proj"), name


@pytest.mark.parametrize("keep_mean", [False, True])
def test_outlier_channels_are_spread(keep_mean):
    """QuaRot's claim: what was 20-fold in single channels comes near the maximum of K Gaussians, sqrt(2 ln K)."""
    width, tokens = 512, 200
    draw = np.random.default_rng(0)
    table = draw.normal(size=(tokens, width)).astype(np.float32)
    table[:, draw.choice(width, 4, replace=False)] *= 30.0

    def model(p, ids):
        x = p["table"][ids]
        x = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True))
        return x @ p["head"]

    params = {"table": table, "head": draw.normal(size=(width, 8)).astype(np.float32)}
    graph = jqopt.trace(model, params, jnp.arange(3))
    new = transforms.rotate(graph, "table[1]", keep_mean=keep_mean)(params)

    def peak(x):
        return np.mean(np.abs(x).max(1) / np.sqrt((x**2).mean(1)))

    limit = math.sqrt(2 * math.log(width))  # 3.53
    assert peak(table) > 13
    # Four outliers of 30 carry most of the energy, so the sum of few terms is less than Gaussian: below the limit.
    assert 2 < peak(new["table"]) < limit * 1.05


def test_types_and_kinds_of_arrays_stay():
    graph, params, _ = llama(dtype="bfloat16")
    folded = transforms.fold_norms(graph)(params)
    turn = transforms.rotate_residual(graph)
    new = turn(folded)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(new))
    # Rounded once: half a unit in the last place, 2^-9, of the turned value.
    table = np.asarray(folded["params"]["embed_tokens"]["embedding"], np.float64)
    exact = table @ turn.matrices["embed_tokens/embedding[1]"].astype(np.float64)
    found = np.asarray(new["params"]["embed_tokens"]["embedding"], np.float64)
    assert (np.abs(found - exact) <= 2.0**-8 * np.abs(exact) + 1e-6).all()
    host = turn(jax.tree.map(np.asarray, folded))
    assert isinstance(host["params"]["embed_tokens"]["embedding"], np.ndarray)
    jax.tree.map(np.testing.assert_array_equal, host, jax.tree.map(np.asarray, new))


def test_under_jit_and_with_matrices_that_are_learned():
    graph, params, _ = llama()
    folded = transforms.fold_norms(graph)(params)
    turn = transforms.rotate_values(graph)
    plain, traced = turn(folded), jax.jit(turn)(folded)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), traced, plain)
    name = turn.classes[0]

    def loss(matrix):  # the model is blind to an orthogonal matrix, and not to another one
        logits = LlamaForCausalLM(CONFIG).apply(turn.with_matrices({name: matrix})(folded), WORDS)
        return jnp.sum(jnp.square(jnp.asarray(logits)))

    q = jnp.asarray(turn.matrices[name])
    slope = jax.jit(jax.grad(loss))(q)
    skew = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)
    along = float(jnp.vdot(slope, q @ (skew - skew.T)))  # a direction in which it stays orthogonal
    assert abs(along) < 1e-3 * float(jnp.linalg.norm(slope) * np.linalg.norm(skew - skew.T))
    assert float(jnp.linalg.norm(slope)) > 1


def test_a_tied_head_must_be_untied():
    graph, params, run = llama(tied=True)
    folded = transforms.fold_norms(graph)(params)
    with pytest.raises(PlanError, match=r"norm/scale multiplies it.*fold_norms\(graph\)\(params\).*llama\.untie"):
        transforms.rotate_residual(graph)(folded)
    config, free = untie(LlamaConfig(**{**CONFIG.__dict__, "tie_word_embeddings": True}), params)
    model = LlamaForCausalLM(config)
    graph = jqopt.trace(model, free, WORDS)
    new = transforms.rotate_residual(graph)(transforms.fold_norms(graph)(free))
    assert distance(jnp.asarray(model.apply(new, WORDS)), run(params)) < 1e-5
    assert untie(config, free) == (config, free)


# ---------------------------------------------------------------------------------------------- one rule each

V = 6
A = {"a": (5, V), "b": (V, V), "c": (V,), "d": (V, 3)}
PARAMS = {n: jnp.asarray(np.random.default_rng(i).normal(size=s), jnp.float32) for i, (n, s) in enumerate(A.items())}
X = jnp.asarray(np.random.default_rng(9).normal(size=(4, 5)), jnp.float32)
MASK = np.arange(4 * V).reshape(4, V) % 3 == 0


def norm(x):
    return x * lax.rsqrt((x * x).sum(-1, keepdims=True) / V + 1e-6)


def half_a_norm(x, start):
    return x / (lax.dynamic_slice_in_dim(x, start, 3, 1) ** 2).sum(-1, keepdims=True)


def carried(p, x):
    return lax.fori_loop(0, 3, lambda _, h: h + norm(h) @ p["b"], x @ p["a"]) @ p["d"]


def from_zeros(p, x):
    return lax.fori_loop(0, 3, lambda _, h: h * 0.5 + x @ p["a"], jnp.zeros((4, V))) @ p["d"]


def online_softmax(p, x):
    """Attention in chunks, its sum rescaled on the way: values that start as zeros."""
    values = (x @ p["a"]).reshape(2, 2, V)

    def step(carry, v):
        total, high = carry
        scores = x[:, :2]
        now = jnp.maximum(high, scores.max(-1))
        weights = jnp.exp(scores - now[:, None])
        return (total * jnp.exp(high - now)[:, None] + weights @ v, now), None

    return lax.scan(step, (jnp.zeros((4, V)), jnp.zeros(4)), values)[0][0] @ p["d"]


def cache(p, x):
    kept = lax.dynamic_update_slice(jnp.zeros((9, V)), x @ p["a"], (2, 0))
    return kept @ p["d"]


PASSES = {
    "add": lambda p, x: (x @ p["a"] + p["c"]) @ p["d"],
    "residual": lambda p, x: (lambda h: h + norm(h) @ p["b"])(x @ p["a"]) @ p["d"],
    "half": lambda p, x: (x @ p["a"]).astype(jnp.bfloat16).astype(jnp.float32) @ (p["d"] * 2),
    "inner": lambda p, x: jnp.einsum("bi,ci->bc", x @ p["a"], x @ p["a"] * 3),
    "norm of a weight": lambda p, x: x @ p["a"] @ (p["d"] / jnp.linalg.norm(p["d"], axis=0)),
    "moves": lambda p, x: (x @ p["a"])[::-1].reshape(2, 2, V).transpose(2, 0, 1)[:, 1].T @ p["d"],
    "rows": lambda p, x: jnp.where(x[:, :1] > 0, x @ p["a"], 0) @ p["d"],
    "picked": lambda p, x: jnp.take(x @ p["a"], jnp.argmax(x, 0), axis=0) @ p["d"],
    "summed": lambda p, x: jnp.cumsum(x @ p["a"], 0) @ p["d"],
    "cond": lambda p, x: lax.cond(x[0, 0] > 0, lambda h: h, lambda h: -h, x @ p["a"]) @ p["d"],
    "carried": carried,
    "from zeros": from_zeros,
    "online softmax": online_softmax,
    "cache": cache,
    "joined": lambda p, x: jnp.concatenate([x @ p["a"], jnp.zeros((2, V))]) @ p["d"],
    "side by side": lambda p, x: (jnp.concatenate([x @ p["a"], x], -1) @ jnp.concatenate([p["d"], jnp.ones((5, 3))])),
}  # fmt: skip
REFUSED = {
    "relu": (lambda p, x: jax.nn.relu(x @ p["a"]) @ p["d"], r"^max \(test_rotations.*\) is not linear in it"),
    "cube": (lambda p, x: (x @ p["a"]) ** 3 @ p["d"], r"^integer_pow .* is not linear in it"),
    "max": (lambda p, x: (x @ p["a"]).max(0) @ p["d"], r"^reduce_max .* is not linear in it"),
    "square alone": (lambda p, x: (x @ p["a"]) ** 2 @ p["d"], r"^dot_general .* is not linear in it"),
    "mean": (lambda p, x: (lambda h: h - h.mean(-1, keepdims=True))(x @ p["a"]) @ p["d"], r"^reduce_sum .* sums along"),
    "half a norm": (
        lambda p, x: half_a_norm(x @ p["a"], jnp.argmax(x[0])) @ p["d"],
        r"takes its positions apart",
    ),
    "input": (lambda p, x: (jnp.pad(x, ((0, 0), (0, 1))) + p["c"]) @ p["d"], r"takes it together with the output of"),
    "constant": (lambda p, x: (x @ p["a"] + np.arange(V, dtype=np.float32)) @ p["d"], r"add .* does not turn with it"),
    "one": (lambda p, x: (x @ p["a"] + 1) @ p["d"], r"add .* takes it together with the number 1"),
    "angles": (lambda p, x: (x @ p["a"] * lax.iota(jnp.float32, V)) @ p["d"], r"multiplies it by .* not the same"),
    "mask": (lambda p, x: jnp.where(MASK, x @ p["a"], 0) @ p["d"], r"select_n .* chooses differently along it"),
    "dropped": (lambda p, x: (x @ p["a"]).at[:, 2].set(0) @ p["d"], r"takes it together with|positions apart"),
    "swapped": (lambda p, x: (x @ p["a"])[:, ::-1] @ p["d"], r"contracts it with d, which does not turn"),
    "cumulative": (lambda p, x: jnp.cumsum(x @ p["a"], 1) @ p["d"], r"cumsum .* takes its positions apart"),
    "output": (lambda p, x: x @ p["a"], r"it is axis 1 of the model's output"),
    "returned": (lambda p, x: (x @ p["a"] @ p["d"], 1 * p["d"]), r"it is axis 0 of the model's output"),
    "whole numbers": (lambda p, x: (x @ p["a"]).astype(jnp.int32).astype(jnp.float32) @ p["d"], r"is not linear in it"),
    "batch": (lambda p, x: jnp.einsum("bi,ij->bij", x @ p["a"], p["d"]).sum(1), r""),
    "sorted": (lambda p, x: jnp.sort(x @ p["a"], -1) @ p["d"], r"sort .* is not linear in it"),
    "by layer": (
        lambda p, x: lax.scan(lambda h, w: (h + w.sum(), None), x.sum(), p["d"])[0],
        r"a scan .* takes its positions apart",
    ),
    "unlike": (lambda p, x: lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h), x @ p["a"]) @ p["d"], r"is not linear in it"),
    "comes back else": (
        lambda p, x: lax.fori_loop(0, 2, lambda _, h: jnp.ones((4, V)), x @ p["a"]) @ p["d"],
        r"does not come back as it went in",
    ),
}  # fmt: skip


def one_class(call, symbol="d[0]"):
    """(graph, what is found of the classes in an axis) of a function."""
    graph = jqopt.trace(call, jax.eval_shape(lambda p: p, PARAMS), X)
    names = [c.name for c in graph.classes if symbol in c.symbols]
    return graph, [rotatable(Program(graph.flow, {}), graph.axes, n) for n in names]


@pytest.mark.parametrize("name", PASSES)
def test_what_passes(name):
    call = PASSES[name]
    graph, (found,) = one_class(call, "a[1]")
    assert found.reason == ""
    new = transforms.rotate(graph, found.name, matrices={found.name: orthogonal(V, False, 1)})(PARAMS)
    assert distance(new["a"], PARAMS["a"]) > 0.1
    # bfloat16 rounds six terms of up to 16 by 2^-9 of each, in both; the loop multiplies what is rounded.
    tolerance = {"half": 0.4, "carried": 1e-4}.get(name, 1e-5)
    np.testing.assert_allclose(call(new, X), call(PARAMS, X), atol=tolerance)
    assert found.adds == (name in ("residual", "carried"))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    call, why = REFUSED[name]
    graph, found = one_class(call, "a[1]" if name == "output" else "d[0]")
    assert found and all(f.reason for f in found)
    assert any(re.search(why, f.reason) for f in found), [f.reason for f in found]
    with pytest.raises(PlanError, match=r"can't be rotated: "):
        transforms.rotate(graph, found[0].name, matrices={found[0].name: np.eye(found[0].size)})


def test_a_constant_may_be_added_where_the_mean_is_kept():
    def call(p, x):
        h = x @ p["a"] + 1
        return (h - h.mean(-1, keepdims=True)) @ p["d"]

    graph, (found,) = one_class(call)
    assert "number 1" in found.reason
    new = transforms.rotate(graph, "d[0]", keep_mean=True, matrices={found.name: orthogonal(V, True, 1)})(PARAMS)
    np.testing.assert_allclose(call(new, X), call(PARAMS, X), atol=1e-5)
    with pytest.raises(PlanError, match=r"keep_mean needs a matrix whose rows sum to 1; they are off by"):
        transforms.rotate(graph, "d[0]", keep_mean=True, matrices={found.name: orthogonal(V, False, 1)})


def test_a_gain_must_be_the_same_all_along():
    def call(p, x):
        return (norm(x @ p["a"]) * (1 + p["c"])) @ p["d"]

    graph, (found,) = one_class(call)
    assert found.constant == {"c": (0,)} and "c" not in found.turned
    turn = transforms.rotate(graph, found.name, matrices={found.name: orthogonal(V, False, 1)})
    with pytest.raises(PlanError, match=r"c multiplies it, and its entries aren't the same along axis 0.*fold_norms"):
        turn(PARAMS)
    flat = {**PARAMS, "c": jnp.full(V, 0.7)}  # weakly typed, so no parameter but another leaf when it is traced
    weak = jqopt.trace(call, flat, X)
    assert rotatable(Program(weak.flow, {}), weak.axes, found.name).constant == {"c": (0,)}
    np.testing.assert_allclose(call(turn(flat), X), call(flat, X), atol=1e-5)
    folded = transforms.fold_norms(graph)(PARAMS)
    np.testing.assert_allclose(call(turn(folded), X), call(PARAMS, X), atol=1e-5)


def test_gains_of_layers_that_are_picked_by_number_and_tables_that_are_compared():
    def layers(p, x):
        return lax.fori_loop(0, 2, lambda i, h: h + norm(h) * p["gains"][i] @ p["b"], x @ p["a"]) @ p["d"]

    params = {**PARAMS, "gains": jnp.ones((2, V)) * jnp.asarray([[0.5], [2.0]])}
    graph = jqopt.trace(layers, params, X)
    turn = transforms.rotate(graph, "d[0]", matrices={graph.class_of("d[0]").name: orthogonal(V, False, 1)})
    assert turn.found[0].constant == {"gains": (1,)}
    np.testing.assert_allclose(layers(turn(params), X), layers(params, X), atol=1e-4)

    def compared(p, ids):
        return (p["a"][ids] * p["a"][ids + 1]).sum(-1)

    graph = jqopt.trace(compared, PARAMS, jnp.arange(3))
    turn = transforms.rotate(graph, "a[1]", matrices={"a[1]": orthogonal(V, False, 1)})
    np.testing.assert_allclose(compared(turn(PARAMS), jnp.arange(3)), compared(PARAMS, jnp.arange(3)), atol=1e-5)
    whole = {"table": jnp.ones((4, V), jnp.int8), "d": PARAMS["d"]}
    graph = jqopt.trace(lambda p, i: p["table"][i].astype(jnp.float32) @ p["d"], whole, jnp.arange(3))
    with pytest.raises(PlanError, match=r"table is int8, not floating point"):
        transforms.rotate(graph, "d[0]")


# --------------------------------------------------------------------------------------------------- messages


def test_messages():
    graph, _, _ = llama()
    stream = "embed_tokens/embedding[1]"
    with pytest.raises(PlanError, match=r"embedding\[1\]: .* 64 can't .* blocks of 24: 24 does not divide it"):
        transforms.rotate_residual(graph, block=24)
    with pytest.raises(PlanError, match=r"found a matrix \[3, 3\], expected \[64, 64\]"):
        transforms.rotate(graph, stream, matrices={stream: np.eye(3)})
    with pytest.raises(PlanError, match=r"the matrix isn't orthogonal: M @ M.T is off the unit matrix by 3"):
        transforms.rotate(graph, stream, matrices={stream: 2 * np.eye(64)})
    with pytest.raises(
        PlanError, match=r"'embed' is none of the classes that turn; write 'embed_tokens/embedding\[1\]'"
    ):
        transforms.rotate(graph, stream, matrices={"embed": np.eye(64)})
    with pytest.raises(TraceError, match=r"has no axis 'nowhere\[0\]'"):
        transforms.rotate(graph, "nowhere[0]")
    built = zoo.build("transformer_layer")
    layered = jqopt.trace(*built.arguments)
    with pytest.raises(PlanError, match=r"no residual stream that can be rotated: .* LayerNorm.* keep_mean=True"):
        transforms.rotate_residual(layered)
    built = zoo.build("cnn")
    with pytest.raises(
        PlanError, match=r"has no width of value heads that can be rotated: none of its \d+ axis classes"
    ):
        transforms.rotate_values(jqopt.trace(*built.arguments))


# ----------------------------------------------------------------------------------------------------- labels


def test_labels_of_products_and_segments():
    leaf, other = fresh(2), fresh(3)
    assert turns.of_node(other, leaf) is None
    np.testing.assert_array_equal(turns.of_node(product([other, leaf]), leaf), [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(turns.of_node(product([leaf, other]), leaf), [0, 2, 4, 1, 3, 5])
    held = concat([other, leaf, leaf])
    np.testing.assert_array_equal(turns.of_node(held, leaf), [-1, -1, -1, 0, 1, 2, 3])
    np.testing.assert_array_equal(turns.positions(np.asarray([-1, -1, -1, 0, 1, 2, 3]), 2), [[3, 4], [5, 6]])
    per_head = product([fresh(2), concat([other, leaf])])  # heads x [q | v]
    np.testing.assert_array_equal(turns.of_node(per_head, leaf), [-1, -1, -1, 0, 1, -1, -1, -1, 2, 3])
    with pytest.raises(Stop):
        turns.of_node(product([leaf, leaf]), leaf)


def test_labels_through_a_reshape():
    whole = np.arange(6, dtype=np.int32)
    assert turns.same(turns.reshaped({1: whole}, (4, 6), (2, 2, 6), 6), {2: whole})
    assert turns.same(turns.reshaped({1: whole}, (4, 6), (4, 1, 6), 6), {2: whole})
    heads = turns.reshaped({2: np.arange(3, dtype=np.int32)}, (4, 2, 3), (4, 6), 3)
    np.testing.assert_array_equal(heads[1], [0, 1, 2, 3, 4, 5])
    assert turns.same(turns.reshaped(heads, (4, 6), (4, 2, 3), 3), {2: np.arange(3)})
    outer = turns.reshaped({1: np.arange(2, dtype=np.int32)}, (4, 2, 3), (4, 6), 2)
    np.testing.assert_array_equal(outer[1], [0, 2, 4, 1, 3, 5])
    with pytest.raises(Stop):
        turns.reshaped({1: whole}, (4, 6), (4, 2, 3), 6)
    with pytest.raises(Stop):
        turns.canonical(np.asarray([0, 1, 2], np.int32), 2)
