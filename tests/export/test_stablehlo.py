"""Deployable artifacts: the model's bits without its code, bounds that are checked, and damage that is found."""

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jqopt
from jqopt.errors import CheckpointError, UnsupportedError
from jqopt.export import artifact as artifact_file
from jqopt.hf import load_model
from tests.export import tiny
from tests.hf import zoo

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
DOCS = Path(__file__).parents[2] / "docs" / "export.md"
GOLDEN = Path(__file__).parents[1] / "hf" / "golden"
TOKENS = ((jax.ShapeDtypeStruct((1, 8), jnp.int32),), {})


def ids(*shape):
    return np.random.default_rng(3).integers(0, tiny.CONFIG["vocab_size"], shape).astype(np.int32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("model") / "source", **SMALL)


def packed(source, recipe):
    qm = tiny.packed(source, recipe)
    qm.inputs = TOKENS
    return qm


@pytest.fixture(scope="module")
def model(source):
    return packed(source, tiny.COMPRESSED_TENSORS["NVFP4A16"])


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("artifacts") / "nvfp4"
    jqopt.export(model, out, "stablehlo")
    return out


@pytest.fixture(scope="module")
def artifact(folder):
    return jqopt.artifacts.load(folder)


# ---- the same numbers


def test_bits_of_the_model_at_other_sizes(model, artifact):
    np.testing.assert_array_equal(artifact(ids(8, 512)), model(ids(8, 512)))


def test_few_rows_run_the_kernel_for_every_number(model, artifact):
    """The model itself prefers another kernel here; with the artifact's it gives the same bits."""
    x = ids(1, 1)
    got = np.asarray(artifact(input_ids=x))
    np.testing.assert_array_equal(got, jqopt.apply(model.plan, backend="xla_lookup")(model.quant, x))
    np.testing.assert_allclose(got, model(x), rtol=0, atol=1e-5 * np.abs(got).max())


def test_bits_with_quantized_activations_and_cache(source, tmp_path):
    qm = packed(source, {**tiny.COMPRESSED_TENSORS["W8A8"], "kv_cache": "fp8"})
    jqopt.export(qm, tmp_path / "out", "stablehlo")
    found = jqopt.artifacts.load(tmp_path / "out")
    assert sum(x.name.startswith("attention/") for x in found.manifest.arrays) == 2
    np.testing.assert_array_equal(found(ids(3, 30)), qm(ids(3, 30)))


def test_one_artifact_serves_inside_jit(artifact):
    got = jax.jit(lambda x: artifact(x)[:, -1].argmax(-1))(ids(8, 512))
    np.testing.assert_array_equal(got, np.asarray(artifact(ids(8, 512)))[:, -1].argmax(-1))


def test_weights_are_packed_arguments(model, folder, artifact):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [x["shape"] for x in manifest["inputs"]] == [["batch", "length"]]
    assert manifest["dims"] == {"batch": [1, 8], "length": [1, 512]} and manifest["tokens"] == 96
    found = {x["name"]: (x["dtype"], x["shape"]) for x in manifest["arrays"]}
    assert found["params/layers/mlp/down_proj/kernel/data"] == ("uint8", [2, 32, 32])
    assert found["params/layers/mlp/down_proj/kernel/scale"] == ("uint8", [2, 32, 4])
    assert {dtype for dtype, _ in found.values()} <= {"uint8", "int8", "float32"}
    assert manifest["plan"]["quantized"]["layers/mlp/down_proj/kernel"] == {
        "format": "nvfp4", "granularity": "block", "input": None,
    }  # fmt: skip
    leaves = jax.tree.leaves(model.quant)
    assert all(np.array_equal(a, b) for a, b in zip(artifact.weights, leaves, strict=True))
    text = (folder / "cpu.jax").read_bytes()
    assert max(x.nbytes for x in leaves) < len(text) < sum(x.nbytes for x in leaves)  # programs hold no weight
    assert np.asarray(leaves[0]).tobytes()[:256] not in text


# ---- a process of its own


