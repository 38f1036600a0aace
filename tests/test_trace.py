"""Tracing: every site of a model is found, with its parameter, axes, module, group and reason; from shapes only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jqopt
from jqopt.hf.llama import LlamaConfig, LlamaForCausalLM
from tests import arrays, zoo

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
)  # fmt: skip
TOKENS = jax.ShapeDtypeStruct((2, 8), jnp.int32)


def llama_graph(scan: bool, remat: bool = False):
    model = LlamaForCausalLM(CONFIG, scan_layers=scan, remat=remat)
    return jqopt.trace(model, jax.eval_shape(model.init, jax.random.key(0), TOKENS), TOKENS)


def names(graph) -> list[str]:
    return [s.key for s in graph.sites if s.path is not None]


LAYER = ["self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj", "self_attn/o_proj"]
LAYER += ["mlp/gate_proj", "mlp/up_proj", "mlp/down_proj"]


@pytest.mark.parametrize("remat", [False, True])
def test_llama_unrolled_and_scanned(remat):
    scanned = llama_graph(True, remat)
    table = ["embed_tokens/embedding"], ["embed_tokens/embedding#2"]
    assert names(scanned) == [*table[0], *(f"layers/{n}/kernel" for n in LAYER), *table[1]]
    layers = [f"layers_{i}/{n}/kernel" for i in range(3) for n in LAYER]
    assert names(llama_graph(False, remat)) == [*table[0], *layers, *table[1]]


def test_groups_are_q_k_v_and_gate_up():
    groups = [[s.path for s in g] for g in llama_graph(True).groups]
    layer = "layers/{}/kernel".format
    assert [layer(f"self_attn/{n}_proj") for n in "qkv"] in groups
    assert [layer("mlp/gate_proj"), layer("mlp/up_proj")] in groups
    assert [layer("self_attn/o_proj")] in groups and [layer("mlp/down_proj")] in groups


def test_tied_table_is_known_to_be_used_twice():
    embed = [s for s in llama_graph(True).sites if s.path == "embed_tokens/embedding"]
    assert [s.op for s in embed] == ["gather", "dot_general"]
    assert all(s.used_by == {"gather", "dot_general"} for s in embed)
    assert all(s.contracted == CONFIG.hidden_size for s in embed)


def test_scanned_sites_carry_the_layer_axis():
    site = next(s for s in llama_graph(True).sites if s.path == "layers/mlp/up_proj/kernel")
    assert site.shape == (3, 32, 48) and site.outer == (3,) and len(site.scans) == 1
    layout = site.layout
    assert [layout.atoms[i] for i in layout.stack] == [3]
    assert (layout.n, layout.k) == (48, 32)


def test_attention_products_are_listed_with_their_reason():
    acts = [s for s in llama_graph(False).sites if s.path is None]
    assert len(acts) == 2 * 3 and {s.reason for s in acts} == {"multiplies two activations"}


def test_module_paths_and_classes():
    graph = jqopt.trace(*zoo_case(zoo.MHA))
    assert {(s.module_path, s.module) for s in graph.sites if s.path} == {
        (f"MultiHeadDotProductAttention_0/{n}", "DenseGeneral") for n in ("query", "key", "value", "out")
    }


def zoo_case(cls):
    return zoo.build(cls)


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (zoo.Split, [("w", 64), ("w#2", 64)]),
        (zoo.MoE, [("w", 64)]),
        (zoo.MoEBatched, [("w", 64)]),
        (zoo.Ragged, [("w", 64)]),
        (zoo.StackedByHand, [("w", 64), ("w#2", 64), ("w#3", 64)]),
        (zoo.Shared, [("Dense_0/kernel", 64), ("Dense_0/kernel#2", 64)]),
        (zoo.Conv, [("Conv_0/kernel", 3)]),
        (zoo.CustomVjp, [("w", 64)]),
        (zoo.WhileDense, [("w", 64)]),
        (zoo.Einsum3, [("w", 64), ("v", 32)]),
    ],
)
def test_sites_and_contracted_lengths(cls, expected):
    graph = jqopt.trace(*zoo_case(cls))
    assert [(s.key, s.contracted) for s in graph.sites if s.path] == expected
    assert all(s.reason is None for s in graph.sites if s.path)


def test_concatenated_weights_of_an_lstm_are_one_site_each():
    graph = jqopt.trace(*zoo_case(zoo.LSTM))
    kernels = [p for p in graph.parameters if p.endswith("kernel")]
    assert sorted(s.path for s in graph.sites if s.path) == sorted(kernels) and len(kernels) == 8
    assert {s.activation for s in graph.sites if "/i" in (s.path or "")} != {-1}


@pytest.mark.parametrize(("cls", "by"), [(zoo.TwoSame, "mul"), (zoo.WeightNorm, "mul")])
def test_derived_weights_say_why(cls, by):
    graph = jqopt.trace(*zoo_case(cls))
    reasons = [s.reason for s in graph.sites if s.path]
    assert reasons and all(f"by {by}" in r and "rearrangement" in r for r in reasons)


def test_weight_picked_at_run_time_is_refused_with_a_reason():
    def loop(params, x):
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ params["w"][i]), x)

    graph = jqopt.trace(loop, {"w": jnp.ones((3, 8, 8))}, jnp.ones((2, 8)))
    (site,) = [s for s in graph.sites if s.path == "w"]
    assert "known only at run time" in site.reason


def test_opaque_calls_are_reported_with_their_reason():
    def call(params, x):
        shape = jax.ShapeDtypeStruct((2, 8), jnp.float32)
        return jax.pure_callback(lambda w, x: np.asarray(x) @ np.asarray(w), shape, params["w"], x)

    (opaque,) = jqopt.trace(call, {"w": jnp.ones((8, 8))}, jnp.ones((2, 8))).opaque
    assert opaque.primitive == "pure_callback" and opaque.params == ("w",)
    assert "reads w unquantized" in opaque.reason


def test_nnx_unrolled_scanned_shared_and_raw():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)
            self.raw = nnx.Param(jnp.ones((16, 16)))

        def __call__(self, x):
            return x @ self.raw[...] + self.down(nnx.relu(self.up(x)))

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([Block(rngs), Block(rngs)])
            self.layers = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=0, out_axes=0))(rngs)
            self.again = self.blocks[0].up

        def __call__(self, x):
            for block in self.blocks:
                x = block(x)
            x = nnx.scan(lambda x, b: b(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
            return self.again(x)

    graph = jqopt.trace(Model(nnx.Rngs(0)), jnp.ones((2, 16)))
    paths = [s.path for s in graph.sites]
    assert paths.count("blocks/0/up/kernel") + paths.count("again/kernel") == 2
    assert {"blocks/1/raw", "layers/raw", "layers/up/kernel", "layers/down/kernel"} <= set(paths)
    assert next(s for s in graph.sites if s.path == "layers/raw").outer == (3,)
    assert all(s.reason is None for s in graph.sites)


def test_shapes_are_enough_for_a_7b_model():
    big = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, head_dim=128,
    )  # fmt: skip
    model = LlamaForCausalLM(big, scan_layers=True)
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    graph = jqopt.trace(model, jax.eval_shape(model.init, jax.random.key(0), tokens), tokens)
    assert sum(np.prod(p.shape) for p in graph.parameters.values()) > 6.7e9
    assert len(jqopt.plan("nvfp4", graph).quantized) == 7


def test_shard_map_sites():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def sharded(params, x):
        def body(x, a, b):
            return jax.lax.psum(jax.nn.relu(x @ a) @ b, "x")

        run = jax.shard_map(body, mesh=mesh, in_specs=(spec(), spec(None, "x"), spec("x")), out_specs=spec())
        return run(x, params["a"], params["b"])

    params = {"a": jnp.ones((16, 32)), "b": jnp.ones((32, 16))}
    graph = jqopt.trace(sharded, params, jnp.ones((2, 16)))
    assert [(s.key, s.reason) for s in graph.sites] == [("a", None), ("b", None)]
    plan = jqopt.plan({"schema": 1, "name": "t", "rules": [{"match": "*", "weight": "int8"}]}, graph)
    assert plan["a"].layout.shape == (16, 32) and (plan["b"].layout.n, plan["b"].layout.k) == (16, 32)


def test_missing_or_wrong_parameters_are_trace_errors():
    model, variables, x = zoo.build(zoo.Dense)
    with pytest.raises(jqopt.TraceError, match=r"whole variables dict.*found \['Dense_0'\]"):
        jqopt.trace(model, variables["params"], x)
    with pytest.raises(jqopt.TraceError, match="needs its parameter tree"):
        jqopt.trace(lambda p, x: x)
    with pytest.raises(jqopt.TraceError, match="expected a Flax Linen module"):
        jqopt.trace(3, {"w": jnp.ones(3)}, jnp.ones(3))


def test_print_is_a_table():
    text = str(jqopt.trace(*zoo_case(zoo.Dense)))
    assert text.splitlines()[0].split() == ["site", "op", "shape", "module", "input", "note"]
    assert "Dense_0/kernel" in text and "[64, 64]" in text


def test_batched_dense_module_axis():
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.lecun_normal(), (16, 4, 8))
            return jnp.einsum("btd,deh->bteh", x, w)

    x = jnp.ones((2, 3, 16))
    graph = jqopt.trace(Experts(), Experts().init(jax.random.key(0), x), x)
    (site,) = graph.sites
    assert (site.layout.n, site.layout.k, site.layout.stack) == (32, 16, ())


def test_two_leaves_of_one_name_are_refused():
    params = {"a/b": jnp.ones((4, 4)), "a": {"b": jnp.ones((4, 4))}}
    with pytest.raises(jqopt.TraceError, match="two leaves .* are called 'a/b'"):
        jqopt.trace(lambda p, x: x @ p["a/b"] @ p["a"]["b"], params, jnp.ones((2, 4)))


def test_a_reduction_with_a_combiner_of_its_own_is_no_call():
    """The combiner's jaxpr is of scalars; its weight is read by a dot besides, and stays itself there."""

    def model(p, x):
        most = jax.lax.reduce(p["w"], jnp.float32(0), lambda a, b: jnp.maximum(a, jnp.abs(b)), (0,))
        windows = jax.lax.reduce_window(p["w"], jnp.float32(0), lambda a, b: a + 0.5 * b, (1, 2), (1, 2), "VALID")
        return x @ p["w"] / most, x @ windows

    x = arrays.normal(0, (3, 8))
    params = {"w": arrays.normal(1, (8, 6))}
    qm = jqopt.quantize_model(model, {"rules": [{"match": "w", "weight": "int8"}]}, params=params, inputs=x)
    for got, want in zip(qm(x), model(params, x), strict=True):
        assert float(jnp.abs(got - want).max() / jnp.abs(want).max()) < 0.03


def test_a_graph_network_with_a_table_of_positions_has_nothing_hidden():
    """Messages are summed by a scatter, which is no opaque call; rows at constant positions are told with a reason."""

    def fn(P, x):
        rows = x + P["positions"][np.array([3, 1, 0])]
        return jax.ops.segment_sum((rows @ P["w"])[np.array([0, 1, 1])], np.array([2, 0, 1]), 3)

    params = {"w": arrays.normal(0, (8, 4)), "positions": arrays.normal(1, (5, 8))}
    graph = jqopt.trace(fn, params, arrays.normal(2, (3, 8)))
    assert not graph.opaque
    assert {s.path: s.reason for s in graph.sites} == {
        "w": None, "positions": "its rows are picked at constant positions",
    }  # fmt: skip
