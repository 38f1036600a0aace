"""The Llama decoder against a forward pass written a second time, in float64 numpy, head by head."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jqopt.errors import UnsupportedError
from jqopt.hf.llama import LlamaConfig, LlamaForCausalLM, RopeScaling, causal_attention, rope_frequencies

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,  # not hidden_size / heads: the projections are not square
    rms_norm_eps=1e-5,
    rope_theta=500.0,
    tie_word_embeddings=True,
)
HF = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
IDS = np.random.default_rng(0).integers(0, 97, (2, 13)).astype(np.int32)


def random_variables(module: LlamaForCausalLM) -> dict[str, Any]:
    """Parameters of order one, so that attention is not flat and norms scale."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), IDS)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape) + 0.1, jnp.float32), shapes)


def stacked(variables: dict[str, Any], layers: int) -> dict[str, Any]:
    """Unrolled variables as the scanned module wants them."""
    params = dict(variables["params"])
    blocks = [params.pop(f"layers_{number}") for number in range(layers)]
    return {"params": {**params, "layers": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}}


def forward(variables: dict[str, Any], config: LlamaConfig, ids: np.ndarray) -> np.ndarray:
    """Logits of one row of ids, in float64, straight from the equations."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    x = params["embed_tokens"]["embedding"][ids]
    for number in range(config.num_hidden_layers):
        block = params[f"layers_{number}"]
        x = x + attention(block["self_attn"], norm(x, block["input_layernorm"], config), config)
        y = norm(x, block["post_attention_layernorm"], config)
        gate, up, down = (block["mlp"][f"{name}_proj"]["kernel"] for name in ("gate", "up", "down"))
        x = x + ((y @ gate) / (1 + np.exp(-(y @ gate))) * (y @ up)) @ down
    x = norm(x, params["norm"], config)
    return x @ (params["embed_tokens"]["embedding"].T if config.tie_word_embeddings else params["lm_head"]["kernel"])


def norm(x, params, config):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps) * params["scale"]


def attention(params, x, config):
    d, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    q, k, v = (x @ params[f"{name}_proj"]["kernel"] for name in "qkv")
    outs = []
    for head in range(config.num_attention_heads):
        own, shared = slice(head * d, (head + 1) * d), slice(head // group * d, (head // group + 1) * d)
        qh, kh, vh = turn(q[:, own], config), turn(k[:, shared], config), v[:, shared]
        rows = []
        for t in range(len(x)):
            scores = kh[: t + 1] @ qh[t] / math.sqrt(d)
            weights = np.exp(scores - scores.max())
            rows.append(weights @ vh[: t + 1] / weights.sum())
        outs.append(np.stack(rows))
    return np.concatenate(outs, axis=-1) @ params["o_proj"]["kernel"]


def turn(x, config):
    """Pairs (i, i + d/2) as complex numbers, turned by position times frequency."""
    half = config.head_dim // 2
    angles = np.outer(np.arange(len(x)), config.rope_theta ** (-np.arange(half) / half))
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], axis=-1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("groups", [(6, 2), (4, 4), (4, 1)])
def test_logits_equal_an_independent_forward_pass(tied, groups):
    heads, kv_heads = groups
    config = dataclasses.replace(
        CONFIG, tie_word_embeddings=tied, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    module = LlamaForCausalLM(config)
    variables = random_variables(module)
    expected = np.stack([forward(variables, config, row) for row in IDS])
    found = jax.jit(module.apply)(variables, IDS)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_and_unrolled_agree(remat):
    unrolled, scanned = LlamaForCausalLM(CONFIG), LlamaForCausalLM(CONFIG, scan_layers=True, remat=remat)
    variables = random_variables(unrolled)
    other = stacked(variables, CONFIG.num_hidden_layers)
    wanted = jax.tree.map(lambda x: x.shape, jax.eval_shape(scanned.init, jax.random.key(0), IDS))
    assert jax.tree.map(lambda x: x.shape, other) == wanted

    def loss(module):
        return lambda v: jnp.mean(jax.nn.log_softmax(module.apply(v, IDS))[..., 0])

    np.testing.assert_allclose(unrolled.apply(variables, IDS), scanned.apply(other, IDS), atol=1e-4)
    grads = jax.tree.map(np.asarray, jax.jit(jax.grad(loss(unrolled)))(variables))
    assert_trees_close(stacked(grads, CONFIG.num_hidden_layers), jax.jit(jax.grad(loss(scanned)))(other), atol=1e-4)


def assert_trees_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=atol), a, b)


def test_remat_unrolled_changes_nothing():
    plain, remat = LlamaForCausalLM(CONFIG), LlamaForCausalLM(CONFIG, remat=True)
    variables = random_variables(plain)
    np.testing.assert_array_equal(jax.jit(plain.apply)(variables, IDS), jax.jit(remat.apply)(variables, IDS))


def test_compute_dtype():
    """bfloat16 parameters and computation stay bfloat16 inside, and logits come out float32 and near."""
    module = LlamaForCausalLM(CONFIG, dtype=jnp.bfloat16)
    variables = random_variables(module)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    assert module.apply(narrow, IDS, method="hidden").dtype == jnp.bfloat16
    exact = LlamaForCausalLM(CONFIG).apply(variables, IDS)
    found = module.apply(narrow, IDS)
    assert found.dtype == jnp.float32
    assert np.linalg.norm(found - exact) < 0.05 * np.linalg.norm(exact)


def test_a_later_token_changes_nothing_before_it():
    module = LlamaForCausalLM(CONFIG)
    variables = random_variables(module)
    changed = IDS.copy()
    changed[:, 9] = (changed[:, 9] + 1) % 97
    a, b = module.apply(variables, IDS), module.apply(variables, changed)
    np.testing.assert_allclose(a[:, :9], b[:, :9], atol=1e-5)
    assert np.abs(a[:, 9:] - b[:, 9:]).min(axis=(0, 2)).max() > 0


def test_attention_of_equal_keys_is_the_running_mean():
    v = np.random.default_rng(2).normal(size=(1, 5, 1, 4)).astype(np.float32)
    q = k = jnp.ones_like(v)
    expected = np.cumsum(v, axis=1) / np.arange(1, 6)[None, :, None, None]
    np.testing.assert_allclose(causal_attention(q, k, jnp.asarray(v)), expected[:, :, 0], rtol=1e-5)


def llama3_frequency(frequency: float) -> float:
    """One frequency by the branches of transformers' `_compute_llama3_parameters`."""
    old, low, high = LLAMA3["original_max_position_embeddings"], 1.0, 4.0
    wavelength = 2 * math.pi / frequency
    if wavelength < old / high:
        return frequency
    if wavelength > old / low:
        return frequency / LLAMA3["factor"]
    smooth = (old / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / LLAMA3["factor"] + smooth * frequency


def test_rope_scaling():
    plain = 500.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(rope_frequencies(CONFIG), plain, rtol=1e-6)
    linear = dataclasses.replace(CONFIG, rope_scaling=RopeScaling("linear", 4.0))
    np.testing.assert_allclose(rope_frequencies(linear), plain / 4, rtol=1e-6)
    config = LlamaConfig.from_hf(HF | {"head_dim": 64, "rope_theta": 500.0, "rope_scaling": LLAMA3})
    expected = [llama3_frequency(500.0 ** (-i / 32)) for i in range(32)]
    assert len({e * 500.0 ** (i / 32) for i, e in enumerate(expected)}) > 3, "all three branches are used"
    np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-5)


