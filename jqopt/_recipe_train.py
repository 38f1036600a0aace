"""The `train` section of recipes: how the operands of the three GEMMs of a linear layer are quantized in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import pydantic
from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema

from jqopt import formats
from jqopt._recipe_base import Model, choice, count, key, keys, near, one_of, show, truth

SCALINGS = ("current", "delayed", "block")
ROUNDINGS = ("nearest", "stochastic")
SCALE_ROUNDINGS = ("nearest", "up", "power_of_two")
HISTORY_USES = ("max", "most_recent")
BACKWARDS = ("quantized", "dequantized", "high_precision")
SCOPES = ("global", "shard")
MEASURES = ("mae", "mse")
KEEP = "keep"

FORMATS = tuple(
    name
    for name in formats.names()
    if (f := formats.get(name)).element.kind == "float"
    and f.then is None
    and len(f.ranges) == 1
    and not isinstance(f.block, tuple)
)
"""Formats of training: floats, with scales that the section itself describes."""


def _format(value: object) -> str:
    if value in FORMATS:
        return str(value)
    hint = near(value, FORMATS)
    if value in formats.names():
        hint = "; for tiles of fp8 write {format: fp8, tile: [128, 128]}" if str(value).startswith("fp8") else ""
    raise ValueError(f"{value!r} is no format of training{hint or '.'} Known: {', '.join(FORMATS)}")


def _tile(value: object) -> tuple[int, int]:
    sizes: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if len(sizes) != 2 or not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes):
        raise ValueError(f"found {show(value)}, expected [rows, contracted], such as [1, 16] or [128, 128]")
    return sizes[0], sizes[1]


def _number(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"found {show(value)}, expected a whole number, 0 or more")


def _operand_input(value: object) -> object:
    if isinstance(value, TrainOperand) or (isinstance(value, Mapping) and "format" in value):
        return value
    if isinstance(value, Mapping) and not set(value) <= set(keys(TrainOperand)):
        return {"format": FORMATS[0], **value}  # the wrong key is the better thing to tell
    if isinstance(value, Mapping):
        raise ValueError(f"found {show(dict(value))} without 'format'; write {{format: nvfp4, ...}}")
    return {"format": _format(value)}


_SIZE = {"type": "integer", "minimum": 1}
_Format = Annotated[str, PlainValidator(_format), one_of(FORMATS)]
_Tile = Annotated[
    tuple[int, int],
    PlainValidator(_tile),
    WithJsonSchema({"type": "array", "items": _SIZE, "minItems": 2, "maxItems": 2}),
]
_Truth = Annotated[bool, PlainValidator(truth), WithJsonSchema({"type": "boolean"})]
_Count = Annotated[int, PlainValidator(count), WithJsonSchema(_SIZE)]
_Number = Annotated[int, PlainValidator(_number), WithJsonSchema({"type": "integer", "minimum": 0})]
_Scaling = Annotated[str, PlainValidator(choice(*SCALINGS)), one_of(SCALINGS)]
_Rounding = Annotated[str, PlainValidator(choice(*ROUNDINGS)), one_of(ROUNDINGS)]
_ScaleRounding = Annotated[str, PlainValidator(choice(*SCALE_ROUNDINGS)), one_of(SCALE_ROUNDINGS)]
_Use = Annotated[str, PlainValidator(choice(*HISTORY_USES)), one_of(HISTORY_USES)]
_Backward = Annotated[str, PlainValidator(choice(*BACKWARDS)), one_of(BACKWARDS)]
_Scope = Annotated[str, PlainValidator(choice(*SCOPES)), one_of(SCOPES)]
_Measure = Annotated[str, PlainValidator(choice(*MEASURES)), one_of(MEASURES)]


class TrainOperand(Model):
    """How one operand (input, weight or gradient) is quantized, in both GEMMs that read it.

    Each operand is read twice, contracted along its rows ("rowwise") and along its columns ("columnwise"): the input in
    fprop and wgrad, the weight in fprop and dgrad, the output's gradient in dgrad and wgrad.
    """

    format: _Format = Field(description="the number format")
    tile: _Tile | None = key("[rows, contracted] that share a scale; default: the format's block, fp8 the whole tensor")
    scaling: _Scaling | None = key("current (from the live tensor), delayed (from past steps) or block (one a tile)")
    rounding: _Rounding = Field(default="nearest", description="nearest (ties to even) or stochastic")
    scale_rounding: _ScaleRounding = Field(default="nearest", description="of scales: nearest, up or power_of_two")
    hadamard: _Truth = Field(
        default=False, description="columnwise: a random Hadamard transform of 16 along the tokens"
    )
    row_scaled: _Truth = Field(default=False, description="nvfp4: a global scale for each row")
    four_over_six: _Measure | None = key("nvfp4: the better of two scales a block, by mae or mse")
    scale_max: _Count = Field(default=448, description="nvfp4: what the largest block scale becomes, 448 or 256")
    history: _Count = Field(default=1024, description="delayed: steps whose largest values are remembered")
    amax: _Use = Field(default="max", description="delayed: the max of the history, or the most_recent value")
    margin: _Number = Field(default=0, description="delayed: the scale is divided by 2 to this power")
    columnwise: TrainOperand | str | None = key("how the columnwise copy is quantized instead, or keep")

    def element_format(self) -> formats.Format:
        """The format, without its own block: `tiles` says which values share a scale."""
        return formats.get(self.format)

    @property
    def tiles(self) -> tuple[int, int] | None:
        """(rows, contracted) that share a scale; None: the whole tensor."""
        block = self.element_format().block
        return self.tile if self.tile is not None or block is None else (1, int(block))  # type: ignore[arg-type]

    @property
    def way(self) -> str:
        """How scales are found: current, delayed or block."""
        return self.scaling or ("current" if self.tiles is None else "block")

    @property
    def columns(self) -> TrainOperand | None:
        """The columnwise copy's spec; None: it stays in high precision."""
        return None if self.columnwise == KEEP else self if self.columnwise is None else self.columnwise  # type: ignore[return-value]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a recipe file spells it; keys at their defaults are left out."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        data = {name: value for name, value in self if value != defaults[name] and name != "columnwise"}
        if self.columnwise is not None:
            data["columnwise"] = KEEP if self.columnwise == KEEP else self.columnwise.to_dict()  # type: ignore[union-attr]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}

    @pydantic.field_validator("columnwise", mode="before")
    @classmethod
    def _copy(cls, value: object) -> object:
        if value is None or value == KEEP or isinstance(value, TrainOperand):
            return value
        if isinstance(value, str):
            value = {"format": _format(value)}
        return cls.model_validate(_operand_input(value))

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> TrainOperand:
        fault = next((text for wrong, text in _faults(self) if wrong), None)
        if fault is not None:
            raise ValueError(fault)
        return self


