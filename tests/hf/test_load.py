"""Checkpoint folders to Flax variables: every tensor at its place, and errors that name the tensor."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jqopt.errors import CheckpointError, UnsupportedError
from jqopt.hf import families, load_config, load_model
from jqopt.hf.families import LLAMA

CONFIG = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
REFERENCE = Path(__file__).parents[1] / "golden" / "tinylm_reference"
IDS = np.arange(12, dtype=np.int32).reshape(2, 6)
Q0 = "model.layers.0.self_attn.q_proj.weight"


def tensors() -> dict[str, np.ndarray]:
    """A checkpoint of CONFIG with the names and [out, in] shapes of transformers, written out by hand."""
    shapes = {"model.embed_tokens.weight": (50, 16), "model.norm.weight": (16,), "lm_head.weight": (50, 16)}
    for layer in range(2):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{m}_proj.weight": (16, 16) for m in "qo"}
        shapes |= {f"{block}.self_attn.{m}_proj.weight": (8, 16) for m in "kv"}
        shapes |= {f"{block}.mlp.{m}_proj.weight": (24, 16) for m in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": (16, 24)}
        shapes |= {f"{block}.{n}.weight": (16,) for n in ("input_layernorm", "post_attention_layernorm")}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}


def write(folder: Path, values: dict[str, np.ndarray], **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_every_tensor_lies_at_its_place(tmp_path):
    values = tensors()
    _, variables = load_model(write(tmp_path, values))
    params = variables["params"]
    for layer in range(2):
        block = params[f"layers_{layer}"]
        for part in ("self_attn", "mlp"):
            for name, leaf in block[part].items():
                expected = values[f"model.layers.{layer}.{part}.{name}.weight"].astype(np.float32).T
                np.testing.assert_array_equal(leaf["kernel"], expected)
        for name in ("input_layernorm", "post_attention_layernorm"):
            expected = values[f"model.layers.{layer}.{name}.weight"].astype(np.float32)
            np.testing.assert_array_equal(block[name]["scale"], expected)
    expected = values["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["embed_tokens"]["embedding"], expected)
    np.testing.assert_array_equal(params["lm_head"]["kernel"], values["lm_head.weight"].astype(np.float32).T)
    assert len(jax.tree.leaves(params)) == len(values)


@pytest.mark.parametrize("scan", [False, True])
def test_variables_fit_the_module(scan, tmp_path):
    module, variables = load_model(write(tmp_path, tensors()), scan_layers=scan)
    wanted = jax.eval_shape(module.init, jax.random.key(0), IDS)
    assert jax.tree.map(lambda x: x.shape, variables) == jax.tree.map(lambda x: x.shape, wanted)


def test_scanned_stacks_the_layers(tmp_path):
    folder = write(tmp_path, tensors())
    module, variables = load_model(folder)
    scanned, other = load_model(folder, scan_layers=True)
    kernels = [variables["params"][f"layers_{i}"]["mlp"]["down_proj"]["kernel"] for i in range(2)]
    np.testing.assert_array_equal(other["params"]["layers"]["mlp"]["down_proj"]["kernel"], np.stack(kernels))
    np.testing.assert_allclose(module.apply(variables, IDS), scanned.apply(other, IDS), rtol=1e-4, atol=1e-4)


def test_dtype_is_that_of_parameters_and_computation(tmp_path):
    module, variables = load_model(write(tmp_path, tensors()), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.bfloat16)}
    assert module.apply(variables, IDS, method="hidden").dtype == jnp.bfloat16


def test_shards_and_one_file_give_the_same(tmp_path):
    values = tensors()
    one = write(tmp_path / "one", values)
    many = write(tmp_path / "many", values)
    (many / "model.safetensors").unlink()
    names = sorted(values)
    places = {}
    for number, part in enumerate((names[:9], names[9:])):
        save_file({name: values[name] for name in part}, many / f"part{number}.safetensors")
        places |= dict.fromkeys(part, f"part{number}.safetensors")
    (many / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    jax.tree.map(np.testing.assert_array_equal, load_model(one)[1], load_model(many)[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(Q0), f"tensor {Q0} missing"),
        (lambda t: [t.pop(name) for name in list(t) if "layers.1" in name], "and 8 more missing"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[Q0]}), "layers.2.* unexpected"),
        (lambda t: t.update({Q0.replace("weight", "bias"): t[Q0]}), "q_proj.bias unexpected"),
        (lambda t: t.update({Q0: np.zeros((16, 8), np.float32)}), rf"{Q0} has shape \[16, 8\].*\[16, 16\]"),
        (lambda t: t.update({Q0: np.zeros((256,), np.float32)}), rf"{Q0} has shape \[256\]"),
    ],
)
def test_tensors_that_do_not_fit(change, words, tmp_path):
    values = tensors()
    change(values)
    with pytest.raises(CheckpointError, match=words):
        load_model(write(tmp_path, values))


def test_quantized_weights_are_refused(tmp_path):
    values = tensors() | {Q0: np.zeros((16, 16), np.uint8)}
    with pytest.raises(UnsupportedError, match=f"{Q0} is stored as uint8"):
        load_model(write(tmp_path, values))
    with pytest.raises(UnsupportedError, match="quantized already"):
        load_model(write(tmp_path, values, quantization_config={"quant_method": "awq"}))


def test_tied_head_saved_twice(tmp_path):
    """Some writers save the tied head as well; equal it is no second parameter, different it is an error."""
    values = tensors()
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_model(write(tmp_path, values, tie_word_embeddings=True))
    same = values | {"lm_head.weight": values["model.embed_tokens.weight"].copy()}
    _, variables = load_model(write(tmp_path, same, tie_word_embeddings=True))
    assert "lm_head" not in variables["params"]


def test_saved_rotary_tables_are_no_parameters(tmp_path):
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    _, variables = load_model(write(tmp_path, tensors() | table))
    assert len(jax.tree.leaves(variables)) == len(tensors())


def test_unknown_family(tmp_path):
    with pytest.raises(UnsupportedError, match=r"'mamba'; known families are llama.*families\.py"):
        load_model(write(tmp_path, tensors(), model_type="mamba"))


def test_a_new_family_is_one_value(tmp_path, monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "my_llama", dataclasses.replace(LLAMA, name="my_llama"))
    family, config = load_config(write(tmp_path, tensors(), model_type="my_llama"))
    assert family.name == "my_llama"
    assert config.hidden_size == 16


def test_a_setting_of_the_wrong_kind(tmp_path):
    for change in ({"rope_theta": "large"}, {"rope_scaling": [1]}, {"rope_parameters": "yarn"}):
        with pytest.raises(CheckpointError, match="a setting is of the wrong kind"):
            load_config(write(tmp_path, tensors(), **change))


@pytest.mark.parametrize(("text", "words"), [("{", "JSON cannot be read"), ("[]", "is a list")])
def test_broken_config(text, words, tmp_path):
    folder = write(tmp_path, tensors())
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"found no config\.json"):
        load_model(str(folder))


def test_reference_checkpoint(tmp_path):
    """The trained reference: as many parameters as its file holds, each once."""
    _, variables = load_model(REFERENCE)
    stored = load_file(REFERENCE / "model.safetensors")
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == sum(t.size for t in stored.values())
    total = sum(float(np.sum(t.astype(np.float64))) for t in stored.values())
    np.testing.assert_allclose(
        sum(float(np.sum(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(variables)), total
    )
    shutil.copytree(REFERENCE, tmp_path / "copy")
    jax.tree.map(np.testing.assert_array_equal, variables, load_model(tmp_path / "copy")[1])
