"""Convolutions trained in low precision: three GEMMs over windows, against float64, JAX's own gradients and Dense."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

import jqopt
from jqopt import train
from jqopt.train import _conv, _linear, quantizers
from jqopt.train._low_ops import _convolved
from tests import zoo
from tests.arrays import normal
from tests.train.images import KEY, NEAREST, NHWC, conv, gradients, recipe

pytestmark = pytest.mark.quick

FLOAT = _linear.Gemms((None, None), (None, None), (None, None))


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# ---- the numbers


def by_hand(x: np.ndarray, kernel: tuple[int, int], stride: tuple[int, int], pad: int, apart: int):
    """(windows [m, taps * channels], their transpose) of an image [n, h, w, c], one position at a time."""
    n, h, w, c = x.shape
    (kh, kw), (sh, sw) = kernel, stride
    oh, ow = ((s + 2 * pad - apart * (k - 1) - 1) // t + 1 for s, k, t in ((h, kh, sh), (w, kw, sw)))
    places = []
    for _, i, j in itertools.product(range(n), range(oh), range(ow)):
        places.append([(i * sh + a * apart - pad, j * sw + b * apart - pad) for a in range(kh) for b in range(kw)])
    images = np.repeat(np.arange(n), oh * ow)

    def inside(r, s):
        return 0 <= r < h and 0 <= s < w

    zero = np.zeros(c)
    rows = [np.concatenate([x[e, r, s] if inside(r, s) else zero for r, s in at])
            for e, at in zip(images, places, strict=True)]  # fmt: skip

    def back(d):
        dx = np.zeros(x.shape)
        for e, at, row in zip(images, places, d.reshape(len(places), kh * kw, c), strict=True):
            for (r, s), value in zip(at, row, strict=True):
                if inside(r, s):
                    dx[e, r, s] += value
        return dx

    return np.stack(rows), back


def test_three_products_of_quantized_windows():
    """y, dw, dx of a strided, dilated convolution: windows, public quantizers and products written out in float64."""
    x, w, dy = normal(0, (2, 9, 8, 16)), normal(1, (3, 2, 16, 32)), normal(2, (2, 4, 8, 32))
    model = conv(strides=(2, 1), padding=[(1, 1), (1, 1)], rhs_dilation=(2, 2))
    got = jax.jit(functools.partial(gradients, train.prepare(model, recipe(NEAREST), {"w": w}, x)))({"w": w}, x, dy)

    rows, back = by_hand(np.asarray(x, np.float64), (3, 2), (2, 1), 1, 2)
    kernel = np.asarray(w).transpose(3, 0, 1, 2).reshape(32, -1)
    flat = np.asarray(dy).reshape(-1, 32)

    @functools.partial(jax.jit, static_argnums=1)
    def decoded(m, tile):
        q = quantizers.nvfp4(m, tile=tile)
        return quantizers.nvfp4_values(q), q.global_scale

    def values(m, tile=(1, 16)):
        codes, scale = decoded(np.asarray(m, np.float32), tile)
        return np.asarray(codes, np.float64) * np.float64(scale)

    y = values(rows) @ values(kernel, (16, 16)).T
    dw = values(flat.T) @ values(rows.T).T
    dx = values(flat) @ values(kernel, (16, 16))
    want = (y.reshape(2, 4, 8, 32), dw.reshape(32, 3, 2, 16).transpose(1, 2, 3, 0), back(dx))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


SHAPES = {
    "strides": ((2, 7, 8, 6), (3, 2, 6, 4), conv(strides=(2, 3))),
    "groups": ((2, 5, 6, 6), (3, 3, 3, 4), conv(feature_group_count=2)),
    "depthwise": ((2, 9, 6), (3, 1, 6), conv(("NWC", "WIO", "NWC"), (1,), "VALID", feature_group_count=6)),
    "channels first": (
        (2, 6, 5, 7), (4, 6, 3, 3), conv(("NCHW", "OIHW", "NCHW"), (1, 2), [(2, 1), (0, 3)], rhs_dilation=(2, 1))
    ),
    "transposed": ((2, 4, 3, 6), (3, 3, 6, 4), conv(padding=[(2, 1), (-1, 2)], lhs_dilation=(2, 3))),
    "cropped": ((2, 8, 3, 6), (2, 1, 6, 4), conv(padding=[(-1, -2), (0, 0)])),
    "odd layout": ((6, 5, 2, 4), (2, 4, 6, 3), conv(("CHNW", "HOIW", "WNCH"), (2, 1))),
    "three axes": ((1, 3, 4, 3, 5), (2, 3, 1, 5, 4), conv(("NDHWC", "DHWIO", "NDHWC"), (1, 1, 2))),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("groups", "channels first", "transposed"))) for n in SHAPES],
)
def test_without_quantizers_it_is_the_convolution(name):
    """All operands in float: the output and both gradients of jax.lax.conv_general_dilated, up to the order of sums."""
    x_shape, w_shape, model = SHAPES[name]
    x, w = normal(0, x_shape), normal(1, w_shape)
    (eqn,) = jax.make_jaxpr(model)({"w": w}, x).eqns

    def ours(p, x):
        return _convolved(eqn, None, FLOAT, (frozenset(), frozenset()), None, x, p["w"], None, None)

    @jax.jit
    def both(p, x):
        out = []
        for f in (model, ours):
            y, back = jax.vjp(f, p, x)
            out.append((y, *back(jnp.cos(y))))
        return out

    want, got = both({"w": w}, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * np.abs(b).max()), got, want)


def test_the_sum_over_taps_is_rounded_once():
    """bfloat16: dx is the float32 sum over windows, rounded; and x is kept as it is, not its windows."""
    x, w = normal(0, (2, 8, 8, 8), jnp.bfloat16), normal(1, (3, 3, 8, 8), jnp.bfloat16)
    (eqn,) = jax.make_jaxpr(conv())({"w": w}, x).eqns
    how = dataclasses.replace(FLOAT, dtypes=("bfloat16",) * 3)

    def ours(x):
        return _convolved(eqn, None, how, (frozenset(), frozenset()), None, x, w, None, None)

    wide = {"w": w.astype(jnp.float32)}
    y, back = jax.vjp(ours, x)
    dx = jax.jit(back)(y)[0]
    want = jax.vjp(lambda x: conv()(wide, x), x.astype(jnp.float32))[1](y.astype(jnp.float32))[0]
    assert dx.dtype == jnp.bfloat16
    assert float((dx != want.astype(jnp.bfloat16)).mean()) < 0.01  # other orders of a float32 sum, at a tie
    kept = [leaf.size for leaf in jax.tree.leaves(back) if hasattr(leaf, "size")]
    assert max(kept) == x.size


@pytest.mark.slow
def test_error_floor():
    """Two operands with 9.5 % of noise each: 12 % to 15 %, in fprop, wgrad and dgrad."""
    x, w, dy = normal(0, (2, 10, 10, 64)), normal(1, (3, 3, 64, 64)), normal(2, (2, 10, 10, 64))
    prepared = train.prepare(conv(), recipe(NEAREST), {"w": w}, x)
    got = jax.jit(functools.partial(gradients, prepared))({"w": w}, x, dy)
    y, back = jax.vjp(conv(), {"w": w}, x)
    dw, dx = back(dy)
    for a, b in zip(got, (y, dw["w"], dx), strict=True):
        assert 0.12 < relative(a, b) < 0.15


# ---- what is kept and seen


def test_what_is_kept_are_packed_windows():
    """Taps times as many codes as x has values: of 3x3 in NVFP4 9 * 0.5625 = 5.06 bytes a value of x."""
    x, w = normal(0, (2, 4, 4, 32), jnp.bfloat16), normal(1, (3, 3, 32, 16), jnp.bfloat16)
    prepared = train.prepare(conv(), recipe(NEAREST), {"w": w}, x)
    _, back = jax.vjp(prepared.apply, {"w": w}, x)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(back) if hasattr(leaf, "nbytes") and leaf.dtype == jnp.uint8]
    assert sorted(sizes) == sorted([9 * x.size // 2, 9 * x.size // 16, w.size // 2, w.size // 256])


@pytest.mark.slow
def test_delayed_scales_see_the_windows():
    """With stride 2 of one tap, three quarters of x are in no window: the largest value is of what is multiplied."""
    o = {"format": "fp8", "scaling": "delayed"}
    x, w = normal(0, (2, 4, 4, 8)), normal(1, (1, 1, 8, 8))
    x = x.at[0, 1, 1, 0].set(100.0)
    prepared = train.prepare(conv(strides=(2, 2)), recipe({"input": o, "weight": o}), {"w": w}, x)
    seen = jax.grad(lambda s: prepared.apply({"w": w}, x, quant_state=s).sum())(prepared.init_state())
    np.testing.assert_array_equal(seen["w"]["scale"][:2], [jnp.abs(x[:, ::2, ::2]).max(), jnp.abs(w).max()])


# ---- models


class Image(nn.Module):
    """Down, in groups, and up again."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3), strides=(2, 2))(x))
        x = x + nn.Conv(32, (3, 3), feature_group_count=2)(x)
        return nn.ConvTranspose(16, (2, 2), strides=(2, 2))(x)


