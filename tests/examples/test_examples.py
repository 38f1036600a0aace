"""The examples run as scripts in a process of their own, as a reader would run them, and say what they should."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def output_of(script: str, *arguments: str, folder: Path, **environment: str) -> str:
    """What the script prints, run from another folder, with warnings as errors and strict promotion."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / script), *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def relative_error(text: str) -> float:
    return float(re.search(r"relative error of the outputs: ([\d.]+)%", text)[1])


@pytest.mark.parametrize("script", [f.name for f in sorted(EXAMPLES.glob("*.py"))])
def test_examples_are_short(script):
    assert len((EXAMPLES / script).read_text().splitlines()) <= 40


def test_quickstart_linen(tmp_path):
    text = output_of("quickstart_linen.py", folder=tmp_path)
    assert "the same through model.apply: True" in text
    assert "the same after save and load: True" in text
    assert "3 of 6 parameters quantized" in text
    assert 0.1 < relative_error(text) < 5  # three layers of INT8, each with about 1% of noise
    assert not list(tmp_path.iterdir())


def test_quickstart_nnx(tmp_path):
    text = output_of("quickstart_nnx.py", folder=tmp_path)
    assert "the same as a module: True" in text
    assert "int8/token dynamic" in text
    assert "fp8/tensor dynamic" in text
    assert 0.1 < relative_error(text) < 8  # E4M3 has 3 bits of mantissa: about 2.6% of noise in weight and input each


def test_plain_function(tmp_path):
    text = output_of("plain_function.py", folder=tmp_path)
    assert "6x[256, 256]" in text
    assert "QTensor(nvfp4, float32[6x256x256]" in text
    assert 1 < relative_error(text) < 30  # six layers of NVFP4, about 10% of noise in weight and input each


@pytest.mark.slow
def test_feedback(tmp_path):
    nearest, short, long = map(float, re.findall(r"KL ([\d.]+)e-3", output_of("feedback.py", folder=tmp_path)))
    assert 5 < long < short < nearest < 60


@pytest.mark.slow
def test_export_hf(tmp_path):
    text = output_of("export_hf.py", folder=tmp_path)
    assert "compressed-tensors, 28 x FP8" in text
    assert "modelopt, 28 x FP8" in text
    assert text.count("it computes the same: True") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_rotate(tmp_path):
    text = output_of("rotate.py", folder=tmp_path)
    rows = re.findall(r"^(.*): float change (\S+), INT8 error ([\d.]+)%$", text, re.MULTILINE)
    (_, _, before), (name, change, after) = rows
    assert name == "rotated" and float(change) < 1e-5
    assert float(after) < float(before) / 2  # three channels a hundred times the others, spread over 256


@pytest.mark.slow
def test_generate(tmp_path):
    text = output_of("generate.py", folder=tmp_path)
    blocks = re.split(r"^--- .*$", text, flags=re.MULTILINE)[1:]
    assert [block.count("\n") for block in blocks] == [3, 3, 3]
    greedy, drawn, packed = (block.split() for block in blocks)
    assert greedy != drawn
    assert greedy[:8] == packed[:8]  # INT4 in blocks of 64 begins as the float model does


ADAM = {"JAX_NUMPY_DTYPE_PROMOTION": "standard"}  # optax.adam multiplies Python numbers with int32 arrays


def before_and_after(text: str) -> tuple[float, float]:
    before, after = re.search(r"([\d.]+) before, ([\d.]+) after", text).groups()
    return float(before), float(after)


def losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"^step \d+: loss ([\d.]+)$", text, re.MULTILINE)]


@pytest.mark.slow
def test_qat_linen(tmp_path):
    """NVFP4 on text that training hasn't seen: 16 steps take a tenth off what PTQ lost, at least."""
    text = output_of("qat_linen.py", "16", folder=tmp_path, **ADAM)
    before, after = before_and_after(text)
    assert after < 0.9 * before
    assert len(losses(text)) == 16 and losses(text)[0] == pytest.approx(before, rel=0.3)


@pytest.mark.slow
def test_qat_nnx(tmp_path):
    text = output_of("qat_nnx.py", "100", folder=tmp_path, **ADAM)
    before, after = before_and_after(text)
    assert after < 0.5 * before
    assert losses(text)[0] == pytest.approx(before, rel=0.2)


@pytest.mark.slow
def test_qlora(tmp_path):
    """From a text that looks like nothing to the model (chance is log 4096 = 8.3) towards one that can be read."""
    text = output_of("qlora.py", "16", folder=tmp_path, **ADAM)
    before, after = before_and_after(text)
    assert before > 8.3 > after + 1
    assert "values beside 7 packed weights" in text and len(losses(text)) == 16


@pytest.mark.long
def test_train_lm(tmp_path):
    """Ten steps with the same seeds and data: FP8 near bfloat16, NVFP4 not far; resumed in the middle, bit for bit."""
    text = output_of("train_lm.py", "--steps", "10", folder=tmp_path, **ADAM)
    gaps = {name: float(gap) for name, gap in re.findall(r"^(\w+(?: plain)?) .*gap ([+-][\d.]+)%$", text, re.MULTILINE)}
    assert list(gaps) == ["fp8_current", "mxfp8", "nvfp4", "nvfp4 plain"]
    assert abs(gaps["fp8_current"]) < 1 and abs(gaps["mxfp8"]) < 1 and abs(gaps["nvfp4"]) < 5
    assert "resumed in the middle, bit for bit: True" in text


@pytest.mark.slow
def test_quantized_kv_cache(tmp_path):
    text = output_of("quantized_kv_cache.py", folder=tmp_path)
    rows = re.findall(r"(fp8 cast|nvfp4 static) +([\d,]+) bytes, ([\d.]+)% of bfloat16; .* agrees on ([\d.]+)%", text)
    # 4 layers, keys and values of 8 sequences x 128 positions x 2 heads x 64: a byte each and two scales a layer; half
    # a byte and a scale's byte in 16
    values = 4 * 2 * 8 * 128 * 2 * 64
    scales = 4 * 2 * 4
    assert [int(row[1].replace(",", "")) for row in rows] == [values + scales, values // 2 + values // 16 + scales]
    assert [float(row[2]) for row in rows] == [50.0, 28.1]
    assert float(rows[0][3]) > 95 and float(rows[1][3]) > 90


@pytest.mark.slow
def test_the_demo(tmp_path):
    text = output_of("tinylm/demo.py", "--windows", "8", folder=tmp_path)
    assert "the same 1,048,576 logits" in text
    rows = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"(\w+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)%", line):
            rows[match[1]] = tuple(map(float, match.groups()[1:]))
    presets = ["int8_per_token", "fp8", "mxfp8", "int4_block_weight_only", "nvfp4_weight_only", "nvfp4"]
    assert list(rows) == presets
    bits, size, perplexity, kl, agreement = zip(*rows.values(), strict=True)
    # 8 + 8/32 for an e8m0 scale in 32 values, 4 + 32/128 for INT4 with a float32 scale, 4 + 8/16 for NVFP4
    assert bits[2:] == (8.25, 4.25, 4.5, 4.5)
    assert all(s < 8.39 for s in size)
    assert kl[0] < kl[1] < kl[4] < kl[5]
    assert agreement[0] > agreement[5] > 80
    assert max(perplexity) < 1.1 * min(perplexity)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_demo_refuses_windows_it_does_not_have(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "tinylm/demo.py"), "--windows", "1350"],
        env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "1349 windows" in done.stderr
