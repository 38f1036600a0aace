"""Exports in vLLM itself, its CPU build: every row of llama, the common ones of other dense families.

`make vllm` makes the environment. One process (vllm_cpu.py) loads one folder after another. The mean difference of the
logits to those of the decoded weights, over their deviation, is below 0.015 where activations stay in bfloat16; 0.1
where vLLM quantizes them to 8 bits, and 0.3 to 4 bits, by scales of its own. `-s` prints the table.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jqopt
from jqopt.export import compressed_tensors, modelopt
from jqopt.hf import load_model
from tests.export import tiny

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

COMMON = [("compressed-tensors", name) for name in ("FP8", "FP8_DYNAMIC", "W8A8", "W4A16", "NVFP4A16", "NVFP4")]
COMMON += [("modelopt", "NVFP4"), ("modelopt", "FP8")]
TABLES = {"compressed-tensors": compressed_tensors.ROWS, "modelopt": modelopt.ROWS}
ROWS = {(target, row.name): row for target, rows in TABLES.items() for row in rows}
CASES = [("llama", target, name) for target, table in tiny.TABLES.items() for name in table]
CASES += [(family, *case) for family in ("qwen3", "mistral") for case in COMMON]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{folder name: what vLLM made of it}."""
    root, folders = tmp_path_factory.mktemp("exports"), []
    for family in dict.fromkeys(family for family, _, _ in CASES):
        tiny.make(root / family, family)
        run = jax.jit(load_model(root / family)[0].apply)
        for target, name in (case[1:] for case in CASES if case[0] == family):
            smoothed = tiny.SMOOTHED.get(name, "") if target == "modelopt" else ""
            qm = tiny.rounded(root / family, tiny.TABLES[target][name], smoothed)
            folders.append(root / f"{family}-{target}-{name}")
            jqopt.export(qm, folders[-1], target, engine="other")
            np.savez(folders[-1] / "reference.npz", ids=tiny.IDS, logits=run(tiny.floats_of(qm), tiny.IDS))
    command = [sys.executable, str(Path(__file__).with_name("vllm_cpu.py")), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(t.removeprefix("RESULT ")) for t in done.stdout.splitlines() if t.startswith("RESULT ")]
    assert len(lines) == len(folders), done.stderr[-3000:]
    print(*(f"{x['folder']} | {_said(x)}" for x in lines), sep="\n")
    return {x["folder"]: x for x in lines}


def _said(found) -> str:
    return found.get("error") or f"{found['mean']:.4f} | {', '.join(found['kernels'])} | vLLM {found['version']}"


def bound(target: str, name: str) -> float:
    """Of the mean difference, by what the scheme does to activations."""
    recipe = tiny.TABLES[target][name]
    inputs = [str(rule.get("input")) for rule in recipe["rules"] if "input" in rule]
    if not inputs:
        return 0.015
    return 0.3 if any("fp4" in x for x in inputs) else 0.1


@pytest.mark.parametrize(("family", "target", "name"), CASES)
def test_vllm_runs_it(family, target, name, results):
    found = results[f"{family}-{target}-{name}"]
    row = ROWS.get((target, name))  # None: a mixture, or a cache beside a row
    if row is not None and "vllm" not in row.engines:
        assert "only supports" in found["error"], found
        return
    assert "error" not in found, found
    assert found["quantization"].startswith(target), found
    assert found["mean"] < bound(target, name), found
