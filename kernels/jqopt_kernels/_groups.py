"""Rows in groups: which rows an expert has, and how tiles of rows that never cross a group are laid out."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._types import Operand, Packed


class Tiles(NamedTuple):
    """Tiles of at most `rows` rows; all int32 [bound], of which the first `count` [] have any."""

    group: jax.Array
    first: jax.Array
    end: jax.Array
    count: jax.Array


def ends(sizes: jax.Array, m: int) -> jax.Array:
    """[groups] int32: where each group's rows end. Sizes below zero count as zero, and none reaches beyond m."""
    return jnp.minimum(jnp.cumsum(jnp.clip(sizes.astype(jnp.int32), 0, m)), m)


def group_of_row(sizes: jax.Array, m: int) -> tuple[jax.Array, jax.Array]:
    """([m] int32 the group of each row, [m] whether it has one: rows behind the last group have none)."""
    last = ends(sizes, m)
    row = jnp.arange(m, dtype=jnp.int32)
    group = jnp.sum((row[:, None] >= last).astype(jnp.int32), axis=1)
    return jnp.minimum(group, sizes.shape[0] - 1), row < last[-1]


def tiled(sizes: jax.Array, m: int, rows: int) -> Tiles:
    """The tiles of every group in turn: at most m // rows + the number of groups that have rows."""
    last = ends(sizes, m)
    first = jnp.concatenate([jnp.zeros((1,), jnp.int32), last[:-1]])
    tiles = (last - first + (rows - 1)) // rows
    until = jnp.cumsum(tiles)
    number = jnp.arange(m // rows + min(m, sizes.shape[0]), dtype=jnp.int32)
    group = jnp.minimum(jnp.sum((number[:, None] >= until).astype(jnp.int32), axis=1), sizes.shape[0] - 1)
    start = first[group] + (number - (until - tiles)[group]) * rows
    there = number < until[-1]
    end = jnp.minimum(last[group], start + rows)
    return Tiles(group, jnp.where(there, start, 0), jnp.where(there, end, 0), until[-1])


def expert(rhs: Packed, index: jax.Array) -> Packed:
    """One expert's weight of a stack of them."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), rhs)


def only_float(lhs: Operand) -> str | None:
    """Why the left operand is refused."""
    return None if lhs.element == "float" else f"lhs is {lhs.element}: grouped products take float activations"
