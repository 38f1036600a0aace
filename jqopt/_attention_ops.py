"""Attention's operands in numbers: statistics, scales and biases, and quantizing them where products read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jqopt import _hadamard, _jaxpr, _numerics, _ops
from jqopt._attention import ByRole, OperandDecision, Product, by_key
from jqopt.analysis.attention import Operand
from jqopt.errors import CalibrationError, PlanError

Scales = dict[str, jax.Array]
"""Of one attention: `k_scale` [*layers], `k_bias` [*layers, *heads, d], ..., float32."""


class Seen(NamedTuple):
    """What calibration has seen of one operand, [*layers, *channels] (channels only where there is a bias)."""

    low: jax.Array
    high: jax.Array
    total: jax.Array
    seen: jax.Array  # [*layers]: values per channel


# ---------------------------------------------------------------------------------------------- statistics


def initial(decisions: Iterable[OperandDecision]) -> dict[str, dict[str, Seen]]:
    """Statistics before any data: {attention: {role: Seen}}, of those that need data."""
    return {
        key: found
        for key, roles in by_key(decisions).items()
        if (found := {role: _initial(d) for role, d in roles.items() if d.needs_data})
    }


def _initial(d: OperandDecision) -> Seen:
    shape = (*d.outer, *d.channels)
    low, high = (jnp.full(shape, limit, jnp.float32) for limit in (np.inf, -np.inf))
    return Seen(low, high, jnp.zeros(shape, jnp.float32), jnp.zeros(d.outer, jnp.float32))


def observe(
    product: Product, decisions: ByRole, values: Sequence[jax.Array], seen: Mapping[str, Seen]
) -> dict[str, Seen]:
    """The statistics with this product's operands added (as rotated, where they are)."""
    out = dict(seen)
    for operand in product.operands:
        if operand.role in out:
            x = _rotated(values[operand.operand], operand, decisions[operand.role])
            out[operand.role] = _add(out[operand.role], x, operand, decisions[operand.role])
    return out


def _add(seen: Seen, x: jax.Array, operand: Operand, d: OperandDecision) -> Seen:
    kept = (*operand.heads, *operand.channels) if d.channels else ()
    rows = x.astype(jnp.float32).transpose([*(i for i in range(x.ndim) if i not in kept), *kept])
    rows = rows.reshape(-1, *d.channels)
    low, high = jnp.minimum(seen.low, rows.min(0, initial=np.inf)), jnp.maximum(seen.high, rows.max(0, initial=-np.inf))
    return Seen(low, high, seen.total + rows.sum(0), seen.seen + np.float32(rows.shape[0]))


def allreduce(before: Mapping[str, Seen], after: Mapping[str, Seen], axes: tuple[str, ...]) -> dict[str, Seen]:
    """The statistics of all devices of a shard_map, from those of each."""

    def whole(b: Seen, a: Seen) -> Seen:
        total, seen = (x + lax.psum(y - x, axes) for x, y in ((b.total, a.total), (b.seen, a.seen)))
        return Seen(lax.pmin(a.low, axes), lax.pmax(a.high, axes), total, seen)

    return {role: whole(before[role], after[role]) for role in after}


def check(decisions: Iterable[OperandDecision], stats: Mapping[str, Any]) -> None:
    """Every operand that needs data must have seen some, all of it finite.

    Raises:
        CalibrationError: naming the operands.
    """
    wanted = [(d, stats.get(d.key, {}).get(d.role)) for d in decisions if d.needs_data]
    missing = [f"{d.key} ({d.role})" for d, s in wanted if s is None or not np.all(np.asarray(s.seen) > 0)]
    if missing:
        raise CalibrationError(
            f"no data reached these operands of attention: {', '.join(missing)}. Call jqopt.calibrate with batches "
            "that reach them, or write `scaling: dynamic` or `scaling: cast`."
        )
    bad = [f"{d.key} ({d.role})" for d, s in wanted if s is not None and not np.all(np.isfinite(np.asarray(s.total)))]
    if bad:
        raise CalibrationError(f"these operands of attention hold NaN or inf: {', '.join(bad)}. Look at the batches.")


def solve(decisions: Sequence[OperandDecision], stats: Mapping[str, Any] | None) -> dict[str, Scales]:
    """Scales and biases of every attention that has some.

    Raises:
        CalibrationError: an operand needs statistics, and there are none.
    """
    if any(d.needs_data for d in decisions) and not any(
        isinstance(x, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue] (public, but not in the stubs)
        for x in jax.tree.leaves(stats)
    ):
        check(decisions, stats or {})
    out: dict[str, Scales] = {}
    for d in decisions:
        found = _solved(d, None if stats is None else stats.get(d.key, {}).get(d.role))
        if found:
            out.setdefault(d.key, {}).update({f"{d.role}_{name}": x for name, x in found.items()})
    return out


