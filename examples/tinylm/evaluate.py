"""How good a language model is, and how far a quantized one is from the model it came from.

A model is a function from ids [batch, tokens] to logits [batch, tokens, vocab], jitted or not. Windows go
through in batches, and of the logits only sums per window are kept.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

Logits = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
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


def perplexity(logits: Logits, windows: np.ndarray, batch: int = 8) -> float:
    """exp of the mean loss over windows [count, length]; each window gives length - 1 predictions."""
    sums = _by_window(lambda ids: (_losses(logits(ids[:, :-1]), ids[:, 1:]),), windows, batch)
    return math.exp(sums[0].sum() / _predictions(windows))


def compare(reference: Logits, candidate: Logits, windows: np.ndarray, batch: int = 8) -> Comparison:
    """Both models on the same windows [count, length]."""

    def measure(ids: jax.Array) -> tuple[jax.Array, ...]:
        return _distances(reference(ids[:, :-1]), candidate(ids[:, :-1]), ids[:, 1:])

    before, after, kl, same = _by_window(measure, windows, batch)
    change, count = (after - before) / (windows.shape[1] - 1), _predictions(windows)
    return Comparison(
        perplexity=math.exp(after.sum() / count),
        reference_perplexity=math.exp(before.sum() / count),
        kl=float(kl.sum() / count),
        loss_change=float(change.mean()),
        loss_change_error=float(change.std(ddof=1)) / math.sqrt(len(change)) if len(change) > 1 else math.nan,
        agreement=float(same.sum() / count),
        predictions=count,
    )


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
    measure: Callable[[jax.Array], tuple[jax.Array, ...]], windows: np.ndarray, batch: int
) -> list[np.ndarray]:
    """Each measured quantity [batch, predictions] summed over its window, float64 [count] each."""
    parts = [
        [np.asarray(x, np.float64)[:kept].sum(axis=-1) for x in measure(ids)]
        for ids, kept in _equal_batches(windows, batch)
    ]
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def _equal_batches(windows: np.ndarray, batch: int) -> Iterator[tuple[jax.Array, int]]:
    """Batches of one shape, so that a jitted model compiles once: the last is filled up."""
    for at in range(0, len(windows), batch):
        ids = windows[at : at + batch]
        filler = np.repeat(ids[:1], batch - len(ids), axis=0)
        yield jnp.asarray(np.concatenate([ids, filler]).astype(np.int32)), len(ids)
