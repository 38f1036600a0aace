"""The compressed-tensors format (vLLM, transformers): its schemes, and its `quantization_config` both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jqopt.errors import CheckpointError, UnsupportedError
from jqopt.export.layouts import Stored
from jqopt.export.schemes import KV, Config, Found, Json, Module, Row, Target, row

METHOD = "compressed-tensors"
VERSION = "0.20.0"
"""Of the library whose configuration this is."""

# How suffixes, dtypes and shapes differ by scheme; `inverse`: this format divides by its global scales.
_CODES = Stored("weight_packed", "data", "uint8", "codes")
_FP8 = Stored("weight", "data", "float8_e4m3fn", "codes")
_INT8 = Stored("weight", "data", "int8", "codes")
_WORDS = Stored("weight_packed", "data", "int32", "words")
_SHAPE = Stored("weight_shape", "shape", "int64", "shape")
_ZEROS = Stored("weight_zero_point", "zero_point", "int32", "words of rows")
_POWERS = Stored("weight_scale", "scale", "uint8", "grid")
_BY_BLOCK = Stored("weight_scale", "scale", "float", "grid")
_BY_ROW = Stored("weight_scale", "scale", "float", "column")
_WHOLE = Stored("weight_scale", "scale", "float", "one scale", shared=True)
_INPUT = Stored("input_scale", "input_scale", "float", "one", shared=True)
_NVFP4 = (
    _CODES,
    Stored("weight_scale", "scale", "float8_e4m3fn", "grid"),
    Stored("weight_global_scale", "global_scale", "float32", "one", inverse=True, shared=True),
)
_NVFP4_INPUT = Stored("input_global_scale", "input_scale", "float32", "one", inverse=True, shared=True)


def _args(bits: int, kind: str, strategy: str, **more: Any) -> Json:
    """One `QuantizationArgs` block; the library forbids keys it doesn't know, so only the ones of all versions."""
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **more}


