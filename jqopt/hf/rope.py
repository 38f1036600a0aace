"""Rotary positions: frequencies of every scaling that is computed, and turning queries and keys by them.

Definitions: transformers' `modeling_rope_utils`. Halves are turned, not interleaved pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jqopt.errors import UnsupportedError


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained length: `kind` is a key of `SCALINGS`.

    `original_length` is the trained length in tokens. `attention_factor` multiplies cosines and sines. `short_factors`
    and `long_factors` (longrope) divide each frequency, for sequences up to the trained length and beyond it.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: float = 8192.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Rope:
    """The rotary positions of a layer: `width` leading channels of a head are turned, the others left alone."""

    width: int
    theta: float
    scaling: RopeScaling | None = None

    def frequencies(self, length: int = 1) -> np.ndarray:
        """Angle per position, float32 [width / 2], in radians, in a sequence of `length` tokens."""
        plain = np.float32(1.0) / np.float32(self.theta) ** (
            np.arange(0, self.width, 2, dtype=np.float32) / np.float32(self.width)
        )
        if self.scaling is None:
            return plain
        return SCALINGS[self.scaling.kind].scaled(self, plain, length).astype(np.float32)

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0 if self.scaling is None else self.scaling.attention_factor

    @property
    def switch(self) -> int | None:
        """The length beyond which the frequencies are others; None: they do not depend on the length."""
        return int(self.scaling.original_length) if self.scaling is not None and self.scaling.long_factors else None


# ------------------------------------------------------------------------------------------------- scalings


@dataclass(frozen=True)
class Scaling:
    """One kind of scaling: the keys of config.json that it needs, how they are read, and what it does."""

    required: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], dict[str, Any]]
    scaled: Callable[[Rope, np.ndarray, int], np.ndarray]


def _known(rope: Rope) -> RopeScaling:
    assert rope.scaling is not None, "frequencies are scaled by a scaling"
    return rope.scaling


def _linear(rope: Rope, plain: np.ndarray, length: int) -> np.ndarray:
    return plain / np.float32(_known(rope).factor)


def _llama3(rope: Rope, plain: np.ndarray, length: int) -> np.ndarray:
    """Short wavelengths are kept, long ones divided by `factor`, and blended between."""
    s = _known(rope)
    turns = np.float32(s.original_length / (2 * math.pi)) * plain
    blend = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
    blend = blend.astype(np.float32)
    return (1 - blend) * (plain / np.float32(s.factor)) + blend * plain


def _yarn(rope: Rope, plain: np.ndarray, length: int) -> np.ndarray:
    """Channels that turn often in the trained length are kept, slow ones divided, with a ramp between (2309.00071)."""
    s = _known(rope)

    def channel(turns: float) -> float:
        ratio = s.original_length / (turns * 2 * math.pi)
        return rope.width * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = channel(s.beta_fast), channel(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.width - 1)
    ramp = (np.arange(len(plain), dtype=np.float32) - low) / ((high - low) or 0.001)
    slow = np.clip(ramp, 0, 1).astype(np.float32)
    return plain / np.float32(s.factor) * slow + plain * (1 - slow)


def _longrope(rope: Rope, plain: np.ndarray, length: int) -> np.ndarray:
    """Each frequency has its own divisor, one list up to the trained length and one beyond (2402.13753)."""
    s = _known(rope)
    factors = s.long_factors if length > s.original_length else s.short_factors
    return plain / np.asarray(factors, np.float32)


def _numbers(table: Mapping[str, Any], **names: str) -> dict[str, float]:
    """The numbers that the table has, under our names."""
    return {ours: float(table[theirs]) for ours, theirs in names.items() if table.get(theirs) is not None}


def _parse_llama3(table: Mapping[str, Any]) -> dict[str, Any]:
    names = {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}
    return _numbers(table, factor="factor", original_length="original_max_position_embeddings", **names)


def _parse_yarn(table: Mapping[str, Any]) -> dict[str, Any]:
    original = float(table["original_max_position_embeddings"])
    factor = float(table["factor"])

    def loudness(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    one, all_dims = table.get("mscale"), table.get("mscale_all_dim")
    default = loudness(one) / loudness(all_dims) if one and all_dims else loudness(1)
    given = table.get("attention_factor")
    betas = {name: float(table.get(name) or usual) for name, usual in (("beta_fast", 32), ("beta_slow", 1))}
    return {
        "factor": factor,
        "original_length": original,
        "attention_factor": default if given is None else float(given),
        "truncate": bool(table.get("truncate", True)),
        **betas,
    }


def _parse_longrope(table: Mapping[str, Any]) -> dict[str, Any]:
    original, longest = (float(table[k]) for k in ("original_max_position_embeddings", "max_position_embeddings"))
    factor = longest / original if table.get("factor") is None else float(table["factor"])
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    given = table.get("attention_factor")
    lists = {f"{name}s": tuple(float(x) for x in table[name]) for name in ("short_factor", "long_factor")}
    return {
        "factor": factor,
        "original_length": original,
        "attention_factor": default if given is None else float(given),
        **lists,
    }


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SCALINGS: dict[str, Scaling] = {
    "linear": Scaling(("factor",), lambda table: _numbers(table, factor="factor"), _linear),
    "llama3": Scaling(_LLAMA3, _parse_llama3, _llama3),
    "yarn": Scaling(("factor", "original_max_position_embeddings"), _parse_yarn, _yarn),
    "longrope": Scaling(("short_factor", "long_factor", "max_position_embeddings"), _parse_longrope, _longrope),
}

REFUSED = {
    "dynamic": "its frequencies depend on the length so far, so that cached keys would be turned by others than a "
    'whole pass turns them by. Up to max_position_embeddings tokens it is {"rope_type": "default"}: write that',
}
"""Kinds of scaling that transformers knows and this decoder does not, each with the reason."""


def parse_scaling(table: Mapping[str, Any], width: int) -> RopeScaling | None:
    """The scaling that config.json's rotary table asks for; None for `default`.

    Args:
        table: its `rope_parameters` (or `rope_scaling`), with `max_position_embeddings` beside it.
        width: channels of a head that are turned.

    Raises:
        UnsupportedError: another scaling than `SCALINGS` has, a missing key, or lists of another length than width / 2.
    """
    kind = table.get("rope_type", table.get("type", "default"))
    if kind == "default":
        return None
    if kind not in SCALINGS:
        known = ", ".join(["default", *SCALINGS])
        why = f": {REFUSED[kind]}" if kind in REFUSED else f"; known are {known}. Write one in jqopt/hf/rope.py"
        raise UnsupportedError(f"config.json: rotary scaling {kind!r} is not computed{why}")
    missing = [key for key in SCALINGS[kind].required if table.get(key) is None]
    if missing:
        raise UnsupportedError(f"config.json: rotary scaling {kind!r} lacks {', '.join(missing)}")
    found = RopeScaling(kind, **SCALINGS[kind].parse(table))
    for name, factors in (("short_factor", found.short_factors), ("long_factor", found.long_factors)):
        if factors and len(factors) != width // 2:
            raise UnsupportedError(
                f"config.json: {name} has {len(factors)} numbers; expected {width // 2}, half of the {width} channels "
                "of a head that are turned"
            )
    return found


# --------------------------------------------------------------------------------------------------- turning


class HasRope(Protocol):
    """A configuration with rotary positions."""

    def rope(self, sliding: bool = False) -> Rope: ...


def rope_frequencies(config: HasRope) -> np.ndarray:
    """Rotary angle per position, float32 [width / 2], in radians, of layers with full attention."""
    return config.rope().frequencies()


def rotate(x: jax.Array, frequencies: Any, start: jax.Array | None = None, *, factor: Any = 1.0) -> jax.Array:
    """Rotary positions 0, 1, ... applied to x [batch, tokens, heads, head_dim]; the same dtype comes out.

    Args:
        frequencies: [width / 2] radians per position; channels from `width` on are left as they are.
        start: int [] or [batch]: the first token's position, where it isn't 0.
        factor: what cosines and sines are multiplied by.
    """
    # computed, not a constant: XLA's folded cosines differ in the last bit from those of a program of any length
    positions = jnp.arange(x.shape[1], dtype=jnp.float32)
    if start is not None:
        positions = positions + start.astype(jnp.float32)[..., None]
    angles = positions[..., None] * frequencies
    angles = angles[None, :, None, :] if angles.ndim == 2 else angles[:, :, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if not isinstance(factor, float) or factor != 1.0:
        cos, sin = cos * jnp.float32(factor), sin * jnp.float32(factor)
    half = frequencies.shape[-1]
    turning, still = (x, None) if 2 * half == x.shape[-1] else (x[..., : 2 * half], x[..., 2 * half :])
    first, second = jnp.split(turning.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if still is None else jnp.concatenate([turned, still], axis=-1)
