"""The loss of distillation against sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt
from jqopt.train import distill_loss

S, T = np.random.default_rng(0).normal(size=(2, 3, 5, 7)).astype(np.float32)


def softmax(x):
    e = np.exp(x.astype(np.float64))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_against_a_sum_written_out(temperature):
    p, q = softmax(T / temperature), softmax(S / temperature)
    want = temperature**2 * np.mean(np.sum(p * np.log(p / q), -1))
    assert float(distill_loss(jnp.asarray(S), jnp.asarray(T), temperature)) == pytest.approx(want, rel=1e-5)
    grad = jax.grad(lambda s: distill_loss(s, jnp.asarray(T), temperature))(jnp.asarray(S))
    np.testing.assert_allclose(grad, temperature * (q - p) / 15, rtol=1e-4, atol=1e-7)  # T^2 (q - p) / T, over 15


def test_mse_and_no_gradient_to_the_teacher():
    s, t = jnp.asarray(S, jnp.bfloat16), jnp.asarray(T, jnp.bfloat16)
    want = np.mean(np.square(np.asarray(s, np.float64) - np.asarray(t, np.float64)))
    assert float(distill_loss(s, t, kind="mse")) == pytest.approx(want, rel=1e-5)
    for kind in ("kl", "mse"):
        assert not jax.grad(lambda t, k=kind: distill_loss(s, t, kind=k))(t).any()
        assert float(distill_loss(s, s, kind=kind)) == 0


def test_refusals():
    s = jnp.asarray(S)
    with pytest.raises(jqopt.UnsupportedError, match=r"student's logits are \[3, 5, 7\], the teacher's \[5, 7\]"):
        distill_loss(s, s[0])
    with pytest.raises(jqopt.UnsupportedError, match="no kind 'js'; write 'kl' or 'mse'"):
        distill_loss(s, s, kind="js")
    for temperature, kind in ((0.0, "kl"), (2.0, "mse")):
        with pytest.raises(jqopt.UnsupportedError, match="write a positive number with 'kl', none with 'mse'"):
            distill_loss(s, s, temperature, kind)
