"""What calibrating with each algorithm costs, against the plain jitted forward loop over the same 32 batches."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax

import jqopt
from benchmarks.costs import seconds, small_model

LIMITS: dict[str, tuple[Any, str, str, float | None, str]] = {
    # name: (algorithm, recipe it is put into, calibrator of the input, goal, ModelOpt's)
    "max": ("max", "fp8", "", 1.15, "1.3"),
    "percentile": ("max", "int8", "percentile", 1.5, ""),
    "entropy": ("max", "int8", "entropy", 1.5, ""),
    "mse of inputs": ("max", "int8", "mse", 1.5, ""),
    "mse": ("mse", "int4_block_weight_only", "", None, ""),
    "local_hessian": ("local_hessian", "nvfp4_weight_only", "", None, ""),
    "smoothquant, fixed": ({"name": "smoothquant", "alpha": 0.5}, "int8", "", 1.3, ""),
    "smoothquant, searched": ("smoothquant", "int8", "", 1.3, ""),
    "awq": ("awq", "int4_block_weight_only", "", 2.5, "17"),
    "awq_clip": ("awq_clip", "int4_block_weight_only", "", 6.0, "91"),
    "gptq": ("gptq", "int4_block_weight_only", "", 4.0, "5.6"),
    "gptq, 2 passes": ({"name": "gptq", "passes": 2}, "int4_block_weight_only", "", None, ""),
    "svdquant + gptq": (["smoothquant", "svdquant", "gptq"], "nvfp4", "", None, ""),
    "gptq, layerwise": ("gptq", "nvfp4_weight_only", "layerwise", None, ""),
    "qep + gptq, layerwise": (["qep", "gptq"], "nvfp4_weight_only", "layerwise", None, ""),
}


def recipe(algorithm: Any, base: str, option: str) -> dict:
    """The recipe of a row."""
    found = {"extends": [base], "algorithm": algorithm}
    if option == "layerwise":
        return {**found, "layerwise": True}
    if option:
        rule = {"match": {"path": "*", "op": ["dot_general"]}, "weight": base}
        return {
            "extends": ["defaults/skip_sensitive"], "algorithm": algorithm,
            "rules": [{**rule, "input": {"format": base, "calibrator": option}}],
        }  # fmt: skip
    return found


def row(name: str, rounds: int) -> tuple[float, float]:
    """(calibrating and quantizing, compiled, over the forward loop; CPU seconds that the first run takes more)"""
    model, variables, batches = small_model()
    algorithm, base, option, _, _ = LIMITS[name]
    plan = jqopt.plan(recipe(algorithm, base, option), jqopt.trace(model, variables, batches[0]))
    forward = jax.jit(model.apply)

    def mine() -> Any:
        return jqopt.quantize(plan, variables, batches=batches)

    def plain() -> Any:
        return [jax.block_until_ready(forward(variables, b)) for b in batches]

    plain()
    start = time.process_time()
    jax.block_until_ready(mine())
    first = time.process_time() - start
    start = time.process_time()
    jax.block_until_ready(mine())
    again = time.process_time() - start
    return statistics.median(seconds(mine) / seconds(plain) for _ in range(rounds)), first - again


def main(flags: list[str] | None = None) -> None:
    """The table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds = 1 if parser.parse_args(flags).quick else 5
    print("calibrating and quantizing, as a multiple of the forward loop over the same 32 batches (4 x 128 tokens)")
    print(f"{'algorithm':<24}{'ratio':>8}{'goal':>8}{'ModelOpt':>10}{'compiling, CPU s':>18}")
    for name, (_, _, _, goal, theirs) in LIMITS.items():
        ratio, compiling = row(name, rounds)
        print(f"{name:<24}{ratio:>8.2f}{goal or '':>8}{theirs:>10}{compiling:>18.1f}", flush=True)


if __name__ == "__main__":
    main()
