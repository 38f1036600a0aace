"""smoothquant and awq against ModelOpt's calibration of a small Llama without positions: by linear, and whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jqopt
from jqopt import algorithms, formats
from jqopt.algorithms import InputQuantizer, Problem
from jqopt.algorithms import _statistics as statistics
from jqopt.algorithms.awq import scale, weight_losses, weight_mean

pytestmark = pytest.mark.quick


GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "modelopt_golden.npz")
BATCHES = list(GOLDEN["e2e/llama/calib"])
TOKENS = BATCHES[0].size
HEADS, KV_HEADS, WIDTH = 4, 2, 32
LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
LAYERS = [f"layers.0.{name}" for name in LINEARS]
LAYERS += [pytest.param(f"layers.1.{name}", marks=pytest.mark.slow) for name in LINEARS]


def param(name: str) -> np.ndarray:
    """A weight [out, in] or a vector, as the goldens store it."""
    key = f"e2e/llama/param/{name}.weight"
    if f"{key}|int8" in GOLDEN:
        return GOLDEN[f"{key}|int8"].astype(np.float32) * np.float32(2.0) ** GOLDEN[f"{key}|exp2"]
    return (GOLDEN[f"{key}|bf16bits"].astype(np.uint32) << 16).view(np.float32)


NAMES = sorted({k.split("/")[-1].split(".weight")[0] for k in GOLDEN if k.startswith("e2e/llama/param/")})


def parameters() -> dict[str, jax.Array]:
    """Weights as [in, out], vectors and the table as they are, under their names."""
    whole = ("embed_tokens",)
    return {n: jnp.asarray(param(n).T if param(n).ndim == 2 and n not in whole else param(n)) for n in NAMES}


def rms_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + jnp.float32(1e-6)) * gain


def forward(p: dict, ids: jax.Array, see: Callable[[str, jax.Array], None] = lambda name, x: None) -> jax.Array:
    """A Llama of two layers whose attention knows no positions; `see` is shown what each linear reads."""

    def linear(name: str, x: jax.Array) -> jax.Array:
        see(name, x)
        return x @ p[name]

    x = p["embed_tokens"][ids]
    batch, tokens, _ = x.shape
    for layer in ("layers.0", "layers.1"):
        h = rms_norm(x, p[f"{layer}.input_layernorm"])
        q, k, v = (linear(f"{layer}.self_attn.{n}_proj", h) for n in "qkv")
        q = q.reshape(batch, tokens, KV_HEADS, HEADS // KV_HEADS, WIDTH)
        k, v = (y.reshape(batch, tokens, KV_HEADS, WIDTH) for y in (k, v))
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k) * jnp.float32(WIDTH**-0.5)
        weights = jax.nn.softmax(jnp.where(np.tril(np.ones((tokens, tokens), bool)), scores, -jnp.inf), -1)
        mixed = jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, tokens, -1)
        x = x + linear(f"{layer}.self_attn.o_proj", mixed)
        h = rms_norm(x, p[f"{layer}.post_attention_layernorm"])
        gate, up = (linear(f"{layer}.mlp.{n}_proj", h) for n in ("gate", "up"))
        x = x + linear(f"{layer}.mlp.down_proj", jax.nn.silu(gate) * up)
    return linear("lm_head", rms_norm(x, p["norm"]))


@functools.cache
def inputs() -> dict[str, list[np.ndarray]]:
    """What each linear of the float model reads, batch by batch."""
    found: dict[str, list] = {}
    for ids in BATCHES:
        forward(parameters(), jnp.asarray(ids), lambda n, x: found.setdefault(n, []).append(np.asarray(x)))
    return found


def task(layer: str, algorithm: algorithms.Algorithm, problem: Problem) -> algorithms.Task:
    """The problem of one linear, as ModelOpt solves it: q, k and v each on its own."""
    kinds = {s.name: s for s in (algorithms.CHANNELS, algorithms.MOMENTS, *algorithm.statistics)}
    weight = param(layer)
    state = {name: s.init(weight.shape[1]) for name, s in kinds.items()}
    for x in inputs()[layer]:
        rows = jnp.asarray(x.reshape(-1, x.shape[-1]))
        state = {name: s.update(state[name], rows) for name, s in kinds.items()}
    return algorithms.task([jnp.asarray(weight)], problem, state)


def golden(config: str, layer: str, name: str) -> np.ndarray:
    return GOLDEN[f"e2e/llama/{config}/{layer}{name}"]


def test_the_float_model_is_the_same():
    got = forward(parameters(), jnp.asarray(GOLDEN["e2e/llama/test"]))
    np.testing.assert_allclose(got, GOLDEN["e2e/llama/out_fp32"], atol=1e-5)


INT8, FP8 = (InputQuantizer(formats.get(f), "tensor", True) for f in ("int8", "fp8"))


@pytest.mark.parametrize("layer", LAYERS)
def test_smoothquant_has_the_same_scales(layer):
    algorithm = algorithms.smoothquant(alpha=1.0)
    done = algorithm.solve(task(layer, algorithm, Problem(formats.get("int8"), "channel", INT8)))
    want = golden("INT8_SMOOTHQUANT", layer, ".input_quantizer/pre_quant_scale")
    np.testing.assert_allclose(done.pre_scale, want, rtol=4e-6)
    amax = golden("INT8_SMOOTHQUANT", layer, ".input_quantizer/amax")
    np.testing.assert_allclose(jnp.max(statistics.channel_amax(done)), amax, rtol=2e-6)
    rows = golden("INT8_SMOOTHQUANT", layer, ".weight_quantizer/amax")
    np.testing.assert_allclose(np.abs(done.weights[0][0]).max(axis=1, keepdims=True), rows, rtol=4e-6)


@functools.cache
def searched(layer: str, name: str) -> tuple[list, np.ndarray, algorithms.Task]:
    """ModelOpt's eleven candidates for a linear, our loss of each (as its sum over batches), and the task."""
    here = task(layer, algorithms.awq(objective="weights"), Problem(formats.get(name).with_block(128), "block", None))
    mean, relative = statistics.channel_mean(here), weight_mean(here)
    grid = [scale(mean, relative, np.float32(a)) for a in np.linspace(0, 1, 11)]
    losses = weight_losses(here, jnp.stack(grid)) * jnp.mean(jnp.diagonal(here.stats["moments"].sum))
    return grid, np.asarray(losses) / (TOKENS * param(layer).shape[0]), here


