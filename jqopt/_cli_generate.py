"""`jqopt generate`: text after a prompt, of a Hugging Face folder or of a checkpoint that was made from one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jqopt
from jqopt._cli_data import tokenizer_of
from jqopt._cli_models import Loaded, is_checkpoint, load, model_of
from jqopt._cli_print import Shown
from jqopt.errors import CheckpointError, UnsupportedError
from jqopt.export.checkpoint import Checkpoint
from jqopt.hf import generate as _generate


class Settings(NamedTuple):
    """How to draw: as `jqopt.hf.generate` takes them; `kv_cache` is a format's name or None."""

    tokens: int
    temperature: float
    top_p: float
    seed: int
    kv_cache: str | None


def generate(target: str, model: str | None, prompts: list[str], settings: Settings, **options: Any) -> Shown:
    """The texts after each prompt.

    Raises:
        UnsupportedError: no decoder of jqopt.hf, or no tokenizer.
        CheckpointError: the checkpoint or a file of its folder can't be read.
    """
    loaded, parameters = _loaded(target, model, **options)
    if not hasattr(type(loaded.model), "decode"):
        raise UnsupportedError(
            f"{target}: {type(loaded.model).__name__} is no decoder of jqopt.hf, which generating needs: give a "
            "Hugging Face folder, or a checkpoint that was made from one"
        )
    tokenizer = tokenizer_of(None if loaded.folder is None else loaded.folder / "tokenizer.json", "a prompt")
    rows = [tokenizer.encode(prompt).ids for prompt in prompts]
    if not all(rows):
        raise UnsupportedError("an empty prompt gives no token to begin with; write a word or more")
    ends = _ends(loaded.folder)
    start = time.perf_counter()
    found = _generate(
        loaded.model, parameters, _padded(rows), lengths=[len(r) for r in rows], max_new_tokens=settings.tokens,
        temperature=settings.temperature, top_p=settings.top_p, seed=settings.seed, eos=ends or None,
        cache="model" if settings.kv_cache is None else {"format": settings.kv_cache, "scaling": "cast"},
    )  # fmt: skip
    tokens, counts = np.asarray(found.tokens), np.asarray(found.lengths)
    seconds = time.perf_counter() - start
    texts = []
    for prompt, row, count in zip(prompts, tokens, counts, strict=True):
        ids = row[:count].tolist()
        ended = ids[-1] in ends
        texts.append({"prompt": prompt, "text": tokenizer.decode(ids), "tokens": ids, "ended": ended})
    facts = {"model": target, **settings._asdict(), "seconds": seconds, "generated": texts}
    return Shown(facts, "\n\n".join(f"{t['prompt']}{t['text']}" for t in texts))


def _loaded(target: str, model: str | None, **options: Any) -> tuple[Loaded, Any]:
    """(the model, its variables or the quantized model)."""
    if not is_checkpoint(target):
        loaded = load(target, **options)
        return loaded, loaded.params
    loaded = model_of(Checkpoint(target), model, **options)
    return loaded, jqopt.load(target, loaded.model)


def _padded(rows: list[list[int]]) -> np.ndarray:
    out = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out


def _ends(folder: Path | None) -> tuple[int, ...]:
    """The tokens that end a text: of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = None if folder is None else folder / name
        if path is None or not path.is_file():
            continue
        try:
            found = json.loads(path.read_bytes()).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: its JSON cannot be read: {error}") from None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return ()
