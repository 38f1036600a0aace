"""Small Flax Linen modules that quantization libraries trip over, each with an input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from tests import arrays

INIT = nn.initializers.lecun_normal()
X = arrays.normal(0, (4, 64))
TOKENS = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(64)(x)


class Matmul(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", INIT, (64, 64))


class JnpMatmul(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.matmul(x, self.param("w", INIT, (64, 64)))


class Tensordot(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tensordot(x, self.param("w", INIT, (64, 64)), 1)


@jax.jit
def jitted_linear(x, w):
    return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())))


class JitInside(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jitted_linear(x, self.param("w", INIT, (64, 64)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(64)(nn.relu(nn.Dense(128)(x))), None


class Scan(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers()(x, None)[0]


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x, _ = nn.remat(Block)()(x)
        return x


class RematScan(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False)
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers()(x, None)[0]


class Vmapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        experts = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=4)
        return experts(64)(x).sum(0)


@jax.custom_vjp
def custom_product(x, w):
    return x @ w


custom_product.defvjp(lambda x, w: (custom_product(x, w), (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


class CustomVjp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return custom_product(x, self.param("w", INIT, (64, 64)))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(50, 64)
        return embed.attend(nn.Dense(64)(embed(tokens)))


class TwoSame(nn.Module):
    """Two masked parameters of one shape: the dots see products, not the parameters."""

    @nn.compact
    def __call__(self, x):
        a, b = self.param("a", INIT, (64, 64)), self.param("b", INIT, (64, 64))
        dims = (((1,), (0,)), ((), ()))
        mask = jnp.ones((64, 64))
        return jax.lax.dot_general(x, a * mask, dims) + jax.lax.dot_general(x, b * mask, dims)


class ActivationShapedLikeWeight(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", INIT, (64, 64))
        dims = (((1,), (0,)), ((), ()))
        return jax.lax.dot_general(jax.lax.dot_general(x, x * 2.0, dims), w, dims)


class MoE(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", INIT, (4, 64, 64))
        return jnp.einsum("btd,edf->btef", x[:, None], w).sum((1, 2))


class MoEBatched(nn.Module):
    """Every expert has its own tokens: the expert axis is a batch axis of the dot."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", INIT, (4, 64, 64))
        return jnp.einsum("etd,edf->etf", x[:, None], w).sum(1)


class Einsum3(nn.Module):
    @nn.compact
    def __call__(self, x):
        w, v = self.param("w", INIT, (64, 32)), self.param("v", INIT, (32, 64))
        return jnp.einsum("bd,dh,ho->bo", x, w, v)


class EinsumOptimized(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.einsum("bd,dh->bh", x, self.param("w", INIT, (64, 64)), optimize=True)


class EinsumWeightFirst(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.einsum("dh,bd->bh", self.param("w", INIT, (64, 64)), x)


class Ragged(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jax.lax.ragged_dot(x, self.param("w", INIT, (2, 64, 64)), jnp.array([2, 2], jnp.int32))


class MHA(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=4)(x[None])[0]


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(64)
        return dense(nn.relu(dense(x)))


class Conv(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(8, (3,))(x[:, :, None]).mean(-1)


class DepthwiseConv(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(4, 8, 8)
        return nn.Conv(8, (3,), feature_group_count=8)(x)


class LSTM(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.OptimizedLSTMCell(64))(x[:, None, :].repeat(3, 1))[:, -1]


class GRU(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.GRUCell(64))(x[:, None, :].repeat(3, 1))[:, -1]


class Split(nn.Module):
    @nn.compact
    def __call__(self, x):
        a, b = jnp.split(self.param("w", INIT, (64, 128)), 2, axis=1)
        dims = (((1,), (0,)), ((), ()))
        return jax.lax.dot_general(x, a, dims) + jax.lax.dot_general(x, b, dims)


class WeightNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(64))(x)


class DenseGeneral(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral((8, 8))(x).reshape(x.shape[0], 64)


class Bf16(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(64, dtype=jnp.bfloat16)(x).astype(jnp.float32)


class JitDense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.jit(nn.Dense)(64)(x)


class CondDense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: m(2 * x), nn.Dense(64, name="d"), x)


class WhileDense(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", INIT, (64, 64))
        return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w)), (0, x))[1]


class StackedByHand(nn.Module):
    """One stacked parameter, unrolled by a Python loop."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", INIT, (3, 64, 64))
        for i in range(3):
            x = jnp.tanh(x @ w[i])
        return x


class FusedHeads(nn.Module):
    """A kernel stored flat and reshaped to heads inside."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", INIT, (64, 64)).reshape(64, 8, 8)
        return jnp.einsum("bd,dhk->bhk", x, w).reshape(x.shape[0], 64)


SEVERAL = {Tied: TOKENS, ActivationShapedLikeWeight: arrays.normal(3, (64, 64))}
PEERS_25 = (
    Dense, Matmul, JnpMatmul, Tensordot, JitInside, Scan, Remat, Vmapped, CustomVjp, TwoSame, MoE, Einsum3,
    EinsumOptimized, EinsumWeightFirst, Ragged, MHA, Shared, Conv, LSTM, Split, WeightNorm, DenseGeneral, Bf16,
    Tied, ActivationShapedLikeWeight,
)  # fmt: skip
MORE = (
    RematScan, MoEBatched, DepthwiseConv, GRU, JitDense, CondDense, WhileDense, StackedByHand, FusedHeads,
)  # fmt: skip


def build(cls: type[nn.Module]):
    """(module, variables, input) of one class."""
    x = SEVERAL.get(cls, X)
    module = cls()
    return module, module.init(jax.random.key(1), x), x
