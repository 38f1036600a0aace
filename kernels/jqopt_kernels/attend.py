"""Decode attention over packed keys and values: the oracle of the op "attend", and its XLA form.

One query token a sequence: q [batch, heads, width] over keys [batch, length, kv heads, bytes] and values alike, as
`Packed`; query head j reads kv head j // (heads // kv heads). Position s is visible where first <= s < end, [batch]
each; a sequence that sees none gives zeros. Scores are q . k * scale, or softcap * tanh(that / softcap).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import reference
from ._gradient import weight_values
from ._operands import fits_bf16, unknown
from ._types import Kernel, Operand, Packed, Shapes, as_is


class Attention(NamedTuple):
    """Static facts of one decode attention: how keys and values are packed, their widths, what scores become."""

    k: Operand
    v: Operand
    width: int
    value_width: int
    scale: float
    softcap: float | None = None


def rows(packed: Packed) -> Packed:
    """[batch, length, heads, ...] -> [rows, ...]: a token's head as a row of a matrix."""
    flat = packed.data.reshape(-1, packed.data.shape[-1])
    scale, zero = (
        a.reshape(flat.shape[0], -1) if a is not None and a.ndim == 4 else a for a in (packed.scale, packed.zero_point)
    )
    return packed._replace(data=flat, scale=scale, zero_point=zero)


def softmax(scores: jax.Array, facts: Attention, seen: jax.Array) -> jax.Array:
    """Weights of scores [batch, kv heads, group, length], f32; zero for sequences that see nothing."""
    scores = scores * jnp.float32(facts.scale)
    if facts.softcap is not None:
        scores = jnp.tanh(scores / jnp.float32(facts.softcap)) * jnp.float32(facts.softcap)
    scores = jnp.where(seen, scores, -jnp.inf)  # before exp, which may be infinite there: zero times it is NaN
    e = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, initial=-1e30)))
    total = e.sum(axis=-1, keepdims=True)
    return e / jnp.where(total == 0, 1, total)


def _attention(decode: Callable[..., jax.Array], narrow: Callable[..., bool]):
    def run(q, k: Packed, v: Packed, first, end, *, facts: Attention, out_dtype=jnp.float32) -> jax.Array:
        batch, length, heads, _ = k.data.shape
        if 0 in (batch, length, heads, q.shape[1]):
            return jnp.zeros((*q.shape[:2], facts.value_width), out_dtype)
        exact = [jnp.bfloat16 if narrow(q, spec) else jnp.float32 for spec in (facts.k, facts.v)]
        kd, vd = (
            decode(rows(packed), spec, batch * length * heads, width).reshape(batch, length, heads, width).astype(to)
            for packed, spec, width, to in (
                (k, facts.k, facts.width, exact[0]),
                (v, facts.v, facts.value_width, exact[1]),
            )
        )
        at = jnp.arange(length, dtype=jnp.int32)
        seen = (at >= first[:, None]) & (at < end[:, None])
        kd, vd = (jnp.where(seen[:, :, None, None], x, 0) for x in (kd, vd))  # zero times NaN is NaN
        grouped = q.reshape(batch, heads, -1, facts.width).astype(exact[0])
        options = {"precision": "highest", "preferred_element_type": jnp.float32}
        scores = jnp.einsum("bhgd,blhd->bhgl", grouped, kd, **options)
        weights = softmax(scores, facts, seen[:, None, None, :]).astype(exact[1])
        y = jnp.einsum("bhgl,blhd->bhgd", weights, vd, **options)
        return y.reshape(batch, -1, facts.value_width).astype(out_dtype)

    return run


def _supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if lhs.element != "float":
        return f"lhs is {lhs.element}: queries are floats"
    return unknown(lhs, rhs)


def _narrow(q: jax.Array, spec: Operand) -> bool:
    """Whether a bfloat16 product with q loses nothing of the keys; weights of the softmax are then bfloat16 too."""
    return q.dtype == jnp.bfloat16 and fits_bf16(spec) and spec.granularity == "block"


reference_attend = Kernel(
    "reference",
    "attend",
    _supports,
    as_is,
    _attention(reference.dequantize, lambda q, spec: False),
    backend="reference",
)
xla_attend = Kernel("xla_attend", "attend", _supports, as_is, _attention(weight_values, _narrow))
