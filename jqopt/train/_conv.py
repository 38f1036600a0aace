"""A convolution as a product of matrices: each window of the input is a row, taps major and channels minor."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jqopt import _compat


@dataclasses.dataclass(frozen=True)
class Windows:
    """Where a convolution's windows lie in its input; a static value, of shapes alone.

    `shape`: of the input. `order`: its axes as [batch, *spatial, feature]. `padding`: (low, high, interior) of each
    spatial axis, as of `lax.pad`: low and high may be negative, interior is the input's dilation. `taps`, `strides`,
    `dilation` (of the kernel), `out` (positions): of each spatial axis too.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    padding: tuple[tuple[int, int, int], ...]
    taps: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    out: tuple[int, ...]
    groups: int = 1

    @property
    def count(self) -> int:
        """How many rows there are: one for each group, example and position."""
        return self.groups * self.shape[self.order[0]] * math.prod(self.out)

    def rows(self, x: Array) -> Array:
        """[m, taps * channels] of the input, m = batch * positions; [groups, m, ...] where there are several groups.

        Exact and linear. One spatial axis after the other: a slice for a tap of each axis, not for each pair of them.
        """
        x = x.transpose(self.order)
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *self.padding, (0, 0, 0)])
        for i, (taps, stride, apart, count) in enumerate(
            zip(self.taps, self.strides, self.dilation, self.out, strict=True)
        ):
            starts = [t * apart for t in range(taps)]
            cut = [lax.slice_in_dim(x, at, at + (count - 1) * stride + 1, stride, 1 + i) for at in starts]
            x = jnp.stack(cut, axis=-2)
        m, taps, channels = self.count // self.groups, math.prod(self.taps), self.shape[self.order[-1]]
        if self.groups == 1:
            return x.reshape(m, taps * channels)
        each = x.reshape(m, taps, self.groups, channels // self.groups)
        return each.transpose(2, 0, 1, 3).reshape(self.groups, m, -1)

    def summed(self, rows: Array) -> Array:
        """The transpose of `rows`: what windows that overlap say of one value of the input is added up."""
        like = _compat.vary(jnp.zeros(self.shape, rows.dtype), _compat.varying(rows))
        return jax.vjp(self.rows, like)[1](rows)[0]


def windows(eqn: Any) -> Windows:
    """The windows of a `conv_general_dilated` equation."""
    p, (x, w), out = eqn.params, (v.aval.shape for v in eqn.invars), eqn.outvars[0].aval.shape
    numbers = p["dimension_numbers"]
    batch, feature, *spatial = map(int, numbers.lhs_spec)
    return Windows(
        tuple(x),
        (batch, *spatial, feature),
        tuple((int(a), int(b), int(n) - 1) for (a, b), n in zip(p["padding"], p["lhs_dilation"], strict=True)),
        tuple(w[i] for i in numbers.rhs_spec[2:]),
        tuple(map(int, p["window_strides"])),
        tuple(map(int, p["rhs_dilation"])),
        tuple(out[i] for i in numbers.out_spec[2:]),
        int(p["feature_group_count"]),
    )


def matrix(eqn: Any, w: Array) -> Array:
    """The kernel as [n, taps * channels], or, of several groups, [groups, n / groups, ...]."""
    out, channels, *spatial = map(int, eqn.params["dimension_numbers"].rhs_spec)
    groups = int(eqn.params["feature_group_count"])
    w = w.transpose([out, *spatial, channels])
    lead = (groups,) if groups > 1 else ()
    return w.reshape(*lead, w.shape[0] // groups, -1)


def image(eqn: Any, y: Array) -> Array:
    """The convolution's output from its products [*groups, m, n]."""
    batch, feature, *spatial = map(int, eqn.params["dimension_numbers"].out_spec)
    shape = eqn.outvars[0].aval.shape
    y = y if y.ndim == 2 else y.transpose(1, 0, 2)
    order = [batch, *spatial, feature]
    return y.reshape([shape[i] for i in order]).transpose([order.index(i) for i in range(len(order))])


def refused(eqn: Any) -> str:
    """Why a convolution can't be trained in low precision; '' if it can."""
    if int(eqn.params["batch_group_count"]) > 1:
        return "a convolution whose batch is in groups: it is the gradient of another convolution's kernel"
    return ""