def _solved(d: OperandDecision, seen: Seen | None) -> Scales:
    out: Scales = {}
    bias = None
    if d.affine:
        assert seen is not None, d.key
        counts = seen.seen.reshape(*seen.seen.shape, *[1] * len(d.channels))
        out["bias"] = bias = seen.total / counts
    if d.spec is None or not d.has_scale:
        return out
    if d.spec.scaling == "cast":
        return {**out, "scale": jnp.ones(d.outer, jnp.float32)}
    format = d.spec.element_format()
    if d.bounded:
        return {**out, "scale": _numerics.scale_from_amax(jnp.ones(d.outer, jnp.float32), format)}
    assert seen is not None, d.key
    low, high = (seen.low, seen.high) if bias is None else (seen.low - bias, seen.high - bias)
    each = jnp.maximum(jnp.abs(low), jnp.abs(high))
    amax = each.max(tuple(range(len(d.outer), each.ndim)))
    return {**out, "scale": _numerics.scale_from_amax(amax, format)}


# ----------------------------------------------------------------------------------------------- execution


def fields(d: OperandDecision) -> dict[str, tuple[int, ...]]:
    """The arrays that a quantized model keeps for an operand, with their shapes."""
    out = {f"{d.role}_scale": d.outer} if d.has_scale else {}
    return {**out, f"{d.role}_bias": (*d.outer, *d.channels)} if d.affine else out


def check_scales(decisions: Iterable[OperandDecision], scales: Mapping[str, Any]) -> None:
    """A quantized model must hold what its plan says of attention.

    Raises:
        PlanError: naming what is missing or of another shape.
    """
    for d in decisions:
        for name, shape in fields(d).items():
            found = scales.get(d.key, {}).get(name)
            if found is None or tuple(found.shape) != tuple(shape):
                what = "nothing" if found is None else f"shape {tuple(found.shape)}"
                raise PlanError(
                    f"{d.key}: the plan quantizes {d.role} of this attention, which takes {name} of shape "
                    f"{tuple(shape)}; found {what}. Pass the whole of what jqopt.quantize(plan, params, stats) "
                    "returned (a Quantized: parameters and `attention`), not its parameters alone."
                )


def run(product: Product, decisions: ByRole, eqn: Any, values: Sequence[Any], scales: Scales) -> jax.Array:
    """The product with its operands quantized and dequantized; gradients go straight through."""
    operands = list(map(_jaxpr.dense, values))
    for operand in product.operands:
        d = decisions[operand.role]
        turned = _rotated(operands[operand.operand], operand, d)
        operands[operand.operand] = _quantized(turned, operand, d, scales)
    return _jaxpr.bind(eqn, operands)[0]


def _along(x: jax.Array, channels: Sequence[int], change: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """`change` of x as rows [n, k] of its channels, back in x's shape and dtype."""
    keep = [i for i in range(x.ndim) if i not in channels]
    order = [*keep, *channels]
    moved = x.transpose(order)
    width = int(np.prod([x.shape[i] for i in channels]))
    back = sorted(range(x.ndim), key=order.__getitem__)
    return change(moved.reshape(-1, width)).reshape(moved.shape).transpose(back).astype(x.dtype)


def _rotated(x: jax.Array, operand: Operand, d: OperandDecision) -> jax.Array:
    return _along(x, operand.channels, _hadamard.rotate) if d.rotated else x


def _quantized(x: jax.Array, operand: Operand, d: OperandDecision, scales: Scales) -> jax.Array:
    spec = d.input_format
    if spec is None:
        return x
    scale = scales.get(f"{d.role}_scale")
    bias = _spread(scales[f"{d.role}_bias"], x, operand) if d.affine else None
    centered = x if bias is None else x.astype(jnp.float32) - bias
    got = _along(centered, operand.channels, lambda rows: _ops.quantize_input(rows, spec, scale))
    return (got if bias is None else got + bias).astype(x.dtype)


def _spread(bias: jax.Array, x: jax.Array, operand: Operand) -> jax.Array:
    """A bias [*heads, *channels] as it meets x."""
    axes = (*operand.heads, *operand.channels)
    order = sorted(range(len(axes)), key=axes.__getitem__)
    return lax.broadcast_in_dim(bias.transpose(order), x.shape, [axes[i] for i in order])