_FP4 = _args(4, "float", "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
_MX4 = _args(4, "float", "group", group_size=32, scale_dtype="torch.uint8")
_MX8 = _args(8, "float", "group", group_size=32, scale_dtype="torch.uint8")
_F8 = _args(8, "float", "tensor")
_F8_ROWS = _args(8, "float", "channel")
_F8_BLOCKS = _args(8, "float", "block", block_structure=[128, 128])
_F8_GROUPS = _args(8, "float", "group", group_size=128, dynamic=True)
_F8_TOKENS = _args(8, "float", "token", dynamic=True)
_I8_TOKENS = _args(8, "int", "token", dynamic=True)
_I8_ROWS = _args(8, "int", "channel")


def _facts(format: str, weights: Json, inputs: Json | None = None) -> Json:
    return {"format": format, "weights": weights, "inputs": inputs}


def _packed(bits: int, strategy: str, **more: Any) -> Json:
    return _facts("pack-quantized", _args(bits, "int", strategy, **more))


_ALL = "vllm transformers"
_DENSE = "transformers"  # 5.23 fails on these in experts, or decodes them without their global scale
_FP8_TOKEN, _INT8_TOKEN = ({"format": f, "granularity": "token"} for f in ("fp8", "int8"))
_UINT4_ROWS = {"format": "uint4", "granularity": "channel"}
_INT4_ROWS = {"format": "int4", "granularity": "channel"}

ROWS = (
    row("NVFP4A16", "nvfp4", None, _NVFP4, _facts("nvfp4-pack-quantized", _FP4), f"{_ALL} sglang tpu-inference",
        dense=_DENSE),
    row("NVFP4", "nvfp4", "nvfp4", (*_NVFP4, _NVFP4_INPUT),
        _facts("nvfp4-pack-quantized", _FP4, {**_FP4, "dynamic": "local"}), f"{_ALL} sglang tpu-inference",
        dense=_DENSE),
    row("MXFP4A16", "mxfp4", None, (_CODES, _POWERS), _facts("mxfp4-pack-quantized", _MX4), _ALL),
    row("MXFP4", "mxfp4", "mxfp4", (_CODES, _POWERS),
        _facts("mxfp4-pack-quantized", _MX4, {**_MX4, "dynamic": True}), _ALL),
    row("MXFP8", "mxfp8", "mxfp8", (_FP8, _POWERS), _facts("mxfp8-quantized", _MX8, {**_MX8, "dynamic": True}), _ALL,
        dense=_DENSE),
    row("FP8", "fp8", "fp8", (_FP8, _WHOLE, _INPUT),
        _facts("float-quantized", _F8, _F8), f"{_ALL} sglang tpu-inference"),
    row("FP8_DYNAMIC", {"format": "fp8", "granularity": "channel"}, _FP8_TOKEN, (_FP8, _BY_ROW),
        _facts("float-quantized", _F8_ROWS, _F8_TOKENS), f"{_ALL} sglang tpu-inference"),
    row("FP8_BLOCK", "fp8_block", {"format": "fp8", "block": 128}, (_FP8, _BY_BLOCK),
        _facts("float-quantized", _F8_BLOCKS, _F8_GROUPS), f"{_ALL} sglang", dense=_DENSE),
    row("W4A16", "int4", None, (_WORDS, _BY_BLOCK, _SHAPE), _packed(4, "group"), f"{_ALL} sglang", any_block=True),
    row("W4A16_CHANNEL", _INT4_ROWS, None, (_WORDS, _BY_ROW, _SHAPE), _packed(4, "channel"), f"{_ALL} sglang"),
    row("W4A16_ASYM", "uint4", None, (_WORDS, _BY_BLOCK, _SHAPE, _ZEROS), _packed(4, "group", symmetric=False),
        f"{_ALL} sglang", any_block=True, dense=_DENSE),
    row("W4A16_ASYM_CHANNEL", _UINT4_ROWS, None, (_WORDS, _BY_ROW, _SHAPE, _ZEROS),
        _packed(4, "channel", symmetric=False), f"{_ALL} sglang", dense=_DENSE),
    row("W8A16", {"format": "int8", "block": 128}, None, (_WORDS, _BY_BLOCK, _SHAPE), _packed(8, "group"),
        f"{_ALL} sglang", any_block=True),
    row("W8A16_CHANNEL", "int8", None, (_WORDS, _BY_ROW, _SHAPE), _packed(8, "channel"), f"{_ALL} sglang"),
    row("W8A8", "int8", _INT8_TOKEN, (_INT8, _BY_ROW), _facts("int-quantized", _I8_ROWS, _I8_TOKENS),
        f"{_ALL} sglang tpu-inference", dense=_DENSE),
    row("W8A8_STATIC", "int8", "int8", (_INT8, _BY_ROW, _INPUT),
        _facts("int-quantized", _I8_ROWS, _args(8, "int", "tensor")), f"{_ALL} sglang", dense=f"{_DENSE} vllm"),
)  # fmt: skip

KV_SCHEME = _args(8, "float", "tensor")


# ---------------------------------------------------------------------------------------------------- writing


def describe(modules: Sequence[Module], embeddings: Sequence[str], kv: KV | None) -> tuple[Json, dict[str, Json]]:
    """config.json's `quantization_config` of these linear layers; no other file."""
    members: dict[tuple[str, Any], list[Module]] = {}
    for m in modules:
        if m.row is not None:
            members.setdefault((m.row.name, m.block), []).append(m)
    left = [m.name for m in modules if m.row is None]
    groups = {f"group_{i}": _group(found, modules, whole=len(members) == 1) for i, found in enumerate(members.values())}
    formats = list(dict.fromkeys(g["format"] for g in groups.values()))
    return {
        "quant_method": METHOD,
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": left,
        "kv_cache_scheme": None if kv is None else KV_SCHEME,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }, {}


def _group(members: Sequence[Module], modules: Sequence[Module], whole: bool) -> Json:
    row, block = members[0].row, members[0].block
    assert row is not None
    size = {"group_size": block} if row.any_block else {}
    names = [m.name for m in members]
    return {
        "targets": ["Linear"] if whole else patterns(names, [m.name for m in modules if m.name not in set(names)]),
        "format": row.facts["format"],
        "weights": {**row.facts["weights"], **size},
        "input_activations": row.facts["inputs"],
        "output_activations": None,
    }


def patterns(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Targets that match these names and none of the others: regular expressions over the numbers, where they can."""
    out: list[str] = []
    for name in names:
        general = "re:^" + re.sub(r"\d+", r"\\d+", re.escape(name)) + "$"
        chosen = general if not any(re.match(general[3:], other) for other in others) else name
        if chosen not in out:
            out.append(chosen)
    return out


# ---------------------------------------------------------------------------------------------------- reading

_TOP = {
    *("quant_method", "format", "quantization_status", "config_groups", "ignore", "kv_cache_scheme", "version"),
    *("global_compression_ratio", "sparsity_config", "moe_sparsity_config", "transform_config"),
    *("run_compressed", "dequantize"),
}
_GROUP = {"targets", "format", "weights", "input_activations", "output_activations"}
_ARGS = {
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"),
    *("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
}
_UNSEEN = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype", "actorder")
"""Keys of a block that say nothing of the stored numbers (dtypes are checked at the tensors)."""


def parse(config: Json, files: Mapping[str, Json]) -> Config:
    """What a `quantization_config` says.

    Raises:
        CheckpointError: unknown keys, a status other than `compressed`, or a block that isn't one.
        UnsupportedError: a scheme that jqopt has no format for.
    """
    _known(config, _TOP, "quantization_config")
    if config.get("quantization_status") != "compressed":
        raise CheckpointError(
            f"quantization_config: quantization_status is {config.get('quantization_status')!r}; only 'compressed' "
            "says that the files hold packed weights (transformers loads anything else as garbage)"
        )
    for key in ("sparsity_config", "moe_sparsity_config", "transform_config"):
        if config.get(key):
            raise UnsupportedError(f"quantization_config: {key} {config[key]!r} is not read")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"quantization_config: config_groups is {groups!r}; expected at least one group")
    read = [_read_group(name, g, config.get("format")) for name, g in groups.items()]
    ignore = _texts(config.get("ignore") or [], "ignore")
    return Config(_finder(read, ignore), _read_kv(config.get("kv_cache_scheme")))


def _finder(groups: Sequence[tuple[list[str], Found]], ignore: Sequence[str]) -> Callable[[str], Found | None]:
    def of(name: str) -> Found | None:
        if any(_matches(i, name) for i in ignore):
            return None
        for exact in (True, False):
            for targets, found in groups:
                if any(_matches(t, name) if exact else t == "Linear" for t in targets):
                    return found
        return None

    return of


def _matches(target: str, name: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def _read_group(name: str, group: Any, top: Any) -> tuple[list[str], Found]:
    where = f"quantization_config: {name}"
    if not isinstance(group, dict):
        raise CheckpointError(f"{where} is {group!r}; expected an object")
    _known(group, _GROUP, where)
    if group.get("output_activations") is not None:
        raise UnsupportedError(f"{where}: quantized outputs are not read")
    format = group.get("format") or (None if top == "mixed-precision" else top)
    weights = _block(group.get("weights"), f"{where}.weights")
    inputs = None if group.get("input_activations") is None else _block(group["input_activations"], f"{where}.inputs")
    for r in ROWS:
        block = _same(r, format, weights, inputs)
        if block is not None:
            return _texts(group.get("targets"), f"{where}.targets"), Found(r, block or None)
    raise UnsupportedError(
        f"{where}: jqopt has no format for {format} with weights {weights} and inputs {inputs}; it reads "
        + ", ".join(r.name for r in ROWS)
    )


def _same(r: Row, format: Any, weights: Json, inputs: Json | None) -> Any:
    """The block of a row that says the same (0: it has none), or None if it says something else."""
    mine = _block(r.facts["weights"], "")
    group = weights.get("group_size")
    if r.any_block:
        if not isinstance(group, int) or group < 1:
            return None
        mine = {**mine, "group_size": group}
    theirs = None if r.facts["inputs"] is None else _block(r.facts["inputs"], "")
    return (group if r.any_block else 0) if (r.facts["format"], mine, theirs) == (format, weights, inputs) else None


def _block(args: Any, where: str) -> Json:
    """A `QuantizationArgs` block with the library's defaults, without the keys that say nothing of the numbers."""
    if not isinstance(args, dict):
        raise CheckpointError(f"{where} is {args!r}; expected an object")
    _known(args, _ARGS, where)
    if args.get("actorder") in ("group", "dynamic", True):
        raise UnsupportedError(f"{where}: actorder {args['actorder']!r} (reordered groups) is not read")
    full = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False} | {
        k: v for k, v in args.items() if v is not None and k not in _UNSEEN
    }
    size = full.get("group_size")
    full.setdefault("strategy", "tensor" if size is None else "channel" if size == -1 else "group")
    if size == -1 or full["strategy"] in ("tensor", "channel", "token"):
        full.pop("group_size", None)
    return full


def _read_kv(scheme: Any) -> str | None:
    if scheme is None:
        return None
    found = _block(scheme, "quantization_config: kv_cache_scheme")
    if found != _block(KV_SCHEME, ""):
        raise UnsupportedError(f"quantization_config: kv_cache_scheme {scheme!r} is not read; expected {KV_SCHEME}")
    return "FP8"


def _known(found: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(found) - known):
        raise CheckpointError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")


def _texts(found: Any, where: str) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
        raise CheckpointError(f"{where} is {found!r}; expected a list of names")
    for text in found:
        if text.startswith("re:"):
            try:
                re.compile(text[3:])
            except re.error as e:
                raise CheckpointError(f"{where}: {text!r} is no regular expression: {e}") from None
    return found


TARGET = Target(
    METHOD, ROWS, describe, parse, lambda attention, part: f"{attention}.{part}_scale",
    Stored("", "", "float", "one"), {"FP8": 1.0},
)  # fmt: skip
