"""Exports in the hands of the clients themselves: compressed-tensors, transformers and nvidia-modelopt, on a CPU.

`make clients` makes their environment. Decoding is compared exactly, except where the library itself rounds to bfloat16
(NVFP4, MX). Bounds of logits: of float32 models 1e-5 of the largest; of models in bfloat16 3e-2 (eight bits of mantissa
through two layers); where the client quantizes activations, by scales of its own, the mean error is 0.1 of the logits'
standard deviation, and 0.3 with four-bit activations.
"""

import fnmatch
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

import jqopt
from jqopt.export import compressed_tensors
from jqopt.hf import load_model
from tests.export import tiny

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]


TINYLM = Path(__file__).parents[2] / "examples" / "tinylm"
EXACT, BF16 = 1e-5, 3e-2
DENSE = ("llama", "qwen3", "mistral")
EVERY = {
    target: [(f, n) for f in tiny.FAMILIES for n in table if f in DENSE or n != "MIXED"]
    for target, table in tiny.TABLES.items()
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("model") / "source")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(family, target, name) -> (its decoded weights by module, folder, logits without quantized activations)."""
    root, done, runs = tmp_path_factory.mktemp("exports"), {}, {}

    def get(family, target, name):
        if family not in runs:
            tiny.make(root / family, family)
            runs[family] = jax.jit(load_model(root / family)[0].apply)  # compiled once for all schemes
        if (family, target, name) not in done:
            smoothed = tiny.SMOOTHED.get(name, "") if target == "modelopt" else ""
            qm = tiny.rounded(root / family, tiny.TABLES[target][name], smoothed)
            folder = root / f"{family}-{target}-{name}"
            jqopt.export(qm, folder, target, engine="other")
            plain = np.asarray(runs[family](tiny.floats_of(qm), tiny.IDS))
            done[family, target, name] = tiny.weights_of(qm), folder, plain
        return done[family, target, name]

    return get


def stored_of(folder) -> dict:
    from safetensors.torch import load_file

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def largest(got, wanted) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def mean(got, wanted) -> float:
    return float(np.abs(got - wanted).mean() / wanted.std())


def logits_of(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.from_numpy(tiny.IDS.astype(np.int64))).logits.float().numpy()


# ------------------------------------------------------------------------------------------- compressed-tensors

IN_BF16 = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")


@pytest.mark.parametrize(("family", "name"), EVERY["compressed-tensors"])
def test_compressed_tensors_reads_what_we_wrote(family, name, exported):
    """Its own configuration classes parse, and its own decompressors give our numbers."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
    from compressed_tensors.utils.match import match_targets

    wanted, folder, _ = exported(family, "compressed-tensors", name)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    for group in said["config_groups"].values():
        for part in ("weights", "input_activations"):
            if group[part] is not None:
                QuantizationArgs(**group[part])
    config = QuantizationConfig.model_validate(said)
    tensors = stored_of(folder)
    schemes = {t: s for s in config.config_groups.values() for t in s.targets}
    for module, ours in wanted.items():
        linear = torch.nn.Linear(ours.shape[1], ours.shape[0], bias=False)
        scheme = schemes[match_targets(module, linear, list(schemes))[0]]
        format = getattr(scheme.format, "value", scheme.format)
        own = {k.removeprefix(f"{module}."): x for k, x in tensors.items() if k.startswith(f"{module}.")}
        theirs = BaseCompressor.get_value_from_registry(format).decompress(own, scheme)["weight"]
        if format == "nvfp4-pack-quantized":  # it divides by the stored global scale, in bfloat16
            assert largest(theirs.float().numpy(), ours) < 2**-8
        elif format in IN_BF16:
            assert torch.equal(theirs.float(), torch.from_numpy(ours.copy()).bfloat16().float())
        else:
            np.testing.assert_array_equal(theirs.float().numpy(), ours)


