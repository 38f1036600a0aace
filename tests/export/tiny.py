"""Tiny random models as Hugging Face folders, and recipes that cover every scheme of the export's tables."""

import fnmatch
import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

import jqopt
from jqopt._apply import Quantized
from jqopt._model import QuantizedModel
from jqopt._numerics import scale_from_amax
from jqopt.hf import families, load_model

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 8},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2},
}
"""What other families' config.json says besides `CONFIG`."""
IDS = np.random.default_rng(1).integers(0, CONFIG["vocab_size"], (2, 12)).astype(np.int32)
KEEP = "defaults/skip_sensitive"

# Which recipes give which scheme: {scheme: recipe}. `W` alone: activations are left alone.
_LINEAR = {"path": "*", "op": ["dot_general", "ragged_dot"]}


def _recipe(weight: Any, input: Any = None, **more: Any) -> dict[str, Any]:
    rule = {"match": _LINEAR, "weight": weight} | ({} if input is None else {"input": input})
    return {"schema": 1, "name": "test", "extends": [KEEP], "rules": [rule], **more}


_CHANNEL = {"granularity": "channel"}
_TOKEN = {"granularity": "token"}
NVFP4, FP8 = _recipe("nvfp4", "nvfp4"), _recipe("fp8", "fp8")
MIXED = {
    **NVFP4,
    "rules": [
        {"match": "*/mlp/down_proj/*", "weight": {"format": "fp8", **_CHANNEL}, "input": {"format": "fp8", **_TOKEN}},
        {"match": {"path": ["layers_0/self_attn/[qkv]_proj/*", "layers/self_attn/[qkv]_proj/*"]}, "keep": True},
        NVFP4["rules"][0],
    ],
}
COMPRESSED_TENSORS: dict[str, Any] = {
    "NVFP4A16": _recipe("nvfp4"),
    "NVFP4": NVFP4,
    "MXFP4A16": _recipe("mxfp4"),
    "MXFP4": _recipe("mxfp4", "mxfp4"),
    "MXFP8": _recipe("mxfp8", "mxfp8"),
    "FP8": FP8,
    "FP8_DYNAMIC": _recipe({"format": "fp8", **_CHANNEL}, {"format": "fp8", **_TOKEN}),
    "FP8_BLOCK": _recipe("fp8_block", {"format": "fp8", "block": 128}),
    "W4A16": _recipe({"format": "int4", "block": 32}),
    "W4A16_CHANNEL": _recipe({"format": "int4", **_CHANNEL}),
    "W4A16_ASYM": _recipe({"format": "uint4", "block": 64}),
    "W4A16_ASYM_CHANNEL": _recipe({"format": "uint4", **_CHANNEL}),
    "W8A16": _recipe({"format": "int8", "block": 128}),
    "W8A16_CHANNEL": _recipe("int8"),
    "W8A8": _recipe("int8", {"format": "int8", **_TOKEN}),
    "W8A8_STATIC": _recipe("int8", "int8"),
    "KV": {**FP8, "kv_cache": "fp8"},
    "MIXED": MIXED,
}
MODELOPT: dict[str, Any] = {
    "NVFP4": NVFP4,
    "W4A16_NVFP4": _recipe("nvfp4"),
    "NVFP4_AWQ": {**NVFP4, "algorithm": "awq"},
    "FP8": FP8,
    "FP8_PER_CHANNEL_PER_TOKEN": COMPRESSED_TENSORS["FP8_DYNAMIC"],
    "FP8_PB_WO": _recipe("fp8_block"),
    "MXFP8": _recipe("mxfp8", "mxfp8"),
    "MXFP4": _recipe("mxfp4", "mxfp4"),
    "W4A8_MXFP4_FP8": _recipe("mxfp4", {"format": "fp8", "scaling": "dynamic"}),
    "W4A16_AWQ": _recipe("int4", algorithm="awq"),
    "W4A8_AWQ": _recipe(["int4", "fp8"], "fp8", algorithm="awq"),
    "W8A8_SQ_PER_CHANNEL": _recipe("int8", "int8", algorithm="smoothquant"),
    "W8A16": _recipe("int8"),
    "KV": {**FP8, "kv_cache": "fp8"},
    "KV_NVFP4": {**NVFP4, "kv_cache": "nvfp4"},
    "MIXED": MIXED,
}
TABLES = {"compressed-tensors": COMPRESSED_TENSORS, "modelopt": MODELOPT}


SMOOTHED = {
    "NVFP4_AWQ": "*/[od]*_proj/*",
    "W4A16_AWQ": "*/[od]*_proj/*",
    "W4A8_AWQ": "*/o_proj/*",
    "W8A8_SQ_PER_CHANNEL": "*/down_proj/*",
}
"""Which parameters keep a pre_scale, where nothing is searched for."""


