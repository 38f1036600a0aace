"""A Hugging Face folder apart from its weights: configuration, family, and the files that go along with a model."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from jqopt.errors import CheckpointError, UnsupportedError
from jqopt.hf import families
from jqopt.hf.families import Family, Place

CONFIG = "config.json"
CARRIED = (
    *(
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
    ),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "chat_template.jinja"),
    *("preprocessor_config.json", "processor_config.json"),
)
"""Files that a copy of a model takes along as they are."""

QUANTIZATION = "quantization_config"
DTYPE_KEYS = ("dtype", "torch_dtype")


class Identity(NamedTuple):
    """Which model it is: its folder, config.json without `quantization_config`, family and parsed configuration."""

    folder: Path
    config: dict[str, Any]
    quantization: dict[str, Any] | None
    family: Family
    parsed: Any

    @property
    def dtype(self) -> str | None:
        """What config.json says that the weights are."""
        found = next((self.config[key] for key in DTYPE_KEYS if self.config.get(key)), None)
        return found if isinstance(found, str) else None

    def with_dtype(self, dtype: str) -> dict[str, Any]:
        """config.json for weights of this dtype."""
        keys = [key for key in DTYPE_KEYS if key in self.config] or [DTYPE_KEYS[0]]
        return {**self.config, **dict.fromkeys(keys, dtype)}

    def carried(self) -> dict[str, Path]:
        """The files that go along, by name."""
        return {name: self.folder / name for name in CARRIED if (self.folder / name).is_file()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing, or isn't one.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: found no {path.name}; expected a Hugging Face checkpoint folder")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its JSON cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: its JSON is a {type(found).__name__}; expected an object")
    return found


def identity(folder: str | Path) -> Identity:
    """The model of a folder, quantized or not.

    Raises:
        CheckpointError: there is no config.json, or it can't be read.
        UnsupportedError: an unknown family.
    """
    config = read_json(Path(folder) / CONFIG)
    quantization = config.pop(QUANTIZATION, None)
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(f"{folder}/{CONFIG}: {QUANTIZATION} is no object")
    family = families.find(config)
    return Identity(Path(folder), config, quantization, family, family.parse(config))


def stack_of(place: Place) -> tuple[int, ...]:
    """Sizes of the leading axes that a parameter's tensors are stacked along, in their order."""
    stack = getattr(place, "stack", None)
    if stack is None:
        stack = (len(place.tensors),) if getattr(place, "stacked", False) else ()
    return tuple(stack)


def places_of(model: Identity, paths: Collection[str]) -> tuple[Place, ...]:
    """Where each parameter comes from, for a tree with these paths: scanned over layers, or not.

    Raises:
        UnsupportedError: it isn't the tree of that model.
    """
    both = [model.family.places(model.parsed, scan) for scan in (False, True)]
    for places in both:
        if {p.path for p in places} == set(paths):
            return places
    nearest = min(both, key=lambda places: len({p.path for p in places} ^ set(paths)))
    wanted = {p.path for p in nearest}
    missing, extra = sorted(wanted - set(paths)), sorted(set(paths) - wanted)
    raise UnsupportedError(
        f"the parameters aren't those of the {model.family.name!r} model in {model.folder}. Missing: "
        f"{', '.join(missing[:4]) or 'none'}; unexpected: {', '.join(extra[:4]) or 'none'}. Export needs the model "
        "that jqopt.hf.load_model gives for that folder."
    )
