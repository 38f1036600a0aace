"""Generating text: greedy, by temperature or top-p; with a float or a quantized decoder; plain or packed cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jqopt import _apply
from jqopt._apply import Quantized
from jqopt._plan import Plan
from jqopt.errors import UnsupportedError
from jqopt.hf.decode import Drawn, Step, greedy, init_cache, loop, step_of


class Generated(NamedTuple):
    """New tokens int32 [batch, max_new_tokens], `pad` after the end of a row; how many there are, int32 [batch]."""

    tokens: jax.Array
    lengths: jax.Array


def generate(
    module: Any,
    model: Any,
    ids: Any,
    *,
    max_new_tokens: int,
    lengths: Any = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos: int | Sequence[int] | None = None,
    pad: int = 0,
    cache: Any = "model",
) -> Generated:
    """New tokens after each row of ids: one jitted program of a prefill and a loop, compiled once for its shapes.

    Args:
        module: a decoder of `jqopt.hf` (`load_model`), layers unrolled or in a scan.
        model: its variables, or the quantized model (`jqopt.quantize_model(module, ...)`, `jqopt.load(dir, module)`).
        ids: int [batch, tokens]. Shorter rows are padded on their right; `lengths` int [batch] says how long they are.
        temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
        top_p: of the likeliest tokens, as few as have this probability together are drawn from.
        seed: of the draws; the same seed gives the same tokens.
        eos: token or tokens after which a row ends; it is the row's last.
        cache: how keys and values are held: None as they are, or a spec as `jqopt.kv_cache.init` takes it ("fp8" with
            "scaling": "cast", ...). "model": as the quantized model's recipe says in `kv_cache`, else as they are.

    Raises:
        UnsupportedError: an argument out of range, a recipe that quantizes attention's q or p, more tokens than the
            model has positions for, or a longrope model whose frequencies would change on the way.
    """
    ids = jnp.asarray(ids, jnp.int32)
    _check(module, ids, lengths, max_new_tokens, temperature, top_p)
    ends = () if eos is None else tuple(int(e) for e in np.atleast_1d(np.asarray(eos)))
    plan, tree, spec, scales = _parts(model, cache)
    held = init_cache(module, ids.shape[0], ids.shape[1] + max_new_tokens - 1, spec, scales=scales)
    run = _compiled(_Key(module, plan), max_new_tokens, temperature > 0, top_p < 1, ends, pad)
    rows = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    settings = (jnp.float32(temperature or 1), jnp.float32(top_p), jax.random.key(seed))
    drawn = run(tree, held, ids, rows, settings)
    return Generated(drawn.tokens, drawn.lengths)


def _parts(model: Any, cache: Any) -> tuple[Plan | None, Any, Any, Any]:
    """(plan or None, tree, spec of the cache, its calibrated scales) of variables or of a quantized model."""
    if not hasattr(model, "plan"):
        return None, model, None if cache == "model" else cache, None
    asked = model.plan.recipe.operands
    wrong = sorted(set(asked) & {"q", "p"})
    if wrong and cache == "model":
        raise UnsupportedError(
            f"recipe {model.plan.recipe.name!r} quantizes {' and '.join(wrong)} of attention, which decoding over a "
            "cache computes in float. Pass cache= with what keys and values are to be held in, to leave them float"
        )
    if cache != "model":
        return model.plan, model.quant, cache, model.quant.attention
    return model.plan, model.quant, asked.get("k"), model.quant.attention


def _check(module: Any, ids: jax.Array, lengths: Any, new: int, temperature: float, top_p: float) -> None:
    if ids.ndim != 2 or not ids.shape[1]:
        raise UnsupportedError(f"ids have shape {list(ids.shape)}; expected [batch, tokens] with at least one token")
    if new < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise UnsupportedError(
            f"max_new_tokens {new}, temperature {temperature}, top_p {top_p}: expected at least 1, at least 0, and "
            "more than 0 up to 1"
        )
    rows = np.full(ids.shape[0], ids.shape[1]) if lengths is None else np.asarray(lengths)
    if rows.shape != ids.shape[:1] or rows.min() < 1 or rows.max() > ids.shape[1]:
        raise UnsupportedError(f"lengths {rows.tolist()}: expected one number for each row, from 1 to {ids.shape[1]}")
    rope = getattr(module.config, "rope", None)
    switch = None if rope is None else rope().switch
    total = ids.shape[1] + new
    if switch is not None and rows.min() <= switch < total:
        raise UnsupportedError(
            f"this model turns keys by other frequencies beyond {switch} tokens (longrope), so that those in the cache "
            f"would be wrong: rows of {rows.min()} tokens and {new} new ones cross it. Write max_new_tokens="
            f"{max(switch - ids.shape[1], 0)}, or prompts of more than {switch} tokens"
        )


# --------------------------------------------------------------------------------------------- the program


@dataclasses.dataclass(frozen=True, eq=False)
class _Key:
    """A module with its plan, told from others by which plan object it is: what a program is compiled for."""

    module: Any
    plan: Plan | None

    def __hash__(self) -> int:
        return hash((self.module, id(self.plan)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.module == other.module and self.plan is other.plan


@functools.lru_cache(maxsize=16)
def _compiled(
    key: _Key, new: int, sampled: bool, nucleus: bool, ends: tuple[int, ...], pad: int
) -> Callable[..., Drawn]:
    @jax.jit
    def run(tree: Any, cache: Any, ids: jax.Array, lengths: jax.Array | None, settings: tuple) -> Drawn:
        step = _step(key.module, key.plan, tree, ids.shape[1] + new)
        choose = functools.partial(_draw, settings, nucleus) if sampled else greedy
        return loop(step, cache, ids, lengths, new, choose, ends, pad)

    return run


def _step(module: Any, plan: Plan | None, tree: Any, length: int) -> Step:
    if plan is None:
        return step_of(module, tree, length)

    def call(variables: Any, cache: Any, ids: jax.Array, position: jax.Array, last: jax.Array) -> Any:
        return step_of(module, variables, length)(cache, ids, position, last)

    # The plan's decisions are by parameter: they hold for this function of the same tree as for the whole pass. What
    # it decides about keys and values the cache does.
    stepping = dataclasses.replace(plan, function=plan.function._replace(call=call), attention=())
    return functools.partial(_apply.apply(stepping), Quantized(tree.params))


def _draw(settings: tuple, nucleus: bool, logits: jax.Array, number: jax.Array) -> jax.Array:
    """A token of each row, drawn from its logits [batch, vocab_size]."""
    temperature, top_p, key = settings
    scaled = logits / temperature
    if nucleus:
        scaled = jnp.where(likeliest(scaled, top_p), scaled, -jnp.inf)
    return jax.random.categorical(jax.random.fold_in(key, number), scaled)


def likeliest(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Which tokens top-p keeps, bool as logits [..., vocab]: the likeliest ones before which less than top_p lies."""
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return jnp.take_along_axis(before, jnp.argsort(order, axis=-1), axis=-1) < top_p