@pytest.mark.parametrize("layer", LAYERS)
def test_awq_has_the_same_losses_and_alpha(layer):
    grid, losses, _ = searched(layer, "int4")
    np.testing.assert_allclose(losses, golden("INT4_AWQ", layer, "/awq_loss"), rtol=2e-6)
    best = int(np.argmin(losses))
    assert best / 10 == pytest.approx(float(golden("INT4_AWQ", layer, "/awq_alpha")))
    want = golden("INT4_AWQ", layer, ".input_quantizer/pre_quant_scale")
    np.testing.assert_allclose(grid[best], want, rtol=2e-6)
    blocks = np.abs(param(layer) / np.asarray(grid[best])).reshape(-1, 128).max(axis=1, keepdims=True)
    np.testing.assert_allclose(blocks, golden("INT4_AWQ", layer, ".weight_quantizer/amax"), rtol=2e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_w4a8_searches_with_both_roundings(layer):
    """ModelOpt's losses of W4A8 are those of int4 alone: the FP8 that follows isn't seen, and once it picks worse."""
    _, alone, _ = searched(layer, "int4")
    theirs = golden("W4A8_AWQ_BETA", layer, "/awq_loss")
    np.testing.assert_allclose(alone, theirs, rtol=2e-6)
    grid, both, here = searched(layer, "int4_fp8")
    alpha = round(10 * float(golden("W4A8_AWQ_BETA", layer, "/awq_alpha")))
    assert both.min() <= both[alpha]
    want = golden("W4A8_AWQ_BETA", layer, ".input_quantizer/pre_quant_scale")
    np.testing.assert_allclose(grid[alpha], want, rtol=2e-6)
    whole = np.abs(param(layer) / np.asarray(grid[alpha])).max()
    np.testing.assert_allclose(whole, golden("W4A8_AWQ_BETA", layer, ".weight_quantizer.1/amax"), rtol=2e-6)
    done = algorithms.awq(objective="weights").solve(here)
    assert done.pre_scale is not None
    chosen = weight_losses(here, done.pre_scale[None]) * jnp.mean(jnp.diagonal(here.stats["moments"].sum))
    assert float(chosen[0]) / (TOKENS * param(layer).shape[0]) <= both[alpha] * (1 + 1e-6)


CONFIGS = {
    "INT8_SMOOTHQUANT": ({"weight": "int8", "input": "int8"}, {"name": "smoothquant", "alpha": 1.0}),
    "INT4_AWQ": ({"weight": "int4"}, "awq"),
    "W4A8_AWQ_BETA": ({"weight": ["int4", "fp8"], "input": "fp8"}, "awq"),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_the_whole_model_is_nearer_to_the_float_one_than_modelopts(config):
    """One search for q, k and v (gate and up) instead of one each, so that the scale folds into the norm before them.

    ModelOpt searches each alone and averages the scales when it exports; these outputs are those before it does.
    """
    formats, algorithm = CONFIGS[config]
    kept = [{"match": name, "keep": True} for name in ("lm_head", "embed_tokens")]
    recipe = {"rules": [*kept, {"match": "*", **formats}], "algorithm": algorithm}
    qm = jqopt.quantize_model(forward, recipe, params=parameters(), batches=[jnp.asarray(ids) for ids in BATCHES])
    assert {d.scaled for d in qm.plan.quantized.values()} == {"folded"}
    out, plain = np.asarray(qm(jnp.asarray(GOLDEN["e2e/llama/test"]))), GOLDEN["e2e/llama/out_fp32"]
    theirs = GOLDEN[f"e2e/llama/{config}/out"]
    assert np.linalg.norm(out - plain) < np.linalg.norm(theirs - plain)
