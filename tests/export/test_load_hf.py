"""Packed checkpoints that others made, and hostile ones: each fault is refused with its tensor's or key's name."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

import jqopt
from jqopt.errors import CheckpointError, UnsupportedError
from tests.export import decoders, tiny
from tests.export.decoders import Stored

REAL = Path(__file__).parents[1] / "golden" / "modelopt_exports"
Q0, GATE0 = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"


def decoded(qm):
    """The variables with every packed parameter in float32."""
    flat = traverse_util.flatten_dict(qm.params["params"], sep="/")
    decode = jax.jit(lambda tree: {k: q.replace(dtype="float32").dequantize() for k, q in tree.items()})
    flat |= decode({k: x for k, x in flat.items() if isinstance(x, jqopt.QTensor)})
    return {"params": traverse_util.unflatten_dict(flat, sep="/")}


# -------------------------------------------------------------------------------------- what others have made

KINDS = {
    "NVFP4_AWQ_LITE_CFG": ("NVFP4_AWQ", 0.35),
    "W4A8_AWQ_BETA_CFG": ("W4A8_AWQ", 0.15),
    "FP8_KV": ("FP8", 0.15),
}


@pytest.mark.parametrize("name", KINDS)
def test_real_exports_of_modelopt(name):
    """Their own decoded weights give their logits; with quantized inputs the error is that of the inputs' formats."""
    qm, reference = jqopt.load_hf(REAL / name, scan_layers=True), np.load(REAL / name / "reference.npz")
    ids, wanted = reference["input_ids"].astype(np.int32), reference["logits"]
    scheme, noise = KINDS[name]
    stored = decoders.read_folder(REAL / name)
    for module, ours in tiny.weights_of(qm).items():
        own = {k.removeprefix(f"{module}."): x for k, x in stored.items() if k.startswith(f"{module}.")}
        np.testing.assert_array_equal(ours, decoders.decode("modelopt", scheme, own, *ours.shape))
    if scheme != "W4A8_AWQ":  # its reference leaves out that weights are rounded to fp8 once more
        got = np.asarray(qm.model.apply(decoded(qm), ids))
        assert np.abs(got - wanted).max() < 1e-5 * np.abs(wanted).max()
    got = np.asarray(jax.jit(lambda x: qm(x))(ids))
    assert np.abs(got - wanted).mean() < noise * wanted.std()
    assert bool(qm.quant.attention) == (name == "FP8_KV")


def test_reading_and_writing_a_real_export_keeps_its_tensors(tmp_path):
    """All but pre_quant_scale, which jqopt writes as the float32 that it computes with."""
    qm = jqopt.load_hf(REAL / "NVFP4_AWQ_LITE_CFG")
    jqopt.export(qm, tmp_path / "out", "modelopt", engine="sglang")
    theirs, ours = decoders.read_folder(REAL / "NVFP4_AWQ_LITE_CFG"), decoders.read_folder(tmp_path / "out")
    assert theirs.keys() == ours.keys()
    for name, x in theirs.items():
        if name.endswith("pre_quant_scale"):
            np.testing.assert_array_equal(x.values(), ours[name].values())
        else:
            assert (x.word, x.shape, x.data) == (ours[name].word, ours[name].shape, ours[name].data), name


# ------------------------------------------------------------------------------------------------- faults


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(target, name) -> folder, each written once; they are copied before they are changed."""
    root = tmp_path_factory.mktemp("exports")
    source = tiny.make(root / "source")

    def get(target, name):
        out = root / f"{target}-{name}"
        if not out.exists():
            jqopt.export(tiny.packed(source, tiny.TABLES[target][name]), out, target, engine="other")
        return out

    return get


def altered(folder: Path, to: Path, tensors=None, config=None, file="config.json", journal=False) -> Path:
    """A copy with tensors or the quantization's configuration changed; without the sha256 of what was exported."""
    shutil.copytree(folder, to)
    if not journal:
        (to / "jqopt.json").unlink()
    if tensors is not None:
        found = decoders.read_folder(folder)
        tensors(found)
        decoders.write_file(to / "model.safetensors", found)
    if config is not None:
        whole = json.loads((to / file).read_text())
        config(whole.get("quantization_config", whole))
        (to / file).write_text(json.dumps(whole))
    return to


def new(x: np.ndarray, word: str = "F32") -> Stored:
    return Stored(word, x.shape, np.ascontiguousarray(x).tobytes())


def each(suffix, change):
    """Changes every tensor with this suffix: a function of its stored array gives the new one."""

    def run(found):
        for name in [n for n in found if n.endswith(suffix)]:
            found[name] = Stored(found[name].word, *_of(change(found[name].raw())))

    return run


def _of(x: np.ndarray):
    return x.shape, np.ascontiguousarray(x).tobytes()


def put(name, stored):
    return lambda found: found.update({name: stored})


