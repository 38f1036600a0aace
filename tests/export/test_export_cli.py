"""`jqopt export`: a checkpoint that `jqopt quantize` wrote knows its model, and becomes a folder for engines."""

import json

import pytest
from typer.testing import CliRunner

from jqopt.cli import app
from tests.export import decoders, tiny


def run(*words: object, status: int = 0):
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == status, f"{result.exit_code}\n{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    tiny.make(root / "model")
    (root / "model" / "tokenizer.json").write_text("{}")
    run("quantize", root / "model", "--recipe", "int8_weight_only", "--out", root / "ckpt", "--scan-layers")
    return root / "ckpt"


def test_export_needs_nothing_but_the_checkpoint(checkpoint, tmp_path):
    text = run("export", checkpoint, "--out", tmp_path / "out", "--max-shard-size", "100kB").stdout
    assert "compressed-tensors, 14 x W8A16_CHANNEL; 49 tensors" in text  # 14 x 3, and 7 in floats
    assert "unquantized parameters are written as bfloat16, from float32" in text
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert decoders.read_folder(tmp_path / "out")["model.norm.weight"].word == "BF16"
    told = json.loads(run("export", checkpoint, "--out", tmp_path / "out", "--overwrite", "--json").stdout)
    assert told["schemes"] == {"W8A16_CHANNEL": 14} and "model.safetensors" in told["files"]


def test_what_goes_wrong_is_said_in_a_line(checkpoint, tmp_path):
    options = ("export", checkpoint, "--out", tmp_path / "x")
    assert "vllm doesn't load W8A16" in run(*options, "--target", "modelopt", status=1).stderr
    assert "unknown target 'onnx'; known are compressed-tensors" in run(*options, "--target", "onnx", status=1).stderr
    assert "found no config.json" in run(*options, "--source", tmp_path, status=1).stderr
    run(*options, "--max-shard-size", "-1", status=2)
    run(*options, "--target", "modelopt", "--engine", "tensorrt-llm", "--dtype", "float32")
    assert decoders.read_folder(tmp_path / "x")["model.norm.weight"].word == "F32"
    assert "holds an export already; write overwrite=True (--overwrite)" in run(*options, status=1).stderr
