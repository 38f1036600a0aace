"""A cache of packed keys and values: its bytes, what is read back, attention over it, decoding with it."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import jqopt
from jqopt import _numerics, formats, kv_cache
from jqopt.hf import decode
from jqopt.hf.llama import LlamaConfig, LlamaForCausalLM
from tests import arrays

B, LENGTH, HEADS, D = 2, 12, 2, 32
CAST = {"format": "fp8", "scaling": "cast"}
SPECS = {
    "fp8": CAST,
    "nvfp4": {"format": "nvfp4", "scaling": "cast"},
    "nvfp4 rotated": {"format": "nvfp4", "scaling": "cast", "rotate": True},
    "int8": {"format": "int8", "granularity": "token"},
    "mxfp8": "mxfp8",
    "mxfp6": "mxfp6",
    "mxfp4": "mxfp4",
}


def tokens(count, seed=0):
    return arrays.normal(seed, (2, B, count, HEADS, D))


def empty(spec, **options):
    return kv_cache.init((B, LENGTH, HEADS, D), spec, dtype=jnp.float32, **options)


@pytest.mark.parametrize(
    ("spec", "each"),
    [  # bytes of one head's vector of 32 values: its codes and scales
        (CAST, 32), (SPECS["nvfp4"], 16 + 2), (SPECS["int8"], 32 + 4), ("mxfp8", 33), ("mxfp6", 24 + 1), ("mxfp4", 17),
    ],
)  # fmt: skip
def test_it_holds_packed_bytes(spec, each):
    cache = empty(spec)
    whole = 2 * 4 if isinstance(spec, dict) and spec.get("scaling") == "cast" else 0  # k's and v's float32 scale
    assert cache.nbytes == 2 * B * LENGTH * HEADS * each + whole
    assert {x.dtype for x in jax.tree.leaves(cache) if x.ndim == 4} <= {
        jnp.dtype(t) for t in ("uint8", "int8", "float32")
    }
    assert cache.k.data.dtype.itemsize == 1 and cache.shape == (B, LENGTH, HEADS, D)
    k, v = kv_cache.read(cache)
    assert k.shape == v.shape == (B, LENGTH, HEADS, D) and not k.any() and not v.any()


def test_fp8_bits_are_ml_dtypes_bits():
    k, v = tokens(LENGTH)
    cache = kv_cache.append(empty(CAST), k, v, 0)
    expected = np.asarray(k).astype(ml_dtypes.float8_e4m3fn)
    assert (np.asarray(cache.k.data) == expected.view(np.uint8)).all()
    assert (np.asarray(kv_cache.read(cache)[0]) == expected.astype(np.float32)).all()


@pytest.mark.parametrize("name", SPECS)
def test_what_is_read_is_what_quantizing_in_a_model_gives(name):
    k, v = tokens(LENGTH)
    spec = SPECS[name]
    cache = kv_cache.append(empty(spec), k, v, 0)
    one = jqopt.load_recipe({"kv_cache": spec}).operands["v"]
    scale = jnp.float32(1) if one.scaling == "cast" else None
    granularity = "channel" if one.granularity == "token" else one.granularity
    expected = _numerics.qdq_matrix(
        v.reshape(-1, D), formats.get(one.format), granularity=granularity, tensor_scale=scale
    ).reshape(v.shape)
    assert (kv_cache.read(cache)[1] == expected).all()
    worst = {"mxfp4": 0.3, "nvfp4": 0.3, "nvfp4 rotated": 0.3}.get(name, 0.1)
    assert jnp.linalg.norm(kv_cache.read(cache)[0] - k) < worst * jnp.linalg.norm(k)


@pytest.mark.parametrize("name", SPECS)
def test_token_by_token_in_a_scan_is_all_at_once(name):
    k, v = tokens(LENGTH)
    start = empty(SPECS[name])

    def step(cache, x):
        position, k, v = x
        return kv_cache.append(cache, k[:, None], v[:, None], position), None

    xs = (jnp.arange(LENGTH), k.swapaxes(0, 1), v.swapaxes(0, 1))
    scanned, _ = jax.jit(lambda c: lax.scan(step, c, xs))(start)
    whole = jax.jit(kv_cache.append)(start, k, v, 0)
    assert jax.tree.structure(scanned) == jax.tree.structure(whole)
    for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(whole), strict=True):
        assert a.dtype == b.dtype and (a == b).all()


def test_in_a_while_loop_and_at_a_position_for_each_sequence():
    k, v = tokens(1)

    def body(state):
        i, cache = state
        return i + 1, kv_cache.append(cache, k * i.astype(jnp.float32), v, i)

    _, cache = jax.jit(lambda c: lax.while_loop(lambda s: s[0] < 4, body, (jnp.int32(0), c)))(empty(CAST))
    read, _ = kv_cache.read(cache)
    assert not read[:, 4:].any() and (read[:, 1] == k[:, 0].astype(jnp.float8_e4m3fn).astype(jnp.float32)).all()
    apart, _ = kv_cache.read(kv_cache.append(empty(CAST), k, v, jnp.asarray([3, 7])))
    assert [sorted({int(i) for i in np.nonzero(np.asarray(x))[0]}) for x in apart] == [[3], [7]]


@pytest.mark.parametrize("name", ["fp8", "nvfp4 rotated"])
def test_attention_over_it(name):
    """Against attention over what `read` gives; the causal mask is by position."""
    k, v = tokens(LENGTH)
    cache = kv_cache.append(empty(SPECS[name]), k, v, 0)
    q = arrays.normal(5, (B, 3, 2 * HEADS, D))
    mine = kv_cache.attend(cache, q, 4)
    rk, rv = (jnp.repeat(x, 2, axis=2) for x in kv_cache.read(cache))
    mask = jnp.arange(LENGTH)[None, :] <= 4 + jnp.arange(3)[:, None]
    theirs = jax.nn.dot_product_attention(q, rk, rv, mask=mask[None, None], implementation="xla")
    np.testing.assert_allclose(mine, theirs, atol=2e-6)
    apart = kv_cache.attend(cache, q, jnp.asarray([4, 4]))
    np.testing.assert_allclose(apart, mine, atol=1e-6)


CONFIG = LlamaConfig(64, 32, 48, 2, 4, 2, 16)


def llama():
    model = LlamaForCausalLM(CONFIG)
    prompt = jax.random.randint(jax.random.key(1), (2, 5), 0, 64)
    return model, jax.tree.map(lambda a: 4 * a, jax.jit(model.init)(jax.random.key(0), prompt)), prompt


def test_calibrated_scales_and_biases_go_into_a_cache():
    model, variables, prompt = llama()
    qm = jqopt.quantize_model(model, "defaults/kv_nvfp4_affine", params=variables, batches=[prompt])
    spec = qm.plan.recipe.operands["k"]
    caches = decode.init_cache(model, 2, 8, spec, scales=qm.quant.attention)
    cache = caches["layers_1"]["self_attn"]["kv"]
    scales = qm.quant.attention["layers_1/self_attn"]
    assert cache.k.tensor_scale == scales["k_scale"] and (cache.v.bias == scales["v_bias"]).all()
    k, _ = kv_cache.read(cache)
    np.testing.assert_allclose(k[0, 0], scales["k_bias"], atol=1e-6)  # an empty position reads as the bias
    # a step over a cache computes what the model does whose operands are quantized
    step = partial(model.apply, method="decode", mutable="cache", length=5)
    logits, _ = jax.jit(step)({"params": variables["params"], "cache": caches}, prompt, jnp.int32(0))
    np.testing.assert_allclose(logits, qm(prompt), atol=2e-4 * float(jnp.abs(logits).max()))


def test_generating_with_a_wide_cache_is_generating_without_one():
    """int8 for each token is near enough to float that every choice is the one that the float model makes."""
    model, variables, prompt = llama()
    cache = decode.init_cache(model, 2, 12, {"format": "int8", "granularity": "token"})
    ids, cache = decode.generate(model, variables, prompt, 7, cache)
    best = jnp.argmax(jax.jit(model.apply)(variables, ids[:, :-1]), axis=-1)
    assert ids.shape == (2, 12) and (ids[:, :5] == prompt).all() and (ids[:, 5:] == best[:, 4:]).all()
    assert cache["layers_0"]["self_attn"]["kv"].k.data.dtype == jnp.int8


def test_errors():
    with pytest.raises(jqopt.UnsupportedError, match=r"takes one calibrated k_scale, found no scales; .*scaling: cast"):
        empty("fp8")
    with pytest.raises(jqopt.UnsupportedError, match=r"found k_scale of shape \(3,\)"):
        empty("fp8", scales={"k_scale": jnp.ones(3), "v_scale": jnp.ones(3)})
    with pytest.raises(jqopt.UnsupportedError, match="values that aren't there yet"):
        empty({"format": "fp8", "scaling": "dynamic"})
    with pytest.raises(jqopt.UnsupportedError, match=r"affine takes k_bias of shape \[2, 32\], found None"):
        empty({**CAST, "affine": True})
    with pytest.raises(jqopt.RecipeError, match="unknown format 'fp9'; did you mean 'fp8'"):
        empty("fp9")
    cache, (k, v) = empty(CAST), tokens(3)
    with pytest.raises(jqopt.UnsupportedError, match="3 tokens at position 10 don't fit into a cache of 12"):
        kv_cache.append(cache, k, v, 10)
    with pytest.raises(jqopt.UnsupportedError, match=r"v has shape \[2, 3, 2, 16\]; this cache takes \[2, at most 12"):
        kv_cache.append(cache, k, v[..., :16], 0)
    with pytest.raises(jqopt.UnsupportedError, match=r"q has shape \[2, 3, 3, 32\]; .* a multiple of 2, 32\]"):
        kv_cache.attend(cache, jnp.zeros((2, 3, 3, D)), 0)
    model, variables, prompt = llama()
    with pytest.raises(jqopt.UnsupportedError, match="need a cache of 8 positions; this one has 7"):
        decode.generate(model, variables, prompt, 4, decode.init_cache(model, 2, 7, CAST))
