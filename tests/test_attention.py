"""Attention found by its dataflow: roles, heads, keys, layers in scans; what is none, and why; what plans say of it."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import jqopt
from jqopt import _plan
from jqopt.hf.llama import LlamaConfig, LlamaForCausalLM
from tests.dataflow_zoo import shapes

CONFIG = LlamaConfig(64, 32, 48, 3, 4, 2, 8)
IDS = jax.ShapeDtypeStruct((2, 6), jnp.int32)
X = jnp.zeros((2, 5, 32))
Y = jnp.zeros((2, 7, 32))


def found(*arguments, **kwargs):
    return jqopt.trace(*arguments, **kwargs).attention


def roles(site):
    """{role: (the product's operand number, shape, channels, heads)}."""
    return {o.role: (o.operand, o.shape, o.channels, o.heads) for o in site.operands}


def projected(attend, kv=4, heads=4, d=8):
    """A plain function: q, k, v from three weights, then `attend`."""
    shape = {"q": (32, heads, d), "k": (32, kv, d), "v": (32, kv, d)}
    params = {n: jnp.zeros(s) for n, s in shape.items()}

    def model(params, x, y=None):
        y = x if y is None else y
        q, k, v = (jnp.einsum("btc,chd->bthd", z, params[n]) for n, z in (("q", x), ("k", y), ("v", y)))
        return attend(q, k, v)

    return model, params


# ------------------------------------------------------------------------------------------------- roles


@pytest.mark.parametrize("options", [{}, {"remat": True}], ids=["plain", "remat"])
def test_llama_unrolled(options):
    model = LlamaForCausalLM(CONFIG, **options)
    variables = jax.eval_shape(model.init, jax.random.key(0), IDS)
    attention = found(model, variables, IDS)
    assert [s.key for s in attention.sites] == [f"layers_{i}/self_attn" for i in range(3)]
    assert attention.others == {}
    for site in attention.sites:
        shape = {o.role: o.shape for o in site.operands}
        # grouped queries: 2 key heads, 2 queries each
        assert shape == {"q": (2, 6, 2, 2, 8), "k": (2, 6, 2, 8), "v": (2, 6, 2, 8), "p": (2, 2, 2, 6, 6)}
        assert site["k"].heads == site["v"].heads == (2,) and site["q"].heads == (2, 3)
        assert site["k"].channels == (3,) and site["p"].channels == (4,)
        assert site.bounded and site.outer == ()


@pytest.mark.parametrize("remat", [False, True])
def test_llama_in_a_scan(remat):
    model = LlamaForCausalLM(CONFIG, scan_layers=True, remat=remat)
    variables = jax.eval_shape(model.init, jax.random.key(0), IDS)
    [site] = found(model, variables, IDS).sites
    assert (site.key, site.outer, len(site.scans)) == ("layers/self_attn", (3,), 1)
    assert site["k"].shape == (2, 6, 2, 8) and site.bounded


def test_linen_attention():
    model = nn.MultiHeadDotProductAttention(4)
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    [site] = found(model, variables, X).sites
    assert roles(site)["q"][1:] == roles(site)["k"][1:] == ((2, 5, 4, 8), (3,), (2,))
    assert site["p"].shape == (2, 4, 5, 5) and site["v"].shape == (2, 5, 4, 8)
    assert site.bounded


def test_linen_cross_attention_tells_queries_from_keys():
    model = nn.MultiHeadDotProductAttention(4)
    variables = jax.eval_shape(model.init, jax.random.key(0), X, Y)
    [site] = found(model, variables, X, Y).sites
    assert {o.role: o.shape for o in site.operands} == {
        "q": (2, 5, 4, 8), "k": (2, 7, 4, 8), "v": (2, 7, 4, 8), "p": (2, 4, 5, 7),
    }  # fmt: skip


def test_linen_decoding_with_a_cache():
    """Five positions in the cache, one query: the keys are what `dynamic_update_slice` makes."""
    model = nn.MultiHeadDotProductAttention(4, decode=True)
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    [site] = found(model, variables, X[:, :1], mutable=["cache"]).sites
    assert site["q"].shape == (2, 1, 4, 8) and site["k"].shape == site["v"].shape == (2, 5, 4, 8)
    assert site["k"].heads == (2,) and site.key == "attention"


def test_nnx_attention():
    model = nnx.eval_shape(lambda: nnx.MultiHeadAttention(4, 32, rngs=nnx.Rngs(0), decode=False))
    [site] = found(model, X).sites
    assert site["k"].shape == (2, 5, 4, 8) and site["p"].channels == (4,) and site.bounded


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.1}], ids=str)
@pytest.mark.parametrize("kv", [4, 2, 1])
def test_jax_nn_attention(kv, options):
    attend = partial(jax.nn.dot_product_attention, implementation="xla", **options)
    model, params = projected(attend, kv)
    [site] = found(model, params, X, Y).sites
    # JAX repeats a single key head
    assert site["k"].shape[1] == site["v"].shape[1] == 7 and site["k"].shape[-1] == 8
    assert np.prod(site["q"].shape) == 2 * 5 * 4 * 8
    assert site.bounded


