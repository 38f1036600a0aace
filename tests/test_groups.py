"""Groups: which sites read one activation, and which weights may share a scale; `fuse` in recipes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jqopt
from jqopt.hf.llama import LlamaConfig, LlamaForCausalLM
from tests import arrays

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
)  # fmt: skip
TOKENS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
X = arrays.normal(0, (2, 6, 32))


def llama(scan: bool = True) -> tuple:
    model = LlamaForCausalLM(CONFIG, scan_layers=scan)
    return model, model.init(jax.random.key(0), TOKENS), TOKENS


def graph_of(module: nn.Module, *inputs):
    return jqopt.trace(module, module.init(jax.random.key(0), *inputs), *inputs)


def keys(group) -> list[str]:
    return [s.key for s in group]


def short(names) -> list[str]:
    return [n.split("/")[-2] for n in names]


@pytest.mark.parametrize("scan", [False, True])
def test_llama(scan):
    groups = [g for g in jqopt.trace(*llama(scan)).groups if len(g.sites) > 1]
    expected = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * (1 if scan else 2)
    assert [short(keys(g)) for g in groups] == expected
    assert [[short(f) for f in g.fused] for g in groups] == [[e] for e in expected]
    assert "meet in dot_general (attention.py:" in groups[0].reason and "meet in mul (mlp.py:" in groups[1].reason
    assert groups[0].reason.startswith("they read what mul makes (norm.py:")


class Parallel(nn.Module):
    """Attention and MLP beside each other on one norm (GPT-J, PaLM)."""

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        q, k, v = (nn.Dense(32, name=n)(h) for n in "qkv")
        mixed = nn.softmax(q @ k.swapaxes(-1, -2), axis=-1) @ v
        return x + nn.Dense(32, name="o")(mixed) + nn.Dense(32, name="down")(nn.gelu(nn.Dense(64, name="up")(h)))


def test_parallel_blocks_share_the_input_but_not_the_weight_scale():
    (group,) = [g for g in graph_of(Parallel(), X).groups if len(g.sites) > 1]
    assert keys(group) == ["q/kernel", "k/kernel", "v/kernel", "up/kernel"]
    assert group.fused == (("q/kernel", "k/kernel", "v/kernel"),)


class Cross(nn.Module):
    @nn.compact
    def __call__(self, x, memory):
        q, k, v = nn.Dense(32, name="q")(x), nn.Dense(32, name="k")(memory), nn.Dense(32, name="v")(memory)
        return nn.Dense(32, name="o")(nn.softmax(q @ k.swapaxes(-1, -2), axis=-1) @ v)


def test_cross_attention_groups_key_and_value():
    groups = graph_of(Cross(), X, 2 * X).groups
    assert [keys(g) for g in groups] == [["q/kernel"], ["k/kernel", "v/kernel"], ["o/kernel"]]
    assert [g.fused for g in groups] == [(), (("k/kernel", "v/kernel"),), ()]


class DenseMoE(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.RMSNorm()(x)
        route = nn.softmax(nn.Dense(4, use_bias=False, name="router")(h), axis=-1)
        gate, up, down = (
            self.param(n, nn.initializers.lecun_normal(batch_axis=0), s)
            for n, s in (("gate", (4, 32, 16)), ("up", (4, 32, 16)), ("down", (4, 16, 32)))
        )
        inner = nn.silu(jnp.einsum("btd,edf->btef", h, gate)) * jnp.einsum("btd,edf->btef", h, up)
        return x + jnp.einsum("btef,efd,bte->btd", inner, down, route)


class RaggedMoE(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.RMSNorm()(x).reshape(-1, 32)
        logits = nn.Dense(4, use_bias=False, name="router")(h)
        expert = jnp.argmax(logits, -1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=4)
        gate, up, down = (
            self.param(n, nn.initializers.lecun_normal(batch_axis=0), s)
            for n, s in (("gate", (4, 32, 16)), ("up", (4, 32, 16)), ("down", (4, 16, 32)))
        )
        sent = jnp.take(h, order, axis=0)
        inner = nn.silu(jax.lax.ragged_dot(sent, gate, sizes)) * jax.lax.ragged_dot(sent, up, sizes)
        out = jax.lax.ragged_dot(inner, down, sizes)
        return x + jnp.zeros_like(out).at[order].set(out).reshape(x.shape)


@pytest.mark.parametrize("model", [DenseMoE, RaggedMoE])
def test_router_shares_the_experts_input_and_no_weight_scale(model):
    (group,) = [g for g in graph_of(model(), X).groups if len(g.sites) > 1]
    assert sorted(keys(group)) == ["gate", "router/kernel", "up"]
    assert [sorted(f) for f in group.fused] == [["gate", "up"]]


class Fused(nn.Module):
    """One kernel holds query, key and value: one site, a group of its own."""

    @nn.compact
    def __call__(self, x):
        q, k, v = jnp.split(nn.Dense(96, name="qkv")(x), 3, axis=-1)
        return nn.Dense(32, name="o")(nn.softmax(q @ k.swapaxes(-1, -2), axis=-1) @ v)


def test_a_fused_kernel_is_one_site():
    assert [keys(g) for g in graph_of(Fused(), X).groups] == [["qkv/kernel"], ["o/kernel"]]


# ------------------------------------------------------------------------------------------------ in the plan


def global_scales(recipe) -> dict[str, float]:
    model, variables, tokens = llama()
    qm = jqopt.quantize_model(model, recipe, params=variables, batches=[tokens])
    layers = qm.params["params"]["layers"]
    inner = {**layers["self_attn"], **layers["mlp"]}
    return {name: np.asarray(leaf["kernel"].global_scale)[0].item() for name, leaf in inner.items()}


def together(scales: dict[str, float], *names: str) -> bool:
    return len({scales[n] for n in names}) == 1


def test_fused_weights_share_their_global_scale_by_default():
    found = global_scales("nvfp4_weight_only")
    assert together(found, "q_proj", "k_proj", "v_proj") and together(found, "gate_proj", "up_proj")
    assert len(set(found.values())) == 4


def test_fuse_replaces_what_the_dataflow_says():
    some = {"extends": ["nvfp4_weight_only"], "fuse": [["*/q_proj/*", "*/k_proj/*"]]}
    found = global_scales(some)
    assert together(found, "q_proj", "k_proj") and not together(found, "q_proj", "v_proj")
    assert not together(found, "gate_proj", "up_proj")
    none = global_scales({"extends": ["nvfp4_weight_only"], "fuse": []})
    assert len(set(none.values())) == 7


def test_fuse_is_inherited_and_survives_as_plain_data(tmp_path):
    (tmp_path / "base.yaml").write_text('rules: [{match: "*", weight: nvfp4}]\nfuse: [["*/gate*", "*/up*"]]\n')
    (tmp_path / "own.yaml").write_text("extends: [base.yaml]\n")
    recipe = jqopt.load_recipe(tmp_path / "own.yaml")
    assert recipe.fuse == (("*/gate*", "*/up*"),)
    assert jqopt.load_recipe(recipe.to_dict()) == recipe


def test_fuse_of_sites_that_read_different_activations_is_an_error():
    graph = jqopt.trace(*llama())
    recipe = {"extends": ["nvfp4"], "fuse": [["*/o_proj/*", "*/down_proj/*"]]}
    with pytest.raises(jqopt.PlanError, match="names no two sites that read the same activation; it matches .*o_proj"):
        jqopt.plan(jqopt.load_recipe(recipe), graph)


@pytest.mark.parametrize(
    ("fuse", "said"),
    [("q_proj", "expected a list of lists"), ([["*/q_proj/*"]], "at least two"), ([["a(b)", "c"]], "regular expr")],
)
def test_wrong_fuse_is_refused(fuse, said):
    with pytest.raises(jqopt.RecipeError, match=said):
        jqopt.load_recipe({"extends": ["nvfp4"], "fuse": fuse})


def test_a_router_is_fused_with_no_expert_that_is_one_matrix():
    def model(p, x):
        share = jax.nn.softmax(x @ p["router"], axis=-1)
        return sum(share[:, i : i + 1] * (x @ p[f"e{i}"]) for i in range(3))

    params = {"router": jnp.ones((8, 3)), **{f"e{i}": jnp.ones((8, 4)) for i in range(3)}}
    (group,) = jqopt.trace(model, params, jnp.ones((5, 8))).groups
    assert sorted(keys(group)) == ["e0", "e1", "e2", "router"] and group.fused == ()
