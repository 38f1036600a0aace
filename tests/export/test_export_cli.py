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


def test_a_program_of_its_own_and_whether_it_serves(checkpoint, tmp_path):
    out = tmp_path / "out"
    options = ("--target", "stablehlo", "--batch", "1:4", "--length", "8")
    text = run("export", checkpoint, "--out", out, *options).stdout
    assert "stablehlo for cpu, takes input_ids int32[batch, 8]" in text
    told = json.loads(run("serve-check", out, "--batch", "3", "--json").stdout)
    assert told["inputs"] == ["int32[3, 8]"] and told["outputs"] == ["float32[3, 8, 96]"] and told["finite"]
    assert "axis 0 (batch) has size 5; allowed are 1 to 4" in run("serve-check", out, "--batch", "5", status=1).stderr
    assert "length: this artifact has no axis of that name" in run("serve-check", out, "--length", 8, status=1).stderr
    data = bytearray((out / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "weights.safetensors").write_bytes(data)
    assert "weights.safetensors: damaged" in run("serve-check", out, status=1).stderr
    assert "found neither manifest.json" in run("serve-check", tmp_path, status=1).stderr
    run("export", checkpoint, "--out", out, "--target", "stablehlo", "--engine", "vllm", status=2)
    run("export", checkpoint, "--out", out, "--batch", "4", status=2)
    run("export", checkpoint, "--out", out, "--target", "stablehlo", "--batch", "4:1", status=2)


def test_whether_a_folder_for_engines_serves(checkpoint, tmp_path):
    run("export", checkpoint, "--out", tmp_path / "out")
    text = run("serve-check", tmp_path / "out").stdout
    assert "int32[2, 16] -> float32[2, 16, 96]" in text and text.endswith("ok\n")


def test_what_goes_wrong_is_said_in_a_line(checkpoint, tmp_path):
    options = ("export", checkpoint, "--out", tmp_path / "x")
    assert "vllm doesn't load W8A16" in run(*options, "--target", "modelopt", status=1).stderr
    assert "unknown target 'onnx'; known are compressed-tensors" in run(*options, "--target", "onnx", status=1).stderr
    assert "found no config.json" in run(*options, "--source", tmp_path, status=1).stderr
    run(*options, "--max-shard-size", "-1", status=2)
    run(*options, "--target", "modelopt", "--engine", "tensorrt-llm", "--dtype", "float32")
    assert decoders.read_folder(tmp_path / "x")["model.norm.weight"].word == "F32"
    assert "holds an export already; write overwrite=True (--overwrite)" in run(*options, status=1).stderr
