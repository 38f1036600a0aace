"""Calibration algorithms, by the names recipes use. Adding one = one file and one line in the table."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable

from jqopt.algorithms._base import Algorithm, Problem
from jqopt.algorithms.gptq import gptq
from jqopt.algorithms.max import max
from jqopt.algorithms.mse import mse
from jqopt.errors import PlanError

TABLE: dict[str, Callable[..., Algorithm]] = {"gptq": gptq, "max": max, "mse": mse}


def names() -> list[str]:
    """The names `algorithm:` takes in a recipe."""
    return sorted(TABLE)


def get(name: str, **options: object) -> Algorithm:
    """The algorithm with these options.

    Raises:
        PlanError: no algorithm of this name, or no such option.
    """
    if name not in TABLE:
        near = difflib.get_close_matches(name, TABLE, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PlanError(f"no algorithm {name!r}{hint} Known: {', '.join(names())}")
    known = inspect.signature(TABLE[name]).parameters
    wrong = sorted(set(options) - set(known))
    if wrong:
        allowed = ", ".join(known) or "none"
        raise PlanError(f"algorithm {name!r} has no option {wrong[0]!r}; its options: {allowed}")
    return TABLE[name](**options)


__all__ = ["Algorithm", "Problem", "get", "gptq", "max", "mse", "names"]
