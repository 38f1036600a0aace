"""What follows a product before its result is written: a bias for each column, then an activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda y: jax.nn.gelu(y, approximate=False),
    "gelu_tanh": lambda y: jax.nn.gelu(y, approximate=True),
    "silu": jax.nn.silu,
}


class Epilogue(NamedTuple):
    """activation(y + bias) of a product's float32 sums y [m, n] with all their scales, before the cast to its dtype.

    bias: [n], any float dtype, or None. activation: "relu", "gelu" (with erf), "gelu_tanh", "silu", or None.
    """

    bias: jax.Array | None = None
    activation: str | None = None

    def after(self, y: jax.Array) -> jax.Array:
        """f32 [m, n] -> f32 [m, n].

        Raises:
            ValueError: the activation is unknown, or the bias is not [n].
        """
        check(self, y.shape[-1])
        y = y if self.bias is None else y + self.bias.astype(jnp.float32)
        return y if self.activation is None else ACTIVATIONS[self.activation](y)


NOTHING = Epilogue()


def check(epilogue: Epilogue, n: int) -> None:
    """Raises ValueError for an epilogue that no product with n columns can have."""
    if epilogue.activation is not None and epilogue.activation not in ACTIVATIONS:
        raise ValueError(f"activation {epilogue.activation!r} is unknown; known: {', '.join(ACTIVATIONS)}, or None")
    if epilogue.bias is not None and epilogue.bias.shape != (n,):
        raise ValueError(f"a product with n={n} columns takes a bias [{n}], not {list(epilogue.bias.shape)}")
