"""Small models for the dependency analysis: each takes its widths as fields, so that a pruned one can be built.

`CASES[name]` has the module, its widths and its inputs; `build(name, width=smaller)` makes it with random parameters.
Sizes are chosen to differ, so that two axes that only happen to be equally long are never mistaken for one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.experimental import pallas as pl

from jqopt.hf.llama import LlamaConfig, LlamaForCausalLM
from tests import arrays

INIT = nn.initializers.lecun_normal()
NORMAL = nn.initializers.normal(0.5)
IMAGE = arrays.normal(0, (2, 8, 8, 3))
FEATURES = arrays.normal(1, (4, 15))
VOCAB = 19
TOKENS = jax.random.randint(jax.random.key(2), (2, 5), 0, VOCAB, jnp.int32)
SOURCE = jax.random.randint(jax.random.key(3), (2, 7), 0, VOCAB, jnp.int32)


# ------------------------------------------------------------------------------------------- convolutions


def conv(features: int, window: int, name: str, **options: Any) -> nn.Conv:
    return nn.Conv(features, (window, window), name=name, **options)


def batch_norm(name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=True, name=name)


class Cnn(nn.Module):
    """Two convolutions added, a third concatenated to the sum, a fourth over both; averaged into a dense layer."""

    wide: int
    side: int
    last: int
    flatten: bool = False

    @nn.compact
    def __call__(self, x):
        a = nn.relu(batch_norm("bn1")(conv(self.wide, 3, "conv1")(x)))
        b = nn.relu(batch_norm("bn2")(conv(self.wide, 3, "conv2")(a)))
        r = a + b
        c = conv(self.side, 1, "conv3")(r)
        x = nn.relu(conv(self.last, 3, "conv4")(jnp.concatenate([r, c], axis=-1)))
        if not self.flatten:
            return nn.Dense(10, name="fc")(x.mean((1, 2)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.pool(x, 0.0, jax.lax.add, (2, 2), (2, 2), "VALID") / 4.0
        return nn.Dense(10, name="fc")(x.reshape(x.shape[0], -1))


class BasicBlock(nn.Module):
    inner: int
    out: int
    stride: int

    @nn.compact
    def __call__(self, x):
        y = conv(self.inner, 3, "conv1", strides=self.stride, use_bias=False)(x)
        y = conv(self.out, 3, "conv2", use_bias=False)(nn.relu(batch_norm("bn1")(y)))
        y = batch_norm("bn2")(y)
        if self.stride != 1:
            x = batch_norm("bn_proj")(conv(self.out, 1, "proj", strides=self.stride, use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A stem and three stages; the first has an identity shortcut, the others a strided projection."""

    out0: int
    out1: int
    out2: int
    inner0: int
    inner1: int
    inner2: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(batch_norm("bn_stem")(conv(self.out0, 3, "stem", use_bias=False)(x)))
        x = BasicBlock(self.inner0, self.out0, 1, name="stage0")(x)
        x = BasicBlock(self.inner1, self.out1, 2, name="stage1")(x)
        x = BasicBlock(self.inner2, self.out2, 2, name="stage2")(x)
        return nn.Dense(10, name="fc")(x.mean((1, 2)))


class Bottleneck(nn.Module):
    first: int
    second: int
    out: int
    project: bool

    @nn.compact
    def __call__(self, x):
        y = nn.relu(batch_norm("bn1")(conv(self.first, 1, "conv1", use_bias=False)(x)))
        y = nn.relu(batch_norm("bn2")(conv(self.second, 3, "conv2", use_bias=False)(y)))
        y = batch_norm("bn3")(conv(self.out, 1, "conv3", use_bias=False)(y))
        if self.project:
            x = conv(self.out, 1, "proj", use_bias=False)(x)
        return nn.relu(x + y)


class BottleneckResNet(nn.Module):
    """1x1, 3x3, 1x1 blocks; the second block adds to what the first one's projection made."""

    out: int
    first0: int
    second0: int
    first1: int
    second1: int

    @nn.compact
    def __call__(self, x):
        x = Bottleneck(self.first0, self.second0, self.out, True, name="block0")(x)
        x = Bottleneck(self.first1, self.second1, self.out, False, name="block1")(x)
        return nn.Dense(10, name="fc")(x.mean((1, 2)))


class DepthwiseCnn(nn.Module):
    """A depthwise convolution over a concatenation, then a pointwise one, as in MobileNet."""

    left: int
    right: int
    out: int

    @nn.compact
    def __call__(self, x):
        a = nn.relu6(conv(self.left, 3, "stem", strides=2)(x))
        b = conv(self.right, 1, "branch")(a)
        x = jnp.concatenate([a, b], axis=-1)
        x = conv(self.left + self.right, 3, "depthwise", feature_group_count=self.left + self.right)(x)
        x = nn.relu6(batch_norm("bn")(x))
        x = nn.relu6(conv(self.out, 1, "pointwise")(x))
        return nn.Dense(10, name="fc")(x.mean((1, 2)))


class DepthMultiplier(nn.Module):
    """Every channel becomes `times` channels of its own."""

    channels: int
    times: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(conv(self.channels, 3, "conv1")(x))
        x = conv(self.channels * self.times, 3, "depthwise", feature_group_count=self.channels)(x)
        return nn.Dense(10, name="fc")(nn.relu(x).mean((1, 2)))


class GroupedConv(nn.Module):
    """A convolution in groups between two ordinary ones."""

    groups: int
    size: int
    out: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(conv(self.groups * self.size, 3, "conv1")(x))
        x = nn.relu(conv(self.groups * self.out, 3, "conv2", feature_group_count=self.groups)(x))
        return nn.Dense(10, name="fc")(x.mean((1, 2)))


class GroupNormCnn(nn.Module):
    groups: int
    size: int
    out: int

    @nn.compact
    def __call__(self, x):
        x = conv(self.groups * self.size, 3, "conv1")(x)
        x = nn.relu(nn.GroupNorm(self.groups, name="norm")(x))
        return nn.Dense(10, name="fc")(nn.relu(conv(self.out, 3, "conv2")(x)).mean((1, 2)))


class SqueezeExcite(nn.Module):
    channels: int
    squeeze: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(conv(self.channels, 3, "conv1")(x))
        gate = nn.relu(nn.Dense(self.squeeze, name="squeeze")(x.mean((1, 2))))
        gate = nn.sigmoid(nn.Dense(self.channels, name="excite")(gate))
        x = x * gate[:, None, None, :]
        return nn.Dense(10, name="fc")(x.mean((1, 2)))


class UNet(nn.Module):
    """Down, up by a transposed convolution, and the skipped channels beside what came up."""

    top: int
    bottom: int
    up: int
    out: int

    @nn.compact
    def __call__(self, x):
        skip = nn.relu(conv(self.top, 3, "enter")(x))
        x = nn.max_pool(skip, (2, 2), (2, 2))
        x = nn.relu(conv(self.bottom, 3, "bottom_conv")(x))
        x = nn.relu(nn.ConvTranspose(self.up, (2, 2), strides=(2, 2), name="upsample")(x))
        x = nn.relu(conv(self.out, 3, "merge")(jnp.concatenate([x, skip], axis=-1)))
        return conv(2, 1, "leave")(x)


# ------------------------------------------------------------------------------------------- attention


class RMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def norm(kind: str, name: str) -> nn.Module:
    return RMSNorm(name=name) if kind == "rms" else nn.LayerNorm(name=name)


def dense(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, name=name)


def attend(q, k, v):
    """Softmax attention over [batch, tokens, heads, depth]; the scale does not depend on the depth."""
    weights = nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) * 0.5, axis=-1)
    return jnp.einsum("bhts,bshe->bthe", weights, v)


class DenseAttention(nn.Module):
    """Separate dense q, k, v; heads by reshape. q and k have their own depth, v has another."""

    heads: int
    depth: int
    value: int

    @nn.compact
    def __call__(self, x, memory=None):
        memory = x if memory is None else memory

        def project(x, name: str, depth: int):
            y = dense(self.heads * depth, name)(x)
            return y.reshape(*x.shape[:-1], self.heads, depth)

        q, k = project(x, "q", self.depth), project(memory, "k", self.depth)
        mixed = attend(q, k, project(memory, "v", self.value))
        return dense(x.shape[-1], "o")(mixed.reshape(*x.shape[:-1], -1))


class GeneralAttention(nn.Module):
    """The same, with kernels that are stored by head."""

    heads: int
    depth: int
    value: int

    @nn.compact
    def __call__(self, x):
        q = nn.DenseGeneral((self.heads, self.depth), name="q")(x)
        k = nn.DenseGeneral((self.heads, self.depth), name="k")(x)
        v = nn.DenseGeneral((self.heads, self.value), name="v")(x)
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="o")(attend(q, k, v))


class LibraryAttention(nn.Module):
    """Flax's own."""

    heads: int
    depth: int

    @nn.compact
    def __call__(self, x):
        mha = nn.MultiHeadDotProductAttention(
            num_heads=self.heads, qkv_features=self.heads * self.depth, deterministic=True, name="mha"
        )
        return mha(x)


class FusedQkv(nn.Module):
    """One kernel, its output split in three."""

    heads: int
    depth: int
    value: int

    @nn.compact
    def __call__(self, x):
        h, d, e = self.heads, self.depth, self.value
        q, k, v = jnp.split(dense(h * (2 * d + e), "qkv")(x), [h * d, 2 * h * d], axis=-1)
        lead = x.shape[:-1]
        mixed = attend(q.reshape(*lead, h, d), k.reshape(*lead, h, d), v.reshape(*lead, h, e))
        return dense(x.shape[-1], "o")(mixed.reshape(*lead, h * e))


class ReshapedQkv(nn.Module):
    """One kernel, its output reshaped to [batch, tokens, 3, heads, depth]."""

    heads: int
    depth: int

    @nn.compact
    def __call__(self, x):
        h, d = self.heads, self.depth
        qkv = dense(3 * h * d, "qkv")(x).reshape(*x.shape[:-1], 3, h, d)
        mixed = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return dense(x.shape[-1], "o")(mixed.reshape(*x.shape[:-1], h * d))


class GroupedQueries(nn.Module):
    """Several query heads read one key and value head: by `jnp.repeat`, or by an einsum over groups."""

    kv: int
    repeat: int
    depth: int
    value: int
    by: str

    @nn.compact
    def __call__(self, x):
        g, r, d, e = self.kv, self.repeat, self.depth, self.value
        lead = x.shape[:-1]
        q, k, v = dense(g * r * d, "q")(x), dense(g * d, "k")(x), dense(g * e, "v")(x)
        k, v = k.reshape(*lead, g, d), v.reshape(*lead, g, e)
        if self.by == "repeat":
            mixed = attend(q.reshape(*lead, g * r, d), jnp.repeat(k, r, axis=2), jnp.repeat(v, r, axis=2))
        else:
            scores = jnp.einsum("btgrd,bsgd->bgrts", q.reshape(*lead, g, r, d), k) * 0.5
            mixed = jnp.einsum("bgrts,bsge->btgre", nn.softmax(scores, axis=-1), v)
        return dense(x.shape[-1], "o")(mixed.reshape(*lead, g * r * e))


def rope_angles(tokens: int, half: int):
    angles = np.arange(tokens, dtype=np.float32)[:, None] * (0.1 ** np.arange(half, dtype=np.float32))
    return np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]


def rope_halves(x):
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = rope_angles(x.shape[1], x.shape[-1] // 2)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rope_strided(x):
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = rope_angles(x.shape[1], x.shape[-1] // 2)
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


def rope_pairs(x):
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    cos, sin = rope_angles(x.shape[1], x.shape[-1] // 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


ROPES = {"halves": rope_halves, "strided": rope_strided, "pairs": rope_pairs}


class RopeAttention(nn.Module):
    """Rotated q and k: position j turns with its partner by an angle that depends on j."""

    heads: int
    depth: int
    value: int
    rope: str

    @nn.compact
    def __call__(self, x):
        lead, rotate = x.shape[:-1], ROPES[self.rope]
        q = dense(self.heads * self.depth, "q")(x).reshape(*lead, self.heads, self.depth)
        k = dense(self.heads * self.depth, "k")(x).reshape(*lead, self.heads, self.depth)
        v = dense(self.heads * self.value, "v")(x).reshape(*lead, self.heads, self.value)
        return dense(x.shape[-1], "o")(attend(rotate(q), rotate(k), v).reshape(*lead, -1))


class Mlp(nn.Module):
    ff: int

    @nn.compact
    def __call__(self, x):
        return dense(x.shape[-1], "down")(nn.gelu(dense(self.ff, "up")(x)))


class GatedMlp(nn.Module):
    """down(silu(gate) * up): two kernels, or one that is split or sliced."""

    ff: int
    by: str = "two"

    @nn.compact
    def __call__(self, x):
        if self.by == "two":
            gate, up = dense(self.ff, "gate")(x), dense(self.ff, "up")(x)
        elif self.by == "split":
            gate, up = jnp.split(dense(2 * self.ff, "gate_up")(x), 2, axis=-1)
        elif self.by == "slices":
            both = dense(2 * self.ff, "gate_up")(x)
            gate, up = both[..., : self.ff], both[..., self.ff :]
        else:
            both = dense(2 * self.ff, "gate_up")(x).reshape(*x.shape[:-1], self.ff, 2)
            gate, up = both[..., 0], both[..., 1]
        return dense(x.shape[-1], "down")(nn.silu(gate) * up)


class Residual(nn.Module):
    """A table, one part added to the residual stream, a head; without a norm pruning is exact."""

    hidden: int
    part: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, self.hidden, name="embed")(tokens)
        return dense(VOCAB, "head")(x + self.part()(x))


def residual(part: type[nn.Module], **fixed: Any) -> Callable[..., nn.Module]:
    """A factory of `Residual` around one part: `hidden` is its own width, the others the part's."""

    def make(hidden: int, **widths: Any) -> nn.Module:
        return Residual(hidden, partial(part, **widths, **fixed, name="part"))

    return make


class Transformer(nn.Module):
    """Two pre-norm blocks of attention and a gated MLP, each with its own inner width."""

    hidden: int
    heads: int
    depth: int
    value: int
    ff0: int
    ff1: int
    norm: str = "rms"
    attention: type[nn.Module] = DenseAttention

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, self.hidden, name="embed")(tokens)
        for i, ff in enumerate((self.ff0, self.ff1)):
            attention = self.attention(self.heads, self.depth, self.value, name=f"attn{i}")
            x = x + attention(norm(self.norm, f"norm{i}a")(x))
            x = x + GatedMlp(ff, name=f"mlp{i}")(norm(self.norm, f"norm{i}b")(x))
        return dense(VOCAB, "head")(norm(self.norm, "norm")(x))


class Lm(nn.Module):
    """GPT-2 like: learned positions, LayerNorm, attention and MLP in a row or side by side, head tied or not."""

    hidden: int
    heads: int
    depth: int
    value: int
    ff: int
    tied: bool
    parallel: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, self.hidden, name="embed")
        x = embed(tokens) + self.param("positions", NORMAL, (11, self.hidden))[: tokens.shape[1]]
        attention, mlp = DenseAttention(self.heads, self.depth, self.value, name="attn"), Mlp(self.ff, name="mlp")
        if self.parallel:
            y = nn.LayerNorm(name="norm1")(x)
            x = x + attention(y) + mlp(y)
        else:
            x = x + attention(nn.LayerNorm(name="norm1")(x))
            x = x + mlp(nn.LayerNorm(name="norm2")(x))
        x = nn.LayerNorm(name="norm")(x)
        return embed.attend(x) if self.tied else dense(VOCAB, "head")(x)


