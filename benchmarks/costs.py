"""What jqopt costs, as ratios to the float model in one process: calibration, compilation, inference, planning."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import jqopt
from jqopt.hf.llama import LlamaConfig, LlamaForCausalLM

SMALL = LlamaConfig(
    vocab_size=1024, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64,
)  # fmt: skip
LLAMA_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, head_dim=128,
)  # fmt: skip
MLP_WIDTH = 1024


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU seconds of all threads of one call: compilation is measured so, since other work disturbs wall time."""
    start = time.process_time()
    jax.block_until_ready(run())
    return time.process_time() - start


def seconds(run: Callable[[], object]) -> float:
    """Wall seconds of one call, its result awaited."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def ratio(mine: Callable[[], object], plain: Callable[[], object], rounds: int) -> float:
    """Median over rounds of mine / plain, measured turn by turn so that both see the same load."""
    mine(), plain()
    return statistics.median(seconds(mine) / seconds(plain) for _ in range(rounds))


def small_model(scan: bool = False) -> tuple:
    """(model, variables, 32 batches of 4 x 128 tokens) of a 4-layer Llama of width 256."""
    model = LlamaForCausalLM(SMALL, scan_layers=scan)
    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (32, 4, 128)).astype(np.int32)
    return model, model.init(jax.random.key(0), tokens[0]), list(tokens)


def calibration(rounds: int) -> float:
    """`calibrate` with max against a jitted forward loop over the same 32 batches (both compiled)."""
    model, variables, batches = small_model()
    plan = jqopt.plan("fp8", jqopt.trace(model, variables, batches[0]))
    forward = jax.jit(model.apply)

    def loop() -> None:
        for batch in batches:
            forward(variables, batch).block_until_ready()

    return ratio(lambda: jqopt.calibrate(plan, variables, batches), loop, rounds)


def compilation(recipe: str, scan: bool, rounds: int) -> float:
    """Tracing, lowering and compiling the quantized model against the float one."""
    model, variables, batches = small_model(scan)
    plan = jqopt.plan(recipe, jqopt.trace(model, variables, batches[0]))
    quant = jqopt.quantize(plan, variables, jqopt.calibrate(plan, variables, batches[:1]))
    found = []
    for _ in range(rounds):
        jax.clear_caches()
        fast = cpu_seconds(lambda: jax.jit(lambda v, x: model.apply(v, x)).lower(variables, batches[0]).compile() and 0)
        jax.clear_caches()
        run = jqopt.apply(plan)
        slow = cpu_seconds(lambda run=run: jax.jit(lambda q, x: run(q, x)).lower(quant, batches[0]).compile() and 0)
        found.append(slow / fast)
    return statistics.median(found)


def mlp(w: dict, x: jax.Array) -> jax.Array:
    """Two products with a ReLU between."""
    return jax.nn.relu(x @ w["up"]) @ w["down"]


def mlp_weights(width: int) -> dict:
    """Square weights that keep the variance."""
    up, down = jax.random.split(jax.random.key(0))
    shape = (width, width)
    return {"up": jax.random.normal(up, shape) / width**0.5, "down": jax.random.normal(down, shape) / width**0.5}


def inference(recipe: str, tokens: int, width: int, rounds: int) -> float:
    """Quantized against float32 forward of a two-layer MLP."""
    weights, x = mlp_weights(width), jax.random.normal(jax.random.key(1), (tokens, width))
    qm = jqopt.quantize_model(mlp, recipe, params=weights, batches=[x])
    plain = jax.jit(mlp)
    return ratio(lambda: qm(x), lambda: plain(weights, x), rounds)


def decode(rounds: int) -> tuple[float, float]:
    """NVFP4 weight-only, one token, 4096 x 4096: (speed, bytes), both relative to float32."""
    w = {"w": jax.random.normal(jax.random.key(0), (4096, 4096)) / 64}
    x = jax.random.normal(jax.random.key(1), (1, 4096))

    def linear(w: dict, x: jax.Array) -> jax.Array:
        return x @ w["w"]

    qm = jqopt.quantize_model(linear, "nvfp4_weight_only", params=w, batches=[x])
    plain = jax.jit(linear)
    slower = ratio(lambda: qm(x), lambda: plain(w, x), rounds)
    return 1 / slower, qm.params["w"].nbytes / w["w"].nbytes


def planning() -> tuple[float, float]:
    """Seconds and GB of resident memory to trace and plan a 7B-shaped Llama of 32 unrolled layers."""
    import resource

    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    model = LlamaForCausalLM(LLAMA_7B)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    took = seconds(lambda: jqopt.plan("nvfp4", jqopt.trace(model, variables, tokens)) and 0)
    return took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def analysis(layers: int) -> tuple[float, float]:
    """Seconds to trace a 7B-shaped Llama of so many unrolled layers, and for what the dataflow says on top of it."""
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    model = LlamaForCausalLM(dataclasses.replace(LLAMA_7B, num_hidden_layers=layers))
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    start = time.perf_counter()
    graph = jqopt.trace(model, variables, tokens)
    traced = time.perf_counter()
    assert graph.classes and graph.groups and graph.folds
    return traced - start, time.perf_counter() - traced


def main(argv: list[str] | None = None) -> None:
    """One line for each cost, with its goal where there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds = 5 if parser.parse_args(argv).quick else 15
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; medians of {rounds} interleaved rounds")
    took, memory = planning()
    print(f"plan of a 32-layer 7B Llama          {took:7.2f} s, process {memory:.2f} GB   (goal < 10 s, < 1 GB)")
    for layers, goal in ((2, "< 0.2 s"), (80, "< 20 s")):
        traced, more = analysis(layers)
        print(f"trace of {layers:2d} layers; then the dataflow {traced:6.2f} s; {more:.2f} s   (goal {goal})")
    print(f"calibrate (max) / forward loop       {calibration(rounds):7.2f} x   (goal <= 1.15)")
    for recipe in ("int8", "fp8", "nvfp4", "mxfp8", "nvfp4_weight_only"):
        for scan in (False, True):
            name = f"compile {recipe}{', scanned' if scan else ''} / float"
            print(f"{name:36s} {compilation(recipe, scan, 3):7.2f} x   (goal <= 1.5)")
    for recipe in ("int8", "int8_per_token", "fp8", "nvfp4", "int8_weight_only", "nvfp4_weight_only"):
        goal = "   (goal <= 1)" if recipe == "int8" else ""
        print(f"{recipe + ', 512 tokens / float32':36s} {inference(recipe, 512, MLP_WIDTH, rounds):7.2f} x{goal}")
    speed, size = decode(rounds)
    print(f"nvfp4 weight-only decode, speed      {speed:7.2f} x float32   (goal >= 0.7)")
    print(f"nvfp4 weight-only decode, bytes      {size:7.3f} x float32   (goal <= 0.16)")


if __name__ == "__main__":
    main()
