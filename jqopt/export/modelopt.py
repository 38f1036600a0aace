"""The ModelOpt unified checkpoint (TensorRT-LLM, vLLM, SGLang): its schemes, and its two configurations both ways."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from jqopt.errors import CheckpointError, UnsupportedError
from jqopt.export.layouts import Stored
from jqopt.export.manifest import writer
from jqopt.export.schemes import KV, Config, Found, Json, Module, Row, Target, row

METHOD = "modelopt"
FILE = "hf_quant_config.json"
"""The configuration's second copy, which TensorRT-LLM reads."""

# How suffixes, dtypes and shapes differ by scheme. Every scale here is multiplied with.
_FP4 = Stored("weight", "data", "uint8", "codes")
_FP8 = Stored("weight", "data", "float8_e4m3fn", "codes")
_INT8 = Stored("weight", "data", "int8", "codes")
_PAIRS = Stored("weight", "data", "uint8", "row pairs")
_POWERS = Stored("weight_scale", "scale", "uint8", "grid")
_BY_BLOCK = Stored("weight_scale", "scale", "float32", "grid")
_BY_ROW = Stored("weight_scale", "scale", "float32", "vector")
_TILES = Stored("weight_scale", "scale", "float32", "tiles")
_WHOLE = Stored("weight_scale", "scale", "float32", "scalar scale", shared=True)
_SECOND = Stored("weight_scale_2", "global_scale", "float32", "scalar", shared=True)
_INPUT = Stored("input_scale", "input_scale", "float32", "scalar", shared=True)
_SMOOTH = Stored("pre_quant_scale", "pre_scale", "float", "channels", optional=True, shared=True)
_NVFP4 = (_FP4, Stored("weight_scale", "scale", "float8_e4m3fn", "grid"), _SECOND)

_PER_TENSOR_8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_GROUPS_4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
_AWQ = {"has_zero_point": False, "pre_quant_scale": True}


def _facts(size: int | None = None, groups: Json | None = None, spelled: str = "", more: Json | None = None) -> Json:
    """`size`: the group_size it writes; `groups`: its config_groups entry, if it has one; `spelled`: in files."""
    return {"group_size": size, "groups": groups, "spelled": spelled, "more": more or {}}


_NVFP4_GROUPS = {"input_activations": _GROUPS_4, "weights": _GROUPS_4}
_FP8_GROUPS = {"input_activations": _PER_TENSOR_8, "weights": _PER_TENSOR_8}

ROWS = (
    row("NVFP4", "nvfp4", "nvfp4", (*_NVFP4, _INPUT), _facts(16, groups=_NVFP4_GROUPS),
        "vllm sglang tensorrt-llm tpu-inference"),
    row("W4A16_NVFP4", "nvfp4", None, _NVFP4, _facts(16, groups={"weights": _GROUPS_4}), "vllm sglang"),
    row("NVFP4_AWQ", "nvfp4", "nvfp4", (*_NVFP4, _INPUT, _SMOOTH), _facts(16, more=_AWQ), "sglang"),
    row("FP8", "fp8", "fp8", (_FP8, _WHOLE, _INPUT), _facts(groups=_FP8_GROUPS), "vllm sglang tensorrt-llm"),
    row("FP8_PER_CHANNEL_PER_TOKEN", {"format": "fp8", "granularity": "channel"},
        {"format": "fp8", "granularity": "token"}, (_FP8, _BY_ROW), _facts(), "vllm tensorrt-llm"),
    row("FP8_PB_WO", "fp8_block", None, (_FP8, _TILES), _facts(spelled="fp8_pb_wo"), "vllm tensorrt-llm"),
    row("MXFP8", "mxfp8", "mxfp8", (_FP8, _POWERS), _facts(32), "vllm"),
    row("MXFP4", "mxfp4", "mxfp4", (_FP4, _POWERS), _facts(spelled="mxfp4")),
    row("W4A8_MXFP4_FP8", "mxfp4", {"format": "fp8", "scaling": "dynamic"}, (_FP4, _POWERS), _facts(32),
        "tensorrt-llm"),
    row("W4A16_AWQ", "int4", None, (_PAIRS, _BY_BLOCK, _SMOOTH), _facts(128, more=_AWQ),
        "tensorrt-llm", any_block=True),
    row("W4A8_AWQ", "int4_fp8", "fp8", (_PAIRS, _BY_BLOCK, _SECOND, _INPUT, _SMOOTH), _facts(128, more=_AWQ),
        "tensorrt-llm", any_block=True),
    row("W8A8_SQ_PER_CHANNEL", "int8", "int8", (_INT8, _BY_ROW, _INPUT, _SMOOTH), _facts()),
    row("W8A16", "int8", None, (_INT8, _BY_ROW), _facts(), "tensorrt-llm"),
)  # fmt: skip

BY_ALGO: dict[str, Row] = {r.name: r for r in ROWS}
MIXED = "MIXED_PRECISION"
KV_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}


# ---------------------------------------------------------------------------------------------------- writing


def describe(modules: Sequence[Module], embeddings: Sequence[str], kv: KV | None) -> tuple[Json, dict[str, Json]]:
    """config.json's `quantization_config`, and `hf_quant_config.json`."""
    done = [m for m in modules if m.row is not None]
    kinds = list(dict.fromkeys((m.row.name, m.block) for m in done if m.row is not None))
    left = [*(m.name for m in modules if m.row is None), *embeddings]
    algo, facts = _whole(done[0]) if len(kinds) == 1 else (MIXED, {})
    layers = {} if len(kinds) == 1 else {"quantized_layers": {m.name: _layer(m) for m in done}}
    detail = {
        "quant_algo": algo, "kv_cache_quant_algo": None if kv is None else kv.algo, **facts, **layers,
        "exclude_modules": left,
    }  # fmt: skip
    producer = {"name": "jqopt", "version": writer()}
    groups = _groups(done, kinds)
    return {
        **({"config_groups": groups} if groups else {}), **layers, "ignore": left, "quant_algo": algo,
        **({} if kv is None else {"kv_cache_scheme": KV_FP8 if kv.algo == "FP8" else kv.algo}),
        "producer": producer, "quant_method": METHOD,
    }, {FILE: {"producer": producer, "quantization": detail}}  # fmt: skip


