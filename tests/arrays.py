"""Random arrays for tests from numpy: jax.random compiles half a second for every new shape."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed: int, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Standard normal numbers of this shape, the same for the same seed."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=tuple(shape)).astype(np.float32)).astype(dtype)
