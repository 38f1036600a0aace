"""The algebra of axes: splitting, cutting, unifying; and random programs, whose functions permutations must keep."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt
from jqopt.analysis import axes as ax


def leaf_sizes(node) -> list[int]:
    return [p.leaf.size for p in ax.places(node)]


def test_reshape_splits_an_axis_into_factors_and_joins_them_again():
    (d,) = ax.axes([24])
    heads = ax.reshape((d,), [4, 6])
    assert ax.text(d) == "4 x 6" and [ax.find(a).size for a in heads] == [4, 6]
    (back,) = ax.reshape(heads, [24])
    ax.unify(back, d)
    assert ax.text(d) == "4 x 6" and not any(p.leaf.pins for p in ax.places(d))


def test_refinements_meet():
    a, b = ax.fresh(24), ax.fresh(24)
    ax.split(a, 6), ax.split(b, 12)
    ax.unify(a, b)
    assert ax.text(a) == ax.text(b) == "2 x 2 x 6"
    assert [p.leaf for p in ax.places(a)] == [p.leaf for p in ax.places(b)]


def test_structures_without_common_parts_are_pinned():
    a, b = ax.fresh(6), ax.fresh(6)
    ax.split(a, 3), ax.split(b, 2)
    ax.unify(a, b)
    assert ax.is_pinned(a) and ax.is_pinned(b)
    assert "2 x 3 and 3 x 2" in str(next(ax.leaves(a)).pins[0].pin())


def test_only_the_part_of_a_reshape_that_does_not_factor_is_pinned():
    batch, a, b, last = ax.axes([5, 4, 6, 7])
    out = ax.reshape((batch, a, b, last), [5, 3, 8, 7])
    assert ax.find(out[0]) is ax.find(batch) and ax.find(out[3]) is ax.find(last)
    assert not ax.is_pinned(batch) and not ax.is_pinned(last)
    assert ax.is_pinned(a) and ax.is_pinned(b) and ax.is_pinned(out[1]) and ax.is_pinned(out[2])


def test_slices_cut_segments_and_concatenation_puts_them_together():
    d = ax.fresh(40)
    parts = [ax.piece(d, s, n) for s, n in ((0, 20), (20, 10), (30, 10))]
    assert ax.text(d) == "[20 | 10 | 10]"
    again = ax.concat(parts)
    ax.unify(again, d)
    assert ax.text(again) == "[20 | 10 | 10]" and not ax.is_pinned(d)


def test_a_concatenation_splits_when_its_segments_do():
    d = ax.concat([ax.fresh(16), ax.fresh(8)])
    outer, inner = ax.split(d, 4)
    assert ax.text(d) == "[4 | 2] x 4" and ax.text(outer) == "[4 | 2]" and ax.find(inner).size == 4
    other = ax.fresh(24)
    ax.unify(other, d)
    assert ax.text(other) == "[4 | 2] x 4"


def test_segments_inside_a_factor():
    d = ax.product([ax.fresh(3), ax.fresh(10)])  # three groups, each [4 | 6]
    grouped = ax.reshape((d,), [3, 10])
    ax.piece(grouped[1], 4, 6)
    assert ax.text(d) == "3 x [4 | 6]"
    six = [p for p in ax.places(d) if p.leaf.size == 6]
    assert [(p.start, p.stride, p.segment, p.trail) for p in six] == [(4, 1, (4, 6), ".1:1")]


def test_an_axis_against_itself_shifted_is_pinned():
    whole = ax.fresh(6)
    ax.unify(ax.piece(whole, 0, 5), ax.piece(whole, 1, 5))
    assert ax.is_pinned(whole)


def test_select_reads_the_structure():
    first, second = ax.fresh(3), ax.fresh(2)
    axis = ax.concat([ax.product([first, ax.fresh(2)]), second, first])  # [3 x 2 | 2 | 3]
    chosen = np.array([2, 0])
    got = ax.select(axis, lambda node: chosen if node is first else None)
    assert got.tolist() == [4, 5, 0, 1, 6, 7, 10, 8]


def test_what_is_said_of_an_axis_is_said_of_what_it_becomes():
    a, b = ax.fresh(6), ax.fresh(6)
    ax.pin(a, "why")
    ax.split(b, 3)
    ax.unify(a, b)
    assert all(leaf.pins[0].reason == "why" for leaf in ax.leaves(b))


# --------------------------------------------------------------------------------------------- random programs

SIZES = (2, 3, 4, 6, 8)


class Program:
    """A random function of parameters: rearrangements, products and pointwise operations, then one number.

    It runs on JAX arrays to be traced, and on NumPy arrays, fast and in double precision, to be compared.
    """

    def __init__(self, seed: int):
        self.seed = seed
        shapes: list[tuple[int, ...]] = []
        self._run(np, lambda shape: shapes.append(tuple(shape)) or np.zeros(shape))
        self.params = {f"p{i}": np.random.default_rng([seed, i]).normal(size=s) for i, s in enumerate(shapes)}

    def __call__(self, params: dict) -> Any:
        left = iter(params.values())
        xp = np if all(isinstance(p, np.ndarray) for p in params.values()) else jnp
        return self._run(xp, lambda shape: next(left))

    def _run(self, xp: Any, new: Callable) -> Any:
        """`new(shape)` gives the next parameter; the same choices are made whatever the values are."""
        rng = np.random.default_rng(self.seed)
        x = new(tuple(rng.choice(SIZES, 2)))
        for _ in range(7):
            step = rng.choice(["reshape", "transpose", "slice", "concat", "add", "dot", "repeat", "halves"])
            x = xp.tanh(getattr(self, "_" + step)(xp, x, rng, new))
        return xp.sum(xp.sin(x))

    def _reshape(self, xp, x, rng, new):
        n = math.prod(x.shape)
        shape = []
        while n > 1 and len(shape) < 3:
            shape.append(int(rng.choice([d for d in range(2, n + 1) if n % d == 0])))
            n //= shape[-1]
        return x.reshape(*shape, n)

    def _transpose(self, xp, x, rng, new):
        return x.transpose([int(i) for i in rng.permutation(x.ndim)])

    def _slice(self, xp, x, rng, new):
        axis = int(rng.integers(x.ndim))
        start = int(rng.integers(max(x.shape[axis] // 2, 1)))
        return x[(slice(None),) * axis + (slice(start, None),)]

    def _concat(self, xp, x, rng, new):
        axis = int(rng.integers(x.ndim))
        shape = list(x.shape)
        shape[axis] = int(rng.choice(SIZES))
        return xp.concatenate([x, new(shape)], axis)

    def _add(self, xp, x, rng, new):
        return x + new([n if rng.random() < 0.7 else 1 for n in x.shape])

    def _dot(self, xp, x, rng, new):
        axis, n = int(rng.integers(x.ndim)), int(rng.choice(SIZES))
        return xp.tensordot(x, new((x.shape[axis], n)), axes=[[axis], [0]])

    def _repeat(self, xp, x, rng, new):
        return xp.repeat(x, 2, axis=int(rng.integers(x.ndim))) if x.size < 2000 else x

    def _halves(self, xp, x, rng, new):
        axis = int(rng.integers(x.ndim))
        if x.shape[axis] % 2:
            return x
        a, b = xp.split(x, 2, axis)
        return a * b


@pytest.mark.parametrize("start", range(0, 120, 20))
def test_permuting_a_class_of_a_random_program_keeps_its_function(start):
    moved = 0
    for seed in range(start, start + 20):
        program = Program(seed)
        shapes = {k: jax.ShapeDtypeStruct(v.shape, jnp.float32) for k, v in program.params.items()}
        graph = jqopt.trace(program, shapes)
        want = program(program.params)
        for c in (c for c in graph.classes if c.permutable):
            order = np.random.default_rng(seed).permutation(c.size)
            got = program(jqopt.transforms.permute(graph, c, order)(program.params))
            assert got == pytest.approx(want, rel=1e-9, abs=1e-9), (seed, c.name)
            moved += 1
    assert moved > 20  # most programs leave something that may be permuted
