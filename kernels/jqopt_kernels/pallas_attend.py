"""Decode attention on CUDA through Pallas: keys and values are decoded in the kernel, the length is split.

A program has one sequence, one kv head with all its query heads, and one part of the length (flash decoding): it walks
over its visible positions with a running softmax. The parts are then put together with their largest scores. With
bfloat16 queries both products run on tensor cores, the softmax's weights rounded to bfloat16 for the second; with
float32 queries nothing is rounded.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _pallas_weight as tiles
from . import decode
from ._operands import NT, unknown
from ._pallas import launch, load, no_place, power, program_id, span, steps, store
from ._types import Kernel, Operand, Packed, Shapes, as_is
from .attend import Attention, xla_attend
from .pallas_dot import PROGRAMS

POSITIONS = 64  # of a step
LEAST = -1e30  # in place of -inf, whose differences are NaN
NN = (((1,), (0,)), ((), ()))


class Plan(NamedTuple):
    """Static facts of one launch."""

    facts: Attention
    length: int
    group: int  # query heads of a kv head
    parts: int


class Side(NamedTuple):
    """Keys or values: arrays outside of the kernel and refs inside; None where there is nothing to read."""

    data: Any  # [batch, length, heads * bytes]
    scale: Any  # [batch, length, heads * scales]


def _tile(side: Side, spec: Operand, width: int, where: tuple, seen: jax.Array) -> tuple[list[jax.Array], Any]:
    """(planes [positions, width / planes] f32, padded to a power of two; a scale for each position or None)."""
    batch, head, at = where
    planes = decode.plane_count(spec.element)
    own, count = steps(width, planes), max(power(steps(width, planes)), 16)
    column = span(0, count)
    mask = seen[:, None] & (column < own)[None, :]
    codes = load(side.data, (batch, at[:, None], (head * own + column)[None, :]), mask)
    numbers = [decode.raw(c, spec.element) for c in decode.planes((codes,), spec.element)]
    unit = np.float32(decode.unit(spec.element))
    if side.scale is None:
        return [w * unit for w in numbers], None
    if spec.granularity == "channel":
        stored = load(side.scale, (batch, at, jnp.full_like(at, head)), seen)
        return [w * unit for w in numbers], stored.astype(jnp.float32)
    block = spec.block[1] if isinstance(spec.block, tuple) else spec.block
    assert block is not None
    held, blocks = steps(width, block), span(0, max(1, count * planes // block))
    stored = load(
        side.scale, (batch, at[:, None], (head * held + blocks)[None, :]), seen[:, None] & (blocks < held)[None, :]
    )
    scale = tiles.spread(decode.scales_by_bits(stored, spec.scale), count)
    return [w * unit * scale for w in numbers], None


def _queries(ref: Any, plan: Plan, batch: Any, head: Any) -> list[jax.Array]:
    """Planes [group, width / planes] of the queries of a kv head, padded as its keys are."""
    planes, width = decode.plane_count(plan.facts.k.element), plan.facts.width
    row, column = span(0, max(16, power(plan.group))), span(0, max(power(steps(width, planes)), 16))
    masks = [(row < plan.group)[:, None] & (column * planes + p < width)[None, :] for p in range(planes)]
    index = (head * plan.group + row)[:, None]
    return [load(ref, (batch, index, (column * planes + p)[None, :]), mask) for p, mask in enumerate(masks)]


def _dot(x: jax.Array, w: jax.Array, dims: Any, dtype: Any) -> jax.Array:
    precision = "highest" if dtype == jnp.float32 else None
    return lax.dot_general(
        x.astype(dtype), w.astype(dtype), dims, precision=precision, preferred_element_type=jnp.float32
    )


def _kernel(*refs: Any, plan: Plan, present: tuple[bool, ...]) -> None:
    given = iter(refs)
    q_ref, first, end, factor, *packed = (next(given) if here else None for here in present)
    assert q_ref is not None and first is not None and end is not None and factor is not None
    keys, values, facts = Side(*packed[:2]), Side(*packed[2:]), plan.facts
    out, top_ref, sum_ref = given
    batch, head, part = program_id(0), program_id(1), program_id(2)
    q, dtype = _queries(q_ref, plan, batch, head), q_ref.dtype
    low, high, scale = first[batch], end[batch], factor[0]

    def step(i: jax.Array, state: tuple) -> tuple:
        top, total, *acc = state
        at = span(i * POSITIONS, POSITIONS)
        seen = (at >= low) & (at < high)
        ks, k_scale = _tile(keys, facts.k, facts.width, (batch, head, at), seen)
        scores = functools.reduce(jnp.add, [_dot(x, w, NT, dtype) for x, w in zip(q, ks, strict=True)]) * scale
        scores = scores if k_scale is None else scores * k_scale[None, :]
        if facts.softcap is not None:
            scores = jnp.tanh(scores / np.float32(facts.softcap)) * np.float32(facts.softcap)
        scores = jnp.where(seen[None, :], scores, np.float32(LEAST))
        higher = jnp.maximum(top, scores.max(axis=1))
        e = jnp.where(seen[None, :], jnp.exp(scores - higher[:, None]), np.float32(0))
        fade = jnp.exp(top - higher)
        vs, v_scale = _tile(values, facts.v, facts.value_width, (batch, head, at), seen)
        weights = e if v_scale is None else e * v_scale[None, :]
        acc = [a * fade[:, None] + _dot(weights, v, NN, dtype) for a, v in zip(acc, vs, strict=True)]
        return higher, total * fade + e.sum(axis=1), *acc

    planes = decode.plane_count(facts.v.element)
    own = steps(facts.value_width, planes)
    group, columns = max(16, power(plan.group)), max(power(own), 16)
    each = steps(steps(plan.length, POSITIONS), plan.parts)
    start = jnp.maximum(part * each, lax.div(low, np.int32(POSITIONS)))
    stop = jnp.minimum((part + 1) * each, lax.div(high + np.int32(POSITIONS - 1), np.int32(POSITIONS)))
    zero = (jnp.full((group,), LEAST, jnp.float32), jnp.zeros((group,), jnp.float32))
    empty = tuple(jnp.zeros((group, columns), jnp.float32) for _ in range(planes))
    top, total, *acc = lax.fori_loop(start, stop, step, (*zero, *empty))
    row, column = span(0, group), span(0, columns)
    rows, here = head * plan.group + row, row < plan.group
    store(top_ref, (part, batch, rows), top, here)
    store(sum_ref, (part, batch, rows), total, here)
    for p, a in enumerate(acc):
        keep = here[:, None] & (column < own)[None, :]
        store(out, (part, batch, p, rows[:, None], column[None, :]), a, keep)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k: Packed, v: Packed, first, end, facts: Attention, out_dtype: Any) -> jax.Array:
    batch, length, kv_heads, _ = k.data.shape
    heads = q.shape[1]
    if 0 in (batch, heads, length):
        return jnp.zeros((batch, heads, facts.value_width), out_dtype)
    parts = max(1, min(PROGRAMS // (batch * kv_heads), steps(length, 4 * POSITIONS)))
    plan = Plan(facts, length, heads // kv_heads, parts)
    factor = jnp.float32(facts.scale) * _whole(k, facts.k)
    q = q if q.dtype == jnp.bfloat16 else q.astype(jnp.float32)
    first, end = jnp.clip(first, 0, length).astype(jnp.int32), jnp.clip(end, 0, length).astype(jnp.int32)
    operands = (q, first, end, factor.reshape(1), *_side(k, facts.k), *_side(v, facts.v))
    planes = decode.plane_count(facts.v.element)
    own = steps(facts.value_width, planes)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    shapes = (f32((parts, batch, planes, heads, own)), f32((parts, batch, heads)), f32((parts, batch, heads)))
    kernel = functools.partial(_kernel, plan=plan, present=tuple(a is not None for a in operands))
    given = [a for a in operands if a is not None]
    acc, top, total = launch(kernel, (batch, kv_heads, parts), shapes, given, warps=4, stages=2, name="pallas_attend")
    fade = jnp.exp(top - top.max(axis=0))
    total = (total * fade).sum(axis=0)
    y = (acc * fade[:, :, None, :, None]).sum(axis=0) / jnp.where(total == 0, 1, total)[:, None, :, None]
    y = jnp.moveaxis(y, 1, -1).reshape(batch, heads, -1)[:, :, : facts.value_width]
    return (y * _whole(v, facts.v)).astype(out_dtype)


def _forward(q, k, v, first, end, facts, out_dtype):
    return _attend(q, k, v, first, end, facts, out_dtype), (q, k, v, first, end)


def _backward(facts, out_dtype, kept, g):
    """Of the queries alone, in XLA's operations: keys and values are decoded, as for any gradient."""
    q, *others = kept
    _, back = jax.vjp(lambda q: xla_attend.run(q, *others, facts=facts, out_dtype=out_dtype), q)
    return *back(g), None, None, None, None


