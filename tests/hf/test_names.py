"""Name maps: other people's Flax layouts filled from Hugging Face folders and back, and every way to be incomplete."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jqopt
from jqopt._qtensor import Layout
from jqopt.errors import CheckpointError, UnsupportedError
from jqopt.hf import NameMap, Rule, load_config, maps
from jqopt.hf.axes import parse
from tests.hf.nnx_models import BONSAI, TUNIX, Model

GOLDEN = Path(__file__).parent / "golden"


def model_of(name, leaves=TUNIX, stacked=False):
    """(an empty NNX model of a golden checkpoint, its configuration)."""
    _, config = load_config(GOLDEN / name)
    return Model(config, leaves, stacked), config


def stored(name):
    return {n: x.astype(np.float32) for n, x in load_file(GOLDEN / name / "model.safetensors").items()}


@pytest.mark.parametrize(
    ("name", "make", "leaves", "stacked"),
    [
        ("llama", maps.tunix, TUNIX, False),
        ("llama", maps.tunix, TUNIX, True),
        ("qwen3", maps.tunix, TUNIX, True),
        ("qwen3", maps.bonsai, BONSAI, False),
    ],
)
def test_models_of_others_are_filled_and_written_back(name, make, leaves, stacked):
    """Logits are transformers' own; the tensors that come back are those of the file."""
    model, config = model_of(name, leaves, stacked)
    names, reference = make(config, stacked=stacked), load_file(GOLDEN / name / "reference.safetensors")
    nnx.update(model, names.load(nnx.state(model, nnx.Param), GOLDEN / name))
    np.testing.assert_allclose(
        nnx.jit(lambda m, ids: m(ids))(model, reference["ids"]), reference["logits"], rtol=0, atol=1e-4
    )
    found, expected = dict(names.tensors(nnx.state(model, nnx.Param))), stored(name)
    assert set(found) == set(expected)
    for tensor in expected:
        np.testing.assert_array_equal(found[tensor], expected[tensor])


def test_experts_are_stacked():
    """Tunix holds all experts of a layer in one array [E, in, out]."""
    _, config = load_config(GOLDEN / "qwen3_moe")
    tensors, names = stored("qwen3_moe"), maps.tunix(config)
    c, e = config, config.experts
    block = {
        "attn": {
            "q_proj": {"w": jnp.zeros((c.hidden_size, c.num_attention_heads, c.head_dim))},
            **{f"{x}_proj": {"w": jnp.zeros((c.hidden_size, c.num_key_value_heads, c.head_dim))} for x in "kv"},
            "o_proj": {"w": jnp.zeros((c.num_attention_heads, c.head_dim, c.hidden_size))},
            **{f"{x}_norm": {"w": jnp.zeros(c.head_dim)} for x in "qk"},
        },
        "mlp": {
            "router": {"kernel": jnp.zeros((c.hidden_size, e.count))},
            **{f"{x}_proj": jnp.zeros((e.count, c.hidden_size, e.width)) for x in ("gate", "up")},
            "down_proj": jnp.zeros((e.count, e.width, c.hidden_size)),
        },
        **{n: {"w": jnp.zeros(c.hidden_size)} for n in ("input_layernorm", "post_attention_layernorm")},
    }
    tree = {
        "embedder": {"input_embedding": jnp.zeros((c.vocab_size, c.hidden_size))},
        "layers": {str(i): block for i in range(2)},
        "final_norm": {"w": jnp.zeros(c.hidden_size)},
        "lm_head": {"w": jnp.zeros((c.hidden_size, c.vocab_size))},
    }
    filled = names.load(tree, GOLDEN / "qwen3_moe")
    kernel = filled["layers"]["1"]["mlp"]["down_proj"][3]
    np.testing.assert_array_equal(kernel, tensors["model.layers.1.mlp.experts.3.down_proj.weight"].T)
    back = dict(names.tensors(filled))
    assert set(back) == set(tensors)
    assert all((back[n] == tensors[n]).all() for n in tensors)


# ----------------------------------------------------------------------------------- permuted, fused, sources