class EncoderDecoder(nn.Module):
    """The decoder's k and v read what the encoder made."""

    encoder: int
    decoder: int
    ff: int
    heads: int
    depth: int
    value: int

    @nn.compact
    def __call__(self, source, target):
        memory = nn.Embed(VOCAB, self.encoder, name="source")(source)
        memory = memory + Mlp(self.ff, name="mlp")(memory)
        x = nn.Embed(VOCAB, self.decoder, name="target")(target)
        x = x + DenseAttention(self.heads, self.depth, self.value, name="cross")(x, memory)
        return dense(VOCAB, "head")(x)


class Vit(nn.Module):
    """Patches by a strided convolution, a class token in front, learned positions; one block."""

    hidden: int
    heads: int
    depth: int
    ff: int
    pool: str

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.hidden, (4, 4), strides=(4, 4), name="patch")(x)
        x = x.reshape(x.shape[0], -1, self.hidden)
        cls = self.param("cls", NORMAL, (1, 1, self.hidden))
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, self.hidden)), x], axis=1)
        x = x + self.param("positions", NORMAL, (1, x.shape[1], self.hidden))
        x = x + LibraryAttention(self.heads, self.depth, name="attn")(nn.LayerNorm(name="norm1")(x))
        x = x + Mlp(self.ff, name="mlp")(nn.LayerNorm(name="norm2")(x))
        x = nn.LayerNorm(name="norm")(x)
        return dense(10, "head")(x.mean(1) if self.pool == "mean" else x[:, 0])


class Mixer(nn.Module):
    """One MLP over the tokens, one over the channels."""

    hidden: int
    token_ff: int
    channel_ff: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.hidden, (4, 4), strides=(4, 4), name="patch")(x)
        x = x.reshape(x.shape[0], -1, self.hidden)
        y = nn.LayerNorm(name="norm1")(x).swapaxes(1, 2)
        x = x + Mlp(self.token_ff, name="token_mlp")(y).swapaxes(1, 2)
        x = x + Mlp(self.channel_ff, name="channel_mlp")(nn.LayerNorm(name="norm2")(x))
        return dense(10, "head")(x.mean(1))


def llama(
    hidden: int, ff: int, layers: int, kv: int, repeat: int, depth: int, *, scan: bool = False, remat: bool = False
) -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=ff, num_hidden_layers=layers,
        num_attention_heads=kv * repeat, num_key_value_heads=kv, head_dim=depth,
    )  # fmt: skip
    return LlamaForCausalLM(config, scan_layers=scan, remat=remat)


# ------------------------------------------------------------------------------------------- experts


class MoeDense(nn.Module):
    """Every expert runs on every token; a softmax weighs them."""

    experts: int
    ff: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        gates = nn.softmax(dense(self.experts, "router")(x), axis=-1)
        h = jnp.einsum("btd,edf->btef", x, self.param("w_in", INIT, (self.experts, width, self.ff)))
        y = jnp.einsum("btef,efd->bted", nn.relu(h), self.param("w_out", INIT, (self.experts, self.ff, width)))
        return jnp.einsum("bte,bted->btd", gates, y)


class MoeTopK(nn.Module):
    """The two best experts of each token, dispatched by one-hot einsums (no token is dropped)."""

    experts: int
    ff: int

    @nn.compact
    def __call__(self, x):
        width, flat = x.shape[-1], x.reshape(-1, x.shape[-1])
        gates, chosen = jax.lax.top_k(nn.softmax(dense(self.experts, "router")(flat), axis=-1), 2)
        chosen = jax.nn.one_hot(chosen, self.experts)  # [tokens, 2, experts]
        slot = jnp.cumsum(chosen.sum(1).astype(jnp.int32), axis=0) - 1
        place = jax.nn.one_hot(slot, flat.shape[0])  # [tokens, experts, slots]
        combine = jnp.einsum("nk,nke,nec->nec", gates, chosen, place)
        dispatch = jnp.einsum("nke,nec->nec", chosen, place)
        slots = jnp.einsum("nec,nd->ecd", dispatch, flat)
        h = jnp.einsum("ecd,edf->ecf", slots, self.param("w_in", INIT, (self.experts, width, self.ff)))
        y = jnp.einsum("ecf,efd->ecd", nn.relu(h), self.param("w_out", INIT, (self.experts, self.ff, width)))
        return jnp.einsum("nec,ecd->nd", combine, y).reshape(x.shape)


class MoeRagged(nn.Module):
    """The best expert of each token: tokens sorted by expert, two ragged dots, rows put back."""

    experts: int
    ff: int

    @nn.compact
    def __call__(self, x):
        width, flat = x.shape[-1], x.reshape(-1, x.shape[-1])
        gates, chosen = jax.lax.top_k(nn.softmax(dense(self.experts, "router")(flat), axis=-1), 1)
        order = jnp.argsort(chosen[:, 0])
        sizes = jnp.bincount(chosen[:, 0], length=self.experts).astype(jnp.int32)
        w_in = self.param("w_in", INIT, (self.experts, width, self.ff))
        w_out = self.param("w_out", INIT, (self.experts, self.ff, width))
        y = jax.lax.ragged_dot(nn.relu(jax.lax.ragged_dot(flat[order], w_in, sizes)), w_out, sizes)
        return (jnp.zeros_like(flat).at[order].set(y) * gates).reshape(x.shape)


# ------------------------------------------------------------------------------------------- recurrence


class Recurrent(nn.Module):
    """A dense layer, an RNN over the tokens, a head."""

    inner: int
    state: int
    cell: Callable[..., nn.RNNCellBase]

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, self.inner, name="embed")(tokens)
        x = nn.RNN(self.cell(self.state, name="cell"), name="rnn")(x)
        return dense(VOCAB, "head")(x)


# ------------------------------------------------------------------------------------------- NNX


