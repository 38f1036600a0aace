"""A model whose weights are floats that look quantized: the tensor that stands for one, and the rule that runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jqopt import _ops
from jqopt._apply import Executor
from jqopt._ops import InputFormat
from jqopt._plan import Decision
from jqopt._qtensor import QTensor
from jqopt._trace import Site
from jqopt.train import _straight


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


def simulated(values: jax.Array, d: Decision, input_scale: jax.Array | None, dtype: str) -> Simulated:
    """The tensor that stands for a weight with these values [*stack, n, k]."""
    assert d.layout is not None, d.key
    shape = d.format.scale_shape(d.layout.n, d.layout.k, d.granularity)
    rest = {f.name: None for f in dataclasses.fields(Simulated)}
    rest |= {"data": values, "scale": jnp.zeros((*values.shape[:-2], *shape), jnp.float32), "input_scale": input_scale}
    static = {"format": d.format, "granularity": d.granularity, "layout": d.layout, "dtype": dtype, "rotation": 0}
    return Simulated(**{**rest, **static})  # type: ignore[arg-type]


class Trainer(Executor):
    """The training rule: what the executor simulates, with a gradient for the weights.

    `clip`: no gradient to activations beyond the range of a static scale; `learn`: that scale has LSQ's gradient.
    """

    def __init__(self, sites: Sequence[tuple[Site, Decision]], clip: bool, learn: bool):
        super().__init__(sites, simulate=True, backend=None)
        self.clip, self.learn = clip, learn

    def quantized_input(self, x: jax.Array, spec: InputFormat, scale: jax.Array | None) -> jax.Array:
        learn = self.learn and learnable(spec)
        if scale is None or not (learn or self.clip):
            return super().quantized_input(x, spec, scale)
        return _straight.static_input(x, scale, spec, learn)

    def product(self, rows: jax.Array, taken: _ops.Activation, tensor: QTensor, decision: Decision) -> jax.Array:
        return products(taken.x.astype(jnp.float32), tensor.matrix())

    def rows(self, tensor: QTensor, index: jax.Array) -> jax.Array:
        found = jnp.take(tensor.matrix(), index.reshape(-1), axis=0, mode="clip")
        return found.reshape(*index.shape, tensor.layout.k)


def learnable(spec: InputFormat | None) -> bool:
    """Has an activation one static scale that saturates it? Blocks find their own scales, below a static one."""
    return spec is not None and spec.static and spec.granularity == "tensor"


def products(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [*stack, m, k] times w [*stack, n, k], transposed: float32 [*stack, m, n]."""

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        contract = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(x, w, contract, preferred_element_type=np.dtype(np.float32))

    for _ in range(w.ndim - 2):
        run = jax.vmap(run)
    return run(x, w)