def tensors(config: dict[str, Any] = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    """Random bfloat16 tensors of a Llama, with the names and [out, in] shapes of transformers."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv = (config[f"num_{w}_heads"] * config["head_dim"] for w in ("attention", "key_value"))
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        sizes = {"self_attn.q": (heads, hidden), "self_attn.k": (kv, hidden), "self_attn.v": (kv, hidden)}
        sizes |= {"self_attn.o": (hidden, heads), "mlp.gate": (inner, hidden), "mlp.up": (inner, hidden)}
        shapes |= {f"{block}.{m}_proj.weight": s for m, s in {**sizes, "mlp.down": (hidden, inner)}.items()}
        shapes |= {f"{block}.{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
    rng = np.random.default_rng(seed)

    def values(shape: tuple[int, ...]) -> np.ndarray:
        x = rng.normal(size=shape) * shape[-1] ** -0.5 if len(shape) > 1 else 1 + 0.1 * rng.normal(size=shape)
        return x.astype(ml_dtypes.bfloat16)

    return {name: values(shape) for name, shape in shapes.items()}


def tensors_of(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random bfloat16 tensors of any family: the names and shapes that jqopt reads, for clients to contradict."""
    family = families.find(config)
    parsed = family.parse(config)
    tree: Any = jax.eval_shape(family.build(parsed, False, jnp.float32).init, jax.random.key(0), IDS[:1])
    shapes = {k: x.shape for k, x in traverse_util.flatten_dict(tree["params"], sep="/").items()}
    rng, out = np.random.default_rng(seed), {}
    for place in family.places(parsed, False):
        shape = shapes[place.path][len(place.stack) :]
        for name in place.tensors:
            x = rng.normal(size=shape[::-1] if place.transpose else shape)
            x = x * x.shape[-1] ** -0.5 if x.ndim > 1 else 1 + 0.1 * x
            out[name] = x.astype(ml_dtypes.bfloat16)
    return out


def make(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    """The folder of a tiny model, with a tokenizer file to carry along."""
    config = CONFIG | {"model_type": model_type} | FAMILIES[model_type] | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 128}))
    found = tensors(config) if model_type == "llama" else tensors_of(config)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def quantized(folder: Path, recipe: Any, scan: bool = True) -> Any:
    """The quantized model of a folder, calibrated on a few random ids."""
    module, variables = load_model(folder, scan_layers=scan)
    qm = jqopt.quantize_model(module, recipe, params=variables, batches=[IDS])
    qm.source = folder
    return qm


@functools.cache
def _traced(folder: Path, scan: bool) -> tuple[Any, dict[str, Any], Any]:
    module, variables = load_model(folder, scan_layers=scan)
    return module, variables, jqopt.trace(module, variables, jax.ShapeDtypeStruct((1, 8), jnp.int32))


def packed(folder: Path, recipe: Any, scan: bool = True, smoothed: str = "") -> Any:
    """A quantized model of random codes and scales (but the same where layers must share them); nothing is computed.

    `smoothed`: a glob of parameters that get a pre_scale; for recipes whose algorithm would find one.
    """
    module, variables, graph = _traced(folder, scan)
    plan = jqopt.plan({key: x for key, x in recipe.items() if key != "algorithm"}, graph)
    made = {}
    for number, (path, d) in enumerate(plan.quantized.items()):
        fused = np.random.default_rng([7, *map(ord, d.fused or d.key)])
        group = np.random.default_rng([8, *map(ord, d.group)])
        q = _random(d, np.random.default_rng(number), fused)
        if d.has_static_input:
            q = q.replace(input_scale=jnp.asarray(group.uniform(0.01, 0.1, d.outer), jnp.float32))
        made[path] = q
    return _assembled(folder, module, variables, plan, made, smoothed)


def rounded(folder: Path, recipe: Any, smoothed: str = "") -> Any:
    """A quantized model of a folder's own weights, its layers unrolled: what `quantized` gives, without a calibration.

    Tensor-level scales are made for `LARGEST` and `LOUDEST` everywhere, so that fused layers share them.
    """
    module, variables, graph = _traced(folder, False)
    plan = jqopt.plan({key: x for key, x in recipe.items() if key != "algorithm"}, graph)
    flat: dict[str, Any] = traverse_util.flatten_dict(variables["params"], sep="/")
    made = {}
    for path, d in plan.quantized.items():
        q = _round(flat[path], d.format, d.granularity, d.layout)
        if d.has_static_input:
            scale = scale_from_amax(jnp.full(d.outer, LOUDEST, jnp.float32), d.input_format.format)
            q = q.replace(input_scale=scale)
        made[path] = q
    return _assembled(folder, module, variables, plan, made, smoothed)