CT, MO = "compressed-tensors", "modelopt"
TENSORS = [
    (CT, "NVFP4", each("weight_global_scale", lambda x: 1 / x), "weight_global_scale weights would be .* reciprocal"),
    (MO, "NVFP4", each("weight_scale_2", lambda x: 1 / x), "weight_scale_2 weights would be .* reciprocal"),
    (CT, "NVFP4", each("layers.0.self_attn.q_proj.weight_global_scale", lambda x: x * np.float32(1.06)), "differ, but"),
    (MO, "NVFP4", each("layers.1.mlp.up_proj.input_scale", lambda x: x * np.float32(1.06)), "differ, but"),
    (CT, "NVFP4", each("global_scale", lambda x: x.reshape(())), r"found shape \[\], expected \[1\]"),
    (MO, "NVFP4", each("weight_scale_2", lambda x: x.reshape(1)), r"found shape \[1\], expected \[\]"),
    (CT, "W4A16", each("down_proj.weight_packed", lambda x: x.T), r"weight_packed: found shape \[32, 128\], expected"),
    (CT, "W4A16", each("down_proj.weight_shape", lambda x: x[::-1]), r"it says \[256, 128\], the weight is"),
    (MO, "W4A16_AWQ", each("gate_proj.weight", lambda x: x.reshape(256, 64)), r"found shape \[256, 64\], expected"),
    (CT, "NVFP4", lambda found: found.pop(f"{Q0}.weight_scale"), f"tensor {Q0}.weight_scale missing"),
    (CT, "FP8", lambda found: found.pop(f"{GATE0}.input_scale"), f"{GATE0}.input_scale missing"),
    (CT, "NVFP4", lambda found: found.pop("model.norm.weight"), "tensor model.norm.weight missing"),
    (CT, "FP8", put(f"{Q0}.weight_zero_point", new(np.zeros(1, np.int8), "I8")), f"{Q0}.weight_zero_point unexpected"),
    (CT, "NVFP4", put(f"{Q0}.weight_scale", new(np.ones((256, 8), np.float32))), "found float32, expected float8"),
    (CT, "FP8_DYNAMIC", each("v_proj.weight_scale", lambda x: -x), "must be finite and positive; found values from -"),
    (CT, "FP8_DYNAMIC", each("v_proj.weight_scale", lambda x: x * np.float32(np.nan)), "must be finite and positive"),
    (CT, "FP8_DYNAMIC", each("v_proj.weight_scale", lambda x: 1 / x), "weight_scale weights would be as large as"),
    (CT, "FP8", each("o_proj.weight", lambda x: x | np.uint8(0x7F)), "o_proj.weight: the codes hold NaN"),
    (CT, "NVFP4", each("o_proj.weight_scale", lambda x: x | np.uint8(0x80)), "must not be negative or NaN"),
    (CT, "MXFP8", each("o_proj.weight_scale", lambda x: x | np.uint8(0xFF)), "the block scales hold NaN"),
    (CT, "KV", lambda f: f.pop("model.layers.1.self_attn.v_scale"), "model.layers.1.self_attn.v_scale missing"),
]  # fmt: skip


@pytest.mark.parametrize(("target", "name", "change", "text"), TENSORS)
def test_faults_of_tensors(target, name, change, text, exported, tmp_path):
    folder = altered(exported(target, name), tmp_path / "x", change)
    with pytest.raises(CheckpointError, match=text):
        jqopt.load_hf(folder)


def args(**changes):
    return lambda q: q["config_groups"]["group_0"]["weights"].update(changes)


CONFIGS = [
    (CT, lambda q: q.update(quantization_status="frozen"), CheckpointError, "quantization_status is 'frozen'; only"),
    (CT, lambda q: q.update(bias=128), CheckpointError, "unknown key 'bias'; known are"),
    (CT, args(bias=128), CheckpointError, "group_0.weights: unknown key 'bias'"),
    (CT, lambda q: q["config_groups"]["group_0"].update(more=1), CheckpointError, "group_0: unknown key 'more'"),
    (CT, lambda q: q.update(config_groups={}), CheckpointError, "expected at least one group"),
    (CT, lambda q: q.update(ignore="lm_head"), CheckpointError, "ignore is 'lm_head'; expected a list"),
    (CT, lambda q: q.update(ignore=["re:("]), CheckpointError, "is no regular expression"),
    (CT, lambda q: q.update(ignore=[]), CheckpointError, "lm_head.weight_.* missing|lm_head"),
    (CT, args(num_bits=3), UnsupportedError, "jqopt has no format for"),
    (CT, args(actorder="group"), UnsupportedError, "reordered groups"),
    (CT, lambda q: q.update(sparsity_config={"format": "sparse"}), UnsupportedError, "sparsity_config .* is not read"),
    (CT, lambda q: q.update(kv_cache_scheme={"num_bits": 4, "type": "float"}), UnsupportedError, "kv_cache_scheme"),
    (CT, lambda q: q.update(quant_method="gptq"), UnsupportedError, "quant_method 'gptq' is not read; read are"),
    (MO, lambda q: q.update(quant_algo="FP8"), CheckpointError, "says quant_algo 'FP8', hf_quant_config.json says"),
    (MO, lambda q: q.update(weird=1), CheckpointError, "unknown key 'weird'"),
]


