"""Calibrators of static activation scales, by the names recipes use: what is gathered, and the amax made of it."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jqopt._numerics import amax_of
from jqopt.algorithms import headroom as _headroom
from jqopt.algorithms import histogram, ranges
from jqopt.algorithms._statistics import AMAX
from jqopt.errors import PlanError
from jqopt.formats import Format


class Calibrator(NamedTuple):
    """A calibrator of one activation's amax, for one format and with its options bound.

    init(k) -> state: a NamedTuple of arrays, with `amax` (the largest |x|, NaN and inf included) and `seen` among them.
    update(state, x [tokens, k]) -> state.
    amax(state) -> [] float32: what the static scale is made from; `amax` of the state where that is not finite.
    allreduce(before, after, axes) -> state: one state from those of the devices along mesh axes, inside a shard_map.
    options: the values it was made with, for manifests and messages.

    Every function is pure and runs under jit, vmap and scan.
    """

    name: str
    init: Callable[[int], Any]
    update: Callable[[Any, jax.Array], Any]
    amax: Callable[[Any], jax.Array]
    allreduce: Callable[[Any, Any, tuple[str, ...]], Any]
    options: Mapping[str, Any]


class MeanMax(NamedTuple):
    """The mean of the batches' largest |x| (`mean`), how many batches, the largest of all, and 1 once any was seen."""

    mean: jax.Array
    batches: jax.Array
    amax: jax.Array
    seen: jax.Array


def max(format: Format) -> Calibrator:
    """The largest value: nothing that was seen saturates."""
    return Calibrator("max", AMAX.init, AMAX.update, lambda state: state.amax, AMAX.allreduce, {})


def percentile(format: Format, percentile: float = 99.99) -> Calibrator:
    """What this many per cent of the values, zeros included, do not exceed (see `ranges.percentile`)."""
    _number("percentile", "percentile", percentile, "a number of per cent above 0 and up to 100, such as 99.99")
    if not 0 < percentile <= 100:
        raise PlanError(f"calibrator percentile: percentile is {percentile!r}; write a number above 0 and up to 100")
    if percentile <= 1:
        raise PlanError(
            f"calibrator percentile: percentile is {percentile!r}, which would saturate almost everything; it is in "
            f"per cent: write {100 * percentile:g} for that part of the values"
        )
    amax = functools.partial(ranges.percentile, p=float(percentile))
    return _of_histogram("percentile", amax, {"percentile": float(percentile)})


def entropy(format: Format) -> Calibrator:
    """The clip that loses least information (see `ranges.entropy`); for integers, whose levels are evenly spaced."""
    if format.element.kind != "int":
        raise PlanError(
            f"calibrator entropy: the levels of {format.name!r} are not evenly spaced, as the method supposes; write "
            "mse, percentile or max, or a format of integers"
        )
    return _of_histogram("entropy", functools.partial(ranges.entropy, bits=format.element.bits), {})


def mse(format: Format) -> Calibrator:
    """The clip with the smallest squared error of this format (see `ranges.mse`)."""
    if format.block is not None or format.scale.name != "float32":
        raise PlanError(
            f"calibrator mse: {format.name!r} has scales of blocks, and the error of a value depends on its "
            f"neighbours, which a histogram doesn't know; write {'headroom or max' if format.global_scale else 'max'}"
        )
    return _of_histogram("mse", functools.partial(ranges.mse, round=ranges.rounder(format)), {})


def mean(format: Format, momentum: float | None = None) -> Calibrator:
    """The mean over the batches of each one's largest value; with `momentum` m in [0, 1) the running one.

    The running mean becomes m * mean + (1 - m) * amax with each batch and starts with the first one's amax. Unlike the
    other calibrators this one depends on how the data is split into batches, by definition.
    """
    if momentum is not None:
        _number("mean", "momentum", momentum, "a number of 0 up to below 1, such as 0.9, or leave it out")
        if not 0 <= momentum < 1:
            raise PlanError(
                f"calibrator mean: momentum is {momentum!r}; write a number of 0 up to below 1, such as 0.9, or leave "
                "it out for the plain mean"
            )
    return Calibrator(
        "mean", _mean_init, functools.partial(_mean_update, momentum=momentum), _mean_amax, _mean_allreduce,
        {"momentum": momentum},
    )  # fmt: skip


