"""KL divergence of recipes to the float model on a trained language model, as it is and with outlier channels.

128 windows of 256 tokens of WikiText-2 test, calibrated on 64 windows of train: `python -m benchmarks.accuracy`.
Another model of the same tokens, of another seed say (`examples/tinylm/train.py --seed 1`): `--model DIR`.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jqopt
from jqopt import transforms
from jqopt.hf import load_model
from jqopt.hf.decoder import untie

ROOT = pathlib.Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "tests/golden/tinylm_reference"
WINDOWS, LENGTH, BATCH = 128, 256, 8
FACTORS = (8.0, 16.0, 32.0, 64.0)

W4 = "int4_block_weight_only"
ROWS: dict[str, Any] = {
    "int8 static": "int8",
    "int8_smoothquant": "int8_smoothquant",
    "int4 max": W4,
    "int4 mse": {"extends": [W4], "algorithm": "mse"},
    "int4 hqq": {"extends": [W4], "algorithm": "hqq"},
    "int4 local_hessian": {"extends": [W4], "algorithm": "local_hessian"},
    "int4 lsq": {"extends": [W4], "algorithm": "lsq"},
    "int4_awq": "int4_awq",
    "int4 awq_full": {"extends": [W4], "algorithm": "awq_full"},
    "int4_gptq": "int4_gptq",
    "int4 zero points, qep+gptq": {"extends": ["int4_best"], "algorithm": ["qep", {"name": "gptq", "scales": "max"}]},
    "int4_best": "int4_best",
    "nvfp4 weights, max": "nvfp4_weight_only",
    "nvfp4 weights, gptq": {"extends": ["nvfp4_weight_only"], "algorithm": "gptq"},
    "nvfp4 weights, qep+gptq": {"extends": ["nvfp4_weight_only_best"], "algorithm": ["qep", "gptq"]},
    "nvfp4_weight_only_best": "nvfp4_weight_only_best",
    "nvfp4": "nvfp4",
    "nvfp4_mse": "nvfp4_mse",
    "nvfp4_local_hessian": "nvfp4_local_hessian",
    "nvfp4_four_over_six": "nvfp4_four_over_six",
    "nvfp4_awq": "nvfp4_awq",
    "nvfp4_gptq": "nvfp4_gptq",
    "nvfp4 4/6, smooth+qep+gptq": {
        "extends": ["nvfp4_four_over_six"],
        "algorithm": ["smoothquant", "qep", "gptq"],
        "layerwise": True,
    },
    "nvfp4_best": "nvfp4_best",
    "nvfp4_feedback": "nvfp4_feedback",
    "nvfp4_svdquant": "nvfp4_svdquant",
    "mxfp4": "mxfp4",
    "mxfp4_mr_gptq": "mxfp4_mr_gptq",
    "w4a8_awq": "w4a8_awq",
}
W4A4 = {
    "match": {"path": "*", "op": "dot_general"},
    "weight": {"format": "int4", "granularity": "channel"},
    "input": {"format": "int4", "granularity": "token"},
}


def w4a4(*steps: str, online: bool = False) -> dict[str, Any]:
    """int4 weights by channel and activations by token; `online`: R4, the down projections' input is rotated."""
    turned = {**W4A4, "match": "*/down_proj/*", "algorithm": [{"name": "hadamard", "block": 0}, *steps]}
    rules = [turned, W4A4] if online else [W4A4]
    return {"extends": ["defaults/skip_sensitive"], "rules": rules, "algorithm": list(steps) or "max"}


ROWS |= {
    "int4 W4A4": w4a4(),
    "int4 W4A4, gptq": w4a4("gptq"),
    "int4 W4A4, smoothquant": w4a4("smoothquant"),
    "int4 W4A4, R1R2R4": w4a4(online=True),
    "int4 W4A4, R1R2R4, gptq": w4a4("gptq", online=True),
    "nvfp4, R1R2": "nvfp4",
}
ROTATED = {name for name in ROWS if "R1R2" in name}
"""Rows whose model is rotated first (R1, R2), with its norms' gains folded and its head untied."""


@functools.cache
def model(folder: pathlib.Path = REFERENCE) -> tuple[Any, Any, np.ndarray]:
    """(model, variables, test windows [WINDOWS, LENGTH])"""
    found, variables = load_model(folder)
    tokens = np.load(ROOT / "examples/tinylm/test_tokens.npy").astype(np.int32)
    return found, variables, tokens[: WINDOWS * LENGTH].reshape(WINDOWS, LENGTH)


def calibration() -> list[np.ndarray]:
    """Four batches of 16 windows of the training text."""
    tokens = np.load(ROOT / "examples/tinylm/calib_tokens.npy").astype(np.int32).reshape(-1)
    windows = tokens[: 64 * LENGTH].reshape(64, LENGTH)
    return [windows[i : i + 16] for i in range(0, 64, 16)]


