"""The report: what quantization did to each weight, in bytes and in error, and what was left alone and why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqopt._apply import Quantized, check_paths
from jqopt._plan import FOLDED, Plan, describe
from jqopt._qtensor import QTensor
from jqopt._stage import Function, parameter_path
from jqopt._table import table

UNREAD = "no dot, convolution or lookup reads it"


@dataclasses.dataclass(frozen=True)
class Row:
    """One site with a packed weight.

    `float_bytes`, `packed_bytes` and `bits` (8 * packed bytes / values) are of its parameter. `sqnr_db` is
    10 log10(sum w^2 / sum (w - packed w)^2), infinite for a weight that is packed exactly; `largest_error` is the
    largest |w - packed w|; both None where the float weight wasn't given. `shares`: the key of an earlier row of the
    same parameter.
    """

    site: str
    op: str
    path: str
    weight: str
    """In a word: the format, and its block or what shares a scale. `format` and `granularity` say the same apart."""
    format: str
    granularity: str
    input: str
    float_bytes: int
    packed_bytes: int
    bits: float
    sqnr_db: float | None = None
    largest_error: float | None = None
    shares: str = ""


@dataclasses.dataclass(frozen=True)
class Left:
    """A site that isn't quantized, or (`op` "") a parameter that no site reads. `bytes` are of the parameter."""

    name: str
    op: str
    path: str | None
    bytes: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What quantization did to a model: `print` it. Bytes count all parameters, quantized or not."""

    recipe: str
    rows: tuple[Row, ...]
    left: tuple[Left, ...]
    parameters: int
    values: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    """8 * bytes / values over the quantized parameters: codes, scales and everything else that is stored."""

    def to_dict(self) -> dict[str, Any]:
        """JSON data. An infinite SQNR (a weight packed exactly) is None, with a `largest_error` of 0."""
        data = dataclasses.asdict(self)
        for row in data["rows"]:
            if row["sqnr_db"] == math.inf:
                row["sqnr_db"] = None
        return data

    def __str__(self) -> str:
        measured = any(row.sqnr_db is not None for row in self.rows)
        head = ["site", "op", "weight", "input", "float", "packed", "bits", *(["SQNR dB", "max error"] * measured)]
        return "\n".join([table(head, [_cells(row, measured) for row in self.rows]), self.summary])

    @property
    def summary(self) -> str:
        """The totals, and what was left alone and why."""
        done = len({row.path for row in self.rows})
        total = (
            f"{done} of {self.parameters} parameters quantized, {self.bits_per_weight:.2f} bits per weight; all "
            f"parameters: {size(self.bytes_before)} before, {size(self.bytes_after)} after "
            f"({self.bytes_before / max(self.bytes_after, 1):.2f}x smaller); recipe {self.recipe!r}"
        )
        return "\n".join([total, *(f"left alone: {text}" for text in self._reasons())])

    def _reasons(self) -> list[str]:
        """One line for each reason: how many, how large, which."""
        by_reason: dict[str, list[Left]] = {}
        for left in self.left:
            by_reason.setdefault(left.reason, []).append(left)
        counted: set[str | None] = {None}
        return [f"{_some(found, counted)}: {reason}" for reason, found in by_reason.items()]


def _cells(row: Row, measured: bool) -> list[str]:
    cells = [row.site, row.op, row.weight, row.input]
    if row.shares:
        return [*cells, f"as {row.shares}", "", "", *([""] * (2 * measured))]
    cells += [size(row.float_bytes), size(row.packed_bytes), f"{row.bits:.2f}"]
    if not measured:
        return cells
    if row.sqnr_db is None or row.largest_error is None:
        return [*cells, "", ""]
    return [*cells, "exact" if row.sqnr_db == math.inf else f"{row.sqnr_db:.1f}", f"{row.largest_error:.2g}"]


def _some(found: list[Left], counted: set[str | None], most: int = 3) -> str:
    """The first few names, and the bytes of those parameters that weren't counted before."""
    fresh = {left.path: left.bytes for left in found if left.path not in counted}
    counted |= set(fresh)
    names = [left.name for left in found]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}" + (f" ({size(sum(fresh.values()))})" if fresh else "")


