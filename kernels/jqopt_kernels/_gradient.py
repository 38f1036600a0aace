"""The gradient of products over packed weights: straight through the quantizers, to a float left operand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import decode
from ._operands import decoded, row_scale
from ._types import Kernel, Operand, Packed
from .epilogue import NOTHING, Epilogue, check


def weight_values(rhs: Packed, spec: Operand, n: int, k: int) -> jax.Array:
    """[n, k] f32: a packed weight with all of its scales."""
    w = decoded(*decode.whole(rhs.data, spec.element, k), rhs, spec, k)
    scale = row_scale(rhs, spec)
    return w if scale is None else w * scale


def held_constant(kernel: Kernel) -> Kernel:
    """The kernel with packed arrays as constants: a product has a gradient in its float operands and the bias alone.

    What XLA differentiates by itself would give scales one, which `straight_through` does not.
    """

    def constant(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        @functools.wraps(run)
        def product(*operands: Any, **options: Any) -> jax.Array:
            return run(*(lax.stop_gradient(x) if isinstance(x, Packed) else x for x in operands), **options)

        return product

    return kernel._replace(run=constant(kernel.run))


def straight_through(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`Kernel.run` with a gradient: d lhs = d y @ the decoded weight for a float lhs, d bias; nothing else has one.

    product(lhs, rhs, *, lhs_spec, rhs_spec, n, k, out_dtype, epilogue) -> [m, n]. Where there is a gradient to find,
    the epilogue is no part of the product: what the activation was given is kept.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6, 7, 8))
    def run(lhs, rhs, bias, lhs_spec, rhs_spec, n, k, out_dtype, activation):
        static = {"lhs_spec": lhs_spec, "rhs_spec": rhs_spec, "n": n, "k": k}
        return product(lhs, rhs, **static, out_dtype=out_dtype, epilogue=Epilogue(bias, activation))

    def forward(lhs, rhs, bias, lhs_spec, rhs_spec, n, k, out_dtype, activation):
        like = None if isinstance(lhs, Packed) else jnp.zeros((0,), lhs.dtype)
        if bias is None and activation is None:
            return run(lhs, rhs, None, lhs_spec, rhs_spec, n, k, out_dtype, None), (rhs, like, None)
        y = run(lhs, rhs, None, lhs_spec, rhs_spec, n, k, jnp.dtype(jnp.float32), None)
        y, back = jax.vjp(lambda y, bias: Epilogue(bias, activation).after(y).astype(out_dtype), y, bias)
        return y, (rhs, like, back)

    def backward(lhs_spec, rhs_spec, n, k, out_dtype, activation, kept, g):
        rhs, like, back = kept
        g, dbias = (g, None) if back is None else back(g)
        if like is None:
            return None, None, dbias
        w, g = weight_values(rhs, rhs_spec, n, k), g.astype(jnp.float32)
        dx = lax.dot(g, w, precision="highest", preferred_element_type=jnp.float32)
        return dx.astype(like.dtype), None, dbias

    run.defvjp(forward, backward)

    def keyword(lhs, rhs, *, lhs_spec, rhs_spec, n, k, out_dtype=jnp.float32, epilogue=NOTHING) -> Any:
        check(epilogue, n)
        return run(lhs, rhs, epilogue.bias, lhs_spec, rhs_spec, n, k, jnp.dtype(out_dtype), epilogue.activation)

    return keyword


def straight_through_groups(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """As `straight_through`, for grouped products: product(lhs, rhs, sizes, *, rhs_spec, n, k, out_dtype)."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
    def run(lhs, rhs, sizes, rhs_spec, n, k, out_dtype):
        return product(lhs, rhs, sizes, rhs_spec=rhs_spec, n=n, k=k, out_dtype=out_dtype)

    def forward(lhs, rhs, sizes, *static):
        return run(lhs, rhs, sizes, *static), (rhs, sizes, jnp.zeros((0,), lhs.dtype))

    def backward(rhs_spec, n, k, out_dtype, kept, g):
        rhs, sizes, like = kept
        w = jax.vmap(lambda packed: weight_values(packed, rhs_spec, n, k))(rhs)  # [e, n, k]
        dx = lax.ragged_dot(g.astype(jnp.float32), w, sizes.astype(jnp.int32), precision="highest")
        return dx.astype(like.dtype), None, None

    run.defvjp(forward, backward)

    def keyword(lhs, rhs, sizes, *, lhs_spec, rhs_spec, n, k, out_dtype=jnp.float32) -> Any:
        return run(lhs, rhs, sizes, rhs_spec, n, k, jnp.dtype(out_dtype))

    return keyword
