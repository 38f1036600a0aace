"""Evaluation for the command line: a language model's perplexity, any other model's distance to a reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jqopt import _evaluate
from jqopt._cli_data import Data
from jqopt._cli_print import Shown, bar
from jqopt.errors import UnsupportedError

Model = Callable[[Any], Any]


def evaluate(candidate: Model, reference: Model | None, data: Data) -> Shown:
    """Perplexity if the data are tokens and the model gives logits [batch, tokens, vocabulary]; else the distance.

    Raises:
        UnsupportedError: neither can be had.
    """
    windows = data.windows
    if windows is not None and _gives_logits(candidate, windows[: data.batch]):
        return _language(candidate, reference, windows, data.batch)
    if reference is None:
        raise UnsupportedError(
            "no perplexity: this isn't a language model on token ids (ids [batch, tokens] to logits [batch, tokens, "
            "vocabulary]); give --reference MODEL to compare its outputs with another model's"
        )
    with bar("evaluate", len(data)) as step:
        found = _evaluate.difference(reference, candidate, data, step)
    facts = {"kind": "difference", "batches": len(data), **dataclasses.asdict(found)}
    errors = f"relative error {found.relative_error:.4g}, largest error {found.largest_error:.4g}"
    return Shown(facts, f"{errors}, over {found.values:,} outputs")


def _gives_logits(model: Model, windows: np.ndarray) -> bool:
    count, length = windows.shape
    ids = jax.ShapeDtypeStruct((count, max(length - 1, 1)), jnp.int32)
    out = jax.eval_shape(model, ids)
    return (
        isinstance(out, jax.ShapeDtypeStruct)
        and len(out.shape) == 3
        and out.shape[:2] == ids.shape
        and bool(jnp.issubdtype(out.dtype, jnp.floating))
    )


def _language(candidate: Model, reference: Model | None, windows: np.ndarray, batch: int) -> Shown:
    if windows.shape[1] < 2:
        raise UnsupportedError("windows of one token hold nothing to predict; write --seq 2 or more")
    facts = {"kind": "language", "windows": len(windows), "tokens": int(windows.size)}
    with bar("evaluate", len(windows)) as step:
        if reference is None:
            value = _evaluate.perplexity(candidate, windows, batch, step)
            facts |= {"perplexity": value, "predictions": len(windows) * (windows.shape[1] - 1)}
            return Shown(facts, f"perplexity {value:.4g} over {facts['predictions']:,} predictions")
        found = _evaluate.compare(reference, candidate, windows, batch, step)
    facts |= dataclasses.asdict(found)
    return Shown(facts, _compared(found))


def _compared(found: _evaluate.Comparison) -> str:
    return (
        f"perplexity {found.perplexity:.4g} (reference {found.reference_perplexity:.4g}), KL {found.kl:.4g} nats, "
        f"top-1 agreement {found.agreement:.2%}, over {found.predictions:,} predictions\n"
        f"loss changed by {found.loss_change:+.4g} nats (standard error {found.loss_change_error:.2g})"
    )
