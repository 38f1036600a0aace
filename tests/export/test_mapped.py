"""Exports of models that aren't jqopt's decoder, by a name map: the same bytes as the decoder's of the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jqopt
from jqopt.errors import UnsupportedError
from jqopt.hf import NameMap, Rule, load_config, load_model, maps
from tests.export import decoders, tiny
from tests.hf.nnx_models import TUNIX, Model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("model") / "source", dtype="float32")


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory):
    """A scheme's name -> the folder that the decoder's export gives."""
    root = tmp_path_factory.mktemp("plain")

    def get(name):
        if not (root / name).exists():
            module, variables = load_model(source)
            qm = jqopt.quantize_model(module, tiny.COMPRESSED_TENSORS[name], params=variables, inputs=(tiny.IDS,))
            jqopt.export(qm, root / name, source=source)
        return root / name

    return get


def assert_same(ours, theirs):
    a, b = decoders.read_folder(ours), decoders.read_folder(theirs)
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert (x.word, x.shape, x.data) == (b[name].word, b[name].shape, b[name].data), name
    assert (ours / "config.json").read_bytes() == (theirs / "config.json").read_bytes()


@pytest.mark.parametrize(("name", "stacked"), [("NVFP4A16", False), ("W4A16", True)])
def test_kernels_of_heads_in_blocks(name, stacked, source, plain, tmp_path):
    """Tunix's layout: `o_proj` is [N, H, D] in an einsum of two axes, whose blocks must run along the tensor's."""
    _, config = load_config(source)
    names = maps.tunix(config, stacked=stacked)
    model = Model(config, TUNIX, stacked)
    nnx.update(model, names.load(nnx.state(model, nnx.Param), source))
    qm = jqopt.quantize_model(model, tiny.COMPRESSED_TENSORS[name], inputs=(tiny.IDS,))
    jqopt.export(qm, tmp_path / "out", source=source, names=names)
    assert_same(tmp_path / "out", plain(name))
    with pytest.raises(UnsupportedError, match="aren't those of the 'llama' model"):
        jqopt.export(qm, tmp_path / "x", source=source)


def fused(params, ids):
    """No decoder, but what one reads: fused kernels, in the products that decide how they are packed."""
    x = params["embed_tokens"][ids]
    for block in params["blocks"]:
        heads = jnp.einsum("btd,dnh->btnh", x * block["norm"], block["qkv"])
        x = x + jnp.einsum("btnh,nhd->btd", heads[:, :, :4], block["out"])
        gate, up = jnp.einsum("btd,pdf->pbtf", x * block["norm2"], block["wi"])
        x = x + (gate * up) @ block["wo"]
    return (x * params["norm"]) @ params["lm_head"]


def names_of(**changes):
    block = "model.layers.{layer}"
    attention = tuple(f"{block}.self_attn.{x}_proj.weight" for x in "qkv")
    rules = {
        "embed_tokens": Rule("embed_tokens", "model.embed_tokens.weight", "v d -> v d"),
        "norm": Rule("norm", "model.norm.weight", "d -> d"),
        "lm_head": Rule("lm_head", "lm_head.weight", "v d -> d v"),
        "qkv": Rule("blocks/{layer}/qkv", attention, "(n h) d -> d n h", join="n", parts=(4, 2, 2)),
        "out": Rule("blocks/{layer}/out", f"{block}.self_attn.o_proj.weight", "d (n h) -> n h d"),
        "wi": Rule(
            "blocks/{layer}/wi", tuple(f"{block}.mlp.{x}_proj.weight" for x in ("gate", "up")), "f d -> part d f"
        ),
        "wo": Rule("blocks/{layer}/wo", f"{block}.mlp.down_proj.weight", "d f -> f d"),
        "n1": Rule("blocks/{layer}/norm", f"{block}.input_layernorm.weight", "d -> d"),
        "n2": Rule("blocks/{layer}/norm2", f"{block}.post_attention_layernorm.weight", "d -> d"),
    }
    return NameMap(tuple((rules | changes).values()), sizes={"h": 64, "n": 4})


def tree_of(names, source):
    block = {"norm": (128,), "norm2": (128,), "qkv": (128, 8, 64), "out": (4, 64, 128), "wi": (2, 128, 256)}
    shapes = {
        "embed_tokens": (96, 128),
        "norm": (128,),
        "lm_head": (128, 96),
        "blocks": [{**block, "wo": (256, 128)}] * 2,
    }
    like = jax.tree.map(lambda s: jnp.zeros(s), shapes, is_leaf=lambda s: isinstance(s, tuple))
    return names.load(like, source)


@pytest.mark.parametrize("name", ["NVFP4A16", "W8A16_CHANNEL"])
def test_fused_kernels_are_parted(name, source, plain, tmp_path):
    names = names_of()
    qm = jqopt.quantize_model(fused, tiny.COMPRESSED_TENSORS[name], params=tree_of(names, source), inputs=(tiny.IDS,))
    assert len(qm.plan.quantized) == 8
    jqopt.export(qm, tmp_path / "out", source=source, names=names)
    assert_same(tmp_path / "out", plain(name))


def test_what_cannot_be_parted_is_refused(source, tmp_path):
    names = names_of()
    params = tree_of(names, source)
    qm = jqopt.quantize_model(fused, tiny.COMPRESSED_TENSORS["W8A16_CHANNEL"], params=params, inputs=(tiny.IDS,))
    turned = names_of(
        out=Rule("blocks/{layer}/out", "model.layers.{layer}.self_attn.o_proj.weight", "d (h n) -> n h d")
    )
    with pytest.raises(
        UnsupportedError, match=r"the inputs of model.layers.0.self_attn.o_proj.weight stand in another"
    ):
        jqopt.export(qm, tmp_path / "x", source=source, names=turned)
    other = tiny.make(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(UnsupportedError, match=r"aren't those of the 'llama' model.*unexpected: lm_head.weight"):
        jqopt.export(qm, tmp_path / "x", source=other, names=names)
    assert not (tmp_path / "x").exists()
    assert np.ndim(params["norm"]) == 1