@jax.jit
def divergence(reference: jax.Array, candidate: jax.Array) -> jax.Array:
    """Sum over positions of KL(reference || candidate), from logits."""
    p, q = jax.nn.log_softmax(reference, -1), jax.nn.log_softmax(candidate, -1)
    return jnp.sum(jnp.exp(p) * (p - q))


@functools.cache
def _reference(folder: pathlib.Path) -> list[np.ndarray]:
    found, variables, windows = model(folder)
    plain = jax.jit(found.apply)
    return [np.asarray(plain(variables, windows[i : i + BATCH, :-1])) for i in range(0, WINDOWS, BATCH)]


def measured(recipe: Any, variables: Any = None, rotate: bool = False, folder: pathlib.Path = REFERENCE) -> float:
    """KL x 1e3 to the float model, of its own weights or of others that compute the same; `rotate`: R1 and R2 first."""
    found, own, windows = model(folder)
    variables = own if variables is None else variables
    if rotate:
        found, variables = rotated(found, variables)
    qm = jqopt.quantize_model(found, recipe, params=variables, batches=calibration())
    total = sum(
        float(divergence(reference, qm(windows[i * BATCH : (i + 1) * BATCH, :-1])))
        for i, reference in enumerate(_reference(folder))
    )
    return 1e3 * total / (WINDOWS * (LENGTH - 1))


def rotated(found: Any, variables: Any) -> tuple[Any, Any]:
    """(model, variables) with a head of its own, gains folded, residual stream and value heads rotated: they compute
    the same."""
    config, variables = untie(found.config, variables)
    found = found.clone(config=config)
    graph = jqopt.trace(found, variables, model()[2][:1, :-1])
    for change in (
        transforms.fold_norms(graph), transforms.rotate_residual(graph, seed=0), transforms.rotate_values(graph, seed=0)
    ):  # fmt: skip
        variables = change(variables)
    return found, variables


def with_outliers(seed: int = 0, part: float = 0.02, folder: pathlib.Path = REFERENCE) -> Any:
    """The model's variables with outlier channels, 2 % of them 8 to 64 times as large, that compute the same.

    Powers of two: into norm gains and out of the weights that read them, into value rows and out of the output
    projection, into up rows and out of the down projection.
    """
    found, variables, windows = model(folder)
    graph = jqopt.trace(found, variables, windows[:1, :-1])
    for group, scale in _scales(graph, np.random.default_rng(seed), part):
        variables = transforms.fold_scale(graph, group, scale)(variables)
    return variables


def _scales(graph: Any, rng: np.random.Generator, part: float) -> Iterator[tuple[str, np.ndarray]]:
    """(group, what its input is divided by): the same channels of the residual stream in all layers."""

    def vector(n: int) -> np.ndarray:
        s = np.ones(n, np.float32)
        chosen = rng.choice(n, max(1, round(part * n)), replace=False)
        s[chosen] = rng.choice(FACTORS, len(chosen))
        return s

    def group(name: str) -> str:
        return next(g.name for g in graph.groups if any(s.key == name for s in g))

    layers = sorted({p.split("/self_attn")[0] for p in graph.parameters if "/self_attn" in p})
    width, inner = graph.parameters[f"{layers[0]}/mlp/up_proj/kernel"].shape
    heads, values = (graph.parameters[f"{layers[0]}/self_attn/{n}_proj/kernel"].shape for n in ("o", "v"))
    attention, feed = vector(width), vector(width)
    for layer in layers:
        yield group(f"{layer}/self_attn/q_proj/kernel"), 1 / attention
        yield group(f"{layer}/mlp/gate_proj/kernel"), 1 / feed
        per_head = vector(values[-1]).reshape(-1, 64)
        shared = heads[0] // values[-1]
        yield group(f"{layer}/self_attn/o_proj/kernel"), 1 / np.repeat(per_head, shared, axis=0).reshape(-1)
        yield group(f"{layer}/mlp/down_proj/kernel"), 1 / vector(inner)


def main(flags: list[str] | None = None) -> None:
    """The table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help=f"some of: {', '.join(ROWS)}")
    parser.add_argument("--only", choices=("natural", "outliers"), help="one of the two columns")
    parser.add_argument("--model", type=pathlib.Path, default=REFERENCE, help="a folder of the Hugging Face kind")
    args = parser.parse_args(flags)
    chosen: Mapping[str, Any] = {n: ROWS[n] for n in args.rows} or ROWS
    columns = {"natural": None, "outliers": None} if args.only is None else {args.only: None}
    if "outliers" in columns:
        columns["outliers"] = with_outliers(folder=args.model)
    print(f"{'recipe':<28}" + "".join(f"{c:>10}" for c in columns) + f"   (KL x 1e3 of {args.model.name})")
    for name, recipe in chosen.items():
        found = [measured(recipe, v, name in ROTATED, args.model) for v in columns.values()]
        print(f"{name:<28}" + "".join(f"{x:>10.2f}" for x in found), flush=True)


if __name__ == "__main__":
    main()
