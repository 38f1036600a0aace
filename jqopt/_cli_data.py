"""Data files for calibration and evaluation: token windows, arrays, or keyword inputs, in batches; random stand-ins."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jqopt.errors import CalibrationError, UnsupportedError

KINDS = ".npy (token ids, or examples along axis 0), .npz (keyword inputs), .txt (with a Hugging Face model)"
NARROW = {"float64": np.float32, **dict.fromkeys(("int64", "uint64", "uint32", "uint16"), np.int32)}
"""Dtypes that JAX would narrow without a word, and unsigned ones that token files use."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Examples along axis 0, in batches. `tokens`: they are windows of token ids, int32 [count, length]."""

    rows: np.ndarray | dict[str, np.ndarray]
    batch: int
    tokens: bool

    @property
    def examples(self) -> int:
        arrays = list(self.rows.values()) if isinstance(self.rows, dict) else [self.rows]
        return arrays[0].shape[0]

    @property
    def windows(self) -> np.ndarray | None:
        """The windows of token ids, if that is what they are."""
        return self.rows if self.tokens and not isinstance(self.rows, dict) else None

    def __len__(self) -> int:
        """The number of batches; the last may be smaller."""
        return -(-self.examples // self.batch)

    def __iter__(self) -> Iterator[Any]:
        for at in range(0, self.examples, self.batch):
            yield self._at(slice(at, at + self.batch))

    def first(self, batches: int | None) -> Data:
        """Only the first few batches; all of them if None."""
        if batches is None:
            return self
        return dataclasses.replace(self, rows=self._at(slice(0, batches * self.batch)))

    def _at(self, part: slice) -> Any:
        if isinstance(self.rows, dict):
            return {name: _narrow(x[part], NARROW.get(x.dtype.name, x.dtype)) for name, x in self.rows.items()}
        return _narrow(self.rows[part], np.int32 if self.tokens else NARROW.get(self.rows.dtype.name, self.rows.dtype))


def _narrow(x: np.ndarray, dtype: Any) -> np.ndarray:
    """The same values in a dtype that JAX keeps."""
    if x.size and np.issubdtype(x.dtype, np.integer):
        limits = np.iinfo(dtype)
        if x.min() < limits.min or x.max() > limits.max:
            raise CalibrationError(f"the data hold {x.min()} to {x.max()}, which doesn't fit {np.dtype(dtype).name}")
    return np.ascontiguousarray(x, dtype)


def read(path: Path, *, length: int, batch: int, vocabulary: int | None = None, tokenizer: Path | None = None) -> Data:
    """The examples of a data file.

    Args:
        length: tokens in a window, where the file is one long text.
        batch: examples in a batch.
        vocabulary: token ids must lie below it, where the model has one.
        tokenizer: the model's tokenizer.json, for text.

    Raises:
        CalibrationError: the file is missing, damaged, too short, or holds something else.
        UnsupportedError: an unknown kind of file, or text without a tokenizer.
    """
    readers: dict[str, Callable[[], Any]] = {
        ".npy": lambda: _load(path),
        ".npz": lambda: _load(path),
        ".txt": lambda: _tokenized(path, tokenizer),
    }
    if path.suffix not in readers:
        raise UnsupportedError(f"{path}: unknown kind of data file {path.suffix!r}; known are {KINDS}")
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file; expected {KINDS}")
    found = readers[path.suffix]()
    if isinstance(found, dict):
        return Data(_checked(path, found), batch, False)
    data = Data(_windows(path, found, length), batch, _is_tokens(found))
    if data.windows is not None and vocabulary is not None:
        _check_vocabulary(path, data.windows, vocabulary)
    return data


def _load(path: Path) -> Any:
    """The arrays of a NumPy file; objects (pickles) are refused."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        return dict(found) if isinstance(found, np.lib.npyio.NpzFile) else found
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise CalibrationError(f"{path}: NumPy can't read it: {error}") from None


def _is_tokens(x: np.ndarray) -> bool:
    """Whether an array holds token ids: whole numbers, one text or one window a row (rows of bytes may be pixels)."""
    return np.issubdtype(x.dtype, np.integer) and (x.ndim == 1 or (x.ndim == 2 and x.dtype.itemsize > 1))


def _windows(path: Path, x: np.ndarray, length: int) -> np.ndarray:
    """[ids] as windows [count, length], the ragged end left out; anything with more axes as it is."""
    if x.ndim == 0 or x.size == 0 or x.dtype.kind not in "biuf":
        raise CalibrationError(f"{path}: found {x.dtype}{list(x.shape)}, expected numbers with examples along axis 0")
    if x.ndim > 1:
        return x
    if not _is_tokens(x):
        raise CalibrationError(
            f"{path}: found {x.dtype}{list(x.shape)}; one axis is for token ids (whole numbers). For examples, save "
            "them along axis 0: [examples, ...]."
        )
    if len(x) < length:
        raise CalibrationError(f"{path}: {len(x)} tokens don't fill one window of {length}; write --seq {len(x)}")
    return x[: len(x) // length * length].reshape(-1, length)


def _check_vocabulary(path: Path, ids: np.ndarray, vocabulary: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise CalibrationError(
            f"{path}: token ids from {low} to {high}, but the model's vocabulary has {vocabulary}: was the text cut "
            "with another tokenizer?"
        )


def _checked(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    counts = {name: x.shape[0] if x.ndim else None for name, x in arrays.items()}
    if not arrays or None in counts.values() or len({*counts.values()}) != 1 or 0 in counts.values():
        found = ", ".join(f"{name} {list(x.shape)}" for name, x in arrays.items()) or "no array"
        raise CalibrationError(f"{path}: found {found}; expected arrays with as many examples each along axis 0")
    return arrays


def _tokenized(path: Path, tokenizer: Path | None) -> np.ndarray:
    cut = tokenizer_of(tokenizer, f"{path}: text")
    return np.asarray(cut.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids, np.int32)


def tokenizer_of(file: Path | None, what: str) -> Any:
    """The tokenizer of a tokenizer.json; `what` needs it.

    Raises:
        UnsupportedError: there is no file, or the package tokenizers isn't installed.
        CalibrationError: tokenizers can't read the file.
    """
    if file is None or not file.is_file():
        raise UnsupportedError(
            f"{what} needs the model's tokenizer: a Hugging Face folder with tokenizer.json. Else tokenize it "
            "yourself and save the ids: np.save('tokens.npy', ids)"
        )
    try:
        from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UnsupportedError(
            f"{what} needs the package tokenizers, which isn't installed: pip install 'jqopt[hf]'"
        ) from None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CalibrationError(f"{file}: tokenizers can't use it: {error}") from None


def random_batches(example: Any, vocabulary: int | None, count: int) -> Iterator[Any]:
    """Batches shaped like an example (arrays or shapes): normal numbers, and token ids below the vocabulary.

    Raises:
        CalibrationError: whole numbers are wanted, and nothing says below what.
    """
    for seed in range(count):
        random = np.random.default_rng(seed)
        yield jax.tree.map(lambda x, r=random: _random(x, vocabulary, r), example)


def _random(x: Any, vocabulary: int | None, random: np.random.Generator) -> Any:
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        return x
    dtype = jax.numpy.dtype(x.dtype)
    if jax.numpy.issubdtype(dtype, np.floating):
        return random.standard_normal(x.shape).astype(dtype)
    if np.issubdtype(dtype, np.bool_):
        return random.integers(0, 2, x.shape).astype(bool)
    if not np.issubdtype(dtype, np.integer) or vocabulary is None:
        raise CalibrationError(
            f"no random numbers for an input {dtype}{list(x.shape)}: nothing says which values it may have. Give real "
            "data with --data, or the number of token ids with --vocab."
        )
    return random.integers(0, min(vocabulary, np.iinfo(dtype).max), x.shape).astype(dtype)