@pytest.mark.optimized  # as the server's process compiles
def test_a_server_without_flax_and_without_us(model, folder, tmp_path):
    """The program in docs/export.md, where importing Flax or jqopt fails."""
    code = re.search(r"```python\n(# serve\.py.*?)```", DOCS.read_text(), re.DOTALL)
    assert code is not None
    (tmp_path / "serve.py").write_text(code[1])
    for name in ("flax", "jqopt", "jqopt_kernels", "orbax"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    np.save(tmp_path / "ids.npy", ids(8, 512))
    words = [sys.executable, "serve.py", str(folder), "cpu", "ids.npy", "out.npy"]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), model(ids(8, 512)))
    np.save(tmp_path / "ids.npy", ids(9, 4))
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True)
    assert "input_ids: batch of 9, expected 1 to 8" in done.stderr


# ---- what it refuses


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((ids(9, 4),), r"input_ids: axis 0 \(batch\) has size 9; allowed are 1 to 8"),
        ((ids(1, 513),), r"input_ids: axis 1 \(length\) has size 513; allowed are 1 to 512.*length=\(1, 513\)"),
        ((ids(0, 4),), "axis 0 .* has size 0"),
        ((ids(4),), r"found shape \(4,\); expected input_ids int32\[batch, length\]"),
        ((ids(1, 4).astype(np.int64),), "found int64; expected int32"),
        (([[1, 2]],), r"found a list; expected an array: np.asarray\(x, np.int32\)"),
        ((), "found none; expected input_ids"),
        ((ids(1, 4), ids(1, 4)), "found 2 in order; expected input_ids"),
    ],
)
def test_calls_out_of_bounds(inputs, words, artifact):
    with pytest.raises(UnsupportedError, match=words):
        artifact(*inputs)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def resign(folder, file):
    """After a change, its sha256 anew: what a manifest that belongs to other weights looks like."""
    digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    edit(folder, lambda m: m["weights"].update(sha256=digest))


def rename_array(folder):
    path = folder / "weights.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"mlp/down_proj", b"mlp/gown_proj"))
    resign(folder, path.name)


def reshape_array(folder):
    path = folder / "weights.safetensors"
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    head = path.read_bytes()[8 : 8 + size].replace(b"[96, 32]", b"[32, 96]")
    path.write_bytes(struct.pack("<Q", size) + head + path.read_bytes()[8 + size :])
    resign(folder, path.name)


