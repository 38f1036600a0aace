"""What inspect says of kernels is what runs: the kernel it names is the one that the product is computed with."""

import jax
import jax.numpy as jnp
import pytest
import typer
from flax import linen as nn

import jqopt
from jqopt import _cli_inspect, _ops, cli
from jqopt.export.checkpoint import Checkpoint
from tests import arrays

RECIPES = ["int8", "int8_per_token", "int8_weight_only", "fp8", "mxfp8", "nvfp4", "nvfp4_weight_only", "mxfp6"]


@pytest.mark.parametrize("rows", [1, 7, 96])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_named_kernel_runs(recipe, rows, tmp_path, monkeypatch):
    model, x = nn.Dense(96), arrays.normal(0, (rows, 64))
    variables = model.init(jax.random.key(1), x)
    qm = jqopt.quantize_model(model, recipe, params=variables, batches=[x])
    jqopt.save(tmp_path / "q", qm)
    [site] = _cli_inspect.facts(Checkpoint(tmp_path / "q"), [rows])["sites"]
    ran, original = [], _ops._run
    monkeypatch.setattr(_ops, "_run", lambda kernel, *rest: ran.append(kernel.name) or original(kernel, *rest))
    qm(x)
    assert ran == [site["kernels"][0]["kernel"]]
    assert ran[0] not in site["kernels"][0]["not"]


def test_other_operations(tmp_path):
    """A lookup and a convolution have no table of kernels; inspect says what they do instead."""

    class Both(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Conv(8, (3,))(nn.Embed(32, 16)(ids))

    ids = jnp.zeros((2, 6), jnp.int32)
    variables = Both().init(jax.random.key(0), ids)
    recipe = {"schema": 1, "rules": [{"match": "*", "weight": "int8"}]}
    jqopt.save(tmp_path / "q", jqopt.quantize_model(Both(), recipe, params=variables, inputs=ids))
    facts = _cli_inspect.facts(Checkpoint(tmp_path / "q"), [1, 512])
    assert {s["op"]: s["runs"] for s in facts["sites"]} == {k: _cli_inspect.INSTEAD[k] for k in ("gather", "conv")}
    text = _cli_inspect.text(facts)
    assert "decodes the rows it looks up" in text
    assert "traced with: int32[2, 6]" in text


def test_reasons_are_for_the_asked_device(tmp_path):
    model, x = nn.Dense(96), jnp.ones((4, 64))
    variables = model.init(jax.random.key(1), x)
    jqopt.save(tmp_path / "q", jqopt.quantize_model(model, "int8", params=variables, batches=[x]))
    for device in ("cpu", "gpu", "tpu", "cuda:90", "cuda:100"):
        facts = _cli_inspect.facts(Checkpoint(tmp_path / "q"), [1, 64], device)
        assert facts["device"] == device
        assert all(k["kernel"] for k in facts["sites"][0]["kernels"])
        assert f"kernels on {device}:" in _cli_inspect.text(facts)
        told = {name for k in facts["sites"][0]["kernels"] for name in (k["kernel"], *k["not"])}
        assert ("ffi_gemm" in told) and any(name.startswith("xla_") for name in told)


def test_what_a_device_may_be_called():
    assert [cli._device(d) for d in (None, "cpu", "gpu", "cuda", "cuda:90")] == [None, "cpu", "gpu", "cuda", "cuda:90"]
    for wrong in ("h200", "cuda:", "cuda:9.0", "cpu:1", "tpu:90"):
        with pytest.raises(typer.BadParameter, match="or cuda:90"):
            cli._device(wrong)
