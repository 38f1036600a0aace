"""Calibrators by name: every one under jit, scan, vmap and a mesh; means, headroom; options that teach."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqopt import formats
from jqopt.algorithms import calibrators, headroom
from jqopt.errors import PlanError

INT8, FP8, NVFP4 = (formats.get(name) for name in ("int8", "fp8", "nvfp4"))
EVERY = {
    "max": (INT8, {}), "percentile": (INT8, {"percentile": 99.0}), "entropy": (INT8, {}), "mse": (FP8, {}),
    "mean": (FP8, {}), "headroom": (NVFP4, {"rho": 100.0}),
}  # fmt: skip


def made(name: str) -> calibrators.Calibrator:
    format, options = EVERY[name]
    return calibrators.get(name, format, **options)


def gathered(c: calibrators.Calibrator, *batches) -> Any:
    state, update = c.init(batches[0].shape[-1]), jax.jit(c.update)
    for batch in batches:
        state = update(state, jnp.asarray(batch, jnp.float32))
    return state


def same(a, b) -> bool:
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


# What all keep to ---------------------------------------------------------------------------------------------------


def test_the_table_is_tested_whole():
    assert sorted(EVERY) == calibrators.names() == sorted(calibrators.CALIBRATORS)


@pytest.mark.parametrize("name", EVERY)
def test_contract(name):
    """One number under jit, scan over batches and vmap over layers; between 0 and the amax, headroom apart."""
    c = made(name)
    x = np.random.default_rng(0).standard_t(3, (2, 3, 32, 48)).astype(np.float32)
    layers = [gathered(c, *layer) for layer in x]
    scanned = lambda x: jax.lax.scan(lambda s, b: (c.update(s, b), None), c.init(48), x)[0]  # noqa: E731
    stacked = jax.jit(jax.vmap(scanned))(jnp.asarray(x))
    amax = jax.jit(jax.vmap(c.amax))(stacked)
    assert amax.shape == (2,) and amax.dtype == jnp.float32
    for i, state in enumerate(layers):
        assert same(jax.tree.map(lambda s, i=i: s[i], stacked), state)
        assert float(jax.jit(c.amax)(state)) == pytest.approx(float(amax[i]), rel=1e-6)
        assert float(state.amax) == np.abs(x[i]).max() and float(state.seen) == 1
        assert float(amax[i]) > 0 and (name == "headroom" or float(amax[i]) <= np.abs(x[i]).max())


@pytest.mark.parametrize("name", EVERY)
def test_zeros_and_what_is_not_finite(name):
    c = made(name)
    assert float(c.init(16).seen) == 0
    assert float(c.amax(gathered(c, np.zeros((4, 16))))) == 0
    for bad in (np.nan, np.inf):
        state = gathered(c, np.ones((2, 16)), np.full((1, 16), bad), np.ones((2, 16)))
        assert np.array_equal(state.amax, np.float32(bad), equal_nan=True)
        assert np.array_equal(jax.jit(c.amax)(state), np.float32(bad), equal_nan=True)


@pytest.mark.parametrize("name", EVERY)
def test_a_mesh_equals_one_device(name):
    c = made(name)
    mesh, spec = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("d",)), jax.sharding.PartitionSpec
    x = jnp.asarray(np.random.default_rng(1).standard_t(3, (64, 32)), jnp.float32)
    start = gathered(c, np.full((2, 32), 0.25))

    def body(x):
        return c.allreduce(start, c.update(start, x), ("d",))

    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec("d"), out_specs=spec()))
    assert same(run(x), gathered(c, np.full((2, 32), 0.25), x))


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"mean"}))
def test_any_split_gives_the_same_state(name):
    c = made(name)
    x = np.random.default_rng(2).standard_t(2, (60, 32)).astype(np.float32)
    whole = gathered(c, x)
    assert same(gathered(c, x[:1], x[1:40], x[40:]), whole) and same(gathered(c, x[40:], x[:40]), whole)


# Means --------------------------------------------------------------------------------------------------------------


def test_mean_of_the_batches_largest_values():
    batches = [np.array([[1.0, -3.0]]), np.array([[5.0, 0.0]]), np.array([[1.0, 1.0]])]
    plain = calibrators.get("mean", INT8)
    state = gathered(plain, *batches)
    assert float(plain.amax(state)) == pytest.approx(3.0, rel=1e-6)  # (3 + 5 + 1) / 3
    running = calibrators.get("mean", INT8, momentum=0.75)
    assert float(running.amax(gathered(running, *batches))) == 0.75 * (0.75 * 3 + 0.25 * 5) + 0.25 * 1
    last = calibrators.get("mean", INT8, momentum=0)
    assert float(last.amax(gathered(last, *batches))) == 1
    assert same(gathered(plain, *batches, np.zeros((0, 2))), state), "an empty batch is none"


# Headroom -----------------------------------------------------------------------------------------------------------


def by_definition(x: np.ndarray, rho: float, anchor: float) -> tuple[float, float, float]:
    """(rho * anchor, floor by ModelOpt's rule, right edge of the floor's bin), in float64."""
    blocks = np.abs(np.pad(x, ((0, 0), (0, -x.shape[1] % 16)))).reshape(-1, 16).max(1).astype(np.float64)
    blocks = blocks[blocks > 0]
    bins = np.clip(np.floor((np.log2(blocks) + 40) / 80 * 512), 0, 511).astype(int)
    at = lambda p, bins: np.sort(bins)[max(int(np.ceil(p / 100 * bins.size - 1e-9)) - 1, 0)]  # noqa: E731
    value = lambda place: 2.0 ** (place / 512 * 80 - 40)  # noqa: E731
    top = at(99.99, bins)
    floor = value(top + 0.5)
    kept = bins[bins >= np.floor((np.log2(floor / 1e6) + 40) / 80 * 512)]
    return rho * value(at(anchor, kept) + 0.5), floor, value(top + 1)


@pytest.mark.parametrize("kind", ["normal", "heavy", "wide", "near zero", "ragged"])
@pytest.mark.parametrize(("rho", "anchor"), [(16384.0, 1.0), (4.0, 1.0), (1.0, 50.0)])
def test_headroom_is_modelopts_with_a_floor_that_holds_its_blocks(kind, rho, anchor):
    rng = np.random.default_rng(3)
    x = {"normal": rng.normal(size=(64, 64)), "heavy": rng.standard_t(1, (200, 64)),
         "ragged": rng.normal(size=(50, 37)),
         "wide": rng.normal(size=(500, 32)) * np.exp2(rng.uniform(-12, 6, (500, 1))),
         "near zero": np.concatenate([rng.normal(size=(100, 32)), rng.normal(size=(40, 32)) * 1e-9, np.zeros((9, 32))]),
         }[kind].astype(np.float32)  # fmt: skip
    c = calibrators.get("headroom", NVFP4, rho=rho, anchor=anchor)
    found = float(jax.jit(c.amax)(gathered(c, x)))
    above, floor, edge = by_definition(x, rho, anchor)
    expected = max(above, min(edge, float(np.abs(x).max())))
    assert found == pytest.approx(expected, rel=2e-6)
    if above >= edge:  # then it is ModelOpt's, to the rounding of exp2
        assert found == pytest.approx(max(above, floor), rel=2e-6)


def test_headroom_holds_the_blocks_that_it_saw():
    """Of 1000 blocks with values from 1 to 10 none is above the floor, however small rho is."""
    x = np.random.default_rng(4).uniform(1, 10, (1000, 16)).astype(np.float32)
    c = calibrators.get("headroom", NVFP4, rho=0.001)
    assert float(c.amax(gathered(c, x))) == x.max()


def test_bins_of_powers_of_two_are_exact():
    exponents = np.arange(-39, 40)
    found = headroom.bin_of(jnp.asarray(np.exp2(exponents), jnp.float32))
    assert np.array_equal(found, np.floor((exponents + 40) * 64 / 10).astype(int))  # 6.4 bins an octave


# Options ------------------------------------------------------------------------------------------------------------


def test_options_and_their_defaults():
    assert calibrators.options("percentile") == {"percentile": 99.99}
    assert calibrators.options("headroom") == {"rho": 16384.0, "anchor": 1.0}
    assert calibrators.options("max") == {}
    assert calibrators.get("percentile", INT8, percentile=99).options == {"percentile": 99.0}


@pytest.mark.parametrize(
    ("name", "format", "options", "words"),
    [
        ("percentil", INT8, {}, ["'percentil'", "did you mean 'percentile'", "entropy, headroom, max"]),
        ("percentile", INT8, {"percentle": 99}, ["no option 'percentle'", "did you mean 'percentile'"]),
        ("max", INT8, {"p": 1}, ["no option 'p'", "none"]),
        ("percentile", INT8, {"percentile": 0.999}, ["0.999", "per cent", "99.9"]),
        ("percentile", INT8, {"percentile": 101}, ["101", "up to 100"]),
        ("percentile", INT8, {"percentile": "99"}, ["'99'", "a number"]),
        ("percentile", INT8, {"percentile": True}, ["True", "a number"]),
        ("percentile", INT8, {"percentile": float("nan")}, ["nan", "a number"]),
        ("entropy", FP8, {}, ["'fp8'", "evenly spaced", "percentile"]),
        ("mse", NVFP4, {}, ["'nvfp4'", "blocks", "headroom"]),
        ("mse", formats.get("mxfp8"), {}, ["'mxfp8'", "blocks", "write max"]),
        ("headroom", INT8, {}, ["'int8'", "nvfp4"]),
        ("headroom", NVFP4, {"rho": 30000}, ["30000", "28672"]),
        ("headroom", NVFP4, {"anchor": 0}, ["anchor is 0", "per cent"]),
        ("mean", INT8, {"momentum": 1.0}, ["momentum is 1.0", "below 1"]),
    ],
)
def test_mistakes_are_explained(name, format, options, words):
    with pytest.raises(PlanError) as error:
        calibrators.get(name, format, **options)
    assert all(word in str(error.value) for word in words), error.value