def headroom(format: Format, rho: float = _headroom.RHO, anchor: float = 1.0) -> Calibrator:
    """max(rho * P_anchor, P_99.99) of the largest values of blocks of 16, for nvfp4 (see `headroom.amax`)."""
    if not format.global_scale:
        raise PlanError(
            f"calibrator headroom: it places the e4m3 scales of blocks under a tensor's scale, and {format.name!r} has "
            "none; write it for nvfp4, or take percentile or max"
        )
    _number("headroom", "rho", rho, "a number such as 16384")
    _number("headroom", "anchor", anchor, "a number of per cent such as 1")
    if not 0 < rho < _headroom.RHO_MAX:
        raise PlanError(
            f"calibrator headroom: rho is {rho!r}; write a number between 0 and {_headroom.RHO_MAX:g}, the range of "
            "normal e4m3 scales: more of it is more room above the data and less below"
        )
    if not 0 < anchor <= 100:
        raise PlanError(f"calibrator headroom: anchor is {anchor!r}; write a number of per cent above 0, such as 1")
    amax = functools.partial(_headroom.amax, rho=float(rho), anchor=float(anchor))
    options = {"rho": float(rho), "anchor": float(anchor)}
    return Calibrator("headroom", _headroom.init, _headroom.update, amax, _headroom.allreduce, options)


CALIBRATORS: dict[str, Callable[..., Calibrator]] = {
    "entropy": entropy,
    "headroom": headroom,
    "max": max,
    "mean": mean,
    "mse": mse,
    "percentile": percentile,
}


def names() -> list[str]:
    """The names `calibrator:` takes in a recipe."""
    return sorted(CALIBRATORS)


def options(name: str) -> dict[str, Any]:
    """The options of a calibrator and their defaults."""
    known = list(inspect.signature(_builder(name)).parameters.values())[1:]
    return {p.name: p.default for p in known}


def get(name: str, format: Format, **given: object) -> Calibrator:
    """The calibrator with these options, for an activation in this format.

    Raises:
        PlanError: no calibrator of this name, no such option, a value out of its range, or a format it cannot serve.
    """
    build = _builder(name)
    known = options(name)
    wrong = sorted(set(given) - set(known))
    if wrong:
        near = difflib.get_close_matches(wrong[0], known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PlanError(
            f"calibrator {name!r} has no option {wrong[0]!r}{hint} Its options: {', '.join(known) or 'none'}"
        )
    return build(format, **given)


def _builder(name: str) -> Callable[..., Calibrator]:
    if name not in CALIBRATORS:
        near = difflib.get_close_matches(name, CALIBRATORS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PlanError(f"no calibrator {name!r}{hint} Known: {', '.join(names())}")
    return CALIBRATORS[name]


def _number(name: str, option: str, value: object, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PlanError(f"calibrator {name}: {option} is {value!r}; write {expected}")


def _of_histogram(name: str, amax: Callable[[Any], jax.Array], options: dict[str, Any]) -> Calibrator:
    return Calibrator(name, histogram.init, histogram.update, amax, histogram.allreduce, options)


def _mean_init(k: int) -> MeanMax:
    zero = jnp.float32(0)
    return MeanMax(zero, zero, zero, zero)


def _mean_update(state: MeanMax, x: jax.Array, *, momentum: float | None) -> MeanMax:
    if x.size == 0:
        return state
    amax = amax_of(x)
    batches = state.batches + 1
    share = 1 / batches if momentum is None else jnp.where(state.batches == 0, 1.0, 1 - momentum).astype(jnp.float32)
    mean = state.mean + (amax - state.mean) * share
    return MeanMax(mean, batches, jnp.maximum(state.amax, amax), jnp.float32(1))


def _mean_amax(state: MeanMax) -> jax.Array:
    return jnp.where(jnp.isfinite(state.amax), state.mean, state.amax)


def _mean_allreduce(before: MeanMax, after: MeanMax, axes: tuple[str, ...]) -> MeanMax:
    """The devices hold parts of one batch, whose largest value is the largest of theirs; the mean grows with it.

    So the largest mean is that of the whole batch, exactly, if each device has updated once.
    """
    return jax.tree.map(lambda x: lax.pmax(x, axes), after)