@pytest.mark.slow
def test_from_training_to_serving(tmp_path):
    """A Linen model of three convolutions: near the float gradient; packed without data, saved, loaded."""
    model, x = Image(), normal(0, (2, 8, 8, 16))
    variables = model.init(KEY, x)
    prepared = train.prepare(model, "train/nvfp4", variables, x)
    assert {s.path for s in prepared.plan.trained} == {f"{n}/kernel" for n in ("Conv_0", "Conv_1", "ConvTranspose_0")}
    got = jax.jit(jax.grad(lambda v: jnp.mean(jnp.square(prepared.apply(v, x, quant_key=KEY) - 1))))(variables)
    want = jax.jit(jax.grad(lambda v: jnp.mean(jnp.square(model.apply(v, x) - 1))))(variables)
    # up to six products in a row, three forward and three back: sqrt(6) * 13.5 % = 33 %, stochastic rounding more
    assert all(relative(a, b) < 0.45 for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True))
    trained = jax.tree.map(lambda p, g: p - 0.1 * g, variables, got)
    qm = jqopt.quantize_model(model, "train/nvfp4", params=trained, inputs=x)
    assert set(qm.plan.quantized) == {s.path for s in prepared.plan.trained}
    jqopt.save(tmp_path / "packed", qm)
    np.testing.assert_array_equal(jqopt.load(tmp_path / "packed", model)(x), qm(x))
    plain = model.apply(trained, x)
    assert 0.02 < relative(qm(x), plain) < 0.25 and 0.02 < relative(prepared.apply(trained, x), plain) < 0.35


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first, self.then = nnx.Conv(16, 32, (3,), rngs=rngs), nnx.ConvTranspose(32, 16, (2,), rngs=rngs)

    def __call__(self, x):
        return self.then(nnx.relu(self.first(x)))


