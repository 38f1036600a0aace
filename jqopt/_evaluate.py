"""How good a language model is, and how far a quantized model is from the one it came from.

A language model is a function from ids [batch, tokens] to logits [batch, tokens, vocab], jitted or not. Windows go
through in batches, and of the logits only sums per window are kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Logits = Callable[[jax.Array], jax.Array]
Progress = Callable[[int], Any]
"""Called with the number of windows or batches that are done."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A candidate model against a reference, over all predictions of the windows.

    `kl`: mean KL(reference || candidate), nats. `loss_change`: mean loss of the candidate less that of the
    reference, nats; `loss_change_error`: its standard error, paired by window. `agreement`: share of equal
    most likely tokens.
    """

    perplexity: float
    reference_perplexity: float
    kl: float
    loss_change: float
    loss_change_error: float
    agreement: float
    predictions: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """A model's outputs against a reference's, over all floating-point values of all batches.

    `relative_error`: sqrt(sum |y - reference|^2 / sum |reference|^2). `largest_error`: the largest |y - reference|.
    """

    relative_error: float
    largest_error: float
    values: int


def perplexity(logits: Logits, windows: np.ndarray, batch: int = 8, progress: Progress | None = None) -> float:
    """exp of the mean loss over windows [count, length]; each window gives length - 1 predictions."""

    def measure(ids: jax.Array) -> list[tuple[jax.Array, ...]]:
        return [(_losses(logits(ids[:, :-1]), ids[:, 1:]),)]

    [(losses,)] = _by_window(measure, windows, batch, progress)
    return _exp(losses.sum() / _predictions(windows))


def compare(
    reference: Logits, candidate: Logits, windows: np.ndarray, batch: int = 8, progress: Progress | None = None
) -> Comparison:
    """Both models on the same windows [count, length]."""
    return compare_all(reference, {"": candidate}, windows, batch, progress)[""]


def compare_all(
    reference: Logits,
    candidates: Mapping[str, Logits],
    windows: np.ndarray,
    batch: int = 8,
    progress: Progress | None = None,
) -> dict[str, Comparison]:
    """Several models against one reference, whose logits are computed once for each batch."""

    def measure(ids: jax.Array) -> list[tuple[jax.Array, ...]]:
        inputs, targets = ids[:, :-1], ids[:, 1:]
        known = reference(inputs)
        return [_distances(known, candidate(inputs), targets) for candidate in candidates.values()]

    sums = _by_window(measure, windows, batch, progress)
    return {name: _comparison(windows, *found) for name, found in zip(candidates, sums, strict=True)}


def _comparison(
    windows: np.ndarray, before: np.ndarray, after: np.ndarray, kl: np.ndarray, same: np.ndarray
) -> Comparison:
    change, count = (after - before) / (windows.shape[1] - 1), _predictions(windows)
    return Comparison(
        perplexity=_exp(after.sum() / count),
        reference_perplexity=_exp(before.sum() / count),
        kl=float(kl.sum() / count),
        loss_change=float(change.mean()),
        loss_change_error=float(change.std(ddof=1)) / math.sqrt(len(change)) if len(change) > 1 else math.nan,
        agreement=float(same.sum() / count),
        predictions=count,
    )


def _exp(loss: float) -> float:
    return math.exp(loss) if not loss > 700 else math.inf


def _predictions(windows: np.ndarray) -> int:
    return windows.shape[0] * (windows.shape[1] - 1)


@jax.jit
def _losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]


@jax.jit
def _distances(reference: jax.Array, candidate: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    """Per prediction: both losses, the divergence, and whether the most likely token is the same."""
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (reference, candidate))
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    same = jnp.argmax(reference, axis=-1) == jnp.argmax(candidate, axis=-1)
    return _losses(reference, targets), _losses(candidate, targets), kl, same


def _by_window(
    measure: Callable[[jax.Array], list[tuple[jax.Array, ...]]],
    windows: np.ndarray,
    batch: int,
    progress: Progress | None,
) -> list[list[np.ndarray]]:
    """For each model, each measured quantity [batch, predictions] summed over its window, float64 [count] each."""
    parts = []
    for ids, done, kept in _equal_batches(windows, batch):
        parts.append([[np.asarray(x, np.float64)[:kept].sum(axis=-1) for x in found] for found in measure(ids)])
        if progress is not None:
            progress(done)
    return [[np.concatenate(part) for part in zip(*model, strict=True)] for model in zip(*parts, strict=True)]


def _equal_batches(windows: np.ndarray, batch: int) -> Iterator[tuple[jax.Array, int, int]]:
    """(ids, windows so far, windows in it): batches of one shape, so that a jitted model compiles once."""
    batch = min(batch, len(windows))
    for at in range(0, len(windows), batch):
        ids = windows[at : at + batch]
        filler = np.repeat(ids[:1], batch - len(ids), axis=0)
        yield jnp.asarray(np.concatenate([ids, filler]).astype(np.int32)), at + len(ids), len(ids)


def difference(
    reference: Callable[[Any], Any],
    candidate: Callable[[Any], Any],
    batches: Iterable[Any],
    progress: Progress | None = None,
) -> Difference:
    """Two models of any outputs on the same batches; outputs that aren't floating point don't count."""
    signal = error = 0.0
    largest, values = 0.0, 0
    for done, batch in enumerate(batches, 1):
        for x, y in zip(_floats(reference(batch)), _floats(candidate(batch)), strict=True):
            power, off, most = (float(part) for part in _distance(x, y))
            signal, error, values = signal + power, error + off, values + x.size
            largest = float(np.maximum(largest, most))  # NaN stays NaN
        if progress is not None:
            progress(done)
    relative = math.sqrt(error / signal) if signal else (math.inf if error else 0.0)
    return Difference(relative, largest, values)


def _floats(tree: Any) -> list[jax.Array]:
    return [x for x in map(jnp.asarray, jax.tree.leaves(tree)) if jnp.issubdtype(x.dtype, jnp.floating) and x.size]


@jax.jit
def _distance(x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
    wide, other = x.astype(jnp.float32), y.astype(jnp.float32)
    off = wide - other
    return jnp.sum(wide * wide), jnp.sum(off * off), jnp.max(jnp.abs(off))
