"""Which scales a plan's weights and activations have, which of them can be learned, and where they start."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jqopt import _numerics, _quantize
from jqopt._plan import Decision, Plan
from jqopt._qtensor import QTensor
from jqopt.errors import UnsupportedError
from jqopt.train import _straight
from jqopt.train._simulated import learnable


def weight_owners(plan: Plan) -> dict[str, str]:
    """{path: the path whose learned scales it has}: weights that share one scale of the tensor learn one.

    Raises:
        UnsupportedError: a format whose scales can't be learned.
    """
    lead: dict[Any, str] = {}
    out = {}
    for path, d in plan.quantized.items():
        assert d.layout is not None, path
        if d.format.zero_point:
            raise UnsupportedError(
                f"{path}: {d.format.name} has zero points, and its scales can't be learned; use a symmetric format, or "
                "learn_scales=False"
            )
        stack = tuple(d.layout.atoms[i] for i in d.layout.stack)
        out[path] = lead.setdefault((d.fused or d.key, stack), path) if one_scale(d) else path
    return out


def one_scale(d: Decision) -> bool:
    """Has the weight one scale for the tensor, and none for smaller parts?"""
    return d.granularity == "tensor" and not d.format.global_scale


def input_owners(plan: Plan) -> dict[str, str]:
    """{path: the path whose learned input scale it has}: parameters that read one activation learn one.

    Raises:
        UnsupportedError: there is none.
    """
    owner = {p: p for p, d in plan.quantized.items() if learnable(d.input_format)}
    if not owner:
        raise UnsupportedError(
            "learn_scales: no activation has one static scale for the tensor (blocks, tokens and dynamic inputs find "
            "theirs live); write learn_scales='weights'"
        )
    lead: dict[str, str] = {}
    for d in plan.decisions:
        if d.group and d.path in owner:
            mine, first = owner[d.path], owner[lead.setdefault(d.group, d.path)]
            owner = {p: first if o == mine else o for p, o in owner.items()}
    return owner


def first_weight_amax(plan: Plan, found: Mapping[str, jax.Array], owners: Mapping[str, str]) -> dict[str, jax.Array]:
    """The amax of each tile [*stack, rows, cols] as the plan's algorithm finds it, by owner."""
    shared = _quantize.group_amax(plan, found)
    out: dict[str, jax.Array] = {}
    for path in dict.fromkeys(owners.values()):
        d = plan.quantized[path]
        if d.algorithm[-1].name != "max":
            out[path] = saturation(packed(d, found[path], shared.get(path)))
        elif one_scale(d):
            out[path] = shared[path][..., None, None]
        else:
            assert d.layout is not None, path
            out[path] = _numerics.amax_of(tiles(d.layout.to_matrix(found[path]), d), (-3, -1))
    return out


def packed(d: Decision, w: jax.Array, tensor_amax: jax.Array | None) -> QTensor:
    """A weight as the plan's algorithm, which needs no data, packs it; without an input scale."""
    return _quantize.solve(dataclasses.replace(d, input=None), w, tensor_amax)


def tiles(matrix: jax.Array, d: Decision) -> jax.Array:
    """A matrix [*stack, n, k] as float32 tiles [*stack, rows, r, cols, c]."""
    n, k = matrix.shape[-2:]
    return _numerics.to_tiles(matrix.astype(jnp.float32), d.format.tile_for(n, k, d.granularity))


def saturation(tensor: QTensor) -> jax.Array:
    """The largest value of each tile that its scale holds, [*stack, rows, cols]."""
    codes = _numerics.Codes(tensor.data, tensor.scale, tensor.global_scale, tensor.zero_point)
    return _straight.tile_scales(codes, tensor.format) * tensor.format.element.max


def within(matrix: jax.Array, amax: jax.Array, d: Decision) -> jax.Array:
    """Which values of a matrix [*stack, n, k] lie within the amax of their tile."""
    inside = jnp.abs(tiles(matrix, d)) <= _numerics.spread(amax)
    return _numerics.from_tiles(inside, *matrix.shape[-2:])
