"""Every family's decoder against transformers: committed tiny checkpoints with the logits and tokens it gave.

The numbers were made by make_golden.py with transformers 5.23.0 and torch 2.13.0; test_transformers.py compares live.
"""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jqopt
from jqopt.errors import UnsupportedError
from jqopt.hf import families, generate, load_config, load_model
from jqopt.hf.config import Experts
from jqopt.hf.mlp import route
from tests.hf.zoo import CASES, GOLDEN

pytestmark = pytest.mark.quick


FOLDER = Path(__file__).parent / "golden"


@functools.cache
def loaded(name: str, scan: bool = False) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """(module, variables, {"ids", "logits", "greedy"}) of a golden checkpoint."""
    return *load_model(FOLDER / name, scan_layers=scan), load_file(FOLDER / name / "reference.safetensors")


def test_there_is_a_golden_model_of_every_family():
    assert set(GOLDEN) == set(families.FAMILIES)
    assert sorted(p.name for p in FOLDER.iterdir() if p.is_dir()) == sorted(GOLDEN)


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_are_those_of_transformers(name):
    module, variables, reference = loaded(name)
    found = jax.jit(module.apply)(variables, reference["ids"])
    np.testing.assert_allclose(found, reference["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_moe", "gpt2"])
def test_scanned_layers_give_the_same(name):
    """Layers with a window and without, of two rotary settings, with experts, and with positions of their own."""
    module, variables, reference = loaded(name, scan=True)
    found = jax.jit(module.apply)(variables, reference["ids"])
    np.testing.assert_allclose(found, reference["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "scan"), [("gemma2", False), ("qwen3_moe", False), ("gemma3_text", True)])
def test_greedy_tokens_are_those_of_transformers(name, scan):
    module, variables, reference = loaded(name, scan)
    found = generate(module, variables, reference["ids"], max_new_tokens=6)
    np.testing.assert_array_equal(found.tokens, reference["greedy"][:, 12:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scan"), [*((n, False) for n in GOLDEN), ("phi3", True), ("mixtral", True), ("gpt2", True)]
)
def test_every_family_generates(name, scan):
    module, variables, reference = loaded(name, scan)
    found = generate(module, variables, reference["ids"], max_new_tokens=6)
    np.testing.assert_array_equal(found.tokens, reference["greedy"][:, 12:])


# ------------------------------------------------------------------------------------------------- quantizing


def linear_kernels(variables: Any) -> set[str]:
    """Paths of all matrices that a block or the head multiplies by, the routers excepted."""
    flat = jax.tree_util.tree_flatten_with_path(variables["params"])[0]
    paths = {jax.tree_util.keystr(key, simple=True, separator="/") for key, _ in flat}
    return {p for p in paths if p.endswith("kernel") and "router" not in p and "lm_head" not in p}


PLANS = [*((name, "nvfp4") for name in GOLDEN), ("mixtral", "int8_weight_only"), ("gpt2", "int8_weight_only")]


@pytest.mark.parametrize(("name", "recipe"), PLANS)
def test_a_plan_quantizes_every_linear_layer(name, recipe):
    module, variables, reference = loaded(name)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    plan = jqopt.plan(recipe, jqopt.trace(module, shapes, reference["ids"]))
    assert linear_kernels(variables) <= set(plan.quantized)
    assert not plan.opaque
    routers = [d for d in plan.decisions if d.path is not None and "router" in d.path]
    assert bool(routers) == ("mix" in name or "moe" in name)
    assert all(d.weight is None and d.reason.startswith("kept by defaults/skip_sensitive.yaml") for d in routers)


@pytest.mark.parametrize("name", ["phi3", "qwen3_moe"])
def test_quantized_families_run(name):
    """int8 a channel is near the float model, and generating goes the same way as the whole pass."""
    module, variables, reference = loaded(name)
    qm = jqopt.quantize_model(module, "int8_weight_only", params=variables, inputs=(reference["ids"],))
    found, exact = np.asarray(qm(reference["ids"])), reference["logits"]
    apart = np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert apart.all() and np.median(apart) < 0.03  # the median: a near tie of experts may fall the other way
    new = np.asarray(generate(module, qm, reference["ids"], max_new_tokens=4).tokens)
    whole = np.concatenate([reference["ids"], new], axis=1)
    np.testing.assert_array_equal(np.argmax(qm(whole[:, :-1]), -1)[:, 11:], new)


# -------------------------------------------------------------------------------------------------- settings


def config_of(name: str, **change: Any) -> Any:
    text = json.loads((FOLDER / name / "config.json").read_text()) | change
    return families.find(text).parse(text)


def test_settings_are_read_as_transformers_does():
    assert config_of("mistral").sliding_window == 5
    assert config_of("mistral", sliding_window=None).sliding_window is None
    text = json.loads((FOLDER / "mistral" / "config.json").read_text())
    del text["sliding_window"]
    assert families.find(text).parse(text).sliding_window == 4096, "MistralConfig's default"
    assert config_of("qwen2").sliding_layers == (False, True)
    assert config_of("qwen2", use_sliding_window=False).sliding_window is None
    assert config_of("gemma2", attn_logit_softcapping=None).attention_softcap is None
    assert config_of("gemma", hidden_act="gelu").hidden_act == "gelu_pytorch_tanh"
    old = {"rope_parameters": None, "rope_theta": 1e6, "rope_local_base_freq": 7.0, "layer_types": None}
    gemma3 = config_of("gemma3_text", **old, sliding_window_pattern=2)
    assert (gemma3.rope_theta, gemma3.local_rope_theta, gemma3.sliding_layers) == (1e6, 7.0, (True, False))
    moe = config_of("qwen3_moe", num_local_experts=None, num_experts=4, norm_topk_prob=False)
    assert moe.experts == Experts(4, 2, 20, normalize=False)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "layer_types has 'chunked_attention'; known are full"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
        ("gemma2", {"hidden_activation": "mish"}, "hidden_act is 'mish'"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}}, "sliding.*'yarn'"),
        ("gemma2", {"sliding_window": 0}, "sliding_window is 0; expected a positive whole number"),
        ("phi3", {"partial_rotary_factor": 0.5, "rope_parameters": None}, "turn 3 channels of a head; expected"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
        ("gpt2", {"n_head": 5}, "n_embd 24 is no multiple of n_head 5"),
    ],
)  # fmt: skip
def test_what_families_cannot_do(name, change, words):
    with pytest.raises(UnsupportedError, match=words):
        config_of(name, **change)


