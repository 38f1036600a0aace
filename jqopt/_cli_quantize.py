"""Quantization as the command line offers it: planned on shapes, then weights, calibration and packing with bars."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jqopt
from jqopt import _calibrate, _distill
from jqopt._calibrate import as_call
from jqopt._cli_data import Data, random_batches
from jqopt._cli_models import RANDOM, Loaded
from jqopt._cli_print import bar, note
from jqopt._model import QuantizedModel
from jqopt._plan import Plan
from jqopt._report import Report
from jqopt.errors import CalibrationError


class Feed(NamedTuple):
    """Batches to calibrate with, how many, and what the checkpoint says of them."""

    batches: Iterable[Any]
    count: int
    origin: str


def feed_of(data: Data, name: str) -> Feed:
    """A file's examples."""
    return Feed(data, len(data), f"{name}, {len(data)} batches of {data.batch}")


def random_feed(loaded: Loaded, example: Any, vocabulary: int | None, shape: tuple[int, int], count: int) -> Feed:
    """Random stand-ins: ids [batch, length] for language models, numbers like the example's for others."""
    like = jax.ShapeDtypeStruct(shape, jnp.int32) if loaded.vocabulary is not None else example
    return Feed(random_batches(like, vocabulary or loaded.vocabulary, count), count, RANDOM)


class Done(NamedTuple):
    """A quantized model, its report, and what it was calibrated with."""

    model: QuantizedModel
    report: Report
    calibration: str


def quantize(loaded: Loaded, recipe: Any, example: Any, feed: Feed | None, memory: int | None = None) -> Done:
    """Plans on shapes; only then the weights of a Hugging Face folder are read, and freed as they are packed.

    The report has the errors of weights for other models only: `jqopt report` gives them.

    Raises:
        CalibrationError: the recipe needs data and there are none.
        JqoptError: as `jqopt.plan`, `jqopt.calibrate` and `jqopt.quantize` do.
    """
    plan = jqopt.plan(recipe, loaded.trace(example))
    feed = _needed(plan, feed)
    loaded = loaded.with_weights()
    tree, stats, done = loaded.tree, None, list[str]()
    whole = bool(plan.recipe.layerwise) or _distill.training_of(plan) is not None
    several = feed is not None and (whole or len(_calibrate.passes(plan, memory)) > 1)
    if several:
        note(f"calibration: {_calibrate.described(plan, memory)}")
    if feed is not None and not several:
        with bar("calibrate", feed.count) as step:
            stats = jqopt.calibrate(plan, tree, feed.batches, progress=step, **loaded.options)
    with bar("quantize", len(plan.quantized)) as step:
        donate = loaded.folder is not None  # what was read from a folder belongs to nobody else
        quant = jqopt.quantize(
            plan, tree, stats, batches=feed.batches if several and feed is not None else None, memory=memory,
            donate=donate, progress=lambda p: step(done.append(p) or len(done)), **(loaded.options if several else {}),
        )  # fmt: skip
    inputs = jax.tree.map(_shape, as_call(example, loaded.options))
    qm = QuantizedModel(loaded.model, plan, quant, inputs)
    return Done(qm, qm.report(None if donate else tree), "" if feed is None else feed.origin)


def _shape(x: Any) -> Any:
    return jax.ShapeDtypeStruct(tuple(x.shape), x.dtype) if hasattr(x, "shape") and hasattr(x, "dtype") else x


def _needed(plan: Plan, feed: Feed | None) -> Feed | None:
    """The batches if the plan needs any."""
    if not plan.needs_batches:
        if feed is not None:
            note(f"recipe {plan.recipe.name!r} needs no calibration: the data aren't used")
        return None
    waiting = [*plan.needs_data, *dict.fromkeys(d.key for d in plan.attention if d.needs_data)]
    if feed is None:
        raise CalibrationError(
            f"recipe {plan.recipe.name!r} needs calibration: {len(waiting)} sites have static input scales "
            f"(first: {waiting[0]}). Write --data FILE, or --random-calibration to try it without data."
        )
    return feed
