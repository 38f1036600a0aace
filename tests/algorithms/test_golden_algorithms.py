"""smoothquant and awq against ModelOpt's calibration of two layers and of a small Llama: scales, losses, alphas."""

from __future__ import annotations

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

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "modelopt_golden.npz")
INT8, FP8 = (InputQuantizer(formats.get(f), "tensor", True) for f in ("int8", "fp8"))


def param(name: str, model: str = "mlp2") -> np.ndarray:
    """A weight [out, in] or a vector, as the goldens store it."""
    key = f"e2e/{model}/param/{name}"
    if f"{key}|int8" in GOLDEN:
        return GOLDEN[f"{key}|int8"].astype(np.float32) * np.float32(2.0) ** GOLDEN[f"{key}|exp2"]
    return (GOLDEN[f"{key}|bf16bits"].astype(np.uint32) << 16).view(np.float32)


CALIB = list(GOLDEN["e2e/mlp2/calib"])


def inputs(layer: str) -> list[np.ndarray]:
    """The batches that reach a layer of the float model: Linear(64, 128), ReLU, Linear(128, 32)."""
    if layer == "fc1":
        return CALIB
    return [np.maximum(x @ param("fc1.weight").T + param("fc1.bias"), 0) for x in CALIB]


def task(layer: str, algorithm: algorithms.Algorithm, problem: Problem) -> algorithms.Task:
    kinds = {s.name: s for s in (algorithms.CHANNELS, algorithms.MOMENTS, *algorithm.statistics)}
    state = {name: s.init(param(f"{layer}.weight").shape[1]) for name, s in kinds.items()}
    for x in inputs(layer):
        state = {name: s.update(state[name], jnp.asarray(x)) for name, s in kinds.items()}
    return algorithms.task([jnp.asarray(param(f"{layer}.weight"))], problem, state)


def golden(config: str, layer: str, name: str) -> np.ndarray:
    return GOLDEN[f"e2e/mlp2/{config}/{layer}{name}"]


@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def test_smoothquant_has_the_same_scales(layer):
    algorithm = algorithms.smoothquant(alpha=1.0)
    done = algorithm.solve(task(layer, algorithm, Problem(formats.get("int8"), "channel", INT8)))
    want = golden("INT8_SMOOTHQUANT", layer, ".input_quantizer/pre_quant_scale")
    np.testing.assert_allclose(done.pre_scale, want, rtol=2e-6)
    amax = jnp.max(statistics.channel_amax(done))
    np.testing.assert_allclose(amax, golden("INT8_SMOOTHQUANT", layer, ".input_quantizer/amax"), rtol=2e-6)
    folded = golden("INT8_SMOOTHQUANT", layer, "/weight_folded")
    np.testing.assert_allclose(done.weights[0][0], folded, rtol=4e-6)


AWQ = [("INT4_AWQ", "int4", 64, None), ("NVFP4_AWQ_LITE", "nvfp4", 16, None)]


@pytest.mark.parametrize("layer", ["fc1", "fc2"])
@pytest.mark.parametrize(("config", "name", "block", "quantizer"), AWQ)
def test_awq_has_the_same_losses_and_alpha(config, name, block, quantizer, layer):
    """ModelOpt sums, batch by batch, the mean squared error of rounded weights; second moments give all at once.

    Its int4 blocks of 128 are longer than 64 columns: there its block is the row. Under nvfp4 the weights, multiples of
    a power of two, have block scales at ties of e4m3: the last bit of a scale decides them, and changes a loss by up to
    1.6 %, ours as ModelOpt's (which multiplies where we divide); losses without such ties are equal.
    """
    algorithm = algorithms.awq(objective="weights")
    weight = param(f"{layer}.weight")
    format = formats.get(name).with_block(min(128, weight.shape[1]) if name == "int4" else block)
    here = task(layer, algorithm, Problem(format, "block", quantizer))
    mean, relative = statistics.channel_mean(here), weight_mean(here)
    grid = [scale(mean, relative, np.float32(a)) for a in np.linspace(0, 1, 11)]
    h = here.stats["moments"].sum
    losses = weight_losses(here, jnp.stack(grid)) * jnp.mean(jnp.diagonal(h)) / (CALIB[0].shape[0] * weight.shape[0])
    off = np.abs(np.asarray(losses) / golden(config, layer, "/awq_loss") - 1)
    assert np.all(off < (2e-2 if name == "nvfp4" else 1e-4)) and np.sum(off < 1e-5) >= 5, off
    best = int(np.argmin(losses))
    assert np.linspace(0, 1, 11)[best] == pytest.approx(float(golden(config, layer, "/awq_alpha")))
    want = golden(config, layer, ".input_quantizer/pre_quant_scale")
    np.testing.assert_allclose(grid[best], want, rtol=1e-4)


@pytest.mark.parametrize(("config", "name"), [("INT4_AWQ", "int4"), ("NVFP4_AWQ_LITE", "nvfp4")])
def test_awq_is_at_least_as_good_as_modelopt(config, name):
    """Without a scale is among our candidates, which ModelOpt leaves out, so no loss is above its best."""
    for layer in ("fc1", "fc2"):
        algorithm = algorithms.awq(objective="weights")
        weight = param(f"{layer}.weight")
        format = formats.get(name) if name == "nvfp4" else formats.get(name).with_block(min(128, weight.shape[1]))
        here = task(layer, algorithm, Problem(format, "block"))
        done = algorithm.solve(here)
        h = here.stats["moments"].sum
        chosen = weight_losses(here, done.pre_scale[None]) * jnp.mean(jnp.diagonal(h))
        theirs = golden(config, layer, "/awq_loss").min() * CALIB[0].shape[0] * weight.shape[0]
        assert float(chosen[0]) <= theirs * (1 + (2e-2 if name == "nvfp4" else 1e-4))


def forward(p, x):
    h = jax.nn.relu(x @ p["fc1"]["w"] + p["fc1"]["b"])
    return h @ p["fc2"]["w"] + p["fc2"]["b"]


def parameters() -> dict:
    return {n: {"w": jnp.asarray(param(f"{n}.weight").T), "b": jnp.asarray(param(f"{n}.bias"))} for n in ("fc1", "fc2")}


def test_the_whole_smoothquant_model_gives_the_same_outputs():
    """Ours folds the second scale into the first layer's rows and bias: the same numbers up to rounding of products."""
    recipe = {
        "rules": [{"match": "*", "weight": "int8", "input": "int8"}],
        "algorithm": {"name": "smoothquant", "alpha": 1.0},
    }
    qm = jqopt.quantize_model(forward, recipe, params=parameters(), batches=CALIB)
    assert qm.plan["fc2/w"].scaled == "folded" and qm.plan["fc1/w"].scaled.startswith("kept")
    out, want = np.asarray(qm(GOLDEN["e2e/mlp2/test"])), golden("INT8_SMOOTHQUANT", "", "out")
    plain = GOLDEN["e2e/mlp2/out_fp32"]
    assert np.linalg.norm(out - want) < 0.35 * np.linalg.norm(want - plain)
    assert np.linalg.norm(out - plain) < 1.1 * np.linalg.norm(want - plain)
