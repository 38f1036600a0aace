"""The tensor that stands for a weight in training, and the training rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jqopt._ops import InputFormat
from jqopt._plan import Decision
from jqopt._simulated import Differentiable, Simulated
from jqopt._trace import Site
from jqopt.train import _straight


def simulated(values: jax.Array, d: Decision, input_scale: jax.Array | None, dtype: str) -> Simulated:
    """The tensor that stands for a weight with these values [*stack, n, k]."""
    assert d.layout is not None, d.key
    shape = d.format.scale_shape(d.layout.n, d.layout.k, d.granularity)
    rest = {f.name: None for f in dataclasses.fields(Simulated)}
    rest |= {"data": values, "scale": jnp.zeros((*values.shape[:-2], *shape), jnp.float32), "input_scale": input_scale}
    static = {"format": d.format, "granularity": d.granularity, "layout": d.layout, "dtype": dtype, "rotation": 0}
    return Simulated(**{**rest, **static})  # type: ignore[arg-type]


class Trainer(Differentiable):
    """The training rule: what the executor simulates, with a gradient for the weights.

    `clip`: no gradient to activations beyond the range of a static scale; `learn`: that scale has LSQ's gradient.
    """

    def __init__(self, sites: Sequence[tuple[Site, Decision]], clip: bool, learn: bool):
        super().__init__(sites, simulate=True, backend=None)
        self.clip, self.learn = clip, learn

    def quantized_input(
        self, x: jax.Array, spec: InputFormat, scale: jax.Array | None, factors: jax.Array | None = None
    ) -> jax.Array:
        learn = self.learn and learnable(spec)
        if scale is None or not (learn or self.clip):
            return super().quantized_input(x, spec, scale, factors)
        return _straight.static_input(x, scale, spec, learn)


def learnable(spec: InputFormat | None) -> bool:
    """Has an activation one static scale that saturates it? Blocks find their own scales, below a static one."""
    return spec is not None and spec.static and spec.granularity == "tensor"