class NnxBlock(nnx.Module):
    def __init__(self, hidden: int, ff: int, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(hidden, rngs=rngs)
        self.up, self.down = nnx.Linear(hidden, ff, rngs=rngs), nnx.Linear(ff, hidden, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class NnxStack(nnx.Module):
    """A table, one block, and blocks stacked and scanned."""

    def __init__(self, hidden: int, ff: int, scanned_ff: int, layers: int):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(VOCAB, hidden, rngs=rngs)
        self.block = NnxBlock(hidden, ff, rngs)
        stack = nnx.vmap(NnxBlock, in_axes=(None, None, 0), out_axes=0)
        self.layers = nnx.split_rngs(splits=layers)(stack)(hidden, scanned_ff, rngs)
        self.head = nnx.Linear(hidden, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x = self.block(self.embed(tokens))
        x = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        return self.head(x)


class NnxCnn(nnx.Module):
    def __init__(self, first: int, second: int):
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(3, first, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(first, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(first, second, (3, 3), rngs=rngs)
        self.fc = nnx.Linear(second, 10, rngs=rngs)

    def __call__(self, x):
        return self.fc(nnx.relu(self.conv2(nnx.relu(self.bn(self.conv1(x))))).mean((1, 2)))


class NnxAttention(nnx.Module):
    def __init__(self, hidden: int, heads: int, depth: int):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(VOCAB, hidden, rngs=rngs)
        self.mha = nnx.MultiHeadAttention(heads, hidden, heads * depth, decode=False, keep_rngs=False, rngs=rngs)
        self.head = nnx.Linear(hidden, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        return self.head(x + self.mha(x))


# ------------------------------------------------------------------------------------------- what can't be looked into


def pallas_negate(x):
    def kernel(x_ref, o_ref):
        o_ref[...] = -x_ref[...]

    return pl.pallas_call(kernel, jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)


def host_negate(x):
    return jax.pure_callback(lambda x: -np.asarray(x), jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def cholesky(x):
    gram = jnp.einsum("bi,bj->ij", x, x) + jnp.eye(x.shape[-1])
    return x @ jnp.linalg.cholesky(gram)


def solve(x):
    gram = jnp.einsum("bi,bj->ij", x, x) + jnp.eye(x.shape[-1])
    return jnp.linalg.solve(gram, x.T).T


def spectrum(x):
    return jnp.abs(jnp.fft.fft(x, axis=-1))


def ordered(x):
    return jnp.sort(x, axis=-1)


def halve_until_small(x):
    return jax.lax.while_loop(lambda x: jnp.max(jnp.abs(x)) > 0.25, lambda x: x / 2, x)


def either(x):
    return jax.lax.cond(x.sum() > 0, lambda x: 2 * x, lambda x: jnp.tanh(x), x)


@jax.custom_vjp
def clipped(x):
    return jnp.clip(x, -1, 1)


clipped.defvjp(lambda x: (clipped(x), None), lambda _, g: (g,))


class Around(nn.Module):
    """A function between two dense layers, and an MLP beside it that it doesn't touch."""

    inner: int
    hidden: int
    ff: int
    function: Callable

    @nn.compact
    def __call__(self, x):
        x = dense(self.inner, "before")(x)
        x = dense(self.hidden, "after")(self.function(x))
        return dense(10, "head")(x + Mlp(self.ff, name="mlp")(x))


OPAQUE: Mapping[str, tuple[Callable, str]] = {
    "pallas": (pallas_negate, "pallas_call"),
    "callback": (host_negate, "pure_callback"),
    "cholesky": (cholesky, "cholesky"),
    "fft": (spectrum, "fft"),
}
"""What analysis can't follow, with the primitive to blame."""

FOLLOWED: Mapping[str, Callable] = {"while": halve_until_small, "cond": either, "custom_vjp": clipped}
"""What it can: the feature axis passes."""

TOUCHED: Mapping[str, Callable] = {"solve": solve, "sort": ordered}
"""What is known but holds the axis it works on."""


# ------------------------------------------------------------------------------------------- the table


@dataclasses.dataclass(frozen=True)
class Case:
    """A model: `module(**widths)` runs on `inputs`."""

    module: Callable[..., Any]
    inputs: tuple[Any, ...]
    widths: Mapping[str, int]

    def make(self, **smaller: int) -> Any:
        unknown = set(smaller) - set(self.widths)
        assert not unknown, f"no such width: {sorted(unknown)}; there are {sorted(self.widths)}"
        return self.module(**{**self.widths, **smaller})


def case(module: Callable[..., Any], *inputs: Any, **widths: int) -> Case:
    return Case(module, inputs, widths)


RESNET = {"out0": 5, "out1": 7, "out2": 11, "inner0": 6, "inner1": 9, "inner2": 13}
ATTENTION = {"heads": 3, "depth": 4, "value": 5}
LLAMA = {"hidden": 20, "ff": 23, "layers": 3, "kv": 2, "repeat": 3, "depth": 4}

CASES: Mapping[str, Case] = {
    "cnn": case(Cnn, IMAGE, wide=7, side=5, last=6),
    "cnn_flatten": case(partial(Cnn, flatten=True), IMAGE, wide=7, side=5, last=6),
    "resnet": case(ResNet, IMAGE, **RESNET),
    "bottleneck": case(BottleneckResNet, IMAGE, out=8, first0=5, second0=11, first1=6, second1=7),
    "depthwise": case(DepthwiseCnn, IMAGE, left=6, right=4, out=7),
    "depth_multiplier": case(DepthMultiplier, IMAGE, channels=5, times=4),
    "grouped": case(GroupedConv, IMAGE, groups=2, size=5, out=7),
    "group_norm": case(GroupNormCnn, IMAGE, groups=4, size=5, out=7),
    "squeeze_excite": case(SqueezeExcite, IMAGE, channels=11, squeeze=4),
    "unet": case(UNet, IMAGE, top=5, bottom=7, up=6, out=9),
    "transformer_rms": case(Transformer, TOKENS, hidden=14, ff0=17, ff1=13, **ATTENTION),
    "transformer_layer": case(partial(Transformer, norm="layer"), TOKENS, hidden=14, ff0=17, ff1=13, **ATTENTION),
    "transformer_general": case(
        partial(Transformer, attention=GeneralAttention), TOKENS, hidden=14, ff0=17, ff1=13, **ATTENTION
    ),
    "dense_attention": case(residual(DenseAttention), TOKENS, hidden=14, **ATTENTION),
    "general_attention": case(residual(GeneralAttention), TOKENS, hidden=14, **ATTENTION),
    "mha": case(residual(LibraryAttention), TOKENS, hidden=14, heads=3, depth=4),
    "fused_qkv": case(residual(FusedQkv), TOKENS, hidden=14, **ATTENTION),
    "reshaped_qkv": case(residual(ReshapedQkv), TOKENS, hidden=14, heads=5, depth=4),
    "gqa_repeat": case(residual(GroupedQueries, by="repeat"), TOKENS, hidden=14, kv=2, repeat=3, depth=4, value=5),
    "gqa_einsum": case(residual(GroupedQueries, by="einsum"), TOKENS, hidden=14, kv=2, repeat=3, depth=4, value=5),
    "rope_halves": case(residual(RopeAttention, rope="halves"), TOKENS, hidden=14, heads=3, depth=8, value=5),
    "rope_strided": case(residual(RopeAttention, rope="strided"), TOKENS, hidden=14, heads=3, depth=8, value=5),
    "rope_pairs": case(residual(RopeAttention, rope="pairs"), TOKENS, hidden=14, heads=3, depth=8, value=5),
    "gated": case(residual(GatedMlp, by="two"), TOKENS, hidden=14, ff=9),
    "gate_up_split": case(residual(GatedMlp, by="split"), TOKENS, hidden=14, ff=9),
    "gate_up_slices": case(residual(GatedMlp, by="slices"), TOKENS, hidden=14, ff=9),
    "gate_up_pairs": case(residual(GatedMlp, by="pairs"), TOKENS, hidden=14, ff=9),
    "llama": case(llama, TOKENS, **LLAMA),
    "llama_one_layer": case(llama, TOKENS, **{**LLAMA, "layers": 1}),
    "llama_remat": case(partial(llama, remat=True), TOKENS, **LLAMA),
    "llama_scan": case(partial(llama, scan=True), TOKENS, **LLAMA),
    "llama_scan_remat": case(partial(llama, scan=True, remat=True), TOKENS, **LLAMA),
    "moe_dense": case(residual(MoeDense), TOKENS, hidden=14, experts=5, ff=9),
    "moe_top_k": case(residual(MoeTopK), TOKENS, hidden=14, experts=5, ff=9),
    "moe_ragged": case(residual(MoeRagged), TOKENS, hidden=14, experts=5, ff=9),
    "lstm": case(partial(Recurrent, cell=nn.LSTMCell), TOKENS, inner=8, state=11),
    "lstm_optimized": case(partial(Recurrent, cell=nn.OptimizedLSTMCell), TOKENS, inner=8, state=11),
    "gru": case(partial(Recurrent, cell=nn.GRUCell), TOKENS, inner=8, state=11),
    "vit_cls": case(partial(Vit, pool="cls"), IMAGE, hidden=14, heads=3, depth=6, ff=17),
    "vit_mean": case(partial(Vit, pool="mean"), IMAGE, hidden=14, heads=3, depth=6, ff=17),
    "mixer": case(Mixer, IMAGE, hidden=14, token_ff=9, channel_ff=17),
    "encoder_decoder": case(EncoderDecoder, SOURCE, TOKENS, encoder=10, decoder=14, ff=17, **ATTENTION),
    "lm_tied": case(partial(Lm, tied=True), TOKENS, hidden=14, ff=17, **ATTENTION),
    "lm_untied": case(partial(Lm, tied=False), TOKENS, hidden=14, ff=17, **ATTENTION),
    "lm_parallel": case(partial(Lm, tied=False, parallel=True), TOKENS, hidden=14, ff=17, **ATTENTION),
    "nnx_stack": case(NnxStack, TOKENS, hidden=14, ff=9, scanned_ff=17, layers=3),
    "nnx_cnn": case(NnxCnn, IMAGE, first=5, second=7),
    "nnx_mha": case(NnxAttention, TOKENS, hidden=14, heads=3, depth=4),
    **{name: case(partial(Around, function=f), FEATURES, inner=8, hidden=9, ff=13) for name, (f, _) in OPAQUE.items()},
    **{name: case(partial(Around, function=f), FEATURES, inner=8, hidden=9, ff=13) for name, f in FOLLOWED.items()},
    **{name: case(partial(Around, function=f), FEATURES, inner=8, hidden=9, ff=13) for name, f in TOUCHED.items()},
}


class Built(NamedTuple):
    """A model that can run: `model` and `params` are what `jqopt.trace` takes; an NNX module has no `params`."""

    model: Any
    params: Any
    inputs: tuple[Any, ...]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.model, *self.inputs) if self.params is None else (self.model, self.params, *self.inputs)


STORED = nnx.Any(nnx.Param, nnx.BatchStat)
"""What an NNX module stores besides random keys."""


def fill(tree: Any) -> Any:
    """Random numbers of the tree's shapes. No leaf is one number all over: a forgotten axis would not be noticed."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    draw = np.random.default_rng(0)

    def filled(key: tuple, leaf: Any) -> jax.Array:
        words = jax.tree_util.keystr(key)
        if any(word in words for word in ("bias", "scale", "mean", "var")):
            low = 0.5 if "scale" in words or "var" in words else -0.5
            return jnp.asarray(draw.uniform(low, low + 1, leaf.shape), leaf.dtype)
        fan_in = math.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 1
        return jnp.asarray(draw.normal(size=leaf.shape) * min(1.0, 1.5 / math.sqrt(fan_in)), leaf.dtype)

    return treedef.unflatten([filled(key, leaf) for key, leaf in flat])


def shapes(name: str, **smaller: int) -> Built:
    """The model `name` with some widths made smaller, and the shapes of its parameters (NNX: inside the module)."""
    made = CASES[name]
    model = nnx.eval_shape(partial(made.make, **smaller)) if name.startswith("nnx") else made.make(**smaller)
    if isinstance(model, nnx.Module):
        return Built(model, None, made.inputs)
    return Built(model, jax.eval_shape(model.init, jax.random.key(1), *made.inputs), made.inputs)


def build(name: str, **smaller: int) -> Built:
    """The same with random parameters."""
    built = shapes(name, **smaller)
    if built.params is not None:
        return built._replace(params=fill(built.params))
    nnx.update(built.model, fill(nnx.state(built.model, STORED)))
    return built


def state(built: Built) -> Any:
    """The parameters of either kind of model, as `jqopt.transforms` gives them back."""
    return nnx.state(built.model, STORED) if built.params is None else built.params


def runner(built: Built) -> Callable[[Any], jax.Array]:
    """parameters -> output, compiled without much optimizing."""
    if built.params is None:
        definition, _, rest = nnx.split(built.model, STORED, ...)

        def call(params: Any) -> jax.Array:
            return nnx.merge(definition, params, rest)(*built.inputs)
    else:

        def call(params: Any) -> jax.Array:
            return built.model.apply(params, *built.inputs)

    return jax.jit(call, compiler_options={"xla_backend_optimization_level": 0})


# ------------------------------------------------------------------------------------------- what must come out


class Spot(NamedTuple):
    """Where a class sits in a parameter axis: index i is at `start + i * stride`, up to `stop`, and around again."""

    symbol: str
    start: int
    stop: int | None  # None: the end of the axis
    stride: int


class Free(NamedTuple):
    """A class that may change: the width it is (or its size), every place it sits in, and what holds when it is pruned.

    `alone`: the model with only this width smaller takes the pruned parameters. `exact`: that model computes what the
    whole one does with the pruned positions of the class at zero; false where a norm or softmax reduces over the class.
    """

    width: str | int
    spots: tuple[Spot, ...]
    exact: bool = True
    permutable: bool = True

    @property
    def name(self) -> str:
        return f"{self.width}:{self.spots[0].symbol}"

    @property
    def alone(self) -> bool:
        return isinstance(self.width, str)


class Pinned(NamedTuple):
    """Axes that are one class and must stay; `why` is a word of the reason."""

    spots: tuple[Spot, ...]
    why: str


def expand(text: str) -> list[str]:
    """`a/{b,c}[0]` -> `a/b[0]`, `a/c[0]`."""
    start = text.find("{")
    if start < 0:
        return [text]
    stop = text.index("}", start)
    choices = text[start + 1 : stop].split(",")
    return [done for choice in choices for done in expand(text[:start] + choice + text[stop + 1 :])]


def spots(text: str) -> tuple[Spot, ...]:
    """`q/{kernel[1],bias[0]}@0:12*4`: both axes, positions 0 to 12, one index every 4; `@` and `*` may be left out."""
    return tuple(spot(word) for words in text.split() for word in expand(words))


def spot(word: str) -> Spot:
    word, _, stride = word.partition("*")
    symbol, _, part = word.partition("@")
    start, _, stop = part.partition(":")
    return Spot(symbol, int(start or 0), int(stop) if stop else None, int(stride or 1))


def free(width: str | int, text: str, **options: bool) -> Free:
    return Free(width, spots(text), **options)


def pinned(text: str, why: str) -> Pinned:
    return Pinned(spots(text), why)


def bn(name: str, prefix: str = "") -> str:
    """The four vectors of a BatchNorm; its statistics are state."""
    return f"{prefix}{name}/{{scale,bias}}[0] batch_stats/{prefix}{name}/{{mean,var}}[0]"


def stage(i: int, into: str) -> tuple[Free, Free]:
    """Classes of ResNet's strided stages; `into`: what reads the stage."""
    s = f"stage{i}/"
    out = f"{s}{{conv2,proj}}/kernel[3] {bn('bn2', s)} {bn('bn_proj', s)} {into}"
    return free(f"inner{i}", f"{s}conv1/kernel[3] {bn('bn1', s)} {s}conv2/kernel[2]"), free(f"out{i}", out)


FC = pinned("fc/{kernel[1],bias[0]}", "output")
HEAD = pinned("head/{kernel[1],bias[0]}", "output")
PIXELS = pinned("conv1/kernel[2]", "input")
TABLE = pinned("embed/embedding[0]", "looked up")

CNN = (
    free("wide", f"conv1/{{kernel[3],bias[0]}} {bn('bn1')} conv2/{{kernel[2],kernel[3],bias[0]}} {bn('bn2')}"
         " conv3/kernel[2] conv4/kernel[2]@0:7"),
    free("side", "conv3/{kernel[3],bias[0]} conv4/kernel[2]@7:12"),
    free("last", "conv4/{kernel[3],bias[0]} fc/kernel[0]"),
    PIXELS, FC, pinned("conv1/kernel[0]", "moves"), pinned("conv4/kernel[1]", "moves"),
)  # fmt: skip


def dense_heads(prefix: str, alone: bool = True) -> tuple[Free, ...]:
    """DenseAttention: 3 heads, q and k of depth 4, v of depth 5."""
    p = prefix
    return (
        free("heads" if alone else 3,
             f"{p}{{q,k}}/{{kernel[1],bias[0]}}*4 {p}v/{{kernel[1],bias[0]}}*5 {p}o/kernel[0]*5"),
        free("depth" if alone else 4, f"{p}{{q,k}}/{{kernel[1],bias[0]}}"),
        free("value" if alone else 5, f"{p}v/{{kernel[1],bias[0]}} {p}o/kernel[0]"),
    )  # fmt: skip


def general_heads(p: str, alone: bool = True) -> tuple[Free, ...]:
    return (
        free("heads" if alone else 3, f"{p}{{q,k,v}}/{{kernel[1],bias[0]}} {p}o/kernel[0]"),
        free("depth" if alone else 4, f"{p}{{q,k}}/{{kernel[2],bias[1]}}"),
        free("value" if alone else 5, f"{p}v/{{kernel[2],bias[1]}} {p}o/kernel[1]"),
    )


def library_heads(p: str, depth: int) -> tuple[Free, ...]:
    """Flax's attention has one depth for q, k and v: the two classes only shrink together."""
    return (
        free("heads", f"{p}{{query,key,value}}/{{kernel[1],bias[0]}} {p}out/kernel[0]"),
        free(depth, f"{p}{{query,key}}/{{kernel[2],bias[1]}}"),
        free(depth, f"{p}value/{{kernel[2],bias[1]}} {p}out/kernel[1]"),
    )


def transformer(norm: str, out: str, heads: Callable[[str, bool], tuple[Free, ...]]) -> tuple[Free | Pinned, ...]:
    hidden = (
        f"embed/embedding[1] norm{{0a,0b,1a,1b}}/{norm} norm/{norm} attn{{0,1}}/{{q,k,v}}/kernel[0] attn{{0,1}}/o/{out}"
    )
    hidden += " mlp{0,1}/{gate,up}/kernel[0] mlp{0,1}/down/{kernel[1],bias[0]} head/kernel[0]"
    ffs = (free(f"ff{i}", f"mlp{i}/{{gate,up}}/{{kernel[1],bias[0]}} mlp{i}/down/kernel[0]") for i in (0, 1))
    return (
        free("hidden", hidden, exact=False), *ffs, *heads("attn0/", False), *heads("attn1/", False), TABLE, HEAD,
    )  # fmt: skip


def around(text: str) -> tuple[Free | Pinned, ...]:
    """`Residual`'s own classes; `text`: where the part reads and writes the residual stream."""
    return free("hidden", f"embed/embedding[1] {text} head/kernel[0]"), TABLE, HEAD


QKVO = "part/{q,k,v}/kernel[0] part/o/{kernel[1],bias[0]}"
FUSED = "part/qkv/kernel[0] part/o/{kernel[1],bias[0]}"
GATED = "part/gate_up/kernel[0] part/down/{kernel[1],bias[0]}"

GQA = (
    *around(QKVO),
    free("kv", "part/q/{kernel[1],bias[0]}*12 part/k/{kernel[1],bias[0]}*4 part/v/{kernel[1],bias[0]}*5"
         " part/o/kernel[0]*15"),
    free("repeat", "part/q/{kernel[1],bias[0]}*4 part/o/kernel[0]*5"),
    free("depth", "part/{q,k}/{kernel[1],bias[0]}"),
    free("value", "part/v/{kernel[1],bias[0]} part/o/kernel[0]"),
)  # fmt: skip

ROPE = (
    *around(QKVO),
    free("heads", "part/{q,k}/{kernel[1],bias[0]}*8 part/v/{kernel[1],bias[0]}*5 part/o/kernel[0]*5"),
    free("value", "part/v/{kernel[1],bias[0]} part/o/kernel[0]"),
)


def llama_classes(layers: int, stacked: bool, alone: bool) -> tuple[Free | Pinned, ...]:
    """Width 20, 2 kv heads x 3 query heads of depth 4, ff 23. `stacked`: a layer axis comes first in each kernel."""
    i, o = (1, 2) if stacked else (0, 1)  # the kernels' input and output axes
    names = ["layers"] if stacked else [f"layers_{n}" for n in range(layers)]
    every = "{" + ",".join(names) + "}"
    hidden = f"embed_tokens/embedding[1] {every}/{{input_layernorm,post_attention_layernorm}}/scale[{i}] norm/scale[0]"
    hidden += f" {every}/self_attn/{{q,k,v}}_proj/kernel[{i}] {every}/self_attn/o_proj/kernel[{o}]"
    hidden += f" {every}/mlp/{{gate,up}}_proj/kernel[{i}] {every}/mlp/down_proj/kernel[{o}] lm_head/kernel[0]"
    out: list[Free | Pinned] = [free("hidden", hidden, exact=False)]
    for n in names:
        a = f"{n}/self_attn/"
        kv = f"{a}q_proj/kernel[{o}]*12 {a}{{k,v}}_proj/kernel[{o}]*4 {a}o_proj/kernel[{i}]*12"
        out += [
            free("ff" if alone else 23, f"{n}/mlp/{{gate,up}}_proj/kernel[{o}] {n}/mlp/down_proj/kernel[{i}]"),
            free("kv" if alone else 2, kv),
            free("repeat" if alone else 3, f"{a}q_proj/kernel[{o}]*4 {a}o_proj/kernel[{i}]*4"),
            free(4, f"{a}v_proj/kernel[{o}] {a}o_proj/kernel[{i}]"),  # LlamaConfig has one depth for q, k and v
        ]
    if stacked:
        stack = "layers/{input_layernorm,post_attention_layernorm}/scale[0] layers/self_attn/{q,k,v,o}_proj/kernel[0]"
        out.append(free("layers", stack + " layers/mlp/{gate,up,down}_proj/kernel[0]", permutable=False))
    return (*out, pinned("embed_tokens/embedding[0]", "looked up"), pinned("lm_head/kernel[1]", "output"))


def recurrent(inner: str, state: str) -> tuple[Free | Pinned, ...]:
    return (
        free("inner", f"embed/embedding[1] {inner}"), free("state", f"{state} head/kernel[0]"), TABLE, HEAD,
    )  # fmt: skip


LSTM = recurrent(
    "cell/{ii,if,ig,io}/kernel[0]", "cell/{ii,if,ig,io}/kernel[1] cell/{hi,hf,hg,ho}/{kernel[0],kernel[1],bias[0]}"
)
VIT = (
    free("hidden", "patch/{kernel[3],bias[0]} cls[2] positions[2] {norm1,norm2,norm}/{scale,bias}[0]"
         " attn/mha/{query,key,value}/kernel[0] attn/mha/out/{kernel[2],bias[0]} mlp/up/kernel[0]"
         " mlp/down/{kernel[1],bias[0]} head/kernel[0]", exact=False),
    *library_heads("attn/mha/", 6),
    free("ff", "mlp/up/{kernel[1],bias[0]} mlp/down/kernel[0]"),
    HEAD, pinned("patch/kernel[2]", "input"), pinned("patch/kernel[0]", "moves"),
)  # fmt: skip


def lm(norms: str, *more: Pinned) -> tuple[Free | Pinned, ...]:
    hidden = f"embed/embedding[1] positions[1] {norms}/{{scale,bias}}[0] attn/{{q,k,v}}/kernel[0]"
    hidden += " attn/o/{kernel[1],bias[0]} mlp/up/kernel[0] mlp/down/{kernel[1],bias[0]}"
    head = "" if not more else " head/kernel[0]"
    return (
        free("hidden", hidden + head, exact=False),
        free("ff", "mlp/up/{kernel[1],bias[0]} mlp/down/kernel[0]"), *dense_heads("attn/"), TABLE, *more,
    )  # fmt: skip


def beside() -> tuple[Free | Pinned, ...]:
    """`Around`'s classes after the function in its middle."""
    return (
        free("hidden", "after/{kernel[1],bias[0]} mlp/up/kernel[0] mlp/down/{kernel[1],bias[0]} head/kernel[0]"),
        free("ff", "mlp/up/{kernel[1],bias[0]} mlp/down/kernel[0]"), HEAD, pinned("before/kernel[0]", "input"),
    )  # fmt: skip


INNER = free("inner", "before/{kernel[1],bias[0]} after/kernel[0]")

CLASSES: Mapping[str, tuple[Free | Pinned, ...]] = {
    "cnn": CNN,
    "cnn_flatten": CNN,  # fc reads [2 x 2 x last]: the last stays one class, the positions of the image are pinned
    "resnet": (
        free("inner0", f"stage0/conv1/kernel[3] {bn('bn1', 'stage0/')} stage0/conv2/kernel[2]"),
        free("out0", f"stem/kernel[3] {bn('bn_stem')} stage0/conv1/kernel[2] stage0/conv2/kernel[3]"
             f" {bn('bn2', 'stage0/')} stage1/{{conv1,proj}}/kernel[2]"),
        *stage(1, "stage2/{conv1,proj}/kernel[2]"), *stage(2, "fc/kernel[0]"), FC, pinned("stem/kernel[2]", "input"),
    ),
    "bottleneck": (
        *(free(f"first{i}", f"block{i}/conv1/kernel[3] {bn('bn1', f'block{i}/')} block{i}/conv2/kernel[2]")
          for i in (0, 1)),
        *(free(f"second{i}", f"block{i}/conv2/kernel[3] {bn('bn2', f'block{i}/')} block{i}/conv3/kernel[2]")
          for i in (0, 1)),
        free("out", f"block{{0,1}}/conv3/kernel[3] {bn('bn3', 'block0/')} {bn('bn3', 'block1/')} block0/proj/kernel[3]"
             " block1/conv1/kernel[2] fc/kernel[0]"),
        FC,
    ),
    "depthwise": (
        free("left", "stem/{kernel[3],bias[0]} branch/kernel[2] depthwise/{kernel[3],bias[0]}@0:6"
             " bn/{scale,bias}[0]@0:6 batch_stats/bn/{mean,var}[0]@0:6 pointwise/kernel[2]@0:6"),
        free("right", "branch/{kernel[3],bias[0]} depthwise/{kernel[3],bias[0]}@6:10"
             " bn/{scale,bias}[0]@6:10 batch_stats/bn/{mean,var}[0]@6:10 pointwise/kernel[2]@6:10"),
        free("out", "pointwise/{kernel[3],bias[0]} fc/kernel[0]"), FC,
    ),
    "depth_multiplier": (
        free("channels", "conv1/{kernel[3],bias[0]} depthwise/{kernel[3],bias[0]}*4 fc/kernel[0]*4"),
        free("times", "depthwise/{kernel[3],bias[0]} fc/kernel[0]"), PIXELS, FC,
    ),
    "grouped": (
        free("groups", "conv1/{kernel[3],bias[0]}*5 conv2/{kernel[3],bias[0]}*7 fc/kernel[0]*7"),
        free("size", "conv1/{kernel[3],bias[0]} conv2/kernel[2]"),
        free("out", "conv2/{kernel[3],bias[0]} fc/kernel[0]"), PIXELS, FC,
    ),
    "group_norm": (
        free("groups", "conv1/{kernel[3],bias[0]}*5 norm/{scale,bias}[0]*5 conv2/kernel[2]*5"),
        free("size", "conv1/{kernel[3],bias[0]} norm/{scale,bias}[0] conv2/kernel[2]", exact=False),
        free("out", "conv2/{kernel[3],bias[0]} fc/kernel[0]"), PIXELS, FC,
    ),
    "squeeze_excite": (
        free("channels", "conv1/{kernel[3],bias[0]} squeeze/kernel[0] excite/{kernel[1],bias[0]} fc/kernel[0]"),
        free("squeeze", "squeeze/{kernel[1],bias[0]} excite/kernel[0]"), PIXELS, FC,
    ),
    "unet": (
        free("top", "enter/{kernel[3],bias[0]} bottom_conv/kernel[2] merge/kernel[2]@6:11"),
        free("bottom", "bottom_conv/{kernel[3],bias[0]} upsample/kernel[2]"),
        free("up", "upsample/{kernel[3],bias[0]} merge/kernel[2]@0:6"),
        free("out", "merge/{kernel[3],bias[0]} leave/kernel[2]"),
        pinned("leave/{kernel[3],bias[0]}", "output"), pinned("enter/kernel[2]", "input"),
    ),
    "transformer_rms": transformer("scale[0]", "{kernel[1],bias[0]}", dense_heads),
    "transformer_layer": transformer("{scale,bias}[0]", "{kernel[1],bias[0]}", dense_heads),
    "transformer_general": transformer("scale[0]", "{kernel[2],bias[0]}", general_heads),
    "dense_attention": (*around(QKVO), *dense_heads("part/")),
    "general_attention": (
        *around("part/{q,k,v}/kernel[0] part/o/{kernel[2],bias[0]}"), *general_heads("part/"),
    ),
    "mha": (
        *around("part/mha/{query,key,value}/kernel[0] part/mha/out/{kernel[2],bias[0]}"),
        *library_heads("part/mha/", 4),
    ),
    "fused_qkv": (
        *around(FUSED),
        free("heads", "part/qkv/{kernel[1],bias[0]}@0:12*4 part/qkv/{kernel[1],bias[0]}@12:24*4"
             " part/qkv/{kernel[1],bias[0]}@24:39*5 part/o/kernel[0]*5"),
        free("depth", "part/qkv/{kernel[1],bias[0]}@0:12 part/qkv/{kernel[1],bias[0]}@12:24"),
        free("value", "part/qkv/{kernel[1],bias[0]}@24:39 part/o/kernel[0]"),
    ),
    "reshaped_qkv": (
        *around(FUSED),
        free("heads", "part/qkv/{kernel[1],bias[0]}*4 part/o/kernel[0]*4"),
        free("depth", "part/qkv/{kernel[1],bias[0]} part/o/kernel[0]"),
    ),
    "gqa_repeat": GQA,
    "gqa_einsum": GQA,
    "rope_halves": ROPE,
    "rope_strided": ROPE,
    "rope_pairs": ROPE,
    "gated": (
        *around("part/{gate,up}/kernel[0] part/down/{kernel[1],bias[0]}"),
        free("ff", "part/{gate,up}/{kernel[1],bias[0]} part/down/kernel[0]"),
    ),
    **dict.fromkeys(("gate_up_split", "gate_up_slices"), (
        *around(GATED),
        free("ff", "part/gate_up/{kernel[1],bias[0]}@0:9 part/gate_up/{kernel[1],bias[0]}@9:18 part/down/kernel[0]"),
    )),
    "gate_up_pairs": (*around(GATED), free("ff", "part/gate_up/{kernel[1],bias[0]}*2 part/down/kernel[0]")),
    "llama": llama_classes(3, False, False),
    "llama_one_layer": llama_classes(1, False, True),
    "llama_remat": llama_classes(3, False, False),
    "llama_scan": llama_classes(3, True, True),
    "llama_scan_remat": llama_classes(3, True, True),
    "moe_dense": (
        *around("part/router/kernel[0] part/w_in[1] part/w_out[2]"),
        free("experts", "part/router/{kernel[1],bias[0]} part/w_in[0] part/w_out[0]", exact=False),
        free("ff", "part/w_in[2] part/w_out[1]"),
    ),
    **dict.fromkeys(("moe_top_k", "moe_ragged"), (
        *around("part/router/kernel[0] part/w_in[1] part/w_out[2]"), free("ff", "part/w_in[2] part/w_out[1]"),
        pinned("part/router/{kernel[1],bias[0]}", "top_k"), pinned("part/w_in[0]", ""), pinned("part/w_out[0]", ""),
    )),
    "lstm": LSTM,
    "lstm_optimized": LSTM,
    "gru": recurrent(
        "cell/{ir,iz,in}/kernel[0]",
        "cell/{ir,iz,in}/{kernel[1],bias[0]} cell/{hr,hz}/{kernel[0],kernel[1]} cell/hn/{kernel[0],kernel[1],bias[0]}",
    ),
    "vit_cls": VIT,
    "vit_mean": VIT,
    "mixer": (
        free("hidden", "patch/{kernel[3],bias[0]} {norm1,norm2}/{scale,bias}[0] channel_mlp/up/kernel[0]"
             " channel_mlp/down/{kernel[1],bias[0]} head/kernel[0]", exact=False),
        free("token_ff", "token_mlp/up/{kernel[1],bias[0]} token_mlp/down/kernel[0]"),
        free("channel_ff", "channel_mlp/up/{kernel[1],bias[0]} channel_mlp/down/kernel[0]"), HEAD,
    ),
    "encoder_decoder": (
        free("encoder", "source/embedding[1] mlp/up/kernel[0] mlp/down/{kernel[1],bias[0]} cross/{k,v}/kernel[0]"),
        free("ff", "mlp/up/{kernel[1],bias[0]} mlp/down/kernel[0]"),
        free("decoder", "target/embedding[1] cross/q/kernel[0] cross/o/{kernel[1],bias[0]} head/kernel[0]"),
        *dense_heads("cross/"), HEAD, pinned("source/embedding[0]", "looked up"),
        pinned("target/embedding[0]", "looked up"),
    ),
    "lm_tied": lm("{norm1,norm2,norm}"),
    "lm_untied": lm("{norm1,norm2,norm}", HEAD),
    "lm_parallel": lm("{norm1,norm}", HEAD),
    "nnx_stack": (
        free("hidden", "embed/embedding[1] block/norm/{scale,bias}[0] block/up/kernel[0]"
             " block/down/{kernel[1],bias[0]} layers/norm/{scale,bias}[1] layers/up/kernel[1]"
             " layers/down/{kernel[2],bias[1]} head/kernel[0]", exact=False),
        free("ff", "block/up/{kernel[1],bias[0]} block/down/kernel[0]"),
        free("scanned_ff", "layers/up/{kernel[2],bias[1]} layers/down/kernel[1]"),
        free("layers", "layers/norm/{scale,bias}[0] layers/{up,down}/{kernel,bias}[0]", permutable=False),
        TABLE, HEAD,
    ),
    "nnx_cnn": (
        free("first", "conv1/{kernel[3],bias[0]} bn/{scale,bias}[0] state/bn/{mean,var}[0] conv2/kernel[2]"),
        free("second", "conv2/{kernel[3],bias[0]} fc/kernel[0]"), PIXELS, FC,
    ),
    "nnx_mha": (
        free("hidden", "embed/embedding[1] mha/{query,key,value}/kernel[0] mha/out/{kernel[2],bias[0]} head/kernel[0]"),
        *library_heads("mha/", 4), TABLE, HEAD,
    ),
    **{
        name: (*beside(), pinned("before/{kernel[1],bias[0]}", word), pinned("after/kernel[0]", word))
        for name, word in {"pallas": "pallas_call", "callback": "pure_callback"}.items()
    },
    **{
        name: (*beside(), pinned("before/{kernel[1],bias[0]}", ""), pinned("after/kernel[0]", ""))
        for name in ("cholesky", "fft", "solve", "sort")
    },
    **{name: (*beside(), INNER) for name in FOLLOWED},
}  # fmt: skip
"""Every class of each model that may change, from what the model computes, and some of those that must not."""
