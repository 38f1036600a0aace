"""A weight as floats that look quantized, and the rule that runs a plan on such weights with gradients for them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jqopt import _ops
from jqopt._apply import Executor
from jqopt._plan import Decision
from jqopt._qtensor import QTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Simulated(QTensor):
    """A quantized parameter as the values that its codes would stand for: `data` is float32 [*stack, n, k].

    The gradient of `data` goes on to the float weight. `scale` holds no scales; it has the shape they would have,
    which says where the matrix may be cut.
    """

    def matrix(self) -> jax.Array:
        """float32 [*stack, n, k]."""
        return self.data


class Differentiable(Executor):
    """What the executor simulates, with a gradient for the weights; that of the activations goes straight through."""

    def product(self, rows: jax.Array, taken: _ops.Activation, tensor: QTensor, decision: Decision) -> jax.Array:
        return products(taken.x.astype(jnp.float32), tensor.matrix())

    def rows(self, tensor: QTensor, index: jax.Array) -> jax.Array:
        found = jnp.take(tensor.matrix(), index.reshape(-1), axis=0, mode="clip")
        return found.reshape(*index.shape, tensor.layout.k)


def products(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [*stack, m, k] times w [*stack, n, k], transposed: float32 [*stack, m, n]."""

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        contract = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(x, w, contract, preferred_element_type=np.dtype(np.float32))

    for _ in range(w.ndim - 2):
        run = jax.vmap(run)
    return run(x, w)