_attend.defvjp(_forward, _backward)


def _run(q, k: Packed, v: Packed, first, end, *, facts: Attention, out_dtype: Any = jnp.float32) -> jax.Array:
    return _attend(q, k, v, first, end, facts, jnp.dtype(out_dtype))


def _side(packed: Packed, spec: Operand) -> Side:
    """The last two axes as one, which moves nothing; a scale of the whole tensor stays outside (`_whole`)."""
    merged = [None if a is None else a.reshape(*a.shape[:2], -1) for a in (packed.data, packed.scale)]
    return Side(merged[0], None if spec.granularity == "tensor" else merged[1])


def _whole(packed: Packed, spec: Operand) -> jax.Array:
    """[] f32: what multiplies every key, or every value."""
    scale = jnp.float32(1) if packed.global_scale is None else packed.global_scale
    return scale * packed.scale.reshape(()) if spec.granularity == "tensor" and packed.scale is not None else scale


def _supports(lhs: Operand, rhs: Operand, device: str, shapes: Shapes) -> str | None:
    if lhs.element != "float":
        return f"lhs is {lhs.element}: queries are floats"
    if why := unknown(lhs, rhs) or tiles.unreadable(rhs):
        return why
    if rhs.zero_point or isinstance(rhs.block, tuple):
        return "zero points and 2-D blocks are not written for decode attention"
    if rhs.granularity == "block" and rhs.scale == "float32":
        return "float32 scales of blocks cannot go through bfloat16 products"
    if rhs.block is not None and shapes.k % rhs.block:
        return f"width {shapes.k} is not a multiple of the block, {rhs.block}"
    return no_place(device, shapes.groups * shapes.n * steps(shapes.k, decode.plane_count(rhs.element)))


pallas_attend = Kernel("pallas_attend", "attend", _supports, as_is, _run, backend="pallas")