def test_layers_of_two_kinds_are_not_scanned(tmp_path):
    shutil.copytree(FOLDER / "qwen3_moe", tmp_path / "x")
    text = json.loads((tmp_path / "x" / "config.json").read_text()) | {"mlp_only_layers": [1]}
    (tmp_path / "x" / "config.json").write_text(json.dumps(text))
    family, config = load_config(tmp_path / "x")
    with pytest.raises(UnsupportedError, match="some layers .* have experts .*: write scan_layers=False"):
        family.build(config, True, jnp.float32).init(jax.random.key(0), np.ones((1, 1), np.int32))


def test_gpt2_without_its_prefix(tmp_path):
    """The folder of the original GPT-2: names without `transformer.`, and causal masks saved beside."""
    stored = load_file(FOLDER / "gpt2" / "model.safetensors")
    bare = {name.removeprefix("transformer."): x for name, x in stored.items()}
    bare |= {f"h.{n}.attn.bias": np.tril(np.ones((1, 1, 32, 32), np.float32)) for n in range(2)}
    shutil.copytree(FOLDER / "gpt2", tmp_path / "x")
    save_file(bare, tmp_path / "x" / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "x")[1], loaded("gpt2")[1])


def test_gpt2_has_no_more_positions():
    module, variables, _ = loaded("gpt2")
    with pytest.raises(UnsupportedError, match="33 tokens: this GPT-2 has learned 32 positions"):
        module.apply(variables, np.ones((1, 33), np.int32))
    with pytest.raises(UnsupportedError, match="33 tokens"):
        generate(module, variables, np.ones((1, 30), np.int32), max_new_tokens=3)


def test_experts_stored_in_one_tensor_are_named(tmp_path):
    shutil.copytree(FOLDER / "mixtral", tmp_path / "x")
    stored = load_file(tmp_path / "x" / "model.safetensors")
    kept = {name: x for name, x in stored.items() if "experts" not in name}
    kept["model.layers.0.mlp.experts.gate_up_proj"] = np.zeros((4, 40, 24), np.float32)
    save_file(kept, tmp_path / "x" / "model.safetensors")
    with pytest.raises(UnsupportedError, match="gate_up_proj holds all experts .* save_pretrained"):
        load_model(tmp_path / "x")


def test_routing():
    """Weights of the chosen experts by hand: softmax over all, then the largest, then (or not) made to sum to 1."""
    logits = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3]], jnp.float32))
    weights, chosen = route(logits, Experts(4, 2, 8))
    np.testing.assert_array_equal(chosen, [[1, 3]])
    np.testing.assert_allclose(weights, [[4 / 7, 3 / 7]], rtol=1e-6)
    np.testing.assert_allclose(route(logits, Experts(4, 2, 8, normalize=False))[0], [[0.4, 0.3]], rtol=1e-6)


def test_the_zoo_names_classes_of_transformers():
    assert all(name and isinstance(settings, dict) for name, settings in CASES.values())