def test_permuted_and_fused_axes(tmp_path):
    """Rotary rows interleaved, q, k and v in one kernel, gate and up in a stacked one: by hand, index by index."""
    rng = np.random.default_rng(0)
    shapes = {"q": (12, 5), "k": (4, 5), "v": (4, 5), "gate": (7, 5), "up": (7, 5), "rope": (12, 5)}
    tensors = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    tree = {"qkv": jnp.zeros((5, 5, 4)), "gu": jnp.zeros((2, 5, 7)), "turned": jnp.zeros((5, 12))}
    names = NameMap(
        (
            Rule("qkv", ("q", "k", "v"), "(n h) d -> d n h", join="n", parts=("heads", 1, 1)),
            Rule("gu", ("gate", "up"), "out in -> part in out"),
            Rule("turned", "rope", "(n two half) d -> d (n half two)"),
        ),
        sizes={"heads": 3, "h": 4, "two": 2, "half": 2},
    )
    found = names.load(tree, tmp_path)
    heads = np.concatenate([tensors[x].reshape(-1, 4, 5) for x in "qkv"])
    np.testing.assert_array_equal(found["qkv"], heads.transpose(2, 0, 1))
    np.testing.assert_array_equal(found["gu"], np.stack([tensors["gate"].T, tensors["up"].T]))
    for n in range(3):
        for half in range(2):
            for two in range(2):
                row = tensors["rope"][n * 4 + two * 2 + half]
                np.testing.assert_array_equal(found["turned"][:, n * 4 + half * 2 + two], row)
    back = dict(names.tensors(found))
    assert all((back[n] == tensors[n]).all() for n in tensors)


@pytest.mark.parametrize("rows_first", [False, True])
def test_sources_say_where_the_rows_of_packed_weights_come_from(rows_first):
    """The matrix [n, k] of a parameter, put together again from its tensors by rows and columns."""
    rng = np.random.default_rng(0)
    names = NameMap(
        (
            Rule("qkv", ("q", "k", "v"), "(n two half) d -> layer d (n half two)", join="n", parts=(3, 1, 1)),
            Rule("o", "o.{layer}", "d (n h) -> layer n h d"),
        ),
        sizes={"two": 2, "half": 2, "n": 3, "h": 4},
    )
    names = dataclasses.replace(
        names,
        rules=(dataclasses.replace(names.rules[0], tensor=("q.{layer}", "k.{layer}", "v.{layer}")), names.rules[1]),
    )
    params = {"qkv": rng.normal(size=(2, 5, 20)), "o": rng.normal(size=(2, 3, 4, 6))}
    layouts = {
        "qkv": Layout.of((2, 5, 20), axis=1, stack=(0,)),
        "o": Layout.of((2, 3, 4, 6), axis=(1, 2), stack=(0,)),
    }
    tensors = dict(names.tensors(params))
    assert tensors["q.1"].shape == (12, 5) and tensors["o.0"].shape == (6, 12)
    for mapped in names.mapped({n: x.shape for n, x in params.items()}):
        matrices = np.asarray(layouts[mapped.path].to_matrix(jnp.asarray(params[mapped.path])))
        for source in mapped.sources(layouts[mapped.path]):
            part = matrices[source.stack][np.ix_(source.rows, source.cols)]
            np.testing.assert_allclose(part, tensors[source.tensor], rtol=1e-6)
    wrong = Layout.of((2, 5, 20), axis=2, stack=(0,))
    with pytest.raises(UnsupportedError, match="qkv: contracts other axes"):
        names.mapped({n: x.shape for n, x in params.items()})[0].sources(wrong)


def test_a_quantized_model_of_others_finds_its_tensors():
    """The layouts that a plan gives the einsum weights hold the rows and columns of the tensors, for every matrix, also
    of `o_proj`, whose einsum contracts two axes."""
    model, config = model_of("llama")
    qm = jqopt.quantize_model(model, "int8_weight_only", inputs=(np.ones((1, 4), np.int32),))
    shapes = {p: tuple(x.shape) for p, x in qm.plan.parameters.items()}
    done = qm.plan.quantized
    for mapped in maps.tunix(config).mapped(shapes):
        if mapped.path in done:
            (source,) = mapped.sources(done[mapped.path].layout)
            np.testing.assert_array_equal(source.rows, np.arange(mapped.pieces[0].shape[0]))
            np.testing.assert_array_equal(source.cols, np.arange(mapped.pieces[0].shape[1]))