def _layer(m: Module) -> Json:
    algo, facts = _whole(m)
    return {"quant_algo": algo, **facts}


def _whole(m: Module) -> tuple[str, Json]:
    assert m.row is not None
    facts = m.row.facts
    size = m.block if m.row.any_block else facts["group_size"]
    return facts["spelled"] or m.row.name, {**({} if size is None else {"group_size": size}), **facts["more"]}


def _groups(done: Sequence[Module], kinds: Sequence[Any]) -> Json:
    """`config_groups`, for the algorithms that have one: a repetition that some readers look at."""
    if len(kinds) == 1 and done[0].row is not None:
        groups = done[0].row.facts["groups"]
        return {} if groups is None else {"group_0": {**groups, "targets": ["Linear"]}}
    out: Json = {}
    for i, kind in enumerate(kinds):
        members = [m for m in done if m.row is not None and (m.row.name, m.block) == kind]
        row = members[0].row
        assert row is not None
        out[f"group_{i}"] = {**(row.facts["groups"] or {}), "targets": sorted(m.name for m in members)}
    return out


# ---------------------------------------------------------------------------------------------------- reading

_DETAIL = {
    *("quant_algo", "kv_cache_quant_algo", "group_size", "exclude_modules", "has_zero_point", "pre_quant_scale"),
    *("quantized_layers", "exclude_quantizers", "lora_rank"),
}
_FLAT = {
    *("quant_method", "quant_algo", "ignore", "exclude_modules", "producer", "config_groups", "kv_cache_scheme"),
    *("kv_cache_quant_algo", "quantized_layers", "group_size", "has_zero_point", "pre_quant_scale"),
}


def parse(config: Json, files: Mapping[str, Json]) -> Config:
    """What `hf_quant_config.json` and `quantization_config` say.

    Raises:
        CheckpointError: unknown keys, or the two contradict each other.
        UnsupportedError: an algorithm that jqopt has no format for.
    """
    _known(config, _FLAT, "quantization_config")
    detail = files.get(FILE, {}).get("quantization") or {
        **{k: v for k, v in config.items() if k in _DETAIL},
        "exclude_modules": config.get("ignore", config.get("exclude_modules")),
        "kv_cache_quant_algo": config.get("kv_cache_quant_algo") or _kv_of(config.get("kv_cache_scheme")),
    }
    if not isinstance(detail, dict):
        raise CheckpointError(f"{FILE}: quantization is {detail!r}; expected an object")
    _known(detail, _DETAIL, f"{FILE}: quantization")
    if config.get("quant_algo", detail.get("quant_algo")) != detail.get("quant_algo"):
        raise CheckpointError(
            f"config.json says quant_algo {config.get('quant_algo')!r}, {FILE} says {detail.get('quant_algo')!r}"
        )
    excluded = detail.get("exclude_modules") or []
    if not isinstance(excluded, list) or not all(isinstance(x, str) for x in excluded):
        raise CheckpointError(f"{FILE}: exclude_modules is {excluded!r}; expected a list of names")
    layers = detail.get("quantized_layers") or {}
    mixed = str(detail.get("quant_algo")).upper() == MIXED
    whole = None if mixed else _found(detail, FILE)
    by_name = {name: _found(layer, f"{FILE}: {name}") for name, layer in layers.items()} if mixed else {}

    def of(name: str) -> Found | None:
        if any(name == x or fnmatch.fnmatchcase(name, x) for x in excluded):
            return None
        return by_name.get(name) if mixed else whole

    return Config(of, _kv_algo(detail.get("kv_cache_quant_algo")))


def _found(facts: Any, where: str) -> Found:
    algo = facts.get("quant_algo") if isinstance(facts, dict) else None
    row = BY_ALGO.get(str(algo).upper())
    if row is None:
        raise UnsupportedError(f"{where}: quant_algo {algo!r} is not read; read are {', '.join(BY_ALGO)} and {MIXED}")
    size = facts.get("group_size")
    if not row.any_block:
        own = row.facts["group_size"]
        if size not in (None, 0, own):
            raise UnsupportedError(f"{where}: {algo} with group_size {size!r} is not read; expected {own}")
        return Found(row, None)
    size = row.facts["group_size"] if size is None else size
    if not isinstance(size, int) or size < 1:
        raise CheckpointError(f"{where}: group_size is {size!r}; expected a positive whole number")
    return Found(row, size)


def _kv_of(scheme: Any) -> Any:
    return "FP8" if isinstance(scheme, dict) else scheme


def _kv_algo(algo: Any) -> str | None:
    if algo in (None, "", "none"):
        return None
    if algo not in TARGET.kv_factors:
        known = ", ".join(TARGET.kv_factors)
        raise UnsupportedError(f"{FILE}: kv_cache_quant_algo {algo!r} is not read; read are {known}")
    return str(algo)


def _known(found: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(found) - known):
        raise CheckpointError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")


TARGET = Target(
    METHOD, ROWS, describe, parse, lambda attention, part: f"{attention}.{part}_proj.{part}_scale",
    Stored("", "", "float32", "scalar"), {"FP8": 1.0, "NVFP4": 6.0},
)  # fmt: skip
