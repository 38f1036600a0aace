"""The report: bytes and errors against sums written out, what was left alone, with and without the float weights."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jqopt
from jqopt._report import size
from tests import arrays

X = arrays.normal(0, (4, 32))


def model(params, x):
    """Two products, a bias, and one product of activations."""
    h = x @ params["up"] + params["bias"]
    return (h @ h.T) @ h @ params["down"]


def params_of() -> dict:
    keys = jax.random.split(jax.random.key(1), 2)
    up = jax.random.normal(keys[0], (32, 64))
    return {"up": up, "bias": jnp.zeros(64), "down": jax.random.normal(keys[1], (64, 48), jnp.bfloat16)}


def model_bf16(params, x):
    return model({**params, "down": params["down"].astype(jnp.float32)}, x)


def quantized(recipe="int8_weight_only", **options):
    params = params_of()
    return jqopt.quantize_model(model_bf16, recipe, params=params, inputs=X, **options), params


def row(report, path):
    return next(r for r in report.rows if r.path == path)


def test_bytes_and_bits_written_out():
    qm, _ = quantized()
    report = qm.report()
    up, down = row(report, "up"), row(report, "down")
    assert (up.float_bytes, up.packed_bytes) == (32 * 64 * 4, 32 * 64 + 64 * 4)  # a byte each, a float a column
    assert (down.float_bytes, down.packed_bytes) == (64 * 48 * 2, 64 * 48 + 48 * 4)
    assert up.bits == 8 * (32 * 64 + 64 * 4) / (32 * 64)
    assert report.bytes_before == up.float_bytes + down.float_bytes + 64 * 4
    assert report.bytes_after == up.packed_bytes + down.packed_bytes + 64 * 4
    assert report.bits_per_weight == 8 * (up.packed_bytes + down.packed_bytes) / (32 * 64 + 64 * 48)
    assert (report.parameters, report.values) == (3, 32 * 64 + 64 + 64 * 48)


def test_errors_written_out():
    qm, params = quantized("nvfp4_weight_only")
    for path, found in [("up", row(qm.report(), "up")), ("down", row(qm.report(params), "down"))]:
        w = np.asarray(params[path].astype(jnp.float32), np.float64)
        q = np.asarray(qm.params[path].replace(dtype="float32").dequantize(), np.float64)
        assert found.sqnr_db == pytest.approx(10 * np.log10((w**2).sum() / ((w - q) ** 2).sum()), abs=1e-4)
        assert found.largest_error == pytest.approx(np.abs(w - q).max(), rel=1e-6)
        assert 15 < found.sqnr_db < 25  # four bits with a scale for 16 normal values


def test_a_weight_that_fits_exactly():
    """Whole numbers up to 127 are INT8 codes with a scale of one."""
    w = jnp.round(jax.random.uniform(jax.random.key(0), (32, 8), minval=-126, maxval=126)).at[0].set(127.0)
    qm = jqopt.quantize_model(lambda p, x: x @ p["w"], "int8_weight_only", params={"w": w}, inputs=X)
    [found] = qm.report().rows
    assert (found.sqnr_db, found.largest_error) == (math.inf, 0.0)
    assert "exact" in str(qm.report())
    assert qm.report().to_dict()["rows"][0]["sqnr_db"] is None


def test_what_was_left_alone_and_why():
    recipe = {"schema": 1, "rules": [{"match": "down", "keep": True}, {"match": "*", "weight": "int8"}]}
    qm, _ = quantized(recipe)
    left = {x.name: x for x in qm.report().left}
    assert "kept by" in left["down"].reason
    assert left["down"].bytes == 64 * 48 * 2
    assert left["bias"].reason == "no dot, convolution or lookup reads it"
    assert sum(x.path is None for x in left.values()) == 2  # h @ h.T and its product with h
    assert "left alone: bias (256 B): no dot" in str(qm.report())


def test_a_parameter_with_two_sites_counts_once():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(64, 32)
            return embed.attend(embed(ids))

    ids = jnp.zeros((2, 4), jnp.int32)
    variables = Tied().init(jax.random.key(0), ids)
    recipe = {"schema": 1, "rules": [{"match": "*", "weight": "int8"}]}
    report = jqopt.quantize_model(Tied(), recipe, params=variables, inputs=ids).report()
    first, second = report.rows
    assert (first.op, second.op, second.shares) == ("gather", "dot_general", first.site)
    assert report.bytes_before == 64 * 32 * 4
    assert report.bytes_after == first.packed_bytes == second.packed_bytes
    assert f"as {first.site}" in str(report)


def test_json_and_table():
    qm, _ = quantized("nvfp4", batches=[X])
    data = json.loads(json.dumps(qm.report().to_dict(), allow_nan=False))
    assert data["rows"][0]["weight"] == "nvfp4/16"
    assert (data["rows"][0]["format"], data["rows"][0]["granularity"]) == ("nvfp4", "block")
    assert data["recipe"] == "nvfp4"
    lines = str(qm.report()).splitlines()
    assert lines[0].split() == [
        "site",
        "op",
        "weight",
        "input",
        "float",
        "packed",
        "bits",
        "SQNR",
        "dB",
        "max",
        "error",
    ]
    assert lines[2].startswith("up ")


def test_without_the_float_weights():
    """After donation they are gone; the report says less, and doesn't fail."""
    qm, _ = quantized(donate=True)
    assert all(r.sqnr_db is None and r.largest_error is None for r in qm.report().rows)
    assert "SQNR" not in str(qm.report())


def test_of_a_loaded_model(tmp_path):
    qm, params = quantized()
    jqopt.save(tmp_path / "q", qm)
    again = jqopt.load(tmp_path / "q", model_bf16)
    assert again.report().rows[0].sqnr_db is None
    assert again.report(params).to_dict() == qm.report().to_dict()


def test_numbers_in_the_tree_are_no_parameters():
    params = {"w": jnp.ones((32, 8)), "scale": 2.0}
    qm = jqopt.quantize_model(lambda p, x: x @ p["w"] * p["scale"], "int8_weight_only", params=params, inputs=X)
    assert qm.report(params).parameters == 1


def test_other_parameters_are_refused():
    qm, params = quantized()
    with pytest.raises(jqopt.PlanError, match="found shape"):
        qm.report({**params, "up": jnp.zeros((64, 32))})


def test_nnx_holds_its_floats():
    module = nnx.Linear(32, 16, rngs=nnx.Rngs(0))
    qm = jqopt.quantize_model(module, "int8_weight_only", inputs=X)
    assert qm.report().rows[0].sqnr_db > 30
    assert qm.report(module).to_dict() == qm.report().to_dict()


def test_stacked_layers():
    """One row for all layers; the error is over all of them."""
    w = arrays.normal(0, (3, 32, 32))
    run = lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]  # noqa: E731
    qm = jqopt.quantize_model(run, "nvfp4_weight_only", params={"w": w}, inputs=X)
    [found] = qm.report().rows
    off = np.asarray(w, np.float64) - np.asarray(qm.params["w"].dequantize(), np.float64)
    assert found.sqnr_db == pytest.approx(
        10 * np.log10((np.asarray(w, np.float64) ** 2).sum() / (off**2).sum()), abs=1e-4
    )
    assert found.packed_bytes == 3 * (32 * 32 // 2 + 32 * 2 + 4)  # codes, a scale for 16 values, a global scale


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (5_970_000, "5.97 MB"), (16e9, "16 GB"), (2e12, "2 TB")],
)
def test_sizes(count, text):
    assert size(int(count)) == text
