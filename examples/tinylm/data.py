"""The tiny model's texts as token ids: the test set of WikiText-2, and windows of its train set."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent


def windows(length: int = 256, count: int | None = None) -> np.ndarray:
    """The test text cut into windows that do not overlap, int32 [count, length]; the ragged end is left out.

    All of them (1349 of 256 tokens) unless `count` asks for the first few.
    """
    tokens = np.load(FOLDER / "test_tokens.npy")
    return tokens[: len(tokens) // length * length].reshape(-1, length)[:count].astype(np.int32)


def calibration_batches(count: int = 64, length: int = 256, batch: int = 8) -> Iterator[np.ndarray]:
    """`count` (at most 64) windows of the train text of `length` (at most 512) ids, as int32 [batch, length].

    The last batch is smaller where `batch` does not divide `count`. Raises ValueError where more is asked
    than there is.
    """
    stored = np.load(FOLDER / "calib_tokens.npy")
    if not (0 < count <= stored.shape[0] and 0 < length <= stored.shape[1] and batch > 0):
        raise ValueError(f"asked for {count} windows of {length} in batches of {batch}; stored are {stored.shape}")
    chosen = stored[:count, :length].astype(np.int32)
    return (chosen[at : at + batch] for at in range(0, count, batch))