def _faults(o: TrainOperand) -> list[tuple[bool, str]]:
    """(is it so, what to say) of each way in which an operand can contradict itself."""
    f = o.element_format()
    blocks, two_level = f.block is not None, f.global_scale
    block = f.block if isinstance(f.block, int) else 1
    fixed = f"{o.format!r} has blocks of {f.block}: write tile: [1, {f.block}] or [{f.block}, {f.block}]"
    only = "is for formats with a scale in e4m3, nvfp4; leave it out"
    delayed = {"history", "amax", "margin"} & o.model_fields_set
    return [
        (blocks and o.tile not in (None, (1, block), (block, block)), fixed),
        (blocks and o.way != "block", f"{o.format!r} finds a scale for each block of the live tensor: leave it out"),
        (not blocks and o.way == "block" and o.tile is None, "scaling: block needs a tile, such as tile: [1, 128]"),
        (not blocks and o.way != "block" and o.tile is not None, f"scaling: {o.way} has one scale a tensor, no tile"),
        (o.way != "delayed" and bool(delayed), f"{', '.join(sorted(delayed))}: only with scaling: delayed"),
        (o.way == "delayed" and o.columnwise not in (None, KEEP), "scaling: delayed has one scale for both copies"),
        (not two_level and (o.row_scaled or bool(o.four_over_six)), f"row_scaled, four_over_six {only}"),
        (not two_level and "scale_max" in o.model_fields_set, f"scale_max {only}"),
        (o.scale_max not in (448, 256), f"scale_max: found {o.scale_max}, expected 448 or 256"),
        (o.scale_rounding == "up" and not two_level, f"scale_rounding: up {only}"),
        (
            o.scale_rounding == "power_of_two" and (blocks or o.way == "delayed"),
            "scale_rounding: power_of_two is for current and block scales in float32, of fp8; leave it out",
        ),
        (
            bool(o.four_over_six) and (o.rounding == "stochastic" or o.scale_rounding == "up"),
            "four_over_six picks the scale with the smaller error of rounding to nearest; "
            "it goes with rounding: nearest, scale_rounding: nearest",
        ),
        (o.row_scaled and o.tiles != (1, block), f"row_scaled goes with tile: [1, {block}]"),
        (
            isinstance(o.columnwise, TrainOperand) and o.columnwise.columnwise is not None,
            "columnwise inside columnwise",
        ),
    ]


_Operand = Annotated[TrainOperand, BeforeValidator(_operand_input, json_schema_input_type=_Format | TrainOperand)]


class TrainSpec(Model):
    """How the weights that the recipe's rules quantize are trained: an operand that isn't given stays as it is."""

    input: _Operand | None = key("x of y = x w^T: rowwise in fprop, columnwise in wgrad")
    weight: _Operand | None = key("w: rowwise in fprop, columnwise in dgrad")
    grad: _Operand | None = key("the gradient of y: rowwise in dgrad, columnwise in wgrad")
    backward: _Backward = Field(default="quantized", description="what dgrad and wgrad read: see docs/training.md")
    amax_scope: _Scope = Field(
        default="global", description="largest values of the whole tensor, or of a device's part"
    )
    keep_first_blocks: _Number = Field(default=0, description="layers at the start that stay in high precision")
    keep_last_blocks: _Number = Field(default=0, description="layers at the end that stay in high precision")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a recipe file spells it; keys at their defaults are left out."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        given = {name: value for name, value in self if value != defaults[name]}
        return {name: value.to_dict() if isinstance(value, Model) else value for name, value in given.items()}

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> TrainSpec:
        if not (self.input or self.weight or self.grad):
            raise ValueError("found nothing, expected formats of input, weight or grad, such as {input: fp8, ...}")
        turned = [bool(o and o.columns and o.columns.hadamard) for o in (self.input, self.grad)]
        if turned[0] != turned[1]:
            raise ValueError(
                "hadamard: wgrad multiplies the columnwise copies of input and grad, and its product is right only "
                "if both are transformed; write 'hadamard: true' in both, or in neither"
            )
        if self.weight is not None and (self.weight.hadamard or self.weight.rounding == "stochastic"):
            raise ValueError("weight: hadamard and stochastic rounding are for input and grad; leave them out")
        if self.input is not None and self.input.rounding == "stochastic":
            raise ValueError("input: stochastic rounding is for grad (evaluation has no random numbers); leave it out")
        if self.backward != "quantized" and self.grad is not None:
            raise ValueError(f"backward: {self.backward} leaves the gradient in high precision; leave 'grad' out")
        return self