def loads(folder, **options):
    """transformers' model of a folder, loaded without missing, unexpected or mismatched keys."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    # a client that decodes the weights drops the scales of activations and caches
    dropped = ("input_scale", "input_global_scale", "k_scale", "v_scale")
    told["unexpected_keys"] = [k for k in told["unexpected_keys"] if not str(k).endswith(dropped)]
    assert not any(told[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return model


@pytest.mark.parametrize("name", [n for n in tiny.COMPRESSED_TENSORS if n != "MIXED"])
@pytest.mark.parametrize("family", DENSE)
def test_transformers_runs_the_decoded_weights(family, name, exported):
    """MIXED: transformers 5.23 decodes every layer by the first group."""
    import torch
    from transformers import CompressedTensorsConfig

    _, folder, plain = exported(family, "compressed-tensors", name)
    model = loads(folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert largest(logits_of(model), plain) < (BF16 if name.startswith("NVFP4") else EXACT)


@pytest.mark.parametrize("name", [n for n in tiny.COMPRESSED_TENSORS if "ASYM" not in n])
@pytest.mark.parametrize("family", DENSE)
def test_transformers_runs_it_as_it_stands(family, name, exported):
    """The default route: packed weights, activations quantized by the client. ASYM: transformers 5.23 expects
    zero points of another shape than compressed-tensors 0.20 writes."""
    import torch

    _, folder, plain = exported(family, "compressed-tensors", name)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = said["config_groups"].values()
    in_bf16 = any(g["format"] in IN_BF16 for g in groups)
    got = logits_of(loads(folder, dtype=torch.bfloat16 if in_bf16 else torch.float32))
    if all(g["input_activations"] is None for g in groups):
        assert largest(got, plain) < (BF16 if in_bf16 else EXACT)
    else:
        four = any(g["input_activations"] and g["input_activations"]["num_bits"] == 4 for g in groups)
        assert mean(got, plain) < (0.3 if four else 0.1)


@pytest.mark.parametrize("row", compressed_tensors.ROWS, ids=lambda r: r.name)
def test_transformers_and_experts(row, exported, tmp_path):
    """What engine="transformers" allows of experts it runs; the rest it fails on with an error of its own, but for
    NVFP4, which it decodes without the global scale."""
    import torch
    from transformers import CompressedTensorsConfig

    _, folder, plain = exported("mixtral", "compressed-tensors", row.name)
    qm = tiny.rounded(tiny.make(tmp_path / "mixtral", "mixtral"), tiny.COMPRESSED_TENSORS[row.name])
    in_bf16 = row.facts["format"] in IN_BF16
    options = {"dtype": torch.float32, "quantization_config": CompressedTensorsConfig(dequantize=True)}
    if "transformers" not in row.experts:
        with pytest.raises(jqopt.UnsupportedError, match=f"transformers loads {row.name} .*but not in experts; .*FP8"):
            jqopt.export(qm, tmp_path / "x", engine="transformers")
        if row.name.startswith("NVFP4"):
            assert largest(logits_of(loads(folder, **options)), plain) > 0.5
        else:
            with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
                loads(folder, dtype=torch.float32)
        return
    jqopt.export(qm, tmp_path / "x", engine="transformers")
    assert largest(logits_of(loads(folder, **options)), plain) < (BF16 if in_bf16 else EXACT)
    got = logits_of(loads(folder, dtype=torch.bfloat16 if in_bf16 else torch.float32))
    if row.input is None:
        assert largest(got, plain) < (BF16 if in_bf16 else EXACT)
    else:
        assert mean(got, plain) < (0.3 if row.input.element_format().element.bits == 4 else 0.1)


@pytest.mark.parametrize("preset", ["W4A16", "W4A16_ASYM", "FP8_DYNAMIC", "NVFP4A16"])
def test_we_read_what_compressed_tensors_makes(preset, source, tmp_path):
    """Quantized, compressed and saved by the library; what transformers decodes of it is what we load."""
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    scheme = QuantizationScheme(targets=["Linear"], **PRESET_SCHEMES[preset])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in (m for m in model.modules() if hasattr(m, "quantization_scheme")):
        args, weight = module.quantization_scheme.weights, module.weight.detach()
        each = weight.unflatten(-1, (-1, args.group_size)) if args.group_size else weight[:, None]
        extra = {}
        if hasattr(module, "weight_global_scale"):
            extra["global_scale"] = generate_gparam(weight.min().reshape(1), weight.max().reshape(1))
            module.weight_global_scale.data = extra["global_scale"]
        scale, zero = calculate_qparams(each.amin(-1), each.amax(-1), args, **extra)
        module.weight_scale.data = scale
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "theirs")
    compressor.update_config(tmp_path / "theirs")
    if preset == "NVFP4A16":  # nobody unified q, k and v here, as llm-compressor does before it quantizes
        with pytest.raises(jqopt.CheckpointError, match=r"weight_global_scale differ, but .*q_proj"):
            jqopt.load_hf(tmp_path / "theirs")
        return
    qm = jqopt.load_hf(tmp_path / "theirs")
    decoded = loads(
        tmp_path / "theirs", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    assert largest(np.asarray(qm.model.apply(tiny.floats_of(qm), tiny.IDS)), logits_of(decoded)) < EXACT


# -------------------------------------------------------------------------------------------------- ModelOpt


def by_modelopt(algo: str, tensors: dict, n: int, k: int, block: int):
    """A layer's weight by nvidia-modelopt's own classes; None where it has no decoder."""
    import torch
    from modelopt.torch.export.quant_utils import from_quantized_weight
    from modelopt.torch.quantization import qtensor

    shape, weight, scale = torch.Size((n, k)), tensors["weight"], tensors["weight_scale"]
    if "NVFP4" in algo:
        packed = qtensor.NVFP4QTensor(shape, torch.float32, weight)
        return packed.dequantize(scale=scale, double_scale=tensors["weight_scale_2"], block_sizes={-1: 16})
    if algo == "MXFP8":
        return qtensor.MXFP8QTensor(shape, torch.float32, weight).dequantize(scale=scale)
    if "MXFP4" in algo:
        return qtensor.MXFP4QTensor(shape, torch.float32, weight).dequantize(scale=scale, block_sizes={-1: 32})
    names = {"FP8": "fp8", "W8A16": "int8_wo", "W8A8_SQ_PER_CHANNEL": "int8_sq"}
    return from_quantized_weight(weight, scale, names[algo], torch.float32) if algo in names else None


@pytest.mark.parametrize(("family", "name"), EVERY["modelopt"])
def test_modelopt_reads_what_we_wrote(family, name, exported):
    """Its own classes give our numbers, and a transformers model of them our logits."""
    import torch
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8
    from transformers import AutoConfig, AutoModelForCausalLM

    weights, folder, plain = exported(family, "modelopt", name)
    detail = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    tensors, state, compared = stored_of(folder), {}, 0
    for module, ours in weights.items():
        assert not any(fnmatch.fnmatch(module, pattern) for pattern in detail["exclude_modules"])
        algo = detail.get("quantized_layers", {}).get(module, detail)["quant_algo"].upper()
        own = {key.removeprefix(f"{module}."): x for key, x in tensors.items() if key.startswith(f"{module}.")}
        pre = own["pre_quant_scale"].numpy() if "pre_quant_scale" in own else np.float32(1)
        theirs = by_modelopt(algo, own, *ours.shape, detail.get("group_size") or 16)
        if theirs is not None:
            np.testing.assert_array_equal(theirs.float().numpy() * pre, ours)
            compared += 1
        if algo == "W4A16_AWQ":  # no unpacker in the library: its packer must give our bytes
            assert torch.equal(
                pack_int4_in_uint8(torch.from_numpy(ours / pre), own["weight_scale"], 128), own["weight"]
            )
            compared += 1
        state[f"{module}.weight"] = torch.from_numpy(ours.copy())
    assert compared or name in ("FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "W4A8_AWQ")
    if family not in DENSE:
        return  # transformers holds experts fused, and has no names for theirs
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).float()
    state |= {key: x.float() for key, x in tensors.items() if key in model.state_dict() and key not in state}
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    assert set(model.load_state_dict(state, strict=False).missing_keys) <= tied
    assert largest(logits_of(model), plain) < EXACT


MADE_BY_MODELOPT = {
    "FP8_DEFAULT_CFG": "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "FP8_PER_CHANNEL_PER_TOKEN",
    "INT8_DEFAULT_CFG": "W8A8_SQ_PER_CHANNEL",
    "INT8_WEIGHT_ONLY_CFG": "W8A16",
}


@pytest.fixture(scope="module")
def by_nvidia(tmp_path_factory):
    """name of a configuration -> (float folder, folder that nvidia-modelopt exported from it on the same ids)."""
    import torch
    from modelopt.torch import quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("modelopt")
    floats = tiny.make(root / "floats", dtype="float32")

    def get(name):
        out = root / name
        if not out.exists():
            model = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32)
            ids = torch.from_numpy(tiny.IDS.astype(np.int64))
            mtq.quantize(model, getattr(mtq, name), lambda m: m(ids))
            with torch.inference_mode():
                export_hf_checkpoint(model, export_dir=out)
        return floats, out

    return get


@pytest.mark.parametrize(("name", "scheme"), MADE_BY_MODELOPT.items())
def test_bytes_are_those_of_modelopt(name, scheme, by_nvidia, tmp_path):
    """Of the same float32 weights and ids. FP8: ModelOpt gives q, k, v (and gate, up) a scale each, we one for all."""
    import torch

    floats, theirs = by_nvidia(name)
    recipe = {k: x for k, x in tiny.MODELOPT[scheme].items() if k != "algorithm"}
    jqopt.export(tiny.quantized(floats, recipe), tmp_path / "ours", "modelopt", engine="other")
    mine, other = stored_of(tmp_path / "ours"), stored_of(theirs)
    assert mine.keys() == other.keys()
    alone = ("o_proj", "down_proj") if scheme == "FP8" else ("_proj",)
    for key in (k for k in mine if any(f"{a}." in k for a in alone)):
        assert (mine[key].dtype, mine[key].shape) == (other[key].dtype, other[key].shape), key
        if key.endswith("input_scale"):  # of activations, which two programs compute
            assert math.isclose(mine[key].item(), other[key].item(), rel_tol=1e-5), key
        else:
            assert torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (mine[key], other[key]))), key


@pytest.mark.parametrize("name", MADE_BY_MODELOPT)
def test_we_read_what_modelopt_exports(name, by_nvidia):
    """Its export, decoded by us and by its own layout's description, in transformers' model."""
    _, folder = by_nvidia(name)
    qm = jqopt.load_hf(folder)
    assert np.isfinite(np.asarray(jax.jit(lambda ids: qm(ids))(tiny.IDS))).all()
    back = stored_of(folder)
    for module, ours in tiny.weights_of(qm).items():
        scale = back[f"{module}.weight_scale"].numpy()
        stored = back[f"{module}.weight"].float().numpy() * (scale[:, None] if scale.ndim else scale)
        np.testing.assert_array_equal(ours, stored)


def test_nvfp4_and_mxfp8_bytes_are_those_of_modelopt(source, tmp_path):
    """Through its tensor classes: its simulation of these formats needs a GPU, its packing does not."""
    import torch
    from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor

    for scheme, recipe in (("W4A16_NVFP4", tiny.MODELOPT["W4A16_NVFP4"]), ("MXFP8", tiny.MODELOPT["MXFP8"])):
        jqopt.export(tiny.quantized(source, recipe), tmp_path / scheme, "modelopt")
        ours, floats = stored_of(tmp_path / scheme), stored_of(source)
        for module in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"):  # those that share no scale
            weight = floats[f"{module}.weight"].float()
            if scheme == "MXFP8":
                packed, scale = MXFP8QTensor.quantize(weight)
            else:
                packed, scale, second = NVFP4QTensor.quantize(weight, 16)
                assert torch.equal(ours[f"{module}.weight_scale_2"], second.reshape(()))
            for name, theirs in (("weight", packed._quantized_data), ("weight_scale", scale)):
                assert torch.equal(ours[f"{module}.{name}"].view(torch.uint8), theirs.view(torch.uint8)), (module, name)


# ------------------------------------------------------------------------------------------ a trained model


PERPLEXITY = [n for n in tiny.COMPRESSED_TENSORS if n not in ("KV", "MIXED")]


@pytest.mark.parametrize("name", PERPLEXITY)
def test_a_trained_model_keeps_its_perplexity(name, tmp_path):
    """To 1e-3 relative, computed by transformers: in float32, with activations quantized as the client does it; of the
    weights alone where its default route computes in bfloat16 only (NVFP4, MX)."""
    import torch
    from transformers import CompressedTensorsConfig

    module, variables = load_model(TINYLM, scan_layers=True)
    ids = np.load(TINYLM / "test_tokens.npy")[: 8 * 256].reshape(8, 256).astype(np.int32)
    qm = jqopt.quantize_model(module, tiny.COMPRESSED_TENSORS[name], params=variables, batches=[ids])
    told = jqopt.export(qm, tmp_path / "out", source=TINYLM)
    assert list(told.schemes) == [name]
    acts = any("input" in rule for rule in tiny.COMPRESSED_TENSORS[name]["rules"]) and not name.startswith(("NV", "MX"))
    options = {} if acts else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = loads(tmp_path / "out", dtype=torch.float32, **options).eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids.astype(np.int64))).logits.float().numpy()
    ours = qm(ids) if acts else jax.jit(module.apply)(tiny.floats_of(qm), ids)
    assert abs(perplexity(theirs, ids) / perplexity(np.asarray(ours), ids) - 1) < 1e-3


def perplexity(logits, ids) -> float:
    x = logits[:, :-1].astype(np.float64)
    top = x.max(-1, keepdims=True)
    log = x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))
    return float(np.exp(-np.take_along_axis(log, ids[:, 1:, None], -1).mean()))