def test_scanned_by_lax_and_by_linen():
    model, params = projected(partial(jax.nn.dot_product_attention, implementation="xla"))
    stacked = jax.tree.map(lambda w: jnp.zeros((3, *w.shape)), params)

    def layers(params, x):
        def body(x, layer):
            return x + jax.checkpoint(model)(layer, x).reshape(x.shape), None

        return lax.scan(body, x, params)[0]

    [site] = found(layers, stacked, X).sites
    assert site.outer == (3,)

    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=4
            )  # fmt: skip
            return block(name="layers")(x, None)[0]

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.MultiHeadDotProductAttention(4, name="attn")(x), None

    variables = jax.eval_shape(Layers().init, jax.random.key(0), X)
    [site] = found(Layers(), variables, X).sites
    assert (site.key, site.outer) == ("layers/attn", (4,))


def swapped(q, k, v):
    """Keys first, values first, and the softmax over the axis before the last."""
    scores = jnp.einsum("bshd,bthd->bhst", k, q)
    return jnp.einsum("bshd,bhst->bthd", v, jax.nn.softmax(scores, axis=-2))


def by_logsumexp(q, k, v):
    scores = jnp.einsum("bthd,bshd->bhts", q, k)
    return jnp.einsum("bhts,bshd->bthd", jnp.exp(scores - jax.nn.logsumexp(scores, -1, keepdims=True)), v)


def divided_afterwards(q, k, v):
    scores = jnp.einsum("bthd,bshd->bhts", q, k)
    e = jnp.exp(scores - scores.max(-1, keepdims=True))
    return jnp.einsum("bhts,bshd->bthd", e, v) / e.sum(-1).transpose(0, 2, 1)[..., None]


