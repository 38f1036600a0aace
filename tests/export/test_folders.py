"""Exported folders as a reader that isn't ours sees them: names, dtypes, shapes, numbers, configuration; and back."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

import jqopt
from jqopt.errors import CheckpointError, UnsupportedError
from jqopt.export import compressed_tensors, modelopt
from jqopt.export.parameters import InMemory
from tests.export import decoders, tiny

ALL = [(target, name) for target, table in tiny.TABLES.items() for name in table]
SUFFIX = re.compile(r"(?P<module>.*)\.(?P<suffix>weight\w*|input\w*scale|pre_quant_scale)$")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("model") / "source")


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    """(target, name) -> (quantized model, folder), each made once."""
    root, done = tmp_path_factory.mktemp("exports"), {}

    def get(target, name, scan=None):
        scan = name != "MIXED" if scan is None else scan
        if (target, name, scan) not in done:
            qm = tiny.packed(source, tiny.TABLES[target][name], scan, tiny.SMOOTHED.get(name, ""))
            out = root / f"{target}-{name}-{scan}"
            jqopt.export(qm, out, target, engine="other")
            done[target, name, scan] = qm, out
        return done[target, name, scan]

    return get


def scheme_of(target: str, name: str, module: str) -> str:
    if name == "MIXED":
        rows = {"compressed-tensors": "FP8_DYNAMIC", "modelopt": "FP8_PER_CHANNEL_PER_TOKEN"}
        return rows[target] if "down_proj" in module else "NVFP4"
    return {"KV": "FP8", "KV_NVFP4": "NVFP4"}.get(name, name)


@pytest.mark.parametrize(("target", "name"), ALL)
def test_another_reader_finds_what_the_format_says(target, name, exported):
    qm, folder = exported(target, name)
    wanted, found = tiny.weights_of(qm), decoders.read_folder(folder)
    packed: dict[str, dict] = {}
    for full, tensor in found.items():
        match = SUFFIX.match(full)
        if match and match["module"] in wanted:
            packed.setdefault(match["module"], {})[match["suffix"]] = tensor
    assert packed.keys() == wanted.keys()
    for module, tensors in packed.items():
        scheme, (n, k) = scheme_of(target, name, module), wanted[module].shape
        expected = {s: (word, shape(n, k)) for s, (word, shape) in decoders.EXPECTED[target][scheme].items()}
        if "pre_quant_scale" not in tensors:
            expected.pop("pre_quant_scale", None)
        assert {s: (t.word, t.shape) for s, t in tensors.items()} == expected
        decoded = decoders.decode(target, scheme, tensors, n, k)
        if target == "compressed-tensors" and scheme.startswith(
            "NVFP4"
        ):  # it stores the reciprocal of our global scale
            np.testing.assert_allclose(decoded, wanted[module], rtol=2**-22)
        else:
            np.testing.assert_array_equal(decoded, wanted[module])


OTHERS = {
    "qwen3": ("compressed-tensors", "NVFP4"),
    "mistral": ("modelopt", "KV"),
    "mixtral": ("compressed-tensors", "W4A16"),
}
EACH = [(f, *case) for f in OTHERS for case in ALL if f != "mixtral" or case[1] != "MIXED"]


@pytest.mark.parametrize(
    ("family", "target", "name"),
    [pytest.param(*case, marks=() if OTHERS[case[0]] == case[1:] else pytest.mark.slow) for case in EACH],
)
def test_other_families_there_and_back(family, target, name, families, tmp_path):
    """Export, read, export: the same bytes in every file."""
    recipe, smoothed = tiny.TABLES[target][name], tiny.SMOOTHED.get(name, "") if target == "modelopt" else ""
    jqopt.export(tiny.packed(families(family), recipe, False, smoothed), tmp_path / "one", target, engine="other")
    jqopt.export(jqopt.load_hf(tmp_path / "one"), tmp_path / "two", target, engine="other")
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "two").iterdir())
    for file in names:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """A family's name -> its folder, made once."""
    root = tmp_path_factory.mktemp("families")
    return lambda family: root / family if (root / family).exists() else tiny.make(root / family, family)


