"""A checkpoint in the hands of Orbax alone: the reader of docs/checkpoints.md, where jqopt cannot be imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jqopt
from jqopt._apply import Quantized
from jqopt._model import QuantizedModel
from tests import arrays
from tests.export import tiny

DOCS = Path(__file__).parents[2] / "docs" / "checkpoints.md"
ALONE = "import runpy, sys; sys.modules['jqopt'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"
K, N = 256, 128


def model(params, x):
    """Every format's matrix, a stack of them, and a kernel [N, H, D] of which two axes are contracted."""
    heads = x.reshape(*x.shape[:-1], 4, K // 4)
    both = jnp.einsum("bnh,nhd->bd", heads, params["heads"]) + jnp.einsum("bk,lkn->bn", x, params["stack"])
    return both + sum(x @ params[name] for name in jqopt.formats.names())


def packed() -> QuantizedModel:
    """Random codes and scales in every format; some with what may stand beside the codes."""
    params = {name: jax.ShapeDtypeStruct((K, N), jnp.float32) for name in jqopt.formats.names()}
    params |= {"heads": jax.ShapeDtypeStruct((4, K // 4, N), jnp.float32)}
    params |= {"stack": jax.ShapeDtypeStruct((3, K, N), jnp.float32)}
    rules = [{"match": name, "weight": name} for name in jqopt.formats.names()]
    rules += [{"match": "heads", "weight": {"format": "int4", "block": 32}}]
    rules += [{"match": "stack", "weight": {"format": "int8", "granularity": "tensor"}}]
    graph = jqopt.trace(model, params, jax.ShapeDtypeStruct((1, K), jnp.float32))
    plan = jqopt.plan({"schema": 1, "name": "each", "rules": rules}, graph)
    made = {}
    for number, (path, decision) in enumerate(plan.quantized.items()):
        rng = np.random.default_rng(number)
        made[path] = tiny._random(decision, rng, np.random.default_rng([9, number]))
    low = {"low_a": arrays.normal(50, (4, K), jnp.bfloat16), "low_b": arrays.normal(51, (N, 4), jnp.bfloat16)}
    made["fp8"] = made["fp8"].replace(**low)
    made["int4"] = made["int4"].replace(
        pre_scale=jnp.asarray(np.random.default_rng(52).uniform(0.5, 2, K), jnp.float32)
    )
    made["int8"] = made["int8"].replace(rotation=64)
    return QuantizedModel(model, plan, Quantized(made, {}))


def test_the_documented_reader_needs_no_jqopt(tmp_path):
    """All formats: decoded as ours, to the bit but for matrix products; packed under jit, in parts on two devices."""
    qm = packed()
    jqopt.save(tmp_path / "checkpoint", qm)
    text = next(t for t in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if t.startswith("# read.py"))
    assert "jqopt" not in text
    (tmp_path / "read.py").write_text(text)
    environment = {k: x for k, x in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ALONE, "read.py", str(tmp_path / "checkpoint"), str(tmp_path / "out.npz")]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = np.load(tmp_path / "out.npz")
    wanted = jax.jit(lambda tree: {k: q.dequantize() for k, q in tree.items()})(qm.params)
    assert set(found) == {"linear", "parts", *(f"params/{name}" for name in wanted)}
    for name, x in wanted.items():
        if qm.params[name].is_plain:
            np.testing.assert_array_equal(found[f"params/{name}"], x, err_msg=name)
        else:
            np.testing.assert_allclose(found[f"params/{name}"], x, rtol=0, atol=1e-5 * np.abs(x).max(), err_msg=name)
    np.testing.assert_allclose(found["linear"][0], found["params/nvfp4"].sum(0), rtol=1e-5, atol=1e-5)
    assert found["parts"].tolist() == [2, N // 2]
