"""The tiny language model as shipped: files that fit together, a model of language, right measures."""

import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.tinylm import data, evaluate
from jqopt.hf import load_model
from jqopt.hf.safetensors import open_folder

FOLDER = Path(data.__file__).parent
REFERENCE = Path(__file__).parents[1] / "golden" / "tinylm_reference"


@pytest.fixture(scope="module")
def shipped():
    module, variables = load_model(FOLDER)
    apply = jax.jit(module.apply)
    return lambda ids: apply(variables, ids)


@pytest.fixture(scope="module")
def reference():
    module, variables = load_model(REFERENCE)
    apply = jax.jit(module.apply)
    return lambda ids: apply(variables, ids)


# ---- files


def test_the_folder_is_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 20e6


def test_weights_are_bfloat16_under_hugging_face_names():
    entries = open_folder(FOLDER)
    assert {str(entry.dtype) for entry in entries.values()} == {"bfloat16"}
    assert {n: e.shape for n, e in entries.items()} == {n: e.shape for n, e in open_folder(REFERENCE).items()}
    assert sum(math.prod(entry.shape) for entry in entries.values()) == 4_196_608


def test_tokens_fit_tokenizer_and_model():
    vocabulary = json.loads((FOLDER / "tokenizer.json").read_text())["model"]["vocab"]
    config = json.loads((FOLDER / "config.json").read_text())
    assert sorted(vocabulary.values()) == list(range(config["vocab_size"]))
    for name in ("test_tokens", "calib_tokens"):
        tokens = np.load(FOLDER / f"{name}.npy")
        assert tokens.dtype == np.uint16
        assert tokens.max() < config["vocab_size"]


@pytest.mark.parametrize("name", ["README.md", "SOURCES.md"])
def test_the_licence_stands_beside_the_files(name):
    text = (FOLDER / name).read_text()
    assert "CC BY-SA 3.0" in text
    assert "Merity" in text


# ---- data


def test_windows():
    tokens, whole = np.load(FOLDER / "test_tokens.npy"), data.windows(256)
    assert whole.shape == (len(tokens) // 256, 256)
    assert whole.dtype == np.int32
    np.testing.assert_array_equal(whole.ravel(), tokens[: whole.size])
    np.testing.assert_array_equal(data.windows(256, 3), whole[:3])


def test_calibration_batches():
    stored = np.load(FOLDER / "calib_tokens.npy")
    found = list(data.calibration_batches(20, 100, 8))
    assert [x.shape for x in found] == [(8, 100), (8, 100), (4, 100)]
    np.testing.assert_array_equal(np.concatenate(found), stored[:20, :100])
    with pytest.raises(ValueError, match="stored are"):
        data.calibration_batches(count=65)


def test_calibration_text_is_not_test_text():
    """A window of 32 tokens in both would mean that calibration sees what is measured."""
    test = {bytes(row) for row in np.lib.stride_tricks.sliding_window_view(data.windows().ravel(), 32)}
    calibration = np.concatenate(list(data.calibration_batches(64, 512, 64)))
    assert not any(bytes(np.ascontiguousarray(row)) in test for row in calibration.reshape(-1, 32))


# ---- the model


def test_the_model_models_language(shipped):
    """A model that knows only how frequent each token is gives 647 (the next test but one); the reference
    gives 44.6 on these windows, which are harder than the rest. Below 45 leaves no room for a wrong rotation
    or transposed weights, above 20 none for a mask that shows the answer, which gives about 1.
    """
    value = evaluate.perplexity(shipped, data.windows(256, 32))
    assert 20 < value < 45


def test_better_than_the_reference(shipped, reference):
    found = evaluate.compare(reference, shipped, data.windows(256, 32))
    assert found.loss_change < 0
    assert found.agreement > 0.5


def test_what_knowing_the_frequencies_gives():
    ids = data.windows(256).ravel()
    counts = np.bincount(ids, minlength=4096)
    p = counts[counts > 0] / counts.sum()
    assert math.exp(-np.sum(p * np.log(p))) == pytest.approx(646.8, abs=0.1)


# ---- the measures


def table(scale: float) -> evaluate.Logits:
    """A model of 5 words whose logits depend on the last word only."""
    rows = jnp.asarray(scale * np.random.default_rng(0).normal(size=(5, 5)), jnp.float32)
    return lambda ids: rows[ids]


def test_measures_against_sums_written_out():
    windows = np.random.default_rng(1).integers(0, 5, (7, 6)).astype(np.int32)
    reference, candidate = table(1.0), table(1.3)
    before, after, kl, same = [], [], [], []
    for row in windows:
        for word, target in itertools.pairwise(row):
            p, q = (np.asarray(f(np.asarray(word)), np.float64) for f in (reference, candidate))
            p, q = np.exp(p) / np.exp(p).sum(), np.exp(q) / np.exp(q).sum()
            before.append(-np.log(p[target]))
            after.append(-np.log(q[target]))
            kl.append(np.sum(p * np.log(p / q)))
            same.append(np.argmax(p) == np.argmax(q))
    change = (np.asarray(after) - before).reshape(7, 5).mean(axis=1)
    found = evaluate.compare(reference, candidate, windows, batch=3)  # 7 windows: the last batch is filled up
    assert found.predictions == 35
    np.testing.assert_allclose(
        [found.perplexity, found.reference_perplexity, found.kl, found.agreement, found.loss_change],
        [np.exp(np.mean(after)), np.exp(np.mean(before)), np.mean(kl), np.mean(same), change.mean()],
        rtol=1e-5,
    )
    np.testing.assert_allclose(found.loss_change_error, change.std(ddof=1) / math.sqrt(7), rtol=1e-4)
    np.testing.assert_allclose(evaluate.perplexity(candidate, windows, batch=2), found.perplexity, rtol=1e-6)


def test_a_model_against_itself():
    windows = np.random.default_rng(1).integers(0, 5, (4, 6)).astype(np.int32)
    found = evaluate.compare(table(1.0), table(1.0), windows)
    assert (found.kl, found.loss_change, found.loss_change_error, found.agreement) == (0.0, 0.0, 0.0, 1.0)
