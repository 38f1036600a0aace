"""What the parts of a recipe's schema share: checks of single values, and models that refuse unknown keys."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from typing import Any

import pydantic
from pydantic import Field, WithJsonSchema
from pydantic_core import PydanticCustomError


def keys(model: type[pydantic.BaseModel]) -> list[str]:
    """The keys of a model as files spell them."""
    return [field.alias or name for name, field in model.model_fields.items()]


def canonical(data: object) -> str:
    """JSON with one spelling for each value."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def near(word: object, known: tuple[str, ...] | list[str], cutoff: float = 0.5) -> str:
    """The hint `; did you mean 'x'?`, or nothing."""
    match = difflib.get_close_matches(str(word).lower(), known, n=1, cutoff=cutoff)
    return f"; did you mean {match[0]!r}?" if match else ""


def show(value: object) -> str:
    """A found value in words, short: "the number 8", "the text 'yes'"."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "the truth value true", False: "the truth value false"}[value]
    words = {str: "the text ", int: "the number ", float: "the number ", list: "a list ", dict: "a mapping "}
    text = repr(value)
    return words.get(type(value), "") + (text if len(text) <= 60 else text[:57] + "...")


def text(value: object) -> str:
    if isinstance(value, str) and value.strip():
        return value
    hint = f'; write it in quotes: "{value}"' if type(value) in (int, float) else ""
    raise ValueError(f"found {show(value)}, expected text{hint}")


def truth(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
    hint = word.get(str(value).lower())
    raise ValueError(f"found {show(value)}, expected true or false" + (f"; write {hint}" if hint else ""))


def count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ValueError(f"found {show(value)}, expected a positive whole number")


def choice(*known: str) -> Callable[[object], str]:
    def check(value: object) -> str:
        if value in known:
            return str(value)
        raise ValueError(f"found {show(value)}, expected one of {', '.join(known)}{near(value, known)}")

    return check


def one_of(known: tuple[str, ...]) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "enum": list(known)})


def key(description: str) -> Any:
    """A key that may be left out; the description is for editors, through the JSON Schema."""
    return Field(default=None, description=description)


class Model(pydantic.BaseModel):
    """Frozen; unknown keys are refused with the nearest right one; equal when the fields are equal."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: object) -> object:
        known = keys(cls)
        for key in data if isinstance(data, Mapping) else ():
            if key not in known:
                space = f"; put a space after the colon: {str(key).replace(':', ': ', 1)!r}" if ":" in str(key) else ""
                text = f"unknown key {key!r}{space or near(key, known) or '.'} Known: {', '.join(known)}"
                raise PydanticCustomError("unknown_key", "{text}", {"text": text, "key": key})
        return data

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self).__name__, canonical(self.to_dict())))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a recipe file spells it; keys at their defaults are left out."""
        return {key: short(value) for key, value in self if value is not None}

    def spell(self) -> Any:
        """As short as a recipe file may write it."""
        return self.to_dict()


def short(value: object) -> Any:
    """A field's value as plain data: a list of one as its entry."""
    if isinstance(value, tuple):
        return value[0] if len(value) == 1 else list(value)
    return value.spell() if hasattr(value, "spell") else value  # type: ignore[attr-defined]
