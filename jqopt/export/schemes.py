"""What a serving format can hold, as data: a row for each scheme, and which row a packed weight and its input take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jqopt._ops import InputFormat
from jqopt._recipe import TensorSpec
from jqopt.errors import UnsupportedError
from jqopt.export.layouts import Size, Stored
from jqopt.formats import Format

Json = dict[str, Any]
ENGINES = ("vllm", "sglang", "tensorrt-llm", "transformers", "tpu-inference")
"""The engines whose loaders are in the tables; DEFAULT_ENGINE must load what is exported without an engine's name."""
DEFAULT_ENGINE = "vllm"
OTHER = "other"
"""In place of an engine: a reader that the tables don't know."""


class Row(NamedTuple):
    """One scheme of one target.

    Attributes:
        name: what it is called there.
        weight, input: quantizers as a recipe spells them; input None: activations are left alone.
        tensors: what stands in the file for one matrix.
        facts: what the target's configuration says of it.
        engines: who loads it (as of the versions in docs/export.md).
        experts: who of them loads it in the layers of experts too.
        any_block: may the weight's block have another length?
    """

    name: str
    weight: TensorSpec
    input: TensorSpec | None
    tensors: tuple[Stored, ...]
    facts: Mapping[str, Any]
    engines: frozenset[str]
    experts: frozenset[str]
    any_block: bool = False

    @property
    def holds_pre_scale(self) -> bool:
        return any(s.leaf == "pre_scale" for s in self.tensors)


def row(
    name: str, weight: Any, input: Any, tensors: Sequence[Stored], facts: Mapping[str, Any], engines: str = "",
    any_block: bool = False, dense: str = "",
) -> Row:  # fmt: skip
    """A row from quantizers as a recipe writes them; `engines`: names between blanks; `dense`: not in experts."""
    read = TensorSpec.from_dict(weight).resolve("weight")
    given = None if input is None else TensorSpec.from_dict(input).resolve("input")
    known, without = frozenset(engines.split()), frozenset(dense.split())
    assert known <= set(ENGINES) and without <= known, (engines, dense)
    return Row(name, read, given, tuple(tensors), facts, known, known - without, any_block)


class Asked(NamedTuple):
    """What a packed parameter asks of a target."""

    format: Format
    granularity: str
    input: InputFormat | None
    pre_scale: bool = False
    low_rank: bool = False
    rotation: bool = False
    experts: bool = False

    def __str__(self) -> str:
        block = self.format.block
        size = "x".join(map(str, block)) if isinstance(block, tuple) else block
        text = f"{self.format.name}/{size if self.granularity == 'block' else self.granularity}"
        if self.input is None:
            return f"{text} weights"
        scaling = "static" if self.input.static else "dynamic"
        part = self.input.format.block if self.input.granularity == "block" else self.input.granularity
        return f"{text} weights, {self.input.format.name}/{part} {scaling} inputs"


class KV(NamedTuple):
    """How keys and values of a cache are quantized: the format's name in the configuration; scales stand by layer."""

    algo: str


class Module(NamedTuple):
    """One linear layer of the model as a target's configuration sees it; row None: it is left in floats."""

    name: str
    row: Row | None
    block: int | tuple[int, int] | None = None


class Found(NamedTuple):
    """What a configuration says of one linear layer."""

    row: Row
    block: int | tuple[int, int] | None


class Config(NamedTuple):
    """A configuration that was read: the scheme of a linear layer by name (None: floats), and of the cache."""

    of: Callable[[str], Found | None]
    kv: str | None


class Target(NamedTuple):
    """One serving format.

    Attributes:
        rows: the schemes it holds.
        describe: (modules, names of embeddings, cache) -> (config.json's quantization_config, other files as JSON).
        parse: (folder's config.json, its other files) -> Config.
        kv_name: attention module and "k" or "v" -> name of the tensor that holds the cache's scale.
        kv: the tensor's form.
        kv_factors: {cache format's name there: what a scale of ours is multiplied with}.
    """

    name: str
    rows: tuple[Row, ...]
    describe: Callable[[Sequence[Module], Sequence[str], KV | None], tuple[Json, dict[str, Json]]]
    parse: Callable[[Json, Mapping[str, Json]], Config]
    kv_name: Callable[[str, str], str]
    kv: Stored
    kv_factors: Mapping[str, float]


def same_number(a: Format, b: Format) -> bool:
    """Do codes and scales of both mean the same, whatever the block, and however the scale was chosen?"""
    facts = ("element", "scale", "global_scale", "zero_point", "then")
    return all(getattr(a, f) == getattr(b, f) for f in facts)


def fits(row: Row, asked: Asked) -> bool:
    """Does a row hold this weight with this input (apart from what stands beside the codes)?"""
    return _fits_weight(row, asked.format, asked.granularity) and _fits_input(row.input, asked.input)


def _fits_weight(row: Row, format: Format, granularity: str) -> bool:
    mine = row.weight.element_format()
    if not same_number(mine, format) or row.weight.granularity != granularity:
        return False
    if granularity != "block" or mine.tile == format.tile:
        return True
    return row.any_block and format.tile is not None and format.tile[0] == 1


