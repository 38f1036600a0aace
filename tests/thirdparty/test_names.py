"""The shipped name maps on the real models: Tunix's Llama3 and Qwen3 filled from a Hugging Face folder.

Run with `pytest -m thirdparty` where `requirements.txt` beside this file is installed; skipped, with the package's
name, where it is not.
"""

import importlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jqopt.hf import load_config, load_model, maps

pytestmark = [pytest.mark.thirdparty, pytest.mark.filterwarnings("ignore")]
GOLDEN = Path(__file__).parents[1] / "hf" / "golden"


def tunix(name):
    try:
        return importlib.import_module(f"tunix.models.{name}.model")
    except ModuleNotFoundError as e:
        pytest.skip(f"Tunix needs the package {e.name}: pip install -r tests/thirdparty/requirements.txt")


def filled(library, kind, folder, **more):
    """A model of Tunix with the folder's weights."""
    _, c = load_config(folder)
    config = library.ModelConfig(
        num_layers=c.num_hidden_layers, vocab_size=c.vocab_size, embed_dim=c.hidden_size,
        hidden_dim=c.intermediate_size, num_heads=c.num_attention_heads, head_dim=c.head_dim,
        num_kv_heads=c.num_key_value_heads, rope_theta=int(c.rope_theta), norm_eps=c.rms_norm_eps, **more,
    )  # fmt: skip
    model = getattr(library, kind)(config, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    nnx.update(model, maps.tunix(c).load(state, folder, dtype=jnp.float32))
    back = dict(maps.tunix(c).tensors(nnx.state(model, nnx.Param)))
    stored = load_file(folder / "model.safetensors")
    assert set(back) == set(stored)
    assert all((back[n] == stored[n].astype(np.float32)).all() for n in stored)
    return model


def logits(model, ids):
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    mask = np.broadcast_to(np.tril(np.ones((ids.shape[1],) * 2, bool)), (len(ids), ids.shape[1], ids.shape[1]))
    with jax.numpy_dtype_promotion("standard"):
        return model(ids, positions, None, mask)[0]


@pytest.mark.parametrize(("name", "library", "kind"), [("qwen3", "qwen3", "Qwen3"), ("llama", "llama3", "Llama3")])
def test_tunix(name, library, kind, tmp_path):
    """Beside our decoder, with the one rotary setting that Tunix 0.1.7 computes, whatever its configuration says."""
    source, folder = tunix(library), tmp_path / "x"
    shutil.copytree(GOLDEN / name, folder)
    text = json.loads((folder / "config.json").read_text())
    text["rope_parameters"] = {"rope_theta": 1e6, "rope_type": "default"}
    (folder / "config.json").write_text(json.dumps(text))
    ids = load_file(GOLDEN / name / "reference.safetensors")["ids"]
    module, variables = load_model(folder)
    model = filled(source, kind, folder, **({"use_tied_embedding": True} if name == "qwen3" else {}))
    np.testing.assert_allclose(logits(model, ids), module.apply(variables, ids), rtol=0, atol=1e-4)