def test_config_defaults_are_transformers():
    config = LlamaConfig.from_hf(HF | {"hidden_size": 36})
    assert (config.num_key_value_heads, config.head_dim) == (6, 6)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 10000.0)
    assert not config.tie_word_embeddings
    assert config.rope_scaling is None


def test_config_of_transformers_5():
    five = {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}, "tie_word_embeddings": True}
    config = LlamaConfig.from_hf(HF | {"hidden_size": 36} | five)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64.0)
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "mish"}, "hidden_act is 'mish'; known are silu, .*ACTIVATIONS"),
        ({"vocab_size": None}, "vocab_size is None; expected a positive whole number"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
        ({"num_key_value_heads": 4}, "6 is no multiple of num_key_value_heads 4"),
        (
            {"rope_scaling": {"rope_type": "cubic", "factor": 2.0}},
            "'cubic' is not computed; .* default, linear, llama3",
        ),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' .* cached keys .* write that"),
        ({"rope_scaling": {"rope_type": "yarn"}, "max_position_embeddings": 64}, "'yarn' lacks factor"),
        (
            {"head_dim": 8, "max_position_embeddings": 64}
            | {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0, 3.0, 4.0]}},
            "short_factor has 1 numbers; expected 4",
        ),
        ({"rope_scaling": {"type": "linear"}}, "'linear' lacks factor"),
    ],
)
def test_what_the_decoder_cannot_do(change, words):
    with pytest.raises(UnsupportedError, match=words):
        LlamaConfig.from_hf(HF | change)
