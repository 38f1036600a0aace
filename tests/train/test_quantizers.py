"""The training quantizers by their properties; their bits are in test_golden_te.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqopt.errors import UnsupportedError
from jqopt.formats import E5M2
from jqopt.train import quantizers

nvfp4 = jax.jit(quantizers.nvfp4, static_argnames=("tile", "row_scaled", "four_over_six", "e4m3_max"))
fp8_current = jax.jit(quantizers.fp8_current, static_argnums=1, static_argnames="power_of_two")
fp8_block = jax.jit(quantizers.fp8_block, static_argnums=(1, 2), static_argnames="power_of_two")
nvfp4_values = jax.jit(quantizers.nvfp4_values)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def values(q):
    return nvfp4_values(q) * jnp.asarray(q.global_scale)[..., None, None]


def test_square_tiles_quantize_the_transpose_alike():
    w = normal(0, 64, 96)
    q, qt = nvfp4(w, tile=(16, 16)), nvfp4(w.T, tile=(16, 16))
    np.testing.assert_array_equal(nvfp4_values(q).T, nvfp4_values(qt))


@pytest.mark.parametrize("measure", ["mae", "mse"])
def test_four_over_six_never_worsens_a_block(measure):
    x = normal(1, 32, 64)
    power = 1 if measure == "mae" else 2
    error = [
        (jnp.abs(values(q) - x) ** power).reshape(32, 4, 16).sum(-1)
        for q in (
            nvfp4(x, four_over_six=measure, e4m3_max=256.0),
            nvfp4(x, amax=jnp.max(jnp.abs(x)) * 448 / 256),  # the same global scale, always six
        )
    ]
    assert (error[0] <= error[1] * 1.0001).mean() > 0.95  # a rounding of the block scale may differ in the last bit
    assert error[0].sum() < 0.97 * error[1].sum()


def test_row_scaled_rows_do_not_see_each_other():
    x = normal(2, 4, 64)
    q = nvfp4(x * jnp.array([[1.0], [1e-3], [1e3], [0.0]]), row_scaled=True)
    whole = nvfp4(x[:1], row_scaled=True)
    np.testing.assert_array_equal(q.data[:1], whole.data)
    y = nvfp4_values(q) * q.global_scale[:, None]
    np.testing.assert_allclose(y[2] * 1e-3, x[2], atol=0.7)
    assert not y[3].any()


def test_hadamard_is_orthogonal():
    h = np.asarray(quantizers.hadamard16(jnp.eye(16)))
    np.testing.assert_array_equal(h @ h.T, np.eye(16))
    signs = np.asarray(quantizers.RHT_SIGNS)
    sylvester = np.array([[(-1) ** bin(i & j).count("1") for j in range(16)] for i in range(16)])
    np.testing.assert_array_equal(h, signs[:, None] * sylvester / 4)


def test_hadamard_keeps_products():
    a, b = normal(3, 8, 64), normal(4, 8, 64)
    plain = a @ b.T
    np.testing.assert_allclose(quantizers.hadamard16(a) @ quantizers.hadamard16(b).T, plain, atol=0.3)


def test_an_amax_from_elsewhere_saturates():
    x = normal(5, 16, 32)
    q = nvfp4(x, amax=jnp.float32(0.5))
    assert float(jnp.max(jnp.abs(values(q)))) == pytest.approx(0.5, rel=1e-6)
    f = fp8_current(x, amax=jnp.float32(0.5))
    assert int(jnp.max(f.data & 0x7F)) == 0x7E  # 448


@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8_scales(power_of_two):
    x = normal(6, 130, 300) * 3
    for q, shape in (
        (fp8_current(x, E5M2, power_of_two=power_of_two), (1, 1)),
        (fp8_block(x, (1, 128), power_of_two=power_of_two), (130, 3)),
        (fp8_block(x, (128, 128), power_of_two=power_of_two), (2, 3)),
    ):
        assert q.data.shape == x.shape
        assert q.scale.shape == shape
        mantissa = np.frexp(np.asarray(q.scale))[0]
        assert (mantissa == 0.5).all() == power_of_two


def test_batches_are_independent():
    x = normal(7, 3, 32, 64) * jnp.array([1.0, 10.0, 0.1])[:, None, None]
    batch = nvfp4(x)
    for i in range(3):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), batch, nvfp4(x[i]))


def test_swizzle_pads_and_inverts():
    scale = jnp.asarray(np.random.default_rng(0).integers(0, 255, (130, 5)), jnp.uint8)
    swizzled = quantizers.swizzle(scale)
    assert swizzled.shape == (256, 8)
    np.testing.assert_array_equal(quantizers.unswizzle(swizzled, 130, 5), scale)
    # offset of (r, c): ((r//128) * ceil(C/4) + c//4) * 512 + (r%32) * 16 + (r%128//32) * 4 + c%4
    for r, c in ((0, 0), (33, 3), (127, 4), (129, 1)):
        offset = ((r // 128) * 2 + c // 4) * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4
        assert swizzled.reshape(-1)[offset] == scale[r, c]


def test_refusals():
    x = jnp.ones((16, 40))
    with pytest.raises(UnsupportedError, match="cannot be cut into tiles"):
        nvfp4(x)
    with pytest.raises(UnsupportedError, match="multiple of 16"):
        quantizers.hadamard16(x)
    with pytest.raises(UnsupportedError, match="expected None, 'mae' or 'mse'"):
        nvfp4(x[:, :32], four_over_six="max")
    with pytest.raises(UnsupportedError, match="without row_scaled"):
        nvfp4(x[:, :32], tile=(16, 16), row_scaled=True)


def test_nan_is_not_hidden():
    x = normal(8, 16, 32).at[3, 4].set(jnp.nan)
    assert jnp.isnan(values(nvfp4(x))).any()
    assert jnp.isnan(fp8_current(x).scale).all()