LARGEST, LOUDEST = 0.6, 5.0
"""No weight, and next to no activation of these random models is larger."""


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _round(x: jax.Array, format: Any, granularity: str, layout: Any) -> jqopt.QTensor:
    stack = tuple(layout.atoms[i] for i in layout.stack)
    whole = format.global_scale or granularity == "tensor"
    amax = jnp.full(stack, LARGEST, jnp.float32) if whole else None
    return jqopt.QTensor.quantize(x, format, granularity=granularity, layout=layout, tensor_amax=amax)


def _assembled(folder: Path, module: Any, variables: Any, plan: Any, made: dict[str, Any], smoothed: str) -> Any:
    """The model of these packed parameters; caches get made-up scales."""
    flat: dict[str, Any] = traverse_util.flatten_dict(variables["params"], sep="/")
    for number, (path, q) in enumerate(made.items()):
        if smoothed and fnmatch.fnmatch(path, smoothed):
            pre = np.random.default_rng([6, number]).uniform(0.5, 2, (*q.data.shape[:-2], q.layout.k))
            q = q.replace(pre_scale=jnp.asarray(pre, jnp.float32))
        flat[path] = q
    scales: dict[str, Any] = {}
    for d in plan.attention:
        value = jnp.full(d.outer, 0.02 if d.role == "k" else 0.03, jnp.float32)
        scales.setdefault(d.key, {})[f"{d.role}_scale"] = value
    qm = QuantizedModel(module, plan, Quantized({"params": traverse_util.unflatten_dict(flat, sep="/")}, scales))
    qm.source = folder
    return qm


def _random(d: Any, rng: np.random.Generator, fused: np.random.Generator) -> jqopt.QTensor:
    """Random codes and scales of a parameter; what its fused layers share comes from `fused`."""
    f, layout = d.format, d.layout
    stack = tuple(layout.atoms[i] for i in layout.stack)
    shape = (*stack, *f.scale_shape(layout.n, layout.k, d.granularity))
    data = rng.integers(0, 256, (*stack, layout.n, -(-layout.k * f.element.bits // 8)), dtype=np.uint8)
    if f.element.nan is not None:
        data = np.where(data & 0x7F == f.element.nan, 0, data).astype(np.uint8)
    values: Any = (fused if d.granularity == "tensor" else rng).uniform(1e-4, 1e-2, shape).astype(np.float32)
    if f.scale.bits == 8:
        low, high = (1, 127) if f.scale.name == "e4m3" else (110, 125)
        values = rng.integers(low, high, shape, dtype=np.uint8)
    whole = jnp.asarray(fused.uniform(1e-5, 1e-3, stack), jnp.float32) if f.global_scale else None
    zero = jnp.asarray(rng.integers(0, 16, shape, dtype=np.uint8)) if f.zero_point else None
    signed = f.element.bits == 8 and f.element.kind == "int"
    codes = jnp.asarray(data.view(np.int8) if signed else data)
    return jqopt.QTensor(codes, jnp.asarray(values), whole, zero, None, None, f, d.granularity, layout, "float32")


EXPERT = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
"""Mixtral's names of an expert's projections; its experts are expected in unrolled layers."""


def decoded(qm: Any) -> dict[str, np.ndarray]:
    """{path: float32 [*stack, out, in] that the packed weight stands for}."""
    flat = traverse_util.flatten_dict(qm.params["params"], sep="/")
    packed = {path: leaf for path, leaf in flat.items() if isinstance(leaf, jqopt.QTensor)}
    found = jax.jit(lambda tree: {key: q.whole() for key, q in tree.items()})(packed)
    return {path: np.asarray(x) for path, x in found.items()}


def weights_of(qm: Any) -> dict[str, np.ndarray]:
    """{module name in the files: float32 [out, in] that the packed weight stands for}."""
    out = {}
    for path, whole in decoded(qm).items():
        name = path.removesuffix("/kernel").replace("/", ".")
        each = whole if whole.ndim == 3 else whole[None]
        for i, matrix in enumerate(each):
            number = re.search(r"layers_(\d+)", name)
            layer = int(number[1]) if number else i
            module = re.sub(r"layers(_\d+)?", f"model.layers.{layer}", name)
            expert = re.search(r"mlp\.experts\.(\w+)", module)
            if expert:
                module = module.replace(expert[0], f"block_sparse_moe.experts.{i}.{EXPERT[expert[1]]}")
            out[module] = matrix
    return out


def floats_of(qm: Any) -> dict[str, Any]:
    """The model's variables in float32, packed ones decoded."""
    flat: dict[str, Any] = traverse_util.flatten_dict(qm.params["params"], sep="/")
    flat |= {path: np.swapaxes(x, -1, -2) for path, x in decoded(qm).items()}
    return {"params": traverse_util.unflatten_dict(flat, sep="/")}
