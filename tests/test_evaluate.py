"""Distances between models, against sums written out; perplexity and KL are tested with the tiny model's measures."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jqopt import _evaluate
from jqopt._evaluate import compare, compare_all, difference, perplexity

WINDOWS = np.random.default_rng(1).integers(0, 5, (7, 6)).astype(np.int32)


def table(scale: float):
    """A model of 5 words whose logits depend on the last word only."""
    rows = jnp.asarray(scale * np.random.default_rng(0).normal(size=(5, 5)), jnp.float32)
    return lambda ids: rows[ids]


def test_all_at_once_is_one_by_one():
    models = {"near": table(1.1), "far": table(2.0)}
    found = compare_all(table(1.0), models, WINDOWS, batch=3)
    assert found == {name: compare(table(1.0), run, WINDOWS, batch=3) for name, run in models.items()}
    assert found["near"].kl < found["far"].kl


def test_the_reference_runs_once_for_all():
    calls = []

    def reference(ids):
        calls.append(ids.shape)
        return table(1.0)(ids)

    compare_all(reference, {"a": table(1.1), "b": table(1.2), "c": table(1.3)}, WINDOWS, batch=4)
    assert calls == [(4, 5), (4, 5)]


def test_progress_counts_windows():
    seen = []
    perplexity(table(1.0), WINDOWS, 3, seen.append)
    assert seen == [3, 6, 7]


def test_batches_are_no_larger_than_the_data():
    shapes = []
    perplexity(lambda ids: shapes.append(ids.shape) or table(1.0)(ids), WINDOWS[:2], 8)
    assert shapes == [(2, 5)]


def test_a_uniform_model_knows_nothing():
    assert perplexity(lambda ids: jnp.zeros((*ids.shape, 5)), WINDOWS) == pytest.approx(5, rel=1e-6)


def test_a_loss_beyond_floats_is_infinite():
    sure_and_wrong = lambda ids: jnp.full((*ids.shape, 6), 0.0).at[..., 5].set(2000.0)  # noqa: E731
    assert perplexity(sure_and_wrong, WINDOWS) == math.inf


def test_difference_written_out():
    batches = [np.asarray([1.0, 2.0], np.float32), np.asarray([-3.0], np.float32)]
    reference = lambda x: {"y": jnp.asarray(x), "count": jnp.asarray(3)}  # noqa: E731
    candidate = lambda x: {"y": jnp.asarray(x) + jnp.float32(0.5), "count": jnp.asarray(4)}  # noqa: E731
    found = difference(reference, candidate, batches)
    assert found.relative_error == pytest.approx(math.sqrt(3 * 0.25 / 14))
    assert (found.largest_error, found.values) == (0.5, 3)


def test_difference_keeps_nan():
    found = difference(lambda x: jnp.ones(2), lambda x: jnp.asarray([1.0, jnp.nan]), [0])
    assert math.isnan(found.relative_error)
    assert math.isnan(found.largest_error)


def test_difference_from_nothing():
    zero, one = (lambda x: jnp.zeros(2)), (lambda x: jnp.ones(2))
    assert difference(zero, zero, [0]).relative_error == 0
    assert difference(zero, one, [0]).relative_error == math.inf


def test_the_example_shares_these_measures():
    from examples.tinylm import evaluate

    assert all(getattr(evaluate, name) is getattr(_evaluate, name) for name in evaluate.__all__)