# ------------------------------------------------------------------------------------------------ completeness


def tiny(*rules, **options):
    return NameMap((Rule("a/kernel", "a.weight", "out in -> in out"), *rules), **options)


@pytest.mark.parametrize(
    ("names", "shapes", "words"),
    [
        (tiny(), {"a/kernel": (2, 3), "a/kernal": (2, 3)}, "a/kernal: no rule .* nearest is 'a/kernel'"),
        (tiny(Rule("b/kernel", "b", "n -> n")), {"a/kernel": (2, 3)}, "'b/kernel' names no parameter .*'a/ker"),
        (tiny(Rule("a/kernel", "b", "n -> n")), {"a/kernel": (2, 3)}, "two rules name it"),
        (tiny(), {"a/kernel": (2, 3, 4)}, "a/kernel: 'out in -> in out' gives 2 axes"),
        (tiny(Rule("b", "a.weight", "n -> n")), {"a/kernel": (2, 3), "b": (2,)}, "a.weight is also what a/kernel"),
        (tiny(Rule("b", "b.{layer}", "n -> n")), {"a/kernel": (2, 3), "b": (2,)}, r"has \{layer\}, which neither"),
        (tiny(Rule("b", "b", "(n h) -> n h")), {"a/kernel": (2, 3), "b": (6,)}, "b: .* gives 2 axes"),
        (tiny(Rule("b", "b", "n h -> (n h)")), {"a/kernel": (2, 3), "b": (6,)}, r"made of n = \?, h = \?; write"),
        (tiny(Rule("b", "b", "n h -> (n h)"), sizes={"n": 4}), {"a/kernel": (2, 3), "b": (6,)}, "made of n = 4"),
        (tiny(Rule("b", ("b", "c"), "n -> n", "n", (4, 1))), {"a/kernel": (2, 3), "b": (6,)}, r"parts \[4, 1\] of 2"),
    ],
)  # fmt: skip
def test_what_a_map_does_not_fit(names, shapes, words):
    with pytest.raises(UnsupportedError, match=words):
        names.mapped(shapes)


@pytest.mark.parametrize("text", ["n h", "n -> n -> n", "(n h -> n h", "n -> m", "n n -> n", "a-b -> a b"])
def test_patterns_that_are_none(text):
    with pytest.raises(UnsupportedError, match=re.escape(f"axes {text!r}")):
        parse(text)


def test_optional_rules_may_name_nothing():
    names = tiny(Rule("head", "head", "n -> n", optional=True))
    assert [m.path for m in names.mapped({"a/kernel": (2, 3)})] == ["a/kernel"]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a.wait": (3, 2)}, "a.weight asked for by the name map, is missing; the nearest is 'a.wait'"),
        ({"a.weight": (3, 2), "a.bias": (3,)}, "a.bias is used by no rule .* nearest is 'a.weight'"),
        ({"a.weight": (2, 3)}, r"a.weight has shape \[2, 3\]; a/kernel .* asks for \[3, 2\]"),
    ],
)
def test_folders_that_do_not_fit(tensors, words, tmp_path):
    save_file({n: np.zeros(s, np.float32) for n, s in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        tiny().load({"a": {"kernel": jnp.zeros((2, 3))}}, tmp_path)


def test_copies_and_quantized_tensors(tmp_path):
    x = np.ones((3, 2), np.float32)
    tree, names = {"a": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}}, tiny(copies={"c": "a.weight"})
    save_file({"a.weight": x, "c": x, "z.rotary_emb.inv_freq": x}, tmp_path / "model.safetensors")
    assert names.load(tree, tmp_path)["a"]["kernel"].dtype == jnp.bfloat16
    save_file({"a.weight": x, "c": 2 * x}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="c differs from a.weight"):
        names.load(tree, tmp_path)
    save_file({"a.weight": x.astype(np.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match="a.weight is stored as uint8"):
        names.load(tree, tmp_path)