DAMAGES = {
    "weights": (lambda f: flip(f / "weights.safetensors", -1), "weights.safetensors: damaged"),
    "program": (lambda f: flip(f / "cpu.jax", 100), "cpu.jax: damaged"),
    "no weights": (lambda f: (f / "weights.safetensors").unlink(), "weights.safetensors is missing"),
    "no program": (lambda f: (f / "cpu.jax").unlink(), "cpu.jax is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "found no manifest.json"),
    "cut": (lambda f: (f / "manifest.json").write_text('{"format": '), "manifest.json: it can't be read"),
    "list": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json: it can't be read"),
    "newer": (lambda f: edit(f, lambda m: m.update(version=2)), "version 2; this jqopt reads 1"),
    "stranger": (lambda f: edit(f, lambda m: m.update(format="x")), "jqopt.stablehlo"),
    "key": (lambda f: edit(f, lambda m: m.update(extra=1)), "extra"),
    "bounds": (lambda f: edit(f, lambda m: m["dims"].update(batch=[3, 2])), "expected .least, most."),
    "axis": (lambda f: edit(f, lambda m: m["inputs"][0].update(shape=["batch", "q"])), "bounds are given for"),
    "output": (lambda f: edit(f, lambda m: m.update(output=1)), "no tree of 1 results"),
    "path": (lambda f: edit(f, lambda m: m["weights"].update(file="../w")), "weights.file"),
    "renamed": (rename_array, "doesn't hold the arrays"),
    "reshaped": (reshape_array, r"embedding is float32\[32, 96\]; manifest.json says float32\[96, 32\]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(damage, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "out")
    change, words = DAMAGES[damage]
    change(tmp_path / "out")
    with pytest.raises(CheckpointError, match=words):
        jqopt.artifacts.load(tmp_path / "out")


def test_platforms(model, folder, tmp_path):
    done = jqopt.export(model, tmp_path / "out", "stablehlo", platforms=("cuda", "tpu"))
    assert {"cuda.jax", "cuda.stablehlo", "tpu.jax", "weights.safetensors"} <= set(done.files)
    with pytest.raises(UnsupportedError, match=r"programs for cuda, tpu, and none for cpu.*platforms=\('cpu',\)"):
        jqopt.artifacts.load(tmp_path / "out")
    assert jqopt.artifacts.load(tmp_path / "out", platform="tpu").platform == "tpu"
    with pytest.raises(UnsupportedError, match="expected some of"):
        jqopt.export(model, tmp_path / "x", "stablehlo", platforms=("metal",))


def test_kernels_are_chosen_for_the_platform(source, tmp_path):
    """fp8 products have a kernel on GPUs which multiplies two scaled float32 arrays, and another elsewhere."""
    qm = packed(source, tiny.COMPRESSED_TENSORS["FP8_DYNAMIC"])
    jqopt.export(qm, tmp_path / "out", "stablehlo", platforms=("cpu", "cuda"), batch=4, length=32)
    both = {}
    for platform in ("cpu", "cuda"):
        text = jqopt.artifacts.load(tmp_path / "out", platform=platform).program.mlir_module()
        dots = [line for line in text.splitlines() if "f8E4M3FN" in line and "dot_general" in line]
        both[platform] = {"HIGHEST" in line for line in dots}
    assert both == {"cpu": {False}, "cuda": {True}}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "batch=0: expected a size from 1 on"),
        ({"length": (4, 2)}, r"length=\(4, 2\): expected a size from 1 on, or \(least, most\)"),
        ({"dims": {"x": 3}}, r"x=3: no axis is called so. Inputs: input_ids int32\['batch', 'length'\]"),
        ({"axes": {"q": ("batch",)}}, "no such input; there are input_ids"),
        ({"axes": {"input_ids": ("batch",)}}, r"input_ids has 2 axes, \[1, 8\]; found \['batch'\]"),
        ({"axes": {"input_ids": ("batch", "z")}}, "an axis 'z' without bounds; write dims="),
        ({"platforms": "cpu"}, "expected some of"),
    ],
)
def test_options_that_do_not_fit(options, words, model, tmp_path):
    with pytest.raises(UnsupportedError, match=words):
        jqopt.export(model, tmp_path / "out", "stablehlo", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_is_replaced_only_if_told_and_only_if_ours(model, folder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    with pytest.raises(CheckpointError, match="write overwrite=True"):
        jqopt.export(model, out, "stablehlo")
    jqopt.export(model, out, "stablehlo", overwrite=True, batch=2, length=8)
    assert jqopt.artifacts.load(out).manifest.dims == {} and list(tmp_path.iterdir()) == [out]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(CheckpointError, match="is no artifact: it stays"):
        jqopt.export(model, tmp_path / "mine", "stablehlo", overwrite=True)
    with pytest.raises(UnsupportedError, match=r"load it with jqopt.load\(dir, model\)"):
        jqopt.export(out, tmp_path / "y", "stablehlo")


def test_a_failure_leaves_what_was_there(model, folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_bytes()

    def full(path):
        raise OSError("no space left on device")

    monkeypatch.setattr(artifact_file, "sha256", full)
    with pytest.raises(OSError, match="no space left"):
        jqopt.export(model, tmp_path / "out", "stablehlo", overwrite=True, batch=1, length=8)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


# ---- other models


def two(params, x, mask, *, sign):
    y = jnp.dot(x, params["w"]) * sign
    return {"y": y, "sum": (jnp.sum(y * mask[..., None], axis=1), None)}


def test_named_axes_trees_and_static_arguments(tmp_path):
    params = {"w": jax.random.normal(jax.random.key(0), (32, 16))}
    x, mask = np.ones((2, 5, 32), np.float32), np.ones((2, 5), np.float32)
    recipe = {"schema": 1, "name": "t", "rules": [{"match": "*", "weight": "int8"}]}
    qm = jqopt.quantize_model(two, recipe, params=params, inputs={"x": x, "mask": mask}, sign=-1.0)
    axes = {"x": ("batch", "frames", None), "mask": ("batch", "frames")}
    jqopt.export(qm, tmp_path / "out", "stablehlo", axes=axes, dims={"frames": (2, 1000)}, batch=3)
    artifact = jqopt.artifacts.load(tmp_path / "out")
    x, mask = np.random.default_rng(0).normal(size=(3, 70, 32)).astype(np.float32), np.ones((3, 70), np.float32)
    got, wanted = artifact(mask=mask, x=x), qm(x=x, mask=mask, sign=-1.0)
    assert jax.tree.structure(got) == jax.tree.structure(wanted) and got["sum"][1] is None
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    with pytest.raises(
        UnsupportedError, match=r"axis 1 \(frames\) has size 70, but .*: axis 1 has 71; they must be equal"
    ):
        artifact(mask=np.ones((3, 71), np.float32), x=x)
    with pytest.raises(UnsupportedError, match="mask: axis 0 has size 4; this artifact was exported for 3 alone"):
        artifact(mask=np.ones((4, 70), np.float32), x=x)


class Dropping(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(32, 16, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.drop(self.linear(x))


def test_random_keys_and_modules_with_state(tmp_path):
    recipe = {"schema": 1, "name": "t", "rules": [{"match": "*", "weight": "int8"}]}
    qm = jqopt.quantize_model(Dropping(), recipe, inputs=jax.ShapeDtypeStruct((4, 32), jnp.float32))
    jqopt.export(qm, tmp_path / "out", "stablehlo", batch=4)
    x = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    got = np.asarray(jqopt.artifacts.load(tmp_path / "out")(x))
    assert 0 < (got == 0).sum() < got.size
    np.testing.assert_array_equal(got, qm(x))  # the first call of the model draws what the artifact does


def test_a_model_that_branches_on_a_size(tmp_path):
    def model(params, x):
        y = jnp.dot(x, params["w"])
        return y if x.shape[0] < 4 else -y

    recipe = {"schema": 1, "name": "t", "rules": [{"match": "*", "weight": "int8"}]}
    params = {"w": jnp.ones((32, 16))}
    qm = jqopt.quantize_model(model, recipe, params=params, inputs=jax.ShapeDtypeStruct((2, 32), jnp.float32))
    with pytest.raises(UnsupportedError, match="batch of 1 to 8. If it branches on a size, fix it, as in length=128"):
        jqopt.export(qm, tmp_path / "out", "stablehlo")
    assert not list(tmp_path.iterdir())
    jqopt.export(qm, tmp_path / "out", "stablehlo", batch=(1, 3))


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.GOLDEN)
def test_bits_of_every_family(family, tmp_path):
    """A window, experts, soft caps, learned positions: all of symbolic length."""
    module, variables = load_model(GOLDEN / family)
    recipe = {**tiny.COMPRESSED_TENSORS["W8A16_CHANNEL"], "extends": [tiny.KEEP]}
    qm = jqopt.quantize_model(module, recipe, params=variables, inputs=jax.ShapeDtypeStruct((1, 8), jnp.int32))
    jqopt.export(qm, tmp_path / "out", "stablehlo", length=(1, 32))  # GPT-2 has 32 positions
    x = np.random.default_rng(0).integers(0, 40, (4, 30)).astype(np.int32)
    assert qm.plan.graph is not None
    got, want = jqopt.artifacts.load(tmp_path / "out")(x), qm(x)
    if any(site.op == "ragged_dot" for site in qm.plan.graph.sites):
        # rows of an expert are multiplied in tiles: even one model sums in another order for one sequence than for four
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    else:
        np.testing.assert_array_equal(got, want)
