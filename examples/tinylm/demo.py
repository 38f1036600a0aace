"""Quantize the tiny language model of this folder, check the saved checkpoint in a new process, compare six recipes."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import data
import evaluate
import jax
import jax.numpy as jnp
import numpy as np

import jqopt
from jqopt.hf import load_model

FOLDER = Path(__file__).parent
PRESETS = ("int8_per_token", "fp8", "mxfp8", "int4_block_weight_only", "nvfp4_weight_only", "nvfp4")
BATCH, LENGTH = 8, 256


def main() -> None:
    """Runs the demo, or (`--check`) the part of it that a new process does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=64, help="windows of 256 tokens to evaluate on, 1 to 1349")
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not 1 <= options.windows <= 1349:
        parser.error(f"--windows {options.windows}: the test text has 1349 windows")
    if options.check is not None:
        check(options.check)
    else:
        demo(data.windows(LENGTH, options.windows))


def demo(windows: np.ndarray) -> None:
    """The whole walk: trace, plan, calibrate, quantize, evaluate, save, load elsewhere, compare recipes."""
    start = time.perf_counter()
    module, variables = load()
    values = sum(x.size for x in jax.tree.leaves(variables))
    say(f"A Llama of {values / 1e6:.1f} million parameters, trained on WikiText-2 and stored in bfloat16.")

    head("1. Trace: which operations read which parameter? (shapes only, nothing runs)")
    graph = jqopt.trace(module, variables, jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32))
    say(str(graph))

    head("2. Plan: what the recipe 'nvfp4' will do, made before anything runs")
    plan = jqopt.plan("nvfp4", graph)
    say(str(plan))

    head("3. Calibrate on 16 windows of the training text, then quantize")
    stats = jqopt.calibrate(plan, variables, calibration())
    quant = jqopt.quantize(plan, variables, stats)
    run = jqopt.apply(plan)
    path = "layers/mlp/down_proj/kernel"
    amax = ", ".join(f"{x:.1f}" for x in np.asarray(stats[path]["amax"].amax))
    say(f"{path}: largest activation in layers 0 to 3: {amax}")
    say(f"{path}: now {quant.params['params']['layers']['mlp']['down_proj']['kernel']}")

    head(f"4. Evaluate on {len(windows)} windows of {LENGTH} tokens of the test text")
    reference = float_model(module, variables)
    found = evaluate.compare(reference, lambda ids: run(quant, ids), windows, BATCH)
    say(f"perplexity {found.reference_perplexity:.2f} in float, {found.perplexity:.2f} in nvfp4")
    say(f"KL divergence {found.kl:.4f} nats; the same most likely token in {found.agreement:.1%} of the predictions")

    head("5. The same in one call, jqopt.quantize_model; save, load in a new process, compare the logits")
    elsewhere(jqopt.quantize_model(module, "nvfp4", params=variables, batches=calibration()), windows[:1])

    head("6. Six recipes")
    compare(module, variables, reference, windows)
    say(f"\n{time.perf_counter() - start:.0f} seconds in all.")


def load() -> tuple:
    """The module (computing in float32, its layers one scan) and its variables as stored, in bfloat16."""
    module, variables = load_model(FOLDER, scan_layers=True)
    return module, jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)


def float_model(module, variables) -> Callable:
    """Ids to logits, unquantized."""
    apply = jax.jit(module.apply)
    return lambda ids: apply(variables, ids)


def calibration() -> list[np.ndarray]:
    """Two batches of the training text."""
    return list(data.calibration_batches(2 * BATCH, LENGTH, BATCH))


def elsewhere(qm, ids: np.ndarray) -> None:
    """Saves, lets a new process load and run, and compares what comes back."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "tinylm-nvfp4"
        jqopt.save(checkpoint, qm)
        np.save(Path(folder) / "ids.npy", ids)
        np.save(Path(folder) / "logits.npy", np.asarray(qm(ids)))
        say(f"saved {sum(f.stat().st_size for f in checkpoint.rglob('*') if f.is_file()) / 1e6:.1f} MB")
        subprocess.run([sys.executable, __file__, "--check", folder], check=True)


def check(folder: Path) -> None:
    """The new process: the same logits as the one that saved."""
    module, _ = load()
    qm = jqopt.load(folder / "tinylm-nvfp4", module)
    expected, found = np.load(folder / "logits.npy"), np.asarray(qm(np.load(folder / "ids.npy")))
    if not np.allclose(found, expected, rtol=1e-5, atol=1e-5):
        sys.exit(f"the loaded model gives other logits: they differ by up to {np.abs(found - expected).max()}")
    same = "bit for bit" if np.array_equal(found, expected) else "up to rounding"
    say(f"loaded in a process of its own: the same {found.size:,} logits, {same}")


def compare(module, variables, reference: Callable, windows: np.ndarray) -> None:
    """A table of presets: all models see a batch before the next one comes, so the float logits are computed once."""
    models = {}
    for name in PRESETS:
        models[name] = jqopt.quantize_model(module, name, params=variables, batches=calibration())
    reports = {name: qm.report() for name, qm in models.items()}
    found = evaluate.compare_all(reference, models, windows, BATCH)
    first, before = found[PRESETS[0]], reports[PRESETS[0]].bytes_before / 1e6
    row = "{:<24}{:>16}{:>11}{:>12}{:>9}{:>17}".format
    say(row("recipe", "bits per weight", "size, MB", "perplexity", "KL", "top-1 agreement"))
    say(row("bfloat16 (not quantized)", "16.00", f"{before:.2f}", f"{first.reference_perplexity:.2f}", "", ""))
    for name in PRESETS:
        bits, size = reports[name].bits_per_weight, reports[name].bytes_after / 1e6
        f = found[name]
        say(row(name, f"{bits:.2f}", f"{size:.2f}", f"{f.perplexity:.2f}", f"{f.kl:.4f}", f"{f.agreement:.1%}"))
    say("Size: all parameters; the embedding (2.1 MB), which is also the head, and the norms stay in bfloat16.")


def head(text: str) -> None:
    """A heading."""
    say(f"\n{text}\n{'-' * len(text)}")


def say(text: str) -> None:
    """A line, at once also when the output is piped."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