def with_a_sink(q, k, v):
    """A learnt logit beside the keys', dropped after the softmax (gpt-oss)."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k)
    scores = jnp.concatenate([scores, jnp.zeros((*scores.shape[:-1], 1))], -1)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, -1)[..., :-1], v)


def flat(q, k, v):
    """Batch and heads in one axis, bfloat16 probabilities, a cap on the scores, a mask and a bias."""
    b, t, h, d = q.shape
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(b * h, -1, d) for x in (q, k, v))
    scores = 30 * jnp.tanh(jnp.einsum("ntd,nsd->nts", q, k) / 30) + jnp.ones((1, 1, k.shape[1]))
    scores = jnp.where(jnp.ones(scores.shape[1:], bool), scores, -jnp.inf)
    out = lax.batch_matmul(jax.nn.softmax(scores, -1).astype(jnp.bfloat16), v.astype(jnp.bfloat16))
    return out.reshape(b, h, t, d)


@pytest.mark.parametrize("attend", [swapped, by_logsumexp, divided_afterwards, with_a_sink, flat])
def test_ways_to_write_it(attend):
    model, params = projected(attend)
    attention = found(model, params, X, Y)
    [site] = attention.sites
    count = {o.role: int(np.prod(o.shape)) for o in site.operands}
    assert count == {"q": 2 * 5 * 4 * 8, "k": 2 * 7 * 4 * 8, "v": 2 * 7 * 4 * 8, "p": 2 * 4 * 5 * 7}
    assert (site["k"].shape[site["k"].channels[0]], site["v"].shape[site["v"].channels[0]]) == (8, 8)
    assert site["p"].shape[site["p"].channels[0]] == 7
    assert site["k"].address == site.address_qk and site["v"].address == site.address_pv
    # only where p is a quotient with its own sum is it known to be at most 1
    assert site.bounded == (attend in (swapped, with_a_sink, flat))
    assert attention.others == {}


def test_dropout_after_the_softmax_makes_p_larger():
    model = nn.MultiHeadDotProductAttention(4, dropout_rate=0.5, deterministic=False)
    rngs = {"dropout": jax.random.key(0)}
    variables = jax.eval_shape(model.init, {"params": jax.random.key(0), **rngs}, X)
    [site] = found(model, variables, X, rngs=rngs).sites
    assert not site.bounded


NAMES = (
    "transformer_rms transformer_general dense_attention general_attention mha fused_qkv reshaped_qkv gqa_repeat "
    "gqa_einsum rope_halves rope_strided rope_pairs vit_cls encoder_decoder lm_parallel nnx_mha"
)


@pytest.mark.parametrize("name", NAMES.split())
def test_models_of_the_zoo(name):
    built = shapes(name)
    attention = found(*built.arguments)
    assert attention.others == {}
    assert len(attention.sites) == (2 if name.startswith("transformer") else 1)
    for site in attention.sites:
        assert len(site["k"].heads) == len(site["v"].heads) == 1 and site.bounded
    if name == "encoder_decoder":
        assert attention.sites[0].key == "cross"
        assert attention.sites[0]["k"].shape[1] != attention.sites[0]["q"].shape[1]


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (2, 1), (3, 17)])
def test_keys_do_not_depend_on_shapes(shape):
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    model = LlamaForCausalLM(CONFIG)
    variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    assert [s.key for s in found(model, variables, ids).sites] == [f"layers_{i}/self_attn" for i in range(3)]


def test_one_attention_used_twice():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            attend = nn.MultiHeadDotProductAttention(4, name="attn")
            return attend(attend(x))

    variables = jax.eval_shape(Shared().init, jax.random.key(0), X)
    assert [s.key for s in found(Shared(), variables, X).sites] == ["attn", "attn#2"]


# ------------------------------------------------------------------------------------------------ no attention


def linear_attention(q, k, v):
    state = jnp.einsum("bshd,bshe->bhde", jnp.exp(k), v)
    return jnp.einsum("bthd,bhde->bthe", jnp.exp(q), state)


def sigmoid_attention(q, k, v):
    return jnp.einsum("bhts,bshd->bthd", jax.nn.sigmoid(jnp.einsum("bthd,bshd->bhts", q, k)), v)


def unnormalised(q, k, v):
    return jnp.einsum("bhts,bshd->bthd", jnp.exp(jnp.einsum("bthd,bshd->bhts", q, k)), v)


def two_sums(q, k, v):
    scores = jnp.einsum("bthd,bshd->bhts", q, k) + jnp.einsum("bthd,bshd->bhts", q[..., ::-1], k)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, -1), v)


@pytest.mark.parametrize(
    ("attend", "why"),
    [
        (linear_attention, "no softmax stands between two products"),
        (sigmoid_attention, "no softmax stands between two products"),
        (unnormalised, "is not summed over the axis"),
        (two_sums, "made of 2 products' results"),
        (lambda q, k, v: jnp.einsum("bthd,bshd->bhts", q, k), "reaches no other product through a softmax"),
    ],
    ids=["linear", "sigmoid", "unnormalised", "two sums", "similarity"],
)
def test_products_that_are_no_attention(attend, why):
    model, params = projected(attend)
    graph = jqopt.trace(model, params, X)
    attention = graph.attention
    assert attention.sites == ()
    products = {s.address for s in graph.sites if s.path is None}
    assert set(attention.others) == products and products
    assert all(why in reason for reason in attention.others.values())
    with pytest.raises(jqopt.PlanError, match="recipe 'unnamed' asks for kv_cache, but model has no attention") as told:
        jqopt.plan({"kv_cache": "fp8"}, graph)
    assert why in str(told.value) and "activations#1" in str(told.value)


def test_the_backward_pass_is_none():
    """A training step's gradients hold five products for one attention: only two of them are attention's."""
    model, params = projected(partial(jax.nn.dot_product_attention, implementation="xla"))

    def step(loss, params, x, y):
        return jax.grad(lambda p: loss(model(p, x, y)).sum())(params)

    for loss in (jnp.sum, jnp.square):  # a cotangent that depends on nothing, and one that depends on the inputs
        attention = found(partial(step, loss), params, X, Y)
        [site] = attention.sites
        assert site["k"].shape[1] == 7 and site["q"].shape[1] == 5
        assert attention.others and all(attention.others.values())


# ------------------------------------------------------------------------------------------------ plans


def linen_plan(recipe):
    model = nn.MultiHeadDotProductAttention(4)
    return jqopt.plan(recipe, jqopt.trace(model, jax.eval_shape(model.init, jax.random.key(0), X), X))


def test_a_plan_says_what_happens_to_attention():
    plan = linen_plan("defaults/mha_fp8")
    assert [(d.role, d.bounded, d.needs_data) for d in plan.attention] == [
        ("q", False, True), ("k", False, True), ("v", False, True), ("p", True, False),
    ]  # fmt: skip
    assert plan.needs_batches and not plan.needs_data and not plan.quantized
    lines = str(plan).splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("attention ")) :]
    words = [line.split()[1:4] for line in table[2:6]]
    assert words == [[role, "fp8/tensor", "static"] for role in "qkv"] + [["p", "fp8/tensor", "static,"]]
    assert "mha_fp8.yaml:5 attention.q" in table[2]
    assert (
        plan["activations#1"].reason
        == "multiplies two activations: q and k of attention; q and k quantized (see attention)"
    )
    assert (
        plan["activations#2"].reason
        == "multiplies two activations: p and v of attention; p and v quantized (see attention)"
    )


def test_rotation_is_of_queries_too():
    plan = linen_plan("defaults/kv_nvfp4_rotate")
    assert [(d.role, d.rotated, d.spec is None) for d in plan.attention] == [
        ("q", True, True), ("k", True, False), ("v", False, False),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["kv_fp8", "kv_fp8_cast", "kv_fp8_affine", "kv_nvfp4_rotate", "mha_fp8"])
def test_plans_round_trip(name):
    plan = linen_plan(f"defaults/{name}")
    data = json.loads(json.dumps(_plan.to_dict(plan)))
    again = _plan.from_dict(data, plan.function)
    assert again == plan and again.attention == plan.attention
    older = {**data, "version": 2}
    del older["attention"]
    assert _plan.from_dict(older).attention == ()


def test_a_recipe_with_weights_and_attention():
    plan = linen_plan({"rules": [{"match": "*/kernel", "weight": "int8"}], "kv_cache": "fp8"})
    assert len(plan.quantized) == 4 and len(plan.attention) == 2
    with pytest.raises(jqopt.PlanError, match="would quantize no weight"):
        linen_plan({"rules": [{"match": "*", "weight": "int8", "optional": True}, ], "kv_cache": "fp8"} | {
            "rules": [{"match": "nothing", "weight": "int8", "optional": True}]})  # fmt: skip


def test_no_attention_at_all():
    def model(params, x):
        return x @ params["w"]

    graph = jqopt.trace(model, {"w": jnp.zeros((32, 8))}, X)
    with pytest.raises(jqopt.PlanError, match="No two activations meet in a product"):
        jqopt.plan({"attention": {"p": "fp8"}}, graph)


def test_an_attention_that_was_not_traced():
    """A model that does more at run time than where it was traced."""
    model, params = projected(partial(jax.nn.dot_product_attention, implementation="xla"))

    def twice(params, x):
        y = model(params, x)
        return swapped(y, y, y) if x.shape[1] > 5 else y

    qm = jqopt.quantize_model(twice, "defaults/kv_fp8_cast", params=params, inputs=X)
    assert [d.key for d in qm.plan.attention] == ["attention", "attention"]
    qm(X)
    with pytest.raises(jqopt.PlanError, match=r"attention attention#2 .* appeared that the plan doesn't know"):
        qm(Y)


def test_affine_inside_a_shard_map_is_refused():
    model, params = projected(partial(jax.nn.dot_product_attention, implementation="xla"))
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    local = jax.shard_map(model, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec("data"))
    graph = jqopt.trace(local, params, X)
    [site] = graph.attention.sites
    assert site.sharded and site["k"].shape == (1, 5, 4, 8)
    assert len(jqopt.plan("defaults/kv_fp8", graph).attention) == 2
    with pytest.raises(jqopt.PlanError, match="affine takes one bias for each head and channel"):
        jqopt.plan("defaults/kv_fp8_affine", graph)


def test_sites_are_values():
    graph = jqopt.trace(*projected(swapped), X)
    assert dataclasses.replace(graph.attention.sites[0]) == graph.attention.sites[0]