@pytest.mark.slow
def test_nnx():
    model, x = Net(nnx.Rngs(0)), normal(0, (2, 16, 16))
    prepared = train.prepare(model, recipe("nvfp4"), x)
    assert len(prepared.plan.trained) == 2
    module = train.LowPrecision(model, prepared, nnx.Rngs(quant=1))
    grads = nnx.jit(nnx.grad(lambda m: jnp.mean(jnp.square(m(x)))))(module)
    want = nnx.jit(nnx.grad(lambda m: jnp.mean(jnp.square(m(x)))))(model)
    for a, b in zip(*(jax.tree.leaves(t) for t in (nnx.state(grads.model), want)), strict=True):
        assert 0 < relative(a, b) < 0.5


def test_what_stays():
    """The gradient of a convolution's kernel, and a kernel on the left, are no layers; both say so."""
    x, w = normal(0, (4, 4, 4, 8)), normal(1, (3, 3, 8, 16))
    grouped = conv(batch_group_count=2)
    with pytest.raises(jqopt.PlanError, match="a convolution whose batch is in groups"):
        train.prepare(grouped, recipe(NEAREST), {"w": w}, x)
    left = lambda p, x: lax.conv_general_dilated(p["w"], x, (1, 1), "SAME", dimension_numbers=NHWC)  # noqa: E731
    with pytest.raises(jqopt.PlanError, match="left operand"):
        train.prepare(left, recipe(NEAREST), {"w": normal(2, (1, 9, 9, 8))}, w)


def test_shapes_are_planned_without_arithmetic():
    model, variables, x = zoo.build(zoo.DepthwiseConv)
    plan = train.prepare(model, recipe(NEAREST), variables, x).plan
    assert [(s.op, s.reason) for s in plan.trained] == [("conv", "")]
    empty = jax.make_jaxpr(conv(padding="VALID"))({"w": normal(0, (3, 3, 4, 4))}, normal(1, (1, 2, 5, 4))).eqns[0]
    assert _conv.windows(empty).out == (0, 3)
    out = _convolved(empty, None, FLOAT, (frozenset(), frozenset()), None, normal(1, (1, 2, 5, 4)),
                     normal(0, (3, 3, 4, 4)), None, None)  # fmt: skip
    assert out.shape == (1, 0, 3, 4)
