"""Calibration algorithms, by the names recipes use. Adding one = one file and one line in the table."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jqopt.algorithms._base import (
    Algorithm,
    InputQuantizer,
    Problem,
    Statistic,
    Task,
    chain,
    rank_at,
    rounded,
    scaled,
    task,
)
from jqopt.algorithms._statistics import AMAX, CHANNELS, MOMENTS, ROWS
from jqopt.algorithms.awq import awq, awq_full
from jqopt.algorithms.distill import Training, distill
from jqopt.algorithms.gptq import gptq
from jqopt.algorithms.hadamard import hadamard
from jqopt.algorithms.hqq import hqq
from jqopt.algorithms.lsq import lsq
from jqopt.algorithms.max import max
from jqopt.algorithms.qep import CROSS, qep
from jqopt.algorithms.smoothquant import smoothquant
from jqopt.algorithms.svdquant import svdquant
from jqopt.algorithms.weight_ranges import awq_clip, four_over_six, local_hessian, mse
from jqopt.errors import PlanError

Table = Mapping[str, Callable[..., Algorithm]]
TABLE: dict[str, Callable[..., Algorithm]] = {
    "awq": awq,
    "awq_clip": awq_clip,
    "awq_full": awq_full,
    "distill": distill,
    "four_over_six": four_over_six,
    "gptq": gptq,
    "hadamard": hadamard,
    "hqq": hqq,
    "local_hessian": local_hessian,
    "lsq": lsq,
    "max": max,
    "mse": mse,
    "qep": qep,
    "smoothquant": smoothquant,
    "svdquant": svdquant,
}


def names() -> list[str]:
    """The names `algorithm:` takes in a recipe."""
    return sorted(TABLE)


def get(name: str, more: Table | None = None, /, **options: Any) -> Algorithm:
    """The algorithm with these options.

    Args:
        more: a user's own algorithms by name: functions that take the options and give an Algorithm.

    Raises:
        PlanError: no algorithm of this name, or no such option.
    """
    table = {**TABLE, **(more or {})}
    if name not in table:
        near = difflib.get_close_matches(name, table, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PlanError(f"no algorithm {name!r}{hint} Known: {', '.join(sorted(table))}")
    known = inspect.signature(table[name]).parameters
    wrong = sorted(set(options) - set(known))
    if wrong:
        allowed = ", ".join(known) or "none"
        raise PlanError(f"algorithm {name!r} has no option {wrong[0]!r}; its options: {allowed}")
    return table[name](**options)


__all__ = [
    "AMAX", "CHANNELS", "CROSS", "MOMENTS", "ROWS", "Algorithm", "InputQuantizer", "Problem", "Statistic", "Task",
    "Training", "awq", "awq_clip", "awq_full", "chain", "distill", "four_over_six", "get", "gptq", "hadamard", "hqq",
    "local_hessian", "lsq", "max", "mse", "names", "qep", "rank_at", "rounded", "scaled", "smoothquant",
    "svdquant", "task",
]  # fmt: skip
