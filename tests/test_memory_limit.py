"""A deep model on the command line: statistics are gathered for some sites at a time, in the memory that is allowed."""

from __future__ import annotations

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import jqopt
from jqopt import _calibrate
from jqopt.cli import app

pytestmark = [pytest.mark.slow, pytest.mark.quick]

LAYERS, WIDTH, INNER = 32, 32, 48
CONFIG = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
MOMENTS = LAYERS * 4 * (3 * WIDTH**2 + INNER**2)  # bytes: inputs of q/k/v, o, gate/up; of down
LIMIT = 300_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of 32 narrow layers with random weights, and token ids beside it."""
    here = tmp_path_factory.mktemp("deep")
    shapes = {"model.embed_tokens.weight": (64, WIDTH), "model.norm.weight": (WIDTH,), "lm_head.weight": (64, WIDTH)}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{m}_proj.weight": (WIDTH, WIDTH) for m in "qkvo"}
        shapes |= {f"{block}.mlp.{m}_proj.weight": (INNER, WIDTH) for m in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": (WIDTH, INNER)}
        shapes |= {f"{block}.{n}.weight": (WIDTH,) for n in ("input_layernorm", "post_attention_layernorm")}
    rng = np.random.default_rng(0)
    values = {n: (rng.normal(size=s) / 8 + (len(s) == 1)).astype(ml_dtypes.bfloat16) for n, s in shapes.items()}
    (here / "hf").mkdir()
    save_file(values, here / "hf" / "model.safetensors", metadata={"format": "pt"})
    (here / "hf" / "config.json").write_text(json.dumps(CONFIG))
    np.save(here / "ids.npy", rng.integers(0, 64, 32 * 16).astype(np.uint16))
    return here


def jqopt_says(*words: str) -> str:
    got = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert got.exit_code == 0, got.output
    return got.stdout + got.stderr


def test_hessians_of_32_layers_are_gathered_in_as_many_passes_as_the_plan_says(folder, monkeypatch):
    held: list[int] = []
    gather = _calibrate.calibrate

    def watched(*args, **kwargs):
        stats = gather(*args, **kwargs)
        held.append(sum(x.nbytes for x in jax.tree.leaves(stats)))
        return stats

    monkeypatch.setattr(_calibrate, "calibrate", watched)
    data = ("--data", folder / "ids.npy", "--seq", 16, "--batch", 16)
    said = jqopt_says("plan", folder / "hf", "--recipe", "int4_gptq", "--memory", LIMIT, *data)
    found = re.search(r"(\d+) passes over the data; statistics of ([\d,]+) bytes, at most ([\d,]+) at a time", said)
    assert found, said
    passes, whole, most = (int(x.replace(",", "")) for x in found.groups())
    assert MOMENTS <= whole < 1.1 * MOMENTS and most <= LIMIT
    assert passes == -(-whole // LIMIT)  # no more than must be: units are small beside the limit

    jqopt_says("quantize", folder / "hf", "--recipe", "int4_gptq", "--memory", LIMIT, *data, "--out", folder / "some")
    assert len(held) == passes and max(held) == most
    jqopt_says("quantize", folder / "hf", "--recipe", "int4_gptq", *data, "--out", folder / "all")
    some, whole_model = (jqopt.load(folder / name) for name in ("some", "all"))
    for a, b in zip(jax.tree.leaves(some), jax.tree.leaves(whole_model), strict=True):
        np.testing.assert_array_equal(a, b)
