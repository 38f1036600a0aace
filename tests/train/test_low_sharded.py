"""Low-precision training on eight devices: the codes, scales and random bits of one, under GSPMD and shard_map."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jqopt
from jqopt import formats, train
from jqopt.train import _dither, _operand

KEY = jax.random.key(7)
TRAIN = jqopt.load_recipe("train/nvfp4").train.to_dict()


def recipe(**more) -> dict:
    return {"name": "small", "rules": [{"match": "*", "weight": "nvfp4"}], "train": {**TRAIN, **more}}


def numbers(seed, *shape):
    """Rows and columns of very different sizes: a device's own largest value is not the whole's."""
    x = np.random.default_rng(seed).standard_normal(shape)
    x = x * 2.0 ** np.linspace(-3, 3, shape[0])[:, None] * 2.0 ** np.linspace(0, 2, shape[1])
    return jnp.asarray(x, jnp.bfloat16)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)


X, W, DY = numbers(0, 128, 64), numbers(1, 64, 128), numbers(2, 128, 128)


def linear(p, x):
    return x @ p["w"]


def gradients(prepared):
    """(y, dw, dx) for the cotangent DY."""

    def run(p, x, dy):
        y, back = jax.vjp(lambda p, x: prepared.apply(p, x, quant_key=KEY), p, x)
        return (y, *back(dy))

    return run


@pytest.fixture(scope="module")
def single():
    return jax.jit(gradients(train.prepare(linear, recipe(), {"w": W}, X)))({"w": W}, X, DY)


def within_one_ulp(got, want) -> None:
    """Sums of products in another order: at most the last bit of a bfloat16, in few places."""

    def check(a, b):
        a, b = (np.asarray(v).view(np.int16).astype(np.int32) for v in (a, b))
        assert np.abs(a - b).max() <= 1 and (a != b).mean() < 0.01

    jax.tree.map(check, got, want)


PLACES = {
    "data parallel": (P(), P("dp"), P("dp")),
    "fully sharded": (P(("dp", "tp")), P(("dp", "tp")), P(("dp", "tp"))),
    "column parallel": (P(None, "tp"), P("dp"), P("dp", "tp")),
    "row parallel": (P("tp"), P("dp", "tp"), P("dp")),
    "sequence parallel": (P(None, "tp"), P(("dp", "tp")), P("dp", "tp")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
def test_gspmd_gives_the_numbers_of_one_device(name, mesh, single):
    w, x, dy = (NamedSharding(mesh, spec) for spec in PLACES[name])
    run = jax.jit(gradients(train.prepare(linear, recipe(), {"w": W}, X)), in_shardings=({"w": w}, x, dy))
    within_one_ulp(run({"w": jax.device_put(W, w)}, jax.device_put(X, x), jax.device_put(DY, dy)), single)


def test_codes_and_random_bits_are_those_of_one_device(mesh):
    q = _operand.Quantizer(formats.get("nvfp4"), (1, 16), stochastic=True, scale_up=True)

    def codes(x):
        u = _dither.uniform(jax.random.key_data(KEY), x.shape)
        return _operand.codes(_operand.measure(x, q, -1), q, -1, None, u)

    x = DY.astype(jnp.float32)
    sharding = NamedSharding(mesh, P("dp", "tp"))
    got = jax.jit(codes, in_shardings=sharding)(jax.device_put(x, sharding))
    jax.tree.map(np.testing.assert_array_equal, got, jax.jit(codes)(x))


def mapped(mesh, specs, out, *, psum=False, check=True):
    """The product inside a shard_map: (w, x) as `specs`, y as `out`."""

    def local(w, x):
        return jax.lax.psum(x @ w, "tp") if psum else x @ w

    inside = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=check)
    return lambda p, x: inside(p["w"], x)


MAPS = {
    "data": ((P(), P("dp")), P("dp"), False),
    "column": ((P(None, "tp"), P("dp")), P("dp", "tp"), False),
    "row": ((P("tp"), P("dp", "tp")), P("dp"), True),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "column")) for n in MAPS])
def test_shard_map_gives_the_numbers_of_one_device(name, mesh, single):
    """Largest values are shared by the axes over which operands differ; random bits are those of the global place."""
    specs, out, psum = MAPS[name]
    prepared = train.prepare(mapped(mesh, specs, out, psum=psum), recipe(), {"w": W}, X)
    got = jax.jit(gradients(prepared))({"w": W}, X, DY)
    if not psum:
        np.testing.assert_array_equal(got[0], single[0])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(single), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        # sums over devices are of parts that have been rounded to bfloat16: 2^-9 / sqrt(3) each
        assert np.linalg.norm(a - b) < 4e-3 * np.linalg.norm(b)


def collectives(prepared) -> dict[str, int]:
    """How many all-reduces of each kind stand in the compiled program."""
    text = jax.jit(gradients(prepared)).lower({"w": W}, X, DY).compile().as_text()
    found = {"max": 0, "sum": 0}
    for combiner in re.findall(r" all-reduce(?:-start)?\(.*to_apply=%?([\w.\-]+)", text):
        body = text[text.index(f"\n%{combiner} (") :]
        found["max" if "maximum(" in body[: body.index("\n}")] else "sum"] += 1
    return found


@pytest.mark.slow
def test_one_collective_a_pass(mesh):
    """The largest values of x, x turned and w travel together, those of both copies of dy too."""
    specs, out, _ = MAPS["column"]
    model = mapped(mesh, specs, out)
    shared = collectives(train.prepare(model, recipe(), {"w": W}, X))
    # One in the forward and one in the backward pass, which XLA may join: here nothing stands between them. And the
    # sums of dw over dp and of dx over tp.
    assert shared["max"] in (1, 2) and shared["sum"] == 2
    own = collectives(train.prepare(model, recipe(amax_scope="shard"), {"w": W}, X))
    assert own == {"max": 0, "sum": 2}
    mx = {"name": "mx", "rules": [{"match": "*", "weight": "mxfp8"}], "train": {"input": "mxfp8", "weight": "mxfp8"}}
    assert collectives(train.prepare(model, mx, {"w": W}, X))["max"] == 0


@pytest.mark.slow
def test_delayed_scales_see_the_whole(mesh):
    o = {"format": "fp8", "scaling": "delayed"}
    mine = recipe(input=o, weight=o, grad={**o, "format": "fp8_e5m2"})
    specs, out, _ = MAPS["column"]
    seen = []
    for model in (linear, mapped(mesh, specs, out)):
        prepared = train.prepare(model, mine, {"w": W}, X)
        loss = lambda s, prepared=prepared: jnp.sum(  # noqa: E731
            prepared.apply({"w": W}, X, quant_state=s).astype(jnp.float32) * DY.astype(jnp.float32)
        )
        seen.append(jax.jit(jax.grad(loss))(prepared.init_state()))
    np.testing.assert_array_equal(seen[0]["w"]["scale"], [float(jnp.abs(v).max()) for v in (X, W, DY)])
    np.testing.assert_array_equal(seen[1]["w"]["scale"], seen[0]["w"]["scale"])


def test_a_blind_shard_map_is_refused(mesh):
    specs, out, _ = MAPS["data"]
    prepared = train.prepare(mapped(mesh, specs, out, check=False), recipe(), {"w": W}, X)
    with pytest.raises(jqopt.UnsupportedError, match="check_vma=True"):
        prepared.apply({"w": W}, X)


@pytest.mark.slow
def test_explicit_axes(single):
    mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        w, x, dy = (jax.device_put(v, NamedSharding(mesh, s)) for v, s in (
            (W, P(None, "tp")), (X, P("dp", None)), (DY, P("dp", "tp"))))  # fmt: skip
        prepared = train.prepare(linear, recipe(), {"w": w}, x)
        got = jax.jit(functools.partial(gradients(prepared)))({"w": w}, x, dy)
    within_one_ulp(jax.tree.map(np.asarray, got), single)
