"""`jqopt generate`: text of a float folder and of its quantized checkpoint, and what it needs."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from jqopt.cli import app

GOLDEN = Path(__file__).parent / "hf" / "golden" / "mistral"
WORDS = {f"w{i}": i for i in range(40)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The golden Mistral with a tokenizer: the word `w7` is the token 7."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    target = tmp_path_factory.mktemp("hf") / "mistral"
    shutil.copytree(GOLDEN, target)
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(target / "tokenizer.json"))
    return target


def run(*args, code=0):
    found = CliRunner().invoke(app, [*map(str, args)])
    assert found.exit_code == code, found.output
    return found


def words(ids):
    return " ".join(f"w{i}" for i in ids)


def test_greedy_text_is_that_of_transformers(folder):
    reference = load_file(GOLDEN / "reference.safetensors")
    prompts = [x for row in reference["ids"] for x in ("--prompt", words(row))]
    found = json.loads(run("generate", folder, *prompts, "--max-new-tokens", 6, "--json").stdout)
    for item, row in zip(found["generated"], reference["greedy"], strict=True):
        expected = row[12:].tolist()
        end = expected.index(2) + 1 if 2 in expected else 6  # </s>, as config.json says
        assert item["tokens"] == expected[:end]
        assert item["ended"] == (end < 6 or expected[-1] == 2)
        assert item["text"] == words(expected[:end])


def test_a_checkpoint_needs_its_folder_no_more(folder, tmp_path):
    out = tmp_path / "q"
    run("quantize", folder, "--recipe", "int8_weight_only", "--out", out)
    text = run(
        "generate", out, "--prompt", "w5 w9 w11", "--max-new-tokens", 4, "--temperature", 1, "--top-p", 0.9
    ).stdout
    assert text.startswith("w5 w9 w11") and text.count("w") > 3


def test_a_packed_cache(folder):
    found = run("generate", folder, "--prompt", "w5", "--max-new-tokens", 3, "--kv-cache", "fp8", "--json")
    assert json.loads(found.stdout)["kv_cache"] == "fp8"


def test_what_it_needs(folder, tmp_path):
    assert "needs the model's tokenizer" in run("generate", GOLDEN, "--prompt", "w1", code=1).stderr
    assert "empty prompt" in run("generate", folder, "--prompt", " ", code=1).stderr
    assert "unknown format 'fp9'" in run("generate", folder, "--prompt", "w1", "--kv-cache", "fp9", code=1).stderr
    (tmp_path / "toy.py").write_text(
        "import jax.numpy as jnp\ndef m():\n    return lambda p, x: x @ p, jnp.ones((2, 2))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert "function is no decoder of jqopt.hf" in run("generate", "toy:m", "--prompt", "w1", code=1).stderr
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "generation_config.json").write_text("[")
    assert "JSON cannot be read" in run("generate", broken, "--prompt", "w1", code=1).stderr
