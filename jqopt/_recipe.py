"""Recipes: YAML files that say which weights and inputs get which number format; checked once, then frozen.

This is the only file that reads or writes YAML. `docs/recipes.md` describes the file format for users.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import hashlib
import importlib.resources
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import pydantic
import yaml
from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, WithJsonSchema
from yaml.composer import ComposerError
from yaml.scanner import ScannerError

from jqopt import _ops, formats
from jqopt._recipe_base import Model as _Model
from jqopt._recipe_base import canonical as _canonical
from jqopt._recipe_base import choice as _choice
from jqopt._recipe_base import count as _count
from jqopt._recipe_base import key as _key
from jqopt._recipe_base import keys as _keys
from jqopt._recipe_base import near as _near
from jqopt._recipe_base import one_of as _one_of
from jqopt._recipe_base import show as _show
from jqopt._recipe_base import text as _text
from jqopt._recipe_base import truth as _truth
from jqopt._recipe_train import TrainOperand, TrainSpec
from jqopt.errors import RecipeError

SCHEMA = 1
FOLDERS = ("train", "defaults")
OPS = ("dot_general", "conv", "ragged_dot", "gather")

GRANULARITIES = ("tensor", "channel", "token", "block")
SCALINGS = ("static", "dynamic")
OPERAND_GRANULARITIES = ("tensor", "token", "block")
OPERAND_SCALINGS = ("static", "dynamic", "cast")
MOST_FEEDBACK = 1024  # channels; their factors take 2 bytes a channel and channel of the block
OPERANDS = ("q", "k", "v", "p")

Role = Literal["weight", "input"]
Where = tuple[str | int, ...]


class SiteLike(Protocol):
    """What a rule looks at: one operation that uses a parameter."""

    @property
    def path(self) -> str | None: ...  # of the parameter: "layers/0/mlp/up/kernel"
    @property
    def module(self) -> str | None: ...  # class name of the module it belongs to, where known
    @property
    def op(self) -> str: ...  # one of OPS
    @property
    def used_by(self) -> frozenset[str]: ...  # every op that uses the parameter anywhere
    @property
    def shape(self) -> tuple[int, ...]: ...  # the parameter's
    @property
    def contracted(self) -> int: ...  # length of the contracted axes; 0 if none


@dataclasses.dataclass(frozen=True)
class AlgorithmSpec:
    """The name of an algorithm and its options, as the recipe gives them; `algorithms` checks both.

    `options` holds JSON values only; treat it as read-only.
    """

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(_canonical(self.to_dict()))

    def spell(self) -> Any:
        """As short as a recipe file may write it: the bare name, where there are no options."""
        return self.to_dict() if self.options else self.name

    def to_dict(self) -> dict[str, Any]:
        """{"name": name, option: value, ...}, as a recipe file spells it."""
        return {"name": self.name, **self.options}

    @classmethod
    def from_dict(cls, data: str | Mapping[str, Any]) -> AlgorithmSpec:
        """The inverse of `to_dict`; also takes a bare name.

        Raises:
            RecipeError: no name, or options that JSON cannot hold.
        """
        try:
            return _algorithm(data)
        except ValueError as error:
            raise RecipeError(f"algorithm: {error}") from error


MAX = AlgorithmSpec("max")


# ------------------------------------------------------------------------------------------------------------
# Small checks: each returns what the file says in one shape, or raises ValueError saying what to write.


def _prose(value: object) -> str:
    return _text(value) if value != "" else ""


def _names(value: object) -> tuple[str, ...]:
    return _each(_text)(value) if value not in ([], ()) else ()


def _block(value: object) -> int | tuple[int, int]:
    sizes: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if len(sizes) > 2 or not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes) or not sizes:
        raise ValueError(
            f"found {_show(value)}, expected a positive whole number (values along the contracted axis) "
            "or a pair of them [rows, contracted], such as 128 or [128, 128]"
        )
    return (sizes[0], sizes[1]) if len(sizes) == 2 else sizes[0]


def _feedback(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= MOST_FEEDBACK:
        raise ValueError(f"found {_show(value)}, expected a number of channels from 2 to {MOST_FEEDBACK}, such as 64")
    return value


def _each(check: Callable[[object], str]) -> Callable[[object], tuple[str, ...]]:
    """A validator of one value or a list of them."""

    def validate(value: object) -> tuple[str, ...]:
        values = value if isinstance(value, list | tuple) else [value]
        if not values:
            raise ValueError("found an empty list, expected at least one value; leave the key out to match anything")
        return tuple(check(v) for v in values)

    return validate


# What regular expressions hold and paths do not. ".*" may stand in dotted names, as in "layers.*.weight".
_REGEX = re.compile(r"[\\^$|()]|(^|/)\.[*+]|\.\+")


def _glob(value: object) -> str:
    """A shell pattern; refused where it is a regular expression, or holds braces or half a bracket."""
    pattern = _text(value)
    rest = re.sub(r"\[!?.[^\]]*\]", "", pattern)
    if pattern != pattern.strip():
        raise ValueError(f"found {pattern!r} with a space at an end; paths have none")
    if "[" in rest:
        raise ValueError(f"found {pattern!r}: '[' is never closed; write '[0-3]' for one of 0 to 3, or '[[]' for '['")
    if "{" in rest:
        spelled = re.search(r"\{([^}]*)\}", pattern)
        each = [pattern.replace(spelled[0], word.strip()) for word in spelled[1].split(",")] if spelled else []
        raise ValueError(f"found {pattern!r}: braces are not expanded; write a list of patterns: {each}")
    if _REGEX.search(rest):
        raise ValueError(
            f"found {pattern!r}, which looks like a regular expression, expected a shell pattern: '*' stands "
            f"for any text ('/' too), '?' for one character, '[01]' for 0 or 1; write {_as_glob(pattern)!r}"
        )
    return pattern


def _as_glob(regex: str) -> str:
    """A guess at the shell pattern that was meant by a regular expression, for a message."""
    glob = re.sub(r"\\d\+?|\.\*|\.\+|\\w\+|\([^)]*\)", "*", regex.strip("^$"))
    return re.sub(r"\*+", "*", glob.replace("\\.", "/").replace("\\", "").replace("|", "*")) or "*"


_OP_WORDS = {
    "dot_general": ("dot", "matmul", "einsum", "dense", "linear", "tensordot", "dot_product"),
    "conv": ("conv_general_dilated", "convolution", "conv2d", "conv1d", "conv3d", "conv_transpose"),
    "ragged_dot": ("ragged_dot_general", "ragged", "grouped_matmul", "gmm", "moe"),
    "gather": ("embed", "embedding", "take", "lookup", "index"),
}


def _op(value: object) -> str:
    if value in OPS:
        return str(value)
    word = str(value).lower()
    meant = next((op for op, words in _OP_WORDS.items() if word in words), None)
    hint = f"; did you mean {meant!r}?" if meant else _near(word, OPS) or "."
    raise ValueError(f"unknown operation {value!r}{hint} Known: {', '.join(OPS)}")


_KEPT = ("bfloat16", "bf16", "float16", "fp16", "half", "float32", "fp32", "float", "float64", "none", "keep")
_FORMAT_WORDS = {
    "fp8": ("float8_e4m3fn", "float8_e4m3", "float8", "e4m3", "e4m3fn", "fp8_e4m3", "f8_e4m3"),
    "fp8_e5m2": ("float8_e5m2", "e5m2", "bf8"),
    "nvfp4": ("float4_e2m1fn", "float4", "fp4", "e2m1", "float4_e2m1fn_x2"),
    "mxfp6": ("float6_e3m2fn", "float6", "fp6", "e3m2"),
    "mxfp6_e2m3": ("float6_e2m3fn", "e2m3"),
    "int8": ("uint8", "i8", "s8", "w8a8", "w8a16"),
    "int4": ("i4", "s4", "w4a16", "int2", "int3"),
}


def _format_name(value: object) -> str:
    """The name of a format in `formats`; names of array dtypes get a message of their own."""
    if value in formats.names():
        return str(value)
    known = f" Known: {', '.join(formats.names())}"
    if not isinstance(value, str):
        raise ValueError(f"found {_show(value)}, expected the name of a format.{known}")
    word = value.lower()
    if word in _KEPT:
        raise ValueError(
            f"{value!r} is no quantized format; to leave a tensor in high precision write 'keep: true' "
            "(or leave 'input' out to quantize only the weight)"
        )
    meant = next((name for name, words in _FORMAT_WORDS.items() if word in words), None)
    hint = f"; did you mean {meant!r}?" if meant else _near(word, formats.names()) or "."
    raise ValueError(f"unknown format {value!r}{hint}{known}")


def _plain(value: object, at: str) -> Any:
    """A copy of `value` made of what JSON can hold, or ValueError."""
    if isinstance(value, Mapping):
        return {_text(key): _plain(item, f"{at}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{at}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(
        f"option {at}: found {_show(value)}, expected text, a finite number, true, false, or lists of them"
    )


def _algorithms(value: object) -> tuple[AlgorithmSpec, ...]:
    """One algorithm or a list, each a name or {name: ..., options...}."""
    values = value if isinstance(value, list | tuple) else [value]
    if not values or any(v is None for v in values):
        raise ValueError(
            "found nothing, expected the name of an algorithm; leave the key out (or write max) for plain max"
        )
    return tuple(_algorithm(v) for v in values)


def _fuse(value: object) -> tuple[tuple[str, ...], ...]:
    """Sets of patterns, each a list; [] fuses nothing."""
    if not isinstance(value, list | tuple):
        raise ValueError(
            f'found {_show(value)}, expected a list of lists of patterns, such as [["*/q_proj/*", "*/k_proj/*"]]; '
            "[] shares no scale; leave the key out to share where the model's dataflow says so"
        )
    out = []
    for one in value:
        if not isinstance(one, list | tuple) or len(one) < 2:
            raise ValueError(
                f'found {_show(one)}, expected a list of at least two patterns, such as ["*/gate/*", "*/up/*"]'
            )
        out.append(tuple(map(_glob, one)))
    return tuple(out)


def _algorithm(value: object) -> AlgorithmSpec:
    if isinstance(value, AlgorithmSpec):
        return value
    if not isinstance(value, Mapping):
        return AlgorithmSpec(_text(value))
    if "name" not in value:
        example = next(iter(value), "awq")
        raise ValueError(f"found {_show(dict(value))} without 'name'; write {{name: {example}, ...}} or just {example}")
    if isinstance(value.get("options"), Mapping):
        raise ValueError("options stand beside 'name', not under 'options'; write {name: awq, alpha_grid: 20}")
    options = {key: item for key, item in value.items() if key != "name"}
    return AlgorithmSpec(_text(value["name"]), {_text(key): _plain(item, str(key)) for key, item in options.items()})


def _calibrator(value: object) -> AlgorithmSpec:
    try:
        return _algorithm(value)
    except ValueError as error:
        raise ValueError(str(error).replace("awq, alpha_grid: 20", "percentile, percentile: 99.9")) from error


def _match_input(value: object) -> object:
    if isinstance(value, str | list | tuple):
        return {"path": value}
    if isinstance(value, Match) or (isinstance(value, Mapping) and value):
        return value
    raise ValueError(f'found {_show(value)}, expected a pattern over the parameter\'s path; write match: "*" for any')


def _spec_input(value: object) -> object:
    if isinstance(value, list | tuple) and len(value) > 1 and all(isinstance(v, str) for v in value):
        return _sequence([str(v) for v in value])
    if isinstance(value, TensorSpec) or (isinstance(value, Mapping) and "format" in value):
        return value
    if isinstance(value, Mapping) and not set(value) <= set(_keys(TensorSpec)):
        return {"format": formats.names()[0], **value}  # the wrong key is the better thing to tell
    if isinstance(value, Mapping):
        raise ValueError(f"found {_show(dict(value))} without 'format'; write {{format: int8, ...}}")
    return {"format": _format_name(value)}


def _sequence(names: list[str]) -> object:
    """Formats applied one after the other, `[int4, fp8]`."""
    known = [n.split("_") for n in formats.names() if formats.get(n).then is not None]
    if names not in known:
        written = " or ".join(str(k).replace("'", "") for k in known)
        raise ValueError(f"found the formats {names} in sequence; write one format, or {written}")
    return {"format": "_".join(names)}


def _operand_input(value: object) -> object:
    if isinstance(value, OperandSpec) or (isinstance(value, Mapping) and "format" in value):
        return value
    if isinstance(value, Mapping) and set(value) <= set(_keys(OperandSpec)):
        raise ValueError(f"found {_show(dict(value))} without 'format'; write {{format: fp8, ...}}")
    return {"format": formats.names()[0], **value} if isinstance(value, Mapping) else {"format": _format_name(value)}


def _as_weight(spec: TensorSpec) -> TensorSpec:
    return _resolve(spec, "weight")


def _as_input(spec: TensorSpec) -> TensorSpec:
    return _resolve(spec, "input")


def _rules_input(value: object) -> object:
    if isinstance(value, Mapping):
        one = "one rule" if "match" in value else "a mapping"
        raise ValueError(f"found {one}, expected a list of rules; begin each with a dash: '- match: \"*/mlp/*\"'")
    if not isinstance(value, list | tuple):
        raise ValueError(f"found {_show(value)}, expected a list of rules, each beginning with '- match:'")
    return value


def _schema_version(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > SCHEMA:
        raise ValueError(f"this recipe is of schema {value}, and this jqopt reads schema {SCHEMA}; use a newer jqopt")
    if value == SCHEMA and type(value) is int:
        return SCHEMA
    raise ValueError(f"found {_show(value)}, expected the version of the recipe format; write schema: {SCHEMA}")


def _names_schema(known: tuple[str, ...] = (), at_least: int = 1) -> WithJsonSchema:
    one: dict[str, Any] = {"type": "string", **({"enum": list(known)} if known else {})}
    return WithJsonSchema({"anyOf": [one, {"type": "array", "items": one, "minItems": at_least}]})


def _algorithm_schema(single: bool = False) -> WithJsonSchema:
    table = {
        "type": "object",
        "properties": {"name": {"type": "string"}},
        "required": ["name"],
        "additionalProperties": True,
    }
    one = [{"type": "string"}, table]
    if single:
        return WithJsonSchema({"anyOf": one})
    return WithJsonSchema({"anyOf": [*one, {"type": "array", "items": {"anyOf": one}, "minItems": 1}]})


_SIZE = {"type": "integer", "minimum": 1}
_PAIR = {"type": "array", "items": _SIZE, "minItems": 2, "maxItems": 2}

_Text = Annotated[str, PlainValidator(_text), WithJsonSchema({"type": "string"})]
_Truth = Annotated[bool, PlainValidator(_truth), WithJsonSchema({"type": "boolean"})]
_Count = Annotated[int, PlainValidator(_count), WithJsonSchema(_SIZE)]
_Prose = Annotated[str, PlainValidator(_prose), WithJsonSchema({"type": "string"})]
_Names = Annotated[tuple[str, ...], PlainValidator(_names), _names_schema(at_least=0)]
_Globs = Annotated[tuple[str, ...], PlainValidator(_each(_glob)), _names_schema()]
_Ops = Annotated[tuple[str, ...], PlainValidator(_each(_op)), _names_schema(OPS)]
_Algorithms = Annotated[tuple[AlgorithmSpec, ...], PlainValidator(_algorithms), _algorithm_schema()]
_Calibrator = Annotated[AlgorithmSpec, PlainValidator(_calibrator), _algorithm_schema(single=True)]
_FormatName = Annotated[str, PlainValidator(_format_name), _one_of(formats.names())]
_Granularity = Annotated[str, PlainValidator(_choice(*GRANULARITIES)), _one_of(GRANULARITIES)]
_Scaling = Annotated[str, PlainValidator(_choice(*SCALINGS)), _one_of(SCALINGS)]
_Block = Annotated[int | tuple[int, int], PlainValidator(_block), WithJsonSchema({"anyOf": [_SIZE, _PAIR]})]
_Feedback = Annotated[
    int,
    PlainValidator(_feedback),
    WithJsonSchema({"type": "integer", "minimum": 2, "maximum": MOST_FEEDBACK}),
]
_OperandScaling = Annotated[str, PlainValidator(_choice(*OPERAND_SCALINGS)), _one_of(OPERAND_SCALINGS)]
_OperandGranularity = Annotated[str, PlainValidator(_choice(*OPERAND_GRANULARITIES)), _one_of(OPERAND_GRANULARITIES)]
_Backend = Annotated[str, PlainValidator(_choice(*_ops.BACKENDS)), _one_of(_ops.BACKENDS)]
_Schema = Annotated[int, PlainValidator(_schema_version), WithJsonSchema({"type": "integer", "const": SCHEMA})]
_FUSE_SCHEMA = {"type": "array", "items": {"type": "array", "items": {"type": "string"}, "minItems": 2}}
_Fuse = Annotated[tuple[tuple[str, ...], ...], PlainValidator(_fuse), WithJsonSchema(_FUSE_SCHEMA)]


# ------------------------------------------------------------------------------------------------------------
# The values a recipe is made of.


class TensorSpec(_Model):
    """How one tensor is quantized: a number format, which values share a scale, and when the scale is found.

    As it stands in a loaded `Rule` every field but `block` is filled in (see `resolve`).
    """

    format: _FormatName = Field(description="the number format")
    granularity: _Granularity | None = _key("what shares a scale: weights channel or tensor, inputs token or tensor")
    scaling: _Scaling | None = _key("of inputs: static (calibrated) or dynamic (from the live tensor)")
    block: _Block | None = _key("values that share a scale, along the contracted axis; or [rows, contracted]")
    calibrator: _Calibrator | None = _key("of static inputs: how the range is found, such as percentile; default max")
    feedback: _Feedback | None = _key(
        "of inputs: channels that are rounded together, making up for each other's errors"
    )

    def element_format(self) -> formats.Format:
        """The format with this spec's block; no block where a channel, a token or the tensor shares a scale.

        Raises:
            UnsupportedError: the format cannot have such a block.
        """
        base = formats.get(self.format)
        base = base if self.block is None else base.with_block(self.block)
        whole = self.granularity in ("tensor", "channel", "token") and base.block is not None
        return base.with_block(None) if whole else base

    @property
    def needs_calibration(self) -> bool:
        """Of an input's spec: its scale comes from calibration batches (a weight's comes from the weight)."""
        return self.scaling == "static"

    def resolve(self, role: Role) -> TensorSpec:
        """This spec with the defaults of a weight or an input filled in.

        Raises:
            RecipeError: the spec contradicts itself or cannot be had for this role.
        """
        try:
            return _resolve(self, role)
        except ValueError as error:
            raise RecipeError(f"{role}: {error}") from error

    @classmethod
    def from_dict(cls, data: str | Mapping[str, Any]) -> TensorSpec:
        """The inverse of `to_dict`; also takes the bare name of a format.

        Raises:
            RecipeError: unknown keys or values.
        """
        try:
            return cls.model_validate(_spec_input(data))
        except pydantic.ValidationError as error:
            raise _explained(error, _File("tensor spec", {})) from error
        except ValueError as error:
            raise RecipeError(f"tensor spec: {error}") from error


def _resolve(spec: TensorSpec, role: Role) -> TensorSpec:
    """`spec` with defaults, or ValueError saying what to write instead."""
    misplaced = {"weight": "token", "input": "channel"}[role]
    if spec.granularity == misplaced:
        other = "channel" if role == "weight" else "token"
        raise ValueError(f"granularity {misplaced!r} is not for the {role}; write 'granularity: {other}'")
    if spec.block is not None and spec.granularity not in (None, "block"):
        raise ValueError(f"block: {spec.block} contradicts granularity: {spec.granularity}; leave one of them out")
    if spec.granularity not in (None, "block"):
        formats.get(spec.format).tile_for(1, 1, spec.granularity)  # raises where scales need blocks
    own = spec.element_format().granularity
    granularity = spec.granularity or ("tensor" if role == "input" and own == "channel" else own)
    if granularity == "block" and spec.element_format().block is None:
        raise ValueError(f"format {spec.format!r} has no block of its own; write its size, such as 'block: 128'")
    if spec.feedback is not None and role == "weight":
        raise ValueError("feedback is for inputs; a weight is rounded so by `algorithm: gptq`")
    block = spec.element_format().block if granularity == "block" else None
    filled = TensorSpec(format=spec.format, granularity=granularity, scaling=spec.scaling, block=block)
    scaling = _weight_scaling(filled) if role == "weight" else _input_scaling(filled)
    if spec.calibrator is not None and (role == "weight" or scaling == "dynamic"):
        raise ValueError(
            f"calibrator: {spec.calibrator.name} finds the range of a static input; "
            + ("how a weight's scales are found says 'algorithm', such as 'algorithm: mse'" if role == "weight" else
               "this one's scale follows the live data; leave it out, or write 'scaling: static'")
        )  # fmt: skip
    return filled.model_copy(update={"scaling": scaling, "calibrator": spec.calibrator, "feedback": spec.feedback})


def _weight_scaling(spec: TensorSpec) -> str:
    if spec.scaling == "dynamic":
        raise ValueError("a weight's scales are computed once, from the weight; leave 'scaling' out of 'weight'")
    return "static"


def _input_scaling(spec: TensorSpec) -> str:
    """When the scale of an input is found; ValueError for formats and combinations an input cannot have."""
    fmt = spec.element_format()
    if fmt.then is not None:
        raise ValueError(f"{spec.format!r} is for weights only; write {fmt.then.name and 'fp8'}")
    if fmt.zero_point:
        raise ValueError(f"{spec.format!r} is asymmetric (it has zero points), for weights only; write int8 or int4")
    if fmt.element.kind == "table":
        raise ValueError(f"{spec.format!r} is a table of values, for weights only; write int8, fp8 or nvfp4")
    if fmt.element.kind == "int" and spec.granularity == "block" and fmt.scale.name == "float32":
        raise ValueError(
            f"{spec.format!r} in blocks is for weights only: an integer product is summed over the whole "
            f"contraction; write {{format: {spec.format}, granularity: token}}"
        )
    if isinstance(fmt.block, tuple) and fmt.block[0] > 1:
        raise ValueError(
            f"a block of {list(fmt.block)} would make one token's scale depend on its neighbours; "
            f"write a single number, such as 'block: {fmt.block[1]}'"
        )
    live = spec.granularity == "token" or (spec.granularity == "block" and not fmt.global_scale)
    if live and spec.scaling == "static":
        what = "each token" if spec.granularity == "token" else f"each {spec.format} block"
        raise ValueError(f"the scale of {what} follows the live data, so it cannot be static; write 'scaling: dynamic'")
    return spec.scaling or ("dynamic" if live else "static")


_SpecInput = Annotated[
    TensorSpec, BeforeValidator(_spec_input, json_schema_input_type=_FormatName | list[_FormatName] | TensorSpec)
]


class OperandSpec(_Model):
    """How an operand of attention (q, k, v, or p, the softmax's output) is quantized along its head's channels.

    As it stands in a loaded `Recipe` format, granularity and scaling are filled in.
    """

    format: _FormatName = Field(description="the number format")
    granularity: _OperandGranularity | None = _key("what shares a scale: tensor, token (one head's vector) or block")
    scaling: _OperandScaling | None = _key("static (calibrated), dynamic (from the live tensor) or cast (a scale of 1)")
    block: _Count | None = _key("values that share a scale, along the head's channels (of p: along the keys)")
    affine: _Truth = Field(default=False, description="k, v: subtract each channel's calibrated mean, add it back")
    rotate: _Truth = Field(default=False, description="k: turn q and k by a Hadamard matrix along the head's channels")

    _where: str = pydantic.PrivateAttr("")

    @property
    def where(self) -> str:
        """The place it was read from, such as "kv_fp8.yaml:5 kv_cache"; "" for one made in Python."""
        return self._where

    def element_format(self) -> formats.Format:
        """The format with this spec's block; no block where a token or the tensor shares a scale."""
        return TensorSpec(format=self.format, granularity=self.granularity, block=self.block).element_format()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a recipe file spells it; keys at their defaults are left out."""
        return {key: value for key, value in super().to_dict().items() if value is not False}

    @classmethod
    def from_dict(cls, data: str | Mapping[str, Any]) -> OperandSpec:
        """The inverse of `to_dict`; also takes the bare name of a format.

        Raises:
            RecipeError: unknown keys or values.
        """
        try:
            return _as_operand(cls.model_validate(_operand_input(data)))
        except pydantic.ValidationError as error:
            raise _explained(error, _File("operand spec", {})) from error
        except ValueError as error:
            raise RecipeError(f"operand spec: {error}") from error


def _as_operand(spec: OperandSpec) -> OperandSpec:
    """`spec` with the defaults of an operand filled in, or ValueError saying what to write instead."""
    cast = spec.scaling == "cast"
    asked = TensorSpec(
        format=spec.format, granularity=spec.granularity, block=spec.block, scaling=None if cast else spec.scaling
    )
    plain = _resolve(asked, "input")
    element = plain.element_format()
    able = element.global_scale or (element.element.kind == "float" and plain.granularity == "tensor")
    if cast and not (able and plain.scaling == "static"):
        raise ValueError(
            f"'scaling: cast' is a scale of 1 for the whole tensor, which {spec.format!r} ({plain.granularity}) "
            "has no use for; write 'scaling: dynamic', or fp8 or nvfp4"
        )
    block = plain.block if isinstance(plain.block, int) else None
    return spec.model_copy(
        update={"granularity": plain.granularity, "scaling": "cast" if cast else plain.scaling, "block": block}
    )


def _only(role: str, *flags: str) -> Callable[[OperandSpec], OperandSpec]:
    """A validator of the operand `role`, which can be asked for these flags only."""

    def check(spec: OperandSpec) -> OperandSpec:
        if spec.affine and "affine" not in flags:
            raise ValueError(f"affine is for keys and values, which a cache holds, not for {role}; leave it out")
        if spec.rotate and "rotate" not in flags:
            raise ValueError(
                f"q and k are rotated together: write 'rotate: true' in kv_cache or attention.k, not {role}"
            )
        return _as_operand(spec)

    return check


_OperandInput = BeforeValidator(_operand_input, json_schema_input_type=_FormatName | OperandSpec)
_KvCache = Annotated[OperandSpec, _OperandInput, AfterValidator(_only("kv_cache", "affine", "rotate"))]
_Q = Annotated[OperandSpec, _OperandInput, AfterValidator(_only("q"))]
_K = Annotated[OperandSpec, _OperandInput, AfterValidator(_only("k", "affine", "rotate"))]
_V = Annotated[OperandSpec, _OperandInput, AfterValidator(_only("v", "affine"))]
_P = Annotated[OperandSpec, _OperandInput, AfterValidator(_only("p"))]


class AttentionSpec(_Model):
    """How the operands of attention's two products are quantized; what isn't given stays as it is."""

    q: _Q | None = _key("queries")
    k: _K | None = _key("keys")
    v: _V | None = _key("values")
    p: _P | None = _key("the softmax's output; static needs no data, since none is above 1")

    @pydantic.model_validator(mode="after")
    def _says_something(self) -> AttentionSpec:
        if not any(getattr(self, role) for role in OPERANDS):
            raise ValueError("found nothing, expected formats of q, k, v or p, such as 'attention: {q: fp8, p: fp8}'")
        return self


class ShapeMatch(_Model):
    """What a parameter's shape must be; all given keys must hold."""

    rank: _Count | None = _key("number of axes")
    min_size: _Count | None = _key("fewest values")
    max_size: _Count | None = _key("most values")
    divisible_by: _Count | None = _key("divides the contracted length")

    def matches(self, site: SiteLike) -> bool:
        """Whether the shape of the site's parameter (and its contracted length) is as asked."""
        size = math.prod(site.shape)
        return (
            self.rank in (None, len(site.shape))
            and size >= (self.min_size or 0)
            and (self.max_size is None or size <= self.max_size)
            and (self.divisible_by is None or (site.contracted > 0 and site.contracted % self.divisible_by == 0))
        )


class Match(_Model):
    """Which sites a rule is for; all given keys must hold, and of a list any entry may."""

    path: _Globs = Field(default=("*",), description="pattern over the parameter's path, such as */mlp/*, or a list")
    module: _Globs | None = _key("pattern over the class name of the module that owns the parameter, or a list")
    op: _Ops | None = _key("the operation, or a list")
    used_by: _Ops | None = _key("an operation that uses the parameter here or elsewhere, or a list")
    shape: ShapeMatch | None = _key("what the parameter's shape must be")

    def matches_path(self, path: str) -> bool:
        """Whether a glob fits the path, or the path with a "/" before it."""
        return any(fnmatch.fnmatchcase(p, glob) for glob in self.path for p in (path, "/" + path))

    def matches(self, site: SiteLike) -> bool:
        """Whether the site has what every given key asks for. A site without a parameter has no rule."""
        return (
            site.path is not None
            and self.matches_path(site.path)
            and (self.module is None or site.module is not None)
            and (self.module is None or any(fnmatch.fnmatchcase(site.module or "", glob) for glob in self.module))
            and (self.op is None or site.op in self.op)
            and (self.used_by is None or not site.used_by.isdisjoint(self.used_by))
            and (self.shape is None or self.shape.matches(site))
        )

    @property
    def is_fallback(self) -> bool:
        """Any path, module, shape and use: only `op` may be narrowed."""
        return all(set(glob) == {"*"} for glob in self.path) and not (self.module or self.used_by or self.shape)

    def covers(self, other: Match) -> bool:
        """Whether this surely matches whatever `other` matches (seen from the two alone, without a model)."""
        ops = self.op is None or (other.op is not None and set(other.op) <= set(self.op))
        return self == other or (self.is_fallback and ops)


_MatchInput = Annotated[Match, BeforeValidator(_match_input, json_schema_input_type=str | list[str] | Match)]


class Rule(_Model):
    """What happens to the sites that `match`: kept in high precision, or quantized."""

    match: _MatchInput = Field(description="the sites it is for: a pattern over the parameter's path, or more")
    keep: _Truth = Field(default=False, description="leave in high precision")
    weight: Annotated[_SpecInput, AfterValidator(_as_weight)] | None = _key("how the weight is quantized")
    input: Annotated[_SpecInput, AfterValidator(_as_input)] | None = _key("how the activation is quantized")
    algorithm: _Algorithms | None = _key("in place of the recipe's algorithm")
    backend: _Backend | None = _key("in place of the recipe's backend")
    optional: _Truth = Field(default=False, description="no error if it matches nothing")

    _where: str = pydantic.PrivateAttr("")
    _inherited: bool = pydantic.PrivateAttr(False)

    @pydantic.model_validator(mode="after")
    def _says_one_thing(self) -> Rule:
        given = [key for key in ("weight", "input", "algorithm", "backend") if getattr(self, key) is not None]
        if self.keep and given:
            raise ValueError(f"keep: true leaves the site in high precision, yet {given[0]!r} is given; leave one out")
        if not self.keep and self.input is not None and self.weight is None:
            raise ValueError(
                "'input' without 'weight': an input is quantized for the product with a quantized weight; "
                "add 'weight', such as 'weight: int8'"
            )
        if not self.keep and self.weight is None:
            raise ValueError(
                "the rule does nothing; write 'keep: true', or 'weight' with a format, such as 'weight: int8'"
            )
        return self

    @property
    def where(self) -> str:
        """The place the rule was read from, such as "nvfp4.yaml:12 rules[1]"; "" for one made in Python."""
        return self._where

    @property
    def inherited(self) -> bool:
        """It came with `extends`, from another file than the recipe's own."""
        return self._inherited

    @property
    def needs_calibration(self) -> bool:
        """The input's scale comes from calibration batches."""
        return self.input is not None and self.input.needs_calibration

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a recipe file spells it; keys at their defaults are left out."""
        match = self.match.to_dict()
        data = {"match": match["path"] if list(match) == ["path"] else match}
        data |= {"keep": True} if self.keep else {}
        data |= {role: spec.to_dict() for role in ("weight", "input") if (spec := getattr(self, role)) is not None}
        data |= {"algorithm": _short_algorithm(self.algorithm)} if self.algorithm else {}
        data |= {"backend": self.backend} if self.backend else {}
        return data | ({"optional": True} if self.optional else {})


_RulesInput = Annotated[tuple[Rule, ...], BeforeValidator(_rules_input, json_schema_input_type=list[Rule])]


class Recipe(_Model):
    """A recipe. From `load_recipe` it is resolved: no `extends`, and `rules` in the order they decide."""

    schema_version: _Schema = Field(default=SCHEMA, alias="schema", description="version of the file format")
    name: _Text = Field(default="unnamed", description="what reports call it")
    description: _Prose = Field(default="", description="one line for the list of recipes")
    extends: _Names = Field(default=(), description="shipped recipes or files whose rules stand after these")
    rules: _RulesInput = Field(default=(), description="the first that matches a site decides")
    kv_cache: _KvCache | None = _key("how attention's keys and values are quantized, as a cache would hold them")
    attention: AttentionSpec | None = _key("how attention's operands q, k, v and p are quantized")
    algorithm: _Algorithms = Field(default=(MAX,), description="how scales are found: a name, or a list in order")
    backend: _Backend | None = _key("the kernels to run with: a family or one by its name; default: the best there are")
    train: TrainSpec | None = _key("how the weights that the rules quantize are trained: the operands of each GEMM")
    layerwise: _Truth | None = _key("solve each layer on what the quantized layers before it give")
    fuse: _Fuse | None = _key("sets of patterns: weights that share a scale, in place of what the dataflow says")

    def rule_for(self, site: SiteLike) -> Rule | None:
        """The first rule that matches the site, which decides; None: no rule is for it."""
        return next((rule for rule in self.rules if rule.match.matches(site)), None)

    @pydantic.model_validator(mode="after")
    def _one_way_for_keys_and_values(self) -> Recipe:
        for role, spec in _cached(self.kv_cache).items():
            given = getattr(self.attention, role, None)
            if given not in (None, spec):
                raise ValueError(
                    f"attention.{role} ({_line(given)}) contradicts kv_cache, which says {_line(spec)}; "
                    f"leave attention.{role} out, or write attention.k and attention.v in place of kv_cache"
                )
        return self

    @property
    def operands(self) -> dict[str, OperandSpec]:
        """How attention's operands are quantized, by role (q, k, v, p), from `kv_cache` and `attention`."""
        given = {role: spec for role in OPERANDS if (spec := getattr(self.attention, role, None)) is not None}
        both = _cached(self.kv_cache) | given
        return {role: both[role] for role in OPERANDS if role in both}

    @property
    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of the resolved recipe in canonical JSON."""
        return hashlib.sha256(_canonical(self.to_dict()).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `load_recipe` of it gives an equal recipe."""
        data: dict[str, Any] = {"schema": self.schema_version, "name": self.name}
        data |= {"description": self.description} if self.description else {}
        data |= {"extends": list(self.extends)} if self.extends else {}
        data["rules"] = [rule.to_dict() for rule in self.rules]
        data |= {} if self.kv_cache is None else {"kv_cache": self.kv_cache.to_dict()}
        data |= {} if self.attention is None else {"attention": self.attention.to_dict()}
        data |= {} if self.backend is None else {"backend": self.backend}
        data |= {} if self.train is None else {"train": self.train.to_dict()}
        data |= {} if self.fuse is None else {"fuse": [list(patterns) for patterns in self.fuse]}
        data |= {} if self.layerwise is None else {"layerwise": self.layerwise}
        inherits = self.extends and "algorithm" not in self.model_fields_set
        return data if inherits else data | {"algorithm": _short_algorithm(self.algorithm)}

    def to_yaml(self) -> str:
        """The text of a file that `load_recipe` reads as an equal recipe."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


def _cached(spec: OperandSpec | None) -> dict[str, OperandSpec]:
    """What `kv_cache` says of k and of v: only k is rotated."""
    if spec is None:
        return {}
    v = spec.model_copy(update={"rotate": False})
    v._where = spec.where
    return {"k": spec, "v": v}


def _line(spec: OperandSpec) -> str:
    return "{" + ", ".join(f"{key}: {str(value).lower()}" for key, value in spec.to_dict().items()) + "}"


def _split_operands(operands: Mapping[str, OperandSpec]) -> dict[str, Any]:
    """The keys `kv_cache` and `attention` of a recipe that quantizes these operands."""
    k, rest = operands.get("k"), dict(operands)
    if k is not None and "v" in rest and _cached(k)["v"] == rest["v"]:
        rest = {role: spec for role, spec in rest.items() if role not in ("k", "v")}
    else:
        k = None
    return {"kv_cache": k, "attention": AttentionSpec(**rest) if rest else None}


def _short_algorithm(specs: tuple[AlgorithmSpec, ...]) -> Any:
    plain = [spec.spell() for spec in specs]
    return plain[0] if len(plain) == 1 else plain


def matches(rule: Rule, site: SiteLike) -> bool:
    """Whether the rule is for this site: any object with path, module, op, used_by, shape and contracted."""
    return rule.match.matches(site)


def near_paths(rule: Rule, paths: Iterable[str], most: int = 3) -> list[str]:
    """Paths that a rule may have meant which matches none, the likeliest first; [] if none is near."""
    scores = {path: max(_likeness(glob, path) for glob in rule.match.path) for path in paths}
    best = sorted((path for path in scores if scores[path] > 0.6), key=lambda path: -scores[path])
    return [] if any(rule.match.matches_path(path) for path in best) else best[:most]


def _likeness(glob: str, path: str) -> float:
    """How like a path is to a glob, 0 to 1: the mean over the glob's words of the likest part of the path."""
    words = [word.lower() for word in re.split(r"[*?/]+|\[[^]]*\]", glob) if word]
    parts = path.lower().split("/")
    return sum(max(_ratio(word, part) for part in parts) for word in words) / max(len(words), 1)


def _ratio(a: str, b: str) -> float:
    return 1.0 if a in b else difflib.SequenceMatcher(None, a, b).ratio()


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of recipe files, for editors; `load_recipe` checks more than it can say."""
    schema = Recipe.model_json_schema(by_alias=True, mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "jqopt recipe"}


# ------------------------------------------------------------------------------------------------------------
# Files: YAML with line numbers, `extends`, and errors that name the place.


@dataclasses.dataclass(frozen=True)
class _File:
    """A recipe as read: its data, and for each key path the line it stands on."""

    label: str
    data: Any
    lines: Mapping[Where, int] = dataclasses.field(default_factory=dict)
    folder: Path = Path()
    identity: str = ""  # of a file: its absolute path

    def at(self, path: Where) -> str:
        """`file:line` of the nearest enclosing key that has a line."""
        line = next((self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines), None)
        return self.label if line is None else f"{self.label}:{line}"

    def fault(self, path: Where, text: str) -> str:
        """A line of an error message: file, line, key and what is wrong."""
        while path and not _has(self.data, path):
            path = path[:-1]
        key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")
        return f"{self.at(path)}: {key}: {text}" if key else f"{self.at(path)}: {text}"


def _has(data: Any, path: Where) -> bool:
    part: Any
    for part in path:
        if (isinstance(data, Mapping) and part in data) or (isinstance(data, list) and isinstance(part, int)):
            data = data[part]
        else:
            return False
    return True


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any] | Recipe) -> Recipe:
    """Reads and checks a recipe, and resolves what it extends.

    The first rule of the result that matches a site decides. In this order: the recipe's own rules, those
    of the files it extends, its own trailing fallbacks (`match: "*"`), then theirs. Extended rules that can
    no longer match are left out.

    Args:
        source: the name of a shipped recipe ("nvfp4"), a path, plain data as a file holds it, or a Recipe.

    Raises:
        RecipeError: an unreadable file, an unknown or contradictory key or value, a rule that can never
            match, files that extend each other, or no rule that quantizes a weight; names file, line and key.
    """
    if isinstance(source, Recipe) and not source.extends:
        file = _File(f"recipe {source.name!r}", {})
        _refuse_idle(file, _reachable(source.rules, own=True), source.operands)
        return source
    file = _open(source.to_dict() if isinstance(source, Recipe) else source)
    part = _part(file, (), set())
    rules = _reachable(part.specific + part.fallback)
    _refuse_idle(file, rules, part.operands)
    update = {
        "rules": rules, "extends": (), "algorithm": part.algorithm or (MAX,), "fuse": part.fuse,
        "layerwise": part.layerwise, "train": part.train, "backend": part.backend,
    }  # fmt: skip
    return part.recipe.model_copy(update=update | _split_operands(part.operands))


def list_recipes() -> dict[str, str]:
    """What each shipped recipe is, by name: `train/...` last. `defaults/...` are parts for `extends` and not listed."""
    names = [name for name in _shipped() if not name.startswith("defaults/")]
    return {name: _parsed(_open(name)).description for name in names}


@dataclasses.dataclass(frozen=True)
class _Part:
    """A file and all it extends: its rules in order, those that are fallbacks apart."""

    recipe: Recipe
    specific: tuple[Rule, ...]
    fallback: tuple[Rule, ...]
    algorithm: tuple[AlgorithmSpec, ...] | None
    fuse: tuple[tuple[str, ...], ...] | None
    layerwise: bool | None
    train: TrainSpec | None
    backend: str | None
    operands: dict[str, OperandSpec]


def _part(file: _File, chain: tuple[_File, ...], seen: set[str]) -> _Part:
    """Reads `file` and, depth first, what it extends; a file that was seen before adds nothing."""
    seen.add(file.identity)
    chain = (*chain, file)
    recipe = _parsed(file)
    own = tuple(_placed(rule, file, i, inherited=len(chain) > 1) for i, rule in enumerate(recipe.rules))
    _reachable(own, own=True)
    cut = len(own)
    while cut and own[cut - 1].match.is_fallback:
        cut -= 1
    bases = [_part(base, chain, seen) for base in _bases(file, recipe, chain) if base.identity not in seen]
    algorithm = recipe.algorithm if "algorithm" in recipe.model_fields_set else None
    return _Part(
        recipe,
        own[:cut] + tuple(rule for base in bases for rule in base.specific),
        own[cut:] + tuple(rule for base in bases for rule in base.fallback),
        algorithm or next((base.algorithm for base in bases if base.algorithm), None),
        next((part.fuse for part in (recipe, *bases) if part.fuse is not None), None),
        next((part.layerwise for part in (recipe, *bases) if part.layerwise is not None), None),
        next((part.train for part in (recipe, *bases) if part.train is not None), None),
        next((part.backend for part in (recipe, *bases) if part.backend is not None), None),
        functools.reduce(lambda above, base: {**base.operands, **above}, bases, _placed_operands(recipe, file)),
    )


def _bases(file: _File, recipe: Recipe, chain: tuple[_File, ...]) -> Iterator[_File]:
    for i, name in enumerate(recipe.extends):
        path = ("extends", i) if isinstance(file.data.get("extends"), list) else ("extends",)
        try:
            base = _open(name, file.folder)
        except RecipeError as error:
            raise RecipeError(file.fault(path, str(error))) from error
        if base.identity in (known.identity for known in chain):
            circle = " -> ".join(known.label for known in (*chain, base))
            raise RecipeError(file.fault(path, f"the files extend each other in a circle: {circle}"))
        yield base


def _placed(rule: Rule, file: _File, index: int, *, inherited: bool) -> Rule:
    """A copy of the rule that knows where it stands."""
    rule = rule.model_copy()
    rule._where = f"{file.at(('rules', index))} rules[{index}]"
    rule._inherited = inherited
    return rule


def _placed_operands(recipe: Recipe, file: _File) -> dict[str, OperandSpec]:
    """Copies of a file's operand specs that know where they stand."""
    out = {}
    for role, spec in recipe.operands.items():
        path = ("attention", role) if getattr(recipe.attention, role, None) is not None else ("kv_cache",)
        spec = spec.model_copy()
        spec._where = f"{file.at(path)} {'.'.join(path)}"
        out[role] = spec
    return out


def _reachable(rules: tuple[Rule, ...], *, own: bool = False) -> tuple[Rule, ...]:
    """The rules without inherited ones that an earlier rule hides; RecipeError if an own rule is hidden."""
    kept: list[Rule] = []
    for rule in rules:
        hider = next((earlier for earlier in kept if earlier.match.covers(rule.match)), None)
        if hider is None:
            kept.append(rule)
        elif own or not rule.inherited:
            raise RecipeError(
                f"{rule.where}: this rule can never match, because {hider.where} comes first and matches all "
                "that it does; the first rule that matches decides, so write special rules above general ones"
            )
    return tuple(kept)


def _refuse_idle(file: _File, rules: tuple[Rule, ...], operands: Mapping[str, OperandSpec]) -> None:
    if not operands and not any(rule.weight for rule in rules):
        raise RecipeError(
            f"{file.label}: no rule gives a format to a weight, so nothing would be quantized; add a rule "
            "such as '- {match: \"*\", weight: int8}' (a file of 'keep' rules only is for 'extends')"
        )


def _parsed(file: _File) -> Recipe:
    """The recipe in `file`, not yet resolved."""
    if not isinstance(file.data, Mapping):
        what = "nothing" if file.data is None else "a list" if isinstance(file.data, list) else _show(file.data)
        keys = ", ".join(_keys(Recipe))
        raise RecipeError(f"{file.at(())}: found {what}, expected a mapping with the keys {keys}")
    try:
        return Recipe.model_validate({"name": Path(file.label).stem, **file.data} if file.identity else file.data)
    except pydantic.ValidationError as error:
        raise _explained(error, file) from error


def _explained(error: pydantic.ValidationError, file: _File) -> RecipeError:
    """Pydantic's error in the words of the file."""
    faults = []
    for item in error.errors():
        path, context = item["loc"], item.get("ctx", {})
        if item["type"] == "value_error":
            text = str(context["error"])
        elif item["type"] == "unknown_key":
            path, text = (*path, context["key"]), str(context["text"])
        elif item["type"] == "missing":
            path, text = path[:-1], f"the key {path[-1]!r} is missing"
        elif item["type"] in ("model_type", "model_attributes_type"):
            keys = _KEYS_OF[context["class_name"]]
            text = f"found {_show(item['input'])}, expected a mapping with the keys {keys}"
        else:
            text = item["msg"]
        faults.append(file.fault(path, text))
    return RecipeError(faults[0] if len(faults) == 1 else "\n".join([f"{len(faults)} faults:", *faults]))


_KEYS_OF = {
    model.__name__: ", ".join(_keys(model))
    for model in (Recipe, Rule, Match, ShapeMatch, TensorSpec, OperandSpec, AttentionSpec, TrainSpec, TrainOperand)
}


# Where recipes come from.


def _recipes_dir() -> Traversable:
    """The shipped recipes: `jqopt/recipes` in a wheel, `recipes` beside the package in a checkout.

    Raises:
        RecipeError: neither is there.
    """
    package = importlib.resources.files("jqopt")
    for folder in (package / "recipes", Path(__file__).parent.parent / "recipes"):
        if (folder / "defaults" / "skip_sensitive.yaml").is_file():
            return folder
    raise RecipeError(
        f"the shipped recipes are missing from {package}: this installation is incomplete, install it again"
    )


def _shipped() -> tuple[str, ...]:
    """The names of all shipped recipes and parts, sorted, recipes first."""
    root = _recipes_dir()
    folders = [
        sorted(f"{name}/{f.name}" for f in (root / name).iterdir()) for name in FOLDERS if (root / name).is_dir()
    ]
    files = sorted(f.name for f in root.iterdir()) + [name for names in folders for name in names]
    return tuple(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


def _open(source: object, folder: Path | None = None) -> _File:
    """Finds and reads a recipe; names and paths in `extends` are looked up from `folder`."""
    if isinstance(source, Mapping):
        name = source.get("name")
        return _File(f"recipe {name!r}" if isinstance(name, str) else "recipe", source)
    if isinstance(source, str) and "\n" in source:
        raise RecipeError("found the text of a recipe, expected a name, a path or a dict; write it to a file")
    if isinstance(source, str) and source in _shipped():
        file = _recipes_dir().joinpath(f"{source}.yaml")
        return _read(file, f"{source}.yaml", folder=Path(str(file)).parent)
    if not isinstance(source, str | os.PathLike):
        raise RecipeError(f"found {_show(source)}, expected a recipe's name, a path, a mapping or a Recipe")
    path = (folder or Path()) / os.fspath(source)
    if isinstance(source, str) and not path.is_file() and path.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"no recipe {source!r}{_near(source, _shipped()) or '.'} Shipped: {', '.join(_shipped())}")
    return _read(path, str(path), folder=path.parent)


def _read(file: Traversable, label: str, folder: Path) -> _File:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        siblings = sorted(p.name for p in folder.glob("*.y*ml"))
        shipped = label.removesuffix(".yaml") in _shipped()
        hint = (
            f"; {label.removesuffix('.yaml')!r} is a shipped recipe." if shipped else _near(file.name, siblings, 0.75)
        )
        raise RecipeError(f"no file {label!r}{hint or '.'} Shipped recipes: {', '.join(_shipped())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{label}: cannot be read as a text file in UTF-8: {error}") from error
    data, lines = _from_yaml(text, label)
    return _File(label, data, lines, folder, identity=str(Path(str(file)).resolve()))


def _core_resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """What plain words mean in YAML 1.2: only true and false are truth values, 1e-3 is a number.

    (PyYAML keeps to YAML 1.1: there `on` is true, `1e-3` is text and `1:30` is 90.)
    """
    number = r"(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for kind, pattern, firsts in (
        ("null", r"(?:~|null|Null|NULL|)$", ["", *"~nN"]),
        ("bool", r"(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
        ("int", r"(?:[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
        ("float", rf"(?:[-+]?{number}|[-+]?\.inf|\.nan)$", "-+.0123456789"),
    ):
        for first in firsts:
            table.setdefault(first, []).append((_TAG + kind, re.compile(pattern)))
    return table


_TAG = "tag:yaml.org,2002:"
_CORE = _core_resolvers()


class _Loader(yaml.SafeLoader):
    """Reads YAML by the core rules."""

    yaml_implicit_resolvers = _CORE


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as text."""

    yaml_implicit_resolvers = _CORE


_NODES = 20_000  # more than any recipe has; an alias inside an alias inside an alias soon passes it


def _from_yaml(text: str, label: str) -> tuple[Any, dict[Where, int]]:
    """The data of a YAML text, and the line of each key path."""
    lines: dict[Where, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else _value(loader, node, (), lines, [0])), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{label}:{mark.line + 1}" if mark else label
        raise RecipeError(f"{place}: {error.problem or error.context}{_yaml_hint(error)}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{label}: this is not YAML: {error}") from error


def _yaml_hint(error: yaml.MarkedYAMLError) -> str:
    said = f"{error.context} {error.problem}"
    if "alias" in said and isinstance(error, ScannerError | ComposerError):
        return '; a pattern that begins with * must be quoted: "*/mlp/*"'
    if "\\t" in said:
        return "; indent with spaces, not tabs"
    return "; one recipe to a file" if "another document" in said else ""


def _value(loader: _Loader, node: yaml.Node, path: Where, lines: dict[Where, int], count: list[int]) -> Any:
    """The value of a node; notes the line of every key and list item in `lines`."""
    count[0] += 1
    lines.setdefault(path, node.start_mark.line + 1)
    if count[0] > _NODES or len(path) > 50:
        raise _marked(node, "too much or too deep for a recipe (an alias that contains itself?)")
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        return _mapping(loader, node, path, lines, count)
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return [_value(loader, item, (*path, i), lines, count) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and node.tag.removeprefix(_TAG) in (
        "str",
        "int",
        "float",
        "bool",
        "null",
    ):
        try:
            return loader.construct_object(node)
        except (ValueError, KeyError) as error:
            raise _marked(node, f"{node.value[:40]!r} is no {node.tag.removeprefix(_TAG)}") from error
    raise _marked(
        node,
        f"the tag {node.tag!r} has no meaning in a recipe; write plain text, numbers, lists and mappings",
    )


def _mapping(loader: _Loader, node: yaml.MappingNode, path: Where, lines: dict[Where, int], count: list[int]) -> Any:
    data: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
            raise _marked(key_node, "a key must be a word" + (f", found {key!r}" if isinstance(key, str) else ""))
        if key in data:
            raise _marked(key_node, f"the key {key!r} stands twice, first in line {lines[(*path, key)]}")
        lines[(*path, key)] = key_node.start_mark.line + 1
        data[key] = _value(loader, value_node, (*path, key), lines, count)
    return data


def _marked(node: yaml.Node, text: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark)