@pytest.mark.parametrize(("target", "name"), ALL)
def test_there_and_back(target, name, exported, tmp_path):
    qm, folder = exported(target, name)
    scan = name != "MIXED"
    back = jqopt.load_hf(folder, scan_layers=scan)
    flat = [jax.tree_util.tree_flatten_with_path(m.params)[0] for m in (qm, back)]
    assert [k for k, _ in flat[0]] == [k for k, _ in flat[1]]
    for (key, mine), (_, theirs) in zip(*flat):
        if target == "compressed-tensors" and "global_scale" in str(key) + str("input_scale" in str(key)):
            np.testing.assert_allclose(mine, theirs, rtol=2**-22)
        else:
            np.testing.assert_allclose(mine, theirs, rtol=2**-22 if target == "compressed-tensors" else 0)
    for a, b in zip(jax.tree.leaves(qm.quant.attention), jax.tree.leaves(back.quant.attention), strict=True):
        np.testing.assert_array_equal(a, b)
    jqopt.export(back, tmp_path / "again", target, engine="other")
    names = sorted(p.name for p in folder.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "again").iterdir())
    assert all((folder / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)


def test_stacked_layers_are_written_as_single_ones(exported):
    scanned, single = (exported("compressed-tensors", "NVFP4", scan)[1] for scan in (True, False))
    a, b = decoders.read_folder(scanned), decoders.read_folder(single)
    assert {n: (t.word, t.shape) for n, t in a.items()} == {n: (t.word, t.shape) for n, t in b.items()}


def test_unquantized_tensors_and_files_go_along(exported, source, tmp_path):
    _, folder = exported("compressed-tensors", "NVFP4")
    before, after = decoders.read_file(source / "model.safetensors"), decoders.read_folder(folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.input_layernorm.weight"):
        assert (after[name].word, after[name].data) == ("BF16", before[name].data)
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    told = jqopt.export(tiny.packed(source, tiny.FP8), tmp_path / "wide", dtype="float32")
    assert decoders.read_folder(tmp_path / "wide")["lm_head.weight"].word == "F32"
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    assert told.notes == ()


# ------------------------------------------------------------------------------------------------ configuration

FP4 = {
    "num_bits": 4, "type": "float", "strategy": "tensor_group", "symmetric": True, "dynamic": False, "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
}  # fmt: skip


def quantization(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_configuration_of_compressed_tensors(exported):
    assert quantization(exported("compressed-tensors", "NVFP4")[1]) == {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {
            "targets": ["Linear"], "format": "nvfp4-pack-quantized", "weights": FP4,
            "input_activations": {**FP4, "dynamic": "local"}, "output_activations": None,
        }},
        "ignore": ["lm_head"], "kv_cache_scheme": None, "global_compression_ratio": None, "sparsity_config": {},
        "transform_config": {}, "version": "0.20.0",
    }  # fmt: skip
    int4 = quantization(exported("compressed-tensors", "W4A16")[1])["config_groups"]["group_0"]
    assert int4["weights"]["group_size"] == 32 and int4["input_activations"] is None
    cache = quantization(exported("compressed-tensors", "KV")[1])["kv_cache_scheme"]
    assert cache == {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def test_mixed_schemes_have_a_group_each(exported):
    found = quantization(exported("compressed-tensors", "MIXED")[1])
    assert found["format"] == "mixed-precision"
    targets = {g["format"]: g["targets"] for g in found["config_groups"].values()}
    floats = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"]
    assert set(found["ignore"]) == {*floats, "lm_head"}
    assert targets["float-quantized"] == [r"re:^model\.layers\.\d+\.mlp\.down_proj$"]
    # layer 0 is left alone there, so that no pattern over the layers' numbers would do
    assert "model.layers.1.self_attn.q_proj" in targets["nvfp4-pack-quantized"]
    said = json.loads((exported("modelopt", "MIXED")[1] / "hf_quant_config.json").read_text())["quantization"]
    assert said["quant_algo"] == "MIXED_PRECISION"
    assert said["quantized_layers"]["model.layers.1.mlp.down_proj"] == {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    assert said["quantized_layers"]["model.layers.1.mlp.up_proj"] == {"quant_algo": "NVFP4", "group_size": 16}


def test_configuration_of_modelopt(exported):
    folder = exported("modelopt", "NVFP4")[1]
    said = json.loads((folder / "hf_quant_config.json").read_text())
    left = ["lm_head", "model.embed_tokens"]
    assert said["quantization"] == {
        "quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": left,
    }  # fmt: skip
    found = quantization(folder)
    group = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    assert (found["quant_method"], found["quant_algo"], found["ignore"]) == ("modelopt", "NVFP4", left)
    assert found["config_groups"] == {"group_0": {"weights": group, "input_activations": group, "targets": ["Linear"]}}
    awq = json.loads((exported("modelopt", "W4A16_AWQ")[1] / "hf_quant_config.json").read_text())["quantization"]
    assert (awq["group_size"], awq["has_zero_point"], awq["pre_quant_scale"]) == (128, False, True)


def test_scales_of_the_cache(exported):
    ours = decoders.read_folder(exported("compressed-tensors", "KV")[1])
    assert ours["model.layers.1.self_attn.k_scale"].shape == (1,)
    np.testing.assert_array_equal(ours["model.layers.1.self_attn.v_scale"].values(), [np.float32(0.03)])
    theirs = decoders.read_folder(exported("modelopt", "KV")[1])
    assert theirs["model.layers.0.self_attn.v_proj.v_scale"].values() == np.float32(0.03)
    four = decoders.read_folder(exported("modelopt", "KV_NVFP4")[1])  # amax / 448, where ours is amax / (6 * 448)
    assert four["model.layers.0.self_attn.k_proj.k_scale"].values() == np.float32(6) * np.float32(0.02)


def test_a_tied_head_is_left_alone_by_name(tmp_path):
    source = tiny.make(tmp_path / "tied", tie_word_embeddings=True)
    jqopt.export(tiny.packed(source, tiny.FP8), tmp_path / "out")
    assert quantization(tmp_path / "out")["ignore"] == ["lm_head"]
    assert "lm_head.weight" not in decoders.read_folder(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------- refusals


def test_engines_that_do_not_load_it_are_refused_with_a_hint(source, tmp_path):
    qm = tiny.packed(source, tiny.MODELOPT["W4A16_AWQ"])
    with pytest.raises(UnsupportedError, match=r"vllm doesn't load W4A16_AWQ .*engine='tensorrt-llm'"):
        jqopt.export(qm, tmp_path / "x", "modelopt")
    jqopt.export(qm, tmp_path / "x", "modelopt", engine="tensorrt-llm")
    with pytest.raises(UnsupportedError, match="tensorrt-llm doesn't load"):
        jqopt.export(qm, tmp_path / "y", engine="tensorrt-llm")
    with pytest.raises(UnsupportedError, match="unknown engine 'vlm'; known are vllm"):
        jqopt.export(qm, tmp_path / "y", engine="vlm")
    with pytest.raises(UnsupportedError, match="unknown target 'onnx'"):
        jqopt.export(qm, tmp_path / "y", "onnx")
    assert not (tmp_path / "y").exists()


def changed(qm, glob, **fields):
    """The model with some leaves of some QTensors replaced."""
    flat = traverse_util.flatten_dict(qm.params["params"], sep="/")
    for path, leaf in flat.items():
        if isinstance(leaf, jqopt.QTensor) and re.search(glob, path):
            flat[path] = leaf.replace(**{k: f(leaf) if callable(f) else f for k, f in fields.items()})
    tree = {"params": traverse_util.unflatten_dict(flat, sep="/")}
    out = type(qm)(qm.model, qm.plan, type(qm.quant)(tree, qm.quant.attention))
    out.source = qm.source
    return out


@pytest.mark.parametrize(
    ("glob", "fields", "text"),
    [
        ("k_proj", {"global_scale": lambda q: q.global_scale * 2}, r"one global_scale, but theirs differ"),
        ("up_proj", {"input_scale": lambda q: q.input_scale * 2}, r"gate_proj and .*up_proj: .*one input_scale"),
        ("o_proj", {"pre_scale": lambda q: np.ones((2, 256), np.float32)}, "pre_scale .*can't hold"),
        ("o_proj", {"rotation": 16}, "can't hold an online rotation"),
        ("o_proj", {"low_a": lambda q: q.data, "low_b": lambda q: q.data}, "can't hold a low-rank part"),
        ("o_proj", {"input_scale": None}, "NVFP4 needs its input_scale, which it lacks"),
    ],
)
def test_what_a_target_cannot_hold_is_refused(glob, fields, text, exported, tmp_path):
    qm = changed(exported("compressed-tensors", "NVFP4")[0], glob, **fields)
    with pytest.raises(UnsupportedError, match=text):
        jqopt.export(qm, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weight", ["nf4", "mxfp6", "fp8_e5m2", "mxint8"])
def test_formats_without_a_scheme_are_refused(weight, source, tmp_path):
    qm = tiny.packed(source, tiny._recipe(weight))
    with pytest.raises(UnsupportedError, match=f"has no scheme for {weight}.* It holds: NVFP4A16"):
        jqopt.export(qm, tmp_path / "x")


def test_parts_of_a_fused_group_must_have_one_scheme(source, tmp_path):
    recipe = {**tiny.FP8, "rules": [{"match": "*/v_proj/*", "keep": True}, tiny.FP8["rules"][0]]}
    with pytest.raises(UnsupportedError, match=r"run .*q_proj and .*v_proj as one product.*v_proj: floats"):
        jqopt.export(tiny.packed(source, recipe), tmp_path / "x")


def test_embedding_tables_are_refused(source, tmp_path):
    recipe = {"schema": 1, "name": "all", "rules": [{"match": "*", "weight": "int8"}]}
    with pytest.raises(UnsupportedError, match="embed_tokens.weight isn't the weight of a linear layer"):
        jqopt.export(tiny.packed(source, recipe), tmp_path / "x")


def test_gpt2_is_refused_for_its_conv1d(tmp_path):
    folder = Path(__file__).parents[1] / "hf" / "golden" / "gpt2"
    qm = tiny.packed(folder, tiny._recipe("int8"), scan=False)
    with pytest.raises(UnsupportedError, match=r"c_attn.weight stands as \[in, out\] .*Conv1D.*target='stablehlo'"):
        jqopt.export(qm, tmp_path / "x")


def test_caches_that_no_engine_reads_are_refused(exported, tmp_path):
    with pytest.raises(UnsupportedError, match="cache in nvfp4 isn't held by compressed-tensors.*modelopt"):
        jqopt.export(exported("modelopt", "KV_NVFP4")[0], tmp_path / "x")


def test_another_model_or_no_source_is_refused(exported, tmp_path):
    qm, _ = exported("compressed-tensors", "FP8")
    other = tiny.make(tmp_path / "other", num_hidden_layers=2, tie_word_embeddings=True)
    with pytest.raises(UnsupportedError, match="aren't those of the 'llama' model.*unexpected: lm_head/kernel"):
        jqopt.export(qm, tmp_path / "x", source=other)
    lost = changed(qm, "nothing")
    lost.source = None
    with pytest.raises(CheckpointError, match="nothing says which Hugging Face model this is: write source=FOLDER"):
        jqopt.export(lost, tmp_path / "x")


# ------------------------------------------------------------------------------------------- files on the way


def test_shards_have_an_index_and_hold_the_same(exported, tmp_path):
    qm, whole = exported("compressed-tensors", "FP8")
    done = jqopt.export(qm, tmp_path / "many", max_shard_size=100_000)
    files = [f for f in done.files if f.endswith(".safetensors")]
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    a, b = decoders.read_folder(whole), decoders.read_folder(tmp_path / "many")
    assert a.keys() == b.keys() and all(a[n].data == b[n].data for n in a)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(t.data) for t in a.values())
    loaded = [jqopt.load_hf(f, scan_layers=True).params for f in (whole, tmp_path / "many")]
    for mine, theirs in zip(*map(jax.tree.leaves, loaded), strict=True):
        np.testing.assert_array_equal(mine, theirs)


class Cut(Exception):
    """What interrupts an export in the tests."""


READ = InMemory.read


def cut_after(monkeypatch, reads: int):
    """Lets that many arrays be read, then fails."""
    count = [0]

    def counting(self, path, leaf=""):
        count[0] += 1
        if count[0] > reads:
            raise Cut
        return READ(self, path, leaf)

    monkeypatch.setattr(InMemory, "fingerprint", lambda self: "the same")
    monkeypatch.setattr(InMemory, "read", counting)
    return count


def test_resume_keeps_finished_shards_and_gives_the_same_bytes(exported, tmp_path, monkeypatch):
    qm, _ = exported("compressed-tensors", "FP8")
    out, size = tmp_path / "out", 100_000
    with monkeypatch.context() as m:
        cut_after(m, 22)
        with pytest.raises(Cut):
            jqopt.export(qm, out, max_shard_size=size)
        assert not out.exists()
        kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out.jqopt-export").glob("*.safetensors")}
        journal = json.loads((tmp_path / "out.jqopt-export" / "jqopt.json").read_text())
        assert kept and journal["tensors"]
        reads = cut_after(m, 10**9)
        with pytest.raises(CheckpointError, match="left of an export that was cut; write resume=True"):
            jqopt.export(qm, out, max_shard_size=size)
        with pytest.raises(CheckpointError, match="unfinished export of another model, or with other options"):
            jqopt.export(qm, out, max_shard_size=2 * size, resume=True)
        reads[0] = 0
        jqopt.export(qm, out, max_shard_size=size, resume=True)
        again = reads[0]
        reads[0] = 0
        jqopt.export(qm, tmp_path / "fresh", max_shard_size=size)
        assert again < reads[0], "what was finished was read anew"
    for p in sorted((tmp_path / "fresh").iterdir()):
        assert p.read_bytes() == (out / p.name).read_bytes(), p.name
    assert not (tmp_path / "out.jqopt-export").exists()


def test_resume_writes_a_damaged_shard_anew(exported, tmp_path, monkeypatch):
    qm, whole = exported("compressed-tensors", "FP8")
    with monkeypatch.context() as m:
        cut_after(m, 22)
        with pytest.raises(Cut):
            jqopt.export(qm, tmp_path / "out", max_shard_size=100_000)
        journal = json.loads((tmp_path / "out.jqopt-export" / "jqopt.json").read_text())
        first = next(iter(journal["tensors"]))
        for file in (tmp_path / "out.jqopt-export").glob("*.safetensors"):
            data = bytearray(file.read_bytes())
            if f'"{first}"'.encode() in data:
                data[-1] ^= 1
                file.write_bytes(data)
        cut_after(m, 10**9)
        jqopt.export(qm, tmp_path / "out", max_shard_size=100_000, resume=True)
    a, b = decoders.read_folder(whole), decoders.read_folder(tmp_path / "out")
    assert all(a[n].data == b[n].data for n in a)


def test_what_is_there_stays(exported, tmp_path):
    qm, _ = exported("compressed-tensors", "FP8")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="is no export of jqopt: it stays"):
        jqopt.export(qm, tmp_path / "mine", overwrite=True)
    jqopt.export(qm, tmp_path / "out")
    with pytest.raises(CheckpointError, match="holds an export already; write overwrite=True"):
        jqopt.export(qm, tmp_path / "out")
    jqopt.export(qm, tmp_path / "out", "modelopt", overwrite=True)
    assert quantization(tmp_path / "out")["quant_method"] == "modelopt"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


def test_a_checkpoint_on_disk_exports_as_the_model_in_memory(exported, tmp_path):
    qm, folder = exported("compressed-tensors", "KV")
    jqopt.save(tmp_path / "ckpt", qm)
    jqopt.export(tmp_path / "ckpt", tmp_path / "out", source=qm.source)
    for p in folder.iterdir():
        assert p.read_bytes() == (tmp_path / "out" / p.name).read_bytes(), p.name


def test_every_row_is_covered():
    for target, rows in (("compressed-tensors", compressed_tensors.ROWS), ("modelopt", modelopt.ROWS)):
        assert {r.name for r in rows} == set(decoders.EXPECTED[target]) <= set(tiny.TABLES[target])


def test_copies_of_this_folder_stay_loadable_after_a_move(exported, tmp_path):
    _, folder = exported("modelopt", "NVFP4")
    shutil.copytree(folder, tmp_path / "moved")
    assert jqopt.load_hf(tmp_path / "moved").source == tmp_path / "moved"