def size(count: int) -> str:
    """Bytes in decimal units: `8.4 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"


def report(plan: Plan, quant: Quantized, params: Any = None) -> Report:
    """What quantization did to each weight of a model.

    Args:
        plan: the plan it was quantized with.
        quant: what `quantize` returned.
        params: the float tree, for the errors of the weights. Beside it one decoded parameter is held at a time.

    Raises:
        PlanError: params aren't those of the plan.
    """
    function = plan.function
    leaves, floats = named(function, quant.params), {} if params is None else named(function, params)
    for found in (leaves, floats) if floats else (leaves,):
        check_paths(plan, found)
    return report_leaves(plan, leaves, floats)


def named(function: Function, tree: Any) -> dict[str, Any]:
    """The parameters of a model's tree by their paths; a QTensor is a leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, QTensor))
    return {path: leaf for key, leaf in flat if (path := parameter_path(function, key, leaf)) is not None}


def report_leaves(plan: Plan, leaves: Mapping[str, Any], floats: Mapping[str, Any]) -> Report:
    """`report` for parameters by path. `leaves` may hold shapes; `floats` (read one at a time) may be empty."""
    rows: list[Row] = []
    first: dict[str, Row] = {}
    for d in plan.decisions:
        if d.path is None or d.weight is None:
            continue
        spec = {"site": d.key, "op": d.op, "input": describe(d.input)}
        if d.path in first:
            rows.append(dataclasses.replace(first[d.path], **spec, shares=first[d.path].site))
            continue
        q = leaves[d.path]
        same = d.scaled != FOLDED and not d.takes  # else a scale has gone into the weight before it was packed
        errors = error_of(floats[d.path], q) if d.path in floats and same else (None, None)
        row = Row(
            **spec, path=d.path, weight=describe(d.weight), format=d.format.name, granularity=d.granularity,
            float_bytes=_float_bytes(q), packed_bytes=q.nbytes, bits=q.bits_per_value,
            sqnr_db=errors[0], largest_error=errors[1],
        )  # fmt: skip
        rows.append(row)
        first[d.path] = row
    plain = {p: _bytes(leaf) for p, leaf in leaves.items() if p not in first}
    weights = sum(math.prod(leaves[p].shape) for p in first)
    packed = sum(row.packed_bytes for row in first.values())
    return Report(
        recipe=plan.recipe.name, rows=tuple(rows), left=tuple(_left(plan, plain)), parameters=len(leaves),
        values=sum(math.prod(leaf.shape) for leaf in leaves.values()),
        bytes_before=sum(row.float_bytes for row in first.values()) + sum(plain.values()),
        bytes_after=packed + sum(plain.values()), bits_per_weight=8 * packed / max(weights, 1),
    )  # fmt: skip


def _left(plan: Plan, plain: Mapping[str, int]) -> Iterable[Left]:
    """Sites without a packed weight, then parameters that no site reads."""
    for d in plan.decisions:
        if d.weight is None:
            yield Left(d.key, d.op, d.path, plain.get(d.path or "", 0), d.reason)
    read = {d.path for d in plan.decisions}
    for path, count in plain.items():
        if path not in read:
            yield Left(path, "", path, count, UNREAD)


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _float_bytes(q: QTensor) -> int:
    return math.prod(q.shape) * jnp.dtype(q.dtype).itemsize


def error_of(w: jax.Array, q: QTensor) -> tuple[float, float]:
    """(SQNR in dB, largest absolute error) of a packed weight; what it decodes to isn't rounded to its dtype."""
    signal, noise, largest = _errors(w, q.replace(dtype="float32"))
    power, error = (float(np.sum(np.asarray(x, np.float64))) for x in (signal, noise))
    if error == 0:
        return math.inf, float(largest)
    return (10 * math.log10(power / error) if power else -math.inf), float(largest)


@jax.jit
def _errors(w: jax.Array, q: QTensor) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums of squares along the last axis only: float32 holds those exactly enough, the rest is added in float64."""
    wide = w.astype(jnp.float32)
    error = wide - q.dequantize()
    return jnp.sum(wide * wide, axis=-1), jnp.sum(error * error, axis=-1), jnp.max(jnp.abs(error))
