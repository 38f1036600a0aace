"""Distillation: how far a student's logits are from a teacher's."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jqopt.errors import UnsupportedError


def distill_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, temperature: float = 1.0, kind: str = "kl"
) -> jax.Array:
    """The mean over all positions of the divergence of logits [..., classes]; float32 []. No gradient to the teacher.

    Args:
        temperature: T: both logits are divided by it, and the divergence is multiplied by T^2, so that its gradient
            keeps its size (Hinton et al. 2015, section 2). For `kl` only.
        kind: `kl`, KL(teacher || student) in nats, or `mse`, the mean squared difference of the logits.

    Raises:
        UnsupportedError: another kind, a temperature that isn't positive, or logits of two shapes.
    """
    if student_logits.shape != teacher_logits.shape:
        raise UnsupportedError(
            f"distill_loss: the student's logits are {list(student_logits.shape)}, the teacher's "
            f"{list(teacher_logits.shape)}; both must be of one shape [..., classes]"
        )
    if kind not in ("kl", "mse"):
        raise UnsupportedError(f"distill_loss: no kind {kind!r}; write 'kl' or 'mse'")
    if not temperature > 0 or (kind == "mse" and temperature != 1):
        raise UnsupportedError(
            f"distill_loss: temperature {temperature} with kind {kind!r}; write a positive number with 'kl', none with "
            "'mse'"
        )
    student = student_logits.astype(jnp.float32)
    teacher = jax.lax.stop_gradient(teacher_logits.astype(jnp.float32))
    if kind == "mse":
        return jnp.mean(jnp.square(student - teacher))
    p, q = (jax.nn.log_softmax(x / temperature, axis=-1) for x in (teacher, student))
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))