@pytest.mark.parametrize(("target", "change", "error", "text"), CONFIGS)
def test_faults_of_configurations(target, change, error, text, exported, tmp_path):
    folder = altered(exported(target, "NVFP4"), tmp_path / "x", config=change)
    with pytest.raises(error, match=text):
        jqopt.load_hf(folder)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"quant_algo": "NVFP4_SVD"}, CheckpointError, "says quant_algo"),
        ({"group_size": 32}, UnsupportedError, "NVFP4 with group_size 32 is not read; expected 16"),
        ({"more": 1}, CheckpointError, "hf_quant_config.json: quantization: unknown key 'more'"),
        ({"exclude_modules": "x"}, CheckpointError, "exclude_modules is 'x'"),
        ({"kv_cache_quant_algo": "INT8"}, UnsupportedError, "kv_cache_quant_algo 'INT8' is not read"),
    ],
)
def test_faults_of_the_second_configuration(change, error, text, exported, tmp_path):
    change_it = lambda whole: whole["quantization"].update(change)  # noqa: E731
    folder = altered(exported(MO, "NVFP4"), tmp_path / "x", config=change_it, file="hf_quant_config.json")
    with pytest.raises(error, match=text):
        jqopt.load_hf(folder)


def test_swapped_nibbles_are_found_by_the_sha256(exported, tmp_path):
    """Shapes and scales of swapped nibbles are right; only the bytes' sha256, kept beside them, can tell."""
    swap = each("weight_packed", lambda x: x << np.uint8(4) | x >> np.uint8(4))
    folder = altered(exported(CT, "NVFP4"), tmp_path / "x", swap, journal=True)
    with pytest.raises(CheckpointError, match=r"weight_packed: its bytes aren't those that were exported \(sha256\)"):
        jqopt.load_hf(folder)
    jqopt.load_hf(folder, verify=False)
    lost = altered(exported(CT, "NVFP4"), tmp_path / "y", lambda t: t.pop("model.norm.weight"), journal=True)
    with pytest.raises(CheckpointError, match=r"model.norm.weight is missing from the files: the folder was changed"):
        jqopt.load_hf(lost)


def test_float_folders_and_layers_that_differ_are_refused(exported, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no quantization_config: its weights aren't packed.*load_model"):
        jqopt.load_hf(tiny.make(tmp_path / "floats"))
    (tmp_path / "floats" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"found no config.json"):
        jqopt.load_hf(tmp_path / "floats")
    source = tiny.make(tmp_path / "source")
    jqopt.export(tiny.packed(source, tiny.MIXED, scan=False), tmp_path / "mixed")
    with pytest.raises(UnsupportedError, match=r"its layers have different schemes .*load with scan_layers=False"):
        jqopt.load_hf(tmp_path / "mixed", scan_layers=True)


# --------------------------------------------------------------------------------- what others may write as well


def test_spellings_of_other_writers_are_read(exported, tmp_path):
    """compressed-tensors writes every field, null or not, and scales in the model's dtype."""
    whole = dict.fromkeys(("group_size", "block_structure", "actorder", "scale_dtype", "zp_dtype"))
    whole |= {"observer": "memoryless_minmax", "observer_kwargs": {}}

    def config(q):
        group = q["config_groups"]["group_0"]
        group["weights"] = whole | group["weights"]
        group["input_activations"] = whole | group["input_activations"]
        group["format"] = None
        q["ignore"], q["moe_sparsity_config"] = ["re:.*lm_head"], None

    def in_bf16(found):
        for name in [n for n in found if n.endswith("weight_scale")]:
            bits = (found[name].raw().view(np.uint32) >> 16).astype(np.uint16)
            found[name] = new(bits, "BF16")

    folder = altered(exported(CT, "FP8_DYNAMIC"), tmp_path / "x", in_bf16, config)
    ours, theirs = tiny.weights_of(jqopt.load_hf(exported(CT, "FP8_DYNAMIC"))), tiny.weights_of(jqopt.load_hf(folder))
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_allclose(x, ours[name], rtol=2**-7)


def test_modelopt_without_its_second_file(exported, tmp_path):
    folder = altered(exported(MO, "NVFP4"), tmp_path / "x")
    (folder / "hf_quant_config.json").unlink()
    a, b = (tiny.weights_of(jqopt.load_hf(f)) for f in (exported(MO, "NVFP4"), folder))
    for name, x in a.items():
        np.testing.assert_array_equal(x, b[name])


def test_it_runs_under_jit_as_its_decoded_weights(exported):
    qm = jqopt.load_hf(exported(CT, "W4A16"), scan_layers=True)
    got = np.asarray(jax.jit(lambda q, x: jqopt.apply(qm.plan)(q, x))(qm.quant, tiny.IDS))
    wanted = np.asarray(qm.model.apply(decoded(qm), tiny.IDS))
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()