def _fits_input(mine: TensorSpec | None, asked: InputFormat | None) -> bool:
    if mine is None or asked is None:
        return mine is None and asked is None
    own = mine.element_format()
    if not same_number(own, asked.format) or mine.granularity != asked.granularity:
        return False
    blocks = own.tile == asked.format.tile if mine.granularity == "block" else True
    return blocks and (mine.scaling == "static") == asked.static


def choose(target: Target, path: str, asked: Asked, engine: str | None, smoothed: bool) -> Row:
    """The row that holds a parameter.

    Args:
        engine: who must load it; None: `DEFAULT_ENGINE`.
        smoothed: has some weight of this scheme a pre_scale, so that all go to the row that can hold one?

    Raises:
        UnsupportedError: nothing in the target holds it, or the engine doesn't load what does.
    """
    if asked.rotation or asked.low_rank:
        part = "an online rotation of its input" if asked.rotation else "a low-rank part in bfloat16"
        raise UnsupportedError(
            f"{path}: {target.name} can't hold {part} beside the codes, and without it the model computes something "
            "else. Quantize with a recipe without it"
            + ("; transforms.rotate_residual folds a rotation into the weights" if asked.rotation else "")
            + "."
        )
    fitting = [r for r in target.rows if fits(r, asked)]
    if not fitting:
        raise UnsupportedError(f"{path}: {target.name} has no scheme for {asked}. It holds: {_listed(target.rows)}.")
    able = [r for r in fitting if r.holds_pre_scale == smoothed] or ([] if smoothed else fitting)
    if not able:
        raise UnsupportedError(
            f"{path}: its input is multiplied by a pre_scale (AWQ, SmoothQuant) that {target.name} can't hold beside "
            f"{asked}. Quantize such that the scale folds into the parameters before it (jqopt.plan prints where, and "
            "why not), keep this parameter, leave the algorithm out, or export to modelopt with engine='tensorrt-llm'."
        )
    return _loaded(target, path, asked, able, engine)


def _loaded(target: Target, path: str, asked: Asked, able: Sequence[Row], engine: str | None) -> Row:
    who = engine or DEFAULT_ENGINE
    found = next((r for r in able if who == OTHER or who in (r.experts if asked.experts else r.engines)), None)
    if found is not None:
        return found
    if asked.experts and any(who in r.engines for r in able):
        held = [r.name for r in target.rows if who in r.experts]
        raise UnsupportedError(
            f"{path}: {who} loads {able[0].name} of {target.name} in dense layers, but not in experts; there it loads "
            f"{', '.join(held) or 'nothing'}"
        )
    loads = sorted({e for r in able for e in r.engines})
    here = [r.name for r in target.rows if who in r.engines]
    hint = (
        f"write engine={loads[0]!r}" if loads else f"no engine we know does; for a reader of your own, engine={OTHER!r}"
    )
    raise UnsupportedError(
        f"{path}: {who} doesn't load {able[0].name} ({asked}) of {target.name}. If it is meant for another engine, "
        f"{hint}. Of {target.name} {who} loads: {', '.join(here) or 'nothing'}"
        + (f"; loaded by {', '.join(loads)}" if loads else "")
        + "."
    )


def check_engine(engine: str | None) -> None:
    """Raises UnsupportedError for an engine that isn't in the tables."""
    if engine not in (None, OTHER, *ENGINES):
        raise UnsupportedError(f"unknown engine {engine!r}; known are {', '.join((*ENGINES, OTHER))}")


def _listed(rows: Sequence[Row]) -> str:
    return "; ".join(
        f"{r.name} ({Asked(r.weight.element_format(), r.weight.granularity or '', _input(r))})" for r in rows
    )


def _input(row: Row) -> InputFormat | None:
    if row.input is None:
        return None
    return InputFormat(row.input.element_format(), row.input.granularity or "tensor", row.input.scaling == "static")


def size_of(path: str, row: Row, format: Format, granularity: str, n: int, k: int) -> Size:
    """The sizes of a matrix under a row.

    Raises:
        UnsupportedError: the matrix doesn't divide as the target needs it.
    """
    tile = format.tile_for(n, k, granularity)
    if tile[0] == 1 and k % tile[1]:
        raise UnsupportedError(
            f"{path}: {row.name} needs rows that are whole blocks of {tile[1]}; these have {k} values. "
            "Keep this parameter, or choose another block."
        )
    if n % 2 and any(s.form == "row pairs" for s in row.tensors):
        raise UnsupportedError(f"{path}: {row.name} packs rows in pairs; the weight has {n} rows. Keep this parameter.")
    rows, cols = format.scale_shape(n, k, granularity)
    return Size(n, k, rows, cols, format.element.bits, format.element.min < 0)


def blocked(row: Row, block: int | tuple[int, int] | None) -> TensorSpec:
    """The weight's quantizer with the block of a configuration."""
    return row.weight.model_copy(update={"block": block}) if row.any_block and block is not None else row.weight


FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Last parts of the names of linear layers that engines run as one matrix product."""


def fused(names: Sequence[str]) -> list[list[str]]:
    """The linear layers among these that engines run as one, each set with more than one member."""
    there, out = set(names), []
    for name in names:
        head, _, last = name.rpartition(".")
        for parts in FUSED:
            mates = [f"{head}.{p}" for p in parts if f"{head}.{p}" in there]
            if last == parts[0] and len(mates) > 1:
                out.append(mates)
    return out
